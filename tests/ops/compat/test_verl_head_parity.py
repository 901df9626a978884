"""zs_kernels.compat.verl's log-probs, entropy and fused heads against verl 0.9.1's own.

Held to verl in float64: the error may be 1.1 times verl's own in the same type plus a floor: 4e-6 in float32, where the
backward pass has the log-sum-exp of a peaky row, near 30, rounded to half a unit of 2e-6; half a unit of the result in
bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from zs_kernels.compat import verl as ours
from zs_kernels.testing import assert_no_worse_than_torch, seeded

FLOOR = {torch.float32: 4e-6, torch.float64: 1e-12, torch.bfloat16: 2**-9}


def close(found, expected, **keywords):
    torch.testing.assert_close(found, expected, **({"rtol": 2e-6, "atol": 1e-7} | keywords))


def held(function, reference, leaves, dtype, names=None):
    """Results and gradients of a function of float tensors, against verl's in the same type and in float64."""
    results = []
    for call, to in ((function, dtype), (reference, dtype), (reference, torch.float64)):
        made = [leaf.to(dtype).to(to).requires_grad_() for leaf in leaves]
        values = call(*made)
        values = values if isinstance(values, tuple) else (values,)
        total = sum((v.double() * seeded(*v.shape, seed=40 + i)).sum() for i, v in enumerate(values))
        results.append([*values, *torch.autograd.grad(total, made)])
    assert [x.dtype for x in results[0]] == [x.dtype for x in results[1]]
    for i, columns in enumerate(zip(*results, strict=True)):
        assert_no_worse_than_torch(*columns, floor=FLOOR[dtype], name=f"number {i}")


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 65)], ids=str)
def test_logprobs_and_entropy_from_logits(verl, dtype, shape):
    functional = verl.functional
    labels = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(1))
    leaves = [seeded(*shape, seed=2, scale=4.0)]
    held(
        lambda x: ours.logprobs_from_logits(x, labels),
        lambda x: functional.logprobs_from_logits(x, labels),
        leaves,
        dtype,
    )
    held(ours.entropy_from_logits, functional.entropy_from_logits, leaves, dtype)
    held(
        lambda x: ours.compute_entropy_loss(x, torch.ones(shape[:-1]), "token-mean").reshape(1),
        lambda x: verl.core.compute_entropy_loss(x, torch.ones(shape[:-1]).to(x.dtype), "token-mean").reshape(1),
        leaves,
        torch.float32,
    )


