"""The memory behind vLLM's key-value caches: given back between rollouts, taken again before the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from zs_fast.errors import PreflightError
from zs_fast.rollout.vllm_core import VllmCore


class CpuKv:
    """The caches' memory on a CPU: the allocation behind all layers shrinks to nothing, the layers' views stay."""

    def __init__(self, cores: Sequence[VllmCore]) -> None:
        self._storages = [storage for core in cores for storage in core.kv_storages()]
        self._sizes = [storage.nbytes() for storage in self._storages]

    def release(self) -> int:
        for storage in self._storages:
            storage.resize_(0)
        return sum(self._sizes)

    def acquire(self) -> None:
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)


class CudaKv:
    """The caches' memory on CUDA, UNMEASURED: unmapped under addresses that stay, so that captured graphs stay valid.

    vLLM's pool is one for the process: all engines' caches go and come together. `wake` is what maps them again (see
    system.memory, where waking is decided).
    """

    def __init__(self, cores: Sequence[VllmCore], wake: Callable[[Any], None]) -> None:
        from vllm.device_allocator import cumem

        if not cumem.cumem_available:
            raise PreflightError(
                "engine.release_kv needs vLLM's cumem allocator, which this build of vLLM lacks. Set it to false; a "
                "smaller engine.kv_cache_gib leaves memory to the update, too."
            )
        self._cores = cores
        self._wake = wake
        self._cumem: Any = cumem
        self._allocator: Any = cumem.CuMemAllocator.get_instance()

    def release(self) -> int:
        torch.cuda.synchronize()
        entries = [
            entry
            for entry in self._allocator.pointer_to_data.values()
            if entry.tag == "kv_cache" and not getattr(entry, "is_asleep", False)
        ]
        for entry in entries:
            self._cumem.unmap_and_release(entry.handle)
            entry.is_asleep = True
        return sum(int(entry.handle[1]) for entry in entries)

    def acquire(self) -> None:
        self._wake(self._allocator)
        for core in self._cores:
            core.note_kv_mapped()
