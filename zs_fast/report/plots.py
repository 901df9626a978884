"""Curves of a run, drawn from metrics.jsonl and timings.jsonl without a display."""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from zs_fast.system.jsonl import read_rows

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2a6fb0", "#d9741a", "#2e8b57", "#7a5195", "#6b7280"
COLOURS = (ORANGE, GREEN, PURPLE, GREY)
EVALUATION = re.compile(r"eval/([^/]+)/f1")

Series = tuple[list[int], list[float]]
"""Steps and values; NaN where a value is not finite, which leaves a gap."""


def reward_curve(metrics_path: Path, png_path: Path) -> None:
    """Write the reward by step, its running mean, evaluations and the noise of the search results, as a PNG."""
    Path(png_path).write_bytes(reward_png(collect_series(read_rows(Path(metrics_path)))))


def collect_series(rows: Any) -> dict[str, Series]:
    """{name: (steps, values)} of all numbers in the rows, in the order of first appearance."""
    series: dict[str, Series] = defaultdict(lambda: ([], []))
    for row in rows:
        for name, value in row.items():
            if name != "step":
                converted = float(value)
                steps, values = series[name]
                steps.append(int(row["step"]))
                values.append(converted if math.isfinite(converted) else math.nan)
    return dict(series)


def reward_png(series: Mapping[str, Series], *, window: int = 10) -> bytes:
    """The picture of `reward_curve`. `window` is the number of steps in the running mean."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps, rewards = series.get("reward/mean", ([], []))
    if steps:
        top.plot(steps, rewards, color=BLUE, alpha=0.35, linewidth=1, label="reward of each step")
        label = f"mean of the last {min(window, len(steps))} steps"
        top.plot(steps, running_mean(rewards, window), color=BLUE, linewidth=2, label=label)
    evaluations = sorted((match.group(1), name) for name in series if (match := EVALUATION.fullmatch(name)))
    for colour, (search, name) in zip(COLOURS, evaluations, strict=False):
        top.plot(
            *series[name],
            color=colour,
            marker="o",
            linestyle="--",
            linewidth=1.2,
            label=f"held-out F1, {search} search",
        )
    if steps or evaluations:
        top.legend(loc="best", frameon=False, fontsize=9)
    else:
        top.text(0.5, 0.5, "no steps yet", transform=top.transAxes, ha="center", color=GREY)
    shown = [
        value for name in ("reward/mean", *(name for _, name in evaluations)) for value in series.get(name, ((), ()))[1]
    ]
    if all(0 <= value <= 1 for value in shown if not math.isnan(value)):
        top.set_ylim(0, 1)
    top.set_ylabel("reward (F1)")
    bottom.plot(*series.get("curriculum/noise_probability", ([], [])), color=GREY, linewidth=1.5)
    bottom.set_ylim(0, 1)
    bottom.set_ylabel("noise")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        _tidy(axes)
    return _png(figure)


def panels_png(series: Mapping[str, Series], *, columns: int = 4) -> bytes:
    """One small panel per series, titled by its name."""
    rows = max(1, math.ceil(len(series) / columns))
    figure = Figure(figsize=(3.1 * columns, 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes, (name, (steps, values)) in zip(grid, series.items(), strict=False):
        axes.plot(steps, values, color=BLUE, linewidth=1.2, marker="." if len(steps) <= 30 else None)
        axes.set_title(_drawable(name), fontsize=9, loc="left", parse_math=False)
        axes.tick_params(labelsize=7)
        if name.endswith("_share") or name.startswith("stop/"):
            axes.set_ylim(-0.03, 1.03)
        _tidy(axes)
    for axes in grid[len(series) :]:
        axes.set_visible(False)
    return _png(figure)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` finite values up to each place; NaN where there is none."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(math.fsum(recent) / len(recent) if recent else math.nan)
    return means


def _drawable(name: str, most: int = 48) -> str:
    """A metric's name holds text from data files, such as a source; fonts know no control characters or surrogates."""
    shown = "".join(character if character.isprintable() else "?" for character in name)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    # No time stamp: the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": "zs_fast"})
    return buffer.getvalue()
