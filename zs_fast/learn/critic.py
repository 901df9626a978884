"""The critic of PPO: a trunk with a linear head that guesses, before each token the policy writes, how it will end.

Its value at token n is read from the hidden state that the token is drawn from, as the log-probability is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from zs_fast.config import CriticConfig, TrainConfig
from zs_fast.errors import CheckpointUnusableError, ConfigError
from zs_fast.learn.batch import MicroBatch, TrainBatch
from zs_fast.learn.micro_step import MicroSteps
from zs_fast.learn.optimizer import Optimizer, Schedule
from zs_fast.learn.policy import hidden_states, training_mode
from zs_fast.learn.sharding import assembled, computes_in, is_sharded, own_piece, piece_of, whole
from zs_fast.models.load import LoadedModel
from zs_fast.models.lora import TARGETS, adapter_rank, attach_adapter, same_base
from zs_fast.system.distributed import all_reduce_sums, is_main
from zs_kernels import value_loss


class Critic(nn.Module):
    """A causal language model's trunk, and a value head in float32 that starts at 0 everywhere.

    The trunk is the critic's own or, with `on_base`, the policy's base weights with an adapter of the critic's.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.trunk: nn.Module = loaded.model.model
        size = loaded.model.config.get_text_config().hidden_size
        self.value_head = nn.Linear(size, 1, dtype=torch.float32, device=loaded.model.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @classmethod
    def on_base(cls, policy: LoadedModel, rank: int, *, targets: Sequence[str] = TARGETS, seed: int = 0) -> Critic:
        """A critic that shares the base of a policy with an adapter, and has its own adapter of `rank`.

        Raises ConfigError where all the policy's weights are trained: they would move under the critic.
        """
        if not adapter_rank(policy.model):
            raise ConfigError(
                f"critic.lora_rank is {rank}, but model.lora_rank is 0: an adapter needs a base that stays as it is, "
                "and all the policy's weights are trained. Set model.lora_rank too, or critic.lora_rank = 0."
            )
        tree = same_base(policy.model)
        attach_adapter(tree, rank, targets=targets, seed=seed)
        return cls(replace(policy, model=tree))

    @property
    def model(self) -> nn.Module:
        """The trunk, where `hidden_states` looks for it."""
        return self.trunk

    def values(self, micro: MicroBatch, index: Tensor | None = None) -> Tensor:
        """[m] float32: the value before each loss token, or before the tokens of `index`."""
        hidden = hidden_states(self, micro, micro.loss_index if index is None else index)
        values: Tensor = self.value_head(hidden.float()).squeeze(1)
        return values


class CriticUpdater:
    """Trains a critic in place on what the policy is trained on, with an AdamW of its own."""

    def __init__(
        self,
        critic: Critic,
        config: CriticConfig,
        train: TrainConfig,
        *,
        total_steps: int,
        whole_response: bool = False,
    ) -> None:
        """whole_response: learn values at document tokens too (`algorithm.legacy`)."""
        self.critic, self.config, self.train, self.whole_response = critic, config, train, whole_response
        self.micro_steps = MicroSteps(critic)
        self.epochs = config.epochs or train.epochs
        schedule = Schedule(
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            total_steps=total_steps * train.mini_batches * self.epochs,
            final_fraction=(
                train.final_learning_rate_fraction
                if config.final_learning_rate_fraction is None
                else config.final_learning_rate_fraction
            ),
        )
        self.optimizer = Optimizer(
            critic,
            schedule,
            betas=train.betas,
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            kind=train.optimizer,
        )

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """Take the batch's optimizer steps towards its returns; metrics under `critic/`. One host sync per step."""
        packed = batch.scored.packed
        taken: list[dict[str, float]] = []
        skipped = 0
        with training_mode(
            self.critic.trunk,
            gradient_checkpointing=self.train.gradient_checkpointing,
            offload=self.train.offload_activations,
        ):
            for _ in range(self.epochs):
                for first, last in packed.mini_batches(self.train.mini_batches):
                    sums = self._optimizer_step(batch, first, last)
                    taken += [sums] if sums else []
                    skipped += not sums
        tokens = sum(sums["tokens"] for sums in taken)
        values = {"critic/skipped_steps": float(skipped)} | _explained_variance(batch)
        if tokens:
            values |= {
                "critic/loss": sum(sums["loss"] * sums["tokens"] for sums in taken) / tokens,
                "critic/value_mean": sum(sums["value"] for sums in taken) / tokens,
                "critic/clipped_share": sum(sums["clipped"] for sums in taken) / tokens,
                "critic/grad_norm": sum(sums["grad_norm"] for sums in taken) / len(taken),
            }
        return values

    def _optimizer_step(self, batch: TrainBatch, first: int, last: int) -> dict[str, float]:
        """The step's sums; empty where it was left out (no loss token, or a number that is not finite)."""
        packed = batch.scored.packed
        assert batch.returns is not None and batch.scored.old_values is not None, "a critic needs returns to train to"
        old_values, returns = batch.scored.old_values, batch.returns

        def learns_at(micro: MicroBatch) -> Tensor:
            return micro.response_index() if self.whole_response else micro.loss_index

        micros = packed.micro_batches(packed.token_budget, first, last)
        tokens = all_reduce_sums({"tokens": sum(learns_at(micro).numel() for micro in micros)})["tokens"]

        def forward_and_backward(micro: MicroBatch) -> dict[str, Tensor]:
            index = learns_at(micro)
            values = whole(self.critic, partial(self.critic.values, micro, index))
            result = value_loss(
                values,
                old_values[micro.tokens][index],
                returns[micro.tokens][index],
                torch.full_like(values, 1.0 / tokens, requires_grad=False),
                clip_range=self.config.value_clip,
            )
            torch.autograd.backward(result.loss)
            return {"sums": torch.stack([result.loss.detach(), result.value_sum, result.clipped])}

        self.optimizer.place_gradients()
        found = self.micro_steps.run(
            packed,
            first,
            last,
            token_budget=packed.token_budget,
            step=forward_and_backward,
            drop_gradients=self.optimizer.drop_gradients,
        )
        sums = torch.zeros(4, device=packed.inputs.device)
        if found:  # a rank may hold no loss token
            sums[:3] = found["sums"]
        self.optimizer.sum_gradients()
        sums[3] = self.optimizer.clip_gradients()
        loss, value, clipped, grad_norm = sums.tolist()
        totals = all_reduce_sums({"loss": loss, "value": value, "clipped": clipped})
        if not tokens or not math.isfinite(totals["loss"]) or not math.isfinite(grad_norm):
            self.optimizer.skip()
            return {}
        self.optimizer.step()
        return totals | {"tokens": tokens, "grad_norm": grad_norm}

    def state_tensors(self) -> dict[str, Tensor]:
        """Trained weights, and the optimizer's state, by names that begin with `critic.`"""
        weights = {}
        for name, parameter in self._trained().items():
            tensor = assembled(own_piece(parameter), parameter)
            if not is_sharded(self.critic):
                weights[f"critic.weights.{name}"] = tensor
            elif is_main():
                weights[f"critic.weights.{name}"] = tensor.to("cpu", computes_in(self.critic, name, parameter))
        return weights | {f"critic.{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave."""
        own = {name.removeprefix("critic."): t for name, t in tensors.items() if name.startswith("critic.")}
        weights = {name.removeprefix("weights."): own.pop(name) for name in list(own) if name.startswith("weights.")}
        trained = self._trained()
        if differing := trained.keys() ^ weights.keys():
            raise CheckpointUnusableError(
                f"The checkpoint's critic and this run's differ in a weight {min(differing)!r}; use another checkpoint."
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                if parameter.shape != weights[name].shape:
                    raise CheckpointUnusableError(
                        f"The checkpoint's critic weight {name!r} is {list(weights[name].shape)}, this run's "
                        f"{list(parameter.shape)}; use another checkpoint."
                    )
                own_piece(parameter).copy_(piece_of(weights[name], parameter))
        self.optimizer.load_state_tensors(own)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.critic.named_parameters() if parameter.requires_grad}


def _explained_variance(batch: TrainBatch) -> dict[str, float]:
    """Share of the returns' variance, over all ranks, that the values of the rollout had foreseen: 1 all, 0 none."""
    packed = batch.scored.packed
    assert batch.returns is not None and batch.scored.old_values is not None
    returns = batch.returns[packed.loss_index].double()
    errors = returns - batch.scored.old_values[packed.loss_index].double()
    totals = all_reduce_sums({"count": len(returns), "returns": float(returns.sum()), "errors": float(errors.sum())})
    means = {name: totals[name] / max(totals["count"], 1.0) for name in ("returns", "errors")}
    squares = all_reduce_sums(
        {
            "returns": float((returns - means["returns"]).square().sum()),
            "errors": float((errors - means["errors"]).square().sum()),
        }
    )
    if totals["count"] < 2 or not squares["returns"]:
        return {}
    return {"critic/explained_variance": 1.0 - squares["errors"] / squares["returns"]}
