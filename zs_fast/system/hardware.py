"""What a machine has: memory, and speeds for the times of a plan. Nothing here needs torch but `present_machine`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from zs_fast.errors import ConfigError

GIB = 2**30
UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}
BANDWIDTH_REACHED, PEAK_REACHED = 0.90, 0.81
"""Shares of a data sheet's bandwidth and bfloat16 peak that a copy and a large product reach. Measured on an H100
(3.0 of 3.35 TB/s, 798 of 989 TFLOP/s), taken over for the other cards."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where a run is to take place."""

    name: str
    memory_bytes: int
    """Of the card; on a CPU what is free in main memory."""
    bytes_per_s: float
    """Of its memory, as reached."""
    flop_per_s: float
    """bfloat16 products on a card, float32 on a CPU, as reached."""
    is_cuda: bool = True
    held_by_others: int = 0
    """Bytes of the card that other processes hold (with this one's own driver context, where that is there already)."""


def _card(name: str, memory_gib: float, terabytes_per_s: float, teraflop_per_s: float) -> Hardware:
    reached = (terabytes_per_s * 1e12 * BANDWIDTH_REACHED, teraflop_per_s * 1e12 * PEAK_REACHED)
    return Hardware(name, int(memory_gib * GIB), *reached)


CARDS = {
    card.name: card
    for card in (
        _card("rtx3060", 12.0, 0.360, 25.6),
        _card("rtx4080", 16.0, 0.717, 97.5),
        _card("rtx4090", 24.0, 1.008, 165.2),
        _card("l4", 22.5, 0.300, 121.0),
        _card("a100", 79.3, 2.039, 312.0),
        _card("h100", 79.6, 3.35, 989.0),
        _card("h200", 140.4, 4.80, 989.0),
    )
}
"""Data sheets: memory that the driver shows, bandwidth, dense bfloat16 products summed in float32."""
MUCH_BYTES = 1 << 30
"""Of a card in other hands that is worth a word: more than a driver's context of this process."""
CORE_FLOP_PER_S, CPU_BYTES_PER_S = 8e10, 1.3e10
"""Of one core of a server processor with AVX-512, float32, and of its memory seen from one core: rough."""


def gpu(text: str) -> Hardware:
    """A card by name (`h100`), or by its memory (`24GiB`, `80GB`): then with the speed of the next larger known one.

    Raises ConfigError for anything else.
    """
    key = re.sub(r"[ _]", "", text.lower())
    if key in CARDS:
        return CARDS[key]
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(gib|gb|mib|mb)", key)
    if found is None or not float(found[1]):
        raise ConfigError(
            f"--gpu {text!r} is neither a size such as 24GiB nor a card that is known here: {', '.join(sorted(CARDS))}."
        )
    size = int(float(found[1]) * UNITS[found[2]])
    by_size = sorted(CARDS.values(), key=lambda card: card.memory_bytes)
    like = next((card for card in by_size if card.memory_bytes >= 0.95 * size), by_size[-1])
    return replace(like, name=f"a card of {size / GIB:.4g} GiB (times: {like.name})", memory_bytes=size)


def main_memory(threads: int = 0) -> Hardware:
    """This machine's processor, with the memory that is free now, inside the process's own limit where it has one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = min(cores, threads) if threads else cores
    return Hardware("main memory", free_main_memory(), CPU_BYTES_PER_S, used * CORE_FLOP_PER_S, is_cuda=False)


def free_main_memory() -> int:
    """Bytes that a process can still take: what the kernel says is available, and what its control group allows."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory_info = Path("/proc/meminfo")
    if memory_info.is_file():
        for line in memory_info.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, current = (_number_in(group / name) for name in ("memory.max", "memory.current"))
    if limit is not None and current is not None:
        free = min(free, max(0, limit - current) + _reclaimable(group / "memory.stat"))
    return free


def _number_in(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(path: Path) -> int:
    """Bytes of file cache, which the kernel drops for a process that needs them."""
    try:
        rows = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get("inactive_file", 0)) + int(rows.get("active_file", 0))


def present_machine(device: str, threads: int = 0) -> Hardware:
    """The CUDA card that `model.device` means, with the memory that is free on it, or main memory."""
    if device == "cpu":
        return main_memory(threads)
    import torch

    if not torch.cuda.is_available():
        return main_memory(threads)
    card = torch.device("cuda" if device == "auto" else device)
    free, total = torch.cuda.mem_get_info(card)
    own = torch.cuda.memory_reserved(card)
    others = max(0, total - free - own)
    name = torch.cuda.get_device_name(card)
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    known = next((one for one in CARDS.values() if one.name in key), None) or gpu(f"{max(1, total // GIB)}GiB")
    return replace(known, name=name, memory_bytes=free + own, held_by_others=others)
