"""Advantages and losses over tokens on a GPU, at full size, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zs_kernels import gae, group_advantages, kl_estimates, masked_whiten, policy_loss
from zs_kernels.value_loss import value_loss

S, T = 1024, 4096
"""Sequences and their length."""


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") * scale


def spans(count: int) -> Tensor:
    """Documents masked, as in a search trajectory."""
    return torch.arange(count, device="cuda") % 400 < 160


def padded_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The recurrence in float64, a step for all rows at a time; masked tokens carried."""
    rewards, values = rewards.double(), values.double()
    advantages = torch.zeros_like(rewards)
    next_value = last = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        candidate = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * last
        next_value, last = torch.where(here, values[:, t], next_value), torch.where(here, candidate, last)
        advantages[:, t] = torch.where(here, last, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


@pytest.mark.parametrize(("sequences", "length"), [(S, T), (4, 200_000), (8192, 100)])
def test_gae(sequences, length):
    if sequences * length > S * T:
        pytest.skip("one loop over time in float64 would take minutes")
    rewards, values = (normal(sequences, length, seed=seed) for seed in (0, 1))
    mask = spans(sequences * length).view(sequences, length)
    bounds = torch.arange(sequences + 1, device="cuda") * length
    steps = length if length <= T else 4000  # the last ones only: a whole loop of 200,000 takes too long
    found = gae(rewards.flatten(), values.flatten(), mask.flatten(), bounds, gamma=0.99, lam=0.95, max_seqlen=length)
    tail = (slice(None), slice(length - steps, length))
    wanted = padded_gae(rewards[tail], values[tail], mask[tail], 0.99, 0.95)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.view(sequences, length)[tail].double(), want, rtol=1e-5, atol=1e-4)


def test_a_sequence_alone_is_the_sequence_in_a_batch_bit_for_bit():
    rewards, values, mask = normal(S * T, seed=0), normal(S * T, seed=1), spans(S * T)
    bounds = torch.arange(S + 1, device="cuda") * T
    together = gae(rewards, values, mask, bounds, gamma=0.99, lam=0.95)
    some = slice(300 * T, 700 * T)  # still enough sequences for one program each
    alone = gae(rewards[some], values[some], mask[some], bounds[:401], gamma=0.99, lam=0.95)
    assert all(torch.equal(a, b[some]) for a, b in zip(alone, together, strict=True))


def test_whitened_advantages():
    rewards, values, mask = normal(S * T, seed=0), normal(S * T, seed=1), spans(S * T)
    bounds = torch.arange(S + 1, device="cuda") * T
    raw = gae(rewards, values, mask, bounds, gamma=0.99, lam=0.95)[0]
    white = gae(rewards, values, mask, bounds, gamma=0.99, lam=0.95, whiten=True)[0]
    taken = raw[mask].double()
    wanted = (taken - taken.mean()) / torch.sqrt(taken.var() + 1e-8)
    torch.testing.assert_close(white[mask].double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(masked_whiten(raw, mask)[mask].double(), wanted, rtol=1e-5, atol=1e-5)


def test_group_advantages():
    rewards = normal(1280, seed=0)
    groups = torch.randperm(1280, generator=torch.Generator().manual_seed(0)).cuda() // 5
    found = group_advantages(rewards, groups, 256).advantages
    order = groups.argsort(stable=True)
    sets = rewards.double()[order].view(256, 5)
    wanted = ((sets - sets.mean(1, keepdim=True)) / (sets.std(1, keepdim=True) + 1e-6)).flatten()
    torch.testing.assert_close(found[order].double(), wanted, rtol=1e-5, atol=1e-5)


def loss_in_torch(leaf: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp(leaf - old)
    per_token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    per_token = torch.where(advantages < 0, torch.minimum(per_token, -3.0 * advantages), per_token)
    kl = torch.expm1(ref - leaf) - (ref - leaf)
    return torch.where(mask, weights * (per_token + 0.01 * kl), 0.0).sum()


def test_policy_loss():
    count = S * T
    old = -normal(count, seed=0).abs()
    logprobs = (old + normal(count, seed=1, scale=0.15)).requires_grad_()
    ref, advantages, mask = old + normal(count, seed=2, scale=0.3), normal(count, seed=3), spans(count)
    weights = torch.full((count,), 1.0 / count, device="cuda")
    options = {"dual_clip": 3.0, "mask": mask, "ref_logprobs": ref, "kl_coefficient": 0.01}
    found = policy_loss(logprobs, old, advantages, weights, **options)
    gradient = torch.autograd.grad(found.loss, logprobs)[0]
    leaf = logprobs.detach().double().requires_grad_()
    exact = loss_in_torch(leaf, *(one.double() for one in (old, ref, advantages, weights)), mask)
    torch.testing.assert_close(found.loss.double(), exact.detach(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(exact, leaf)[0], rtol=1e-4, atol=1e-11)
    again = policy_loss(logprobs, old, advantages, weights, **options)
    assert torch.equal(found.loss, again.loss), "sums are made in one order"


def test_value_loss_and_kl():
    count = S * T
    old, returns = normal(count, seed=0), normal(count, seed=1)
    values = (old + normal(count, seed=2, scale=0.3)).requires_grad_()
    weights = torch.full((count,), 1.0 / count, device="cuda")
    found = value_loss(values, old, returns, weights, clip_range=0.2)
    new, past, aim = (one.detach().double() for one in (values, old, returns))
    errors = torch.maximum((new - aim) ** 2, (past + (new - past).clamp(-0.2, 0.2) - aim) ** 2)
    torch.testing.assert_close(found.loss.double(), (0.5 * errors * weights).sum(), rtol=1e-5, atol=1e-7)
    kl = kl_estimates(old, returns)
    d = (returns - old).double()
    torch.testing.assert_close(kl.double(), torch.expm1(d) - d, rtol=1e-5, atol=1e-7)
