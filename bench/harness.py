"""The one timing protocol: every number of this repository that speaks of time is made here.

Warm up, then rounds in which every variant runs once in a freshly shuffled order, so that a drift of the machine falls
on all alike. A sample repeats a fast call until it is long enough to time. Reported are the medians of wall and CPU
seconds per call, and the spread: the distance between the quartiles over the median.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from zs_fast.system.environment import environment

RESULTS = Path(__file__).with_name("results")
MIN_SAMPLE_S = 0.005
WARM_UP_S = 0.2


@dataclass(frozen=True, slots=True)
class Case:
    """One question: the same result by several ways. The first variant is what the others are held against."""

    name: str
    shape: str
    variants: dict[str, Callable[[], Any]]
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Timing:
    """One variant of one case. Times are per call; `speedup` is the first variant's wall time over this one's."""

    case: str
    shape: str
    variant: str
    wall_ms: float
    cpu_ms: float
    spread: float
    speedup: float
    calls_per_sample: int
    samples: int


def measure(case: Case, *, rounds: int) -> list[Timing]:
    """Time all variants of a case, interleaved, `rounds` samples each."""
    calls = {name: _calls_per_sample(function, case.device) for name, function in case.variants.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in case.variants}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(case.variants), len(case.variants)):
            samples[name].append(_sample(case.variants[name], calls[name], case.device))
    wall = {name: statistics.median(one[0] for one in taken) for name, taken in samples.items()}
    base = wall[next(iter(case.variants))]
    timings = []
    for name, taken in samples.items():
        low, _, high = statistics.quantiles([one[0] for one in taken], n=4)
        timings.append(
            Timing(
                case=case.name,
                shape=case.shape,
                variant=name,
                wall_ms=wall[name] * 1e3,
                cpu_ms=statistics.median(one[1] for one in taken) * 1e3,
                spread=(high - low) / wall[name],
                speedup=base / wall[name],
                calls_per_sample=calls[name],
                samples=rounds,
            )
        )
    return timings


def _calls_per_sample(function: Callable[[], Any], device: str) -> int:
    """Warm up for a while, and count how many calls a sample needs to be long enough."""
    end = time.perf_counter() + WARM_UP_S
    fastest = _sample(function, 1, device)[0]
    while time.perf_counter() < end:
        fastest = min(fastest, _sample(function, 1, device)[0])
    return max(1, round(MIN_SAMPLE_S / max(fastest, 1e-9)))


def _sample(function: Callable[[], Any], calls: int, device: str) -> tuple[float, float]:
    """(wall, CPU) seconds per call. CPU seconds count every thread of the process."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        function()
    _wait(device)
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def table(timings: Sequence[Timing]) -> str:
    """The timings as lines for a person."""
    head = f"{'case':<18} {'shape':<24} {'variant':<22} {'wall ms':>10} {'CPU ms':>10} {'spread':>7} {'speedup':>8}"
    rows = [
        f"{t.case:<18} {t.shape:<24} {t.variant:<22} {t.wall_ms:>10.3f} {t.cpu_ms:>10.3f} "
        f"{t.spread:>7.1%} {t.speedup:>7.2f}x"
        for t in timings
    ]
    return "\n".join([head, *rows])


def summarise(subject: str, timings: Sequence[Timing], device: str = "cpu") -> dict[str, Any]:
    """What was timed, on what, with which versions and commit: one JSON object per run."""
    return {
        "subject": subject,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environment": environment(device),
        "timings": [asdict(timing) for timing in timings],
    }


def write_results(summary: dict[str, Any], results: Path = RESULTS) -> Path:
    """The file of a run: `results/<device>/<subject>_<time>.json`."""
    folder = results / device_slug(summary["environment"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{summary['subject']}_{summary['time'].replace(':', '')}.json"
    path.write_text(json.dumps(summary, indent=1, default=str) + "\n", encoding="utf-8")
    return path


def device_slug(found: dict[str, Any]) -> str:
    """The device's name as a folder name: `nvidia_h100`, `intel_xeon_..._2_cores`."""
    name = found["gpu"] or f"{found['cpu'] or found['machine']} {found['usable_cpu_count']} cores"
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_")
