"""Host algorithms on plain Python values: compiled when `_core` was built, else in Python, with the same results.

Torch-free, and it imports nothing of ours, so every room may use it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

try:
    from zs_fast import _core
except ImportError:  # not built (no compiler), or built for another Python
    _core = None  # type: ignore[assignment]

INTERFACE = 2
"""What `_core` says of itself; another number stands for other sources."""
STALE = _core is not None and getattr(_core, "INTERFACE", 1) != INTERFACE
"""Was the `_core` that lies here built from other sources? It is left alone then."""
if STALE:
    _core = None  # type: ignore[assignment]
NATIVE = _core is not None
"""Does the compiled `_core` answer? False means the Python references below do."""


Prefixes = Sequence[tuple[int, int]]
"""(source, length), lengths rising and sources falling: the latest earlier sequence with the same first tokens."""
LOOK_BACK = 256
"""Sequences before a sequence that its prefixes are looked for in. Groups stand together, and few micro batches hold as
many; a limit keeps thousands of examples from being compared each with each."""
LEAST_SHARED = 16
"""Tokens from which on a prefix is worth sharing: all chat templates begin with some tokens alike."""


def shared_prefixes(
    sequences: Sequence[Sequence[int]], *, look_back: int = LOOK_BACK, least: int = LEAST_SHARED
) -> list[list[tuple[int, int]]]:
    """For each sequence, with which earlier ones it begins alike, as `Prefixes`. Its last token counts as its own.

    With least = 1: [[5, 6, 7], [5, 8, 9], [5, 6, 7, 8]] -> [[], [(0, 1)], [(1, 1), (0, 3)]]. Whoever has only the
    sequences from a certain one on finds the longest prefix of them: the last pair whose source is among them.
    """
    found: list[list[tuple[int, int]]] = []
    for number, tokens in enumerate(sequences):
        pairs: list[tuple[int, int]] = []
        length, most = 0, len(tokens) - 1
        for source in range(number - 1, max(0, number - look_back) - 1, -1):
            if length >= most:
                break
            other = sequences[source]
            if len(other) <= length or other[length] != tokens[length] or other[:length] != tokens[:length]:
                continue
            end = min(most, len(other))
            length = next((place for place in range(length + 1, end) if other[place] != tokens[place]), end)
            if length >= least:
                pairs.append((source, length))
        found.append(pairs)
    return found


def held_prefix(prefixes: Prefixes, first: int) -> tuple[int, int]:
    """(source, length) of the longest prefix that a sequence from `first` on has too; (first, 0) without one."""
    best = (first, 0)
    for source, length in prefixes:
        if source < first:
            break
        best = (source, length)
    return best


def pack_segments(lengths: Sequence[int], token_budget: int, prefixes: Sequence[Prefixes] = ()) -> list[int]:
    """Bounds of consecutive runs of segments, `[0, ..., len(lengths)]`, each run at most token_budget tokens.

    As few runs as the budget allows, and among those the smallest largest run. A segment over the budget is a run of
    its own. prefixes: of each segment as `shared_prefixes` gives them (or of none); what a run holds already doesn't
    count again. Raises ValueError for a negative length or a budget below 1.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}, expected at least 1")
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths holds {min(lengths)}, expected numbers >= 0")
    if prefixes and len(prefixes) != len(lengths):
        raise ValueError(f"prefixes are of {len(prefixes)} segments, expected {len(lengths)} or none")
    if _core is not None:
        bounds: list[int] = _core.pack_segments(lengths, token_budget, prefixes)
        return bounds
    return pack_segments_reference(lengths, token_budget, prefixes)


def pack_segments_reference(lengths: Sequence[int], token_budget: int, prefixes: Sequence[Prefixes] = ()) -> list[int]:
    """What `pack_segments` means: fill greedily, then search for the smallest limit that needs no more runs."""

    def fill(limit: int) -> list[int]:
        bounds, used = [0], 0
        for index, length in enumerate(lengths):
            own = length - (held_prefix(prefixes[index], bounds[-1])[1] if prefixes else 0)
            if index > bounds[-1] and own > limit - used:
                bounds.append(index)
                used, own = 0, length
            used = min(limit, used + own)
        return [*bounds, len(lengths)] if lengths else bounds

    best = fill(token_budget)
    low, high = 1, token_budget
    while low < high:
        middle = (low + high) // 2
        bounds = fill(middle)
        if len(bounds) <= len(best):
            best, high = bounds, middle
        else:
            low = middle + 1
    return best


def first_action(text: str) -> tuple[str, int, int] | None:
    """`("search" | "answer", start, end)` of the text inside a turn's first action, None without one; in linear time.

    What counts as an action is said in search/parser.py.
    """
    if _core is not None:
        found: tuple[str, int, int] | None = _core.first_action(text)
        return found
    return first_action_reference(text)


_OPENING = re.compile(r"<(think|search|answer)>")
_ANY_TAG = re.compile(r"</?(?:think|search|answer|information)>")


def first_action_reference(text: str) -> tuple[str, int, int] | None:
    """What `first_action` means, by regular expressions that never read a stretch twice."""
    position = 0
    while opening := _OPENING.search(text, position):
        kind = opening[1]
        start = opening.end()
        end = text.find(f"</{kind}>", start)
        if end < 0:
            break
        position = end + len(kind) + 3
        if kind != "think" and not _ANY_TAG.search(text, start, end):
            return kind, start, end
    return None
