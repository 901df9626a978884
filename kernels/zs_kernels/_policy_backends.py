"""Where the policy loss runs: the torch reference, the C++ loop, or two Triton launches (three for gspo)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zs_kernels._device import backend_of
from zs_kernels._policy_terms import (
    FORMS,
    N_METRICS,
    PolicyLossSettings,
    policy_terms_arguments,
    policy_terms_kernel,
    policy_terms_reference,
)
from zs_kernels._triton import tl, triton
from zs_kernels.kl_estimates import clamp_bounds, kl_code
from zs_kernels.loss_weights import require_segments

BLOCK = 1024
"""Tokens of one Triton program."""
MAX_PROGRAMS = 1024
COLUMNS = 16
"""Width of a row of partial sums: the loss, the metrics, padding to a power of two."""


def sequence_log_ratios_reference(
    log_ratio: Tensor, mask: Tensor | None, cu_seqlens: Tensor, total: bool = False
) -> Tensor:
    """Each token's log ratio replaced by the mean (or the sum) over the unmasked tokens of its sequence, 0 if none."""
    dtype = torch.float64 if log_ratio.dtype == torch.float64 else torch.float32
    flat = log_ratio.to(dtype).flatten()
    counted = torch.ones_like(flat) if mask is None else mask.flatten().to(dtype)
    flat = torch.where(counted > 0, flat, 0.0)
    lengths = cu_seqlens.diff()
    owner = torch.repeat_interleave(torch.arange(lengths.numel(), device=flat.device), lengths, output_size=len(flat))
    sums = flat.new_zeros(2, lengths.numel()).index_add_(1, owner, torch.stack([flat, counted]))
    return (sums[0] if total else sums[0] / sums[1].clamp(min=1.0))[owner].reshape(log_ratio.shape)


