"""Groups as plain JSON values and back, so that each rank can show all others what it played.

The two functions are inverse to each other for every noun of `types`: values come back equal, floats to the last bit.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from zs_fast.types import Group


def groups_to_json(groups: Sequence[Group]) -> list[Any]:
    return [plain(group) for group in groups]


def groups_from_json(values: Sequence[Any]) -> list[Group]:
    return [build(Group, value) for value in values]


def plain(value: Any) -> Any:
    """A dataclass becomes [its name, field values...]: shorter than with field names, and unions need no guess."""
    if dataclasses.is_dataclass(value):
        return [type(value).__name__, *(plain(getattr(value, name)) for name in _field_types(type(value)))]
    if isinstance(value, tuple):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, StrEnum) else value


def build(kind: Any, value: Any) -> Any:
    """What `plain` made of a value of this type. Raises TypeError or ValueError for anything else."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        choices = [choice for choice in get_args(kind) if choice is not type(None)]
        named = [choice for choice in choices if dataclasses.is_dataclass(choice) and choice.__name__ == value[0]]
        return build(named[0] if named else choices[0], value)
    if origin is tuple:
        inner = get_args(kind)[0]
        return tuple(value) if inner in (int, float, str) else tuple(build(inner, one) for one in value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        fields = _field_types(kind)
        return kind(**{name: build(inner, one) for (name, inner), one in zip(fields.items(), value[1:], strict=True)})
    return kind(value)


@cache
def _field_types(kind: type) -> Mapping[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
