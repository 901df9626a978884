"""Whose weights are meant: the trained policy and the frozen reference, and their log-probabilities of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from zs_fast.errors import ConfigError
from zs_fast.learn.batch import MicroBatch, PackedBatch, ScoredBatch
from zs_fast.learn.critic import Critic
from zs_fast.learn.micro_step import MicroSteps
from zs_fast.learn.policy import logprobs_at_loss_tokens
from zs_fast.learn.sharding import whole
from zs_fast.models.load import LoadedModel
from zs_fast.types import Role

SCORE_ADVICE = "lower game.max_context_tokens, or free memory (engine.release_kv = true)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """The models of the learning step. `Roles(policy=load_model(...), reference=None, temperature=1.0)`."""

    policy: LoadedModel
    reference: LoadedModel | None
    """Frozen copy of the policy as it was before training; None when no KL term is used, so that none is held."""
    critic: Critic | None = None
    """The value model of PPO."""
    temperature: float
    """The sampling temperature: log-probabilities are those of the distribution that was sampled from."""
    _passes: dict[Role, MicroSteps] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.temperature <= 0.0:
            raise ConfigError(
                f"sampling.temperature is {self.temperature}: greedy play has no distribution to train. "
                "Set it above 0, for example to 1.0 (evaluation has its own eval.temperature)."
            )
        if self.reference is not None:
            self.reference.model.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.policy.model.device
        return device

    @property
    def scores_before_update(self) -> bool:
        """Does `score` run a forward pass at all?"""
        return self.reference is not None or self.critic is not None

    @property
    def oom_splits(self) -> int:
        """Micro batches that ran out of memory while they were scored, on this rank, so far."""
        return sum(passes.splits for passes in self._passes.values())

    def scoring_passes(self) -> dict[Role, MicroSteps]:
        """By role, for every model that may score: who makes its passes."""
        models: dict[Role, nn.Module] = {Role.POLICY: self.policy.model}
        if self.reference is not None:
            models[Role.REFERENCE] = self.reference.model
        if self.critic is not None:
            models[Role.CRITIC] = self.critic
        return {role: self._micro_steps(role, model) for role, model in models.items()}

    def values(self, packed: PackedBatch, *, whole_response: bool = False) -> Tensor:
        """[N] float32 on the policy's device: the critic's values at loss tokens (or from a trajectory's first one on),
        0 elsewhere. No gradient."""
        critic = self.critic
        if critic is None:
            raise ValueError("this run holds no critic")
        column = torch.zeros(packed.num_tokens, device=self.device)

        def write(micro: MicroBatch) -> dict[str, Tensor]:
            index = micro.response_index() if whole_response else micro.loss_index
            column[micro.tokens][index] = whole(critic, partial(critic.values, micro, index))
            return {}

        self._score(Role.CRITIC, critic, packed, write)
        return column

    def logprobs(self, role: Role | str, packed: PackedBatch) -> Tensor:
        """[N] float32 on the policy's device: the role's log-probabilities at loss tokens, 0 elsewhere. No gradient."""
        loaded = {Role.POLICY: self.policy, Role.REFERENCE: self.reference}.get(Role(role))
        if loaded is None:
            raise ValueError(f"this run holds no model for the role {str(role)!r}")
        column = torch.zeros(packed.num_tokens, device=self.device)

        def write(micro: MicroBatch) -> dict[str, Tensor]:
            logprobs_of = partial(logprobs_at_loss_tokens, loaded.model, micro, temperature=self.temperature)
            column[micro.tokens][micro.loss_index] = whole(loaded.model, logprobs_of).logprobs
            return {}

        self._score(Role(role), loaded.model, packed, write)
        return column

    @torch.no_grad()
    def _score(
        self, role: Role, model: nn.Module, packed: PackedBatch, write: Callable[[MicroBatch], dict[str, Tensor]]
    ) -> None:
        """`write` each micro batch, in smaller ones where memory runs out."""
        passes = self._micro_steps(role, model)
        passes.run(packed, 0, packed.num_sequences, token_budget=packed.token_budget, step=write)

    def _micro_steps(self, role: Role, model: nn.Module) -> MicroSteps:
        if role not in self._passes:
            self._passes[role] = MicroSteps(model, what=f"when the {role} scores it", advice=SCORE_ADVICE)
        return self._passes[role]


def score(
    packed: PackedBatch,
    roles: Roles,
    *,
    old_logprobs: bool = False,
    ref_logprobs: bool = True,
    whole_response: bool = False,
) -> ScoredBatch:
    """The batch on the policy's device with the log-probabilities of frozen weights.

    The reference is scored when there is one, unless the loss itself compares with it. The policy itself is scored only
    on request: where a step makes a single update, the update's own forward pass sees the very weights that a scoring
    pass would see, so its log-probabilities, detached, are the old ones and every ratio is exactly 1.
    whole_response: the critic's values at document tokens too (`algorithm.legacy`).
    """
    packed = packed.to(roles.device)
    return ScoredBatch(
        packed=packed,
        old_logprobs=roles.logprobs(Role.POLICY, packed) if old_logprobs else None,
        ref_logprobs=roles.logprobs(Role.REFERENCE, packed) if ref_logprobs and roles.reference is not None else None,
        old_values=roles.values(packed, whole_response=whole_response) if roles.critic is not None else None,
    )
