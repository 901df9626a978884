"""docs/bench.png: whole steps, operations and scaling, drawn from the newest result files.

`python -m bench.plots [FOLDER ...]` (by default all folders of bench/results) writes it. Each panel is of one machine,
which it names. A panel whose file is not there stays empty and says so: nothing is drawn that was not measured.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.ops import ROOT
from bench.results import RESULTS
from zs_fast.errors import ConfigError

PICTURE = ROOT / "docs" / "bench.png"
PHASES = {"rollout": "#2a6fb0", "score": "#d9741a", "update": "#2e8b57"}
OURS, PEER, BASE = "#2a6fb0", "#d9741a", "#9aa0a6"
OPERATIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "fused_loss": ("linear_policy_loss", ("TRL chunked log-prob", "Liger fused linear GRPO", "naive fp32")),
    "fused_loss_masked": ("linear_policy_loss", ("Liger fused linear GRPO", "naive fp32")),
    "row_logprobs": ("token_logprobs", ("TRL log-prob and entropy", "eager")),
    "token_loss": ("policy_loss", ("torch.compile(eager)", "eager")),
    "gae": ("gae", ("verl loop", "classic loop")),
    "grpo": ("group_advantages", ("verl loop",)),
}
"""Case -> our variant, and the first two of the others that were there."""

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Subject -> its results, oldest first."""


def main(words: Sequence[str]) -> Path:
    """Draw from the folders that are named, or all. Raises ConfigError where they hold no results."""
    folders = [Path(word) for word in words] or sorted(path for path in RESULTS.iterdir() if path.is_dir())
    found = read(folders)
    if not any(found.values()):
        names = ", ".join(map(str, folders)) or str(RESULTS)
        raise ConfigError(f"bench.plots: no results in {names}. Run zs-fast bench first, or name another folder.")
    PICTURE.write_bytes(picture(found))
    print(f"written: {PICTURE.relative_to(ROOT)}")
    return PICTURE


def read(folders: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """The result files of these folders by subject, oldest first."""
    found: dict[str, list[dict[str, Any]]] = {"end_to_end": [], "ops": [], "scaling": []}
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary.get("subject") in found:
            found[summary["subject"]].append(summary)
    for results in found.values():
        results.sort(key=lambda summary: summary["time"])
    return found


def picture(found: Results) -> bytes:
    """The PNG: the same results give the same bytes."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    steps(panels[0, 0], newest(found["end_to_end"], trace=False), "Whole step, played")
    steps(panels[0, 1], newest(found["end_to_end"], trace=True), "Whole step, forced lengths")
    operations(panels[1, 0], found["ops"])
    scaling(panels[1, 1], found["scaling"][-1] if found["scaling"] else None)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": "zs_fast"})  # no time stamp
    return buffer.getvalue()


def newest(results: Sequence[Mapping[str, Any]], *, trace: bool) -> Mapping[str, Any] | None:
    """The newest whole step at forced lengths, or at those that were played, of those in the most ways."""
    fitting = [one for one in reversed(results) if bool(one.get("trace")) == trace]
    return max(fitting, key=lambda one: len(one["ways"]), default=None)


def timings(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(case, variant) -> its newest row; a case's rows are all of one run."""
    cases: dict[str, Sequence[Mapping[str, Any]]] = {}
    for summary in results:
        for case in {row["case"] for row in summary["timings"]}:
            cases[case] = [row for row in summary["timings"] if row["case"] == case]
    return {(row["case"], row["variant"]): row for rows in cases.values() for row in rows}


def steps(axes: Axes, summary: Mapping[str, Any] | None, title: str) -> None:
    """Each way's phases on top of each other."""
    if summary is None:
        _empty(axes, title)
        return
    ways = list(summary["ways"])
    ends = [0.0] * len(ways)
    for phase, colour in PHASES.items():
        seconds = [summary["ways"][way][phase]["seconds"] for way in ways]
        axes.barh(ways, seconds, left=ends, color=colour, label=phase)
        ends = [end + more for end, more in zip(ends, seconds, strict=True)]
    whole = {way: summary["ways"][way]["step"]["seconds"] for way in ways}  # a median of its own
    for way, end in zip(ways, ends, strict=True):
        axes.text(end, way, f" {whole[way]:.2f} s, {whole[way] / whole['ours']:.2f}x", va="center", fontsize=9)
    axes.set_xlim(0, 1.3 * max(ends))
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds, one thread" if summary["clock"] == "cpu_seconds" else "seconds")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    model = str(summary["models"]["policy"]).rpartition("/")[2].removeprefix("package:")
    if rank := summary.get("overrides", {}).get("model.lora_rank"):
        model += f", adapter of rank {rank[0]}"
    _titled(axes, f"{title}, {summary['workload']['trajectories']} trajectories\n{model}; {_machine(summary)}")


def operations(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """How near each operation comes to its floor, ours and two others: those of the machine of the newest run that has
    any."""
    title = "Operations: share of the floor"
    results = [one for one in results if any(row["case"] in OPERATIONS for row in one["timings"])]
    here = [one for one in results if _machine(one) == _machine(results[-1])]
    rows = timings(here)
    labels, shares, colours = [], [], []
    for case, (ours, others) in OPERATIONS.items():
        there = [variant for variant in others if (case, variant) in rows][:2]
        if (case, ours) not in rows:
            continue
        for variant in (ours, *there):
            share = rows[case, variant]["of_floor"]
            labels.append(f"{case}: {variant}")
            shares.append(share or 0.0)
            is_base = variant.startswith(("naive", "eager", "classic", "torch"))
            colours.append(OURS if variant == ours else BASE if is_base else PEER)
    if not labels:
        _empty(axes, title)
        return
    axes.barh(range(len(labels)), shares, color=colours)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.invert_yaxis()
    _titled(axes, f"{title}\n{_machine(here[-1])}")


def scaling(axes: Axes, summary: Mapping[str, Any] | None) -> None:
    """The step's time against its tokens, with the line through the points."""
    title = "Scaling: a step of the quickstart's models"
    if summary is None:
        _empty(axes, title)
        return
    points, first = summary["points"], summary["points"][0]
    series = {
        "trajectories": [point for point in points if point["length"] == first["length"]],
        "length": [point for point in points if point["trajectories"] == first["trajectories"]],
    }
    for (name, part), colour in zip(series.items(), (OURS, PEER), strict=True):
        tokens = [point["trajectories"] * point["length"] for point in part]
        axes.plot(tokens, [point["cpu_seconds"]["step"] for point in part], "o", color=colour)
        if fit := summary["fits"].get(f"{name}, step"):
            line = [fit["fixed_seconds"] + fit["seconds_per_token"] * x for x in tokens]
            axes.plot(tokens, line, color=colour, linewidth=1, label=f"more {name}: exponent {fit['exponent']:.2f}")
    axes.set_xlabel("tokens of the step")
    axes.set_ylabel("CPU seconds, one thread")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8)
    _titled(axes, f"{title}\n{_machine(summary)}")


def _machine(summary: Mapping[str, Any]) -> str:
    found = summary.get("environment", {})
    return f"{found.get('cpu', 'unknown')}, {summary['time'][:10]}"


def _titled(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)


def _empty(axes: Axes, title: str) -> None:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=BASE)
    axes.set_axis_off()
    _titled(axes, title)


if __name__ == "__main__":
    main(sys.argv[1:])
