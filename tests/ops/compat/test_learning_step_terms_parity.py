"""The learning step's other terms against verl 0.9.1's own functions: every aggregation, every KL in loss and reward,
importance weights against the sampler, the critic's loss. Ragged trajectories with documents, as in
test_learning_step_parity.py."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from tests.ops.compat.test_learning_step_parity import Rectangle, played
from zs_fast.config import AlgorithmConfig, CriticConfig, TrainConfig
from zs_fast.learn.algorithms import credit
from zs_fast.learn.batch import ScoredBatch
from zs_fast.learn.critic import Critic, CriticUpdater
from zs_fast.learn.losses import MiniBatchSize, micro_batch_loss
from zs_fast.learn.pack import pack
from zs_fast.learn.policy import hidden_states, logprobs_at_loss_tokens
from zs_fast.testing import tiny_model

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
LONGEST = 99


class Case:
    """A batch whose old, reference and sampler's log-probabilities lie around those of a tiny model."""

    def __init__(self, seed: int = 7) -> None:
        self.packed = pack(played(seed), token_budget=10_000)
        self.model = tiny_model("llama").model
        (self.micro,) = self.packed.micro_batches(10_000)
        self.logprobs = logprobs_at_loss_tokens(self.model, self.micro, temperature=1.0).logprobs
        generator = torch.Generator().manual_seed(0)
        old, reference, sampler = (
            self.column(self.logprobs.detach() + 0.3 * torch.randn(len(self.logprobs), generator=generator))
            for _ in range(3)
        )
        self.packed = replace(self.packed, rollout_logprobs=sampler)
        self.scored = ScoredBatch(packed=self.packed, old_logprobs=old, ref_logprobs=reference)
        self.rectangle = Rectangle(self.packed)

    def column(self, at_loss_tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.packed.num_tokens).index_copy(0, self.packed.loss_index, at_loss_tokens)

    def ours(self, config: AlgorithmConfig):
        """(loss, its gradient, the credited batch)"""
        batch = credit(self.scored, config)
        size = MiniBatchSize(
            loss_tokens=self.packed.num_loss_tokens, sequences=self.packed.num_sequences, longest=LONGEST
        )
        loss, _ = micro_batch_loss(self.model, self.micro, batch, config, size, temperature=1.0)
        return loss.detach(), self.gradient(loss), batch

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, tuple(self.model.parameters()), retain_graph=True)]
        )

    def theirs(self, verl, batch, mode: str, *, weights=None):
        """verl's clipped policy loss of the same numbers, to which terms can be added."""
        actor = verl.ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=3.0, loss_scale_factor=LONGEST
        )
        actor.global_batch_info["loss_scale_factor"] = LONGEST
        of = self.rectangle.of
        loss, _ = verl.core.compute_policy_loss_vanilla(
            of(self.scored.old_logprobs), of(self.column(self.logprobs)), of(batch.advantages), self.rectangle.mask,
            mode, actor, weights,
        )  # fmt: skip
        return loss


def assert_same(case: Case, loss, gradient, expected) -> None:
    found = case.gradient(expected)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=3e-5, abs=2e-6)
    assert float(found.norm()) > 0
    assert float((gradient - found).norm()) <= 3e-5 * float(found.norm())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_are_verls(verl, aggregation):
    case = Case()
    loss, gradient, batch = case.ours(
        AlgorithmConfig(name="grpo", kl_coefficient=0.0, dual_clip=3.0, aggregation=aggregation)
    )
    assert_same(case, loss, gradient, case.theirs(verl, batch, aggregation))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k1+", "k3+"])
def test_the_kl_in_the_loss_is_verls(verl, estimator, aggregation):
    case = Case()
    config = AlgorithmConfig(
        name="grpo", kl_coefficient=0.7, kl_estimator=estimator, dual_clip=3.0, aggregation=aggregation
    )
    loss, gradient, batch = case.ours(config)
    of = case.rectangle.of
    kl = verl.core.kl_penalty(of(case.column(case.logprobs)), of(case.scored.ref_logprobs), estimator)
    term = verl.core.agg_loss(kl, case.rectangle.mask, aggregation)
    assert float(case.gradient(term).norm()) > 1e-3
    assert_same(case, loss, gradient, case.theirs(verl, batch, aggregation) + 0.7 * term)


