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
from zs_kernels._policy_backends import run_policy_terms
from zs_kernels._policy_terms import METRICS, N_METRICS, PolicyLossSettings, TokenTerms, check_settings
from zs_kernels.loss_weights import require_cu_seqlens, require_segments

__all__ = ["METRICS", "N_METRICS", "PolicyLoss", "PolicyLossSettings", "TokenTerms", "policy_loss", "token_terms"]


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
    losses, grad, grad_entropy, _, metrics = run_policy_terms(
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
    _, grad, grad_entropy, loss, metrics = run_policy_terms(
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
        form, clip_low, clip_high, dual_clip, ratio_cap, kl_coefficient, kl_estimator, kl_clamp, entropy_coefficient,
        min_log_ratio, max_log_ratio,
    )  # fmt: skip
    check_settings(op, settings, has_ref=ref_logprobs is not None, has_entropy=entropy is not None)
    require(form != "gspo" or cu_seqlens is not None, op, "cu_seqlens", "given for the form gspo", cu_seqlens)
    if cu_seqlens is not None:
        require_cu_seqlens(op, cu_seqlens, device)
        cu_seqlens = cu_seqlens if form == "gspo" else None
    loss, _, _, metrics = _policy_loss_op(
        logprobs, old_logprobs, advantages, weights, entropy, ref_logprobs, importance_weights, mask, cu_seqlens,
        *settings,
    )  # fmt: skip
    return PolicyLoss(loss, **dict(zip(METRICS, metrics.unbind(), strict=True)))
