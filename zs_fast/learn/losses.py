"""The loss of one micro batch, straight from the trunk's hidden states.

    loss = sum over loss tokens of weight_n (policy_n + kl_coefficient * kl_n - entropy_coefficient * entropy_n)

The weights carry the aggregation. Their denominators count the whole mini batch (of all ranks), never the micro batch:
the micro batches' losses add up to the mini batch's, so that their size doesn't change the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zs_fast.config import AlgorithmConfig
from zs_fast.learn.batch import MicroBatch, TrainBatch
from zs_fast.learn.policy import hidden_states
from zs_fast.learn.sharding import whole
from zs_kernels import (
    METRICS,
    PolicyLossSettings,
    kl_estimates,
    linear_kl,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
)
from zs_kernels.importance_weights import ImportanceWeights, importance_weights

KL_CLAMP = "verl"
"""Log-ratios bounded to +-20 and the estimate to 10 nats, as verl (and ZeroSearch for the latter) has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniBatchSize:
    """What the weights of a mini batch are divided by; sums over all ranks."""

    loss_tokens: float
    sequences: float
    """Trajectories with a loss token"""
    longest: float
    """Tokens that a trajectory may write at most: a constant of the run"""


def token_weights(micro: MicroBatch, size: MiniBatchSize, aggregation: str) -> Tensor:
    """[m] float32: each loss token's share in the mini batch's loss."""
    lengths = torch.tensor(micro.loss_cu_seqlens, dtype=torch.float32).diff()
    per_sequence = {
        "token-mean": torch.full_like(lengths, 1.0 / size.loss_tokens),
        "token-sum": torch.ones_like(lengths),
        "seq-mean-token-sum": torch.full_like(lengths, 1.0 / size.sequences),
        "seq-mean-token-mean": 1.0 / (size.sequences * lengths),
        "seq-mean-token-sum-norm": torch.full_like(lengths, 1.0 / (size.sequences * size.longest)),
    }[aggregation]
    return per_sequence.repeat_interleave(lengths.long()).to(micro.loss_index.device, non_blocking=True)


