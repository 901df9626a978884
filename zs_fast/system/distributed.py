"""Ranks, and sums over them. At world size 1 everything works without torch.distributed being started."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
import torch.distributed


def is_initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    return torch.distributed.get_rank() if is_initialised() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if is_initialised() else 1


def is_main() -> bool:
    """True on the one process that writes files."""
    return rank() == 0


def barrier() -> None:
    """Return once every rank has come here."""
    if world_size() > 1:
        torch.distributed.barrier()


def all_reduce_sums(sums: Mapping[str, float]) -> dict[str, float]:
    """The sum of each named number over all ranks, the same bits on every rank; names must be the same everywhere.

    Numbers travel as float64 and are added exactly rounded, so neither the order of ranks nor the collective's own
    algorithm shows in the result. Keys keep their order.
    """
    if world_size() == 1:
        return {name: float(value) for name, value in sums.items()}
    names = sorted(sums)
    # 48 bits of the digest: a float64 holds them exactly. Compared first, as unequal lengths would hang the gather.
    digest = int.from_bytes(hashlib.sha256("\x1f".join(names).encode()).digest()[:6], "little")
    digests = _gather([float(digest)])
    assert all(row == digests[0] for row in digests), f"ranks sum different names; rank {rank()} has {names}"
    columns = zip(*_gather([float(sums[name]) for name in names]), strict=True)
    totals = dict(zip(names, map(math.fsum, columns), strict=True))
    return {name: totals[name] for name in sums}


def _gather(values: list[float]) -> list[list[float]]:
    """The numbers of every rank, in the order of ranks."""
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    torch.distributed.all_gather(everyone, mine)
    return [column.tolist() for column in everyone]
