"""Which curves a page shows, what each is and its unit: a catalogue of the names in metrics.jsonl and timings.jsonl."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zs_fast.report.run_data import RunData, Series

MOST_POINTS = 2000
"""Points of one curve on a page of one run; pages of several runs share them out."""
FEWEST_POINTS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class ChartKind:
    """One chart. `names` are (metric, label of its curve); `*` in both stands for the same part of the name."""

    group: str
    title: str
    unit: str
    about: str
    names: tuple[tuple[str, str], ...]
    bounds: tuple[float, float] | None = None
    """Values that the y axis shows at least."""
    scale: float = 1.0
    """Values are multiplied by this, to have the unit."""


RESULT, SEARCHES, DOCUMENTS, LEARNING, COST, REST = (
    "Result",
    "Searches and lengths",
    "Documents and noise",
    "Learning",
    "Time and memory",
    "Everything else recorded",
)
SHARE = (0.0, 1.0)
PHASES = ("rollout", "score", "update", "sync")
CATALOGUE = (
    ChartKind(
        group=RESULT,
        title="Reward",
        unit="0 to 1",
        about="mean reward of the step's trajectories",
        names=(("reward/mean", "reward"),),
        bounds=SHARE,
    ),
    ChartKind(
        group=RESULT,
        title="Training scores",
        unit="0 to 1",
        about="the step's answers against the accepted ones: word F1, exact match, and whether one is contained",
        names=(
            ("reward/f1", "F1"),
            ("reward/exact_match", "exact match"),
            ("reward/cover_match", "cover match"),
        ),
        bounds=SHARE,
    ),
    ChartKind(
        group=RESULT,
        title="Held-out F1",
        unit="0 to 1",
        about="evaluations on questions not trained on, by the search they play with; bars: 95 % interval",
        names=(("eval/*/f1", "*"),),
        bounds=SHARE,
    ),
    ChartKind(
        group=RESULT,
        title="F1 by source",
        unit="0 to 1",
        about="training F1 of the questions of each source",
        names=(("source/*/f1", "*"),),
        bounds=SHARE,
    ),
    ChartKind(
        group=RESULT,
        title="Groups without a lesson",
        unit="share",
        about="groups whose rewards are all equal; a group-relative algorithm learns nothing from them",
        names=(("group/zero_variance_share", "equal rewards"), ("dead_group_share", "no advantage")),
        bounds=SHARE,
    ),
    ChartKind(
        group=SEARCHES,
        title="Searches per trajectory",
        unit="count",
        about="mean searches and turns of a trajectory",
        names=(("trajectory/searches", "searches"), ("trajectory/turns", "turns")),
    ),
    ChartKind(
        group=SEARCHES,
        title="Lengths",
        unit="tokens",
        about="mean tokens of a trajectory: written by the policy, returned by the search, and all with the prompt",
        names=(
            ("trajectory/action_tokens", "policy"),
            ("trajectory/observation_tokens", "documents"),
            ("trajectory/tokens", "all"),
        ),
    ),
    ChartKind(
        group=SEARCHES,
        title="How trajectories end",
        unit="share",
        about="share of the step's trajectories by stop reason",
        names=(("stop/*", "*"),),
        bounds=SHARE,
    ),
    ChartKind(
        group=SEARCHES,
        title="Form",
        unit="share",
        about="trajectories in good form to the end, turns without a complete action, trajectories without a loss",
        names=(
            ("trajectory/well_formed_share", "well-formed"),
            ("action/invalid_share", "invalid turns"),
            ("trajectory/untrainable_share", "left out"),
        ),
        bounds=SHARE,
    ),
    ChartKind(
        group=DOCUMENTS,
        title="Noise",
        unit="share",
        about="the curriculum's chance of noisy documents, and the share of searches that drew them",
        names=(("curriculum/noise_probability", "planned"), ("search/noise_rate", "drawn")),
        bounds=SHARE,
    ),
    ChartKind(
        group=DOCUMENTS,
        title="Document quality",
        unit="share",
        about="searches whose documents contain an accepted answer, by the kind of documents asked for",
        names=(("search/*_contains_answer", "*"),),
        bounds=SHARE,
    ),
    ChartKind(
        group=DOCUMENTS,
        title="Faulty documents",
        unit="share",
        about="simulator outputs that had to be repaired, and searches that returned nothing",
        names=(
            ("search/malformed_share", "repaired"),
            ("search/failed_share", "failed"),
            ("search/*_malformed_share", "repaired, *"),
        ),
        bounds=SHARE,
    ),
    ChartKind(
        group=DOCUMENTS,
        title="Searches per step",
        unit="count",
        about="searches of all the step's trajectories",
        names=(("search/count", "searches"),),
    ),
    ChartKind(
        group=DOCUMENTS,
        title="Tokens per search",
        unit="tokens",
        about="mean tokens the simulator wrote for a search",
        names=(("search/generated_tokens", "tokens"),),
    ),
    ChartKind(
        group=LEARNING,
        title="KL to the reference",
        unit="nats per token",
        about="mean divergence of the policy from the frozen reference, over the loss tokens",
        names=(("kl/reference", "KL"),),
    ),
    ChartKind(
        group=LEARNING,
        title="Entropy",
        unit="nats per token",
        about="mean entropy of the policy's next-token distribution; near 0 it no longer explores",
        names=(("entropy", "entropy"),),
    ),
    ChartKind(
        group=LEARNING,
        title="Policy loss",
        unit="loss",
        about="mean over the loss tokens; its level says little, its jumps do",
        names=(("loss/policy", "policy"),),
    ),
    ChartKind(
        group=LEARNING,
        title="Gradient norm",
        unit="norm",
        about="length of the whole gradient before clipping",
        names=(("grad_norm", "norm"),),
    ),
    ChartKind(
        group=LEARNING,
        title="Clipped tokens",
        unit="share",
        about="loss tokens whose probability ratio was cut at the lower or upper limit",
        names=(
            ("ratio/clipped_low_share", "low"),
            ("ratio/clipped_high_share", "high"),
            ("ratio/clipped_dual_share", "dual"),
        ),
    ),
    ChartKind(
        group=LEARNING,
        title="Sampler against trainer",
        unit="nats per token",
        about="mean absolute difference of the two log-probabilities of the sampled tokens",
        names=(("logprobs/rollout_mismatch", "difference"),),
    ),
    ChartKind(
        group=LEARNING,
        title="Learning rate",
        unit="rate",
        about="of the step's optimizer steps",
        names=(("learning_rate", "rate"),),
    ),
    ChartKind(
        group=COST,
        title="Phase times",
        unit="seconds",
        about="wall clock of each phase of the step, and of all of them",
        names=(*((f"{phase}/seconds", phase) for phase in PHASES), ("seconds", "all")),
    ),
    ChartKind(
        group=COST,
        title="Throughput",
        unit="tokens/s",
        about="tokens by time: of the whole step, written by policy and simulator, scored, updated on",
        names=(("tokens_per_second", "step"), ("*/tokens_per_second", "*")),
    ),
    ChartKind(
        group=COST,
        title="Peak main memory",
        unit="GiB",
        about="most main memory held during each phase",
        names=tuple((f"{phase}/peak_rss_bytes", phase) for phase in PHASES),
        scale=2.0**-30,
    ),
    ChartKind(
        group=COST,
        title="Peak GPU memory",
        unit="GiB",
        about="most bytes in tensors on the card during each phase",
        names=tuple((f"{phase}/peak_cuda_bytes", phase) for phase in PHASES),
        scale=2.0**-30,
    ),
)


def charts_of(runs: Sequence[RunData]) -> tuple[list[dict[str, Any]], bool]:
    """The page's charts as plain JSON, by group, and whether a curve was thinned.

    One run: a chart holds all its curves. Several: a chart of several curves is split, so that colour means the run.
    """
    found = [dict(run.metrics) | dict(run.timings) for run in runs]
    most = max(FEWEST_POINTS, MOST_POINTS // len(runs))
    names = list(dict.fromkeys(name for series in found for name in series))
    taken: set[str] = set()
    charts: list[dict[str, Any]] = []
    for kind in CATALOGUE:
        curves = _curves_of(kind, [name for name in names if name not in taken])
        taken |= set(curves)
        for part in [curves] if len(runs) == 1 else [{name: label} for name, label in curves.items()]:
            if part:
                charts.append(_chart(kind, part, found, most, split=len(part) < len(curves)))
    interval = re.compile(r"eval/.+/f1_(low|high)")
    for name in names:
        if name not in taken and not interval.fullmatch(name):
            kind = ChartKind(group=REST, title=name, unit="", about=_file_of(name, runs), names=((name, name),))
            charts.append(_chart(kind, {name: name}, found, most, split=False))
    thinned = any(len(series[0]) > most for own in found for series in own.values())
    return charts, thinned


def thin(series: Series, most: int) -> Series:
    """At most `most` points: the smallest and the largest value of each of `most // 2` stretches of equal length."""
    steps, values = series
    if len(steps) <= most:
        return series
    kept: list[int] = []
    stretches = most // 2
    edges = [len(steps) * place // stretches for place in range(stretches + 1)]
    for low, high in itertools.pairwise(edges):
        finite = [index for index in range(low, high) if not math.isnan(values[index])] or [low]
        kept += sorted({min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)})
    return [steps[index] for index in kept], [values[index] for index in kept]


def _curves_of(kind: ChartKind, names: Sequence[str]) -> dict[str, str]:
    """{metric: label} of the kind's curves, among these names."""
    curves: dict[str, str] = {}
    for pattern, label in kind.names:
        expression = re.compile(re.escape(pattern).replace(r"\*", "(.+)"), re.DOTALL)
        for name in names:
            if name not in curves and (match := expression.fullmatch(name)):
                curves[name] = label.replace("*", match.group(1)) if match.groups() else label
    return curves


