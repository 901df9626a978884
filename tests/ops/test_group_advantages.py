from __future__ import annotations

import statistics

import pytest
import torch

from zs_kernels import group_advantages


def advantages(rewards: list[float], groups: list[int], num_groups: int, **options):  # type: ignore[no-untyped-def]
    valid = options.pop("valid", None)
    return group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(groups, dtype=torch.int64),
        num_groups,
        valid=None if valid is None else torch.tensor(valid),
        **options,
    )


def test_hand_values() -> None:
    result = advantages([1.0, 0.0, 0.0, 3.0, 1.0], [0, 0, 0, 1, 1], 2)
    # group 0: mean 1/3, unbiased std sqrt(1/3); group 1: mean 2, unbiased std sqrt(2)
    expected = [2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5, 1 / 2**0.5, -1 / 2**0.5]
    assert result.advantages.tolist() == pytest.approx(expected, rel=1e-5)
    assert result.mean.tolist() == pytest.approx([1 / 3, 2.0])
    assert result.std.tolist() == pytest.approx([3**-0.5, 2**0.5])
    assert result.dead.tolist() == [False, False]


@pytest.mark.parametrize("mode", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_equals_the_formula_on_ragged_interleaved_groups(mode: str, ddof: int) -> None:
    generator = torch.Generator().manual_seed(7)
    groups = torch.randint(0, 9, (64,), generator=generator).tolist()
    rewards = torch.rand(64, generator=generator, dtype=torch.float64).tolist()
    valid = (torch.rand(64, generator=generator) > 0.3).tolist()
    result = advantages(rewards, groups, 9, mode=mode, ddof=ddof, eps=1e-3, valid=valid)
    for s in range(64):
        own = [r for r, g, ok in zip(rewards, groups, valid, strict=True) if g == groups[s] and ok]
        if not valid[s] or len(own) < 2:
            assert result.advantages[s] == 0.0
            continue
        centred = rewards[s] - statistics.fmean(own)
        std = statistics.stdev(own) if ddof else statistics.pstdev(own)
        others = (sum(own) - rewards[s]) / (len(own) - 1)
        expected = {"grpo": centred / (std + 1e-3), "dr_grpo": centred, "rloo": rewards[s] - others}[mode]
        assert float(result.advantages[s]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("mode", ["grpo", "dr_grpo", "rloo"])
def test_dead_groups_are_exactly_zero_and_flagged(mode: str) -> None:
    # equal rewards whose mean isn't exact in binary; a single one; all invalid; an empty group; a live one
    rewards = [0.1] * 3 + [5.0] + [1.0, 2.0] + [0.0, 1.0]
    groups = [0, 0, 0, 1, 2, 2, 4, 4]
    valid = [True] * 4 + [False, False] + [True, True]
    result = advantages(rewards, groups, 5, mode=mode, valid=valid)
    assert result.dead.tolist() == [True, True, True, True, False]
    assert result.advantages[:6].tolist() == [0.0] * 6
    assert (result.advantages[6:] != 0).all()
    assert torch.isfinite(result.mean).all() and torch.isfinite(result.std).all()


def test_an_invalid_trajectory_leaves_its_group_alone_even_with_a_nan_reward() -> None:
    with_it = advantages([1.0, 0.0, float("nan")], [0, 0, 0], 1, valid=[True, True, False])
    without = advantages([1.0, 0.0], [0, 0], 1)
    assert with_it.advantages.tolist() == [*without.advantages.tolist(), 0.0]


def test_close_rewards_far_from_zero_keep_their_digits() -> None:
    result = advantages([1e8, 1e8 + 1.0], [0, 0], 1)
    assert result.advantages.tolist() == pytest.approx([-(2**-0.5), 2**-0.5], rel=1e-5)


def test_no_trajectories() -> None:
    assert advantages([], [], 0).advantages.shape == (0,)


@pytest.mark.parametrize(
    "change, error, word",
    [
        ({"mode": "ppo"}, ValueError, "'mode'"),
        ({"ddof": 2}, ValueError, "'ddof'"),
        ({"eps": 0.0}, ValueError, "'eps'"),
        ({"num_groups": 1}, IndexError, "'groups'"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], word: str) -> None:
    options = {"num_groups": 2} | change
    with pytest.raises(error, match=word):
        advantages([1.0, 0.0], [0, 1], options.pop("num_groups"), **options)