@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo", "reinforce++"])
def test_the_kl_in_the_reward_is_verls(verl, name):
    case = Case()
    r, packed = case.rectangle, case.packed
    kl = verl.core.kl_penalty(r.of(case.scored.old_logprobs), r.of(case.scored.ref_logprobs), "kl") * r.mask
    rewards = r.rewards() - 0.4 * kl
    values = torch.randn(packed.num_tokens, generator=torch.Generator().manual_seed(1))
    theirs = {
        "ppo": lambda: verl.core.compute_gae_advantage_return(
            rewards, r.of(values), r.mask, torch.tensor(0.95), torch.tensor(0.9)
        ),
        "grpo": lambda: verl.core.compute_grpo_outcome_advantage(rewards, r.mask, r.index()),
        "rloo": lambda: verl.core.compute_rloo_outcome_advantage(rewards, r.mask, r.index()),
        "reinforce++": lambda: verl.core.compute_reinforce_plus_plus_outcome_advantage(
            rewards, r.mask, config=type("Config", (), {"gamma": 1.0})
        ),
    }[name]()
    config = AlgorithmConfig(
        name=name, kl_in="reward", kl_estimator="k1", kl_coefficient=0.4, gamma=0.95, gae_lambda=0.9
    )
    batch = credit(replace(case.scored, old_values=values), config)
    found, without = (
        credit(replace(case.scored, old_values=values), c).advantages[packed.loss_index]
        for c in (config, config.model_copy(update={"kl_coefficient": 0.0}))
    )
    torch.testing.assert_close(found, r.at_loss_tokens(theirs[0]), rtol=2e-4, atol=2e-5)
    assert not torch.allclose(found, without, atol=1e-2)
    if name == "ppo":
        returns = batch.returns[packed.loss_index]
        torch.testing.assert_close(returns, r.at_loss_tokens(theirs[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode, threshold", [("truncate", 1.2), ("mask", "0.8_1.2")])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_corrections_against_the_sampler_are_verls(verl, level, mode, threshold):
    helper = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
    case = Case()
    config = AlgorithmConfig(
        name="grpo", kl_coefficient=0.0, dual_clip=3.0, correction=level, correction_mode=mode, correction_low=0.8,
        correction_high=1.2,
    )  # fmt: skip
    loss, gradient, batch = case.ours(config)
    r = case.rectangle
    weights, _ = helper.compute_rollout_correction_weights(
        r.of(case.scored.old_logprobs) - r.of(case.packed.rollout_logprobs), r.mask, level, threshold
    )
    at_tokens = r.at_loss_tokens(weights)
    bound = float(at_tokens.max()) == pytest.approx(1.2) if mode == "truncate" else float(at_tokens.min()) == 0.0
    assert bound and at_tokens.unique().numel() >= 2, "some weights are cut and some are not"
    assert_same(case, loss, gradient, case.theirs(verl, batch, "token-mean", weights=weights))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_the_entropy_bonus_is_verls(verl, aggregation):
    case = Case()
    config = AlgorithmConfig(
        name="grpo", kl_coefficient=0.0, dual_clip=3.0, entropy_coefficient=0.3, aggregation=aggregation
    )
    loss, gradient, batch = case.ours(config)
    hidden = hidden_states(case.model, case.micro, torch.arange(case.micro.cu_seqlens[-1]))
    logits = case.model.get_output_embeddings()(hidden).float()
    padded = torch.zeros(*case.rectangle.mask.shape, logits.shape[-1])
    for number, row in enumerate(case.rectangle.rows):
        padded[number, : len(row)] = logits[row]
    entropy = verl.core.compute_entropy_loss(padded, case.rectangle.mask, aggregation)
    assert_same(case, loss, gradient, case.theirs(verl, batch, aggregation) - 0.3 * entropy)


def test_the_critics_loss_is_verls(verl):
    case = Case()
    r = case.rectangle
    critic = Critic(tiny_model("llama", seed=2))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        critic.value_head.weight.normal_(std=0.3, generator=generator)
    values = critic.values(case.micro)
    old = case.column(values.detach() + 0.5 * torch.randn(len(values), generator=generator))
    scored = replace(case.scored, old_values=old)
    batch = credit(scored, AlgorithmConfig(name="ppo", kl_coefficient=0.0))
    expected, clipped = verl.core.compute_value_loss(
        r.of(case.column(values)), r.of(batch.returns), r.of(old), r.mask, 0.2
    )
    assert 0.0 < float(clipped) < 1.0
    parameters = [p for p in critic.parameters() if p.requires_grad]
    norm = torch.cat(
        [g.flatten() for g in torch.autograd.grad(expected, parameters, allow_unused=True) if g is not None]
    )
    updater = CriticUpdater(critic, CriticConfig(value_clip=0.2), TrainConfig(max_grad_norm=1e9), total_steps=1)
    metrics = updater.update(batch)
    assert metrics["critic/loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert metrics["critic/clipped_share"] == pytest.approx(float(clipped), abs=1e-6)
    assert metrics["critic/grad_norm"] == pytest.approx(float(norm.norm()), rel=1e-4)
