from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from zs_fast.config import AlgorithmConfig, CriticConfig, TrainConfig
from zs_fast.errors import CheckpointUnusableError
from zs_fast.learn.algorithms import credit
from zs_fast.learn.critic import Critic, CriticUpdater
from zs_fast.learn.pack import pack
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.models.lora import attach_adapter
from zs_fast.testing import tiny_model

PPO = AlgorithmConfig(name="ppo", kl_coefficient=0.0)
SHAPE = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}


def make_critic(seed: int = 2) -> Critic:
    return Critic(tiny_model(seed=seed, **SHAPE))


def make_batch(groups, critic: Critic, token_budget: int = 10_000):  # type: ignore[no-untyped-def]
    roles = Roles(policy=tiny_model(seed=0, **SHAPE), reference=None, critic=critic, temperature=1.0)
    return credit(score(pack(groups, token_budget=token_budget), roles), PPO)


def test_a_new_critic_says_0_everywhere(make_groups) -> None:  # type: ignore[no-untyped-def]
    batch = make_batch(make_groups(2, 2), make_critic())
    assert not batch.scored.old_values.any()
    packed = batch.scored.packed
    expected = packed.rewards[packed.sequence][packed.loss_index]
    torch.testing.assert_close(batch.returns[packed.loss_index].double(), expected, rtol=1e-6, atol=0)


def adapter_critic() -> Critic:
    policy = tiny_model(seed=2, **SHAPE)
    attach_adapter(policy.model, 4)
    return Critic.on_base(policy, 8, seed=3)


@pytest.mark.parametrize("build", [make_critic, adapter_critic])
def test_it_learns_to_foresee_the_reward(build, make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    """Prompts tell how it will end; the value loss falls and most of the returns' variance is explained."""
    groups = [
        make_group([make_trajectory([prompt, 7], [([20 + prompt, 9], [3]), ([8], [])], reward=float(prompt % 2))] * 2)
        for prompt in (1, 2, 3, 4)
    ]
    critic = build()
    updater = CriticUpdater(critic, CriticConfig(learning_rate=3e-2), TrainConfig(), total_steps=40)
    seen = [updater.update(make_batch(groups, critic)) for _ in range(40)]
    assert seen[0]["critic/loss"] == pytest.approx(0.25)  # half the mean squared return, of which half are 1
    assert seen[-1]["critic/loss"] < 0.02
    assert seen[0]["critic/explained_variance"] == pytest.approx(0.0) and seen[-1]["critic/explained_variance"] > 0.8


def test_micro_batches_do_not_change_its_gradient(make_groups) -> None:  # type: ignore[no-untyped-def]
    after = []
    for budget in (1, 10_000):
        critic = make_critic()
        torch.nn.init.normal_(critic.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        updater = CriticUpdater(critic, CriticConfig(), TrainConfig(max_grad_norm=1e9), total_steps=1)
        after.append(updater.update(make_batch(make_groups(2, 3), critic, budget)))
    assert after[0] == pytest.approx(after[1], rel=1e-5)


def test_it_may_pass_over_a_batch_more_often_than_the_policy(make_groups) -> None:  # type: ignore[no-untyped-def]
    critic = make_critic()
    roles = Roles(policy=tiny_model(seed=0, **SHAPE), reference=None, critic=critic, temperature=1.0)
    train, config = TrainConfig(mini_batches=2, epochs=1), CriticConfig(epochs=5, learning_rate=1.0)
    updater = Updater(roles, train, PPO, total_steps=3, critic=config)
    updater.update(credit(score(pack(make_groups(2, 2), token_budget=10_000), roles), PPO))
    assert updater.critic is not None
    assert (updater.optimizer.position, updater.critic.optimizer.position) == (2, 10)
    assert updater.critic.optimizer.schedule.total_steps == 3 * 2 * 5
    assert CriticUpdater(critic, CriticConfig(), TrainConfig(epochs=2), total_steps=1).epochs == 2


@pytest.mark.parametrize("epochs", [None, 3])
def test_resume_is_bit_exact(make_groups, epochs) -> None:  # type: ignore[no-untyped-def]
    def updater() -> Updater:
        roles = Roles(policy=tiny_model(seed=0, **SHAPE), reference=None, critic=make_critic(), temperature=1.0)
        train, critic = TrainConfig(learning_rate=1e-3), CriticConfig(epochs=epochs, warmup_steps=9)
        return Updater(roles, train, PPO, total_steps=4, critic=critic)

    def steps(one: Updater, number: int):  # type: ignore[no-untyped-def]
        packed = pack(make_groups(2, 3), token_budget=10_000)
        return [one.update(credit(score(packed, one.roles), PPO)).values for _ in range(number)]

    straight = updater()
    expected = steps(straight, 4)[2:]
    first = updater()
    steps(first, 2)
    second = updater()
    second.roles.policy.model.load_state_dict(first.roles.policy.model.state_dict())
    second.load_state_tensors({name: t.clone() for name, t in first.state_tensors().items()})
    second.load_state(first.state())
    assert steps(second, 2) == expected


def test_a_checkpoint_without_a_critic_is_named() -> None:
    updater = CriticUpdater(make_critic(), CriticConfig(), TrainConfig(), total_steps=1)
    with pytest.raises(CheckpointUnusableError, match="differ in a weight"):
        updater.load_state_tensors({})


def test_a_number_that_is_not_finite_leaves_it_alone(make_groups) -> None:  # type: ignore[no-untyped-def]
    critic = make_critic()
    batch = make_batch(make_groups(2, 2), critic)
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    returns = torch.full_like(batch.returns, torch.nan)
    updater = CriticUpdater(critic, CriticConfig(), TrainConfig(), total_steps=1)
    assert updater.update(replace(batch, returns=returns))["critic/skipped_steps"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in critic.state_dict().items())
