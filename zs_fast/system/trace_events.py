"""Chrome's trace event format, which ui.perfetto.dev and chrome://tracing open: spans and counters on named tracks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zs_fast.system.files import FileOperations, replace_file

Span = tuple[float, float]
"""Start and end, in seconds of one clock."""


class TraceEvents:
    """Collects events; times are seconds of any one clock, of which `zero` becomes the trace's 0."""

    def __init__(self, zero: float) -> None:
        self._zero = zero
        self._events: list[dict[str, Any]] = []
        self._tracks: dict[str, dict[str, int]] = {}

    def span(self, process: str, track: str, name: str, span: Span, **details: Any) -> None:
        """A bar on a track. Those of one track either nest or don't touch."""
        self._add("X", process, track, name, span[0], dur=max(0.0, (span[1] - span[0]) * 1e6), args=details)

    def counter(self, process: str, name: str, at: float, values: Mapping[str, float]) -> None:
        """From `at` on, the counter has these values."""
        self._add("C", process, "", name, at, args=dict(values))

    def write(self, path: Path, summary: Mapping[str, Any]) -> None:
        """The whole file at once; `summary` lies under "otherData"."""
        names = [
            {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": {"name": shown}}
            for pid, (process, tracks) in enumerate(self._tracks.items(), start=1)
            for name, tid, shown in (
                ("process_name", 0, process),
                *(("thread_name", tid, track) for track, tid in tracks.items() if track),
            )
        ]
        events = sorted(self._events, key=lambda one: (one["ts"], -one.get("dur", 0.0)))
        content = {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": dict(summary)}
        replace_file(FileOperations(), path, json.dumps(content, allow_nan=False).encode() + b"\n")

    def _add(self, kind: str, process: str, track: str, name: str, at: float, **rest: Any) -> None:
        tracks = self._tracks.setdefault(process, {})
        tid = tracks.setdefault(track, len(tracks) + 1)
        pid = list(self._tracks).index(process) + 1
        self._events.append({"ph": kind, "name": name, "pid": pid, "tid": tid, "ts": (at - self._zero) * 1e6, **rest})


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same moments as spans in order that don't touch."""
    found: list[Span] = []
    for start, end in sorted(span for span in spans if span[1] > span[0]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def common(one: Iterable[Span], other: Iterable[Span]) -> list[Span]:
    """The moments in both."""
    a, b, found, i, j = merged(one), merged(other), [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return found


def without(one: Iterable[Span], other: Iterable[Span]) -> list[Span]:
    """The moments in `one` that are not in `other`."""
    a = merged(one)
    if not a:
        return []
    low, gaps = a[0][0], []
    for start, end in merged(other):
        gaps.append((low, start))
        low = max(low, end)
    return common(a, [*gaps, (low, a[-1][1])])


def seconds(spans: Iterable[Span]) -> float:
    """How long they are together, moments that several share counted once."""
    return sum(end - start for start, end in merged(spans))
