"""Masked moments and whitening on every backend: float64, gradients, presets, few entries, data-parallel statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from zs_kernels._device import native_status, use_backend
from zs_kernels._reduction_kernels import masked_statistics_triton, masked_whiten_triton
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.reductions import (
    PRESETS,
    masked_mean,
    masked_statistics,
    masked_sum,
    masked_var,
    masked_whiten,
    merge_statistics,
)
from zs_kernels.testing import assert_no_worse_than_torch, poison_empty, seeded

interpreted = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=interpreted),
]


def plain_whiten(x: Tensor, mask: Tensor, dim: int | None, preset: str, shift_mean: bool) -> Tensor:
    """The formula as the frameworks write it, under autograd; masked entries must be finite."""
    p = PRESETS[preset]
    m = mask.to(x.dtype)
    axis = tuple(range(x.dim())) if dim is None else dim
    n = m.sum(axis, keepdim=True)
    mean = (x * m).sum(axis, keepdim=True) / n
    variance = ((x - mean).square() * m).sum(axis, keepdim=True) / (n - p.ddof)
    whitened = (x - mean) * (variance.clamp(min=p.eps).rsqrt() if p.floor else (variance + p.eps).rsqrt())
    whitened = whitened if shift_mean else whitened + mean
    return torch.where(mask, whitened, 0.0) if p.fill_masked else whitened


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape, dim", [((7,), None), ((5, 1100), None), ((5, 33), 1), ((9, 4), 0), ((3, 8, 5), -2)])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shape: tuple[int, ...], dim: int | None, shift_mean: bool, preset: str, backend: str) -> None:
    x, upstream = seeded(*shape, seed=1) + 2.0, seeded(*shape, seed=2)
    mask = torch.ones(shape, dtype=torch.bool)
    mask.view(-1)[::3] = False
    results = {}
    for name, dtype in (("exact", torch.float64), ("torch", torch.float32)):
        leaf = x.to(dtype).requires_grad_()
        value = plain_whiten(leaf, mask, dim, preset, shift_mean)
        results[name] = value.detach(), torch.autograd.grad(value, leaf, upstream.to(dtype))[0]
    garbage = float("nan") if PRESETS[preset].fill_masked else 7.0
    if PRESETS[preset].fill_masked:
        x = torch.where(mask, x, garbage)
    x.requires_grad_()
    with use_backend(backend), poison_empty():
        value = masked_whiten(x, mask, dim=dim, preset=preset, shift_mean=shift_mean)
        (grad,) = torch.autograd.grad(value, x, upstream)
    assert_no_worse_than_torch(value.detach(), results["torch"][0], results["exact"][0], floor=1e-6, name="value")
    assert_no_worse_than_torch(grad, results["torch"][1], results["exact"][1], floor=1e-6, name="gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, dim", [((3000,), None), ((6, 40), 1), ((6, 40), 0), ((2, 3, 4), 1)])
def test_moments_and_their_gradients(shape: tuple[int, ...], dim: int | None, backend: str) -> None:
    x, mask = seeded(*shape, seed=1) + 0.5, torch.arange(math.prod(shape)).reshape(shape) % 3 != 0
    axis = tuple(range(len(shape))) if dim is None else dim
    results: dict[str, list[Tensor]] = {}
    upstream = [seeded(3, seed=number + 5).tolist() for number in range(3)]
    for name, dtype in (("exact", torch.float64), ("torch", torch.float32)):
        leaf, m = x.to(dtype).requires_grad_(), mask.to(dtype)
        n = m.sum(axis, keepdim=True)
        mean = (leaf * m).sum(axis, keepdim=True) / n
        variance = ((leaf - mean).square() * m).sum(axis) / (n.squeeze(axis) - 1)
        parts = [(leaf * m).sum(axis), mean.squeeze(axis), variance]
        weighted = sum(part.sum() * up[0] for part, up in zip(parts, upstream, strict=True))
        results[name] = [*(part.detach() for part in parts), torch.autograd.grad(weighted, leaf)[0]]
    leaf = torch.where(mask, x, float("inf")).requires_grad_()
    with use_backend(backend), poison_empty():
        parts = [f(leaf, mask, dim=dim) for f in (masked_sum, masked_mean, masked_var)]
        weighted = sum(part.sum() * up[0] for part, up in zip(parts, upstream, strict=True))
        found = [*(part.detach() for part in parts), torch.autograd.grad(weighted, leaf)[0]]
    names = ("sum", "mean", "var", "gradient")
    for name, mine, exact, theirs in zip(names, found, results["exact"], results["torch"], strict=True):
        assert_no_worse_than_torch(mine, theirs, exact, floor=1e-6, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "preset, expected",
    [
        # Entries 1, 3, 8 and a masked 2: mean 4, squared distances 26, variance 13 or 26 / 3.
        ("zs", [-3 / 13**0.5, -1 / 13**0.5, 4 / 13**0.5, 0.0]),
        ("verl", [-3 / 13**0.5, -1 / 13**0.5, 4 / 13**0.5, -2 / 13**0.5]),
        ("trl", [-3 / 13**0.5, -1 / 13**0.5, 4 / 13**0.5, -2 / 13**0.5]),
        ("openrlhf", [-3 / (26 / 3) ** 0.5, -1 / (26 / 3) ** 0.5, 4 / (26 / 3) ** 0.5, -2 / (26 / 3) ** 0.5]),
        ("nemo", [-3 / (26 / 3) ** 0.5, -1 / (26 / 3) ** 0.5, 4 / (26 / 3) ** 0.5, -2 / (26 / 3) ** 0.5]),
    ],
)
def test_absolute_values(preset: str, expected: list[float], backend: str) -> None:
    x, mask = torch.tensor([1.0, 3.0, 8.0, 2.0]), torch.tensor([True, True, True, False])
    with use_backend(backend):
        assert masked_whiten(x, mask, preset=preset).tolist() == pytest.approx(expected, rel=1e-6)
        assert masked_statistics(x, mask).tolist() == [3.0, 4.0, 26.0]
        assert [float(f(x, mask)) for f in (masked_sum, masked_mean, masked_var)] == [12.0, 4.0, 13.0]
        assert float(masked_var(x, mask, preset=preset)) == pytest.approx(26 / (3 - PRESETS[preset].ddof))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_stays_finite_and_eps_is_used_as_each_framework_does(backend: str) -> None:
    x, mask = torch.tensor([2.0, 2.0, 2.0001]), torch.tensor([True, True, False])
    with use_backend(backend):
        added = masked_whiten(x, mask, preset="verl")
        floor = masked_whiten(x, mask, preset="nemo")
    assert added[:2].tolist() == floor[:2].tolist() == [0.0, 0.0]
    assert [float(added[2]), float(floor[2])] == pytest.approx([1e-4 * 1e4] * 2, rel=2e-3)
    wide = torch.tensor([0.0, 2e-4, 0.0])  # biased variance 1e-8, unbiased 2e-8
    with use_backend(backend):
        assert float(masked_whiten(wide, mask, preset="verl")[1]) == pytest.approx(1e-4 / (3e-8) ** 0.5, rel=1e-5)
        assert float(masked_whiten(wide, mask, preset="nemo")[1]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [0, 1])
def test_few_entries(kept: int, backend: str) -> None:
    nan = float("nan")
    x, mask = torch.tensor([5.0, 6.0, 7.0]), torch.arange(3) < kept
    hidden = torch.where(mask, x, nan)
    with use_backend(backend), poison_empty():
        assert masked_whiten(hidden, mask).tolist() == [0.0, 0.0, 0.0]
        assert masked_whiten(x, mask, preset="verl").tolist() == [0.0, 0.0, 0.0]
        assert masked_whiten(x, mask, shift_mean=False)[:kept].tolist() == [5.0] * kept
        assert masked_whiten(hidden, mask, empty="identity").tolist() == [5.0 if n < kept else 0.0 for n in range(3)]
        assert masked_whiten(x, mask, preset="verl", empty="identity").tolist() == x.tolist()
        assert masked_whiten(x, mask, preset="trl", empty="nan").isnan().all()
        assert float(masked_mean(hidden, mask)) == 5.0 * kept
        assert float(masked_var(hidden, mask)) == 0.0 and masked_var(hidden, mask, empty="nan").isnan()
        assert bool(masked_mean(hidden, mask, empty="nan").isnan()) == (kept == 0)
        with pytest.raises(ValueError, match=r"masked_whiten: argument 'mask' must be True for at least 2 entries"):
            masked_whiten(x, mask, preset="verl", empty="raise")
        with pytest.raises(ValueError, match="masked_var: argument 'mask'"):
            masked_var(x, mask, empty="raise")
        for empty in ("zero", "identity"):
            leaf = hidden.clone().requires_grad_()
            masked_whiten(leaf, mask, empty=empty).sum().backward()
            assert leaf.grad.tolist() == [float(empty == "identity" and n < kept) for n in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, dim", [((0,), None), ((0, 4), 1), ((4, 0), 1), ((2, 0, 3), 0)])
def test_nothing_at_all(shape: tuple[int, ...], dim: int | None, backend: str) -> None:
    x, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    outside = () if dim is None else tuple(size for d, size in enumerate(shape) if d != dim)
    with use_backend(backend), poison_empty():
        assert masked_whiten(x, mask, dim=dim).shape == shape
        for f in (masked_sum, masked_mean, masked_var):
            assert torch.equal(f(x, mask, dim=dim), torch.zeros(outside))
        assert masked_statistics(x, mask, dim=dim).shape == (*outside, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_merge_to_the_whole(backend: str) -> None:
    x, mask = seeded(4000, seed=1) + 1000.0, seeded(4000, seed=2) > 0  # a mean far from 0: squares would cancel
    edges = [0, 1, 1, 2500, 4000]
    with use_backend(backend):
        whole = masked_statistics(x, mask)
        parts = [masked_statistics(x[a:b], mask[a:b]) for a, b in itertools.pairwise(edges)]
        merged = merge_statistics(torch.stack(parts))
        by_parts = [masked_whiten(x[a:b], mask[a:b], statistics=merged) for a, b in ((0, 1), (1, 4000))]
        by_whole = masked_whiten(x, mask)
    exact = x[mask].double()
    assert float(whole[2]) == pytest.approx(float((exact - exact.mean()).square().sum()), rel=1e-5)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.cat(by_parts), by_whole, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_statistics_along_a_dimension(backend: str) -> None:
    x, mask = seeded(4, 6, seed=1).requires_grad_(), seeded(4, 6, seed=2) > 0
    statistics = torch.tensor([[5.0, 1.0, 16.0]] * 4)
    with use_backend(backend):
        whitened = masked_whiten(x, mask, dim=1, statistics=statistics, eps=0.0)
        whitened.sum().backward()
    torch.testing.assert_close(whitened, torch.where(mask, (x - 1.0) / 2.0, 0.0))
    torch.testing.assert_close(x.grad, torch.where(mask, 0.5, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_narrow_types(backend: str) -> None:
    x, mask = seeded(6, 40, seed=1), seeded(6, 40, seed=2) > 0
    with use_backend(backend):
        torch.testing.assert_close(masked_whiten(x.t(), mask.t(), dim=0), masked_whiten(x, mask, dim=1).t())
        torch.testing.assert_close(
            masked_whiten(x[:, ::2], mask[:, ::2]), masked_whiten(x[:, ::2].contiguous(), mask[:, ::2])
        )
        narrow = x.bfloat16().requires_grad_()
        whitened = masked_whiten(narrow, mask)
        whitened.square().sum().backward()
        torch.testing.assert_close(whitened, masked_whiten(narrow.float(), mask))
    assert whitened.dtype == torch.float32 and narrow.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_whole_numbers_are_exact(backend: str) -> None:
    x = torch.arange(5000.0)
    with use_backend(backend):
        assert float(masked_sum(x, x % 3 == 0)) == float(x[x % 3 == 0].double().sum())


@interpreted
@pytest.mark.parametrize("count", [15, 16, 17, 16 * 40 + 1])
def test_block_edges(count: int) -> None:
    x, mask = seeded(1, count, seed=1), seeded(1, count, seed=2) > 0
    expected = torch.ops.zs_kernels.masked_statistics(x.double(), mask).float()
    torch.testing.assert_close(masked_statistics_triton(x, mask, block=16), expected)
    out, used = masked_whiten_triton(x, mask, None, 1e-8, False, 1, True, True, 0.0, 0, block=16)
    torch.testing.assert_close(used, expected[:, :3])
    torch.testing.assert_close(out, masked_whiten(x.double(), mask).float())


@interpreted
def test_many_blocks_share_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zs_kernels._reduction_kernels.PROGRAMS", 4)  # 40 blocks over 4 programs
    x, mask = seeded(1, 16 * 39 + 3, seed=1), seeded(1, 16 * 39 + 3, seed=2) > 0
    out, _ = masked_whiten_triton(x, mask, None, 1e-8, False, 1, True, True, 0.0, 0, block=16)
    torch.testing.assert_close(out, masked_whiten(x.double(), mask).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    x, mask = seeded(3, 20, seed=1).requires_grad_(), seeded(3, 20, seed=2) > 0
    with use_backend(backend):
        torch.library.opcheck(torch.ops.zs_kernels.masked_statistics.default, (x, mask))
        whiten = torch.ops.zs_kernels.masked_whiten.default
        torch.library.opcheck(whiten, (x, mask, None, 1e-8, False, 1, True, True, 0.0, "zero"))
        given = torch.tensor([[9.0, 0.1, 4.0]] * 3)
        torch.library.opcheck(whiten, (x, mask, given, 1e-8, True, 0, False, False, 0.0, "identity"))


@pytest.mark.parametrize("rows", [False, True])
def test_one_compilation_serves_every_length(rows: bool) -> None:
    counted = CompileCounterWithBackend("aot_eager")
    dim = 1 if rows else None

    @torch.compile(fullgraph=True, backend=counted, dynamic=True)
    def both(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return masked_whiten(x, mask, dim=dim), masked_mean(x, mask, dim=dim)

    frames = set()
    for count in range(10, 30):
        x, mask = seeded(4, count, seed=1).requires_grad_(), seeded(4, count, seed=2) > -1
        whitened, mean = both(x, mask)
        (whitened.sum() + mean.sum()).backward()
        torch.testing.assert_close(whitened, masked_whiten(x, mask, dim=dim))
        torch.testing.assert_close(mean, masked_mean(x, mask, dim=dim))
        frames.add(counted.frame_count)
    assert len(frames) == 1, "a later length was compiled again"


@pytest.mark.parametrize(
    "options, word",
    [
        ({"preset": "nobody"}, "'preset'"),
        ({"empty": "explode"}, "'empty'"),
        ({"ddof": 2}, "'ddof'"),
        ({"eps": -1.0}, "'eps'"),
        ({"dim": 2}, "'dim'"),
        ({"statistics": torch.zeros(2)}, "'statistics'"),
    ],
)
def test_wrong_arguments_are_named(options: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        masked_whiten(torch.zeros(3), torch.ones(3, dtype=torch.bool), **options)
    assert math.isfinite(float(masked_whiten(torch.zeros(3), torch.ones(3, dtype=torch.bool)).sum()))
    with pytest.raises(ValueError, match="'stacked'"):
        merge_statistics(torch.zeros(3))
