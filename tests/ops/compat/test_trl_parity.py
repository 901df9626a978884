"""Log-probs, entropy and the chunked head of zs_kernels.compat.trl against TRL 1.16 itself, forward and backward.

Held to TRL in float64: the error may be 1.1 times TRL's own in the same type plus a floor (4e-6 in float32, where
the backward pass has the log-sum-exp of a peaky row, near 30, rounded to half a unit of 2e-6; in bfloat16
both round the result once, half a unit in the last place, 2^-9 relative).
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from zs_kernels.compat import trl
from zs_kernels.testing import assert_no_worse_than_torch, seeded

FLOOR = {torch.float32: 4e-6, torch.float64: 1e-12, torch.bfloat16: 2**-9}
DTYPES = list(FLOOR)


def with_grad(tensor, dtype):
    return tensor.to(dtype).requires_grad_()


def held(ours, theirs, exact, dtype):
    """Compare results and their gradients: dicts of tensors."""
    for name in exact:
        assert_no_worse_than_torch(ours[name], theirs[name], exact[name], floor=FLOOR[dtype], name=name)


def run(function, leaves, *arguments, upstream, **keywords):
    """Results of a function by number, and the gradients of the leaves under the given upstream gradients."""
    results = function(*leaves, *arguments, **keywords)
    results = results if isinstance(results, tuple) else (results,)
    found = {f"result {i}": result for i, result in enumerate(results) if result is not None}
    total = sum((r.double() * g).sum() for r, g in zip(results, upstream, strict=False) if g is not None)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return found | {f"gradient {i}": g for i, g in enumerate(torch.autograd.grad(total, wanted))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 101), (1, 1, 7), (2, 2, 2, 19)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_selective_log_softmax(trl_utils, dtype, shape, temperature):
    logits = seeded(*shape, seed=1, scale=4.0)
    index = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(2))
    upstream = [seeded(*shape[:-1], seed=3)]
    theirs_function = trl_utils.selective_log_softmax
    ours, theirs, exact = (
        run(function, [with_grad(logits.to(dtype), to)], index, temperature, upstream=upstream)
        for function, to in (
            (trl.selective_log_softmax, dtype),
            (theirs_function, dtype),
            (theirs_function, torch.double),
        )
    )
    assert ours["result 0"].dtype == theirs["result 0"].dtype
    held(ours, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_ids_per_row(trl_utils, dtype):
    logits = seeded(2, 3, 41, seed=1, scale=4.0).to(dtype)
    index = torch.randint(0, 41, (2, 3, 4), generator=torch.Generator().manual_seed(2))
    upstream = [seeded(2, 3, 4, seed=3)]
    theirs_function = trl_utils.selective_log_softmax
    ours = run(trl.selective_log_softmax, [with_grad(logits, dtype)], index, upstream=upstream)
    theirs = run(theirs_function, [with_grad(logits, dtype)], index, upstream=upstream)
    exact = run(theirs_function, [with_grad(logits, torch.double)], index, upstream=upstream)
    assert ours["result 0"].dtype == theirs["result 0"].dtype
    held(ours, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0], ids=["flat", "plain", "peaky"])
def test_entropy_from_logits(trl_utils, dtype, scale):
    logits = seeded(3, 130, 33, seed=1, scale=scale).to(dtype)
    upstream = [seeded(3, 130, seed=3)]
    theirs_function = trl_utils.entropy_from_logits
    ours = run(trl.entropy_from_logits, [with_grad(logits, dtype)], upstream=upstream)
    theirs = run(theirs_function, [with_grad(logits, dtype)], upstream=upstream)
    exact = run(theirs_function, [with_grad(logits, torch.double)], upstream=upstream)
    assert ours["result 0"].dtype == theirs["result 0"].dtype
    held(ours, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.int64], ids=str)
def test_selective_log_softmax_and_entropy(trl_utils, dtype, mask_dtype):
    logits = seeded(4, 5, 33, seed=1, scale=3.0).to(dtype)
    index = torch.randint(0, 33, (4, 5), generator=torch.Generator().manual_seed(2))
    mask = None if mask_dtype is None else (seeded(4, 5, seed=5) > 0).to(mask_dtype)
    keywords = {"temperature": 0.7, "row_mask": mask, "upstream": [seeded(4, 5, seed=3), seeded(4, 5, seed=4)]}
    theirs_function = trl_utils.selective_log_softmax_and_entropy
    ours = run(trl.selective_log_softmax_and_entropy, [with_grad(logits, dtype)], index, **keywords)
    theirs = run(theirs_function, [with_grad(logits, dtype)], index, **keywords)
    exact = run(theirs_function, [with_grad(logits, torch.double)], index, **keywords)
    assert [ours[f"result {i}"].dtype for i in (0, 1)] == [theirs[f"result {i}"].dtype for i in (0, 1)]
    held(ours, theirs, exact, dtype)
    if mask is not None:
        assert not ours["result 0"][mask == 0].any() and not ours["result 1"][mask == 0].any()


def test_an_entropy_for_the_log_has_no_gradient(trl_utils):
    logits, index = seeded(3, 7, seed=1).requires_grad_(), torch.tensor([0, 3, 6])
    for function in (trl.selective_log_softmax_and_entropy, trl_utils.selective_log_softmax_and_entropy):
        logprobs, entropy = function(logits, index, entropy_requires_grad=False)
        assert logprobs.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_trls_triton_kernel(trl_utils, dtype, masked):
    """Under Triton's interpreter, forward and backward; float32 results whatever the logits."""
    kernel = sys.modules["trl.kernels"].selective_log_softmax_and_entropy
    logits = seeded(2, 3, 1030, seed=1, scale=3.0).to(dtype)
    index = torch.randint(0, 1030, (2, 3), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]) if masked else None
    keywords = {"temperature": 0.9, "row_mask": mask, "upstream": [seeded(2, 3, seed=3), seeded(2, 3, seed=4)]}
    ours = run(trl.fused_log_softmax_and_entropy, [with_grad(logits, dtype)], index, **keywords)
    theirs = run(kernel, [with_grad(logits, dtype)], index, **keywords)
    exact = run(trl_utils.selective_log_softmax_and_entropy, [with_grad(logits, torch.double)], index, **keywords)
    assert ours["result 0"].dtype == theirs["result 0"].dtype == torch.float32
    held(ours, theirs, exact, torch.float32 if dtype == torch.float32 else torch.bfloat16)
    for i in (0, 1):  # no rounding to the logits' type on the way
        assert_no_worse_than_torch(ours[f"result {i}"], theirs[f"result {i}"], exact[f"result {i}"], floor=1e-6)


