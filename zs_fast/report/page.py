"""report.html: one self-contained file with a run's curves, summary, configuration and rollouts.

No scripts and nothing loaded from elsewhere. All text is escaped: questions and documents are untrusted.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from zs_fast.errors import DataError
from zs_fast.report.plots import Series, collect_series, panels_png, reward_png
from zs_fast.system.files import FileOperations, replace_file
from zs_fast.system.jsonl import read_rows

STEPS_SHOWN = 6
ROLLOUTS_PER_STEP_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveGroup:
    """Panels of the metrics that share the first part of their name."""

    title: str
    count: int
    image: str
    """PNG in base64."""


def write_report(run_folder: Path) -> Path:
    """`<run_folder>/report.html`, from whichever of the run's files are there.

    Raises DataError if the folder has no metrics.jsonl, CheckpointUnusableError if a row of it is broken.
    """
    folder = Path(run_folder)
    if not (folder / "metrics.jsonl").is_file():
        raise DataError(f"{folder} has no metrics.jsonl, so there is nothing to report. Give the folder of a run.")
    metrics = collect_series(read_rows(folder / "metrics.jsonl"))
    timings = collect_series(read_rows(folder / "timings.jsonl"))
    rollouts, num_rollouts = spread(read_rows(folder / "rollouts.jsonl"))
    environment_text = _text(folder / "env.json")
    page = _template().render(
        name=folder.resolve().name,
        num_steps=max((steps[-1] for steps, _ in metrics.values()), default=0),
        reward_image=_base64(reward_png(metrics)),
        summary=_summary(folder / "summary.json"),
        curves=[*_curves(metrics, ""), *_curves(timings, "time and memory: ")],
        rollouts=rollouts,
        num_rollouts=num_rollouts,
        rollouts_shown=sum(len(rows) for _, rows in rollouts),
        config=_text(folder / "config.toml"),
        environment=json.loads(environment_text) if environment_text else None,
        environment_text=environment_text,
    )
    path = folder / "report.html"
    replace_file(FileOperations(), path, page.encode("utf-8", "replace"))
    return path


def spread(
    rows: Iterable[Mapping[str, Any]], steps: int = STEPS_SHOWN, per_step: int = ROLLOUTS_PER_STEP_SHOWN
) -> tuple[list[tuple[int, list[Mapping[str, Any]]]], int]:
    """Rollouts of a few steps spread evenly over the run, last first, and how many rollouts there are in all."""
    by_step: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    count = 0
    for row in rows:
        count += 1
        if len(by_step[row["step"]]) < per_step:
            by_step[row["step"]].append(row)
    recorded = sorted(by_step)
    last = len(recorded) - 1
    chosen = {recorded[round(last * index / max(1, steps - 1))] for index in range(steps)} if recorded else set()
    return [(step, by_step[step]) for step in sorted(chosen, reverse=True)], count


def _curves(series: Mapping[str, Series], title_prefix: str) -> list[CurveGroup]:
    groups: dict[str, dict[str, Series]] = defaultdict(dict)
    for name, values in series.items():
        first, slash, _ = name.partition("/")
        groups[first if slash else "whole step"][name] = values
    return [
        CurveGroup(title=title_prefix + title, count=len(members), image=_base64(panels_png(members)))
        for title, members in groups.items()
    ]


def _summary(path: Path) -> list[tuple[str, str]]:
    """The plain values of summary.json; what is nested there is in the metrics too."""
    text = _text(path)
    content = json.loads(text) if text else {}
    plain = [(key, value) for key, value in content.items() if not isinstance(value, (dict, list))]
    return [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in plain]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html")
