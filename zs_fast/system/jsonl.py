"""JSON lines that survive a crash: one object per line, appended whole, cut back on resume.

Numbers round-trip exactly (Python's shortest repr). JSON has no NaN or infinity, so these are the strings "nan", "inf"
and "-inf"; `float()` of any value in a metrics file is the number. Lines end in a single newline; text is UTF-8.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zs_fast.errors import CheckpointError, CheckpointUnusableError
from zs_fast.system.files import FileOperations, format_bytes, free_bytes, replace_file


def number(value: float) -> float | str:
    """What stands for a number in these files: itself, or "nan", "inf", "-inf". Tensors and numpy scalars are taken."""
    if isinstance(value, (bool, int)):
        return int(value)
    converted = float(value)
    return converted if math.isfinite(converted) else str(converted)


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line. Lone surrogates, which UTF-8 can't hold, become JSON escapes."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, in order; a torn last line is left out. Nothing for a missing file.

    Raises CheckpointUnusableError naming file and line when another line is not a JSON object.
    """
    for _, row in _lines_with_rows(Path(path)):
        yield row


def cut_back(path: Path, step: int, *, files: FileOperations | None = None) -> int:
    """Keep only rows with `row["step"] <= step`, in one atomic replacement; how many rows went, torn line included.

    A crash leaves the old file or the new one. Raises what `read_rows` raises, and CheckpointError if it can't write.
    """
    path = Path(path)
    if not path.exists():
        return 0
    kept = []
    for line, row in _lines_with_rows(path):
        if not isinstance(row.get("step"), int):
            raise CheckpointUnusableError(f"{path} has a row without a whole number `step`: {line[:80]!r}")
        if row["step"] <= step:
            kept.append(line)
    content = b"".join(kept)
    before = path.read_bytes()
    if content == before:
        return 0
    try:
        replace_file(files or FileOperations(), path, content)
    except OSError as error:
        raise _write_error(path, error) from error
    return before.count(b"\n") + (not before.endswith(b"\n")) - len(kept)


class JsonlWriter:
    """Appends rows. A row reaches the operating system before `append` returns, and the disk with `sync`."""

    def __init__(self, path: Path, *, files: FileOperations | None = None) -> None:
        self.path = Path(path)
        self._files = files or FileOperations()
        try:
            self._descriptor = self._files.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise _write_error(self.path, error) from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Raises CheckpointError when the disk takes no more; the row is then not in the file."""
        end = os.fstat(self._descriptor).st_size
        rest = memoryview(encode_row(row))
        try:
            while rest:
                taken = self._files.write(self._descriptor, rest)
                if taken <= 0:
                    raise OSError(f"the system took 0 of {len(rest)} bytes")
                rest = rest[taken:]
        except OSError as error:
            with suppress(OSError):  # a torn row that stays is cut off on resume
                os.ftruncate(self._descriptor, end)
            raise _write_error(self.path, error) from error

    def sync(self) -> None:
        """All rows so far survive a power cut. Call before a checkpoint that relies on them."""
        try:
            self._files.fsync(self._descriptor)
        except OSError as error:
            raise _write_error(self.path, error) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            self._files.close(self._descriptor)
            self._descriptor = -1


def _lines_with_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for index, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # the process died while it wrote this row
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CheckpointUnusableError(f"{path}, line {index}, is not JSON: {error}: {line[:80]!r}") from error
            if not isinstance(row, dict):
                raise CheckpointUnusableError(f"{path}, line {index}, is not a JSON object: {line[:80]!r}")
            yield line, row


def _write_error(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} can't be written: {error}; {format_bytes(free_bytes(path.parent))} are free there. "
        "Make room or mend the disk, then go on with --resume."
    )
