"""kl_estimates on every backend: against float64 with random upstream, masks, clamps, registration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from zs_kernels import kl_estimates
from zs_kernels._device import native_status, use_backend
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.kl_estimates import CLAMPS, ESTIMATORS, _kl_estimates_triton
from zs_kernels.testing import assert_no_worse_than_torch, poison_empty, seeded

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")),
]


def plain(lp: Tensor, ref: Tensor, estimator: str, clamp: str) -> Tensor:
    """The formulas as the frameworks write them, under autograd."""
    d = ref - lp
    kind = estimator.removesuffix("+")
    bound, output_bound = CLAMPS[clamp].get(kind, (None, None))
    inner = d if bound is None else d.clamp(-bound, bound)
    formulas = {"k1": -inner, "k2": inner.square() / 2, "k3": inner.exp() - 1 - inner, "abs": inner.abs()}
    value = formulas[kind] if output_bound is None else formulas[kind].clamp(-output_bound, output_bound)
    return value if estimator == kind else d.square() / 2 - (d.square() / 2).detach() + value.detach()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_and_gradients(estimator: str, clamp: str, backend: str) -> None:
    count = 531
    # From nearly equal models to differences that every clamp acts on.
    lp, ref = seeded(count, seed=1), seeded(count, seed=1) + seeded(count, seed=2) * torch.logspace(-5, 1.1, count)
    upstream, mask = seeded(count, seed=3), torch.arange(count) % 7 != 2
    found, grads = {}, {}
    for name, dtype in (("exact", torch.float64), ("torch", torch.float32)):
        x, y = lp[mask].to(dtype).requires_grad_(), ref[mask].to(dtype).requires_grad_()
        value = plain(x, y, estimator, clamp)
        grads[name] = torch.autograd.grad(value, (x, y), upstream[mask].to(dtype))
        found[name] = value.detach()
    x, y = (torch.where(mask, column, float("nan")).requires_grad_() for column in (lp, ref))
    with use_backend(backend), poison_empty():
        value = kl_estimates(x, y, estimator=estimator, clamp=clamp, mask=mask)
        by_lp, by_ref = torch.autograd.grad(value, (x, y), upstream)
    assert_no_worse_than_torch(value.detach()[mask], found["torch"], found["exact"], floor=3e-7, name="value")
    for name, mine, theirs, exact in zip(("lp", "ref"), (by_lp, by_ref), grads["torch"], grads["exact"], strict=True):
        assert_no_worse_than_torch(mine[mask], theirs, exact, floor=3e-7, name=name)
        assert (mine[~mask] == 0).all()
    assert (value[~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_k3_is_never_negative_and_precise_to_the_last_bits_near_zero(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference subtracts, as torch has no such function")
    d = torch.logspace(-12, 0.9, 300)
    d = torch.cat([d, -d])
    with use_backend(backend):
        value = kl_estimates(torch.zeros_like(d), d)
    wide = d.double()
    series = wide.square() * (0.5 + wide / 6 + wide.square() / 24 + wide**3 / 120)
    exact = torch.where(wide.abs() < 1e-3, series, torch.expm1(wide) - wide)
    assert (value > 0).all()
    assert float(((value - exact) / exact).abs().max()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamped_tokens_are_counted(backend: str) -> None:
    ref = torch.tensor([[0.0, 25.0, 3.0, -11.0], [-25.0, 1.0, 25.0, 0.0]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, True]])
    with use_backend(backend):
        verl = kl_estimates(torch.zeros(2, 4), ref, clamp="verl", mask=mask, clamped_count=True)
        k1 = kl_estimates(torch.zeros(2, 4), ref, estimator="k1", clamp="openrlhf", mask=mask, clamped_count=True)
        free = kl_estimates(torch.zeros(2, 4), ref, estimator="k1", clamp="verl", mask=mask, clamped_count=True)
    # k3: exp(3) - 4 = 16.1 is above 10; -11 gives 10 + e^-11, above 10 too; +-25 are above 20.
    assert float(verl.clamped_count) == 4 and verl.values.flatten().tolist()[:4] == [0.0, 10.0, 10.0, 10.0]
    assert float(k1.clamped_count) == 3 and k1.values[0].tolist() == [0.0, -10.0, -3.0, 10.0]
    assert float(free.clamped_count) == 0 and free.values[1].tolist() == [25.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_empties_and_narrow_types(backend: str) -> None:
    lp, ref = seeded(6, 10, seed=1).t(), seeded(10, 6, seed=2)
    with use_backend(backend):
        assert torch.equal(kl_estimates(lp, ref), kl_estimates(lp.contiguous(), ref))
        expanded = kl_estimates(lp, torch.tensor(0.5).expand(10, 6))
        assert torch.equal(expanded, kl_estimates(lp.contiguous(), torch.full((10, 6), 0.5)))
        assert kl_estimates(torch.zeros(0), torch.zeros(0), mask=torch.zeros(0, dtype=torch.bool)).shape == (0,)
        narrow = lp.bfloat16().requires_grad_()
        value = kl_estimates(narrow, ref.bfloat16())
        value.sum().backward()
    assert value.dtype == torch.float32 and narrow.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, kl_estimates(narrow.detach().float(), ref.bfloat16().float()))


@pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")
@pytest.mark.parametrize("count", [15, 16, 17, 33])
def test_block_edges(count: int) -> None:
    lp, ref = seeded(count, seed=1), seeded(count, seed=2)
    values, slopes, clamped = _kl_estimates_triton(lp, ref, None, "k3", "none", True, True, block=16)
    with use_backend("reference"):
        torch.testing.assert_close(values, kl_estimates(lp, ref))
    torch.testing.assert_close(slopes, 1 - (ref - lp).exp())
    assert float(clamped) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    lp, ref = seeded(37, seed=1).requires_grad_(), seeded(37, seed=2).requires_grad_()
    mask = torch.arange(37) % 3 != 0
    with use_backend(backend):
        op = torch.ops.zs_kernels.kl_estimates.default
        torch.library.opcheck(op, (lp, ref, mask, "k3", "verl", True, True))
        torch.library.opcheck(op, (lp.detach(), ref.detach(), None, "k1+", "none", False, False))


def test_one_compilation_serves_every_length() -> None:
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda lp, ref: kl_estimates(lp, ref, clamp="verl"), fullgraph=True, backend=counted, dynamic=True
    )
    frames = set()
    for count in range(10, 30):
        lp, ref = seeded(count, seed=1).requires_grad_(), seeded(count, seed=2)
        value = compiled(lp, ref)
        value.sum().backward()
        again = lp.detach().requires_grad_()
        expected = kl_estimates(again, ref, clamp="verl")
        expected.sum().backward()
        assert torch.equal(value, expected) and torch.equal(lp.grad, again.grad)
        frames.add(counted.frame_count)
    assert len(frames) == 1, "a later length was compiled again"


def test_gradients_need_the_derivatives() -> None:
    lp = torch.zeros(2, requires_grad=True)
    value, _, _ = torch.ops.zs_kernels.kl_estimates(lp, torch.zeros(2), None, "k3", "none", False, False)
    with pytest.raises(RuntimeError, match="want_slopes"):
        value.sum().backward()


def test_absolute_values() -> None:
    ref = torch.tensor([math.log(2.0)])
    for estimator, expected in (("k1", -math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 1 - math.log(2))):
        assert float(kl_estimates(torch.zeros(1), ref, estimator=estimator)) == pytest.approx(expected, rel=1e-6)
