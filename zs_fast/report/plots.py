"""reward.png: a run's reward by step, drawn from metrics.jsonl without a display."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from zs_fast.report.run_data import Series, collect_series
from zs_fast.system.jsonl import read_rows

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2a6fb0", "#d9741a", "#2e8b57", "#7a5195", "#6b7280"
COLOURS = (ORANGE, GREEN, PURPLE, GREY)
EVALUATION = re.compile(r"eval/([^/]+)/f1")


def reward_curve(metrics_path: Path, png_path: Path) -> None:
    """Write the reward by step, its running mean, evaluations and the noise of the search results, as a PNG."""
    Path(png_path).write_bytes(reward_png(collect_series(read_rows(Path(metrics_path)))))


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


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` finite values up to each place; NaN where there is none."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(math.fsum(recent) / len(recent) if recent else math.nan)
    return means


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
