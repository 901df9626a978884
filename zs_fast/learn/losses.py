"""The loss of one micro batch: clipped policy loss + KL to the reference - entropy bonus.

    loss = sum over loss tokens of (policy_loss_n + kl_coefficient * k3_n - entropy_coefficient * entropy_n) / M

M is the number of loss tokens of the whole mini batch (of all ranks), never of the micro batch: the micro batches'
losses add up to the mini batch's, so that their size doesn't change the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zs_fast.config import AlgorithmConfig
from zs_fast.learn.batch import MicroBatch, TrainBatch
from zs_kernels import TokenLogprobs, kl_estimates, policy_loss

KL_CLAMP = "verl"
"""k3 with the log-ratio bounded to +-20 and the estimate to 10 nats, as verl (and ZeroSearch for the latter) has it."""


def micro_batch_loss(
    scored: TokenLogprobs, micro: MicroBatch, batch: TrainBatch, config: AlgorithmConfig, num_loss_tokens: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss to minimise, named sums over this micro batch's loss tokens: float32 scalars without gradient).

    scored: the policy's log-probabilities and entropies [m], with gradient. num_loss_tokens: M above.
    """
    logprobs, entropy = scored.logprobs, scored.entropy
    assert entropy is not None, "the policy's entropies belong to every update"
    old = batch.scored.old_logprobs
    # Without a scoring pass this is the first update since sampling: the weights are the old ones, the ratio is 1.
    old_logprobs = logprobs.detach() if old is None else micro.at_loss_tokens(old)
    weights = torch.full_like(logprobs, 1.0 / num_loss_tokens, requires_grad=False)
    policy = policy_loss(
        logprobs,
        old_logprobs,
        micro.at_loss_tokens(batch.advantages),
        weights,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    loss = policy.loss
    sums = {
        "loss/policy": policy.loss.detach() * num_loss_tokens,
        "ratio": policy.ratio_sum,
        "clipped_low": policy.clipped_low,
        "clipped_high": policy.clipped_high,
        "entropy": entropy.detach().sum(),
    }
    if batch.scored.ref_logprobs is not None:
        kl = kl_estimates(logprobs, micro.at_loss_tokens(batch.scored.ref_logprobs), estimator="k3", clamp=KL_CLAMP)
        sums["kl"] = kl.detach().sum()
        loss = loss + config.kl_coefficient * kl.sum() / num_loss_tokens
    if config.entropy_coefficient:
        loss = loss - config.entropy_coefficient * entropy.sum() / num_loss_tokens
    return loss, sums | _mismatch(old_logprobs, micro.at_loss_tokens(batch.scored.packed.rollout_logprobs))


def _mismatch(old_logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, Tensor]:
    """How far the sampler's log-probabilities are from the trainer's, over tokens for which the sampler gave one."""
    known = ~torch.isnan(rollout_logprobs)
    difference = torch.where(known, old_logprobs - rollout_logprobs, 0.0)
    return {"mismatch": difference.abs().sum(), "mismatch_tokens": known.sum().to(difference.dtype)}
