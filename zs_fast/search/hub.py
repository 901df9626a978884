"""Data sets as Hugging Face keeps them: folders of `save_to_disk`, local copies of data set repositories, hub ids.

A repository's files are left to the readers of single files, not to `datasets.load_dataset`: that follows the README to
files and addresses outside the folder, turns answers that look like dates into timestamps, and copies the data into a
cache. No code in a folder is ever run.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zs_fast.errors import DataError
from zs_fast.search.readers import JSON_LINES_SUFFIXES, PARQUET_SUFFIXES, Row, bad_value, first_line

HUB_TIMEOUT_S = 2.0
BATCH_ROWS = 1024
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_SPLIT = re.compile(r"[A-Za-z0-9_.]{1,95}")
_SUFFIX = "|".join(re.escape(suffix) for suffix in PARQUET_SUFFIXES + JSON_LINES_SUFFIXES)
_DATA_FILE = re.compile(
    rf"(?P<split>[^.].*?)(?:-(?P<number>\d+)-of-(?P<count>\d+)(?:-[0-9a-f]+)?)?(?P<suffix>{_SUFFIX})", re.IGNORECASE
)
"""`train.jsonl`, `train-00000-of-00002.parquet`; older shards end in a hash, `train-00000-of-00001-ab12.parquet`."""
_FOLDERS_SHOWN = 8
_HUB_ID = re.compile(rf"(?P<id>{_NAME}/{_NAME})(?:/(?P<configuration>{_NAME}))?(?::(?P<split>[A-Za-z0-9_.]{{1,95}}))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One split of a data set. `schema` is its Arrow schema; `rows(columns)` reads only those columns."""

    label: str
    """What error messages call it."""
    name: str
    """The source of rows that name none."""
    schema: Any
    rows: Callable[[tuple[str, ...]], Iterator[Row]]


def split_spec(spec: str) -> tuple[str, str | None]:
    """("folder", "train") of "folder:train"; the split is None where there is none."""
    folder, colon, split = spec.rpartition(":")
    return (folder, split) if colon and folder and _SPLIT.fullmatch(split) else (spec, None)


def is_hub_id(spec: str) -> bool:
    """Has `spec` the form owner/name[/configuration][:split]?"""
    return _HUB_ID.fullmatch(spec) is not None


def is_saved(folder: Path) -> bool:
    """Did `datasets.save_to_disk` write this folder?"""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def open_folder(folder: Path, split: str | None) -> Table:
    """A split of a folder written by `save_to_disk`; `train` where the folder has splits and none is named."""
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: the folder is damaged ({first_line(error)}). Save the data set again.") from error
    return _table(str(folder), folder.name, _one_split(str(folder), loaded, split))


def repository_files(folder: Path, split: str | None) -> list[Path]:
    """The files of a split of a data set repository, in the order of their numbers; `train` where none is named.

    They lie in `folder` or in its folder `data`. Raises DataError if there are none, or not exactly the whole split.
    """
    for place in (folder, folder / "data"):
        found = _splits(place) if place.is_dir() else {}
        if found:
            return _whole_split(place, *_one_split(str(folder), found, split))
    suffixes = ", ".join(PARQUET_SUFFIXES + JSON_LINES_SUFFIXES)
    inner = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    shown = ", ".join(inner[:_FOLDERS_SHOWN]) + (" and others" if len(inner) > _FOLDERS_SHOWN else "")
    raise DataError(
        f"{folder}: is a folder without dataset_info.json or dataset_dict.json, so not one that datasets.save_to_disk "
        f"wrote, and neither it nor its folder data holds a file in {suffixes}. Name a "
        f"file or folder that does{'; the folders in it: ' if shown else ''}{shown}."
    )


def _splits(place: Path) -> dict[str, list[tuple[re.Match[str], Path]]]:
    """Split -> its files, from the names of the files alone."""
    splits: dict[str, list[tuple[re.Match[str], Path]]] = {}
    for path in sorted(place.iterdir()):
        match = _DATA_FILE.fullmatch(path.name)
        if match and path.is_file():
            splits.setdefault(match["split"], []).append((match, path))
    return splits


def _whole_split(place: Path, *files: tuple[re.Match[str], Path]) -> list[Path]:
    """The paths by number, if they are one file, or all shards of one set in one format."""
    kinds = {(match["count"], match["suffix"].lower()) for match, _ in files}
    numbers = sorted(int(match["number"] or 0) for match, _ in files)
    if len(kinds) > 1 or int(files[0][0]["count"] or 1) != len(files) or numbers != list(range(len(files))):
        names = ", ".join(path.name for _, path in files[:4]) + (", ..." if len(files) > 4 else "")
        raise DataError(
            f"{place}: the split {files[0][0]['split']!r} must be one file, or all shards -00000-of-N up to N - 1 once "
            f"in one format. There is {names}. Get what is missing, remove what is too much, or name one file."
        )
    return [path for _, path in sorted(files, key=lambda file: int(file[0]["number"] or 0))]


def open_hub(spec: str) -> Table:
    """A split of a data set from the hub or its local cache; `train` where none is named.

    Without a cached copy the hub must answer within 2 seconds.
    """
    match = _HUB_ID.fullmatch(spec)
    assert match is not None, spec
    datasets = _datasets()
    try:
        _ask_hub(match["id"])
        loaded = datasets.load_dataset(match["id"], match["configuration"])
    except (
        Exception
    ) as error:  # a process boundary: the errors are those of whichever HTTP library the hub's client uses
        raise DataError(
            f"{spec}: there is no file or folder of this name here, and the Hugging Face hub gave no data set "
            f"{match['id']} ({type(error).__name__}: {first_line(error)}). Check the name and the "
            "network, or give a local file."
        ) from error
    return _table(spec, match["id"].split("/")[1], _one_split(spec, loaded, match["split"]))


def _ask_hub(identifier: str) -> None:
    """Fail fast where the hub can't be reached; with HF_HUB_OFFLINE=1 only the local cache is used."""
    hub = importlib.import_module("huggingface_hub")
    if not hub.constants.HF_HUB_OFFLINE:
        hub.HfApi().dataset_info(identifier, timeout=HUB_TIMEOUT_S)


def _one_split(label: str, loaded: Any, split: str | None) -> Any:
    if not isinstance(loaded, dict):
        if split is not None:
            raise DataError(f"{label}: has no splits, so ':{split}' names nothing. Leave it out.")
        return loaded
    wanted = split or "train"
    if wanted not in loaded:
        raise DataError(
            f"{label}: has no split {wanted!r}. There is {', '.join(map(str, loaded))}; name one as :split."
        )
    return loaded[wanted]


def _table(label: str, name: str, dataset: Any) -> Table:
    pa = importlib.import_module("pyarrow")  # which datasets can't be without

    def rows(columns: tuple[str, ...]) -> Iterator[Row]:
        number = 0
        try:
            for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            where = f"row {number + 1} or one of the {BATCH_ROWS - 1} after it"
            raise bad_value(label, where, ", ".join(columns), f"can't be read ({first_line(error)})") from error

    return Table(label=label, name=name, schema=dataset.data.schema, rows=rows)


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            "Folders written by save_to_disk and data sets of the Hugging Face hub need the package datasets, which "
            "is not installed: pip install datasets. Or give a .parquet or .jsonl file."
        ) from error
