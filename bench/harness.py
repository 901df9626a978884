"""The one protocol: every number of this repository that speaks of time or memory is made here.

Each variant is called once to warm up (its operator calls are counted and its results compared with the exact ones),
then come rounds in which every variant runs once in a freshly shuffled order, so that a drift of the machine falls on
all alike. A sample repeats a fast call until it is long enough to time. Reported are medians per call, and the spread:
the distance between the quartiles over the median. On a CPU the time is that of the process (CPU seconds of one
thread): a busy machine does not stretch it. On a GPU it is the device's, with the cache overwritten before every call.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import usage

MIN_SAMPLE_S = 0.005
WARM_UP_S = 0.2
SLOW_S = 0.5
"""A call this long is warm after its first time, and its memory is measured while it is timed."""

Results = Mapping[str, Tensor]
"""What a variant computed, by name; all variants of a case use the same names."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a variant is to reach, as one number of its row or as a ratio to another variant's."""

    variant: str
    quantity: str
    """speed (other's time over this one's), time (this one's over the other's), peak, of_floor, launches, or
    error:<result> (largest absolute error)"""
    over: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def text(self) -> str:
        """The target in words."""
        sign, bound = ("at least", self.at_least) if self.at_least is not None else ("at most", self.at_most)
        unit = "x" if self.over else ""
        return f"{self.variant}: {self.quantity} {sign} {bound:g}{unit}{f' of {self.over}' if self.over else ''}"


