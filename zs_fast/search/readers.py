"""Rows out of data files, with bounded memory and one clear DataError for whatever is wrong with the file itself.

A reader yields `(where, row)`: `where` says "line 7" or "row 7" (both count from 1), `row` maps column names to plain
Python values. What the values mean is the business of `data.py`.
"""

from __future__ import annotations

import gzip
import importlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from zs_fast.errors import DataError

Row = tuple[str, Mapping[str, Any]]

JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PARQUET_SUFFIXES = (".parquet",)
MAX_LINE_BYTES = 4 * 1024 * 1024
"""A longer line is an error: no question is that long, and a file without line ends must not fill the memory."""
MAX_BLANK_LINES = 100
"""Empty lines allowed at the end of a file."""
MAX_GROUP_BYTES = 32 * 1024 * 1024
MAX_ROW_BYTES = 64 * 1024
"""A parquet row group over MAX_GROUP_BYTES may hold at most this many bytes per row on average, all columns counted."""
PARQUET_BATCH_ROWS = 1024
EXCERPT_CHARACTERS = 80

_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def excerpt(value: object) -> str:
    """At most 80 printable characters that show a value in an error message."""
    text = value if isinstance(value, str) else repr(value)
    text = _CONTROL.sub("\ufffd", text[: 4 * EXCERPT_CHARACTERS]).encode("utf-8", "replace").decode()
    return text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 3] + "..."


def bad_value(file: object, where: str, field: str, reason: str, value: object = None) -> DataError:
    """The one form of a DataError about a row: file, row or line, field, reason, excerpt."""
    shown = "" if value is None else f": {excerpt(value)}"
    return DataError(f"{file}, {where}, field '{field}': {reason}{shown}")


def is_json_lines(path: Path) -> bool:
    return path.name.lower().endswith(JSON_LINES_SUFFIXES)


def is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(PARQUET_SUFFIXES)


def read_json_lines(path: Path) -> Iterator[Row]:
    """Rows of a jsonl or jsonl.gz file in UTF-8; one JSON object a line. Raises DataError naming the line.

    A UTF-8 byte order mark at the start is skipped. Empty lines are allowed at the end only.
    """
    try:
        with path.open("rb") as raw:
            head = raw.read(4)
            raw.seek(0)
            zipped = path.name.lower().endswith(".gz")
            _check_magic(path, head, zipped)
            with gzip.GzipFile(fileobj=raw) if zipped else raw as stream:
                yield from _objects(path, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip data is cut short or damaged ({error}). Copy the file again.") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}).") from error


def _check_magic(path: Path, head: bytes, zipped: bool) -> None:
    if zipped and not head.startswith(_GZIP_MAGIC):
        raise DataError(f"{path}: the name ends in .gz, but the content isn't gzip. Rename or compress it.")
    if not zipped and head.startswith(_GZIP_MAGIC):
        raise DataError(f"{path}: the content is gzip, but the name doesn't end in .gz. Rename it to {path.name}.gz.")
    if head.startswith(_PARQUET_MAGIC):
        raise DataError(f"{path}: the content is parquet. Rename it to end in .parquet.")


def _objects(path: Path, stream: BinaryIO | gzip.GzipFile) -> Iterator[Row]:
    blank_since = 0
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
        where = f"line {number}"
        if number == 1:
            line = line.removeprefix(_UTF8_MARK)
        if len(line) > MAX_LINE_BYTES:
            raise bad_value(
                path, where, "(line)", f"is longer than {MAX_LINE_BYTES} bytes; write one row a line", _text(line[:400])
            )
        if not line.strip():
            blank_since = blank_since or number
            if number - blank_since >= MAX_BLANK_LINES:
                raise bad_value(
                    path, f"line {blank_since}", "(line)", f"{MAX_BLANK_LINES} empty lines in a row; remove them"
                )
            continue
        if blank_since:
            raise bad_value(path, f"line {blank_since}", "(line)", "is empty; remove it")
        yield where, _object(path, where, line)


