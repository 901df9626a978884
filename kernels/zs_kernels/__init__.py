"""Operations for reinforcement learning of language models: plain functions on tensors, importable with torch alone."""

from zs_kernels.gae import gae
from zs_kernels.group_advantages import GroupAdvantages, group_advantages
from zs_kernels.kl_estimates import kl_estimates
from zs_kernels.linear_logprobs import linear_logprobs, linear_logprobs_reference
from zs_kernels.policy_loss import PolicyLoss, policy_loss
from zs_kernels.reductions import masked_mean, masked_sum, masked_var, masked_whiten
from zs_kernels.token_logprobs import TokenLogprobs, token_logprobs

__all__ = [
    "GroupAdvantages",
    "PolicyLoss",
    "TokenLogprobs",
    "gae",
    "group_advantages",
    "kl_estimates",
    "linear_logprobs",
    "linear_logprobs_reference",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "policy_loss",
    "token_logprobs",
]
