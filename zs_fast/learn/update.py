"""A credited batch -> optimizer steps -> numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from zs_fast.config import AlgorithmConfig, CriticConfig, TrainConfig
from zs_fast.errors import CheckpointUnusableError, ConfigError, EngineError
from zs_fast.learn.batch import MicroBatch, TrainBatch
from zs_fast.learn.critic import CriticUpdater
from zs_fast.learn.losses import MiniBatchSize, micro_batch_loss
from zs_fast.learn.micro_step import MicroSteps
from zs_fast.learn.optimizer import Optimizer, Schedule
from zs_fast.learn.policy import training_mode
from zs_fast.learn.roles import Roles
from zs_fast.learn.sharding import whole
from zs_fast.system.distributed import all_reduce_sums, gather
from zs_fast.types import Role, StepStats


@dataclass(slots=True)
class _Totals:
    """What the optimizer steps of one batch add up to."""

    sums: dict[str, float] = field(default_factory=dict)
    num_loss_tokens: float = 0.0
    """Of the steps that were taken."""
    grad_norms: list[float] = field(default_factory=list)
    nonfinite_losses: int = 0
    nonfinite_grad_norms: int = 0
    empty_steps: int = 0

    def add(self, sums: Mapping[str, float], num_loss_tokens: float, grad_norm: float) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.num_loss_tokens += num_loss_tokens
        self.grad_norms.append(grad_norm)

    def mean(self, name: str) -> float:
        return self.sums[name] / self.num_loss_tokens


class Updater:
    """Trains `roles.policy` in place: `mini_batches` optimizer steps per pass, `epochs` passes over each batch.

    A step whose loss or gradient is not finite is left out: the weights and AdamW's moments stay as they were, and it
    is counted under `update/nonfinite_*`. total_steps: batches in the whole run, for the learning-rate schedule.
    longest: tokens a trajectory may write at most, for the aggregation `seq-mean-token-sum-norm`.
    """

    def __init__(
        self,
        roles: Roles,
        train: TrainConfig,
        algorithm: AlgorithmConfig,
        *,
        total_steps: int,
        longest: int = 1,
        critic: CriticConfig | None = None,
    ) -> None:
        if algorithm.kl_coefficient > 0.0 and roles.reference is None:
            raise ConfigError(
                f"algorithm.kl_coefficient is {algorithm.kl_coefficient}, which needs a reference model, but none was "
                "given. Pass one, or set algorithm.kl_coefficient = 0."
            )
        self.roles, self.train, self.algorithm, self.longest = roles, train, algorithm, longest
        self.kl_coefficient = algorithm.kl_coefficient
        """Weight of the KL term in the coming step; steered where algorithm.kl_target is given."""
        self.updates_per_batch = train.mini_batches * train.epochs
        schedule = Schedule(
            peak=train.learning_rate,
            warmup_steps=train.warmup_steps,
            total_steps=total_steps * self.updates_per_batch,
            final_fraction=train.final_learning_rate_fraction,
        )
        self.optimizer = Optimizer(
            roles.policy.model,
            schedule,
            betas=train.betas,
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            kind=train.optimizer,
        )
        self.micro_steps = MicroSteps(roles.policy.model)
        self.critic: CriticUpdater | None = None
        if roles.critic is not None:
            self.critic = CriticUpdater(
                roles.critic,
                critic or CriticConfig(),
                train,
                total_steps=total_steps,
                whole_response=algorithm.legacy == "zerosearch",
            )

    def update(self, batch: TrainBatch) -> StepStats:
        """Take the batch's optimizer steps. One host sync per optimizer step.

        Each rank passes its own share of the step. Loss denominators, gradients and numbers are sums over all ranks,
        so that every rank takes the same step with the same bits.
        """
        batch = self._with_old_logprobs(batch)
        packed = batch.scored.packed
        totals = _Totals()
        learning_rate = self.optimizer.learning_rate
        with training_mode(
            self.roles.policy.model,
            gradient_checkpointing=self.train.gradient_checkpointing,
            offload=self.train.offload_activations,
        ):
            for _ in range(self.train.epochs):
                for first, last in packed.mini_batches(self.train.mini_batches):
                    learning_rate = self.optimizer.learning_rate
                    self._optimizer_step(batch, first, last, totals)
        values = self._values(batch, totals, learning_rate)
        if self.critic is not None:
            values |= self.critic.update(batch)
        self._steer_kl(values)
        return StepStats(values=values)

    @property
    def needs_old_logprobs(self) -> bool:
        """Must the policy score a batch before its first update?

        Not where each batch makes a single update: there the update's own forward pass sees the very same weights.
        """
        if self.algorithm.old_logprobs == "sampler":
            return False
        kl_in_reward = self.algorithm.kl_in == "reward" and self.kl_coefficient > 0.0
        return self.updates_per_batch > 1 or kl_in_reward or self.algorithm.correction != "none"

    @property
    def needs(self) -> dict[str, bool]:
        """What `score` is to compute, as its keyword arguments. No log-probabilities of the reference where the loss
        compares whole distributions."""
        return {
            "old_logprobs": self.needs_old_logprobs,
            "ref_logprobs": self.algorithm.kl_estimator != "full",
            "whole_response": self.algorithm.legacy == "zerosearch",
        }

    def _steer_kl(self, values: Mapping[str, float]) -> None:
        """Move the coefficient by up to 2 % towards the one that holds the KL at its target (arXiv:1909.08593, 2.2)."""
        target = self.algorithm.kl_target
        if target is not None and "kl/reference" in values:
            error = min(max(values["kl/reference"] / target - 1.0, -0.2), 0.2)
            self.kl_coefficient *= 1.0 + 0.1 * error

    def timings(self) -> dict[str, float]:
        """What the machine made of the updates so far, for timings.jsonl.

        update/oom_splits    micro batches that did not fit into memory, so that smaller ones were taken; they change
                             the gradient's rounding, as another train.token_budget would
        score/oom_splits     the same where a batch is only scored
        """
        splits = self.micro_steps.splits + (self.critic.micro_steps.splits if self.critic is not None else 0)
        return {"update/oom_splits": float(splits), "score/oom_splits": float(self.roles.oom_splits)}

    def saved_bytes(self) -> int:
        """What a checkpoint holds, about: the trained weights of policy and critic, and their optimizers' state."""
        optimizers = [self.optimizer, *([self.critic.optimizer] if self.critic is not None else [])]
        weights = sum(p.numel() * p.element_size() for optimizer in optimizers for p in optimizer.trained())
        return weights + sum(optimizer.saved_bytes() for optimizer in optimizers)

    def state_tensors(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts (and float32 masters of narrower weights), by parameter name; the same of a
        critic, and its weights."""
        return self.optimizer.state_tensors() | (self.critic.state_tensors() if self.critic else {})

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave; the policy's weights are loaded by themselves."""
        critic = {name: tensor for name, tensor in tensors.items() if name.startswith("critic.")}
        if self.critic is not None:
            self.critic.load_state_tensors(critic)
        own = {name: tensor for name, tensor in tensors.items() if self.critic is None or name not in critic}
        self.optimizer.load_state_tensors(own)

    def state(self) -> dict[str, float]:
        """Counters, and the KL coefficient where it is steered, for the checkpoint's JSON."""
        steered = {} if self.algorithm.kl_target is None else {"kl_coefficient": self.kl_coefficient}
        critic = {"critic_optimizer_steps": self.critic.optimizer.position} if self.critic else {}
        own = {"optimizer_steps": self.optimizer.position, "skipped_steps": self.optimizer.num_skipped}
        return own | steered | critic

    def load_state(self, state: Mapping[str, float]) -> None:
        try:
            self.optimizer.position = int(state["optimizer_steps"])
            self.optimizer.num_skipped = int(state["skipped_steps"])
            if self.critic is not None:
                self.critic.optimizer.position = int(state["critic_optimizer_steps"])
            if self.algorithm.kl_target is not None:
                self.kl_coefficient = float(state["kl_coefficient"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointUnusableError(
                f"the checkpoint's updater state {dict(state)!r} lacks a number for {error}; use another checkpoint"
            ) from error

    def _with_old_logprobs(self, batch: TrainBatch) -> TrainBatch:
        """With several updates per batch, the policy's log-probabilities before the first, from one scoring pass, or
        the sampler's."""
        packed = batch.scored.packed
        if self.algorithm.old_logprobs == "sampler":
            if torch.isnan(packed.rollout_logprobs).any():
                raise EngineError(
                    "algorithm.old_logprobs = 'sampler', but the engine gave no log-probabilities for some tokens. "
                    "Use 'trainer', or an engine that gives them."
                )
            return replace(batch, scored=replace(batch.scored, old_logprobs=packed.rollout_logprobs))
        if not self.needs_old_logprobs or batch.scored.old_logprobs is not None:
            return batch
        return replace(batch, scored=replace(batch.scored, old_logprobs=self.roles.logprobs(Role.POLICY, packed)))

    def _optimizer_step(self, batch: TrainBatch, first: int, last: int, totals: _Totals) -> None:
        """One optimizer step on sequences first .. last - 1."""
        packed, model = batch.scored.packed, self.roles.policy.model
        local = packed.loss_offsets[last] - packed.loss_offsets[first]
        written = sum(b > a for a, b in pairwise(packed.loss_offsets[first : last + 1]))
        counts = all_reduce_sums({"loss_tokens": local, "sequences": written})
        size = MiniBatchSize(**counts, longest=self.longest)
        if size.loss_tokens == 0:
            self.optimizer.skip()
            totals.empty_steps += 1
            return

        loss_of = partial(
            micro_batch_loss,
            model,
            batch=batch,
            config=self.algorithm,
            size=size,
            temperature=self.roles.temperature,
            reference=None if self.roles.reference is None else self.roles.reference.model,
        )

        def forward_and_backward(micro: MicroBatch) -> dict[str, Tensor]:
            loss, sums = whole(model, partial(loss_of, micro))
            torch.autograd.backward(loss)
            return sums | {"loss": loss.detach()}

        self.optimizer.place_gradients()
        device_sums = self.micro_steps.run(
            packed,
            first,
            last,
            token_budget=packed.token_budget,
            step=forward_and_backward,
            drop_gradients=self.optimizer.drop_gradients,
        )
        self.optimizer.sum_gradients()
        grad_norm = self.optimizer.clip_gradients()
        names = sorted(device_sums)
        numbers = torch.stack([*(device_sums[name] for name in names), grad_norm.to(self.roles.device)]).tolist()
        sums, norm = all_reduce_sums(dict(zip(names, numbers[:-1], strict=True))), numbers[-1]
        loss_is_finite, norm_is_finite = math.isfinite(sums["loss"]), math.isfinite(norm)
        if loss_is_finite and norm_is_finite:
            self.optimizer.step()
            totals.add(sums, size.loss_tokens, norm)
        else:
            self.optimizer.skip()
            totals.nonfinite_losses += not loss_is_finite
            totals.nonfinite_grad_norms += not norm_is_finite

    def _values(self, batch: TrainBatch, totals: _Totals, learning_rate: float) -> dict[str, float]:
        packed = batch.scored.packed
        counts = all_reduce_sums(
            {
                "tokens": packed.num_tokens,
                "loss_tokens": packed.num_loss_tokens,
                "groups": packed.num_groups,
                "dead_groups": int(batch.dead_groups.sum()),
            }
        )
        values = {
            "learning_rate": learning_rate,
            "dead_group_share": counts["dead_groups"] / max(counts["groups"], 1.0),
            "tokens": counts["tokens"],
            "loss_tokens": counts["loss_tokens"],
            "update/optimizer_steps": float(len(totals.grad_norms)),
            "update/nonfinite_losses": float(totals.nonfinite_losses),
            "update/nonfinite_grad_norms": float(totals.nonfinite_grad_norms),
            "update/empty_steps": float(totals.empty_steps),
        }
        values |= _advantage_statistics(batch.sequence_advantages[packed.trainable])
        if not totals.grad_norms:  # nothing was learnt: means over no tokens are left out, not made up
            return values
        values |= {
            "loss/policy": totals.mean("loss/policy"),
            "entropy": totals.mean("entropy"),
            "ratio/mean": totals.mean("ratio"),
            "ratio/clipped_low_share": totals.mean("clipped_low"),
            "ratio/clipped_high_share": totals.mean("clipped_high"),
            "ratio/clipped_dual_share": totals.mean("clipped_dual"),
            "grad_norm": math.fsum(totals.grad_norms) / len(totals.grad_norms),
        }
        if "kl" in totals.sums:
            values["kl/reference"] = totals.mean("kl")
            if self.algorithm.kl_in == "loss":
                values["loss/kl"] = batch.kl_coefficient * totals.mean("kl")
            if self.algorithm.kl_target is not None:
                values["kl/coefficient"] = batch.kl_coefficient
        if self.algorithm.entropy_coefficient:
            values["loss/entropy"] = -self.algorithm.entropy_coefficient * totals.mean("entropy")
        if totals.sums["mismatch_tokens"]:
            tokens = totals.sums["mismatch_tokens"]
            values["logprobs/rollout_mismatch"] = totals.sums["mismatch"] / tokens
            values["logprobs/rollout_k3"] = totals.sums["mismatch_k3"] / tokens
            values["logprobs/rollout_outside_share"] = totals.sums["mismatch_outside"] / tokens
        return values


def _advantage_statistics(advantages: Tensor) -> dict[str, float]:
    """Over the trainable trajectories of all ranks; 0 where there are none. advantages: [S'] of this rank's."""
    everyone = [value for values in gather(advantages.tolist()) for value in values]
    advantages = torch.tensor(everyone, dtype=torch.float64)
    if advantages.numel() == 0:
        return {"advantages/mean": 0.0, "advantages/std": 0.0, "advantages/max_abs": 0.0}
    return {
        "advantages/mean": float(advantages.mean()),
        "advantages/std": float(advantages.std(correction=0)),
        "advantages/max_abs": float(advantages.abs().max()),
    }
