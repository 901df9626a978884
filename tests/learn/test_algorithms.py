from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch

from zs_fast.config import AlgorithmConfig
from zs_fast.learn.algorithms import ALGORITHMS, credit
from zs_fast.learn.batch import ScoredBatch, TrainBatch
from zs_fast.learn.pack import pack
from zs_fast.types import Group, StopReason


def credited(groups: list[Group], name: str, **options) -> TrainBatch:  # type: ignore[no-untyped-def]
    config = AlgorithmConfig(name=name, **options)
    packed = pack(groups, token_budget=1000, mask=config.mask_stop_reasons)
    values = torch.zeros(packed.num_tokens)
    return credit(ScoredBatch(packed=packed, old_logprobs=None, ref_logprobs=None, old_values=values), config)


def test_the_table_has_a_row_for_every_name_a_recipe_may_give() -> None:
    assert set(ALGORITHMS) == set(AlgorithmConfig.model_fields["name"].annotation.__args__)


def test_grpo_by_hand(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    group = make_group([make_trajectory([1, 2], [([3, 4], [5]), ([6], [])], reward=r) for r in (1.0, 0.0, 0.0)])
    batch = credited([group], "grpo")
    assert batch.sequence_advantages.tolist() == pytest.approx([2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5], rel=1e-5)
    # inputs are 1 2 3 4 5: targets 2 (prompt), 3 4 (policy), 5 (document), 6 (policy)
    first = batch.advantages[:5].tolist()
    assert first == pytest.approx([0.0, 1.1547, 1.1547, 0.0, 1.1547], rel=1e-4)
    assert batch.dead_groups.tolist() == [False]


def test_grpo_equals_the_plain_formula(make_groups) -> None:  # type: ignore[no-untyped-def]
    groups = make_groups(5, 3)
    got = iter(credited(groups, "grpo", advantage_eps=1e-4).sequence_advantages.tolist())
    for group in groups:
        rewards = [trajectory.reward for trajectory in group.trajectories]
        for reward in rewards:
            expected = (reward - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-4)
            assert next(got) == pytest.approx(expected, rel=1e-5)


def test_reinforce_is_the_raw_reward_on_policy_tokens(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    groups = [
        make_group([make_trajectory([1], [([2], [3]), ([4], [])], reward=0.25), make_trajectory([1], [([5], [])])]),
        make_group([make_trajectory([1], [([5], [])], reward=0.0)]),
    ]
    batch = credited(groups, "reinforce")
    assert batch.advantages.tolist() == [0.25, 0.0, 0.25, 0.0, 0.0]
    assert batch.dead_groups.tolist() == [False, True]


@pytest.mark.parametrize("name", ["grpo", "reinforce"])
def test_untrainable_trajectories_take_no_part(make_trajectory, make_group, name: str) -> None:  # type: ignore[no-untyped-def]
    kept = [make_trajectory([1], [([2], [])], reward=r) for r in (1.0, 0.0)]
    failed = make_trajectory([1], [([3], [])], reward=7.0, trainable=False)
    cut = make_trajectory([1], [([4], [])], reward=5.0, stop_reason=StopReason.TURN_LIMIT)
    with_them = credited([make_group([kept[0], failed, cut, kept[1]])], name, mask_stop_reasons=("turn_limit",))
    without = credited([make_group(kept)], name)
    assert with_them.sequence_advantages[[1, 2]].tolist() == [0.0, 0.0]
    assert torch.equal(with_them.sequence_advantages[[0, 3]], without.sequence_advantages)
    assert torch.equal(with_them.advantages, without.advantages)


def test_groups_without_signal_are_exactly_zero_and_counted(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    def group(*rewards: float) -> Group:
        return make_group([make_trajectory([1], [([2], [])], reward=reward) for reward in rewards])

    batch = credited([group(0.1, 0.1, 0.1), group(0.5), group(0.0, 1.0)], "grpo")
    assert batch.sequence_advantages[:4].tolist() == [0.0] * 4
    assert (batch.sequence_advantages[4:] != 0).all()
    assert batch.dead_groups.tolist() == [True, True, False]


def test_two_questions_with_the_same_id_are_two_groups(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    def group(*rewards: float) -> Group:
        return make_group([make_trajectory([1], [([2], [])], reward=r, question_id="train_0") for r in rewards])

    batch = credited([group(1.0, 1.0), group(0.0, 0.0)], "grpo")
    assert batch.sequence_advantages.tolist() == [0.0] * 4  # as one group they would be +-0.87


def test_a_zero_length_response_gives_its_reward_to_nobody(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    spoken = make_trajectory([1], [([2], [])], reward=0.0)
    silent = make_trajectory([1], [([], [])], reward=1.0)
    batch = credited([make_group([silent, spoken, silent])], "reinforce")
    assert batch.advantages.tolist() == [0.0]
    assert batch.scored.packed.rewards.tolist() == [1.0, 0.0, 1.0]


def test_packing_and_crediting_must_agree_on_what_is_masked(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    packed = pack([make_group([make_trajectory([1], [([2], [])], stop_reason=StopReason.TURN_LIMIT)])], token_budget=9)
    scored = ScoredBatch(packed=packed, old_logprobs=None, ref_logprobs=None)
    with pytest.raises(ValueError, match=r"turn_limit.*pack\(mask"):
        credit(scored, AlgorithmConfig(mask_stop_reasons=("turn_limit",)))


def test_nothing_played() -> None:
    batch = credited([], "grpo")
    assert batch.advantages.shape == batch.sequence_advantages.shape == batch.dead_groups.shape == (0,)


# Two groups of two trajectories; the first writes two tokens around a document, the others one token each.
BY_HAND = {
    # name: advantages at the loss tokens of trajectories with rewards 1, 0 | 0.5, 0.5
    "reinforce": [1, 1, 0, 0.5, 0.5],
    "dr_grpo": [0.5, 0.5, -0.5, 0, 0],
    "rloo": [1, 1, -1, 0, 0],
    "grpo": [2**-0.5, 2**-0.5, -(2**-0.5), 0, 0],
    # returns 1 1 0 .5 .5: mean .6, unbiased variance .175
    "reinforce++": [(x - 0.6) / 0.175**0.5 for x in (1, 1, 0, 0.5, 0.5)],
    # centred .5 .5 -.5 0 0: mean .1, unbiased variance .175
    "reinforce++-baseline": [(x - 0.1) / 0.175**0.5 for x in (0.5, 0.5, -0.5, 0, 0)],
}
BY_HAND["ppo"] = BY_HAND["reinforce++"]  # with a critic that says 0
SAME_ADVANTAGES = {"dapo": "grpo", "gspo": "grpo", "cispo": "grpo"}


def two_groups(make_trajectory, make_group) -> list[Group]:  # type: ignore[no-untyped-def]
    two_turns = [([3], [5]), ([6], [])]
    return [
        make_group([make_trajectory([1], two_turns, reward=1.0), make_trajectory([1], [([2], [])], reward=0.0)]),
        make_group([make_trajectory([1], [([2], [])], reward=0.5) for _ in range(2)]),
    ]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_each_algorithm_by_hand(make_trajectory, make_group, name: str) -> None:  # type: ignore[no-untyped-def]
    batch = credited(two_groups(make_trajectory, make_group), name, kl_coefficient=0.0)
    at_loss_tokens = batch.advantages[batch.scored.packed.loss_index].tolist()
    assert at_loss_tokens == pytest.approx(BY_HAND[SAME_ADVANTAGES.get(name, name)], abs=2e-6)
    assert not batch.advantages[~batch.scored.packed.loss_mask].any()
    dead = [False, name not in ("reinforce", "reinforce++", "ppo")]
    assert batch.dead_groups.tolist() == dead


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_better_trajectory_never_gets_less(make_groups, name: str) -> None:  # type: ignore[no-untyped-def]
    """Inside a group advantages rise with rewards; raising one reward raises its own advantage against the others'."""
    groups = make_groups(4, 4)
    batch = credited(groups, name, kl_coefficient=0.0)
    for number, group in enumerate(groups):
        rewards = torch.tensor([t.reward for t in group.trajectories])
        advantages = batch.sequence_advantages[batch.scored.packed.group == number]
        assert (advantages[rewards.argsort()].diff() > 0).all()


def test_overlong_answers_cost_up_to_one(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    lengths = [2, 4, 5, 8, 9]
    group = make_group([make_trajectory([1], [([2] * n, [])], reward=1.0) for n in lengths])
    batch = credited([group], "reinforce", overlong_limit=4, overlong_buffer=4)
    assert batch.sequence_advantages.tolist() == [1.0, 1.0, 0.75, 0.0, 0.0]


def test_kl_in_the_reward_counts_from_each_token_on(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    packed = pack(two_groups(make_trajectory, make_group), token_budget=1000)
    # inputs 1 3 5 | 1 | 1 | 1, loss tokens at 0, 2, 3, 4, 5
    old = torch.tensor([-1.0, 0.0, -2.0, -1.0, -1.0, -1.0])
    reference = torch.tensor([-1.5, torch.nan, -1.0, -1.0, -1.0, -1.0])  # k1: 0.5, -1, 0, 0, 0
    scored = ScoredBatch(packed=packed, old_logprobs=old, ref_logprobs=reference)
    config = AlgorithmConfig(name="reinforce++", kl_coefficient=0.1)
    returns = torch.tensor([1.0 - 0.05 + 0.1, 1.0 + 0.1, 0.0, 0.5, 0.5], dtype=torch.float64)
    expected = (returns - returns.mean()) / returns.std()
    got = credit(scored, config).advantages[packed.loss_index]
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    summed = credit(scored, config.model_copy(update={"name": "reinforce"})).advantages[packed.loss_index]
    assert summed.tolist() == pytest.approx([1.05, 1.05, 0.0, 0.5, 0.5])  # -0.1 * (0.5 - 1)


def test_kl_in_the_reward_asks_for_the_scores_it_needs(make_groups) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="old_logprobs=True and a reference"):
        credited(make_groups(2, 2), "rloo", kl_coefficient=0.1)
    credited(make_groups(2, 2), "rloo", kl_coefficient=0.0)


def test_a_name_sets_what_its_paper_has_and_given_keys_win() -> None:
    assert AlgorithmConfig(name="dapo").clip_high == 0.28
    assert AlgorithmConfig(name="dapo", clip_high=0.2).clip_high == 0.2
    assert AlgorithmConfig(name="gspo").policy_loss == "gspo"
    config = AlgorithmConfig(name="reinforce++")
    assert (config.kl_in, config.kl_estimator) == ("reward", "k1")
    assert AlgorithmConfig(**config.model_dump()) == config


def test_ppo_against_a_critic_by_hand(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    """Two tokens around a document, then rewards 1: what stands between the two tokens is skipped, NaN or not."""
    packed = pack([make_group([make_trajectory([1], [([3], [5]), ([6], [])], reward=1.0)])], token_budget=99)
    values = torch.tensor([0.2, torch.nan, 0.5])
    scored = ScoredBatch(packed=packed, old_logprobs=None, ref_logprobs=None, old_values=values)
    batch = credit(scored, AlgorithmConfig(name="ppo", kl_coefficient=0.0, gamma=0.9, gae_lambda=0.8))
    last = 1.0 - 0.5
    first = 0.9 * 0.5 - 0.2 + 0.9 * 0.8 * last
    assert batch.returns[packed.loss_index].tolist() == pytest.approx([first + 0.2, last + 0.5])
    mean, spread = (first + last) / 2, abs(first - last) / 2**0.5
    got = batch.advantages[packed.loss_index].tolist()
    assert got == pytest.approx([(first - mean) / spread, (last - mean) / spread], rel=1e-4)
    decoupled = credit(
        scored, AlgorithmConfig(name="ppo", kl_coefficient=0.0, gamma=0.9, gae_lambda=0.8, critic_gae_lambda=1.0)
    )
    assert torch.equal(decoupled.advantages, batch.advantages), "the policy's own lambda is the policy's alone"
    assert decoupled.returns[packed.loss_index].tolist() == pytest.approx([0.9, 1.0])
    with pytest.raises(ValueError, match=r"roles\.critic"):
        credit(replace(scored, old_values=None), AlgorithmConfig(name="ppo", kl_coefficient=0.0))