@triton.jit
def _sequence_log_ratios_kernel(
    logprobs, old_logprobs, mask, cu_seqlens, out,
    HAS_OLD: tl.constexpr, HAS_MASK: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence: out[n] = mean of logprob - old_logprob over its unmasked tokens (TOTAL: their sum)."""
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    count = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        counted = n < end
        if HAS_MASK:
            counted = counted & (tl.load(mask + n, mask=counted, other=0) != 0)
        log_ratio = tl.load(logprobs + n, mask=counted, other=0.0).to(tl.float32)
        if HAS_OLD:
            log_ratio -= tl.load(old_logprobs + n, mask=counted, other=0.0).to(tl.float32)
        total += tl.where(counted, log_ratio, 0.0)
        count += tl.where(counted, 1.0, 0.0)
    result = tl.sum(total)
    if not TOTAL:
        result = result / tl.maximum(tl.sum(count), 1.0)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        tl.store(out + n, tl.zeros((BLOCK,), dtype=tl.float32) + result, mask=n < end)


@triton.jit
def _policy_terms_forward_kernel(
    logprobs, old_logprobs, advantages, weights, importance_weights, ref_logprobs, entropies, mask,
    losses, grad_logprobs, grad_entropy, partials,
    count, span, advantage_stride, weight_stride,
    ratio_low, ratio_high, dual_clip, ratio_cap, min_log_ratio, max_log_ratio,
    kl_coefficient, kl_bound, kl_output_bound, entropy_coefficient,
    FORM: tl.constexpr, DUAL_CLIP: tl.constexpr, RATIO_CAP: tl.constexpr, KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, ENTROPY: tl.constexpr, IMPORTANCE: tl.constexpr,
    HAS_MASK: tl.constexpr, GIVEN_RATIOS: tl.constexpr, WRITE_LOSS: tl.constexpr, WRITE_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tokens [p * span, (p + 1) * span): derivatives, and a row of `partials`. GIVEN_RATIOS: for old_logprobs."""
    program = tl.program_id(0).to(tl.int64)
    loss_sum, ones, ratios, log_ratios, lows, highs, duals = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    caps, clamps, kls, kl_clamps, entropies_sum, policies, largest = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, span, BLOCK):
        n = program * span + start + tl.arange(0, BLOCK)
        inside = n < count
        counted = inside
        if HAS_MASK:
            counted = inside & (tl.load(mask + n, mask=inside, other=0) != 0)
        logprob = tl.load(logprobs + n, mask=counted, other=0.0).to(tl.float32)
        log_ratio = tl.load(old_logprobs + n, mask=counted, other=0.0).to(tl.float32)
        if not GIVEN_RATIOS:
            log_ratio = logprob - log_ratio
        advantage = tl.load(advantages + n * advantage_stride, mask=counted, other=0.0).to(tl.float32)
        weight = tl.load(weights + n * weight_stride, mask=counted, other=0.0).to(tl.float32)
        importance, ref_logprob, entropy = logprob, logprob, logprob
        if IMPORTANCE:
            importance = tl.load(importance_weights + n, mask=counted, other=0.0).to(tl.float32)
        if KL > 0:
            ref_logprob = tl.load(ref_logprobs + n, mask=counted, other=0.0).to(tl.float32)
        if ENTROPY:
            entropy = tl.load(entropies + n, mask=counted, other=0.0).to(tl.float32)
        (
            loss, by_logprob, by_entropy,
            one, ratio, log_ratio, low, high, dual, capped, clamped, kl, kl_clamped, entropy, policy, ratio_max,
        ) = policy_terms_kernel(
            logprob, log_ratio, advantage, weight, importance, ref_logprob, entropy, counted,
            ratio_low, ratio_high, dual_clip, ratio_cap, min_log_ratio, max_log_ratio,
            kl_coefficient, kl_bound, kl_output_bound, entropy_coefficient,
            FORM, DUAL_CLIP, RATIO_CAP, KL, STRAIGHT_THROUGH, ENTROPY, IMPORTANCE,
        )  # fmt: skip
        tl.store(grad_logprobs + n, by_logprob, mask=inside)
        if WRITE_LOSS:
            tl.store(losses + n, loss, mask=inside)
        if WRITE_GRAD_ENTROPY:
            tl.store(grad_entropy + n, by_entropy, mask=inside)
        loss_sum += tl.sum(loss)
        ones += tl.sum(one)
        ratios += tl.sum(ratio)
        log_ratios += tl.sum(log_ratio)
        lows += tl.sum(low)
        highs += tl.sum(high)
        duals += tl.sum(dual)
        caps += tl.sum(capped)
        clamps += tl.sum(clamped)
        kls += tl.sum(kl)
        kl_clamps += tl.sum(kl_clamped)
        entropies_sum += tl.sum(entropy)
        policies += tl.sum(policy)
        largest = tl.maximum(largest, tl.max(ratio_max))
    row = partials + program * COLUMNS
    tl.store(row, loss_sum)
    tl.store(row + 1, ones)
    tl.store(row + 2, ratios)
    tl.store(row + 3, log_ratios)
    tl.store(row + 4, lows)
    tl.store(row + 5, highs)
    tl.store(row + 6, duals)
    tl.store(row + 7, caps)
    tl.store(row + 8, clamps)
    tl.store(row + 9, kls)
    tl.store(row + 10, kl_clamps)
    tl.store(row + 11, entropies_sum)
    tl.store(row + 12, policies)
    tl.store(row + 13, largest)


