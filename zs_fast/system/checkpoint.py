"""Checkpoints that survive a crash at any instant, and a check that the one loaded is what was saved.

    <run>/checkpoints/step_12/model/...             a Hugging Face folder, written by the caller
                              trainer.safetensors   optimizer and other tensors
                              trainer.json          the rest of the state
                              manifest.json         size and sha256 of each file above, and of itself
    <run>/latest                                    a hint for people and scripts; never read here

A commit writes `.tmp-<step>-<uuid>/`, syncs each file and directory, writes the manifest last, reads everything back,
renames to `step_<step>` and syncs the parent. So a directory with that name is complete, or damaged after the fact,
which the manifest shows. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zs_fast.errors import CheckpointError, CheckpointUnusableError, PreflightError
from zs_fast.system.files import (
    FileOperations,
    discard,
    format_bytes,
    free_bytes,
    make_durable_directory,
    remove_tree,
    replace_file,
    sync_path,
    write_file,
)

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "zs_fast checkpoint 1"
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step_(0|[1-9][0-9]*)")
PICKLED_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".joblib", ".npy", ".npz", ".dill"})
"""Files that loaders elsewhere may unpickle; a checkpoint with one is neither written nor read."""

MAY_DIFFER = frozenset(
    {"name", "output", "train.steps", "train.save_every", "train.keep_checkpoints", "train.eval_every"}
    | {"train.rank_timeout_s", "train.sharding", "train.journal"}
    | {"train.max_failed_saves", "train.max_nonfinite_steps", "train.phase_timeout_s"}
    | {"log.*", "eval.*"}
)
"""Config keys that may change between a run and its resume, because no training number depends on them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    step: int
    path: Path
    state: Mapping[str, Any]
    """What was passed to `save`, as read from trainer.json."""

    @property
    def model_path(self) -> Path:
        """A Hugging Face folder."""
        return self.path / "model"

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """The tensors passed to `save`, bit for bit. Raises CheckpointUnusableError if the file can't be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / "trainer.safetensors"
        try:
            return load_file(path, device=device)
        except (OSError, SafetensorError) as error:
            raise CheckpointUnusableError(f"{path} can't be read as safetensors: {error}") from error


class CheckpointStore:
    """The checkpoints of one run folder. One process may write (see `system.lock`); any may read."""

    def __init__(self, root: Path, keep: int, *, files: FileOperations | None = None) -> None:
        self.root = Path(root)
        self.keep = keep
        """How many verified checkpoints retention leaves; 0 keeps all."""
        self.warnings: list[str] = []
        """What the last `save`, `newest` or `clean_up` met and could live with; empty when all was well."""
        self._files = files or FileOperations()
        self._is_clean = False

    @property
    def folder(self) -> Path:
        return self.root / "checkpoints"

    def save(
        self,
        step: int,
        *,
        write_model: Callable[[Path], None],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> Checkpoint:
        """Commit `checkpoints/step_<step>`; once this returns, the checkpoint survives a power cut.

        `write_model(folder)` writes a Hugging Face folder into an existing empty directory. `tensors` may not share
        memory with each other. `state` must be plain JSON without NaN or infinity.

        Raises CheckpointError when anything can't be written; earlier checkpoints are then as they were. Trouble after
        the commit (the `latest` hint, removing old checkpoints) is put into `warnings`.
        """
        self.warnings = []
        if not self._is_clean:
            self.clean_up()
        temporary = self.folder / f".tmp-{step}-{uuid.uuid4().hex}"
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            make_durable_directory(self._files, self.folder)
            self._write(temporary, step, write_model, tensors, state)
            reason = fault(temporary, step)
            if reason:
                raise CheckpointError(f"checkpoint of step {step} does not read back as written: {reason}")
            self._put_in_place(temporary, step)
        except BaseException as error:
            discard(self._files, temporary)
            if _is_disk_trouble(error):
                raise self._write_error(step, error, tensors) from error
            raise
        self._after_commit(step)
        return _load(self._path(step), step)

    def check_room(self, checkpoint_bytes: int, saves: int) -> str:
        """Room for this run's checkpoints, of about `checkpoint_bytes` each, `saves` more of them to come?

        While one is written, those that are kept are still there. Returns a warning where that does not fit, an empty
        string where it does. Raises PreflightError where not even one can be written beside the one before it.
        """
        held = sum(_size(path) for _, path in self._candidates())
        existing = held // max(checkpoint_bytes, 1)
        most = existing + saves if not self.keep else min(existing + saves, self.keep + 1)
        needed = max(0, most * checkpoint_bytes - held)
        least = max(0, min(2, most) * checkpoint_bytes - held)
        free = free_bytes(self.folder)
        if free >= needed:
            return ""
        told = (
            f"The checkpoints of this run will need {format_bytes(needed)} in {self.folder} ({most} of "
            f"{format_bytes(checkpoint_bytes)}, less what is there already), and {format_bytes(free)} are free. Make "
            "room, lower train.keep_checkpoints or choose another --output."
        )
        if free < least:
            raise PreflightError(told)
        return told

    def newest(self) -> Checkpoint | None:
        """The checkpoint with the highest step that verifies, or None when there is none at all.

        Damaged ones are skipped and named in `warnings`. Raises CheckpointUnusableError, naming each and its fault,
        when there are checkpoints but none is usable.
        """
        self.warnings = []
        candidates = self._candidates()
        for step, path in candidates:
            try:
                reason = fault(path, step)
                if reason:
                    raise CheckpointUnusableError(f"{path}: {reason}")
                return _load(path, step)
            except CheckpointUnusableError as error:
                self.warnings.append(f"checkpoint skipped: {error}")
        if not candidates:
            return None
        raise CheckpointUnusableError(
            f"None of the {len(candidates)} checkpoints in {self.folder} can be used:\n  "
            + "\n  ".join(self.warnings)
            + "\nRestore one from a copy, or start a new run with another --output."
        )

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, which another process has just found sound. CheckpointUnusableError if it can't be
        read here."""
        return _load(dict(self._candidates()).get(step, self._path(step)), step)

    def clean_up(self) -> None:
        """Remove what an interrupted save left. Only the process that holds the run's lock may call it.

        A checkpoint that was moved aside to be replaced, with nothing in its place, is moved back.
        """
        self.warnings = []
        self._is_clean = True
        for folder, pattern in ((self.root, ".tmp-*"), (self.folder, ".tmp-*"), (self.folder, ".old-*")):
            for path in sorted(folder.glob(pattern)):
                home = path.with_name(path.name.removeprefix(".old-"))
                try:
                    if STEP_NAME.fullmatch(home.name) and not home.exists():
                        self._files.rename(path, home)
                        sync_path(self._files, self.folder)
                    else:
                        remove_tree(self._files, path)
                except OSError as error:
                    self.warnings.append(f"{path}, left by an interrupted save, can't be removed: {error}")

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _candidates(self) -> list[tuple[int, Path]]:
        """(step, path), highest step first; one that is moved aside stands in where its place is empty."""
        found: dict[int, Path] = {}
        for prefix in (".old-", ""):
            for path in self.folder.glob(f"{prefix}step_*"):
                match = STEP_NAME.fullmatch(path.name.removeprefix(prefix))
                if match:
                    found[int(match.group(1))] = path
        return sorted(found.items(), reverse=True)

    def _write(
        self,
        folder: Path,
        step: int,
        write_model: Callable[[Path], None],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> None:
        files = self._files
        state_bytes = json.dumps(state, allow_nan=False, indent=1).encode()
        files.make_directory(folder)
        files.make_directory(folder / "model")
        write_model(folder / "model")
        files.save_tensors(tensors, folder / "trainer.safetensors")
        write_file(files, folder / "trainer.json", state_bytes)
        names, directories = _tree(folder)
        entries = {}
        for name in names:
            sync_path(files, folder / name)
            entries[name] = {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
            _forget_cached(folder / name)
        write_file(files, folder / MANIFEST, _manifest_bytes({"format": FORMAT, "step": step, "files": entries}))
        for directory in directories:
            sync_path(files, folder / directory)

    def _put_in_place(self, temporary: Path, step: int) -> None:
        target = self._path(step)
        aside = target.with_name(f".old-{target.name}")
        if os.path.lexists(target):
            if os.path.lexists(aside):
                remove_tree(self._files, aside)
            self._files.rename(target, aside)
            sync_path(self._files, self.folder)
        self._files.rename(temporary, target)
        sync_path(self._files, self.folder)

    def _after_commit(self, step: int) -> None:
        try:
            replace_file(self._files, self.root / "latest", f"checkpoints/step_{step}\n".encode())
        except OSError as error:
            self.warnings.append(f"{self.root / 'latest'} can't be written: {error}")
        doomed = [self.folder / f".old-step_{step}"]
        if self.keep:
            others = [(other, path) for other, path in self._candidates() if other != step]
            sound = [path for other, path in others if not fault(path, other, check_contents=False)]
            kept = set(sound[: self.keep - 1])
            doomed += [path for _, path in others if path not in kept]
        for path in doomed:
            try:
                if os.path.lexists(path):
                    self._remove(path)
            except OSError as error:
                self.warnings.append(f"old checkpoint {path} can't be removed: {error}")

    def _remove(self, path: Path) -> None:
        """Unname it first, so that a crash half way leaves no directory that looks like a damaged checkpoint."""
        temporary = self.folder / f".tmp-removed-{uuid.uuid4().hex}"
        self._files.rename(path, temporary)
        remove_tree(self._files, temporary)

    def _write_error(self, step: int, error: BaseException, tensors: Mapping[str, Tensor]) -> CheckpointError:
        try:
            free = format_bytes(free_bytes(self.folder))
        except OSError as no_answer:
            free = f"an unknown number of bytes ({no_answer})"
        tensor_bytes = sum(tensor.nbytes for tensor in tensors.values())
        candidates = self._candidates()
        need = max([tensor_bytes, *(_size(path) for _, path in candidates[:1])])
        good = f"{candidates[0][1].name} is untouched" if candidates else "there is no earlier one"
        return CheckpointError(
            f"Checkpoint of step {step} can't be written to {self._path(step)}: {error}. It needs at least "
            f"{format_bytes(need)}; {free} are free there; {good}. Make room or mend the disk, then use --resume."
        )


def fault(path: Path, step: int, *, check_contents: bool = True) -> str:
    """Why a checkpoint directory can't be used, or an empty string.

    Names, kinds and sizes of all files are checked before any is opened (a mapped file that is shorter than its header
    says kills the process), then, with `check_contents`, each sha256.
    """
    try:
        entries = _manifest_entries(path, step)
        names, _ = _tree(path)
        missing = sorted(entries.keys() - set(names))
        if missing:
            return f"{missing[0]} is missing"
        extra = sorted(set(names) - entries.keys() - {MANIFEST})
        if extra:
            return f"{extra[0]} is not in {MANIFEST}; if it was added by hand, remove it"
        for name, entry in entries.items():
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes, {MANIFEST} says {entry['size']}"
        for name, entry in entries.items() if check_contents else ():
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} does not have the sha256 in {MANIFEST}: its bytes have changed"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"it can't be read: {error}"
    return ""


def check_same_run(
    saved: Mapping[str, Any], current: Mapping[str, Any], may_differ: Collection[str] = MAY_DIFFER
) -> None:
    """Return if a checkpoint's config and today's describe the same run; else raise CheckpointUnusableError.

    Both are nested mappings (`RunConfig.model_dump(mode="json")`). `may_differ` holds dotted keys; `log.*` stands for
    all below `log`. The error names each key with its saved and current value.
    """
    before, now = _flat(saved), _flat(current)
    differing = [
        f"{key}: saved {_shown(before, key)}, now {_shown(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if not _covered(key, may_differ) and (key not in before or key not in now or before[key] != now[key])
    ]
    if differing:
        raise CheckpointUnusableError(
            "The checkpoint belongs to another configuration:\n  "
            + "\n  ".join(differing)
            + "\nResume with the saved values, or start a new run with another --output."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items: dict[str, Any] = {}
        for key, inner in value.items():
            items |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return items
    if isinstance(value, (list, tuple)):
        return {prefix: [_flat(inner).get("", inner) for inner in value]}
    return {prefix: value if isinstance(value, (str, int, float, bool)) or value is None else str(value)}


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "(absent)"


def _covered(key: str, patterns: Collection[str]) -> bool:
    parts = key.split(".")
    return key in patterns or any(".".join([*parts[:n], "*"]) in patterns for n in range(1, len(parts)))


def _load(path: Path, step: int) -> Checkpoint:
    """The handle of a directory that was found faultless just before."""
    try:
        state = json.loads((path / "trainer.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointUnusableError(f"{path / 'trainer.json'} can't be read as JSON: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointUnusableError(f"{path / 'trainer.json'} holds a {type(state).__name__}, not an object")
    return Checkpoint(step=step, path=path, state=state)


def _manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """The one way to write this manifest: any changed byte shows, in the digest or in the spelling."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, sort_keys=True, indent=1).encode() + b"\n"


def _manifest_entries(path: Path, step: int) -> dict[str, dict[str, Any]]:
    """{file name: {size, sha256}}. Raises CheckpointUnusableError with the fault alone, OSError if it can't be read."""
    if not path.is_dir() or path.is_symlink():
        raise CheckpointUnusableError("it is not a directory")
    if not (path / MANIFEST).is_file():
        raise CheckpointUnusableError(f"{MANIFEST} is missing")
    raw = (path / MANIFEST).read_bytes()
    try:
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError("not an object")
        content.pop("sha256", None)
        if raw != _manifest_bytes(content):
            raise ValueError("its own sha256 does not match")
        if content["format"] != FORMAT:
            raise CheckpointUnusableError(f"{MANIFEST} has format {content['format']!r}, this version reads {FORMAT!r}")
        if content["step"] != step:
            raise CheckpointUnusableError(f"{MANIFEST} is of step {content['step']}, the directory of step {step}")
        entries = {name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointUnusableError(f"{MANIFEST} is damaged: {error}") from error
    for name in ("trainer.json", "trainer.safetensors"):
        if name not in entries:
            raise CheckpointUnusableError(f"{MANIFEST} does not name {name}")
    return entries


def _tree(folder: Path) -> tuple[list[str], list[str]]:
    """Relative names of all files, sorted, and of all directories, deepest first, `.` last.

    Raises CheckpointError for anything but plain files and directories, and for files that a loader may unpickle.
    """
    names, directories = [], []
    for directory, inner_directories, inner_files in os.walk(folder, onerror=_raise):
        directories.append(os.path.relpath(directory, folder))
        for inner in [*inner_directories, *inner_files]:
            path = Path(directory, inner)
            name = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise CheckpointError(f"{name} is a link or a special file")
            if stat.S_ISREG(mode):
                if path.suffix.lower() in PICKLED_SUFFIXES:
                    raise CheckpointError(f"{name} may hold a pickle, which a checkpoint never does")
                names.append(name)
    return sorted(names), sorted(directories, key=lambda name: (name != ".", name.count("/"), name), reverse=True)


def _raise(error: OSError) -> None:
    raise error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _forget_cached(path: Path) -> None:
    """Ask the kernel to drop the file's clean pages, so that reading back reads the disk where it can."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _size(path: Path) -> int:
    try:
        names, _ = _tree(path)
        return sum((path / name).stat().st_size for name in names)
    except (OSError, CheckpointError):
        return 0


def _is_disk_trouble(error: BaseException) -> bool:
    """OSError, or the error of the safetensors writer, which carries the system's message as text."""
    from safetensors import SafetensorError

    return isinstance(error, (OSError, SafetensorError))
