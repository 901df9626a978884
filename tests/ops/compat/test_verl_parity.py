"""zs_kernels.compat.verl against verl 0.9.1's own functions: losses, KL, masked statistics.

Elementwise formulas in float32 are compared bit for bit (k1, k2, abs; counts). Tolerances elsewhere: 2e-6 relative for
sums (verl divides the sum, we weigh each token), k3 one unit of exp(d) - d - 1 (we have expm1), gradients 2e-6 relative
to the largest.
"""

from __future__ import annotations

import math

import pytest
import torch

from zs_kernels.compat import verl as ours
from zs_kernels.testing import seeded

B, T = 6, 9
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
PENALTIES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "kl+", "k1+", "abs+", "k2+", "k3+", "low_var_kl+")
LOSSES = ("vanilla", "gspo", "cispo", "gpg", "reinforce")


def mask(dtype=torch.int64, *, seed=3):
    """Unmasked shares of all sorts; one response is masked throughout, one is full."""
    chosen = seeded(B, T, seed=seed) > -0.3
    chosen[1], chosen[2] = False, True
    return chosen.to(dtype)


def configuration(verl, **keywords):
    needed = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    return verl.ActorConfig(**needed, **({"clip_ratio_low": 0.2, "clip_ratio_high": 0.28} | keywords))


def tokens(seed=0, spread=0.4):
    old = -seeded(B, T, seed=seed).abs() - 0.05
    return old, (old + spread * seeded(B, T, seed=seed + 1)).requires_grad_(), seeded(B, 1, seed=seed + 2).expand(B, T)


def close(found, expected, **keywords):
    torch.testing.assert_close(found, expected, **({"rtol": 2e-6, "atol": 1e-7} | keywords))


def compare_losses(verl, name, log_prob, *arguments, **keywords):
    """Loss, gradient and metrics of a policy loss, ours and theirs."""
    results = [getattr(where, name)(*arguments, **keywords) for where in (ours, verl.core)]
    (loss, metrics), (expected, expected_metrics) = results
    assert abs(expected.item()) > 1e-3, "a loss of 0 would compare nothing"
    assert loss.dtype == expected.dtype
    close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(x, log_prob)[0] for x in (loss, expected))
    close(gradient, expected_gradient, atol=2e-6 * float(expected_gradient.abs().max()))
    assert metrics.keys() == expected_metrics.keys()
    assert all(type(value) is float for value in metrics.values())
    assert metrics == pytest.approx(expected_metrics, rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "rollout weights"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool], ids=str)
def test_policy_losses(verl, mode, name, weighted, dtype):
    old, log_prob, advantages = tokens()
    weights = (0.3 * seeded(B, T, seed=8)).exp() if weighted else None
    arguments = (old, log_prob, advantages, mask(dtype), mode, configuration(verl), weights)
    compare_losses(verl, f"compute_policy_loss_{name}", log_prob, *arguments)


@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo"])
def test_ratios_far_out(verl, name):
    """Log ratios beyond 20 (gspo: sequence means beyond 10), where the gradient stops; dual clip at work."""
    old, log_prob, advantages = tokens(spread=25.0)
    arguments = (old, log_prob, advantages, mask(), "token-mean", configuration(verl))
    compare_losses(verl, f"compute_policy_loss_{name}", log_prob, *arguments)


def test_gspo_holds_a_sequence_at_e_to_the_tenth(verl):
    """All log ratios 15 and an advantage of -1, which no clip bounds: the loss is exp(10), without gradient."""
    log_prob = torch.full((2, 3), -1.0, requires_grad=True)
    old = torch.tensor([[-16.0], [-1.0]]).expand(2, 3)
    arguments = (old, log_prob, torch.full((2, 3), -1.0), torch.ones(2, 3), "seq-mean-token-mean", configuration(verl))
    compare_losses(verl, "compute_policy_loss_gspo", log_prob, *arguments)
    loss, _ = ours.compute_policy_loss_gspo(*arguments)
    assert loss.item() == pytest.approx((math.exp(10) + 1) / 2)


def test_per_token_advantages_and_symmetric_clip(verl):
    old, log_prob, _ = tokens()
    config = configuration(verl, clip_ratio=0.1, clip_ratio_low=0.1, clip_ratio_high=0.1, clip_ratio_c=1.5)
    for name in LOSSES:
        arguments = (old, log_prob, seeded(B, T, seed=6), mask(), "token-mean", config)
        compare_losses(verl, f"compute_policy_loss_{name}", log_prob, *arguments)


def test_sizes_of_the_whole_batch(verl):
    old, log_prob, advantages = tokens()
    config = configuration(verl)
    sizes = {"dp_size": 4, "batch_num_tokens": 321, "global_batch_size": 48, "loss_scale_factor": 77}
    config.global_batch_info.update(sizes)
    for mode in MODES:
        arguments = (old, log_prob, advantages, mask(), mode, config)
        compare_losses(verl, "compute_policy_loss_vanilla", log_prob, *arguments)