@dataclass(frozen=True, slots=True)
class Case:
    """One question: the same result by several ways. The first variant is what the others are held against."""

    name: str
    shape: str
    variants: dict[str, Callable[[], Any]]
    device: str = "cpu"
    exact: Callable[[], Results] | None = None
    """The results in float64; one may hold the first rows only."""
    tolerance: float = 0.05
    """Largest relative error (Euclidean) with which a result still counts as the same."""
    flop: float = 0.0
    """Floating-point operations that no way can do without."""
    bytes: float = 0.0
    """Bytes that no way can do without: each input read once, each output written once."""
    floors: tuple[str, ...] = ()
    """Variants of bare work, the fastest of which is the floor; without any, the machine's ceilings and `flop` and
    `bytes` give it."""
    targets: tuple[Target, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that would be variants, and how to install them."""
    rounds: int | None = None
    """Rounds of a full run, where the usual number would take too long."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One variant of one case. Times are per call; `speedup` is the first variant's time over this one's."""

    case: str
    shape: str
    variant: str
    wall_ms: float
    cpu_ms: float
    spread: float
    speedup: float
    calls_per_sample: int
    samples: int
    of_floor: float | None = None
    """The floor's time over this one's: 1 is as fast as can be."""
    rate: float | None = None
    """Tera floating-point operations a second where `flop` is known, else gigabytes a second."""
    rate_unit: str = ""
    peak_bytes: int | None = None
    """Most memory above what was held before the call."""
    launches: int | None = None
    """Operator calls that compute (CPU) or kernels launched (GPU)."""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Result -> {max: largest absolute error, relative: Euclidean} against float64."""

    def ms(self, device: str) -> float:
        """The time that counts on this device."""
        return self.cpu_ms if device == "cpu" else self.wall_ms


class Disagreement(AssertionError):
    """A variant does not compute what the others do."""


def measure(case: Case, *, rounds: int, ceilings: usage.Ceilings | None = None) -> list[Timing]:
    """Time all variants of a case, interleaved, `rounds` samples each. Raises Disagreement."""
    exact = case.exact() if case.exact else {}
    warm: dict[str, _Warm] = {}
    for name, function in case.variants.items():
        try:
            warm[name] = _warm_up(case, name, function, exact)
        except torch.cuda.OutOfMemoryError:
            case.absent[name] = "a GPU with more memory"
            torch.cuda.empty_cache()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in warm}
    peaks = {name: one.peak_bytes for name, one in warm.items()}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(warm), len(warm)):
            function, one = case.variants[name], warm[name]
            if one.slow:
                with usage.peak_memory(case.device) as peak:
                    samples[name].append(_sample(function, one.calls, case.device))
                peaks[name] = max(peaks[name] or 0, peak.bytes) if peak.bytes is not None else None
            else:
                samples[name].append(_sample(function, one.calls, case.device))
    clock = 1 if case.device == "cpu" else 0
    times = {name: statistics.median(one[clock] for one in taken) for name, taken in samples.items()}
    floor = _floor(case, times, ceilings)
    return [
        Timing(
            case=case.name,
            shape=case.shape,
            variant=name,
            wall_ms=statistics.median(one[0] for one in taken) * 1e3,
            cpu_ms=statistics.median(one[1] for one in taken) * 1e3,
            spread=spread_of([one[clock] for one in taken]),
            speedup=times[next(iter(times))] / times[name],
            calls_per_sample=warm[name].calls,
            samples=rounds,
            of_floor=None if floor is None else floor / times[name],
            rate=(case.flop / 1e12 or case.bytes / 1e9) / times[name] or None,
            rate_unit="TFLOP/s" if case.flop else "GB/s" if case.bytes else "",
            peak_bytes=peaks[name],
            launches=warm[name].launches,
            errors=warm[name].errors,
        )
        for name, taken in samples.items()
    ]


@dataclass(frozen=True, slots=True)
class _Warm:
    calls: int
    slow: bool
    launches: int | None
    errors: dict[str, dict[str, float]]
    peak_bytes: int | None


def _warm_up(case: Case, name: str, function: Callable[[], Any], exact: Results) -> _Warm:
    """Call until warm; count operator calls, compare results, and count how many calls a sample needs."""
    with usage.count_launches(case.device) as counted:
        results = function()
        usage.wait(case.device)
    errors = {}
    if isinstance(results, Mapping):
        errors = {key: usage.error(results[key], exact[key]) for key in exact if key in results}
        for key, one in errors.items():
            if not one["relative"] <= case.tolerance:  # NaN too
                raise Disagreement(f"{case.name}: {name} has another {key} than float64: {one}")
    del results
    gc.collect()
    first = time.perf_counter()
    fastest = _sample(function, 1, case.device)[0] if counted.seconds < SLOW_S else counted.seconds
    while time.perf_counter() - first < WARM_UP_S and fastest < SLOW_S:
        fastest = min(fastest, _sample(function, 1, case.device)[0])
    slow = fastest >= SLOW_S
    peak_bytes = None
    if not slow:
        with usage.peak_memory(case.device) as peak:
            function()
            usage.wait(case.device)
        peak_bytes = peak.bytes
    calls = max(1, round(MIN_SAMPLE_S / max(fastest, 1e-9)))
    return _Warm(calls, slow, counted.number, errors, peak_bytes)


def _sample(function: Callable[[], Any], calls: int, device: str) -> tuple[float, float]:
    """(wall or device, CPU) seconds per call. CPU seconds count every thread of the process."""
    if device != "cpu":
        return usage.device_seconds(function, calls), 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        function()
    taken = time.perf_counter() - wall, time.process_time() - cpu
    return tuple(max(one, 1e-9) / calls for one in taken)  # type: ignore[return-value]  # a clock may stand still


def spread_of(times: Sequence[float]) -> float:
    """Distance between the quartiles over the median."""
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / statistics.median(times)


def _floor(case: Case, times: Mapping[str, float], ceilings: usage.Ceilings | None) -> float | None:
    """Seconds that no way can beat, as far as this machine's own measurements say."""
    if case.floors:
        return min((times[name] for name in case.floors if name in times), default=None)
    if ceilings is None or not (case.bytes or (case.flop and ceilings.flop_per_s)):
        return None
    return max(case.bytes / ceilings.bytes_per_s, case.flop / ceilings.flop_per_s if ceilings.flop_per_s else 0.0)


def judge(case: Case, timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Each target of a case: what was measured, and whether it is met (None: a variant it speaks of is absent)."""
    return judge_timings(case.name, case.targets, timings, case.device)


def judge_timings(name: str, targets: Sequence[Target], timings: Sequence[Timing], device: str) -> list[dict[str, Any]]:
    """The same for the timings of one case that were not taken by `measure`."""
    found = {timing.variant: timing for timing in timings}
    verdicts = []
    for target in targets:
        measured = _measured(target, found, device)
        met = None
        if measured is not None:
            met = measured >= target.at_least if target.at_least is not None else measured <= (target.at_most or 0.0)
        verdicts.append({"case": name, "target": target.text, "measured": measured, "met": met})
    return verdicts


def _measured(target: Target, found: Mapping[str, Timing], device: str) -> float | None:
    if target.variant not in found or (target.over is not None and target.over not in found):
        return None
    ours = found[target.variant]
    if target.over is None:
        if target.quantity.startswith("error:"):
            return ours.errors.get(target.quantity.partition(":")[2], {}).get("max")
        return {"of_floor": ours.of_floor, "launches": ours.launches, "peak": ours.peak_bytes}[target.quantity]
    theirs = found[target.over]
    if target.quantity == "peak":
        return ours.peak_bytes / theirs.peak_bytes if ours.peak_bytes is not None and theirs.peak_bytes else None
    ratio = theirs.ms(device) / ours.ms(device)
    return {"speed": ratio, "time": 1.0 / ratio}[target.quantity]
