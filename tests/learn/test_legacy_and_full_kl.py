"""The KL over whole distributions, and the named faults of the released code: each moves what it says it moves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from zs_fast.config import AlgorithmConfig, CriticConfig, TrainConfig
from zs_fast.learn.algorithms import credit
from zs_fast.learn.batch import ScoredBatch
from zs_fast.learn.critic import Critic
from zs_fast.learn.losses import MiniBatchSize, micro_batch_loss
from zs_fast.learn.pack import pack
from zs_fast.learn.policy import hidden_states
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.testing import tiny_model


def make_roles(**options) -> Roles:
    return Roles(policy=tiny_model("llama", seed=0), reference=tiny_model("llama", seed=1), temperature=0.7, **options)


def loss_of(roles: Roles, groups, config: AlgorithmConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    packed = pack(groups, token_budget=10_000)
    batch = credit(score(packed, roles, old_logprobs=True, ref_logprobs=config.kl_estimator != "full"), config)
    (micro,) = packed.micro_batches(10_000)
    size = MiniBatchSize(loss_tokens=packed.num_loss_tokens, sequences=packed.num_sequences, longest=16)
    reference = roles.reference.model if roles.reference is not None else None
    return micro_batch_loss(
        roles.policy.model, micro, batch, config, size, temperature=roles.temperature, reference=reference
    )


def gradients(roles: Roles, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuple(roles.policy.model.parameters()))])


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_the_full_kl_is_torchs_own(make_groups, name):
    roles, groups = make_roles(), make_groups(2, 3)
    options = {"name": name, "entropy_coefficient": 0.0}
    with_kl, sums = loss_of(roles, groups, AlgorithmConfig(kl_coefficient=0.3, kl_estimator="full", **options))
    without, _ = loss_of(roles, groups, AlgorithmConfig(kl_coefficient=0.0, **options))
    packed = pack(groups, token_budget=10_000)
    (micro,) = packed.micro_batches(10_000)
    logits = []
    for loaded in (roles.policy, roles.reference):
        hidden = hidden_states(loaded.model, micro, micro.loss_index)
        logits.append(torch.log_softmax(loaded.model.get_output_embeddings()(hidden).float() / 0.7, -1))
    kl = (logits[0].exp() * (logits[0] - logits[1].detach())).sum(-1)
    assert float(kl.detach().min()) > 0
    assert float(sums["kl"]) == pytest.approx(float(kl.sum().detach()), rel=1e-5)
    weighted = kl.mean() if name == "grpo" else sequence_mean(kl, micro)
    assert float((with_kl - without).detach()) == pytest.approx(0.3 * float(weighted.detach()), rel=1e-4)
    expected = gradients(roles, 0.3 * weighted)
    found = gradients(roles, with_kl) - gradients(roles, without)
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


def sequence_mean(values: torch.Tensor, micro) -> torch.Tensor:
    bounds = micro.loss_cu_seqlens
    return torch.stack([values[a:b].mean() for a, b in pairwise(bounds)]).mean()


def test_a_run_with_the_full_kl_scores_no_reference_first(make_groups):
    roles, groups = make_roles(), make_groups(2, 2)
    config = AlgorithmConfig(kl_coefficient=0.5, kl_estimator="full")
    updater = Updater(roles, TrainConfig(learning_rate=1e-3), config, total_steps=8)
    kls = []
    for _ in range(8):
        scored = score(pack(groups, token_budget=64), roles, **updater.needs)
        assert scored.ref_logprobs is None
        kls.append(updater.update(credit(scored, config)).values["kl/reference"])
    assert kls[-1] < 0.9 * kls[0], "it pulls towards the reference"


def test_the_released_codes_kl_pushes_away(make_groups):
    roles, groups = make_roles(), make_groups(2, 3)
    for estimator in ("k1", "k2", "k3"):
        options = {"kl_estimator": estimator}
        none, _ = loss_of(roles, groups, AlgorithmConfig(kl_coefficient=0.0, **options))
        ours, sums = loss_of(roles, groups, AlgorithmConfig(kl_coefficient=0.2, **options))
        theirs, their_sums = loss_of(roles, groups, AlgorithmConfig(kl_coefficient=0.2, legacy="zerosearch", **options))
        assert float((ours - none).detach()) == pytest.approx(-float((theirs - none).detach()), rel=1e-3)
        assert float(their_sums["kl"]) == pytest.approx(float(sums["kl"]), rel=1e-5)
        without, ours_grad, theirs_grad = (gradients(roles, loss) for loss in (none, ours, theirs))
        pull, push = ours_grad - without, theirs_grad - without
        assert float((pull + push).norm()) <= 1e-3 * float(pull.norm())


def test_response_tokens_run_from_the_first_written_one_to_the_last(make_group, make_trajectory):
    group = make_group([make_trajectory([1, 2, 3], [([4, 5], [6, 7]), ([8], [])]), make_trajectory([1], [([2], [])])])
    silent = make_group(
        [make_trajectory([1, 2], [([3], [])], trainable=False), make_trajectory([9, 9], [([3, 4], [])])]
    )
    packed = pack([group, silent], token_budget=99)
    # inputs 1 2 3 4 5 6 7 | 1 | | 9 9 3, targets 2 3 4 5 6 7 8 | 2 | | 9 3 4
    assert packed.targets[packed.response_mask()].tolist() == [4, 5, 6, 7, 8, 2, 3, 4]
    for first, last in ((0, 4), (0, 1), (1, 4), (3, 4)):
        micro = packed.view(first, last)
        assert torch.equal(packed.response_mask()[micro.tokens].nonzero().squeeze(1), micro.response_index())


def test_legacy_ppo_runs_through_the_documents(make_group, make_trajectory):
    group = make_group([make_trajectory([1], [([3], [5, 6]), ([7], [])], reward=1.0)])
    packed = pack([group], token_budget=99)
    values = torch.tensor([0.1, 0.5, -0.3, 0.2])
    scored = ScoredBatch(packed=packed, old_logprobs=None, ref_logprobs=None, old_values=values)
    config = AlgorithmConfig(name="ppo", kl_coefficient=0.0, gamma=0.9, gae_lambda=0.8, legacy="zerosearch")
    batch = credit(scored, config)
    raw, following = [], 0.0
    for reward, value, after in zip((1.0, 0, 0, 0), (0.2, -0.3, 0.5, 0.1), (0.0, 0.2, -0.3, 0.5), strict=True):
        following = reward + 0.9 * after - value + 0.72 * following
        raw.insert(0, following)
    advantages = torch.tensor(raw, dtype=torch.float64)
    assert batch.returns.tolist() == pytest.approx((advantages + values.double()).tolist(), abs=1e-6)
    whitened = (advantages - advantages.mean()) / advantages.std()
    assert batch.advantages.tolist() == pytest.approx([float(whitened[0]), 0, 0, float(whitened[3])], rel=1e-4)
    plain = credit(replace(scored), config.model_copy(update={"legacy": "none"}))
    assert not torch.allclose(plain.advantages, batch.advantages, atol=1e-2)


def test_the_legacy_critic_learns_at_document_tokens(make_groups):
    groups = make_groups(2, 2)
    moved = {}
    for legacy in ("none", "zerosearch"):
        critic = Critic(tiny_model(seed=2, hidden_size=16, layers=1, heads=2, kv_heads=1))
        roles = make_roles(critic=critic)
        config = AlgorithmConfig(name="ppo", kl_coefficient=0.0, legacy=legacy)
        updater = Updater(roles, TrainConfig(), config, total_steps=1, critic=CriticConfig(learning_rate=1e-2))
        scored = score(pack(groups, token_budget=64), roles, **updater.needs)
        stats = updater.update(credit(scored, config))
        assert stats.values["critic/loss"] > 0
        moved[legacy] = critic.value_head.weight.detach().clone(), stats.values["critic/loss"]
    assert moved["none"][1] != pytest.approx(moved["zerosearch"][1], rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"name": "rloo", "kl_estimator": "full"}, {"legacy": "zerosearch", "kl_estimator": "full"}]
)
def test_what_goes_with_neither_is_refused(options):
    with pytest.raises(ValidationError, match="full"):
        AlgorithmConfig(**options)
