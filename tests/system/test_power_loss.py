"""F03: the power goes while checkpoints are saved. What a save that returned has written is found after the next start.

The file operations of several saves are recorded. For a cut after any of them the disk is put together again: what was
synced is there; of what was not, any part may be: whole writes, pieces of them, single names in a directory. A
file's bytes are durable by its own fsync, its name by that of its directory, and nothing else counts.

ZS_FAULT_TRIALS is the number of such states (300 without it).
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from zs_fast.errors import CheckpointUnusableError
from zs_fast.system.checkpoint import CheckpointStore, fault
from zs_fast.system.files import FileOperations
from zs_fast.system.lock import check_writable

STATES = int(os.environ.get("ZS_FAULT_TRIALS", "300"))
SEED = int(os.environ.get("ZS_FAULT_SEED", "0"))
PIECE_BYTES = 128
"""A write may be torn at multiples of this; a disk's sectors are larger."""


class Write(NamedTuple):
    offset: int
    data: bytes


class Entry(NamedTuple):
    """`name` of a directory now stands for `inode` (None: for nothing); `gone` is the name it was moved from."""

    name: str
    inode: Inode | None
    gone: str = ""


@dataclass(eq=False)
class Inode:
    """A file or a directory: all changes so far, of which the first `synced` are on the disk."""

    is_directory: bool
    changes: list[Write] | list[Entry] = field(default_factory=list)
    synced: int = 0


class Operation(NamedTuple):
    name: str
    path: str
    target: str = ""
    offset: int = 0
    data: bytes = b""