def _chart(
    kind: ChartKind, curves: Mapping[str, str], found: Sequence[Mapping[str, Series]], most: int, *, split: bool
) -> dict[str, Any]:
    lines = [
        _line(run, label, series, name, kind.scale, most)
        for run, series in enumerate(found)
        for name, label in curves.items()
        if name in series
    ]
    return {
        "group": kind.group,
        "title": f"{kind.title}: {next(iter(curves.values()))}" if split else kind.title,
        "unit": kind.unit,
        "about": kind.about,
        "bounds": kind.bounds,
        "lines": lines,
    }


def _line(run: int, label: str, found: Mapping[str, Series], name: str, scale: float, most: int) -> dict[str, Any]:
    steps, values = thin(found[name], most)
    line: dict[str, Any] = {"run": run, "label": label, "steps": steps, "values": _rounded(values, scale)}
    low, high = found.get(f"{name}_low"), found.get(f"{name}_high")
    if low and high and low[0] == high[0] == steps:
        line |= {"low": _rounded(low[1], scale), "high": _rounded(high[1], scale)}
    return line


def _rounded(values: Sequence[float], scale: float) -> list[float | None]:
    """Six digits, which is more than a chart shows; None for NaN."""
    return [None if math.isnan(value) else float(f"{value * scale:.6g}") for value in values]


def _file_of(name: str, runs: Sequence[RunData]) -> str:
    file = "metrics.jsonl" if any(name in run.metrics for run in runs) else "timings.jsonl"
    return f"{file}; docs/run_folder.md says what it means"