@triton.jit
def fold_partials_kernel(
    partials, totals, rows, MAX_COLUMN: tl.constexpr, USED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One program, in a fixed order: totals[c] = sum over rows of partials[:, c], their maximum for MAX_COLUMN."""
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
    largest = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & (column < USED)[None, :]
        value = tl.load(partials + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], mask=here, other=0.0)
        total += value.to(tl.float64)
        largest = tl.maximum(largest, value)
    folded = tl.where(column == MAX_COLUMN, tl.max(largest, axis=0), tl.sum(total, axis=0).to(tl.float32))
    tl.store(totals + column, folded, mask=column < USED)


def fold_partials(partials: Tensor, totals: Tensor, *, max_column: int = COLUMNS) -> None:
    """totals[c] <- the sum of partials[:, c] (the maximum for max_column), for as many columns as totals has."""
    rows, columns = partials.shape
    fold_partials_kernel[(1,)](
        partials, totals, rows, MAX_COLUMN=max_column, USED=totals.numel(), ROWS=128, COLUMNS=columns, num_warps=8
    )


def token_spans(count: int, block: int) -> tuple[int, int]:
    """(programs, tokens of each): at most MAX_PROGRAMS, so that one program can fold what they leave; whole blocks."""
    span = triton.cdiv(triton.cdiv(count, block), MAX_PROGRAMS) * block
    return triton.cdiv(count, span), span


def flat_or_scalar(values: Tensor) -> tuple[Tensor, int]:
    """(storage to read from, step between tokens): 0 for one number expanded to all tokens, else 1 and contiguous."""
    if values.numel() > 1 and not any(values.stride()):
        return values, 0
    return values.reshape(-1).contiguous(), 1


def _policy_terms_triton(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    mask: Tensor | None,
    settings: PolicyLossSettings,
    *,
    given_ratios: bool = False,
    write_loss: bool = True,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses [N] or [0], grad_logprobs [N], grad_entropy [N] or [0], totals [1 + N_METRICS]: loss, then METRICS)."""
    count, device = logprobs.numel(), logprobs.device
    programs, span = token_spans(count, block)
    logprobs, old_logprobs = logprobs.reshape(-1).contiguous(), old_logprobs.reshape(-1).contiguous()
    advantages, advantage_stride = flat_or_scalar(advantages)
    weights, weight_stride = flat_or_scalar(weights)
    given = [None if x is None else x.reshape(-1).contiguous() for x in (importance_weights, ref_logprobs, entropy)]
    mask = None if mask is None else mask.reshape(-1).contiguous()
    gives_entropy = entropy is not None and settings.entropy_coefficient != 0.0

    def new(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=device)

    losses, grad_logprobs = new(count if write_loss else 0), new(count)
    grad_entropy, totals = new(count if gives_entropy else 0), new(1 + N_METRICS)
    partials = torch.empty(programs, COLUMNS, dtype=torch.float32, device=device)
    constants = policy_terms_arguments(
        settings,
        has_ref=ref_logprobs is not None,
        has_entropy=entropy is not None,
        has_importance=importance_weights is not None,
    )
    _policy_terms_forward_kernel[(programs,)](
        logprobs, old_logprobs, advantages, weights, *(logprobs if x is None else x for x in given),
        logprobs if mask is None else mask, losses, grad_logprobs, grad_entropy, partials,
        count, span, advantage_stride, weight_stride, **constants,
        HAS_MASK=mask is not None, GIVEN_RATIOS=given_ratios, WRITE_LOSS=write_loss,
        WRITE_GRAD_ENTROPY=gives_entropy, BLOCK=block, COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip
    fold_partials(partials, totals, max_column=N_METRICS)
    return losses, grad_logprobs, grad_entropy, totals


def _sequence_log_ratios_triton(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    *,
    total: bool = False,
    block: int = BLOCK,
) -> Tensor:
    """[N] float32; old_logprobs None: the first argument holds the log ratios."""
    logprobs = logprobs.reshape(-1).contiguous()
    out = torch.empty(logprobs.numel(), dtype=torch.float32, device=logprobs.device)
    _sequence_log_ratios_kernel[(cu_seqlens.numel() - 1,)](
        logprobs,
        logprobs if old_logprobs is None else old_logprobs.reshape(-1).contiguous(),
        logprobs if mask is None else mask.reshape(-1).contiguous(),
        cu_seqlens.contiguous(),
        out,
        HAS_OLD=old_logprobs is not None,
        HAS_MASK=mask is not None,
        TOTAL=total,
        BLOCK=block,
    )
    return out


@torch.library.custom_op("zs_kernels::sequence_log_ratios", mutates_args=())
def sequence_log_ratios(log_ratio: Tensor, mask: Tensor, cu_seqlens: Tensor, total: bool) -> Tensor:
    """sequence_log_ratios_reference, in a fixed order on every device."""
    require_segments("sequence_log_ratios", cu_seqlens, log_ratio.numel())
    if log_ratio.numel() and backend_of(log_ratio, mask, cu_seqlens) == "triton":
        return _sequence_log_ratios_triton(log_ratio, None, mask, cu_seqlens, total=total).reshape(log_ratio.shape)
    return sequence_log_ratios_reference(log_ratio, mask, cu_seqlens, total)


@sequence_log_ratios.register_fake
def _(log_ratio: Tensor, mask: Tensor, cu_seqlens: Tensor, total: bool) -> Tensor:
    dtype = torch.float64 if log_ratio.dtype == torch.float64 else torch.float32
    return log_ratio.new_empty(log_ratio.shape, dtype=dtype)


def _policy_terms_native(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    settings: PolicyLossSettings,
    write_loss: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def dense(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().reshape(-1).float().contiguous()

    s = settings
    advantages, advantage_step = flat_or_scalar(advantages.detach().float())
    weights, weight_step = flat_or_scalar(weights.detach().float())
    bound, output_bound = clamp_bounds("policy_loss", s.kl_clamp, s.kl_estimator)
    return torch.ops.zs_native.policy_terms(
        dense(logprobs), dense(old_logprobs), advantages, weights,
        dense(entropy), dense(ref_logprobs), dense(importance_weights),
        None if mask is None else mask.reshape(-1).contiguous(),
        None if cu_seqlens is None else cu_seqlens.long().contiguous(),
        advantage_step, weight_step, FORMS.index(s.form), 1.0 - s.clip_low, 1.0 + s.clip_high,
        *(math.inf if x is None else float(x) for x in (s.dual_clip, s.ratio_cap)), s.min_log_ratio, s.max_log_ratio,
        s.kl_coefficient, kl_code(s.kl_estimator), s.kl_estimator.endswith("+"),
        *(math.inf if x is None else x for x in (bound, output_bound)), s.entropy_coefficient, write_loss,
    )  # fmt: skip


def run_policy_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    settings: PolicyLossSettings,
    *,
    write_loss: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(losses [N] or [0], grad_logprobs [N], grad_entropy [N] or [0], loss [], metrics [N_METRICS])."""
    columns = (entropy, ref_logprobs, importance_weights, mask)
    backend = backend_of(logprobs, old_logprobs, advantages, weights, *columns)
    ratios = settings.form == "gspo"
    if backend == "native":
        losses, grad, grad_entropy, totals = _policy_terms_native(
            logprobs, old_logprobs, advantages, weights, *columns, cu_seqlens if ratios else None, settings, write_loss
        )
        return losses, grad, grad_entropy, totals[0].clone(), totals[1:].clone()
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    if logprobs.numel() == 0 or backend == "reference":
        log_ratio = logprobs.detach().to(dtype) - old_logprobs.detach().to(dtype)
        if ratios:
            log_ratio = sequence_log_ratios_reference(log_ratio, mask, cu_seqlens)
        terms = policy_terms_reference(logprobs, log_ratio, advantages, weights, *columns, settings)
        return terms.loss, terms.grad_logprobs, terms.grad_entropy, terms.loss.sum(), terms.metrics
    if ratios:
        old_logprobs = _sequence_log_ratios_triton(logprobs, old_logprobs, mask, cu_seqlens)
    losses, grad, grad_entropy, totals = _policy_terms_triton(
        logprobs, old_logprobs, advantages, weights, *columns, settings, given_ratios=ratios, write_loss=write_loss
    )
    return losses, grad, grad_entropy, totals[0].clone(), totals[1:].clone()
