"""Policy-gradient losses over tokens, with their derivatives and metrics in one pass.

    loss = sum_n weight_n (importance_n policy_n + kl_coefficient kl_n - entropy_coefficient entropy_n)

N = tokens; _policy_terms.py has policy_n for each form (ppo, gspo, cispo, cispo_cap, reinforce) and its sources. The
weights carry the aggregation (see loss_weights.py): mask / number of loss tokens of the mini batch is the token mean,
so that a sum over micro batches is exact whatever their size. The forward pass computes the derivative of each token
as well, so that the backward pass is one multiplication.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_mask
from zs_kernels._device import backend_of
from zs_kernels._policy_terms import (
    METRICS,
    N_METRICS,
    PolicyLossSettings,
    TokenTerms,
    check_settings,
    policy_terms_arguments,
    policy_terms_kernel,
    policy_terms_reference,
)
from zs_kernels._triton import tl, triton
from zs_kernels.loss_weights import require_cu_seqlens, require_segments

__all__ = ["METRICS", "N_METRICS", "PolicyLoss", "PolicyLossSettings", "TokenTerms", "policy_loss", "token_terms"]

BLOCK = 1024
"""Tokens of one Triton program."""
COLUMNS = 16
"""Width of a row of partial sums: the loss, the metrics, padding to a power of two."""


def sequence_log_ratios_reference(log_ratio: Tensor, mask: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """Each token's log ratio replaced by the mean over the unmasked tokens of its sequence; 0 where there are none."""
    dtype = torch.float64 if log_ratio.dtype == torch.float64 else torch.float32
    flat = log_ratio.to(dtype).flatten()
    counted = torch.ones_like(flat) if mask is None else mask.flatten().to(dtype)
    flat = torch.where(counted > 0, flat, 0.0)
    lengths = cu_seqlens.diff()
    owner = torch.repeat_interleave(torch.arange(lengths.numel(), device=flat.device), lengths, output_size=len(flat))
    sums = flat.new_zeros(2, lengths.numel()).index_add_(1, owner, torch.stack([flat, counted]))
    return (sums[0] / sums[1].clamp(min=1.0))[owner].reshape(log_ratio.shape)


@triton.jit
def _sequence_log_ratios_kernel(
    logprobs, old_logprobs, mask, cu_seqlens, out, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per sequence: out[n] = mean of logprob - old_logprob over its unmasked tokens."""
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
        logprob = tl.load(logprobs + n, mask=counted, other=0.0).to(tl.float32)
        total += tl.where(counted, logprob - tl.load(old_logprobs + n, mask=counted, other=0.0).to(tl.float32), 0.0)
        count += tl.where(counted, 1.0, 0.0)
    mean = tl.sum(total) / tl.maximum(tl.sum(count), 1.0)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        tl.store(out + n, tl.zeros((BLOCK,), dtype=tl.float32) + mean, mask=n < end)


@triton.jit
def _policy_terms_forward_kernel(
    logprobs, old_logprobs, advantages, weights, importance_weights, ref_logprobs, entropies, mask,
    losses, grad_logprobs, grad_entropy, partials,
    count, advantage_stride, weight_stride,
    ratio_low, ratio_high, dual_clip, ratio_cap, min_log_ratio, max_log_ratio,
    kl_coefficient, kl_bound, kl_output_bound, entropy_coefficient,
    FORM: tl.constexpr, DUAL_CLIP: tl.constexpr, RATIO_CAP: tl.constexpr, KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, ENTROPY: tl.constexpr, IMPORTANCE: tl.constexpr,
    HAS_MASK: tl.constexpr, GIVEN_RATIOS: tl.constexpr, WRITE_LOSS: tl.constexpr, WRITE_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens: their derivatives, and one row of `partials`. GIVEN_RATIOS: old_logprobs holds log ratios."""
    program = tl.program_id(0).to(tl.int64)
    n = program * BLOCK + tl.arange(0, BLOCK)
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
        one, ratio_sum, log_ratio_sum, low, high, dual, capped, clamped, kl, kl_clamped, entropy_sum, policy, ratio_max,
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
    row = partials + program * COLUMNS
    tl.store(row, tl.sum(loss))
    tl.store(row + 1, tl.sum(one))
    tl.store(row + 2, tl.sum(ratio_sum))
    tl.store(row + 3, tl.sum(log_ratio_sum))
    tl.store(row + 4, tl.sum(low))
    tl.store(row + 5, tl.sum(high))
    tl.store(row + 6, tl.sum(dual))
    tl.store(row + 7, tl.sum(capped))
    tl.store(row + 8, tl.sum(clamped))
    tl.store(row + 9, tl.sum(kl))
    tl.store(row + 10, tl.sum(kl_clamped))
    tl.store(row + 11, tl.sum(entropy_sum))
    tl.store(row + 12, tl.sum(policy))
    tl.store(row + 13, tl.max(ratio_max))


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
    programs = triton.cdiv(count, block)
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
        count, advantage_stride, weight_stride, **constants,
        HAS_MASK=mask is not None, GIVEN_RATIOS=given_ratios, WRITE_LOSS=write_loss,
        WRITE_GRAD_ENTROPY=gives_entropy, BLOCK=block, COLUMNS=COLUMNS,
    )  # fmt: skip
    fold_partials_kernel[(1,)](
        partials, totals, programs, MAX_COLUMN=N_METRICS, USED=1 + N_METRICS, ROWS=64, COLUMNS=COLUMNS
    )
    return losses, grad_logprobs, grad_entropy, totals


