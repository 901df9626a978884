"""Operations for reinforcement learning of language models: plain functions on tensors, importable with torch alone."""

from zs_kernels._device import NativeStatus, native_status, use_backend
from zs_kernels.gae import GaeWithStatistics, gae, gae_with_statistics, whiten_advantages
from zs_kernels.group_advantages import GroupAdvantages, group_advantages, group_ids
from zs_kernels.importance_weights import ImportanceWeights, MismatchMetrics, importance_weights
from zs_kernels.kl_estimates import KlEstimates, kl_estimates
from zs_kernels.linear_kl import linear_kl
from zs_kernels.linear_logprobs import linear_logprobs, linear_logprobs_reference
from zs_kernels.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from zs_kernels.loss_weights import loss_weights
from zs_kernels.policy_loss import METRICS, PolicyLoss, PolicyLossSettings, policy_loss
from zs_kernels.reductions import (
    masked_mean,
    masked_statistics,
    masked_sum,
    masked_var,
    masked_whiten,
    merge_statistics,
)
from zs_kernels.token_logprobs import TokenLogprobs, token_logprobs
from zs_kernels.value_loss import ValueLoss, value_loss

__all__ = [
    "METRICS",
    "GaeWithStatistics",
    "GroupAdvantages",
    "ImportanceWeights",
    "KlEstimates",
    "LinearPolicyLoss",
    "MismatchMetrics",
    "NativeStatus",
    "PolicyLoss",
    "PolicyLossSettings",
    "TokenLogprobs",
    "ValueLoss",
    "gae",
    "gae_with_statistics",
    "group_advantages",
    "group_ids",
    "importance_weights",
    "kl_estimates",
    "linear_kl",
    "linear_logprobs",
    "linear_logprobs_reference",
    "linear_policy_loss",
    "loss_weights",
    "masked_mean",
    "masked_statistics",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "merge_statistics",
    "native_status",
    "policy_loss",
    "token_logprobs",
    "use_backend",
    "value_loss",
    "whiten_advantages",
]
