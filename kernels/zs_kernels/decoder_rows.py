"""The pieces of a decoder's forward without gradients, each row (token) by itself: for sampling on a CPU.

    norm_rows     weight * round(x / sqrt(mean(x^2) + eps))
    linear_rows   x weight^T + bias, or silu(x gate^T) * (x weight^T)
    silu_rows     silu(gate) * up
    rotate_rows   norm of each head where there is one, rotary embedding; keys and values go to their slots
    attend_rows   softmax(scale * q . keys) values over the slot's tokens 0 .. position
    layer_rows    one decoder layer of these pieces in a single call, the same bits
    draw_rows     one token of softmax(logits / temperature), and its log-probability in nats

M, T = rows; a slot holds the keys and values of one sequence. float32 or bfloat16; sums are float32 (of a row's weights
in draw_rows: float64), and 16-bit results are rounded where transformers' modules round them.

The C++ operators give a row the same bits whatever rows come with it, in whatever order, on any number of threads and
with AVX2 as with AVX-512 (but for bfloat16 products by avx512_bf16, whose last bits are their own); the references do
not promise that of their products. `has_fast_rows` says whether the operators are there and worth taking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zs_kernels._check import require
from zs_kernels._device import backend_of, native_status

ROW_DTYPES = (torch.float32, torch.bfloat16)


def has_fast_rows() -> bool:
    """Are the C++ operators built, and has the processor AVX2 and fused multiply-adds?"""
    return native_status().available and bool(torch.ops.zs_native.has_fast_rows(torch.empty(0)))


def norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[M, H] from x [M, H] and weight [H]."""
    if backend_of(x, weight) != "native":
        return norm_rows_reference(x, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.ops.zs_native.norm_rows(x, weight, eps, out)
    return out


def norm_rows_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def linear_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """[M, N] from x [M, K] and weight [N, K]; with `gate` [N, K]: silu(x gate^T) * (x weight^T).

    Written to `out` (dense rows, any stride) where one is given, and added to what is there with `add`.
    """
    require(not add or out is not None, "linear_rows", "out", "a tensor to add to", out)
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if backend_of(x, weight) == "native":
        torch.ops.zs_native.linear_rows(x, weight, bias, gate, add, out)
        return out
    result = linear_rows_reference(x, weight, bias, gate=gate)
    return out.add_(result) if add else out.copy_(result)


def linear_rows_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gate: Tensor | None = None
) -> Tensor:
    product = F.linear(x, weight, bias)
    return product if gate is None else F.silu(F.linear(x, gate)) * product


def silu_rows(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """[M, N] from two of the same shape; `out` may be either of them."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    if backend_of(gate, up) == "native":
        torch.ops.zs_native.silu_rows(gate, up, out)
        return out
    return out.copy_(F.silu(gate) * up)


def rotate_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    slots: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate q [T, heads * D] in place; write the rotated k and v [T, kv_heads * D] to their places in the slots.

    cos, sin: [positions, D / 2]; slots, positions: [T] int64; keys, values: [slots, kv_heads, capacity, D];
    q_norm, k_norm: [D].
    """
    given = (q, k, v, cos, sin, q_norm, k_norm, eps, slots, positions, keys, values)
    if backend_of(q, k, v, keys) == "native":
        torch.ops.zs_native.rotate_rows(*given)
    else:
        rotate_rows_reference(*given)


def rotate_rows_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    slots: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    size = keys.shape[3]
    cosines, sines = (table[positions].repeat(1, 2)[:, None] for table in (cos, sin))

    def rotated(x: Tensor, weight: Tensor | None) -> Tensor:
        heads = x.unflatten(1, (-1, size))
        if weight is not None:
            heads = norm_rows_reference(heads, weight, eps)
        first, second = heads.chunk(2, dim=-1)
        return heads * cosines + torch.cat((-second, first), dim=-1) * sines

    keys[slots, :, positions] = rotated(k, k_norm)
    values[slots, :, positions] = v.unflatten(1, (-1, size))
    q.copy_(rotated(q, q_norm).flatten(1))


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, *, slots: Tensor, positions: Tensor, scale: float) -> Tensor:
    """[T, heads * D]: each token attends to its slot's tokens up to its own position; shapes as in rotate_rows."""
    if backend_of(q, keys, values) != "native":
        return attend_rows_reference(q, keys, values, slots, positions, scale)
    out = torch.empty(q.shape, dtype=q.dtype)
    torch.ops.zs_native.attend_rows(q, keys, values, slots, positions, scale, out)
    return out


