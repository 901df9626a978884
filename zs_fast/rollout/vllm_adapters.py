"""Adapters in vLLM's slots: their tensors are the slots' own memory, and requests of several are computed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zs_fast.errors import PreflightError
from zs_fast.rollout.vllm_core import VllmCore


class AdapterSlots:
    """The adapter slots of one core, one per name, each filled with zeros at first: an adapter that changes nothing.

    vLLM is told of an empty adapter for each slot and to keep it there; what is written into the slot afterwards is
    what it computes with. The slot's rank is the adapter's, and its scaling is 1 (folded into B).
    """

    def __init__(self, core: VllmCore, names: Sequence[str]) -> None:
        worker = core.lora_manager
        self._manager: Any = worker._adapter_manager
        # Where vLLM would read a folder, it gets what it warms up with: an adapter of zeros.
        worker._load_adapter = lambda request: self._manager.create_dummy_lora(
            request.lora_int_id, core.settings.lora_rank, worker.embedding_modules
        )
        self._packed: Mapping[str, Sequence[str]] = getattr(core.module, "packed_modules_mapping", None) or {}
        self._numbers = {name: number for number, name in enumerate(names, start=1)}
        for name in names:
            core.open_adapter(self.request(name, 0))

    def request(self, name: str, version: int) -> Any:
        """What goes with a request to have this adapter applied. Cached keys are found under this version only."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"{name}@{version}", self._numbers[name], "in-memory")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The slot's memory, by the names of `models.lora.adapter_tensors`: A is [r, in], B [out, r]."""
        slot = self._manager.lora_index_to_id.index(self._numbers[name])
        tensors = {}
        for path, layer in self._manager.modules.items():
            parent, _, leaf = path.rpartition(".")
            parts = self._packed.get(leaf, [leaf])
            for part, a, b in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
                tensors[f"{parent}.{part}.lora_A.weight"] = a[slot, 0]
                tensors[f"{parent}.{part}.lora_B.weight"] = b[slot, 0]
        return tensors

    def write(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Fill a slot; layers that `values` leaves out, and rows beyond a smaller rank, are zero."""
        slots = self.tensors(name)
        for key, value in values.items():
            if key not in slots:
                raise PreflightError(
                    f"The adapter {name!r} has {key}, a layer without a slot; slots: {sorted(slots)[:2]}."
                )
            inner, limit = (0, 1) if key.endswith("lora_A.weight") else (1, 0)
            if value.shape[inner] > slots[key].shape[inner] or value.shape[limit] != slots[key].shape[limit]:
                raise PreflightError(
                    f"The adapter {name!r} has {key} of {list(value.shape)}; its slot holds {list(slots[key].shape)}."
                )
        with torch.no_grad():
            for key, slot in slots.items():
                slot.zero_()
                if key in values:
                    rows, columns = values[key].shape
                    slot[:rows, :columns].copy_(values[key])
