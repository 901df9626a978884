"""The page's tables: how runs end, and in which settings they differ."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zs_fast.report.run_data import RunData, Series

WINDOW = 10
"""Last steps that a final figure is the mean of."""
NOT_COMPARED = ("output",)
"""Settings that name a place, not a choice."""
NONE = "\u2013"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: what it is, and the value of each run."""

    name: str
    values: tuple[str, ...]


def final_figures(runs: Sequence[RunData]) -> list[Row]:
    """How the runs ended: means of the last WINDOW steps, the last evaluations with their 95 % interval, and the cost.

    Rows that no run has a value for are left out.
    """
    rows = [Row("steps finished", tuple(str(run.num_steps) for run in runs))]
    for name in dict.fromkeys(name for run in runs for name in run.metrics):
        if match := re.fullmatch(r"eval/(.+)/f1", name, re.DOTALL):
            title = f"held-out F1, {match.group(1)} search"
            rows.append(Row(title, tuple(_evaluation(run.metrics, match.group(1)) for run in runs)))
    for title, name, digits in (
        ("reward", "reward/mean", 3),
        ("exact match", "reward/exact_match", 3),
        ("searches per trajectory", "trajectory/searches", 2),
        ("policy tokens per trajectory", "trajectory/action_tokens", 1),
        ("well-formed share", "trajectory/well_formed_share", 3),
        ("KL to the reference, nats", "kl/reference", 4),
        ("entropy, nats", "entropy", 3),
        ("useful documents with an answer, share", "search/useful_contains_answer", 3),
        ("noisy documents with an answer, share", "search/noisy_contains_answer", 3),
    ):
        rows.append(
            Row(f"{title} (mean of last {WINDOW} steps)", tuple(_late_mean(run.metrics, name, digits) for run in runs))
        )
    rows.append(Row("seconds per step", tuple(_mean(run.timings, "seconds") for run in runs)))
    rows.append(Row("tokens per second", tuple(_mean(run.timings, "tokens_per_second") for run in runs)))
    rows.append(Row("peak main memory, GiB", tuple(_peak(run.timings, "peak_rss_bytes") for run in runs)))
    rows.append(Row("peak GPU memory, GiB", tuple(_peak(run.timings, "peak_cuda_bytes") for run in runs)))
    rows.append(Row("seconds in all", tuple(_plain(run.summary.get("seconds")) for run in runs)))
    rows.append(Row("machine", tuple(_machine(run.environment) for run in runs)))
    rows.append(Row("zs_fast", tuple(_version(run.environment) for run in runs)))
    return [row for row in rows if any(value != NONE for value in row.values)]


def differing_settings(runs: Sequence[RunData]) -> list[Row]:
    """The keys of config.toml whose values differ between the runs, in the files' order."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = tuple(_setting(run.settings[key]) if key in run.settings else NONE for run in runs)
        if key not in NOT_COMPARED and len(set(values)) > 1:
            rows.append(Row(key, values))
    return rows


def _evaluation(metrics: Mapping[str, Series], search: str) -> str:
    """`0.940 (0.905 to 0.970, n 200, step 10)`"""
    steps, _ = metrics.get(f"eval/{search}/f1", ([], []))
    if not steps:
        return NONE
    f1, low, high, count = (
        _last(metrics, f"eval/{search}/{name}") for name in ("f1", "f1_low", "f1_high", "num_questions")
    )
    if math.isnan(f1):
        return NONE
    details = [f"step {steps[-1]}"]
    if not math.isnan(count):
        details.insert(0, f"n {count:.0f}")
    if not (math.isnan(low) or math.isnan(high)):
        details.insert(0, f"{low:.3f} to {high:.3f}")
    return f"{f1:.3f} ({', '.join(details)})"


def _last(series: Mapping[str, Series], name: str) -> float:
    _, values = series.get(name, ([], []))
    return values[-1] if values else math.nan


def _finite(series: Mapping[str, Series], name: str) -> list[float]:
    return [value for value in series.get(name, ([], []))[1] if not math.isnan(value)]


def _late_mean(series: Mapping[str, Series], name: str, digits: int) -> str:
    steps, values = series.get(name, ([], []))
    late = [value for step, value in zip(steps, values, strict=True) if step > steps[-1] - WINDOW and value == value]
    return f"{math.fsum(late) / len(late):.{digits}f}" if late else NONE


def _mean(series: Mapping[str, Series], name: str) -> str:
    values = _finite(series, name)
    return f"{math.fsum(values) / len(values):.4g}" if values else NONE


def _peak(series: Mapping[str, Series], name: str) -> str:
    peaks = [value for key in series if key.endswith(f"/{name}") for value in _finite(series, key)]
    return f"{max(peaks) / 2**30:.2f}" if peaks else NONE


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, int | float | str) else NONE


def _machine(environment: Mapping[str, Any]) -> str:
    return _plain(environment.get("gpu") or environment.get("cpu"))


def _version(environment: Mapping[str, Any]) -> str:
    commit = environment.get("git_commit")
    version = _plain(environment.get("zs_fast"))
    return f"{version}, commit {commit[:9]}" if isinstance(commit, str) else version


def _setting(value: Any) -> str:
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(_setting, value)) if isinstance(value, list) and value else str(value)
