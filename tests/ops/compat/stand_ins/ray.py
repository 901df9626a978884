"""What verl's modules read of Ray when they are imported: a type for annotations. No process is started."""


class ObjectRef:
    pass
