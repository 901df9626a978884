"""What a run folder holds for a report, whole or half-written: what is missing or torn becomes a note, not a fault."""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zs_fast.errors import CheckpointUnusableError, DataError
from zs_fast.system.jsonl import read_rows

Series = tuple[list[int], list[float]]
"""Steps and values; NaN where a value is not finite, which leaves a gap."""
LATEST_STEP = 2**53
"""Beyond it a browser's numbers are not exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """A run as far as its files tell. `notes` are sentences on what they don't."""

    folder: Path
    label: str
    """The folder's name, with as many parents as tell it from the other runs of the page."""
    metrics: Mapping[str, Series]
    timings: Mapping[str, Series]
    settings: Mapping[str, Any]
    """Dotted key -> value of config.toml; empty when it can't be read."""
    config_text: str
    environment: Mapping[str, Any]
    environment_text: str
    summary: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def num_steps(self) -> int:
        return max((steps[-1] for steps, _ in self.metrics.values()), default=0)


def read_run(folder: Path, label: str) -> RunData:
    """Raises DataError when there is no metrics.jsonl or a row of the folder is broken before its last line."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the folder of a run, as `zs-fast train` writes it.")
    if not (folder / "metrics.jsonl").is_file():
        raise DataError(f"{folder} has no metrics.jsonl, so there is nothing to report. Give the folder of a run.")
    notes: list[str] = []
    metrics = _series(folder / "metrics.jsonl", notes)
    timings = _series(folder / "timings.jsonl", notes)
    config_text = _text(folder / "config.toml", notes)
    environment_text = _text(folder / "env.json", notes)
    summary_text = _text(folder / "summary.json", notes, "the run has not finished")
    if not metrics:
        notes.append("metrics.jsonl has no row yet.")
    return RunData(
        folder=folder,
        label=label,
        metrics=metrics,
        timings=timings,
        settings=_settings(config_text, notes),
        config_text=config_text,
        environment=_json_object(environment_text, "env.json", notes),
        environment_text=environment_text,
        summary=_json_object(summary_text, "summary.json", notes),
        notes=tuple(notes),
    )


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """The runs of one page, in the given order. Raises DataError, also for a folder that is given twice."""
    resolved = [Path(folder).resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise DataError(f"{folders[place]} is given twice. Give each run once.")
    return [read_run(folder, label) for folder, label in zip(resolved, _labels(resolved), strict=True)]


def rows_of(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of a file with their whole number `step`; a torn last line is left out. Raises DataError."""
    try:
        for number, row in enumerate(read_rows(path), start=1):
            step = row.get("step")
            if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= LATEST_STEP:
                raise DataError(f"{path}, row {number}, has no whole number `step` of at least 0: {_brief(step)}")
            yield row
    except CheckpointUnusableError as error:
        raise DataError(f"{error}. Remove that line, and the rest can be reported.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def collect_series(rows: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """{name: (steps, values)} of all numbers in the rows, in the order of first appearance, by rising step.

    Raises DataError for a value that is no number.
    """
    series: dict[str, Series] = defaultdict(lambda: ([], []))
    for row in rows:
        for name, value in row.items():
            if name == "step":
                continue
            steps, values = series[name]
            steps.append(int(row["step"]))
            values.append(_number(name, value, row["step"]))
    return {name: _by_step(*values) for name, values in series.items()}


def _number(name: str, value: Any, step: int) -> float:
    """NaN for what is not finite."""
    try:
        converted = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"step {step} has {_brief(name)} = {_brief(value)}, which is no number") from error
    except OverflowError:
        return math.nan
    return converted if math.isfinite(converted) else math.nan


def _by_step(steps: list[int], values: list[float]) -> Series:
    if all(earlier <= later for earlier, later in itertools.pairwise(steps)):
        return steps, values
    order = sorted(range(len(steps)), key=steps.__getitem__)
    return [steps[index] for index in order], [values[index] for index in order]


def _series(path: Path, notes: list[str]) -> dict[str, Series]:
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return {}
    try:
        series = collect_series(rows_of(path))
    except DataError as error:
        raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    note_torn(path, notes)
    return series


def note_torn(path: Path, notes: list[str]) -> None:
    """Say so when the file ends within a line, as after a crash."""
    with path.open("rb") as file:
        if file.seek(0, 2):
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                notes.append(f"{path.name} ends within a line, which is left out: the run was stopped, or goes on.")


def _text(path: Path, notes: list[str], meaning: str = "") -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing{': ' + meaning if meaning else ''}.")
    except OSError as error:
        notes.append(f"{path.name} can't be read: {error.strerror or error}.")
    return ""


def _settings(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        return _flat(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        notes.append(f"config.toml is not TOML: {error}.")
        return {}


def _json_object(text: str, name: str, notes: list[str]) -> dict[str, Any]:
    if not text:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        notes.append(f"{name} is not JSON: {error}.")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{name} is not a JSON object.")
        return {}
    return content


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    labels = []
    for folder in folders:
        parts = folder.parts
        length = 1
        while length < len(parts) and sum(other.parts[-length:] == parts[-length:] for other in folders) > 1:
            length += 1
        labels.append("/".join(parts[-length:]) or "run")
    return labels


def _brief(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
