from __future__ import annotations

import statistics

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
    return credit(ScoredBatch(packed=packed, old_logprobs=None, ref_logprobs=None), config)


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
