"""Group advantages on every backend against float64: modes, masks, tokens, close and equal rewards, edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zs_kernels import _device, _triton
from zs_kernels._group_advantages_triton import _group_advantages_triton
from zs_kernels.gae import gae
from zs_kernels.group_advantages import MODES, GroupAdvantages, group_advantages, group_ids
from zs_kernels.testing import poison_empty, seeded

native = pytest.mark.skipif(not _device.native_status().available, reason=_device.native_status().reason)
interpreted = pytest.mark.skipif(not _triton.INTERPRETED, reason="Triton's interpreter is off")
BACKENDS = ["reference", pytest.param("native", marks=native), pytest.param("triton", marks=interpreted)]
S, G, T = 37, 9, 21


@pytest.fixture
def backend(request):
    with _device.use_backend(request.param):
        yield request.param


every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Groups in no order: 3 has one trajectory, 4 none, 5 equal rewards; some trajectories are not valid."""
    groups = torch.randint(0, G, (S,), generator=torch.Generator().manual_seed(0))
    groups[(groups == 3) | (groups == 4)] = 2
    groups[0] = 3
    rewards = seeded(S, seed=1)
    rewards[groups == 5] = 0.1
    valid = (seeded(S, seed=2) > -0.8) | (groups == 5)
    valid[0] = True
    return rewards, groups, valid


def by_hand(rewards, groups, valid, weights, mode, eps, ddof, keep_singletons) -> list[float]:
    """Advantages from the formulas, one trajectory after the other, in Python floats."""

    def moments(numbers, loads):
        total = math.fsum(loads)
        mean = math.fsum(x * w for x, w in zip(numbers, loads, strict=True)) / max(total, 1.0)
        squares = math.fsum(w * (x - mean) ** 2 for x, w in zip(numbers, loads, strict=True))
        return mean, squares / max(total - ddof, 1.0)

    counted = [s for s in range(len(rewards)) if valid[s]]
    centred, advantages = {}, dict.fromkeys(range(len(rewards)), 0.0)
    for s in counted:
        own = [rewards[o] for o in counted if groups[o] == groups[s]]
        mean, variance = moments(own, [1.0] * len(own))
        single = len(own) == 1 and keep_singletons
        dead = len(set(own)) == 1 and not single
        centred[s] = 0.0 if dead else rewards[s] - (0.0 if single else mean)
        others = (math.fsum(own) - rewards[s]) / max(len(own) - 1, 1)
        advantages[s] = {
            "grpo": centred[s] / ((1.0 if single else math.sqrt(variance)) + eps),
            "dr_grpo": centred[s],
            "rloo": centred[s] if dead or single else rewards[s] - others,
            "reinforce": rewards[s],
        }.get(mode, 0.0)
    if mode == "batch_std":
        _, variance = moments([rewards[s] for s in counted], [1.0] * len(counted))
        advantages |= {s: centred[s] / (math.sqrt(variance) + eps) for s in counted}
    if mode.startswith("reinforce++"):
        numbers = {s: rewards[s] if mode == "reinforce++" else centred[s] for s in counted}
        mean, variance = moments(list(numbers.values()), [weights[s] for s in counted])
        advantages |= {s: (numbers[s] - mean) / math.sqrt(variance + eps) for s in counted}
    return list(advantages.values())


@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep_singletons", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_against_the_formulas(backend, mode, keep_singletons, everything):
    rewards, groups, valid = batch()
    options = {"valid": valid, "ddof": 0, "eps": 1e-3} if everything else {"eps": 1e-6}
    given = torch.where(valid, rewards, torch.nan) if everything else rewards
    with poison_empty():
        found = group_advantages(given, groups, G, mode=mode, keep_singletons=keep_singletons, **options)
    counted = valid.tolist() if everything else [True] * S
    exact = by_hand(
        rewards.double().tolist(), groups.tolist(), counted, [1.0] * S, mode, options["eps"], options.get("ddof", 1),
        keep_singletons,
    )  # fmt: skip
    torch.testing.assert_close(found.advantages.double(), torch.tensor(exact).double(), rtol=2e-6, atol=2e-6)
    assert found.dead[4] and found.dead[5] and bool(found.dead[3]) != keep_singletons
    assert found.mean[4] == 0.0 and found.std[5] == 0.0
    if mode in MODES[:4]:
        assert not found.advantages[groups == 5].any()
    for g in (0, 1, 2, 6, 7, 8):
        own = rewards[(groups == g) & torch.tensor(counted)].double()
        if len(own) > 1:
            std = own.std(correction=options.get("ddof", 1))
            torch.testing.assert_close(found.mean[g].double(), own.mean(), rtol=2e-6, atol=2e-7)
            torch.testing.assert_close(found.std[g].double(), std, rtol=2e-6, atol=2e-7)


