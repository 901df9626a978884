"""What a call uses: memory, operator calls, device time; what the machine can do at best; how far off a result is."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

BLANK = 256 << 20
"""Bytes overwritten before a timed GPU call: more than any L2 cache holds."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this machine did at best in this very run, on one thread or one GPU."""

    bytes_per_s: float
    """A large copy, bytes read plus bytes written."""
    flop_per_s: float | None
    """A large bf16 matrix product; None on a CPU, where cases time their own products."""


def ceilings(device: str, *, quick: bool = False) -> Ceilings:
    """Measure both, on random data."""
    number = (1 << 20) if quick else (1 << 26) if device == "cpu" else (1 << 31)
    copied = _copied_per_second(number, device)
    if device == "cpu":
        return Ceilings(copied, None)
    size = 512 if quick else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return Ceilings(copied, 2 * size**3 / _median_seconds(lambda: torch.mm(a, b), device))


def matrix_rate(device: str, dtype: torch.dtype, *, quick: bool = False) -> float:
    """Floating-point operations a second of a large matrix product in this type, measured now."""
    size = 256 if quick else 1536 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b), device)


def _copied_per_second(number: int, device: str) -> float:
    source = torch.rand(number, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


def _median_seconds(function: Callable[[], Any], device: str) -> float:
    function()
    if device != "cpu":
        return statistics.median(device_seconds(function, 1) for _ in range(9))
    taken = []
    for _ in range(9):
        begin = time.process_time()
        function()
        taken.append(time.process_time() - begin)
    return max(statistics.median(taken), 1e-9)


@functools.cache
def _blank() -> Tensor:
    return torch.empty(BLANK, dtype=torch.int8, device="cuda")


def device_seconds(function: Callable[[], Any], calls: int) -> float:
    """Mean seconds of a call on the GPU. What the cache held is overwritten before each call, which also keeps the
    device busy while the host launches: launching is not timed, only what the device then does."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin, end in events:
        _blank().zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in events) / calls / 1e3


def wait(device: str) -> None:
    """Until the device has done everything asked of it."""
    if device != "cpu":
        torch.cuda.synchronize(device)


@dataclass(slots=True)
class Peak:
    bytes: int | None = None


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Most memory held inside, above what was held before: torch's allocator on a GPU, else the resident memory of the
    process as the kernel keeps its high-water mark (None where it does not)."""
    peak = Peak()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    _return_free_memory()
    before = _resident("VmRSS") if _reset_high_water() else None
    yield peak
    high = _resident("VmHWM")
    if before is not None and high is not None:
        peak.bytes = max(0, high - before)


def _return_free_memory() -> None:
    """Give what the C library keeps for later back to the system: it would hide what a call takes."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library; the figure is then a lower bound


def _reset_high_water() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
    except OSError:
        return None


@dataclass(slots=True)
class Counted:
    number: int | None = None
    seconds: float = 0.0


_NAMES = """
alias as_strided chunk contiguous detach empty empty_like empty_strided expand expand_as flatten is_nonzero item lift
lift_fresh movedim narrow new_empty numpy_T permute reshape resize_ resolve_conj resolve_neg result_type select set_
slice split split_with_sizes squeeze t to transpose unbind unfold unsqueeze view view_as _reshape_alias _unsafe_view
_has_compatible_shallow_copy_type
"""
NO_WORK = frozenset(_NAMES.split())
"""Operators that only describe, allocate or read one number."""


@contextmanager
def count_launches(device: str) -> Iterator[Counted]:
    """Count inside: kernels and copies on a GPU; on a CPU the operator calls that compute (None for compiled code)."""
    counted = Counted()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write lines to stderr
    activities = [ProfilerActivity.CPU] if device == "cpu" else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    begin = time.perf_counter()
    with profile(activities=activities, acc_events=True) as profiled:
        yield counted
        counted.seconds = time.perf_counter() - begin
    events = profiled.events() or []
    if device != "cpu":
        counted.number = sum(event.device_type == DeviceType.CUDA for event in events)
    elif not any("Compiled" in event.name for event in events):
        counted.number = sum(_computes(event) and not any(map(_computes, event.cpu_children)) for event in events)


def _computes(event: FunctionEvent) -> bool:
    """Is this, or anything it called, an operator that does work?"""
    space, colons, name = event.name.partition("::")
    if colons and " " not in space and name not in NO_WORK:
        return True
    return any(_computes(child) for child in event.cpu_children)


def error(found: Tensor, exact: Tensor) -> dict[str, float]:
    """{max, relative} error of the first rows of `found`, as many as `exact` has."""
    if exact.dim():
        found = found[: exact.shape[0]]
    difference = found.detach().double().cpu() - exact.cpu()
    size = float(torch.linalg.vector_norm(exact.double()).clamp(min=1e-30))
    return {
        "max": float(difference.abs().max()) if difference.numel() else 0.0,
        "relative": float(torch.linalg.vector_norm(difference)) / size,
    }