def _sequence_log_ratios_triton(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor, *, block: int = BLOCK
) -> Tensor:
    logprobs, old_logprobs = logprobs.reshape(-1).contiguous(), old_logprobs.reshape(-1).contiguous()
    out = torch.empty(logprobs.numel(), dtype=torch.float32, device=logprobs.device)
    flat_mask = logprobs if mask is None else mask.reshape(-1).contiguous()
    _sequence_log_ratios_kernel[(cu_seqlens.numel() - 1,)](
        logprobs, old_logprobs, flat_mask, cu_seqlens.contiguous(), out, HAS_MASK=mask is not None, BLOCK=block
    )
    return out


def _run(
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
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    if logprobs.numel() == 0 or backend != "triton":
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


@torch.no_grad()
def token_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    settings: PolicyLossSettings,
) -> TokenTerms:
    """The loss of each token [N] with its derivatives, for callers that carry the gradient themselves; no autograd.

    Arguments as for `policy_loss`, unchecked but for the settings; the form gspo needs whole sequences: ValueError.
    """
    op = "token_terms"
    require(settings.form != "gspo", op, "form", "one with a ratio per token", settings.form)
    check_settings(op, settings, has_ref=ref_logprobs is not None, has_entropy=entropy is not None)
    losses, grad, grad_entropy, _, metrics = _run(
        logprobs, old_logprobs, advantages, weights, entropy, ref_logprobs, importance_weights, mask, None, settings,
        write_loss=True,
    )  # fmt: skip
    return TokenTerms(losses, grad, grad_entropy, metrics)


