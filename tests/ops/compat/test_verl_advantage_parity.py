"""zs_kernels.compat.verl's advantages against verl 0.9.1's own: 1e-5 relative, since verl's loops run in float32 and
ours sum in float64 (or scan, on a GPU)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zs_kernels.compat import verl as ours
from zs_kernels.testing import seeded

B, T = 6, 9


def mask(dtype=torch.int64, *, seed=3):
    """Unmasked shares of all sorts; one response is masked throughout, one is full."""
    chosen = seeded(B, T, seed=seed) > -0.3
    chosen[1], chosen[2] = False, True
    return chosen.to(dtype)


def close(found, expected, **keywords):
    torch.testing.assert_close(found, expected, **({"rtol": 2e-6, "atol": 1e-7} | keywords))


GROUPS = np.array(["a", "b", "a", "b", "c", "a"])
GROUPED = (
    "compute_grpo_outcome_advantage",
    "compute_grpo_vectorized_outcome_advantage",
    "compute_rloo_outcome_advantage",
    "compute_rloo_vectorized_outcome_advantage",
    "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "compute_opo_outcome_advantage",
    "compute_gpg_outcome_advantage",
)


def compare_advantages(verl, name, *arguments, **keywords):
    found, expected = (getattr(where, name)(*arguments, **keywords) for where in (ours, verl.core))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and not a.requires_grad
        close(a, b, rtol=1e-5, atol=2e-6)
    assert expected[0].abs().max() > 0.1
    return found


@pytest.mark.parametrize("gamma", [1.0, 0.97])
@pytest.mark.parametrize("lam", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_gae(verl, gamma, lam, dtype):
    """Masked positions included: they carry the next token's advantage, whitened with the rest."""
    arguments = (seeded(B, T, seed=1), seeded(B, T, seed=2), mask(dtype), gamma, lam)
    compare_advantages(verl, "compute_gae_advantage_return", *arguments)
    as_tensors = (*arguments[:3], torch.tensor(gamma), torch.tensor(lam))
    compare_advantages(verl, "compute_gae_advantage_return", *as_tensors)


def test_gae_over_long_responses(verl):
    length = 700
    chosen = (seeded(3, length, seed=3) > 0).long()
    arguments = (seeded(3, length, seed=1), seeded(3, length, seed=2), chosen, 0.999, 0.95)
    compare_advantages(verl, "compute_gae_advantage_return", *arguments)


def test_gae_reads_nothing_of_masked_tokens():
    chosen = mask()
    rewards, values = seeded(B, T, seed=1), seeded(B, T, seed=2)
    clean = ours.compute_gae_advantage_return(rewards, values, chosen, 0.9, 0.9)
    dirty = (x.masked_fill(chosen == 0, torch.nan) for x in (rewards, values))
    advantages, returns = ours.compute_gae_advantage_return(*dirty, chosen, 0.9, 0.9)
    assert torch.equal(advantages, clean[0]) and torch.equal(returns[chosen > 0], clean[1][chosen > 0])


def test_gae_by_hand():
    """Rewards 0, -, 1 with an observation between: V = 0.5, 0.2; gamma 0.5, lambda 0.5."""
    rewards, values = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.2]])
    _, returns = ours.compute_gae_advantage_return(rewards, values, torch.tensor([[1, 0, 1]]), 0.5, 0.5)
    last = 1.0 - 0.2
    first = 0.0 + 0.5 * 0.2 - 0.5 + 0.25 * last
    assert returns[0].tolist() == pytest.approx([first + 0.5, last + 9.0, last + 0.2])


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_group_advantages(verl, name, dtype):
    compare_advantages(verl, name, seeded(B, T, seed=1), mask(dtype), GROUPS)


@pytest.mark.parametrize("name", GROUPED[:2])
def test_grpo_without_the_deviation(verl, name):
    compare_advantages(verl, name, seeded(B, T, seed=1), mask(), GROUPS, norm_adv_by_std_in_grpo=False)
    compare_advantages(verl, name, seeded(B, T, seed=1), mask(), GROUPS, 1e-2)


@pytest.mark.parametrize(
    "index", [np.arange(6) // 2, np.array([7, 7, 7, -1, -1, -1]), torch.tensor([1, 0, 1, 0, 0, 1])]
)
def test_group_labels_of_other_kinds(verl, index):
    name, labels = "compute_grpo_outcome_advantage", index
    if isinstance(index, torch.Tensor):  # verl's loop takes each element of a tensor for a label of its own
        labels, name = index, "compute_grpo_vectorized_outcome_advantage"
    compare_advantages(verl, name, seeded(B, T, seed=1), mask(), labels)


def test_reinforce_plus_plus(verl):
    config = type("Config", (), {"gamma": 0.9})
    name = "compute_reinforce_plus_plus_outcome_advantage"
    compare_advantages(verl, name, seeded(B, T, seed=1), mask(), config=config)


def test_remax(verl):
    arguments = (seeded(B, T, seed=1), seeded(B, seed=2), mask())
    compare_advantages(verl, "compute_remax_outcome_advantage", *arguments)


def test_advantages_by_hand():
    """Scores 1, 0, 0, 1 in one group, 3 alone: unbiased deviation sqrt(1/3), leave-one-out n / (n - 1) (r - mean)."""
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0])
    rewards, chosen = torch.nn.functional.pad(scores[:, None], (1, 0)), torch.tensor([[1, 1]] * 5)
    labels = np.array([0, 0, 0, 0, 1])
    grpo, _ = ours.compute_grpo_outcome_advantage(rewards, chosen, labels)
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert grpo[:, 0].tolist() == pytest.approx([unit, -unit, -unit, unit, 3 / (1 + 1e-6)])
    rloo, _ = ours.compute_rloo_outcome_advantage(rewards, chosen, labels)
    assert rloo[:, 1].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, 3])


def test_equal_scores_are_no_signal(verl):
    """verl's own is what rounding leaves of 0, over epsilon."""
    rewards, chosen, labels = torch.full((3, 1), 0.1), torch.ones(3, 1), np.array([0, 0, 0])
    assert not ours.compute_grpo_outcome_advantage(rewards, chosen, labels)[0].any()
    assert verl.core.compute_grpo_outcome_advantage(rewards, chosen, labels)[0].abs().max() < 0.02


def test_advantage_arguments_are_checked():
    rewards = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"'response_mask' must be of shape \[2, 3\]"):
        ours.compute_gae_advantage_return(rewards, rewards, torch.ones(2, 2), 1.0, 1.0)
    with pytest.raises(ValueError, match="'index' must be 2 labels"):
        ours.compute_grpo_outcome_advantage(rewards, rewards, np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="'response_mask' must be zeros and ones"):
        ours.compute_gae_advantage_return(rewards, rewards, rewards * 0.5, 1.0, 1.0)
