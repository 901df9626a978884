"""The one attention function of every model that zs_fast loads: it asks an explicit state, never a mask.

Loading this module registers `zs_fast` with transformers. A forward passes `attention_state=...` through the decoder's
keyword arguments; each layer then calls `attention_state.attend(layer_index, query, key, value, scaling)`. Training
passes a `PackedAttention`; the embedded engine passes its own state over key-value slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from zs_fast.errors import EngineError
from zs_fast.models.varlen import Choice, Segments, choose

ATTENTION_NAME = "zs_fast"


class AttentionState(Protocol):
    """Knows which tokens of the packed forward may see which keys."""

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention output [1, T, heads, head_dim] of one layer for the T packed tokens.

        `query` is [1, heads, T, head_dim]; `key` and `value` are [1, kv_heads, T, head_dim], rotary embedding applied.
        """
        ...


class PackedAttention:
    """Causal attention inside each packed sequence, for forward and backward. No mask is ever built.

    `cu_seqlens` are the S + 1 cumulative lengths of the S sequences: [0, 3, 5] packs one of 3 and one of 2 tokens.
    `door` names the kernel (see models/varlen.py); by default it is the run's, as `use_attention` set it.
    """

    def __init__(self, cu_seqlens: Sequence[int], door: str | None = None) -> None:
        self._segments = Segments(tuple(int(bound) for bound in cu_seqlens))
        self._wanted = _Wanted.door if door is None else door
        self._choice: Choice | None = None

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if query.shape[2] != self._segments.num_tokens:
            raise ValueError(
                f"attention over {query.shape[2]} tokens, but cu_seqlens end at {self._segments.num_tokens}"
            )
        if self._choice is None:
            self._choice = choose(self._wanted, query.device, query.dtype, query.shape[3])
        if self._choice.door is None:
            return self._per_segment(query, key, value, scaling)
        tokens_first = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        return self._choice.door.attend(self._segments, *tokens_first, scaling)[None]

    def _per_segment(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One scaled-dot-product call per sequence: exact, and cheaper than a [T, T] mask on every device."""
        grouped = query.shape[1] != key.shape[1]
        lengths = self._segments.lengths
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
            for q, k, v in zip(
                query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
            )
        ]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return joined.transpose(1, 2)


class _Wanted:
    """The process's setting, like its number of threads."""

    door = "auto"


def use_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """From now on packed forwards take this door (`model.attention`); a sentence that names what that is and why.

    Raises PreflightError where a named door can't be taken on this device by weights of this type.
    """
    choice = choose(wanted, device, dtype)
    _Wanted.door = wanted
    return f"{choice.name} ({choice.reason})"


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention_state: AttentionState | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if attention_state is None:
        raise EngineError(
            "A model loaded by zs_fast was called without attention_state=... Pass "
            "PackedAttention(cu_seqlens) for packed sequences, or load the folder with transformers to call generate()."
        )
    if attention_mask is not None:
        raise EngineError("A model loaded by zs_fast takes no attention_mask; attention_state says who sees whom.")
    if dropout:
        raise EngineError(
            f"attention_dropout is {dropout}, but a dropped-out policy's log-probabilities are not those it sampled "
            "with. Set attention_dropout to 0 in the model's config.json."
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    return attention_state.attend(int(module.layer_idx), query, key, value, scaling), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