def test_logits_are_left_alone_where_verl_leaves_them(verl):
    """inplace_backward is on by default, and means flash-attn's kernel alone."""
    logits = seeded(4, 9, seed=1).requires_grad_()
    before = logits.detach().clone()
    torch.autograd.grad(ours.logprobs_from_logits(logits, torch.tensor([0, 1, 2, 8])).sum(), logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_entropy_with_chunking(verl, dtype):
    logits = seeded(11, 33, seed=2, scale=3.0).to(dtype)
    found, expected = (
        where.entropy_from_logits_with_chunking(logits, chunk_size=4) for where in (ours, verl.functional)
    )
    assert found.dtype == expected.dtype == torch.float32
    close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_sum_of_squared_probabilities(verl, grad):
    logits = seeded(5, 33, seed=2, scale=3.0).requires_grad_(grad)
    found, expected = (where.calculate_sum_pi_squared_from_logits(logits) for where in (ours, verl.functional))
    assert found.requires_grad == expected.requires_grad == grad
    close(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 5)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_linear_for_ppo(verl, dtype, shape, temperature):
    """At a temperature other than 1 verl rounds bfloat16 logits twice: the bound is on our error alone."""
    labels = torch.randint(0, 37, shape, generator=torch.Generator().manual_seed(1))
    leaves = [seeded(*shape, 16, seed=2), seeded(37, 16, seed=3, scale=0.7)]
    mine, theirs = ours.FusedLinearForPPO(), verl.fused.FusedLinearForPPO(chunk_size=4)
    held(
        lambda h, w: mine(h, w, labels, temperature),
        lambda h, w: exactly(theirs, h, w, labels, temperature),
        leaves,
        dtype,
    )


def exactly(theirs, hidden, weight, labels, temperature):
    """verl's module, whose log-probs are float32 whatever the input: in float64 its formula."""
    if hidden.dtype != torch.float64:
        return theirs(hidden, weight, labels, temperature)
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def test_a_temperature_per_token(verl):
    """verl's heads take one number; a tensor of one, or of one per token, is ours."""
    hidden, weight, labels = seeded(2, 3, 16, seed=1), seeded(11, 16, seed=2), torch.randint(0, 11, (2, 3))
    per_token = seeded(2, 3, seed=3).abs() + 0.5
    found, _ = ours.FusedLinearForPPO()(hidden, weight, labels, per_token)
    close(
        found,
        exactly(None, hidden.double(), weight.double(), labels, per_token.double()[..., None])[0].float(),
        atol=1e-5,
    )
    one, _ = ours.FusedLinearForPPO()(hidden, weight, labels, torch.tensor(0.7))
    close(one, ours.FusedLinearForPPO()(hidden, weight, labels, 0.7)[0], atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy(reduction, dtype):
    """verl's kernel runs on GPUs alone: the formula it computes, in float64, on the same rounded inputs."""
    labels = torch.randint(0, 37, (2, 5), generator=torch.Generator().manual_seed(1))
    leaves = [seeded(2, 5, 16, seed=2), seeded(37, 16, seed=3, scale=0.7)]

    def reference(hidden, weight):
        logprobs, entropy = (x.flatten() for x in exactly(None, hidden.double(), weight.double(), labels, 0.8))
        logprobs = {"none": logprobs, "sum": logprobs.sum(), "mean": logprobs.mean()}[reduction]
        return tuple(x.to(torch.float32) for x in (logprobs, entropy))

    def rounded(hidden, weight):
        logits = (hidden @ weight.T).float() / 0.8
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, labels.unsqueeze(-1)).flatten()
        chosen = {"none": chosen, "sum": chosen.sum(), "mean": chosen.mean()}[reduction]
        return chosen, -(logprobs.exp() * logprobs).sum(-1).flatten()

    results = []
    for call, to in ((None, dtype), (rounded, dtype), (reference, torch.float64)):
        made = [leaf.to(dtype).to(to).requires_grad_() for leaf in leaves]
        values = call(*made) if call else ours.linear_cross_entropy(*made, labels, 0.8, reduction)
        total = sum((v * seeded(*v.shape, seed=40 + i)).sum() for i, v in enumerate(values))
        results.append([*values, *torch.autograd.grad(total, made)])
    assert results[0][0].dtype == results[0][1].dtype == torch.float32
    for columns in zip(*results, strict=True):
        assert_no_worse_than_torch(*columns, floor=FLOOR[dtype])


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"temperature": 1}, AssertionError, "'temperature' must be a float"),
        ({"reduction": "max"}, ValueError, "'reduction' must be none, sum or mean"),
    ],
)
def test_arguments_of_the_head_are_checked(keywords, error, message):
    with pytest.raises(error, match=message):
        ours.linear_cross_entropy(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), **keywords)


def test_a_backend_that_is_none_is_refused_as_by_verl(verl):
    for where in (ours, verl.fused):
        with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend: cuda"):
            where.FusedLinearForPPO(impl_backend="cuda")


@pytest.mark.parametrize("name", ["entropy_from_logits", "logprobs_from_logits"])
def test_ours_compile_as_verl_compiles_them(verl, name):
    """verl's engines wrap the entropy in torch.compile(dynamic=True): one graph for all lengths, inside a patch too."""
    counter = CompileCounter()
    with ours.patch() as patched:
        compiled = torch.compile(getattr(verl.functional, name), backend=counter, dynamic=True, fullgraph=True)
        for length in range(3, 13):
            logits, labels = seeded(length, 33, seed=length), torch.arange(length)
            arguments = (logits,) if name == "entropy_from_logits" else (logits, labels)
            close(compiled(*arguments), getattr(ours, name)(*arguments))
    assert counter.frame_count == 1
    assert not patched.calls[name]
