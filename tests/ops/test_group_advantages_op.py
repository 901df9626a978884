"""Group advantages as a registered operator, and its arguments."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from zs_kernels.group_advantages import MODES, group_advantages
from zs_kernels.testing import seeded


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("mode", ["grpo", "reinforce++-baseline"])
def test_opcheck(mode, per_token):
    groups, valid, mask = torch.tensor([0, 1, 0, 1]), torch.tensor([True, True, False, True]), seeded(20, seed=1) > 0
    rewards, bounds = seeded(20 if per_token else 4, seed=2), torch.arange(5) * 5
    operator = torch.ops.zs_kernels.group_advantages.default
    torch.library.opcheck(operator, (rewards, groups, 2, mode, valid, 1e-6, 1, False, mask, bounds, 20, per_token))
    if not per_token:
        torch.library.opcheck(operator, (rewards, groups, 2, mode, None, 1e-6, 1, True, None, None, 0, False))


@pytest.mark.parametrize("mode", MODES)
def test_compiles_whole_and_once_for_all_sizes(mode):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def compiled(rewards, groups, num_groups, mask):
        outcome = group_advantages(rewards[:, 0], groups, num_groups, mode=mode)
        found = group_advantages(rewards, groups, num_groups, mode=mode, mask=mask)
        return outcome.advantages, found.tokens * 2.0, found.mean, found.dead

    graphs = set()
    for k in range(20):
        S, T = 6 + 3 * k, 5 + 7 * k
        rewards, mask, groups = seeded(S, T, seed=k), seeded(S, T, seed=k + 50) > 0, torch.arange(S) % (2 + k)
        outcome, tokens, mean, dead = compiled(rewards, groups, 2 + k, mask)
        expected = group_advantages(rewards, groups, 2 + k, mode=mode, mask=mask)
        assert torch.equal(tokens, expected.tokens * 2.0) and torch.equal(mean, expected.mean)
        assert torch.equal(outcome, group_advantages(rewards[:, 0], groups, 2 + k, mode=mode).advantages)
        assert torch.equal(dead, expected.dead)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1, "another size was compiled anew"


GOOD = {"rewards": torch.zeros(4), "groups": torch.tensor([0, 1, 0, 1]), "num_groups": 2}
TOKENS = GOOD | {"mask": torch.ones(6, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 1, 2, 2, 6])}


@pytest.mark.parametrize(
    "good, name, value, error",
    [
        (GOOD, "rewards", torch.zeros(4, dtype=torch.int64), ValueError),
        (GOOD, "rewards", torch.zeros(4, 2, 2), ValueError),
        (GOOD, "rewards", [0.0], TypeError),
        (GOOD, "groups", torch.zeros(3, dtype=torch.int64), ValueError),
        (GOOD, "groups", torch.zeros(4), ValueError),
        (GOOD, "groups", ["a"] * 4, TypeError),
        (GOOD, "groups", torch.tensor([0, 1, 2, 1]), IndexError),
        (GOOD, "groups", torch.tensor([0, -1, 0, 1]), IndexError),
        (GOOD, "valid", torch.ones(4), ValueError),
        (GOOD, "valid", torch.ones(3, dtype=torch.bool), ValueError),
        (GOOD, "mask", torch.ones(4, dtype=torch.bool), ValueError),
        (GOOD, "mask", torch.ones(3, 5, dtype=torch.bool), ValueError),
        (GOOD, "per_token", True, ValueError),
        (TOKENS, "rewards", torch.zeros(6), ValueError),
        (TOKENS, "rewards", torch.zeros(4, 6), ValueError),
        (TOKENS, "mask", None, ValueError),
        (TOKENS, "mask", torch.ones(6), ValueError),
        (TOKENS, "cu_seqlens", torch.tensor([0, 1, 2, 2, 5]), ValueError),
        (TOKENS, "cu_seqlens", torch.tensor([0, 3, 2, 2, 6]), ValueError),
        (TOKENS, "cu_seqlens", torch.tensor([0.0, 6.0]), ValueError),
    ],
)
def test_wrong_arguments_are_named(good, name, value, error):
    arguments = good | {name: value}
    with pytest.raises(error, match=f"group_advantages: argument '{name}' must"):
        group_advantages(**arguments)