@torch.library.custom_op("zs_kernels::policy_loss", mutates_args=())
def _policy_loss_op(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_cap: float | None,
    kl_coefficient: float,
    kl_estimator: str,
    kl_clamp: str,
    entropy_coefficient: float,
    min_log_ratio: float,
    max_log_ratio: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = PolicyLossSettings(
        form, clip_low, clip_high, dual_clip, ratio_cap, kl_coefficient, kl_estimator, kl_clamp, entropy_coefficient,
        min_log_ratio, max_log_ratio,
    )  # fmt: skip
    if cu_seqlens is not None:
        require_segments("policy_loss", cu_seqlens, logprobs.numel())
    _, grad, grad_entropy, loss, metrics = _run(
        logprobs, old_logprobs, advantages, weights, entropy, ref_logprobs, importance_weights, mask, cu_seqlens,
        settings, write_loss=False,
    )  # fmt: skip
    return loss, grad.reshape(logprobs.shape), grad_entropy.flatten(), metrics


@_policy_loss_op.register_fake
def _(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, entropy: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    entropy_coefficient = rest[11]
    entropies = 0 if entropy is None or entropy_coefficient == 0.0 else logprobs.numel()
    grad = logprobs.new_empty(logprobs.shape, dtype=dtype)
    return grad.new_empty(()), grad, grad.new_empty(entropies), grad.new_empty(N_METRICS)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad, grad_entropy, metrics = output
    ctx.save_for_backward(grad, grad_entropy)
    ctx.mark_non_differentiable(grad, grad_entropy, metrics)
    ctx.set_materialize_grads(False)
    entropy = inputs[4]
    ctx.dtypes = inputs[0].dtype, None if entropy is None else entropy.dtype
    ctx.entropy_shape = None if entropy is None else entropy.shape


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, grad_entropy = ctx.saved_tensors
    by_logprobs = by_entropy = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        by_logprobs = (grad * grad_loss).to(ctx.dtypes[0])
    if grad_loss is not None and ctx.needs_input_grad[4] and grad_entropy.numel():
        by_entropy = (grad_entropy * grad_loss).to(ctx.dtypes[1]).reshape(ctx.entropy_shape)
    return by_logprobs, None, None, None, by_entropy, *[None] * 15


_policy_loss_op.register_autograd(_backward, setup_context=_save)


class PolicyLoss(NamedTuple):
    """The loss to minimise, and sums over unmasked tokens: scalars without gradient; METRICS says what each is."""

    loss: Tensor
    ratio_sum: Tensor
    clipped_low: Tensor
    """Number of tokens whose ratio is below 1 - clip_low where the clip is what counts (A < 0)."""
    clipped_high: Tensor
    """Number of tokens whose ratio is above 1 + clip_high where the clip is what counts (A > 0)."""
    clipped_dual: Tensor
    capped: Tensor
    clamped_count: Tensor
    kl_sum: Tensor
    kl_clamped_count: Tensor
    entropy_sum: Tensor
    policy_sum: Tensor
    """The loss's policy term alone, weights included."""
    token_count: Tensor
    log_ratio_sum: Tensor
    ratio_max: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
    form: str = "ppo",
    ratio_cap: float | None = None,
    importance_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: str = "none",
    entropy: Tensor | None = None,
    entropy_coefficient: float = 0.0,
    cu_seqlens: Tensor | None = None,
    min_log_ratio: float = -20.0,
    max_log_ratio: float = 20.0,
) -> PolicyLoss:
    """Loss and metrics of tokens [N] (or any one shape); the gradient flows to `logprobs` and `entropy` alone.

    weights: [N], each token's share in the loss. mask: [N] bool; a False token counts nowhere, NaN included.
    dual_clip: above 1; bounds the loss of a token with a negative advantage. ratio_cap: largest ratio (ppo, gspo), or
    the absolute cap of cispo_cap. importance_weights: [N], multiply the policy term as they are (see
    importance_weights.py). ref_logprobs: [N], for the KL metric, and for the loss with kl_coefficient; kl_estimator,
    kl_clamp: as for kl_estimates. entropy: [N], likewise with entropy_coefficient. cu_seqlens: [S + 1] integer bounds
    of the sequences from 0 to N, for the form gspo. min_log_ratio, max_log_ratio: outside, the ratio is held and its
    gradient 0. Raises ValueError or TypeError naming the argument.
    """
    op = "policy_loss"
    require_floating(op, "logprobs", logprobs)
    shape, device = tuple(logprobs.shape), logprobs.device
    columns = {"old_logprobs": old_logprobs, "advantages": advantages, "weights": weights}
    optional = {"importance_weights": importance_weights, "ref_logprobs": ref_logprobs, "entropy": entropy}
    for name, value in (columns | {key: given for key, given in optional.items() if given is not None}).items():
        require_floating(op, name, value, shape=shape)
        require(value.device == device, op, name, f"on {device} like logprobs", value)
    require_mask(op, "mask", mask, shape, device)
    settings = PolicyLossSettings(
        form, float(clip_low), float(clip_high), dual_clip, ratio_cap, float(kl_coefficient), kl_estimator, kl_clamp,
        float(entropy_coefficient), float(min_log_ratio), float(max_log_ratio),
    )  # fmt: skip
    check_settings(op, settings, has_ref=ref_logprobs is not None, has_entropy=entropy is not None)
    if form == "gspo":
        require(cu_seqlens is not None, op, "cu_seqlens", "given for the form gspo", cu_seqlens)
        require_cu_seqlens(op, cu_seqlens, device)
    else:
        cu_seqlens = None
    loss, _, _, metrics = _policy_loss_op(
        logprobs, old_logprobs, advantages, weights, entropy, ref_logprobs, importance_weights, mask, cu_seqlens,
        *settings,
    )  # fmt: skip
    return PolicyLoss(loss, **dict(zip(METRICS, metrics.unbind(), strict=True)))
