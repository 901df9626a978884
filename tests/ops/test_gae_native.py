"""The compiled GAE answers to its reference, and the reference to the formula written out the other way round."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from zs_kernels import _device
from zs_kernels.gae import gae, gae_reference

native = pytest.mark.skipif(
    not _device.native_status().available, reason=f"no compiled part: {_device.native_status().reason}"
)


def packed(lengths: list[int], seed: int, masked_share: float = 0.4):
    generator = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    rewards, values = torch.randn(N, generator=generator), torch.randn(N, generator=generator)
    mask = torch.rand(N, generator=generator) >= masked_share
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int64)
    return rewards, values, mask, cu_seqlens


def verl_style(rewards, values, mask, gamma, lam):
    """One sequence by the recurrence on every token, masked tokens carried: how verl writes it, in float64."""
    rewards, values, mask = rewards.double(), values.double(), mask.double()
    next_value = last = torch.zeros((), dtype=torch.float64)
    advantages = []
    for t in reversed(range(len(rewards))):
        candidate = rewards[t] + gamma * next_value - values[t] + gamma * lam * last
        next_value = values[t] * mask[t] + (1 - mask[t]) * next_value
        last = candidate * mask[t] + (1 - mask[t]) * last
        advantages.append(last)
    advantages = torch.stack(advantages[::-1])
    return advantages * mask, (advantages + values) * mask


# One token; an empty sequence between others; lengths past a thread's share of work.
LENGTHS = [[1], [3, 0, 5], [7] * 9, [4096, 1, 5000, 33] * 4]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("lengths", LENGTHS[:3])
def test_reference_has_verl_carry(lengths, gamma, lam):
    rewards, values, mask, cu_seqlens = packed(lengths, seed=1)
    advantages, returns = gae_reference(rewards, values, mask, cu_seqlens, gamma=gamma, lam=lam)
    bounds = cu_seqlens.tolist()
    for begin, end in pairwise(bounds):
        if begin == end:
            continue
        expected = verl_style(rewards[begin:end], values[begin:end], mask[begin:end], gamma, lam)
        torch.testing.assert_close(advantages[begin:end], expected[0].float())
        torch.testing.assert_close(returns[begin:end], expected[1].float())


def test_hand_computed():
    """Reward 1 at the end of (policy, document, policy): the document is as if it weren't there."""
    advantages, returns = gae(
        torch.tensor([0.0, 9.0, 1.0]),
        torch.tensor([0.25, 9.0, 0.5]),
        torch.tensor([True, False, True]),
        torch.tensor([0, 3]),
        gamma=0.5,
        lam=0.5,
    )
    # last: 1 - 0.5 = 0.5; first: 0.5 * 0.5 - 0.25 + 0.25 * 0.5 = 0.125
    assert advantages.tolist() == [0.125, 0.0, 0.5]
    assert returns.tolist() == [0.375, 0.0, 1.0]


@native
@pytest.mark.parametrize("lengths", LENGTHS)
def test_native_equals_reference(lengths):
    rewards, values, mask, cu_seqlens = packed(lengths, seed=2)
    fast = torch.ops.zs_native.gae(rewards, values, mask, cu_seqlens, 0.99, 0.95)
    slow = gae_reference(rewards, values, mask, cu_seqlens, gamma=0.99, lam=0.95)
    assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])


@native
def test_native_takes_strided_inputs():
    """A column of a wider tensor: reading it as if it were contiguous would give other numbers."""
    rewards, values, mask, cu_seqlens = packed([40, 60], seed=3)
    wide = torch.stack([rewards, values], dim=1)
    wide_mask = torch.stack([mask, ~mask], dim=1)
    fast = gae(wide[:, 0], wide[:, 1], wide_mask[:, 0], cu_seqlens, gamma=0.9, lam=0.8)
    slow = gae_reference(rewards, values, mask, cu_seqlens, gamma=0.9, lam=0.8)
    assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])


@pytest.mark.parametrize("use_native", [False, pytest.param(True, marks=native)])
def test_masked_slots_are_never_read(use_native, monkeypatch):
    rewards, values, mask, cu_seqlens = packed([50, 50], seed=4)
    if not use_native:
        # By sys.modules, because the package's attribute of that name is the function.
        monkeypatch.setattr(sys.modules["zs_kernels.gae"], "backend_of", lambda *tensors: "reference")
    clean = gae(rewards, values, mask, cu_seqlens)
    poisoned = gae(rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.nan), mask, cu_seqlens)
    assert torch.equal(clean[0], poisoned[0]) and torch.equal(clean[1], poisoned[1])
    assert not clean[0][~mask].any() and not clean[1][~mask].any()


@native
def test_inputs_that_need_a_gradient_take_the_reference():
    rewards, values, mask, cu_seqlens = packed([5], seed=5)
    advantages, _ = gae(rewards, values.requires_grad_(), mask, cu_seqlens)
    assert not advantages.requires_grad


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
        ("mask", torch.ones(4), ValueError),
        ("cu_seqlens", torch.tensor([0, 5]), ValueError),
        ("cu_seqlens", torch.tensor([0, 3, 2, 4]), ValueError),
        ("cu_seqlens", torch.tensor([1, 4]), ValueError),
        ("cu_seqlens", torch.tensor([0.0, 4.0]), ValueError),
        ("cu_seqlens", torch.zeros(0, dtype=torch.int64), ValueError),
        ("mask", [True] * 4, TypeError),
        ("gamma", 1.5, ValueError),
        ("lam", float("nan"), ValueError),
    ],
)
def test_wrong_arguments_are_named_before_the_loop_runs(name, value, error):
    with pytest.raises(error, match=name):
        gae(**{**GOOD, name: value})


def test_without_the_compiled_part_the_reference_answers(tmp_path):
    """A fresh process in which `_ops.so` is nowhere: the op works and the status says what is missing."""
    script = (
        "import pathlib, torch\n"
        "from zs_kernels import _device\n"
        f"_device.OPS_FILE = pathlib.Path({str(tmp_path / '_ops.so')!r})\n"
        "from zs_kernels.gae import gae\n"
        "a, r = gae(torch.tensor([0., 1.]), torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.tensor([0, 2]))\n"
        "assert a.tolist() == [1., 1.], a\n"
        "status = _device.native_status()\n"
        "assert not status.available and 'not built' in status.reason, status\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_damaged_compiled_part_is_said_and_survived(tmp_path, monkeypatch):
    damaged = tmp_path / "_ops.so"
    damaged.write_bytes(b"not a shared object")
    monkeypatch.setattr(_device, "OPS_FILE", damaged)
    status = _device.native_status.__wrapped__()
    assert not status.available and "does not load" in status.reason