def test_the_older_spelling(verl):
    old, log_prob, advantages = tokens()
    arguments = (old, log_prob, advantages, mask(), 0.2)
    keywords = {"cliprange_high": 0.3, "loss_agg_mode": "seq-mean-token-mean"}
    with pytest.warns(FutureWarning):
        expected = verl.core.compute_policy_loss(*arguments, **keywords)
    found = ours.compute_policy_loss(*arguments, **keywords)
    for a, b in zip(found, expected, strict=True):
        close(a, b.detach() if b is not expected[0] else b)
    close(torch.autograd.grad(found[0], log_prob)[0], torch.autograd.grad(expected[0], log_prob)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_aggregation(verl, mode, dtype):
    losses = seeded(B, T, seed=1)
    for sizes in ({}, {"dp_size": 2, "batch_num_tokens": 19, "global_batch_size": 7, "loss_scale_factor": 5}):
        close(ours.agg_loss(losses, mask(dtype), mode, **sizes), verl.core.agg_loss(losses, mask(dtype), mode, **sizes))


def test_a_mask_may_weigh_in_the_aggregation(verl):
    losses, weights = seeded(B, T, seed=1), mask(torch.float32) * seeded(B, T, seed=2).abs()
    for mode in MODES:
        close(ours.agg_loss(losses, weights, mode), verl.core.agg_loss(losses, weights, mode))


# Losses 1, 2, 3 (one masked), 4, 5, 6 in two rows of three; the mask has 2 and 3 tokens.
BY_HAND = {
    "token-mean": (1 + 2 + 4 + 5 + 6) / 5,
    "token-sum": 18.0,
    "seq-mean-token-sum": (3 + 15) / 2,
    "seq-mean-token-sum-norm": (3 + 15) / 2 / 3,
    "seq-mean-token-mean": (1.5 + 5) / 2,
}


@pytest.mark.parametrize("mode", MODES)
def test_normalisers_by_hand(verl, mode):
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    chosen = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert ours.agg_loss(losses, chosen, mode).item() == pytest.approx(BY_HAND[mode])
    with torch.no_grad():  # ratio 1, so that the loss of a token is minus its advantage
        loss, _ = ours.compute_policy_loss_vanilla(losses, losses, -losses, chosen, mode, configuration(verl))
    assert loss.item() == pytest.approx(BY_HAND[mode])


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_mask_is_0_where_verl_divides_by_0(verl, mode):
    losses, empty = seeded(B, T, seed=1), torch.zeros(B, T)
    assert ours.agg_loss(losses, empty, mode) == 0
    loss, metrics = ours.compute_policy_loss_vanilla(losses, losses, losses, empty, mode, configuration(verl))
    assert loss == 0 and set(metrics.values()) == {0.0}


def test_garbage_in_masked_slots(verl):
    """verl's losses survive it forward; ours backward as well."""
    old, log_prob, advantages = tokens()
    chosen = mask()
    for name in LOSSES:
        function, config = f"compute_policy_loss_{name}", configuration(verl)
        clean, _ = getattr(ours, function)(old, log_prob, advantages, chosen, "token-mean", config)
        dirty = log_prob.detach().masked_fill(chosen == 0, torch.nan).requires_grad_()
        arguments = (old.masked_fill(chosen == 0, torch.inf), dirty, advantages, chosen, "token-mean", config)
        found, metrics = getattr(ours, function)(*arguments)
        assert found == clean and all(math.isfinite(value) for value in metrics.values())
        gradient = torch.autograd.grad(found, dirty)[0]
        assert gradient.isfinite().all() and not gradient[chosen == 0].any()
    values = seeded(B, T, seed=1).masked_fill(chosen == 0, torch.nan)
    close(ours.masked_mean(values, chosen), verl.functional.masked_mean(values, chosen))
    assert ours.agg_loss(values, chosen, "seq-mean-token-mean").isfinite()


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("spread", [0.3, 15.0], ids=["near", "far"])
def test_kl_penalty(verl, kind, spread):
    base, upstream = seeded(B, T, seed=1), seeded(B, T, seed=3)
    results = []
    for where in (ours, verl.core):
        log_prob, ref = base.clone().requires_grad_(), (base + spread * seeded(B, T, seed=2)).requires_grad_()
        value = where.kl_penalty(log_prob, ref, kind)
        results.append((value, *torch.autograd.grad((value * upstream).sum(), (log_prob, ref))))
    exact = not kind.startswith(("k3", "low_var_kl"))
    for i, (found, expected) in enumerate(zip(*results, strict=True)):
        assert found.dtype == expected.dtype
        if exact and (i == 0 or not kind.endswith("+")):
            assert torch.equal(found, expected)
        else:
            close(found, expected, rtol=1e-6, atol=3e-7)


def test_kl_over_the_vocabulary_is_refused_with_a_way_out():
    with pytest.raises(NotImplementedError, match=r"'full' is not one of .*zs_kernels.linear_kl"):
        ours.kl_penalty(torch.zeros(2), torch.zeros(2), "full")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [0.05, 0.5])
