"""Aggregation of a per-token loss as one weight per token: loss = sum_n weight_n loss_n.

    token-mean               m_n / T
    token-sum                m_n
    seq-mean-token-sum       m_n / B
    seq-mean-token-mean      m_n / (B T_s)
    seq-mean-token-sum-norm  m_n / (B L)

N = tokens, S = sequences; m = mask, T_s = unmasked tokens of the token's sequence, T = unmasked tokens, B = sequences
with an unmasked token, L = a constant length. T and B can be given: with the counts of the global batch the losses of
micro batches, and of ranks, add up to the loss of the whole, so that its gradient doesn't depend on how it was cut.
Sources: token-mean arXiv:2503.14476 (DAPO), seq-mean-token-mean arXiv:2402.03300 (GRPO), seq-mean-token-sum-norm
arXiv:2503.20783 (Dr. GRPO).
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zs_kernels._check import require, require_mask, require_tensor
from zs_kernels._device import backend_of
from zs_kernels._triton import tl, triton

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")

BLOCK = 1024


def require_cu_seqlens(op: str, cu_seqlens: Tensor, device: torch.device) -> None:
    """Raise unless `cu_seqlens` is an int64/int32 tensor of shape [S + 1] on `device`; its values are not read."""
    require_tensor(op, "cu_seqlens", cu_seqlens)
    good = cu_seqlens.dtype in (torch.int64, torch.int32) and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0
    wanted = f"an int64 or int32 tensor of shape [S + 1] on {device}"
    require(good and cu_seqlens.device == device, op, "cu_seqlens", wanted, cu_seqlens)


def require_segments(op: str, cu_seqlens: Tensor, count: int) -> None:
    """Raise unless the bounds rise from 0 to `count`. Values on a device are read in checked mode only (a sync)."""
    if cu_seqlens.device.type != "cpu" and os.environ.get("ZS_KERNELS_CHECKED") != "1":
        return
    bounds = cu_seqlens.tolist()
    rising = bounds[0] == 0 and bounds[-1] == count and all(a <= b for a, b in pairwise(bounds))
    require(rising, op, "cu_seqlens", f"bounds that rise from 0 to {count}", bounds)


def loss_weights_reference(
    mask: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    num_tokens: Tensor | None,
    num_sequences: Tensor | None,
    length: float,
    scale: float,
) -> Tensor:
    """[N] float32 from mask [N] and bounds [S + 1]: the formulas; num_tokens, num_sequences: [] or None."""
    before = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])[cu_seqlens.long()]
    counts = before.diff().float()
    tokens = counts.sum() if num_tokens is None else num_tokens.float()
    sequences = (counts > 0).sum().float() if num_sequences is None else num_sequences.float()
    tokens, sequences = tokens.clamp(min=1e-30), sequences.clamp(min=1e-30)
    share = {
        "token-mean": lambda: (1.0 / tokens).expand_as(counts),
        "token-sum": lambda: torch.ones_like(counts),
        "seq-mean-token-sum": lambda: (1.0 / sequences).expand_as(counts),
        "seq-mean-token-mean": lambda: 1.0 / (sequences * counts.clamp(min=1.0)),
        "seq-mean-token-sum-norm": lambda: (1.0 / (sequences * length)).expand_as(counts),
    }[mode]()
    spread = torch.repeat_interleave(share * scale, cu_seqlens.long().diff(), output_size=mask.numel())
    return torch.where(mask, spread, 0.0)


@triton.jit
def _count_kernel(mask, cu_seqlens, counts, BLOCK: tl.constexpr):
    """One program per sequence: counts[s] = its unmasked tokens."""
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    count = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        count += tl.where(tl.load(mask + n, mask=n < end, other=0) != 0, 1.0, 0.0)
    tl.store(counts + sequence, tl.sum(count))


@triton.jit
def _loss_weights_kernel(
    mask, cu_seqlens, counts, num_tokens, num_sequences, out, total_sequences, length, scale,
    MODE: tl.constexpr, GIVEN_TOKENS: tl.constexpr, GIVEN_SEQUENCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence; MODE: index into MODES. Every program adds the counts up, in one order."""
    sequence = tl.program_id(0)
    tokens = tl.zeros((BLOCK,), dtype=tl.float32)
    sequences = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, total_sequences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        count = tl.load(counts + s, mask=s < total_sequences, other=0.0)
        tokens += count
        sequences += tl.where(count > 0.0, 1.0, 0.0)
    all_tokens, all_sequences = tl.sum(tokens), tl.sum(sequences)
    if GIVEN_TOKENS:
        all_tokens = tl.load(num_tokens).to(tl.float32)
    if GIVEN_SEQUENCES:
        all_sequences = tl.load(num_sequences).to(tl.float32)
    all_tokens, all_sequences = tl.maximum(all_tokens, 1e-30), tl.maximum(all_sequences, 1e-30)
    if MODE == 0:
        share = 1.0 / all_tokens
    elif MODE == 1:
        share = all_tokens * 0.0 + 1.0
    elif MODE == 2:
        share = 1.0 / all_sequences
    elif MODE == 3:
        share = 1.0 / (all_sequences * tl.maximum(tl.load(counts + sequence), 1.0))
    else:
        share = 1.0 / (all_sequences * length)
    share = share * scale
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        counted = tl.load(mask + n, mask=n < end, other=0) != 0
        tl.store(out + n, tl.where(counted, share, 0.0), mask=n < end)


