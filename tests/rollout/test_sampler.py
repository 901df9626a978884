"""One token per row: the right distribution, the right log-probability, the row's own stream of draws."""

from __future__ import annotations

import math

import pytest
import torch

from zs_fast.rollout.sampler import _invert, sample_tokens
from zs_fast.types import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.5, -1.0, -30.0])


def draw(count: int, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    sampling = Sampling(max_new_tokens=1, seed=11, **settings)
    return sample_tokens(LOGITS.expand(count, -1), [sampling] * count, range(count))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_are_the_softmax_at_that_temperature(temperature):
    count = 20_000
    ids, logprobs = draw(count, temperature=temperature)
    expected = torch.softmax(LOGITS.double() / temperature, -1)
    observed = torch.bincount(ids, minlength=6).double()
    # Chi-square with 4 degrees of freedom (the last token is too rare): 30 has a chance of 5e-6.
    assert (((observed - count * expected) ** 2) / (count * expected))[:5].sum() < 30
    assert torch.allclose(logprobs.double(), expected.log()[ids], atol=1e-6)


def test_the_same_seed_and_counter_give_the_same_token_and_others_do_not():
    first, again = draw(200)[0], draw(200)[0]
    assert torch.equal(first, again)
    other = sample_tokens(LOGITS.expand(200, -1), [Sampling(max_new_tokens=1, seed=12)] * 200, range(200))[0]
    assert not torch.equal(first, other)
    repeated = sample_tokens(LOGITS.expand(50, -1), [Sampling(max_new_tokens=1, seed=12)] * 50, [3] * 50)[0]
    assert len(set(repeated.tolist())) == 1


def test_greedy_rows_take_the_arg_max_beside_sampled_ones():
    samplings = [Sampling(max_new_tokens=1, temperature=t, seed=s) for s, t in enumerate([0.0, 5.0] * 50)]
    ids, logprobs = sample_tokens(LOGITS.expand(100, -1), samplings, [0] * 100)
    assert set(ids[::2].tolist()) == {0} and len(set(ids[1::2].tolist())) > 2
    assert torch.allclose(logprobs[::2], torch.log_softmax(LOGITS, -1)[0].expand(50))


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 3}, {0, 1, 2}),  # of the two equal logits the smaller id
        ({"top_k": 100}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.1}, {0}),
        ({"top_p": 0.6}, {0, 1}),  # 0.537 + 0.197 crosses it
        ({"top_p": 0.999999}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.8}, {0, 1}),  # of what top_k left, token 0 has 0.73
        ({"top_k": 2, "top_p": 0.7}, {0}),
    ],
)
def test_truncation_keeps_exactly_these_and_does_not_touch_log_probabilities(settings, allowed):
    ids, logprobs = draw(4000, **settings)
    assert set(ids.tolist()) == allowed
    assert torch.allclose(logprobs, torch.log_softmax(LOGITS, -1)[ids])


def test_rows_with_different_truncation_do_not_mix():
    samplings = [Sampling(max_new_tokens=1, seed=s, top_k=k) for s in range(200) for k in (0, 1)]
    ids, _ = sample_tokens(LOGITS.expand(400, -1), samplings, [0] * 400)
    assert set(ids[1::2].tolist()) == {0} and set(ids[::2].tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("draw_value", [0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_a_token_of_weight_zero_is_never_drawn(draw_value):
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0, 0.0], [0.0, 0.0, 1e-30, 0.0, 0.0, 0.0]])
    ids = _invert(weights, torch.tensor([draw_value, draw_value], dtype=torch.float64))
    assert ids[0] in (1, 3) and ids[1] == 2


def test_log_probabilities_are_nats_of_a_bfloat16_model_computed_in_float32():
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, logprobs = sample_tokens(logits, [Sampling(max_new_tokens=1, seed=s) for s in range(3)], [0] * 3)
    exact = torch.log_softmax(logits.double(), -1).gather(-1, ids[:, None])[:, 0]
    assert logprobs.dtype == torch.float32 and torch.allclose(logprobs.double(), exact, atol=2e-6)
