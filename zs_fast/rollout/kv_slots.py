"""Keys and values of many sequences in preallocated slots, and the attention that reads them.

A slot holds one sequence; `Context` remembers what a slot holds, and in which pieces its tokens went through
attention. Replaying the same pieces gives the same bits, so a sequence that lost its slot computes on as if it hadn't.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

CAPACITY_STEP = 64
"""Slots hold a multiple of this many tokens; with it every slot starts at a 64-byte boundary."""


@dataclass(slots=True, eq=False)
class Context:
    """A token sequence whose keys and values are, or were, in a slot."""

    token_ids: list[int] = field(default_factory=list)
    """Tokens that went through the model; never the last sampled one, which is fed with the next step."""
    bounds: list[int] = field(default_factory=lambda: [0])
    """Cumulative ends of the pieces that went through attention together: [0, 57, 58, 59] is a prompt and 2 tokens."""
    slot: int | None = None
    last_used: int = 0
    busy: bool = False
    ended: bool = False

    def keep_prefix(self, prompt_ids: Sequence[int]) -> int:
        """Cut back to what `prompt_ids` shares with this context, at a piece's end; the number of tokens kept.

        At least one token of the prompt is left to compute, since its last hidden state gives the first logits.
        """
        limit = min(len(self.token_ids), len(prompt_ids) - 1)
        if self.token_ids[:limit] == list(prompt_ids[:limit]):
            shared = limit
        else:
            shared = next(i for i in range(limit) if self.token_ids[i] != prompt_ids[i])
        self.cut(shared)
        return len(self.token_ids)

    def cut(self, num_tokens: int) -> None:
        """Forget every piece that ends after `num_tokens`."""
        while self.bounds[-1] > num_tokens:
            self.bounds.pop()
        del self.token_ids[self.bounds[-1] :]

    def pieces(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds[:-1], self.bounds[1:], strict=True))


class KvSlots:
    """Key and value storage of one model: [layers, slots + 1, kv_heads, capacity, head_dim], one scratch slot last.

    Capacity starts small and doubles when a sequence needs more, up to `max_tokens`; it never shrinks. While it grows,
    the old and the new keys (then values) exist side by side.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_layers = num_layers
        self.num_slots = num_slots
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_capacity = _round_up(max_tokens)
        self.capacity = min(self.max_capacity, 4 * CAPACITY_STEP)
        self._dtype = dtype
        self._device = device
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)

    def allocate(self) -> None:
        if self.keys is None:
            self.keys, self.values = self._new(self.capacity), self._new(self.capacity)

    def release(self) -> int:
        """Drop the storage; the number of bytes that came free."""
        freed = self.num_bytes
        self.keys = self.values = None
        return freed

    def reserve(self, num_tokens: int) -> None:
        """Make every slot hold `num_tokens`, keeping what is in them."""
        self.allocate()
        if num_tokens <= self.capacity:
            return
        old_capacity = self.capacity
        while self.capacity < num_tokens:
            self.capacity = min(2 * self.capacity, self.max_capacity)
        self.keys = self._grown(self.keys, old_capacity)
        self.values = self._grown(self.values, old_capacity)

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """The keys and values of a slot's first tokens, into another slot as well."""
        assert self.keys is not None and self.values is not None
        for stored in (self.keys, self.values):
            stored[:, target, :, :num_tokens] = stored[:, source, :, :num_tokens]

    def layers_of(self, slot: int, num_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views of one slot's first tokens, for each layer keys and values [1, kv_heads, num_tokens, head_dim]."""
        assert self.keys is not None and self.values is not None
        keys = self.keys.narrow(1, slot, 1).narrow(3, 0, num_tokens)
        values = self.values.narrow(1, slot, 1).narrow(3, 0, num_tokens)
        return keys.unbind(0), values.unbind(0)

    def _grown(self, old: Tensor, old_capacity: int) -> Tensor:
        new = self._new(self.capacity)
        new[:, :, :, :old_capacity] = old
        return new

    def _new(self, capacity: int) -> Tensor:
        shape = (self.num_layers, self.num_slots + 1, self.num_kv_heads, capacity, self.head_dim)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens start .. end of one slot that go through attention together."""

    slot: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


class SlotAttention:
    """Attention state of one engine step: T packed tokens are the one-token pieces, then the longer ones, then padding.

    Each piece is computed by itself from views of its own slot, so its shape depends on nothing but its own history.
    With `batched`, one-token pieces share one masked call instead: fewer launches, no such guarantee.
    """

    def __init__(self, slots: KvSlots, pieces: Sequence[Piece], num_tokens: int, *, batched: bool) -> None:
        self.slots = slots
        self.single = [piece for piece in pieces if piece.num_tokens == 1]
        self.longer = [piece for piece in pieces if piece.num_tokens > 1]
        self.pieces = [*self.single, *self.longer]
        self.num_padding = num_tokens - sum(piece.num_tokens for piece in pieces)
        self._batched = batched and len(self.single) > 1
        assert slots.keys is not None and slots.values is not None
        device = slots.keys.device
        # Per layer, every slot's every token as one row: where the new keys and values go.
        self._key_rows = slots.keys.view(slots.num_layers, -1, slots.head_dim).unbind(0)
        self._value_rows = slots.values.view(slots.num_layers, -1, slots.head_dim).unbind(0)
        row = [p.slot for p in self.pieces for _ in range(p.num_tokens)] + [slots.num_slots] * self.num_padding
        positions = [i for p in self.pieces for i in range(p.start, p.end)] + [0] * self.num_padding
        self.position_ids = torch.tensor(positions, device=device)
        heads = torch.tensor(row)[:, None] * slots.num_kv_heads + torch.arange(slots.num_kv_heads)
        self._write_to = (heads * slots.capacity + torch.tensor(positions)[:, None]).flatten().to(device)
        viewed = self.longer if self._batched else self.pieces
        self._views = {piece: slots.layers_of(piece.slot, piece.end) for piece in viewed}
        self._masks = [self._causal_mask(piece, device) for piece in self.longer]
        if self._batched:
            self._prepare_batched(device)

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the new keys and values, then attend; [1, T, heads, head_dim]."""
        slots = self.slots
        num_tokens, num_heads = query.shape[2], query.shape[1]
        for rows, new in ((self._key_rows[layer_index], key), (self._value_rows[layer_index], value)):
            rows.index_copy_(0, self._write_to, new[0].transpose(0, 1).reshape(-1, slots.head_dim))
        group = num_heads // slots.num_kv_heads
        queries = query[0].transpose(0, 1).reshape(num_tokens, slots.num_kv_heads, group, slots.head_dim)
        outputs: list[Tensor] = []
        if self._batched:
            outputs.append(self._attend_batched(layer_index, queries[: len(self.single)], scaling))
        elif self.single:
            outputs.extend(self._attend_singles(layer_index, queries, scaling))
        first = len(self.single)
        for piece, mask in zip(self.longer, self._masks, strict=True):
            part = queries[first : first + piece.num_tokens]
            outputs.append(self._attend_piece(layer_index, part, piece, mask, scaling))
            first += piece.num_tokens
        if self.num_padding:
            outputs.append(queries.new_zeros(self.num_padding, *queries.shape[1:]))
        return torch.cat(outputs).view(1, num_tokens, num_heads, slots.head_dim)

    def _attend_singles(self, layer_index: int, queries: Tensor, scaling: float) -> list[Tensor]:
        """One call per token; the heads of a group stand as its query rows, so keys are never repeated in memory."""
        parts = queries[: len(self.single)].unsqueeze(1).unbind(0)
        outputs = []
        for part, piece in zip(parts, self.single, strict=True):
            keys, values = self._views[piece]
            outputs.append(F.scaled_dot_product_attention(part, keys[layer_index], values[layer_index], scale=scaling))
        return outputs

    def _attend_piece(
        self, layer_index: int, queries: Tensor, piece: Piece, mask: Tensor | None, scaling: float
    ) -> Tensor:
        keys, values = self._views[piece]
        outputs = [
            F.scaled_dot_product_attention(
                queries[:, :, member].transpose(0, 1).unsqueeze(0),
                keys[layer_index],
                values[layer_index],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
            )
            for member in range(queries.shape[2])
        ]
        return torch.stack(outputs, dim=3)[0].transpose(0, 1)

    def _causal_mask(self, piece: Piece, device: torch.device) -> Tensor | None:
        """[n, end] bool for a piece that follows earlier tokens of its own sequence; None for one that starts it."""
        if piece.start == 0:
            return None
        ones = torch.ones(piece.num_tokens, piece.end, dtype=torch.bool, device=device)
        return ones.tril(diagonal=piece.start)

    def _prepare_batched(self, device: torch.device) -> None:
        ends = torch.tensor([piece.end for piece in self.single], device=device)
        self._longest = max(piece.end for piece in self.single)
        self._rows = torch.tensor([piece.slot for piece in self.single], device=device)
        visible = torch.arange(self._longest, device=device)[None, :] < ends[:, None]
        self._visible = visible[:, None, None, :]

    def _attend_batched(self, layer_index: int, queries: Tensor, scaling: float) -> Tensor:
        assert self.slots.keys is not None and self.slots.values is not None
        keys = self.slots.keys[layer_index, :, :, : self._longest].index_select(0, self._rows)
        values = self.slots.values[layer_index, :, :, : self._longest].index_select(0, self._rows)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._visible, scale=scaling)


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // CAPACITY_STEP) * CAPACITY_STEP
