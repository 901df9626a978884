"""verl's core functions on our ops: log-probs, entropy, fused heads, advantages, losses, KL, masked statistics.

    with patch():
        ...                               # verl's workers and trainer, in this process

`patch()` swaps them in verl.trainer.ppo.core_algos (its registries of losses and advantage estimators included),
verl.utils.torch_functional and verl's fused heads, and wherever other modules hold them. verl's workers are processes
of their own: enter it inside each, for instance from VERL_USE_EXTERNAL_MODULES. Left as they are: the losses sapo,
dppo_tv, dppo_kl, clip_cov, kl_cov, geo_mean and dro, the estimators gdpo (which calls our grpo), grpo_passk and the
optimal token baselines.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from zs_kernels.compat._patching import Patched, Patcher, Swap, function, network
from zs_kernels.compat._verl_advantages import (
    compute_gae_advantage_return,
    compute_gpg_outcome_advantage,
    compute_grpo_outcome_advantage,
    compute_grpo_vectorized_outcome_advantage,
    compute_opo_outcome_advantage,
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
    compute_remax_outcome_advantage,
    compute_rloo_outcome_advantage,
    compute_rloo_vectorized_outcome_advantage,
)
from zs_kernels.compat._verl_functional import (
    FusedLinearForPPO,
    calculate_sum_pi_squared_from_logits,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    linear_cross_entropy,
    logprobs_from_logits,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
)
from zs_kernels.compat._verl_losses import (
    agg_loss,
    compute_entropy_loss,
    compute_policy_loss,
    compute_policy_loss_cispo,
    compute_policy_loss_gpg,
    compute_policy_loss_gspo,
    compute_policy_loss_reinforce,
    compute_policy_loss_vanilla,
    compute_value_loss,
    kl_penalty,
)

__all__ = [
    "VERSION",
    "FusedLinearForPPO",
    "agg_loss",
    "calculate_sum_pi_squared_from_logits",
    "compute_entropy_loss",
    "compute_gae_advantage_return",
    "compute_gpg_outcome_advantage",
    "compute_grpo_outcome_advantage",
    "compute_grpo_vectorized_outcome_advantage",
    "compute_opo_outcome_advantage",
    "compute_policy_loss",
    "compute_policy_loss_cispo",
    "compute_policy_loss_gpg",
    "compute_policy_loss_gspo",
    "compute_policy_loss_reinforce",
    "compute_policy_loss_vanilla",
    "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "compute_reinforce_plus_plus_outcome_advantage",
    "compute_remax_outcome_advantage",
    "compute_rloo_outcome_advantage",
    "compute_rloo_vectorized_outcome_advantage",
    "compute_value_loss",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "kl_penalty",
    "linear_cross_entropy",
    "logprobs_from_logits",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "patch",
]

VERSION = "0.9.1"

_CORE = (
    agg_loss,
    compute_entropy_loss,
    compute_gae_advantage_return,
    compute_gpg_outcome_advantage,
    compute_grpo_outcome_advantage,
    compute_grpo_vectorized_outcome_advantage,
    compute_opo_outcome_advantage,
    compute_policy_loss,
    compute_policy_loss_cispo,
    compute_policy_loss_gpg,
    compute_policy_loss_gspo,
    compute_policy_loss_reinforce,
    compute_policy_loss_vanilla,
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
    compute_remax_outcome_advantage,
    compute_rloo_outcome_advantage,
    compute_rloo_vectorized_outcome_advantage,
    compute_value_loss,
    kl_penalty,
)
_FUNCTIONAL = (
    calculate_sum_pi_squared_from_logits,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    logprobs_from_logits,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
)


def _swaps() -> list[Swap]:
    return [
        *(function(ours.__name__, "verl.trainer.ppo.core_algos", ours) for ours in _CORE),
        *(function(ours.__name__, "verl.utils.torch_functional", ours) for ours in _FUNCTIONAL),
        function("linear_cross_entropy", "verl.utils.kernel.linear_cross_entropy", linear_cross_entropy),
        network("FusedLinearForPPO", "verl.utils.experimental.torch_functional", FusedLinearForPPO),
    ]


_patcher = Patcher("verl", VERSION, _swaps)


def patch(*, only: Iterable[str] | None = None) -> AbstractContextManager[Patched]:
    """While it lasts, verl's functions are ours, in every module and registry that holds them; `only`: some, by name.

    Gives `Patched`: `.calls` counts the calls of each. May be entered again inside itself.
    Raises ImportError where verl, or one of the names, is not there.
    """
    return _patcher(only)
