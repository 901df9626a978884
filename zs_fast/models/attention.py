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
    """Causal attention inside each packed sequence, for forward and backward. No [T, T] mask is ever built.

    `cu_seqlens` are the S + 1 cumulative lengths of the S sequences: [0, 3, 5] packs one of 3 and one of 2 tokens.
    `door` names the kernel (see models/varlen.py); by default it is the run's, as `use_attention` set it.

    `rows` [T] int64 and `computed_cu_seqlens`: where sequences share their prefixes, the forward computes fewer tokens
    than the T packed ones, of each sequence its last. `rows` says which computed one stands for each packed one.
    """

    def __init__(
        self,
        cu_seqlens: Sequence[int],
        door: str | None = None,
        *,
        rows: Tensor | None = None,
        computed_cu_seqlens: Sequence[int] = (),
    ) -> None:
        self._segments = Segments(tuple(map(int, cu_seqlens)), tuple(map(int, computed_cu_seqlens)))
        self._rows = rows
        self._wanted = _Wanted.door if door is None else door
        self._choice: Choice | None = None

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if query.shape[2] != self._segments.num_queries:
            raise ValueError(
                f"attention over {query.shape[2]} tokens, but cu_seqlens end at {self._segments.num_queries}"
            )
        if self._rows is not None:
            key, value = _of_packed(key, self._rows), _of_packed(value, self._rows)
        if self._choice is None:
            self._choice = choose(self._wanted, query.device, query.dtype, query.shape[3])
        if self._choice.door is None:
            return self._per_segment(query, key, value, scaling)
        tokens_first = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        return self._choice.door.attend(self._segments, *tokens_first, scaling)[None]

    def _per_segment(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One scaled-dot-product call per sequence: exact, and cheaper than a [T, T] mask on every device."""
        grouped = query.shape[1] != key.shape[1]
        segments = self._segments
        queries = query.split(segments.query_lengths, dim=2)
        keys, values = (tensor.split(segments.lengths, dim=2) for tensor in (key, value))
        outputs = []
        for q, k, v in zip(queries, keys, values, strict=True):
            seen: dict[str, Any] = {"is_causal": True}
            if q.shape[2] < k.shape[2]:  # is_causal would let the first query see the first key alone
                seen = {"attn_mask": self._causal_mask(query)[k.shape[2] - q.shape[2] : k.shape[2], : k.shape[2]]}
            outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=grouped, **seen))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return joined.transpose(1, 2)

    def _causal_mask(self, like: Tensor) -> Tensor:
        """[longest, longest]: row n is that of a query at place n of its sequence. Made once per micro batch."""
        longest = self._segments.longest

        def make() -> Tensor:
            return like.new_full((longest, longest), float("-inf")).triu_(1)

        mask: Tensor = self._segments.once(("causal mask", like.device, like.dtype), make)
        return mask


def _of_packed(heads: Tensor, rows: Tensor) -> Tensor:
    """[1, kv_heads, computed, head_dim] -> [1, kv_heads, T, head_dim], each packed token its row's.

    By `embedding`, whose backward pass adds what a row's copies were given in a fixed order, on CUDA too.
    """
    by_token = heads[0].transpose(0, 1)
    packed = F.embedding(rows, by_token.flatten(1))
    return packed.unflatten(1, by_token.shape[1:]).transpose(0, 1)[None]


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