@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_tokens(backend, mode, packed, per_token):
    """Rewards of tokens are summed over the unmasked ones; NaN may stand at the others; each token has its number."""
    rewards, groups, valid = batch()
    mask = seeded(S, T, seed=4) > -0.3
    mask[7] = False
    token_rewards = seeded(S, T, seed=5)
    sums = torch.where(mask, token_rewards.double(), 0.0).sum(-1) if per_token else rewards.double()
    given = token_rewards.masked_fill(~mask, torch.nan) if per_token else rewards
    options = {"valid": valid, "mode": mode, "mask": mask.flatten() if packed else mask}
    if packed:
        given = given.flatten()
        options |= {"cu_seqlens": torch.arange(S + 1, dtype=torch.int32) * T, "per_token": per_token}
    with poison_empty():
        found = group_advantages(given, groups, G, **options)
    assert found.tokens is not None and found.tokens.shape == ((S * T,) if packed else (S, T))
    tokens = found.tokens.view(S, T)
    assert not tokens[~mask].any() and not tokens[~valid].any()
    eps = 1e-8 if mode.startswith("reinforce++") else 1e-6
    if mode == "reinforce++" and per_token:
        expected = whitened_returns(token_rewards, mask & valid[:, None], eps)
        torch.testing.assert_close(tokens[mask & valid[:, None]].double(), expected, rtol=5e-6, atol=5e-6)
        return
    loads = mask.sum(-1).double().tolist()
    exact = by_hand(sums.tolist(), groups.tolist(), valid.tolist(), loads, mode, eps, 1, False)
    per_sequence = torch.tensor(exact).double()
    torch.testing.assert_close(found.advantages.double(), per_sequence, rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(tokens.double(), per_sequence[:, None] * mask, rtol=5e-6, atol=5e-6)


def whitened_returns(rewards: Tensor, mask: Tensor, eps: float) -> Tensor:
    kept = torch.where(mask, rewards.double(), 0.0)
    returns = kept.flip(-1).cumsum(-1).flip(-1)[mask]
    return (returns - returns.mean()) / (returns.var() + eps).sqrt()


@every_backend
def test_reinforce_plus_plus_is_gae_without_values(backend):
    """And the trajectory's own advantage is that of its first token."""
    _, groups, _ = batch()
    rewards, mask = seeded(S, T, seed=5), torch.ones(S, T, dtype=torch.bool)
    found = group_advantages(rewards, groups, G, mode="reinforce++", mask=mask)
    expected = gae(rewards, torch.zeros(S, T), mask, whiten=True)[0]
    torch.testing.assert_close(found.tokens, expected)
    torch.testing.assert_close(found.advantages, expected[:, 0], rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize("offset, step", [(1e6, 0.0625), (-3e4, 2.0**-9), (1.0, 2.0**-23)])
def test_close_rewards_far_from_zero_keep_their_digits(backend, offset, step):
    """Rewards a few units in the last place apart: E[x^2] - E[x]^2 would have no digit left."""
    steps = torch.tensor([0.0, 1.0, 3.0, 3.0, 7.0, 2.0, 0.0, 1.0])
    found = group_advantages(offset + step * steps, torch.zeros(8, dtype=torch.int64), 1, eps=1e-30)
    exact = (steps.double() - steps.double().mean()) / steps.double().std()
    torch.testing.assert_close(found.advantages.double(), exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.std.double(), step * steps.double().std()[None], rtol=2e-6, atol=0.0)


@every_backend
@pytest.mark.parametrize("eps", [1e-9, 1e-4])
def test_equal_rewards_give_no_signal_however_small_eps_is(backend, eps):
    """0.1 and its like have no exact binary mean; a tiny spread over a tiny eps would be an advantage of size 1."""
    groups = torch.arange(15) % 5
    rewards = torch.tensor([0.1, 0.7, 1e6 / 3, -1e-9, 0.3])[groups]
    for mode in MODES[:4]:
        found = group_advantages(rewards, groups, 5, mode=mode, eps=eps)
        assert found.dead.all() and not found.std.any() and not found.advantages.any()


@every_backend
def test_a_nan_reward_stays_in_its_group(backend):
    rewards = torch.tensor([1.0, torch.nan, 0.0, 2.0, 1.0])
    found = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1]), 2)
    assert found.advantages[:3].isnan().all() and found.advantages[3:].isfinite().all()
    assert not found.dead.any()


