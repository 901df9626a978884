"""GAE on every backend: by hand, against the frameworks' loops in float64, masks, modes, whitening, edges."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from zs_kernels import _device, _triton
from zs_kernels._gae_triton import _gae_triton, _statistics_triton
from zs_kernels.gae import (
    MODES,
    gae,
    gae_reference,
    gae_with_statistics,
    statistics_reference,
    whiten_advantages,
)
from zs_kernels.reductions import merge_statistics
from zs_kernels.testing import assert_no_worse_than_torch, poison_empty, seeded

module = sys.modules["zs_kernels.gae"]  # the package's attribute of that name is the function

native = pytest.mark.skipif(not _device.native_status().available, reason=_device.native_status().reason)
interpreted = pytest.mark.skipif(not _triton.INTERPRETED, reason="Triton's interpreter is off")
BACKENDS = ["reference", pytest.param("native", marks=native), pytest.param("triton", marks=interpreted)]
# Lengths around the eight tokens of a C++ block, empty sequences, fewer and more sequences than C++ has lanes.
LENGTHS = [[1], [3, 0, 5], [7, 8, 9, 15, 16, 17, 1, 0, 24, 23, 8], [0, 0], [40]]


@pytest.fixture
def backend(request):
    with _device.use_backend(request.param):
        yield request.param


every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def packed(lengths: list[int], seed: int = 0, masked_share: float = 0.4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = sum(lengths)
    mask = seeded(N, seed=seed + 2) > torch.special.ndtri(torch.tensor(masked_share)).item()
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int64)
    return seeded(N, seed=seed), seeded(N, seed=seed + 1), mask, cu_seqlens


def frameworks_loop(rewards, values, mask, gamma, lam, mode):
    """[B, T]: verl's loop with its carry, OpenRLHF's with zeros, TRL's with neither; results at unmasked tokens."""
    weight = mask.to(rewards.dtype)
    if mode == "zero":
        rewards, values = rewards * weight, values * weight
    next_value = last = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        candidate = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * last
        keep = weight[:, t] if mode == "carry" else torch.ones_like(next_value)
        next_value = values[:, t] * keep + (1 - keep) * next_value
        last = candidate * keep + (1 - keep) * last
        columns.append(last)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages * weight, (advantages + values) * weight


@every_backend
@pytest.mark.parametrize(
    "mode, expected_advantages, expected_returns",
    [
        # last: 1 - 0.5; first: 0.5 * 0.5 - 0.25 + 0.25 * 0.5
        ("carry", [0.125, 0.0, 0.5], [0.375, 0.0, 1.0]),
        # the document: 0.5 * 0.5 + 0.25 * 0.5 = 0.375; first: 0 - 0.25 + 0.25 * 0.375
        ("zero", [-0.15625, 0.0, 0.5], [0.09375, 0.0, 1.0]),
        # the document: 8 + 0.5 * 0.5 - 4 + 0.25 * 0.5 = 4.375; first: 0.5 * 4 - 0.25 + 0.25 * 4.375
        ("classic", [2.84375, 0.0, 0.5], [3.09375, 0.0, 1.0]),
        ("all_actions", [2.84375, 4.375, 0.5], [3.09375, 8.375, 1.0]),
    ],
)
def test_hand_computed(backend, mode, expected_advantages, expected_returns):
    """Reward 1 at the end of (policy, document, policy)."""
    rewards, values = torch.tensor([0.0, 8.0, 1.0]), torch.tensor([0.25, 4.0, 0.5])
    mask = torch.tensor([True, False, True])
    advantages, returns = gae(rewards, values, mask, torch.tensor([0, 3]), gamma=0.5, lam=0.5, mode=mode)
    assert advantages.tolist() == expected_advantages
    assert returns.tolist() == expected_returns


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("mode, name", [("carry", "verl"), ("zero", "openrlhf"), ("classic", "trl")])
def test_reference_does_what_the_frameworks_do(mode, name, gamma, lam):
    shape = (5, 23)
    rewards, values = seeded(*shape, seed=1, dtype=torch.float64), seeded(*shape, seed=2, dtype=torch.float64)
    mask = seeded(*shape, seed=3) > 0
    mask[:, 19:] = False
    expected = frameworks_loop(rewards, values, mask, gamma, lam, mode)
    found = gae(rewards, values, mask, gamma=gamma, lam=lam, mode=name)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want.float())


