"""OpenRLHF's log-probs, entropy, KL, masked means, losses and advantages on our ops.

    with patch():
        ...                               # OpenRLHF's actors and trainer, in this process

`patch()` swaps them in openrlhf.models.utils, openrlhf.models.loss and the experience maker, and wherever other modules
hold them. OpenRLHF's actors are processes of their own: enter it inside each. PolicyLoss and ValueLoss are classes:
what was made before keeps its own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from zs_kernels.compat._openrlhf_functions import (
    compute_approx_kl,
    compute_entropy,
    get_advantages_and_returns,
    get_cumulative_returns,
    group_rewards,
    log_probs_from_logits,
    masked_mean,
    masked_normalize,
)
from zs_kernels.compat._openrlhf_losses import PolicyLoss, ValueLoss, aggregate_loss
from zs_kernels.compat._patching import Patched, Patcher, Swap, function, network

__all__ = [
    "VERSION",
    "PolicyLoss",
    "ValueLoss",
    "aggregate_loss",
    "compute_approx_kl",
    "compute_entropy",
    "get_advantages_and_returns",
    "get_cumulative_returns",
    "group_rewards",
    "log_probs_from_logits",
    "masked_mean",
    "masked_normalize",
    "patch",
]

VERSION = "0.11.2"

_UTILS = "openrlhf.models.utils"
_LOSS = "openrlhf.models.loss"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"


def _method(ours: Callable[..., Any]) -> Swap:
    """A function for a method of RemoteExperienceMaker that does not read its object."""

    def build(counted: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
        call = counted(ours)
        return lambda self, *arguments, **keywords: call(*arguments, **keywords)

    return Swap(ours.__name__, _MAKER, f"RemoteExperienceMaker.{ours.__name__}", build)


def _swaps() -> list[Swap]:
    utils = (compute_approx_kl, compute_entropy, log_probs_from_logits, masked_mean, masked_normalize)
    return [
        *(function(ours.__name__, _UTILS, ours) for ours in utils),
        function("aggregate_loss", _LOSS, aggregate_loss),
        network("PolicyLoss", _LOSS, PolicyLoss),
        network("ValueLoss", _LOSS, ValueLoss),
        _method(get_advantages_and_returns),
        _method(get_cumulative_returns),
    ]


_patcher = Patcher("openrlhf", VERSION, _swaps)


def patch(*, only: Iterable[str] | None = None) -> AbstractContextManager[Patched]:
    """While it lasts, OpenRLHF's functions are ours, in every module that holds them; `only`: some of them, by name.

    Gives `Patched`: `.calls` counts the calls of each. May be entered again inside itself.
    Raises ImportError where OpenRLHF, or one of the names, is not there.
    """
    return _patcher(only)