def micro_batch_loss(
    model: nn.Module,
    micro: MicroBatch,
    batch: TrainBatch,
    config: AlgorithmConfig,
    size: MiniBatchSize,
    *,
    temperature: float,
    reference: nn.Module | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss to minimise, named sums over this micro batch's loss tokens: float32 scalars without gradient).

    reference: the frozen model that `algorithm.kl_estimator = "full"` compares whole distributions with.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    hidden = hidden_states(model, micro, micro.loss_index)
    kl_in_loss = batch.kl_coefficient if config.kl_in == "loss" else 0.0
    apart = config.kl_estimator == "full" or config.legacy == "zerosearch"
    settings = PolicyLossSettings(
        form=config.policy_loss,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        kl_coefficient=0.0 if apart else kl_in_loss,
        kl_estimator="k3" if config.kl_estimator == "full" else config.kl_estimator,
        kl_clamp=KL_CLAMP,
        entropy_coefficient=config.entropy_coefficient,
    )
    old, ref = batch.scored.old_logprobs, batch.scored.ref_logprobs
    # Without old log-probabilities this is the first update since sampling: the weights are the old ones, the ratio 1.
    old_logprobs = None if old is None else micro.at_loss_tokens(old)
    ref_logprobs = None if ref is None else micro.at_loss_tokens(ref)
    advantages = micro.at_loss_tokens(batch.advantages)
    weights = token_weights(micro, size, config.aggregation)
    rollout_logprobs = micro.at_loss_tokens(batch.scored.packed.rollout_logprobs)
    importance = None
    if config.correction != "none":
        assert old_logprobs is not None, "a correction compares the trainer's own log-probabilities with the sampler's"
        importance = _against_sampler(old_logprobs, rollout_logprobs, micro, config).weights
    # GSPO knows a trajectory's ratio only when all its log-probabilities are there.
    if settings.form == "gspo" or config.legacy == "zerosearch":
        scored = linear_logprobs(
            hidden, head.weight, micro.loss_targets, bias=head.bias, temperature=temperature, entropy=True
        )
        logprobs = scored.logprobs
        assert scored.entropy is not None
        result = policy_loss(
            logprobs,
            logprobs.detach() if old_logprobs is None else old_logprobs,
            advantages,
            weights,
            importance_weights=importance,
            ref_logprobs=ref_logprobs,
            entropy=scored.entropy,
            cu_seqlens=torch.tensor(micro.loss_cu_seqlens).to(hidden.device, non_blocking=True),
            **settings._asdict(),
        )
        loss, metrics = result.loss, {name: getattr(result, name) for name in METRICS}
        if config.legacy == "zerosearch" and ref_logprobs is not None:
            kl = kl_estimates(logprobs, ref_logprobs, estimator=settings.kl_estimator, clamp=KL_CLAMP)
            loss = loss - kl_in_loss * (weights * kl).sum()  # the released code's sign
            metrics["kl_sum"] = kl.detach().sum()
    else:
        fused = linear_policy_loss(
            hidden,
            head.weight,
            micro.loss_targets,
            old_logprobs,
            advantages,
            weights,
            settings=settings,
            ref_logprobs=ref_logprobs,
            importance_weights=importance,
            bias=head.bias,
            temperature=temperature,
        )
        loss, logprobs = fused.loss, fused.logprobs
        metrics = dict(zip(METRICS, fused.metrics.unbind(), strict=True)) | {"entropy_sum": fused.entropy.sum()}
    sums = _named_sums(metrics, has_reference=ref is not None)
    sums["loss/policy"] = metrics["policy_sum"] * size.loss_tokens
    if config.kl_estimator == "full" and reference is not None:
        kl = _full_kl(hidden, head, reference, micro, temperature)
        loss = loss + batch.kl_coefficient * (weights * kl).sum()
        sums["kl"] = kl.detach().sum()
    before = logprobs.detach() if old_logprobs is None else old_logprobs
    mismatch = _against_sampler(before, rollout_logprobs, micro, config).metrics
    sums |= {
        "mismatch_tokens": mismatch.token_count,
        "mismatch": mismatch.absolute_sum,
        "mismatch_k3": mismatch.k3_sum,
        "mismatch_outside": mismatch.outside_count,
    }
    return loss, sums


def _full_kl(hidden: Tensor, head: Any, reference: nn.Module, micro: MicroBatch, temperature: float) -> Tensor:
    """[m] float32, in nats: KL(policy || reference) at each loss token over the whole vocabulary, with gradient."""
    ref_head: Any = reference.get_output_embeddings()  # type: ignore[operator]

    def compare() -> Tensor:
        with torch.no_grad():
            ref_hidden = hidden_states(reference, micro, micro.loss_index)
        return linear_kl(
            hidden,
            ref_hidden,
            head.weight,
            ref_head.weight,
            bias=head.bias,
            ref_bias=ref_head.bias,
            temperature=temperature,
        )

    return whole(reference, compare)


def _against_sampler(
    logprobs: Tensor, rollout_logprobs: Tensor, micro: MicroBatch, config: AlgorithmConfig
) -> ImportanceWeights:
    """Weights and mismatch of `logprobs` [m] against the sampler's; tokens for which it gave none don't count."""
    return importance_weights(
        logprobs,
        rollout_logprobs,
        cu_seqlens=torch.tensor(micro.loss_cu_seqlens).to(logprobs.device, non_blocking=True),
        level="token" if config.correction == "none" else config.correction,
        bound=config.correction_mode,
        low=config.correction_low if config.correction_mode == "mask" else 0.0,
        high=config.correction_high,
    )


def _named_sums(metrics: Mapping[str, Tensor], *, has_reference: bool) -> dict[str, Tensor]:
    sums = {
        "ratio": metrics["ratio_sum"],
        "clipped_low": metrics["clipped_low"],
        "clipped_high": metrics["clipped_high"],
        "clipped_dual": metrics["clipped_dual"],
        "entropy": metrics["entropy_sum"],
    }
    return sums | ({"kl": metrics["kl_sum"]} if has_reference else {})
