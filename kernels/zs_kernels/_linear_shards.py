"""A vocabulary that lies in shards over the processes of a group: what they tell each other."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from zs_kernels._check import require


def group_name(op: str, process_group: object) -> str:
    """The name under which a registered op finds the group again; '' for None. Raises for anything but a group."""
    if process_group is None:
        return ""
    available = distributed.is_available() and isinstance(process_group, distributed.ProcessGroup)
    require(available, op, "process_group", "a torch.distributed process group", process_group)
    return str(process_group.group_name)  # type: ignore[attr-defined]


class Shards:
    """The processes that hold the shards. Each has all rows, and its own part of the vocabulary."""

    def __init__(self, name: str) -> None:
        self.group = distributed.distributed_c10d._resolve_process_group(name)
        self.count = distributed.get_world_size(self.group)

    def gather(self, values: Tensor) -> Tensor:
        """[R, ...] in the order of the ranks, from each process's tensor of the same shape."""
        result = values.new_empty(self.count * values.shape[0], *values.shape[1:])
        # Since torch 2.13 the same operation has another name.
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        gather(result, values.contiguous(), group=self.group)
        return result.reshape(self.count, *values.shape)

    def total(self, partial: Tensor) -> Tensor:
        """Sum over all processes, in float32 for 16-bit types."""
        wide = partial.to(torch.promote_types(partial.dtype, torch.float32))
        distributed.all_reduce(wide, group=self.group)
        return wide.to(partial.dtype)

    def layout(self, op: str, start: int, size: int, rows: int, device: torch.device) -> tuple[int, int]:
        """(size of the whole vocabulary, of the largest shard), once all processes know that their shards cover it and
        their rows agree. A GPU's host waits for it."""
        told = self.gather(torch.tensor([start, size, rows], device=device)).tolist()
        shards = sorted((first, first + length) for first, length, _ in told)
        ends = [0, *(end for _, end in shards)]
        require(
            [first for first, _ in shards] == ends[:-1], op, "vocabulary_start", f"a cover of [0, V): {shards}", start
        )
        require(len({count for *_, count in told}) == 1, op, "hidden", "the same rows in every process", rows)
        return ends[-1], max(length for _, length, _ in told)


def whole_vocabulary(op: str, group: str, start: int, weight: Tensor, rows: int) -> int:
    """The limit for index values: V, of all shards together where there are some.

    On a CPU the processes agree on it and check each other; elsewhere nothing is known.
    """
    if not group:
        return weight.shape[0]
    if weight.device.type != "cpu":
        return 1 << 62
    return Shards(group).layout(op, start, weight.shape[0], rows, weight.device)[0]