@every_backend
@pytest.mark.parametrize("mode", [*MODES, "all_actions"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_against_float64(backend, mode, lengths):
    rewards, values, mask, cu_seqlens = packed(lengths)
    S = len(lengths)
    gammas, lams, bootstrap = seeded(S, seed=5).sigmoid(), seeded(S, seed=6).sigmoid(), seeded(S, seed=7)
    for options in ({}, {"gamma": 0.99, "lam": 0.95}, {"gamma": gammas, "lam": lams, "bootstrap": bootstrap}):
        exact = gae_reference(rewards, values, mask, cu_seqlens, mode=mode, **options)
        with poison_empty():
            found = gae(rewards, values, mask, cu_seqlens, mode=mode, **options)
        for have, want in zip(found, exact, strict=True):
            assert have.dtype == torch.float32
            torch.testing.assert_close(have.double(), want, rtol=2e-6, atol=2e-6)


@interpreted
@pytest.mark.parametrize("chunk_blocks", [None, 1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_triton_at_block_and_chunk_edges(mode, chunk_blocks):
    """A scan in blocks of 16, one program a sequence or several; statistics of each program's part."""
    lengths = [15, 16, 17, 0, 31, 32, 33, 1, 47, 80]
    rewards, values, mask, cu_seqlens = packed(lengths)
    bootstrap = seeded(len(lengths), seed=9)
    exact = gae_reference(rewards, values, mask, cu_seqlens, gamma=0.99, lam=0.95, bootstrap=bootstrap, mode=mode)
    with poison_empty():
        *found, moments = _gae_triton(
            rewards, values, mask, cu_seqlens, None, None, bootstrap, 0.99, 0.95, mode,
            80 if chunk_blocks else 0, statistics=True, block=16, chunk_blocks=chunk_blocks,
        )  # fmt: skip
        statistics = _statistics_triton(moments)
    assert moments.shape[0] == len(lengths) * {None: 1, 1: 5, 2: 3}[chunk_blocks]
    for have, want in zip(found, exact, strict=True):
        torch.testing.assert_close(have.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(statistics, statistics_reference(found[0], mask), rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.999, 0.97)])
def test_triton_errs_no_more_than_the_frameworks_loop_in_float32(gamma, lam):
    """Values far larger than the advantages: what a critic of constant rewards gives."""
    shape = (4, 600)
    rewards, values, mask = seeded(*shape, seed=1, scale=0.01), 5.0 + seeded(*shape, seed=2), seeded(*shape, seed=3) > 0
    exact = frameworks_loop(rewards.double(), values.double(), mask, gamma, lam, "carry")
    loop = frameworks_loop(rewards, values, mask, gamma, lam, "carry")
    with _device.use_backend("triton"):
        found = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for name, have, torchs, want in zip(("advantages", "returns"), found, loop, exact, strict=True):
        assert_no_worse_than_torch(have, torchs, want, floor=5e-7, name=name)


@every_backend
@pytest.mark.parametrize("mode", ["carry", "zero"])
def test_masked_slots_are_never_read(backend, mode):
    rewards, values, mask, cu_seqlens = packed([50, 37, 3])
    clean = gae(rewards, values, mask, cu_seqlens, gamma=0.9, lam=0.8, mode=mode, whiten=True)
    dirty = [given.masked_fill(~mask, torch.nan) for given in (rewards, values)]
    poisoned = gae(*dirty, mask, cu_seqlens, gamma=0.9, lam=0.8, mode=mode, whiten=True)
    for have, want in zip(poisoned, clean, strict=True):
        assert torch.equal(have, want)
        assert not have[~mask].any()


@every_backend
@pytest.mark.parametrize("lengths", [[], [0], [5, 9]])
def test_nothing_to_do(backend, lengths):
    """No sequences, no tokens, no unmasked tokens: zeros, and statistics of nothing."""
    rewards, values, mask, cu_seqlens = packed(lengths)
    nothing = torch.zeros_like(mask)
    with poison_empty():
        found = gae_with_statistics(rewards * torch.nan, values * torch.nan, nothing, cu_seqlens)
        whitened, _ = gae(rewards * torch.nan, values * torch.nan, nothing, cu_seqlens, whiten=True)
    assert found.advantages.tolist() == found.returns.tolist() == whitened.tolist() == [0.0] * sum(lengths)
    assert found.statistics.tolist() == [0.0, 0.0, 0.0]


@every_backend
@pytest.mark.parametrize(
    "options", [{}, {"ddof": 0, "eps": 1e-3}, {"shift_mean": False}, {"ddof": 0, "shift_mean": False}]
)
def test_whitening(backend, options):
    rewards, values, mask, cu_seqlens = packed([33, 0, 70, 5])
    advantages, returns = gae(rewards, values, mask, cu_seqlens, gamma=0.99, lam=0.95)
    whitened, same_returns = gae(rewards, values, mask, cu_seqlens, gamma=0.99, lam=0.95, whiten=True, **options)
    chosen = advantages[mask].double()
    spread = (chosen.var(correction=options.get("ddof", 1)) + options.get("eps", 1e-8)).sqrt()
    expected = (chosen - chosen.mean()) / spread
    if not options.get("shift_mean", True):
        expected = expected + chosen.mean()
    assert torch.equal(same_returns, returns)
    assert not whitened[~mask].any()
    torch.testing.assert_close(whitened[mask].double(), expected, rtol=1e-6, atol=1e-6)


@every_backend
def test_whitening_keeps_the_digits_of_close_advantages(backend):
    rewards = 1000.0 + seeded(12, seed=1) * 2.0**-10
    mask = torch.ones(12, dtype=torch.bool)
    advantages = gae(rewards, torch.zeros(12), mask, torch.arange(13), whiten=True)[0]
    exact = rewards.double()
    expected = (exact - exact.mean()) / (exact.var() + 1e-8).sqrt()
    torch.testing.assert_close(advantages.double(), expected, rtol=2e-5, atol=2e-5)


@every_backend
def test_one_token_whitens_to_zero(backend):
    mask = torch.tensor([False, True, False])
    advantages, returns = gae(torch.ones(3), torch.full((3,), 0.25), mask, torch.tensor([0, 3]), whiten=True)
    assert advantages.tolist() == [0.0, 0.0, 0.0]
    assert returns.tolist() == [0.0, 1.0, 0.0]


@every_backend
def test_ranks_whiten_together(backend):
    """Three ranks, one of them without a single unmasked token, against all their tokens in one place."""
    ranks = [packed([20, 9], seed=1), packed([4], seed=11, masked_share=1.0 - 1e-9), packed([33], seed=21)]
    assert not ranks[1][2].any()
    local = [gae_with_statistics(*rank, gamma=0.9, lam=0.9) for rank in ranks]
    statistics = merge_statistics(torch.stack([one.statistics for one in local]))
    whitened = [whiten_advantages(one.advantages, rank[2], statistics) for one, rank in zip(local, ranks, strict=True)]
    found = torch.cat(whitened)
    together = [torch.cat(columns) for columns in list(zip(*ranks, strict=True))[:3]]
    expected = gae(*together, torch.tensor([0, 20, 29, 33, 66]), gamma=0.9, lam=0.9, whiten=True)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@every_backend
def test_padded_rows_equal_packed_ones(backend):
    rewards, values, mask, cu_seqlens = packed([12, 9, 12])
    rows = [torch.full((3, 12), torch.nan) for _ in range(2)]
    row_mask = torch.zeros(3, 12, dtype=torch.bool)
    for row, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        for to, given in zip((*rows, row_mask), (rewards, values, mask), strict=True):
            to[row, : end - begin] = given[begin:end]
    wide = gae(*rows, row_mask, gamma=0.99, lam=0.9, whiten=True)
    flat = gae(rewards, values, mask, cu_seqlens, gamma=0.99, lam=0.9, whiten=True)
    for have, want in zip(wide, flat, strict=True):
        assert have.shape == (3, 12)
        torch.testing.assert_close(torch.cat([have[0], have[1, :9], have[2]]), want)
        assert not have[1, 9:].any()


@every_backend
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_rows_without_tokens(backend, shape):
    found = gae(torch.zeros(shape), torch.zeros(shape), None, whiten=True, bootstrap=torch.ones(shape[0]))
    assert found[0].shape == found[1].shape == shape


@every_backend
def test_strides_types_and_gradients(backend):
    """Columns of a wider tensor, one number expanded, bfloat16, int32 bounds, inputs that ask for a gradient."""
    rewards, values, mask, cu_seqlens = packed([40, 60])
    expected = gae(rewards, values, mask, cu_seqlens, gamma=0.9, lam=0.8)
    wide = torch.stack([rewards, values], dim=1).requires_grad_()
    wide_mask = torch.stack([mask, ~mask], dim=1)
    found = gae(wide[:, 0], wide[:, 1], wide_mask[:, 0], cu_seqlens.int(), gamma=0.9, lam=0.8)
    assert all(torch.equal(have, want) and not have.requires_grad for have, want in zip(found, expected, strict=True))
    one = torch.tensor(0.5).expand(100)
    expanded = gae(one, one, mask, cu_seqlens)
    assert torch.equal(expanded[0], gae(one.clone(), one.clone(), mask, cu_seqlens)[0])
    half = gae(rewards.bfloat16(), values.bfloat16(), mask, cu_seqlens, gamma=0.9, lam=0.8)
    rounded = gae(rewards.bfloat16().float(), values.bfloat16().float(), mask, cu_seqlens, gamma=0.9, lam=0.8)
    assert torch.equal(half[0], rounded[0])


@every_backend
def test_no_mask_is_every_token(backend):
    rewards, values, mask, cu_seqlens = packed([9, 20])
    found = gae(rewards, values, None, cu_seqlens, gamma=0.9, lam=0.8, whiten=True)
    expected = gae(rewards, values, torch.ones_like(mask), cu_seqlens, gamma=0.9, lam=0.8, whiten=True)
    torch.testing.assert_close(found[0], expected[0])


@interpreted
def test_many_parts_are_merged_in_a_launch_of_their_own(monkeypatch):
    monkeypatch.setattr(module, "MERGED_AT_ONCE", 1)
    rewards, values, mask, cu_seqlens = packed([9, 20, 3])
    with _device.use_backend("triton"):
        found = gae(rewards, values, mask, cu_seqlens, whiten=True)[0]
    with _device.use_backend("reference"):
        expected = gae(rewards, values, mask, cu_seqlens, whiten=True)[0]
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
