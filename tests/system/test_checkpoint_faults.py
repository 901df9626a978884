"""A commit is interrupted at each of its file operations, in each way a disk can: old or new state, never a mix.

The operations are counted on a first run. Then, for every k, a forked child dies before operation k, half way through
it, or after it; and in this process operation k fails, once or from then on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zs_fast.errors import CheckpointError
from zs_fast.system.checkpoint import CheckpointStore, fault
from zs_fast.system.files import FileOperations

DIED = 77


@dataclass
class FaultyFiles(FileOperations):
    """Counts operations and spoils number `at`. With `at` None it only counts."""

    at: int | None = None
    deed: str = "none"
    """`die_before`, `die_half`, `die_after`, `short`, or `error`, `error_after`, `errors_from` with `code`."""
    code: int = 0
    trace: list[tuple[str, str]] = field(default_factory=list)
    descriptors: dict[int, Path] = field(default_factory=dict)

    def make_directory(self, path: Path) -> None:
        self._do("make_directory", path, lambda: super(FaultyFiles, self).make_directory(path))

    def open(self, path: Path, flags: int) -> int:
        descriptor = self._do("open", path, lambda: super(FaultyFiles, self).open(path, flags))
        self.descriptors[descriptor] = path
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        half = data[: len(data) // 2]
        write = super().write
        if self._is_due() and self.deed == "short" and len(half):
            data = half
        return self._do(
            "write", self.descriptors[descriptor], lambda: write(descriptor, data), lambda: write(descriptor, half)
        )

    def fsync(self, descriptor: int) -> None:
        # The real fsync would only make the test slow: no test here cuts the power.
        self._do("fsync", self.descriptors[descriptor], lambda: None)

    def close(self, descriptor: int) -> None:
        self._do("close", self.descriptors[descriptor], lambda: super(FaultyFiles, self).close(descriptor))

    def rename(self, source: Path, target: Path) -> None:
        self._do("rename", target, lambda: super(FaultyFiles, self).rename(source, target))

    def unlink(self, path: Path) -> None:
        self._do("unlink", path, lambda: super(FaultyFiles, self).unlink(path))

    def remove_directory(self, path: Path) -> None:
        self._do("remove_directory", path, lambda: super(FaultyFiles, self).remove_directory(path))

    def save_tensors(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        save = super().save_tensors

        def half() -> None:
            save(tensors, path)
            os.truncate(path, path.stat().st_size // 2)

        self._do("save_tensors", path, lambda: save(tensors, path), half)

    def _is_due(self) -> bool:
        return self.at == len(self.trace)

    def _do(self, name: str, path: Path, act: Callable, half: Callable = lambda: None):
        index = len(self.trace)
        due = self._is_due()
        self.trace.append((name, str(path)))
        fails_later = self.deed == "errors_from" and self.at is not None and index >= self.at
        if (due and self.deed == "error") or fails_later:
            if name == "close":
                act()  # as Linux does: the descriptor is gone even if close reports an error
            raise OSError(self.code, os.strerror(self.code), str(path))
        if due and self.deed == "die_before":
            os._exit(DIED)
        if due and self.deed == "die_half":
            half()
            os._exit(DIED)
        result = act()
        if due and self.deed == "die_after":
            os._exit(DIED)
        if due and self.deed == "error_after":
            raise OSError(self.code, os.strerror(self.code), str(path))
        return result


class QuickFiles(FileOperations):
    """No fsync: for setting up and looking afterwards."""

    def fsync(self, descriptor: int) -> None:
        pass


def save(folder: Path, step: int, *, keep: int = 2, files: FileOperations | None = None, text: str = "") -> None:
    files = files or QuickFiles()
    save_with(CheckpointStore(folder, keep, files=files), step, files, text)


def save_with(store: CheckpointStore, step: int, files: FileOperations, text: str = "") -> None:
    """A checkpoint whose every file tells its step. The model is written through `files` too, so it can fail too."""

    def write_model(model_folder: Path) -> None:
        for name in ("config.json", "generation_config.json"):
            descriptor = files.open(model_folder / name, os.O_WRONLY | os.O_CREAT)
            try:
                rest = memoryview(f'{{"step": {step}, "file": "{name}{text}"}}'.encode())
                while rest:
                    rest = rest[files.write(descriptor, rest) :]
            finally:
                files.close(descriptor)
        files.save_tensors({"weight": torch.full((16, 8), float(step))}, model_folder / "model.safetensors")

    tensors = {"moment": torch.full((33,), step / 7), "count": torch.tensor(step)}
    store.save(step, write_model=write_model, tensors=tensors, state={"step": step, "rates": [0.1 * step, text]})


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@dataclass
class Scene:
    """A run folder before a save, and what may be the newest checkpoint after the save broke off."""

    name: str
    before: Path
    step: int
    old: dict[str, bytes] | None
    new: dict[str, bytes]
    num_operations: int
    trace: list[tuple[str, str]]

    def fresh(self, where: Path) -> Path:
        shutil.rmtree(where, ignore_errors=True)
        shutil.copytree(self.before, where)
        return where

    def attempt(self, folder: Path, files: FileOperations) -> CheckpointStore:
        store = CheckpointStore(folder, 2, files=files)
        save_with(store, self.step, files, "new")
        return store

    def check(self, folder: Path) -> str:
        """After the next start: `old` or `new`; fails on anything else. Then the next save must work."""
        store = CheckpointStore(folder, 2, files=QuickFiles())
        seen_by_a_reader = store.newest()
        store.clean_up()
        assert store.warnings == []
        hint = folder / "latest"
        if hint.exists():
            named = hint.read_text()
            assert named.endswith("\n") and (folder / named.strip() / "manifest.json").exists(), named
        left = [path.name for path in (*folder.glob(".*"), *(folder / "checkpoints").glob(".*"))]
        assert left == [], f"left after the next start: {left}"
        checkpoint = store.newest()
        for path in (folder / "checkpoints").glob("step_*"):
            assert fault(path, int(path.name[5:])) == "", "no damaged checkpoint may come from a crash"
        assert (checkpoint is None) == (seen_by_a_reader is None)
        found = contents(checkpoint.path) if checkpoint else None
        if found is not None and found == self.new:
            outcome = "new"
        else:
            assert found == self.old, f"neither the old nor the new state: {sorted(found or {})}"
            outcome = "old"
        save_with(store, self.step, QuickFiles(), "new")
        again = store.newest()
        assert again is not None and again.step == self.step and contents(again.path) == self.new
        assert store.warnings == []
        assert (folder / "latest").read_text() == f"checkpoints/step_{self.step}\n"
        return outcome


SCENES = ("first", "with_retention", "same_step_again", "same_step_damaged")


@pytest.fixture
def scratch(memory_disk: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=memory_disk) as folder:
        yield Path(folder)


@pytest.fixture(scope="module", params=SCENES)
def scene(request: pytest.FixtureRequest, memory_disk: Path) -> Iterator[Scene]:
    root = Path(tempfile.mkdtemp(prefix=request.param, dir=memory_disk))
    before = root / "before"
    before.mkdir()
    step = 1 if request.param == "first" else 2 if request.param.startswith("same_step") else 3
    old_step = {"first": None, "with_retention": 2, "same_step_again": 2, "same_step_damaged": 1}[request.param]
    for done in () if request.param == "first" else (1, 2):
        save(before, done)
    if request.param == "same_step_damaged":
        (before / "checkpoints/step_2/trainer.json").write_text("{}")
    if request.param == "with_retention":
        stale = before / "checkpoints/.tmp-3-dead"
        (stale / "model").mkdir(parents=True)
        (stale / "model/config.json").write_text("{")
    scene = Scene(request.param, before, step, None, {}, 0, [])
    if old_step is not None:
        scene.old = contents(before / f"checkpoints/step_{old_step}")
    files = FaultyFiles()
    scene.attempt(scene.fresh(root / "after"), files)
    scene.new = contents(root / "after" / "checkpoints" / f"step_{step}")
    scene.num_operations, scene.trace = len(files.trace), files.trace
    assert scene.new != scene.old
    yield scene
    shutil.rmtree(root)


Record = Callable[[str, object], None]


def test_a_crash_at_any_operation_leaves_the_old_or_the_new_state(
    scene: Scene, scratch: Path, record_property: Record
) -> None:
    outcomes: Counter[str] = Counter()
    for k in range(scene.num_operations):
        half = ("die_half",) if scene.trace[k][0] in ("write", "save_tensors") else ()
        for deed in ("die_before", *half, "die_after"):
            folder = scene.fresh(scratch / "run")
            assert run_child(scene, folder, FaultyFiles(at=k, deed=deed)) == DIED
            if scene.name == "same_step_damaged":
                outcomes[check_damaged(scene, folder)] += 1
            else:
                outcomes[scene.check(folder)] += 1
    assert outcomes["old"] > 0 and outcomes["new"] > 0
    assert sum(outcomes.values()) >= 2 * scene.num_operations
    record_property("trials", sum(outcomes.values()))


def check_damaged(scene: Scene, folder: Path) -> str:
    """As Scene.check, where a checkpoint that was damaged before the save may still be there to be warned of."""
    store = CheckpointStore(folder, 2, files=QuickFiles())
    store.clean_up()
    checkpoint = store.newest()
    assert checkpoint is not None
    found = contents(checkpoint.path)
    assert found in (scene.old, scene.new)
    assert not [path.name for path in (*folder.glob(".*"), *(folder / "checkpoints").glob(".*"))]
    save_with(store, scene.step, QuickFiles(), "new")
    again = store.newest()
    assert again is not None and contents(again.path) == scene.new and store.warnings == []
    return "new" if found == scene.new else "old"


@pytest.mark.parametrize("scene", ["with_retention", "same_step_again"], indirect=True)
def test_a_crash_while_the_next_start_cleans_up_loses_nothing(
    scene: Scene, scratch: Path, record_property: Record
) -> None:
    crashes = 0
    for k in range(scene.num_operations):
        folder = scene.fresh(scratch / "run")
        assert run_child(scene, folder, FaultyFiles(at=k, deed="die_after")) == DIED
        cut_short = scratch / "cut_short"
        counting = FaultyFiles()
        shutil.rmtree(cut_short, ignore_errors=True)
        shutil.copytree(folder, cut_short)
        CheckpointStore(cut_short, 2, files=counting).clean_up()
        for operation in range(len(counting.trace)):
            shutil.rmtree(cut_short)
            shutil.copytree(folder, cut_short)
            child = os.fork()
            if child == 0:
                files = FaultyFiles(at=operation, deed="die_after")
                CheckpointStore(cut_short, 2, files=files).clean_up()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DIED
            scene.check(cut_short)
            crashes += 1
    assert crashes > 20
    record_property("trials", crashes)


ERRORS = [
    pytest.param("error", errno.ENOSPC, id="ENOSPC"),
    pytest.param("error_after", errno.EIO, id="EIO_after"),
    pytest.param("errors_from", errno.ENOSPC, id="ENOSPC_from_then_on"),
    pytest.param("error", errno.EIO, id="EIO", marks=pytest.mark.full),
    pytest.param("error", errno.EDQUOT, id="EDQUOT", marks=pytest.mark.full),
    pytest.param("errors_from", errno.EIO, id="EIO_from_then_on", marks=pytest.mark.full),
    pytest.param("errors_from", errno.EROFS, id="EROFS_from_then_on", marks=pytest.mark.full),
]


@pytest.mark.parametrize("deed, code", ERRORS)
@pytest.mark.parametrize("scene", ["first", "with_retention", "same_step_again"], indirect=True)
def test_an_error_at_any_operation_is_told_and_leaves_the_old_state(
    scene: Scene, scratch: Path, deed: str, code: int, record_property: Record
) -> None:
    raised = warned = 0
    for k in range(scene.num_operations):
        folder = scene.fresh(scratch / "run")
        files = FaultyFiles(at=k, deed=deed, code=code)
        store = CheckpointStore(folder, 2, files=files)
        try:
            save_with(store, scene.step, files, "new")
        except CheckpointError as error:
            raised += 1
            message = str(error)
            assert type(error) is CheckpointError and error.exit_code == 4
            assert str(folder / "checkpoints") in message and os.strerror(code) in message
            assert "free there" in message and "It needs at least" in message
        else:
            warned += 1
            assert store.warnings and os.strerror(code) in " ".join(store.warnings)
            newest = CheckpointStore(folder, 2).newest()
            assert newest is not None and contents(newest.path) == scene.new
        if deed != "errors_from":
            # The run goes on and saves again with the same store.
            copy = scratch / "same_store"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            store.root = copy
            save_with(store, scene.step, files, "new")
            assert contents(copy / "checkpoints" / f"step_{scene.step}") == scene.new
        outcome = scene.check(folder)
        assert outcome in ("old", "new")
    assert raised > 20 and raised + warned == scene.num_operations
    record_property("trials", scene.num_operations)


def test_a_short_write_is_completed(scene: Scene, scratch: Path, record_property: Record) -> None:
    writes = [k for k, (name, _) in enumerate(scene.trace) if name == "write"]
    assert len(writes) >= 4
    for k in writes:
        folder = scene.fresh(scratch / "run")
        store = scene.attempt(folder, FaultyFiles(at=k, deed="short"))
        assert store.warnings == []
        assert contents(folder / "checkpoints" / f"step_{scene.step}") == scene.new
    record_property("trials", len(writes))


def test_a_descriptor_never_leaks(scene: Scene, scratch: Path, record_property: Record) -> None:
    for k in range(scene.num_operations):
        folder = scene.fresh(scratch / "run")
        before = len(os.listdir("/proc/self/fd"))
        with contextlib.suppress(CheckpointError):
            scene.attempt(folder, FaultyFiles(at=k, deed="error", code=errno.EIO))
        assert len(os.listdir("/proc/self/fd")) == before, scene.trace[k]
    record_property("trials", scene.num_operations)


def test_everything_is_synced_in_the_right_order(scene: Scene) -> None:
    """Files after their last write, directories after their last new name, the parent after the rename."""
    in_place = f"/checkpoints/step_{scene.step}"
    final = next(i for i, (name, path) in enumerate(scene.trace) if name == "rename" and path.endswith(in_place))
    checkpoints = str(Path(scene.trace[final][1]).parent)
    temporary = next(
        path for name, path in scene.trace if name == "make_directory" and Path(path).name.startswith(".tmp-")
    )

    def indices(path: str, *names: str) -> list[int]:
        return [i for i, (name, where) in enumerate(scene.trace[:final]) if name in names and where == path]

    manifest_begun = indices(f"{temporary}/manifest.json", "open")[0]
    for name in scene.new:
        path = f"{temporary}/{name}"
        synced = max(indices(path, "fsync"))
        assert synced > max(indices(path, "write", "save_tensors")), f"{name} is written after its sync"
        assert synced < manifest_begun or name == "manifest.json"
        named = min(indices(path, "open", "save_tensors"))
        assert max(indices(str(Path(path).parent), "fsync")) > named, f"the name of {name} is not on the disk"
    assert scene.trace[final + 1 : final + 3] == [("open", checkpoints), ("fsync", checkpoints)]
    removals = [i for i, (name, path) in enumerate(scene.trace) if name == "unlink" and ".tmp-removed" in path]
    assert all(index > final + 2 for index in removals), "nothing old goes before the new one is on the disk"


def run_child(scene: Scene, folder: Path, files: FaultyFiles) -> int:
    child = os.fork()
    if child == 0:
        try:
            scene.attempt(folder, files)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