def attend_rows_reference(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> Tensor:
    kv_heads, size = keys.shape[1], keys.shape[3]
    rows = []
    for query, slot, position in zip(q, slots.tolist(), positions.tolist(), strict=True):
        heads = query.view(kv_heads, -1, size).float()
        weights = torch.softmax(scale * heads @ keys[slot, :, : position + 1].float().mT, -1)
        rows.append((weights @ values[slot, :, : position + 1].float()).flatten())
    return torch.stack(rows).to(q.dtype) if rows else torch.empty_like(q)


class LayerWeights(NamedTuple):
    """Weights [out, in] and biases [out] of a layer of Llama, Mistral, Qwen2 or Qwen3, as its module holds them."""

    input_norm: Tensor
    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None
    v: Tensor
    v_bias: Tensor | None
    q_norm: Tensor | None
    """[D], of each head"""
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Places(NamedTuple):
    """Where a layer's tokens are and what they are rotated by; shapes as in rotate_rows."""

    cos: Tensor
    sin: Tensor
    slots: Tensor
    positions: Tensor
    keys: Tensor
    values: Tensor


class Adapter(NamedTuple):
    """Adds x A^T B^T to a product (arXiv:2106.09685); the scaling alpha / r is in B."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[out, r]"""


class Adapters(NamedTuple):
    """Those of a layer's products."""

    q: Adapter | None = None
    k: Adapter | None = None
    v: Adapter | None = None
    o: Adapter | None = None
    gate: Adapter | None = None
    up: Adapter | None = None
    down: Adapter | None = None


NO_ADAPTERS = Adapters()


class Tenant(NamedTuple):
    """One of the models on a layer's weights: its next `tokens` rows, where they are, and its own adapters."""

    tokens: int
    places: Places
    adapters: Adapters = NO_ADAPTERS


def layer_rows(
    x: Tensor,
    weights: LayerWeights,
    tenants: Sequence[Tenant],
    *,
    eps: float,
    scale: float,
    due: Tensor | None = None,
) -> Tensor:
    """[R, H] from x [T, H]; every token's keys and values are in its slot then.

    tenants: who the T tokens belong to, in order. Their rows pass by the weights together (as in arXiv:2310.18547),
    and each is, bit for bit, as it is alone.
    due: [R] int64, the tokens whose results are wanted, those of earlier tenants first; all T by default. R of the last
    layer alone may be fewer.
    """
    if backend_of(x, weights.q, tenants[0].places.keys) != "native":
        return layer_rows_reference(x, weights, tenants, eps=eps, scale=scale, due=due)
    out = x.new_empty(x.shape if due is None else (due.shape[0], x.shape[1]))
    adapters: list[Tensor | None] = []
    if any(tenant.adapters is not NO_ADAPTERS for tenant in tenants):
        adapters = [part for tenant in tenants for one in tenant.adapters for part in one or (None, None)]
    places = [tensor for tenant in tenants for tensor in tenant.places]
    torch.ops.zs_native.layer_of_tenants(
        x, list(weights), [tenant.tokens for tenant in tenants], places, adapters, eps, scale, due, out
    )
    return out


def layer_rows_reference(
    x: Tensor,
    weights: LayerWeights,
    tenants: Sequence[Tenant],
    *,
    eps: float,
    scale: float,
    due: Tensor | None = None,
) -> Tensor:
    """What `layer_rows` means: each tenant by the single pieces, alone."""
    tokens_of_all = sum(tenant.tokens for tenant in tenants)
    require(
        tokens_of_all == len(x), "layer_rows", "tenants", f"{len(x)} tokens together, one a row of x", tokens_of_all
    )
    results = []
    first = 0
    for tokens, places, adapters in tenants:
        own = None
        if due is not None:
            own = due[(due >= first) & (due < first + tokens)] - first
        results.append(_layer_by_pieces(x[first : first + tokens], weights, places, adapters, eps, scale, own))
        first += tokens
    return torch.cat(results)


def _layer_by_pieces(
    x: Tensor,
    weights: LayerWeights,
    places: Places,
    adapters: Adapters,
    eps: float,
    scale: float,
    due: Tensor | None,
) -> Tensor:
    def product(name: str, x: Tensor, out: Tensor | None = None) -> Tensor:
        bias: Tensor | None = getattr(weights, f"{name}_bias", None)
        out = linear_rows(x, getattr(weights, name), bias, out=out, add=out is not None)
        adapter: Adapter | None = getattr(adapters, name)
        return out if adapter is None else add_adapter(x, adapter, out)

    cos, sin, slots, positions, keys, values = places
    normed = norm_rows(x, weights.input_norm, eps)
    q, k, v = (product(name, normed) for name in "qkv")
    stored = {"slots": slots, "positions": positions, "keys": keys, "values": values}
    rotate_rows(q, k, v, cos, sin, **stored, q_norm=weights.q_norm, k_norm=weights.k_norm, eps=eps)
    if due is not None:
        q, x, slots, positions = q[due], x[due], slots[due], positions[due]
    mixed = attend_rows(q, keys, values, slots=slots, positions=positions, scale=scale)
    out = product("o", mixed, x.clone())
    normed = norm_rows(out, weights.post_norm, eps)
    return product("down", silu_rows(product("gate", normed), product("up", normed)), out)


def add_adapter(x: Tensor, adapter: Adapter, out: Tensor) -> Tensor:
    """`out` [M, N], with x A^T B^T [M, N] added."""
    return linear_rows(linear_rows(x, adapter.a), adapter.b, out=out, add=True)


def draw_rows(logits: Tensor, temperatures: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [R] int64 and their log-probabilities [R] float32 from logits [R, V].

    temperatures: [R] float32, positive. draws: [R] float64 in [0, 1), the point at which the cumulative distribution is
    inverted: the first token whose cumulative weight exceeds draw * total; a negative draw takes the arg max.
    """
    if backend_of(logits, temperatures) == "native":
        found: tuple[Tensor, Tensor] = torch.ops.zs_native.draw_rows(logits, temperatures, draws)
        return found
    return draw_rows_reference(logits, temperatures, draws)


def draw_rows_reference(logits: Tensor, temperatures: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    scaled = logits.float() / temperatures[:, None]
    cumulative = torch.softmax(scaled, -1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    ids = torch.searchsorted(cumulative, draws.clamp(min=0.0)[:, None] * total, right=True)
    # A draw next to 1 may round up to the total itself: then the last token that added weight.
    ids = torch.minimum(ids, torch.searchsorted(cumulative, total)).squeeze(-1)
    ids = torch.where(draws < 0.0, scaled.argmax(-1), ids)
    return ids, torch.log_softmax(scaled, -1).gather(-1, ids[:, None]).squeeze(-1)
