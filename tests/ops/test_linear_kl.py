"""Exact KL over the vocabulary: every backend against float64 autograd of the plain formula."""

from __future__ import annotations

import pytest
import torch

from zs_kernels import linear_kl
from zs_kernels._device import use_backend
from zs_kernels.linear_kl import linear_kl_reference
from zs_kernels.testing import assert_no_worse_than_torch, error_against, poison_empty, seeded

FLOORS = {torch.float32: 4e-6, torch.bfloat16: 6e-3, torch.float16: 5e-4}
"""bfloat16: Triton's interpreter cuts the gradient of the logits off where a GPU rounds it."""
BACKENDS = ("reference", "triton")


def inputs(N=7, H=12, G=5, V=131, *, dtype=torch.float32, scale=1.0, seed=0):
    shapes = {"hidden": (N, H), "ref_hidden": (N, G), "weight": (V, H), "ref_weight": (V, G)}
    made = {}
    for number, (name, shape) in enumerate(shapes.items()):
        made[name] = seeded(*shape, seed=seed + number, scale=scale if "hidden" in name else 0.5, dtype=dtype)
    return made


def gradients(function, given, upstream, names=("hidden", "weight"), **options):
    leaves = {n: t.detach().clone().requires_grad_(n in names) for n, t in given.items()}
    kl = function(*(leaves[n] for n in ("hidden", "ref_hidden", "weight", "ref_weight")), **options)
    kl.backward(upstream.to(kl.dtype))
    return kl.detach(), *(leaves[n].grad for n in names)


def widened(given):
    return {name: tensor.double() for name, tensor in given.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0], ids=["flat", "usual", "peaky"])
def test_value_and_gradient_against_float64(backend, dtype, scale):
    given, upstream = inputs(dtype=dtype, scale=scale), seeded(7, seed=9)
    exact = gradients(linear_kl_reference, widened(given), upstream)
    by_torch = gradients(linear_kl_reference, given, upstream)
    with use_backend(backend), poison_empty():
        found = gradients(linear_kl, given, upstream)
    for name, ours, theirs, truth in zip(("kl", "hidden", "weight"), found, by_torch, exact, strict=True):
        assert_no_worse_than_torch(ours, theirs, truth, floor=FLOORS[dtype], name=name)
    assert (found[0] >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [1, 127, 128, 129, 4095, 4096, 4097])
def test_odd_vocabularies(backend, V):
    given, upstream = inputs(N=3, V=V, seed=20), seeded(3, seed=9)
    exact = gradients(linear_kl_reference, widened(given), upstream)
    with use_backend(backend):
        found = gradients(linear_kl, given, upstream)
    for ours, truth in zip(found, exact, strict=True):
        assert float((ours - truth).abs().max()) <= 2e-5 * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_together(backend):
    """Bias of both, per-row temperature, a mask over NaN, chunks of two rows."""
    given, upstream = inputs(), seeded(7, seed=9)
    mask = torch.tensor([True, False, True, True, False, True, True])
    options = {
        "bias": seeded(131, seed=30),
        "ref_bias": seeded(131, seed=31),
        "temperature": torch.linspace(0.5, 2.0, 7),
        "mask": mask,
    }
    exact = gradients(linear_kl_reference, widened(given), upstream, **options)
    for name in ("hidden", "ref_hidden"):
        given[name][~mask] = torch.nan
    with use_backend(backend), poison_empty():
        for more in ({}, {"workspace_bytes": 2 * 131 * 24}, {"mask_count": 5}):
            found = gradients(linear_kl, given, upstream, **options, **more)
            for ours, truth in zip(found, exact, strict=True):
                assert error_against(truth, ours) <= 4e-6
            assert not found[0][~mask].any() and not found[1][~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_has_a_gradient_and_the_reference_none(backend):
    given = inputs()
    bias = seeded(131, seed=30).requires_grad_()
    wide = bias.detach().double().requires_grad_()
    for tensor in given.values():
        tensor.requires_grad_()
    with use_backend(backend):
        linear_kl(*given.values(), bias=bias).sum().backward()
    linear_kl_reference(*widened({n: t.detach() for n, t in given.items()}).values(), bias=wide).sum().backward()
    assert error_against(wide.grad, bias.grad) <= 4e-6
    assert given["ref_hidden"].grad is None and given["ref_weight"].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_itself_it_is_0(backend):
    hidden, weight = seeded(5, 8, seed=1), seeded(40, 8, seed=2).requires_grad_()
    with use_backend(backend):
        kl = linear_kl(hidden, hidden, weight, weight)
    kl.sum().backward()
    assert float(kl.detach().max()) <= 1e-6 and float(weight.grad.abs().max()) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_minus_infinity(backend):
    """Ruled out by the policy: nothing to add. Ruled out by the reference alone: infinite, and no gradient."""
    hidden, weight = torch.ones(2, 1, requires_grad=True), torch.tensor([[0.0], [1.0], [2.0]], requires_grad=True)
    never = torch.tensor([0.0, -torch.inf, 0.0])
    with use_backend(backend):
        kept = linear_kl(hidden, hidden, weight, weight, bias=never, ref_bias=torch.zeros(3))
        lost = linear_kl(hidden, hidden, weight, weight, ref_bias=never)
    p = torch.tensor([0.0, 2.0]).softmax(0)
    q = torch.tensor([0.0, 1.0, 2.0]).softmax(0)[[0, 2]]
    assert kept.tolist() == pytest.approx([float((p * (p / q).log()).sum())] * 2, rel=1e-5)
    assert torch.isinf(lost).all()
    with use_backend(backend):
        (kept.sum() + lost.sum()).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and not weight.grad[1].any()


def test_registered_and_compiled():
    given = inputs()
    for name in ("hidden", "weight"):
        given[name].requires_grad_()
    operator = torch.ops.zs_kernels.linear_kl.default
    torch.library.opcheck(operator, (*given.values(), None, None, None, None, -1, 1.0, False, 0))
    compiles = []

    def counting(module, example):
        compiles.append(1)
        return module

    function = torch.compile(lambda *t: linear_kl(*t, temperature=0.7), fullgraph=True, dynamic=True, backend=counting)
    for N in range(2, 22):
        some = inputs(N=N)
        torch.testing.assert_close(function(*some.values()), linear_kl(*some.values(), temperature=0.7))
    assert len(compiles) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    given = inputs(N=0)
    with use_backend(backend):
        kl, by_hidden, by_weight = gradients(linear_kl, given, torch.zeros(0))
        masked = linear_kl(*inputs(N=3).values(), mask=torch.zeros(3, dtype=torch.bool))
    assert kl.shape == (0,) and by_hidden.shape == (0, 12) and not by_weight.any()
    assert masked.tolist() == [0.0, 0.0, 0.0]


def test_no_tensor_is_larger_than_the_workspace():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.seen = max(self.seen, tensor.numel())
            return result

    given = inputs(N=200, V=500)
    given["hidden"].requires_grad_()
    with Largest() as largest:
        linear_kl(*given.values(), workspace_bytes=10 * 500 * 24).sum().backward()
    assert largest.seen <= 10 * 500  # 200 x 500 logits would be twenty times that