def _object(path: Path, where: str, line: bytes) -> Mapping[str, Any]:
    if line.startswith(_UTF16_MARKS):
        raise bad_value(path, where, "(line)", "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    if b"\0" in line:
        raise bad_value(
            path,
            where,
            "(line)",
            "holds NUL bytes (UTF-16, or a file with a hole); write it in UTF-8",
            _text(line[:400]),
        )
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise bad_value(
            path, where, "(line)", f"is not UTF-8 at byte {error.start + 1}; convert the file to UTF-8", _text(line)
        ) from error
    except _RepeatedKeyError as error:
        raise bad_value(path, where, str(error), "appears twice in one object", _text(line)) from error
    except (ValueError, RecursionError) as error:
        reason = f"is not valid JSON ({error})"
        raise bad_value(path, where, "(line)", reason, _text(line)) from error
    if not isinstance(row, dict):
        raise bad_value(path, where, "(line)", f"is a JSON {type(row).__name__}, not an object {{...}}", _text(line))
    return row


class _RepeatedKeyError(Exception):
    """A JSON object names a key twice; `args[0]` is the key."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        raise _RepeatedKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return row


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").strip()


def parquet_schema(path: Path) -> Any:
    """The Arrow schema of a parquet file. Raises DataError if the file isn't complete parquet."""
    with _footer_errors(path), open_parquet(path) as file:
        schema = file.schema_arrow
        names = list(schema.names)
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise bad_value(path, "all rows", repeated, f"{names.count(repeated)} columns share this name; keep one")
    return schema


def read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a parquet file, only the named top-level columns. Raises DataError naming row and column."""
    pa = _pyarrow()
    with open_parquet(path) as file:
        with _footer_errors(path):
            _check_sizes(path, file.metadata, columns)
        number = 0
        try:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=list(columns), use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            where = f"row {number + 1} or one of the {PARQUET_BATCH_ROWS - 1} after it"
            raise bad_value(path, where, ", ".join(columns), f"can't be read ({first_line(error)})") from error


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`; DataError where pyarrow finds no whole file."""
    _pyarrow()
    try:
        with path.open("rb") as raw:
            head = raw.read(4)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}).") from error
    if head != _PARQUET_MAGIC:
        raise DataError(
            f"{path}: the file doesn't start as parquet does (first bytes {excerpt(head)}). If it is jsonl, rename it "
            "to end in .jsonl."
        )
    with _footer_errors(path):
        return importlib.import_module("pyarrow.parquet").ParquetFile(path, pre_buffer=False)


@contextmanager
def _footer_errors(path: Path) -> Iterator[None]:
    """What pyarrow raises over a footer that was altered, as one DataError."""
    try:
        yield
    except (_pyarrow().ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise DataError(
            f"{path}: the parquet footer is missing or damaged ({first_line(error)}). The file was cut short or "
            "altered; copy it again."
        ) from error


def _check_sizes(path: Path, metadata: Any, columns: tuple[str, ...]) -> None:
    """DataError if the footer speaks of a row group too big to be questions, before any of it is decompressed.

    Sizes of single columns aren't asked for: over some damaged footers that call ends the whole process.
    """
    row = 1
    for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
        size, limit = group.total_byte_size, max(MAX_GROUP_BYTES, MAX_ROW_BYTES * group.num_rows)
        if size > limit:
            where = f"rows {row} to {row + group.num_rows - 1}"
            raise bad_value(
                path, where, ", ".join(columns), f"{size} bytes; at most {limit} are read. Drop what is oversized"
            )
        row += group.num_rows


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough to quote."""
    return excerpt((str(error).splitlines() or [type(error).__name__])[0])


def _pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError(
            "Reading parquet needs the package pyarrow, which is not installed: pip install 'zs-fast[train]'."
        ) from error