def test_value_loss(verl, mode, clip):
    values, returns = seeded(B, T, seed=1), seeded(B, T, seed=2)
    predictions = (values + 0.3 * seeded(B, T, seed=3)).requires_grad_()
    results = []
    for where in (ours, verl.core):
        sizes = {"dp_size": 2, "batch_num_tokens": 33, "global_batch_size": 5, "loss_scale_factor": 4}
        loss, clipped = where.compute_value_loss(predictions, returns, values, mask(), clip, mode, **sizes)
        results.append((loss, clipped, torch.autograd.grad(loss, predictions)[0]))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        close(found, expected)
    assert results[1][1] > 0


def test_value_loss_by_hand():
    """Old value 0, clip 0.5: a prediction of 2 for a return of 1 counts as 2 (error 1), of -2 as -2 (error 9)."""
    predictions, returns = torch.tensor([[2.0, -2.0]]), torch.ones(1, 2)
    loss, share = ours.compute_value_loss(predictions, returns, torch.zeros(1, 2), torch.ones(1, 2), 0.5)
    assert loss.item() == pytest.approx(0.5 * (1 + 9) / 2) and share == 0
    loss, share = ours.compute_value_loss(1.0 - predictions * 0, returns, torch.zeros(1, 2), torch.ones(1, 2), 0.5)
    assert loss.item() == pytest.approx(0.5 * 0.25) and share == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.float64], ids=str)
def test_masked_statistics(verl, dtype, values_dtype):
    values, chosen = seeded(B, T, seed=1).to(values_dtype), mask(dtype)
    for axis in (None, 0, 1, -1, (0, 1)):
        for name in ("masked_sum", "masked_mean"):
            found, expected = (getattr(where, name)(values, chosen, axis) for where in (ours, verl.functional))
            assert found.dtype == expected.dtype
            close(found, expected)
    for name, keywords in (
        ("masked_var", {}),
        ("masked_var", {"unbiased": False}),
        ("masked_whiten", {}),
        ("masked_whiten", {"shift_mean": False}),
    ):
        found, expected = (getattr(where, name)(values, chosen, **keywords) for where in (ours, verl.functional))
        assert found.dtype == expected.dtype
        close(found, expected, atol=1e-6)


def test_gradients_of_masked_statistics(verl):
    chosen, upstream = mask(), seeded(B, T, seed=4)
    for name in ("masked_mean", "masked_var", "masked_whiten"):
        gradients = []
        for where in (ours, verl.functional):
            values = seeded(B, T, seed=1).requires_grad_()
            result = getattr(where, name)(values, chosen)
            scale = upstream if name == "masked_whiten" else 1.0
            gradients.append(torch.autograd.grad((result * scale).sum(), values)[0])
        close(*gradients, atol=1e-6)


@pytest.mark.parametrize(("count", "message"), [(0, "At least one element"), (1, "sum of the mask is one")])
def test_statistics_of_too_few_raise_as_verls_do(verl, count, message):
    chosen = torch.zeros(2, 3)
    chosen.view(-1)[:count] = 1
    for where in (ours, verl.functional):
        for name in ("masked_var", "masked_whiten"):
            with pytest.raises(ValueError, match=message):
                getattr(where, name)(torch.ones(2, 3), chosen)


@pytest.mark.parametrize("name", LOSSES)
def test_weights_in_the_mask_are_refused(verl, name):
    """verl would weigh the loss and the metrics by them; the ops choose."""
    old, log_prob, advantages = tokens()
    arguments = (old, log_prob, advantages, torch.full((B, T), 0.5), "token-mean", configuration(verl))
    with pytest.raises(ValueError, match="'response_mask' must be zeros and ones; weigh by rollout_is_weights"):
        getattr(ours, f"compute_policy_loss_{name}")(*arguments)


def test_gradients_that_would_be_lost_are_refused(verl):
    old, log_prob, advantages = tokens()
    config = configuration(verl)
    for i in (0, 2):
        arguments = [old, log_prob, advantages.clone(), mask(), "token-mean", config]
        arguments[i] = arguments[i].clone().requires_grad_()
        with pytest.raises(ValueError, match=r"must not ask for a gradient.*detach"):
            ours.compute_policy_loss_vanilla(*arguments)


def test_other_errors_are_verls(verl):
    losses = torch.ones(2, 3)
    for where in (ours, verl.core):
        with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
            where.agg_loss(losses, losses, "mean")
        with pytest.raises(ValueError, match="batch_num_tokens is required when dp_size > 1"):
            where.agg_loss(losses, losses, "token-mean", dp_size=2)
        with pytest.raises(ValueError, match="global_batch_size is required when dp_size > 1"):
            where.agg_loss(losses, losses, "seq-mean-token-mean", dp_size=2)
        with pytest.raises(AssertionError):
            where.compute_policy_loss_vanilla(losses, losses, losses, losses)
