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

NATIVE = _core is not None
"""Does the compiled `_core` answer? False means the Python references below do."""


def pack_segments(lengths: Sequence[int], token_budget: int) -> list[int]:
    """Bounds of consecutive runs of segments, `[0, ..., len(lengths)]`, each run at most token_budget tokens.

    As few runs as the budget allows, and among those the smallest largest run. A segment over the budget is a run of
    its own. Raises ValueError for a negative length or a budget below 1.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}, expected at least 1")
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths holds {min(lengths)}, expected numbers >= 0")
    if _core is not None:
        bounds: list[int] = _core.pack_segments(lengths, token_budget)
        return bounds
    return pack_segments_reference(lengths, token_budget)


def pack_segments_reference(lengths: Sequence[int], token_budget: int) -> list[int]:
    """What `pack_segments` means: fill greedily, then search for the smallest limit that needs no more runs."""

    def fill(limit: int) -> list[int]:
        bounds, used = [0], 0
        for index, length in enumerate(lengths):
            if index > bounds[-1] and length > limit - used:
                bounds.append(index)
                used = 0
            used = min(limit, used + length)
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
