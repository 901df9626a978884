"""From results to tables: means over all rows, bootstrap intervals, and the lines that a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from zs_fast.types import StopReason, Trajectory

BOOTSTRAP_SAMPLES = 1000
MEASURES = ("exact_match", "cover_match", "f1")
_SAMPLES_AT_ONCE = 50
"""Resamples drawn in one go: bounds the memory for their indices."""

Scores = NDArray[np.float64]
"""[questions, MEASURES]"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What counts of one played question."""

    source: str
    f1: float
    exact_match: float
    cover_match: float
    num_searches: int
    stop_reason: str

    @classmethod
    def of(cls, trajectory: Trajectory) -> Result:
        return cls(
            source=trajectory.question.source,
            f1=trajectory.scores.f1,
            exact_match=trajectory.scores.exact_match,
            cover_match=trajectory.scores.cover_match,
            num_searches=trajectory.num_searches,
            stop_reason=str(trajectory.stop_reason),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result on one set of questions. Means are over all rows; `_low` and `_high` bound them at 95 %."""

    num_questions: int
    f1: float
    f1_low: float
    f1_high: float
    exact_match: float
    exact_match_low: float
    exact_match_high: float
    cover_match: float
    cover_match_low: float
    cover_match_high: float
    searches_per_question: float
    answered_share: float
    """Share of trajectories that ended on a complete answer."""
    search_failed_share: float
    """Share of trajectories that a failed search ended; they count, with 0."""
    f1_by_source: dict[str, float]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat numbers for the metrics file: `{prefix}/f1`, `{prefix}/f1/{source}`, ..."""
        values = asdict(self)
        by_source = values.pop("f1_by_source")
        return {f"{prefix}/{name}": float(value) for name, value in values.items()} | {
            f"{prefix}/f1/{source}": value for source, value in by_source.items()
        }

    def line(self, name: str) -> str:
        """The result in one line, for the screen."""
        return (
            f"{name}: F1 {self.f1:.3f} ({self.f1_low:.3f} to {self.f1_high:.3f}), "
            f"{self.searches_per_question:.2f} searches per question, {self.num_questions} questions"
        )

    def intervals(self) -> dict[str, Interval]:
        """Exact match, cover match and F1 with their bounds."""
        values = asdict(self)
        return {
            name: Interval(mean=values[name], low=values[f"{name}_low"], high=values[f"{name}_high"])
            for name in MEASURES
        }


def summarise(results: Sequence[Result]) -> Evaluation:
    """Means over `results`, bootstrap intervals (percentiles of resampled means, fixed seed), and F1 per source."""
    bounds: dict[str, float] = {}
    for name, interval in averages([results]).items():
        bounds |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    by_source: dict[str, list[float]] = {}
    for result in results:
        by_source.setdefault(result.source, []).append(result.f1)
    return Evaluation(
        num_questions=len(results),
        searches_per_question=_mean([result.num_searches for result in results]),
        answered_share=_mean([result.stop_reason == StopReason.ANSWER for result in results]),
        search_failed_share=_mean([result.stop_reason == StopReason.SEARCH_FAILED for result in results]),
        f1_by_source={source: _mean(values) for source, values in sorted(by_source.items())},
        **bounds,
    )


def averages(sets: Sequence[Sequence[Result]]) -> dict[str, Interval]:
    """The mean of the sets' means, each set counting the same, with the interval of resampling every set by itself."""
    columns = [_scores(results) for results in sets if results]
    if not columns:
        return {name: Interval(mean=0.0, low=0.0, high=0.0) for name in MEASURES}
    means = np.mean([[_mean(column) for column in scores.T.tolist()] for scores in columns], axis=0)
    resampled = np.sort(
        np.mean([_resampled_means(scores, seed) for seed, scores in enumerate(columns)], axis=0), axis=0
    )
    low, high = resampled[int(0.025 * BOOTSTRAP_SAMPLES)], resampled[int(0.975 * BOOTSTRAP_SAMPLES) - 1]
    return {
        name: Interval(mean=float(means[at]), low=float(low[at]), high=float(high[at]))
        for at, name in enumerate(MEASURES)
    }


def table(results: Mapping[str, Sequence[Result]]) -> list[str]:
    """A markdown table of one evaluation, a row for each set; with several sets their average and all rows too."""
    rows = [["set", "n", "exact match", "cover match", "F1", "searches", "answered"]]
    for name, of_set in results.items():
        rows.append(_row(name, of_set))
    if len(results) > 1:
        every = [result for of_set in results.values() for result in of_set]
        average = averages(list(results.values()))
        rows.append(["average of sets", "", *(str(average[name]) for name in MEASURES), "", ""])
        rows.append(_row("all rows", every))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _row(name: str, results: Sequence[Result]) -> list[str]:
    evaluation = summarise(results)
    intervals = evaluation.intervals()
    return [
        name,
        str(evaluation.num_questions),
        *(str(intervals[measure]) for measure in MEASURES),
        f"{evaluation.searches_per_question:.2f}",
        f"{evaluation.answered_share:.3f}",
    ]


def _scores(results: Sequence[Result]) -> Scores:
    return np.array([[getattr(result, name) for name in MEASURES] for result in results], dtype=np.float64)


def _resampled_means(scores: Scores, seed: int) -> Scores:
    """[BOOTSTRAP_SAMPLES, MEASURES]: means of as many rows as there are, drawn with replacement."""
    draws = np.random.default_rng(seed)
    means = []
    for _ in range(0, BOOTSTRAP_SAMPLES, _SAMPLES_AT_ONCE):
        rows = draws.integers(len(scores), size=(_SAMPLES_AT_ONCE, len(scores)))
        means.append(scores[rows].mean(axis=1))
    return np.concatenate(means)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