def test_garbage_in_masked_rows():
    logits = seeded(2, 3, 11, seed=1)
    logits[0, 1], logits[1, 2] = torch.nan, torch.inf
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    logits.requires_grad_()
    index = torch.full((2, 3), 10).masked_fill(mask == 0, -100)
    logprobs, entropy = trl.selective_log_softmax_and_entropy(logits, index, row_mask=mask)
    (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), logits)
    assert logprobs.isfinite().all() and entropy.isfinite().all() and gradient.isfinite().all()
    assert not gradient[mask == 0].any()


def test_rows_that_are_no_matrix_are_not_copied(trl_utils):
    """`logits[:, :-1]`: the gradient arrives in the whole tensor, and the last position gets none."""
    logits, index = seeded(3, 5, 17, seed=1).requires_grad_(), torch.randint(0, 17, (3, 4))
    upstream = seeded(3, 4, seed=2)
    ours = torch.autograd.grad((trl.selective_log_softmax(logits[:, :-1], index) * upstream).sum(), logits)[0]
    theirs = torch.autograd.grad((trl_utils.selective_log_softmax(logits[:, :-1], index) * upstream).sum(), logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not ours[:, -1].any()
    flat = trl.selective_log_softmax(logits[:, :-1].transpose(0, 1), index.T)
    torch.testing.assert_close(flat.T, trl_utils.selective_log_softmax(logits[:, :-1], index), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperatures_that_mean_nothing_raise_as_trls_do(trl_utils, temperature):
    for module in (trl, trl_utils):
        with pytest.raises(ValueError, match="temperature must be positive"):
            module.selective_log_softmax(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), temperature)


HEADS = {
    "plain": {},
    "softcap": {"final_logit_softcapping": 5.0},
    "scale": {"logit_scale": 0.3},
    "softcap and scale": {"final_logit_softcapping": 3.0, "logit_scale": 2.0},
}


def options_in_order(options):
    return options.get("final_logit_softcapping"), options.get("logit_scale", 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_chunked_head(trl_utils, dtype, head, with_bias):
    theirs_function = sys.modules["trl.kernels"].ChunkedLogProbFunction.apply
    hidden, weight = seeded(9, 16, seed=1).to(dtype), seeded(37, 16, seed=2, scale=0.7).to(dtype)
    bias = seeded(37, seed=3).to(dtype) if with_bias else None
    targets = torch.randint(0, 37, (9,), generator=torch.Generator().manual_seed(4))
    upstream = [seeded(9, seed=5), seeded(9, seed=6)]

    def called(function, to):
        def call(hidden, weight, bias=None):
            results = function(hidden, weight, bias, targets, 0.8, 16, *options_in_order(HEADS[head]))
            return tuple(r.double() if r.dtype == torch.bool else r for r in results)

        leaves = [with_grad(x, to) for x in (hidden, weight, bias) if x is not None]
        return run(call, leaves, upstream=upstream)

    ours, theirs = called(trl.ChunkedLogProbFunction.apply, dtype), called(theirs_function, dtype)
    exact = called(theirs_function, torch.double)  # on the same rounded inputs
    held(ours, theirs, exact, dtype)
    assert [ours[f"result {i}"].dtype for i in range(4)] == [torch.float32] * 4


@pytest.mark.parametrize("outputs", [(), ("entropy",), ("is_top1",), ("mean_logits", "log_sum_sq_probs")], ids=str)
def test_only_the_outputs_asked_for(trl_utils, outputs):
    theirs_function = sys.modules["trl.kernels"].ChunkedLogProbFunction.apply
    arguments = (seeded(4, 8, seed=1), seeded(11, 8, seed=2), None, torch.tensor([0, 5, 10, 3]), 1.0, 4)
    ours = trl.ChunkedLogProbFunction.apply(*arguments, outputs=outputs)
    theirs = theirs_function(*arguments, None, 1.0, outputs)
    assert [x is None for x in ours] == [x is None for x in theirs]
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)


def test_the_first_of_equal_logits_is_the_largest(trl_utils):
    theirs_function = sys.modules["trl.kernels"].ChunkedLogProbFunction.apply
    weight = torch.ones(6, 3)
    arguments = (torch.ones(2, 3), weight, None, torch.tensor([0, 4]), 1.0, 4)
    assert trl.ChunkedLogProbFunction.apply(*arguments)[4].tolist() == theirs_function(*arguments)[4].tolist()
    assert trl.ChunkedLogProbFunction.apply(*arguments)[4].tolist() == [True, False]


def test_a_frozen_head_gets_no_gradient(trl_utils):
    theirs_function = sys.modules["trl.kernels"].ChunkedLogProbFunction.apply
    weight, targets, upstream = seeded(11, 8, seed=2), torch.tensor([0, 5, 10, 3]), seeded(4, seed=3)
    gradients = []
    for function in (trl.ChunkedLogProbFunction.apply, theirs_function):
        hidden = seeded(4, 8, seed=1).requires_grad_()
        logprobs, entropy, *_ = function(hidden, weight, None, targets, 1.0, 4)
        gradients.append(torch.autograd.grad((logprobs * upstream + entropy).sum(), hidden)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_autocast_runs_the_head_in_its_type(trl_utils):
    theirs_function = sys.modules["trl.kernels"].ChunkedLogProbFunction.apply
    arguments = (seeded(6, 16, seed=1), seeded(23, 16, seed=2), None, torch.tensor([0, 5, 10, 3, 1, 22]), 1.0, 16)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = trl.ChunkedLogProbFunction.apply(*arguments), theirs_function(*arguments)
    full = trl.ChunkedLogProbFunction.apply(*arguments)[0]
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0.02)
    assert (ours[0] - full).abs().max() > 1e-4, "not in float32"


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scales_that_the_op_cannot_take_are_refused(scale):
    arguments = (seeded(2, 4, seed=1), seeded(5, 4, seed=2), None, torch.tensor([0, 4]), 1.0, 4)
    with pytest.raises(ValueError, match=r"'logit_scale' must be above 0; .*patch\(only"):
        trl.ChunkedLogProbFunction.apply(*arguments, logit_scale=scale)


def test_a_head_partitioned_by_zero_is_refused():
    weight = seeded(5, 4, seed=2)
    weight.ds_status = SimpleNamespace()
    with pytest.raises(RuntimeError, match=r"ZeRO-3.*patch\(only"):
        trl.ChunkedLogProbFunction.apply(seeded(2, 4, seed=1), weight, None, torch.tensor([0, 4]), 1.0, 4)


def test_no_rows():
    logprobs, entropy = trl.selective_log_softmax_and_entropy(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (0,)
    assert trl.entropy_from_logits(torch.zeros(2, 0, 7)).shape == (2, 0)
