"""The Triton epilogue of `linear_policy_loss`: a chunk of logits becomes its own gradient in one launch.

One program per row sweeps it twice: first for the softmax's statistics, from which the token's loss derivatives follow,
then, with the row still in the cache, to write the gradient over the logits (or elsewhere, in another type).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zs_kernels._policy_terms import PolicyLossSettings, policy_terms_arguments, policy_terms_kernel
from zs_kernels._sweep_kernels import (
    block_gradient,
    chosen_logit,
    finish_statistics,
    load_block,
    row_scale,
    row_statistics,
    transformed_logits,
)
from zs_kernels._triton import tl, triton

STATISTICS_BLOCK = 8192
GRADIENT_BLOCK = 4096
WARPS = 8


@triton.jit
def policy_epilogue_kernel(
    logits, row_stride, out, out_stride, V,
    index, inverse_temperatures, inverse_temperature, bias, softcap,
    old_logprobs, advantages, weights, importance_weights, ref_logprobs, gradient_scale,
    logprobs, logsumexps, entropies,
    ratio_low, ratio_high, dual_clip, ratio_cap, min_log_ratio, max_log_ratio,
    kl_coefficient, kl_bound, kl_output_bound, entropy_coefficient,
    FORM: tl.constexpr, DUAL_CLIP: tl.constexpr, RATIO_CAP: tl.constexpr, KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, ENTROPY: tl.constexpr, IMPORTANCE: tl.constexpr,
    PER_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr, GRADIENT_BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its statistics, its token's derivatives, its gradient. `out` may be `logits`."""
    row = tl.program_id(0).to(tl.int64)
    inverse = row_scale(inverse_temperatures, row, inverse_temperature, PER_ROW)
    scale = inverse * 1.4426950408889634
    row_logits = logits + row * row_stride
    row_out = out + row * out_stride
    m, s, t, q = row_statistics(
        row_logits, row_logits, 0, V, bias, scale, softcap, False, HAS_BIAS, HAS_SOFTCAP, True, BLOCK
    )
    chosen = tl.load(index + row).to(tl.int64)
    z = chosen_logit(row_logits, chosen, V, bias, softcap, HAS_BIAS, HAS_SOFTCAP, True, float("nan"))
    logprob, logsumexp, entropy, _ = finish_statistics(m, s, t, q, z, scale)
    tl.store(logprobs + row, logprob)
    tl.store(logsumexps + row, logsumexp)
    tl.store(entropies + row, entropy)

    old_logprob = logprob
    if HAS_OLD:
        old_logprob = tl.load(old_logprobs + row).to(tl.float32)
    importance, ref_logprob = logprob, logprob
    if IMPORTANCE:
        importance = tl.load(importance_weights + row).to(tl.float32)
    if KL > 0:
        ref_logprob = tl.load(ref_logprobs + row).to(tl.float32)
    advantage = tl.load(advantages + row).to(tl.float32)
    weight = tl.load(weights + row).to(tl.float32)
    if HAS_SCALE:
        weight *= tl.load(gradient_scale)
    counted = row >= 0  # every row that comes here
    (
        _, grad_logprob, grad_entropy,
        _, _, _, _, _, _, _, _, _, _, _, _, _,
    ) = policy_terms_kernel(
        logprob, logprob - old_logprob, advantage, weight, importance, ref_logprob, entropy, counted,
        ratio_low, ratio_high, dual_clip, ratio_cap, min_log_ratio, max_log_ratio,
        kl_coefficient, kl_bound, kl_output_bound, entropy_coefficient,
        FORM, DUAL_CLIP, RATIO_CAP, KL, STRAIGHT_THROUGH, ENTROPY, IMPORTANCE,
    )  # fmt: skip

    wanted = grad_logprob != 0.0
    if ENTROPY:
        wanted = wanted | (grad_entropy != 0.0)
    wanted = wanted & (logsumexp != -float("inf"))
    here = tl.where((chosen >= 0) & (chosen < V), chosen, -1).to(tl.int32)
    for first in range(0, V, GRADIENT_BLOCK):
        if wanted:
            columns, inside, raw, offset = load_block(
                row_logits, row_logits, first, V, bias, False, HAS_BIAS, GRADIENT_BLOCK
            )
            block_z, slope = transformed_logits(raw, offset, softcap, HAS_BIAS, HAS_SOFTCAP, True)
            is_chosen = (columns == here) & inside
            grad = block_gradient(
                block_z, slope, is_chosen, inverse, logsumexp, entropy, grad_logprob, grad_entropy, ENTROPY
            )
            tl.store(row_out + columns, grad.to(out.dtype.element_ty), mask=inside)
        else:
            columns = first + tl.arange(0, GRADIENT_BLOCK)
            zeros = tl.zeros((GRADIENT_BLOCK,), tl.float32)
            tl.store(row_out + columns, zeros.to(out.dtype.element_ty), mask=columns < V)


def _policy_epilogue_triton(
    logits: Tensor,
    out: Tensor,
    index: Tensor,
    inverse: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    gradient_scale: Tensor | None,
    settings: PolicyLossSettings,
    *,
    blocks: tuple[int, int] = (STATISTICS_BLOCK, GRADIENT_BLOCK),
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, logsumexps, entropies [M]) of logits [M, V]; out [M, V] <- the loss's gradient by them.

    All tensors of rows are dense; `out` may be `logits`. gradient_scale: [] float32, multiplies the gradient.
    """
    rows, vocabulary = logits.shape
    logprobs, logsumexps, entropies = torch.empty(3, rows, dtype=torch.float32, device=logits.device).unbind()
    if rows == 0:
        return logprobs, logsumexps, entropies
    by_row = isinstance(inverse, Tensor)
    constants = policy_terms_arguments(
        settings,
        has_ref=ref_logprobs is not None,
        has_entropy=settings.entropy_coefficient != 0.0,
        has_importance=importance_weights is not None,
    )
    given = (old_logprobs, advantages, weights, importance_weights, ref_logprobs, gradient_scale)
    policy_epilogue_kernel[(rows,)](
        logits,
        logits.stride(0),
        out,
        out.stride(0),
        vocabulary,
        index,
        inverse if by_row else logits,
        1.0 if by_row else float(inverse),
        logits if bias is None else bias.contiguous(),
        float(softcap or 1.0),
        *(logits if x is None else x for x in given),
        logprobs,
        logsumexps,
        entropies,
        **constants,
        PER_ROW=by_row,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=bool(softcap),
        HAS_OLD=old_logprobs is not None,
        HAS_SCALE=gradient_scale is not None,
        BLOCK=min(blocks[0], max(128, triton.next_power_of_2(vocabulary))),
        GRADIENT_BLOCK=min(blocks[1], max(128, triton.next_power_of_2(vocabulary))),
        num_warps=WARPS,
    )
    return logprobs, logsumexps, entropies


@triton.jit
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    """values *= factor, a number on the device; nothing is touched where it is 1."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(values + place, (value * scale).to(values.dtype.element_ty), mask=inside)


def _scale_triton(values: Tensor, factor: Tensor, *, block: int = 4096) -> None:
    """values *= factor in place; values dense in memory, factor [] or [1]."""
    count = values.numel()
    if count:
        scale_kernel[(triton.cdiv(count, block),)](values, factor, count, BLOCK=block, num_warps=8)
