"""The one attention function of every model that zs_fast loads: it asks an explicit state, never a mask.

Loading this module registers `zs_fast` with transformers. A forward passes `attention_state=...` through the decoder's
keyword arguments; each layer then calls `attention_state.attend(layer_index, query, key, value, scaling)`. Training
passes a `PackedAttention`; the embedded engine passes its own state over key-value slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
        """One scaled-dot-product call per sequence: exact, and cheaper than a [T, T] mask on every device. Where only
        its last tokens ask, one for each block of them, over the keys up to the block's end."""
        grouped = query.shape[1] != key.shape[1]
        segments = self._segments
        queries = query.split(segments.query_lengths, dim=2)
        keys, values = (tensor.split(segments.lengths, dim=2) for tensor in (key, value))
        longest = segments.longest
        outputs = []
        for q, k, v in zip(queries, keys, values, strict=True):
            options: dict[str, Any] = {"scale": scaling, "enable_gqa": grouped}
            if q.shape[2] == k.shape[2]:
                outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **options))
                continue
            mask = segments.once(("mask", query.device, query.dtype), partial(_block_mask, query, longest))
            before = k.shape[2] - q.shape[2]
            for block in q.split(QUERY_BLOCK, dim=2):
                end = before + block.shape[2]
                seen = mask[: block.shape[2], longest - before : longest - before + end]
                outputs.append(
                    F.scaled_dot_product_attention(block, k[:, :, :end], v[:, :, :end], attn_mask=seen, **options)
                )
                before = end
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return joined.transpose(1, 2)


QUERY_BLOCK = 256


def _block_mask(like: Tensor, longest: int) -> Tensor:
    """[QUERY_BLOCK, longest + QUERY_BLOCK], 0 or -inf. Row i sees the columns up to longest + i: from column
    longest - n on, it is the mask of a block whose first query has n keys before it."""
    block = min(QUERY_BLOCK, longest)
    return like.new_full((block, longest + block), float("-inf")).triu_(longest + 1)


def _of_packed(heads: Tensor, rows: Tensor) -> Tensor:
    """[1, kv_heads, computed, head_dim] -> [1, kv_heads, T, head_dim], each packed token its row's."""
    by_token = heads[0].transpose(0, 1)
    packed = gather_rows(by_token.flatten(1), rows)
    return packed.unflatten(1, by_token.shape[1:]).transpose(0, 1)[None]


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows], [M, N], of a table [K, N] and rows [M] int64 that may repeat.

    A row's gradient is the sum of what its copies were given, in a fixed order and at least in float32. On CUDA that is
    what embedding's backward pass does; index_select's has no fixed order there, and on a CPU both add in 16 bits.
    """
    if table.is_cuda:
        return F.embedding(rows, table)
    gathered: Tensor = _GatherRows.apply(table, rows)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = table.shape[0]
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return wide.new_zeros(ctx.num_rows, gradient.shape[1]).index_add_(0, rows, wide).to(gradient.dtype), None


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
