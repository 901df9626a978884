"""Tensors that leave the device while no phase needs them. Their storage goes; the tensors stay who they are.

A tensor whose storage is away keeps its shape, its views and everybody's references to it, but must not be read. Who
goes when is decided in system/memory.py. The CUDA copies are UNMEASURED: no GPU has run them yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from zs_fast.errors import MemoryBudgetError
from zs_fast.system.hardware import GIB, free_main_memory

SMALLEST_BYTES = 1 << 20
"""Of a storage that is worth a copy. CUDA's allocator keeps smaller ones together in pages that don't come free."""
ALIGNMENT = 256
"""Bytes at whose multiples the pieces of a buffer start."""


class Copies(Protocol):
    """How bytes travel between a device and main memory: in the background where the device can do that."""

    def is_on_device(self, tensor: Tensor) -> bool:
        """Does the tensor take memory that is to be saved?"""
        ...

    def host_buffer(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 in main memory, fit to be copied to and from. MemoryBudgetError where there is no room."""
        ...

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy each first tensor to its second, after all that the device was told so far.

        Copies happen in the order of these calls. The storage of either may be given back at once.
        """
        ...

    def order(self) -> None:
        """What the device is told from now on comes after all copies that were started; nobody waits here."""
        ...

    def wait(self) -> None:
        """Return when all copies are done, so that memory given back has come free."""
        ...


class CudaCopies:
    """Copies on a stream of their own, to and from page-locked memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def is_on_device(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cuda"

    def host_buffer(self, num_bytes: int) -> Tensor:
        # Locked afterwards: torch's own allocator of page-locked memory takes up to twice as much.
        _check_main_memory(num_bytes)
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        if status := int(runtime.cudaHostRegister(buffer.data_ptr(), num_bytes, 0)):
            raise MemoryBudgetError(
                f"{num_bytes / GIB:.2f} GiB of main memory can't be page-locked (CUDA error {status}). Allow more "
                "(ulimit -l, or the container's limit), or leave train.offload_optimizer_state and "
                "simulator.offload_weights at false."
            )
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
        return buffer

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
                for tensor in (source, target):
                    if tensor.is_cuda:
                        tensor.record_stream(self._stream)

    def order(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def wait(self) -> None:
        self._stream.synchronize()


class Movable:
    """Tensors of one purpose, which leave the device together and come back together.

    `tensors()` gives them at that moment; `kept()` gives those whose storages never move, because somebody else reads
    them. Storages below `smallest_bytes`, and those that are not on the device, stay too. `constant` tensors never
    change: they are copied out once.
    """

    def __init__(
        self,
        name: str,
        tensors: Callable[[], Iterable[Tensor]],
        copies: Copies,
        *,
        kept: Callable[[], Iterable[Tensor]] = tuple,
        constant: bool = False,
        smallest_bytes: int = SMALLEST_BYTES,
    ) -> None:
        self.name = name
        self.is_away = False
        self._tensors, self._kept, self._copies = tensors, kept, copies
        self._constant, self._smallest = constant, smallest_bytes
        self._is_ordered = True
        self._storages: list[torch.UntypedStorage] = []
        """Those that were moved last, with their sizes and their places in the buffer."""
        self._sizes: list[int] = []
        self._pieces: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """What would come free now, or is free already."""
        return sum(self._sizes if self.is_away else (storage.nbytes() for storage in self._movable()))

    def send(self) -> int:
        """Begin to move the tensors out; the bytes that come free with it."""
        if self.is_away:
            return 0
        storages = self._movable()
        if not storages:
            return 0
        self.need()
        is_new = self._make_room(storages)
        if is_new or not self._constant:
            pairs = [(_bytes_of(storage), piece) for storage, piece in zip(storages, self._pieces, strict=True)]
            self._copies.start(pairs)
        for storage in storages:
            storage.resize_(0)
        self.is_away = True
        return sum(self._sizes)

    def fetch(self) -> int:
        """Begin to move the tensors in again; the bytes they take. `need` says when they must be there."""
        if not self.is_away:
            return 0
        total = sum(self._sizes)
        try:
            for storage, size in zip(self._storages, self._sizes, strict=True):
                storage.resize_(size)
        except torch.OutOfMemoryError as error:
            raise MemoryBudgetError(
                f"{self.name} ({total / GIB:.2f} GiB) can't come back to the device: other memory there has grown "
                "meanwhile. Lower engine.kv_cache_gib or engine.slots, or set engine.release_kv = true."
            ) from error
        self._copies.start(
            [(piece, _bytes_of(storage)) for piece, storage in zip(self._pieces, self._storages, strict=True)]
        )
        self.is_away, self._is_ordered = False, False
        return total

    def need(self) -> None:
        """Have the tensors on the device for whatever it is told next: fetched, and their copies done by then."""
        self.fetch()
        if not self._is_ordered:
            self._copies.order()
            self._is_ordered = True

    def _movable(self) -> list[torch.UntypedStorage]:
        held = {tensor.untyped_storage()._cdata for tensor in self._kept()}
        found = {}
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            is_worth_it = storage.nbytes() >= self._smallest and storage.resizable()
            if is_worth_it and storage._cdata not in held and self._copies.is_on_device(tensor):
                found[storage._cdata] = storage
        return list(found.values())

    def _make_room(self, storages: list[torch.UntypedStorage]) -> bool:
        """Have pieces of a buffer for these storages; True where they are not those of the last time."""
        sizes = [storage.nbytes() for storage in storages]
        same = [storage._cdata for storage in storages] == [storage._cdata for storage in self._storages]
        if same and sizes == self._sizes:
            return False
        rooms = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        if rooms != [-(-piece.numel() // ALIGNMENT) * ALIGNMENT for piece in self._pieces]:
            self._pieces = []  # the old buffer goes before the new one comes
            buffer = self._copies.host_buffer(sum(rooms))
            starts = [0, *accumulate(rooms)]
            self._pieces = [buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        self._storages, self._sizes = storages, sizes
        return True


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """All of a storage, as [num_bytes] uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _check_main_memory(num_bytes: int) -> None:
    if num_bytes > (free := free_main_memory()):
        raise MemoryBudgetError(
            f"Moving tensors out of the device needs {num_bytes / GIB:.2f} GiB of main memory, but "
            f"{free / GIB:.2f} GiB are free. Leave train.offload_optimizer_state and simulator.offload_weights "
            "at false."
        )