class RecordingFiles(FileOperations):
    """Does everything and notes what it was. `syncs` says whether an fsync of a path is really one."""

    def __init__(self, syncs: Callable[[Path], bool] = lambda path: True) -> None:
        self.operations: list[Operation] = []
        self._syncs = syncs
        self._opened: dict[int, tuple[Path, int]] = {}

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self._note("make_directory", path)

    def open(self, path: Path, flags: int) -> int:
        is_new = flags & os.O_CREAT and not path.exists()
        descriptor = super().open(path, flags)
        self._opened[descriptor] = path, 0
        if is_new:
            self._note("create", path)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        path, offset = self._opened[descriptor]
        taken = super().write(descriptor, data)
        self._opened[descriptor] = path, offset + taken
        self.operations.append(Operation("write", str(path), offset=offset, data=bytes(data[:taken])))
        return taken

    def fsync(self, descriptor: int) -> None:
        path, _ = self._opened[descriptor]
        if self._syncs(path):
            self._note("fsync", path)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        assert source.parent == target.parent, "this model of a disk moves names within a directory alone"
        self.operations.append(Operation("rename", str(source), target=str(target)))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._note("remove", path)

    def remove_directory(self, path: Path) -> None:
        super().remove_directory(path)
        self._note("remove", path)

    def save_tensors(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        super().save_tensors(tensors, path)
        self._note("create", path)
        self.operations.append(Operation("write", str(path), data=path.read_bytes()))

    def _note(self, name: str, path: Path) -> None:
        self.operations.append(Operation(name, str(path)))


class Disk:
    """What the operations so far have left, in memory and on the disk below `root`, which exists from the start."""

    def __init__(self, root: Path) -> None:
        self._root = Path(root)
        self._top = Inode(is_directory=True)
        self._now: dict[Path, Inode] = {self._root: self._top}

    def do(self, operation: Operation) -> None:
        path = Path(operation.path)
        if operation.name in ("create", "make_directory"):
            self._now[path] = Inode(is_directory=operation.name == "make_directory")
            self._parent(path).changes.append(Entry(path.name, self._now[path]))
        elif operation.name == "write":
            self._now[path].changes.append(Write(operation.offset, operation.data))
        elif operation.name == "fsync":
            self._now[path].synced = len(self._now[path].changes)
        elif operation.name == "remove":
            del self._now[path]
            self._parent(path).changes.append(Entry(path.name, None))
        else:
            target = Path(operation.target)
            moved = {old: inode for old, inode in self._now.items() if old == path or path in old.parents}
            for old in moved:
                del self._now[old]
            self._now |= {target / old.relative_to(path): inode for old, inode in moved.items()}
            self._parent(path).changes.append(Entry(target.name, self._now[target], gone=path.name))

    def after_a_cut(self, where: Path, keeps: Callable[[Write | Entry], bool]) -> None:
        """Write what is found after the next start to the folder `where`; `keeps` is asked for each unsynced piece."""
        self._restore(self._top, where, keeps)

    def _parent(self, path: Path) -> Inode:
        return self._now[path.parent]

    def _restore(self, inode: Inode, where: Path, keeps: Callable[[Write | Entry], bool]) -> None:
        durable, pending = inode.changes[: inode.synced], inode.changes[inode.synced :]
        if not inode.is_directory:
            content = bytearray()
            arrived = [piece for one in pending for piece in pieces(one) if keeps(piece)]
            for write in [*durable, *arrived]:
                end = write.offset + len(write.data)
                content.extend(bytes(max(0, end - len(content))))  # a hole reads as zeros
                content[write.offset : end] = write.data
            where.write_bytes(content)
            return
        where.mkdir()
        names: dict[str, Inode] = {}
        for entry in [*durable, *(entry for entry in pending if keeps(entry))]:
            names.pop(entry.gone, None)
            names.pop(entry.name, None)
            if entry.inode is not None:
                names[entry.name] = entry.inode
        for name, child in names.items():
            self._restore(child, where / name, keeps)


def pieces(write: Write) -> list[Write]:
    starts = range(0, len(write.data), PIECE_BYTES)
    return [Write(write.offset + start, write.data[start : start + PIECE_BYTES]) for start in starts]


def kept(rule: str, draws: random.Random) -> Callable[[Write | Entry], bool]:
    """Which unsynced pieces reach the disk. By `any` each does with a chance that is drawn once for a state."""
    if rule == "any":
        share = draws.choice((0.1, 0.5, 0.9))
        return lambda piece: draws.random() < share
    return {
        "nothing": lambda piece: False,
        "everything": lambda piece: True,
        "names": lambda piece: isinstance(piece, Entry),
        "bytes": lambda piece: isinstance(piece, Write),
    }[rule]


@dataclass
class Saved:
    """One save of the recording: which operations lie between its return and its removal, and its files."""

    step: int
    contents: dict[str, bytes]
    begun: int
    returned: int
    removed: int = 1 << 60


@dataclass
class Recording:
    root: Path
    operations: list[Operation]
    saves: list[Saved]


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def record(root: Path, syncs: Callable[[Path], bool] = lambda path: True) -> Recording:
    """A run's folder is made, and four steps saved, two kept; the last is saved again, as after a resume."""
    files, run, saves = RecordingFiles(syncs), root / "runs" / "run", []
    check_writable(run, files=files)
    store = CheckpointStore(run, 2, files=files)
    for number, step in enumerate((1, 2, 3, 4, 4)):

        def write_model(folder: Path, text: str = f"{number} " * 40) -> None:
            descriptor = files.open(folder / "config.json", os.O_WRONLY | os.O_CREAT)
            for part in (text, text):
                files.write(descriptor, memoryview(part.encode()))
            files.close(descriptor)
            files.save_tensors({"weight": torch.full((16, 8), float(len(text)))}, folder / "model.safetensors")

        if number == 3:
            store = CheckpointStore(run, 2, files=files)
        begun = len(files.operations)
        checkpoint = store.save(
            step,
            write_model=write_model,
            tensors={"moment": torch.full((99,), number / 7), "count": torch.tensor(step)},
            state={"step": step, "number": number},
        )
        returned = next(  # all after the commit may be undone, but for the return of `save`
            index
            for index, operation in enumerate(files.operations)
            if index > begun and operation.name == "rename" and operation.target.endswith(f"/step_{step}")
        )
        saves.append(Saved(step, contents(checkpoint.path), begun, returned + 2))
        assert files.operations[returned + 1].name == "fsync" or syncs(store.folder) is False
        for index in range(begun, len(files.operations)):
            operation = files.operations[index]
            if operation.name == "rename" and Path(operation.path).name.startswith("step_"):
                gone = int(Path(operation.path).name.removeprefix("step_"))
                next(s for s in saves if s.step == gone and s.removed > index).removed = index
    return Recording(root, files.operations, saves)


def trouble(recording: Recording, cut: int, folder: Path) -> str:
    """What is wrong with the folder found after a cut before operation number `cut`; empty: nothing."""
    run = folder / "runs" / "run"
    alive = [saved for saved in recording.saves if saved.returned <= cut <= saved.removed]
    begun = [saved for saved in recording.saves if saved.begun < cut]
    for saved in alive:
        path = run / "checkpoints" / f"step_{saved.step}"
        if reason := fault(path, saved.step):
            return f"step {saved.step} was saved, and is lost: {reason}"
        if contents(path) not in [other.contents for other in begun if other.step == saved.step]:
            return f"step {saved.step} holds neither what was saved nor what was to replace it"
    store = CheckpointStore(run, 2)
    for _ in range(2):
        try:
            checkpoint = store.newest()
        except CheckpointUnusableError as error:
            return str(error)
        if store.warnings:
            return f"newest warns: {store.warnings}"
        if checkpoint is None:
            if any(saved.returned <= cut for saved in recording.saves):
                return "nothing is found, though a save had returned"
        else:
            if contents(checkpoint.path) not in [saved.contents for saved in begun if saved.step == checkpoint.step]:
                return f"a bad load: step {checkpoint.step} is no state that was ever saved"
            if set(checkpoint.tensors()) != {"moment", "count"}:
                return "the loader misses tensors"
            newest = max((saved.step for saved in recording.saves if saved.returned <= cut), default=0)
            if checkpoint.step < newest:
                return f"step {newest} had been saved, step {checkpoint.step} is found"
        store.clean_up()  # as the next start does, and then again
        if store.warnings:
            return f"clean_up warns: {store.warnings}"
    return ""


def states(recording: Recording, number: int, seed: int, scratch: Path) -> Iterator[tuple[int, str, str]]:
    """(cut, rule, trouble) of `number` states, their cuts spread evenly over the recording."""
    draws, last = random.Random(seed), len(recording.operations)
    cuts = sorted(min(last, int((place + draws.random()) * (last + 1) / number)) for place in range(number))
    disk, done = Disk(recording.root), 0
    for place, cut in enumerate(cuts):
        for operation in recording.operations[done:cut]:
            disk.do(operation)
        done = cut
        rule = ("nothing", "everything", "names", "bytes", "any", "any", "any", "any")[(place + seed) % 8]
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            disk.after_a_cut(Path(folder, "found"), kept(rule, draws))
            found = trouble(recording, cut, Path(folder, "found"))
        yield cut, rule, found


def test_after_a_power_cut_every_save_that_returned_is_found(memory_disk, record_property):
    root = memory_disk / "disk"
    root.mkdir()
    recording = record(root)
    assert len(recording.saves) == 5 and len(recording.operations) > 150
    lost = [found for found in states(recording, STATES, SEED, memory_disk) if found[2]]
    assert lost == [], f"{len(lost)} of {STATES} states (seed {SEED})"
    record_property("trials", STATES)


LEFT_OUT = {
    "of files": lambda path: path.suffix == "" and not path.name.startswith(".tmp-latest"),
    "of the folder of checkpoints": lambda path: path.name != "checkpoints",
    "of a checkpoint's folder": lambda path: not path.name.startswith(".tmp-"),
    "of the folder that runs lie in": lambda path: path.name != "runs",
}


@pytest.mark.parametrize("which", LEFT_OUT)
def test_a_sync_that_is_left_out_is_noticed(memory_disk, which):
    """The disk above is no kinder than a real one may be."""
    root = memory_disk / which
    root.mkdir()
    recording = record(root, LEFT_OUT[which])
    assert any(found for _, _, found in states(recording, 150, 0, memory_disk))


def test_the_whole_recording_ends_in_the_real_folder(memory_disk):
    root = memory_disk / "real"
    root.mkdir()
    recording = record(root)
    disk = Disk(root)
    for operation in recording.operations:
        disk.do(operation)
    disk.after_a_cut(memory_disk / "found", lambda piece: True)
    assert contents(memory_disk / "found") == contents(root)