@interpreted
@pytest.mark.parametrize("size", [1, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("mode", range(len(MODES)))
def test_triton_at_block_edges(size, mode):
    """Blocks of 16 trajectories and tokens; sequences of ragged lengths, some empty."""
    groups, rewards = torch.arange(size) % 3, seeded(size, seed=1)
    lengths = torch.arange(size) * 5 % 34
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    N = int(cu_seqlens[-1])
    mask = seeded(N, seed=2) > -0.5
    with poison_empty():
        advantages, mean, std, dead, _, tokens = _group_advantages_triton(
            rewards, groups, 3, mode, None, 1e-6, 1, False, mask, cu_seqlens, N, False, block=16
        )
    with _device.use_backend("reference"):
        expected = group_advantages(rewards, groups, 3, mode=MODES[mode], eps=1e-6, mask=mask, cu_seqlens=cu_seqlens)
    for have, want in ((advantages, expected.advantages), (mean, expected.mean), (std, expected.std)):
        torch.testing.assert_close(have, want, rtol=2e-6, atol=2e-6)
    assert torch.equal(dead, expected.dead)
    torch.testing.assert_close(tokens, expected.tokens, rtol=2e-6, atol=2e-6)


@every_backend
def test_nothing_to_do(backend):
    empty = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int32), 2, mask=torch.zeros(0, 4).bool())
    assert empty.advantages.shape == (0,) and empty.dead.tolist() == [True, True] and empty.tokens.shape == (0, 4)
    none = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0, mode="reinforce++")
    assert none.mean.shape == (0,) and none.statistics.tolist() == [0.0, 0.0, 0.0]
    for mode in MODES:
        no_tokens = group_advantages(torch.ones(4, 3), torch.arange(4), 4, mode=mode, mask=torch.zeros(4, 3).bool())
        assert not no_tokens.tokens.any() and no_tokens.advantages.isfinite().all()
        not_valid = group_advantages(seeded(4, seed=1), torch.arange(4) // 2, 2, mode=mode, valid=torch.zeros(4).bool())
        assert not not_valid.advantages.any() and not_valid.dead.all()


@every_backend
def test_types_strides_and_gradients(backend):
    rewards, groups, valid = batch()
    expected = group_advantages(rewards, groups, G, valid=valid)
    wide = torch.stack([rewards, -rewards], dim=1).requires_grad_()
    found = group_advantages(wide[:, 0], groups.int(), G, valid=torch.stack([valid, ~valid], 1)[:, 0])
    assert torch.equal(found.advantages, expected.advantages) and not found.advantages.requires_grad
    half = group_advantages(rewards.bfloat16(), groups, G)
    assert torch.equal(half.advantages, group_advantages(rewards.bfloat16().float(), groups, G).advantages)


@every_backend
def test_statistics_are_those_of_the_batch(backend):
    rewards, groups, valid = batch()
    found = group_advantages(rewards, groups, G, mode="batch_std", valid=valid)
    own = rewards[valid].double()
    expected = torch.stack([own.new_tensor(len(own)), own.mean(), own.var() * (len(own) - 1)])
    torch.testing.assert_close(found.statistics, expected, rtol=1e-6, atol=1e-6)
    assert group_advantages(rewards, groups, G).statistics is None


def test_group_ids():
    ids, number = group_ids(["b", "a", "b", ("c", 1), "a"])
    assert ids.tolist() == [0, 1, 0, 2, 1] and ids.dtype == torch.int32 and number == 3
    assert group_ids([])[0].shape == (0,)


def test_leave_one_out_is_another_name():
    rewards, groups, _ = batch()
    one, other = (group_advantages(rewards, groups, G, mode=mode) for mode in ("leave_one_out", "rloo"))
    assert torch.equal(one.advantages, other.advantages)


def test_result_without_tokens_has_four_parts_and_no_more():
    rewards, groups, _ = batch()
    assert group_advantages(rewards, groups, G)[4:] == (None, None)
    assert GroupAdvantages._fields[:4] == ("advantages", "mean", "std", "dead")
