"""GAE as a registered operator, and its arguments."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.ops.test_gae import packed
from zs_kernels.gae import gae, gae_with_statistics, whiten_advantages
from zs_kernels.reductions import merge_statistics
from zs_kernels.testing import seeded

NO_TENSORS = (None, None, None)


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("statistics, whiten", [(False, False), (True, False), (False, True)])
def test_opcheck_gae(per_sequence, statistics, whiten):
    rewards, values, mask, cu_seqlens = packed([5, 0, 9])
    more = (torch.rand(3), torch.rand(3), torch.rand(3)) if per_sequence else NO_TENSORS
    arguments = (rewards, values, None if per_sequence else mask, cu_seqlens, *more, 0.9, 0.8, "carry", 0)
    torch.library.opcheck(torch.ops.zs_kernels.gae.default, (*arguments, statistics, whiten, 1, 1e-8, True))


def test_opcheck_whiten_advantages():
    statistics = torch.tensor([7.0, 0.1, 2.0], dtype=torch.float64)
    arguments = (seeded(12, seed=1), seeded(12, seed=2) > 0, statistics, 1, 1e-8, True)
    torch.library.opcheck(torch.ops.zs_kernels.whiten_advantages.default, arguments)


@pytest.mark.parametrize("padded", [False, True])
def test_compiles_whole_and_once_for_all_lengths(padded):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def compiled(rewards, values, mask, cu_seqlens, lam):
        whitened, returns = gae(rewards, values, mask, cu_seqlens, gamma=0.99, lam=lam, whiten=True)
        local = gae_with_statistics(rewards, values, mask, cu_seqlens, gamma=0.99, lam=lam)
        statistics = merge_statistics(local.statistics[None])
        return whitened * 2.0, returns, whiten_advantages(local.advantages, mask, statistics)

    graphs = set()
    for k in range(20):
        B, T = 3 + k % 5, 7 + 11 * k
        rewards, values, mask = seeded(B, T, seed=k), seeded(B, T, seed=k + 50), seeded(B, T, seed=k + 90) > 0
        lam, cu_seqlens = seeded(B, seed=k).sigmoid(), None
        if not padded:
            rewards, values, mask = rewards.flatten(), values.flatten(), mask.flatten()
            cu_seqlens = torch.arange(B + 1) * T
        found = compiled(rewards, values, mask, cu_seqlens, lam)
        expected = gae(rewards, values, mask, cu_seqlens, gamma=0.99, lam=lam, whiten=True)
        assert torch.equal(found[0], expected[0] * 2.0) and torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[0])
        graphs.add(counter.frame_count)
    assert len(graphs) == 1, "another length was compiled anew"


def test_operator_leaves_its_inputs_alone():
    rewards, values, mask, cu_seqlens = packed([5, 9])
    before = [given.clone() for given in (rewards, values, mask, cu_seqlens)]
    gae(rewards, values, mask, cu_seqlens, whiten=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (rewards, values, mask, cu_seqlens), strict=True))


GOOD = {
    "rewards": torch.zeros(4),
    "values": torch.zeros(4),
    "mask": torch.ones(4, dtype=torch.bool),
    "cu_seqlens": torch.tensor([0, 4]),
}


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("values", torch.zeros(3), ValueError),
        ("rewards", torch.zeros(2, 2), ValueError),
        ("rewards", torch.zeros(4, dtype=torch.int64), ValueError),
        ("rewards", [0.0] * 4, TypeError),
        ("mask", torch.ones(4), ValueError),
        ("mask", [True] * 4, TypeError),
        ("cu_seqlens", torch.tensor([0, 5]), ValueError),
        ("cu_seqlens", torch.tensor([0, 3, 2, 4]), ValueError),
        ("cu_seqlens", torch.tensor([1, 4]), ValueError),
        ("cu_seqlens", torch.tensor([0.0, 4.0]), ValueError),
        ("cu_seqlens", torch.tensor([[0, 4]]), ValueError),
        ("cu_seqlens", torch.zeros(0, dtype=torch.int64), ValueError),
        ("cu_seqlens", [0, 4], TypeError),
        ("gamma", 1.5, ValueError),
        ("gamma", torch.ones(2), ValueError),
        ("lam", float("nan"), ValueError),
        ("lam", torch.ones(1, dtype=torch.int64), ValueError),
        ("bootstrap", torch.ones(3), ValueError),
        ("mode", "gae", ValueError),
        ("ddof", 2, ValueError),
        ("eps", -1.0, ValueError),
        ("eps", "small", ValueError),
        ("max_seqlen", 3, ValueError),
        ("max_seqlen", -1, ValueError),
        ("max_seqlen", 4.0, ValueError),
    ],
)
def test_wrong_arguments_are_named_before_the_loop_runs(name, value, error):
    with pytest.raises(error, match=f"gae: argument '{name}' must be"):
        gae(**{**GOOD, name: value})


def test_rows_need_no_bounds_and_packed_tokens_do():
    with pytest.raises(ValueError, match=r"'rewards' must be of shape \[B, T\] when there is no cu_seqlens"):
        gae(torch.zeros(4), torch.zeros(4), None)


@pytest.mark.parametrize(
    "name, value",
    [
        ("statistics", torch.zeros(3)),
        ("statistics", torch.zeros(2, dtype=torch.float64)),
        ("mask", torch.ones(3, dtype=torch.bool)),
        ("ddof", 3),
    ],
)
def test_wrong_arguments_of_whiten_advantages_are_named(name, value):
    good = {"advantages": torch.zeros(4), "mask": None, "statistics": torch.zeros(3, dtype=torch.float64)}
    with pytest.raises(ValueError, match=f"whiten_advantages: argument '{name}' must be"):
        whiten_advantages(**{**good, name: value})
