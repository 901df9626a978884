"""One optimizer step of each algorithm: what was rewarded becomes likelier, what was punished less likely; and each KL
that has a gradient pulls back to the reference, in the loss and in the reward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from zs_fast.config import ALGORITHM_DEFAULTS, AlgorithmConfig, TrainConfig
from zs_fast.learn.algorithms import credit
from zs_fast.learn.critic import Critic
from zs_fast.learn.pack import pack
from zs_fast.learn.policy import hidden_states
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.testing import tiny_model

SHAPE = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}
NAMES = sorted(ALGORITHM_DEFAULTS)


def make_roles(name: str) -> Roles:
    """The reference differs from the policy by some percent in every weight, so that no estimate is clamped."""
    policy, frozen = tiny_model(seed=0, **SHAPE), tiny_model(seed=0, **SHAPE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in frozen.model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    critic = Critic(tiny_model(seed=2, **SHAPE)) if name == "ppo" else None
    return Roles(policy=policy, reference=frozen, critic=critic, temperature=1.0)


def step(roles: Roles, groups, algorithm: AlgorithmConfig, *, learning_rate: float = 1e-3):
    """(change of each loss token's log-probability, the batch) of one optimizer step."""
    train = TrainConfig(learning_rate=learning_rate, weight_decay=0.0)
    updater = Updater(roles, train, algorithm, total_steps=1, longest=16)
    packed = pack(groups, token_budget=99)
    before = roles.logprobs("policy", packed)
    batch = credit(score(packed, roles, **updater.needs), algorithm)
    updater.update(batch)
    return (roles.logprobs("policy", packed) - before)[packed.loss_index], batch


@pytest.mark.parametrize("policy_loss", [None, "ppo", "gspo", "cispo", "reinforce"])
@pytest.mark.parametrize("name", NAMES)
def test_one_step_raises_what_was_rewarded_and_lowers_what_was_punished(make_trajectory, make_group, name, policy_loss):
    good = make_trajectory([1, 2], [([30, 31], [9]), ([32], [])], reward=1.0)
    bad = make_trajectory([1, 2], [([40, 41], [9]), ([42], [])], reward=-1.0)
    given = {} if policy_loss is None else {"policy_loss": policy_loss}
    algorithm = AlgorithmConfig(name=name, kl_coefficient=0.0, **given)
    moved, _ = step(make_roles(name), [make_group([good, bad])], algorithm)
    assert (moved[:3] > 0).all() and (moved[3:] < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_document_between_two_turns_is_not_learnt(make_trajectory, make_group, name):
    """Documents get no gradient of their own: another one as a target changes no weight, as long as it is not read."""
    final = []
    for document in (9, 77):
        good = make_trajectory([1], [([30], [document])], reward=1.0)  # nothing follows: it is never an input
        bad = make_trajectory([1], [([40], [])], reward=-1.0)
        roles = make_roles(name)
        step(roles, [make_group([good, bad])], AlgorithmConfig(name=name, kl_coefficient=0.0))
        final.append([parameter.detach().clone() for parameter in roles.policy.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*final, strict=True))


def divergence(roles: Roles, groups) -> float:
    """Mean over loss tokens of KL(policy || reference) over the whole vocabulary."""
    (micro,) = pack(groups, token_budget=10_000).micro_batches(10_000)
    with torch.no_grad():
        rows = []
        for loaded in (roles.policy, roles.reference):
            hidden = hidden_states(loaded.model, micro, micro.loss_index)
            rows.append(torch.log_softmax(loaded.model.get_output_embeddings()(hidden).float(), -1))
    return float((rows[0].exp() * (rows[0] - rows[1])).sum(-1).mean())


def sampled(roles: Roles, make_trajectory, make_group, *, groups: int = 8, size: int = 4):
    """Groups of one token each, drawn from the policy itself; all rewards are the same."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(groups):
        prompt = [number + 1, 2 * number + 5]
        (micro,) = pack([make_group([make_trajectory(prompt, [([0], [])])])], token_budget=99).micro_batches(99)
        with torch.no_grad():
            hidden = hidden_states(roles.policy.model, micro, micro.loss_index)
            probabilities = roles.policy.model.get_output_embeddings()(hidden).float().softmax(-1)[0]
        tokens = torch.multinomial(probabilities, size, replacement=True, generator=generator).tolist()
        made.append(
            make_group([make_trajectory(prompt, [([t], [])], reward=0.5, question_id=f"q{number}") for t in tokens])
        )
    return made


@pytest.mark.parametrize("estimator", ["k2", "k3", "k1+", "k3+", "full"])
def test_each_kl_in_the_loss_pulls_back(make_trajectory, make_group, estimator):
    roles = make_roles("grpo")
    groups = sampled(roles, make_trajectory, make_group)
    before = divergence(roles, groups)
    algorithm = AlgorithmConfig(name="grpo", kl_coefficient=1.0, kl_estimator=estimator)
    for _ in range(3):
        step(roles, groups, algorithm, learning_rate=3e-3)
    assert divergence(roles, groups) < 0.95 * before


@pytest.mark.parametrize("name", NAMES)
def test_the_kl_in_the_reward_pulls_back(make_trajectory, make_group, name):
    """All rewards are equal, so that the KL alone tells the trajectories apart: where the policy says more than the
    reference it loses, where it says less it gains."""
    roles = make_roles(name)
    groups = sampled(roles, make_trajectory, make_group)
    algorithm = AlgorithmConfig(name=name, kl_in="reward", kl_estimator="k1", kl_coefficient=1.0)
    if name == "reinforce":  # no baseline: a reward of 0 leaves the KL alone
        groups = [replace(g, trajectories=tuple(replace(t, reward=0.0) for t in g.trajectories)) for g in groups]
    moved, batch = step(roles, groups, algorithm)
    scored, index = batch.scored, batch.scored.packed.loss_index
    k1 = (scored.old_logprobs - scored.ref_logprobs)[index]
    if name not in ("reinforce", "reinforce++", "ppo"):  # against the group
        k1 = k1.view(8, 4) - k1.view(8, 4).mean(1, keepdim=True)
    elif name != "reinforce":
        k1 = k1 - k1.mean()
    assert k1.abs().max() > 1e-3
    assert float((moved * k1.flatten()).sum()) < 0.0


@pytest.mark.parametrize("name", ["ppo", "rloo", "reinforce++"])
def test_the_kl_in_the_reward_can_take_the_samplers_logprobs(make_groups, name):
    """`old_logprobs = "sampler"`: no scoring pass, and the KL is that of the distribution that was sampled from."""
    roles, groups = make_roles(name), make_groups(2, 3)
    algorithm = AlgorithmConfig(name=name, kl_coefficient=0.1, old_logprobs="sampler")
    updater = Updater(roles, TrainConfig(mini_batches=2), algorithm, total_steps=1)
    scored = score(pack(groups, token_budget=99), roles, **updater.needs)
    assert scored.old_logprobs is None
    batch = credit(scored, algorithm)
    as_trainer = replace(scored, old_logprobs=scored.packed.rollout_logprobs)
    expected = credit(as_trainer, algorithm.model_copy(update={"old_logprobs": "trainer"}))
    assert torch.equal(batch.advantages, expected.advantages) and batch.advantages.isfinite().all()
    values = updater.update(batch).values
    assert values["update/optimizer_steps"] == 2 and values["ratio/mean"] != 1.0