def _loss_weights_triton(
    mask: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    num_tokens: Tensor | None,
    num_sequences: Tensor | None,
    length: float,
    scale: float,
    *,
    block: int = BLOCK,
) -> Tensor:
    sequences = cu_seqlens.numel() - 1
    mask, cu_seqlens = mask.contiguous(), cu_seqlens.contiguous()
    counts = torch.empty(sequences, dtype=torch.float32, device=mask.device)
    out = torch.empty(mask.numel(), dtype=torch.float32, device=mask.device)
    _count_kernel[(sequences,)](mask, cu_seqlens, counts, BLOCK=block)
    _loss_weights_kernel[(sequences,)](
        mask, cu_seqlens, counts, counts if num_tokens is None else num_tokens,
        counts if num_sequences is None else num_sequences, out, sequences, length, scale, MODE=MODES.index(mode),
        GIVEN_TOKENS=num_tokens is not None, GIVEN_SEQUENCES=num_sequences is not None, BLOCK=block,
    )  # fmt: skip
    return out


@torch.library.custom_op("zs_kernels::loss_weights", mutates_args=())
def _loss_weights_op(
    mask: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    num_tokens: Tensor | None,
    num_sequences: Tensor | None,
    length: float,
    scale: float,
) -> Tensor:
    require_segments("loss_weights", cu_seqlens, mask.numel())
    given = (mask, cu_seqlens, mode, num_tokens, num_sequences, length, scale)
    if mask.numel() and backend_of(mask, cu_seqlens) == "triton":
        return _loss_weights_triton(*given)
    return loss_weights_reference(*given)


@_loss_weights_op.register_fake
def _(mask: Tensor, *_: Any) -> Tensor:
    return mask.new_empty(mask.shape, dtype=torch.float32)


def _denominator(op: str, name: str, value: float | Tensor | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        good = value.dim() == 0 and value.device == device and value.dtype not in (torch.bool, torch.float64)
        require(good, op, name, f"a number above 0 or a tensor of shape [] on {device}", value)
        return value.detach()
    require(isinstance(value, int | float) and value > 0, op, name, "a number above 0", value)
    return torch.full((), float(value), device=device)


def loss_weights(
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    mode: str = "token-mean",
    *,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    max_length: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Weight of each token, float32, of the shape of `mask`; 0 where it is False. Nothing waits for a device.

    mask: bool [N] with cu_seqlens [S + 1], the sequences' bounds from 0 to N, or [S, L] with a sequence in each row;
    [N] without cu_seqlens is one sequence, which serves the token modes alone. mode: one of MODES. num_tokens,
    num_sequences: T and B of the global batch instead of those of `mask`, as numbers or tensors []. max_length: L of
    seq-mean-token-sum-norm (default for [S, L]: its columns). scale: multiplies every weight, for instance the number
    of data-parallel ranks where gradients are averaged over them. Without any token the weights are 0.
    Raises ValueError or TypeError naming the argument.
    """
    op = "loss_weights"
    require_tensor(op, "mask", mask)
    require_mask(op, "mask", mask, tuple(mask.shape), mask.device)
    require(mode in MODES, op, "mode", f"one of {', '.join(MODES)}", mode)
    flat, device = mask.reshape(-1), mask.device
    if cu_seqlens is not None:
        require(mask.dim() == 1, op, "mask", "packed, of shape [N], with cu_seqlens", mask)
        require_cu_seqlens(op, cu_seqlens, device)
    elif mask.dim() == 2:
        rows, columns = mask.shape
        cu_seqlens = torch.arange(rows + 1, device=device) * columns
        max_length = columns if max_length is None else max_length
    else:
        packed = mask.dim() == 1 and mode in ("token-mean", "token-sum")
        require(packed, op, "cu_seqlens", "given for this mode and shape", cu_seqlens)
        # Pieces that many programs can count at once; the token modes don't ask whose they are.
        pieces = -(-mask.numel() // 4096)
        cu_seqlens = (torch.arange(pieces + 1, device=device) * 4096).clamp(max=mask.numel())
    if mode == "seq-mean-token-sum-norm":
        require(max_length is not None and max_length > 0, op, "max_length", "a number above 0", max_length)
    weights = _loss_weights_op(
        flat, cu_seqlens, mode, _denominator(op, "num_tokens", num_tokens, device),
        _denominator(op, "num_sequences", num_sequences, device), float(max_length or 1.0), float(scale),
    )  # fmt: skip
    return weights.reshape(mask.shape)
