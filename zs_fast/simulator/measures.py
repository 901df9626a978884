"""Numbers about simulated documents, each with its 95 % interval. Pure functions of texts."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from zs_fast.search.reward import contains_answer, f1, normalise
from zs_fast.types import SearchMode, SearchResult

BOOTSTRAP_SAMPLES = 1000
_Z = 1.959964

MEASURES: Mapping[str, str] = {
    "contains_answer": "searches with a gold answer in a document",
    "well_formed": "outputs in exactly the asked-for form",
    "failed": "outputs without any document",
    "document_words": "words per document",
    "distinct_bigrams": "of a search's word pairs, those that are distinct",
    "distinct_documents": "documents that no other one of the mode equals",
    "similarity": "word F1 of a document with the nearest one really found",
    "reader_f1": "F1 of the reader's answers",
}
"""Name -> what it is the share or mean of."""


@dataclass(frozen=True, slots=True)
class Value:
    """A share or mean over searches, and its 95 % interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def measure(
    results: Mapping[SearchMode, Sequence[SearchResult]], reader_f1: Mapping[SearchMode, Sequence[float]]
) -> dict[SearchMode, dict[str, Value]]:
    """All numbers of each mode. `results[REAL]` are the searches as they were really answered, in the same order.

    A search that failed has no documents: it contains no answer and is not well-formed, and is left out of what is
    said about documents.
    """
    real = [result.documents for result in results[SearchMode.REAL]]
    return {
        mode: _of_mode(mode, of_mode, real) | ({"reader_f1": mean(reader_f1[mode])} if mode in reader_f1 else {})
        for mode, of_mode in results.items()
    }


def _of_mode(mode: SearchMode, results: Sequence[SearchResult], real: Sequence[Sequence[str]]) -> dict[str, Value]:
    values = {
        "contains_answer": share(
            [contains_answer(result.documents, result.request.question.answers) for result in results]
        )
    }
    if mode is not SearchMode.REAL:
        values["well_formed"] = share([not result.failed and not result.malformed for result in results])
        values["failed"] = share([result.failed for result in results])
    served = [(result.documents, found) for result, found in zip(results, real, strict=True) if result.documents]
    documents = [text for texts, _ in served for text in texts]
    if documents:
        values["document_words"] = mean([len(text.split()) for text in documents])
        values["distinct_bigrams"] = mean([distinct_bigrams(texts) for texts, _ in served])
        plain = [normalise(text) for text in documents]
        counts = {text: plain.count(text) for text in set(plain)}
        values["distinct_documents"] = share([counts[text] == 1 for text in plain])
    if mode is not SearchMode.REAL and documents:
        values["similarity"] = mean([max(f1(t, [other]) for other in found) for texts, found in served for t in texts])
    return values


def distinct_bigrams(documents: Sequence[str]) -> float:
    """Of all pairs of neighbouring words in the documents, the share of distinct ones; 1 where there is none."""
    pairs = [pair for text in documents for pair in pairwise(normalise(text).split())]
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def share(flags: Sequence[bool]) -> Value:
    """Wilson's interval, which does not shrink to nothing where all agree. NaN of nothing."""
    count = len(flags)
    if not count:
        return Value(math.nan, math.nan, math.nan)
    p = sum(flags) / count
    middle = p + _Z**2 / (2 * count)
    half = _Z * math.sqrt(p * (1 - p) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return Value(p, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def mean(values: Sequence[float]) -> Value:
    """The bootstrap's interval: percentiles of means of resampled values, with a fixed seed. NaN of nothing."""
    if not values:
        return Value(math.nan, math.nan, math.nan)
    draws = random.Random(0)
    means = sorted(math.fsum(draws.choices(values, k=len(values))) / len(values) for _ in range(BOOTSTRAP_SAMPLES))
    low, high = means[int(0.025 * BOOTSTRAP_SAMPLES)], means[int(0.975 * BOOTSTRAP_SAMPLES) - 1]
    return Value(math.fsum(values) / len(values), low, high)


def table(measured: Mapping[SearchMode, Mapping[str, Value]]) -> str:
    """A row per measure, a column per mode: the value and its 95 % interval."""
    rows = [("", *measured)]
    for name in MEASURES:
        cells = [_cell(of_mode.get(name)) for of_mode in measured.values()]
        if any(cell != "-" for cell in cells):
            rows.append((name, *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cell(value: Value | None) -> str:
    if value is None or math.isnan(value.value):
        return "-"
    digits = 1 if abs(value.value) >= 10 else 3
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"
