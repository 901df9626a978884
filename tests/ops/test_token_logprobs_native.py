"""The C++ row sweeps against float64: statistics, gradient, shards, on every instruction set with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.ops.instruction_sets import printed_by_each
from zs_kernels import _device
from zs_kernels.testing import assert_no_worse_than_torch, seeded

pytestmark = pytest.mark.skipif(
    not _device.native_status().available, reason=f"no compiled part: {_device.native_status().reason}"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = 2048
WIDTHS = [1, 15, 16, 17, 31, 32, 33, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1, 3 * BLOCK - 33]
INFINITY = torch.inf
FLOOR = {torch.float32: 1.5e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
"""Relative floor of a gradient's error, over torch's own: the logsumexp it starts from is rounded to float32."""


class Options(NamedTuple):
    softcap: float = 0.0
    with_bias: bool = False
    bias_first: bool = False


OPTIONS = [
    Options(),
    Options(softcap=5.0),
    Options(with_bias=True),
    Options(3.0, True, False),
    Options(3.0, True, True),
]


class Case(NamedTuple):
    logits: Tensor
    index: Tensor
    inverse: Tensor
    bias: Tensor | None
    options: Options

    def forward(self, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        given = (self.logits, self.index, self.inverse, self.bias, self.options.softcap, mask)
        return torch.ops.zs_native.token_logprobs_forward(*given, True, True, self.options.bias_first)

    def backward(self, g: Tensor, h: Tensor | None, statistics: tuple[Tensor, ...], out: Tensor, mask=None) -> Tensor:
        torch.ops.zs_native.token_logprobs_backward(
            self.logits, self.index, g, h, statistics[1], None if h is None else statistics[2], self.inverse,
            self.bias, self.options.softcap, mask, out, self.options.bias_first,
        )  # fmt: skip
        return out


def made(width: int, dtype: torch.dtype, *, rows: int = 5, std: float = 1.0, seed: int = 0, options=OPTIONS[0]) -> Case:
    logits = seeded(rows, width, seed=seed, scale=std, dtype=dtype)
    index = torch.randint(0, width, (rows,), generator=torch.Generator().manual_seed(seed))
    inverse = 0.5 + torch.rand(rows, generator=torch.Generator().manual_seed(seed + 1))
    return Case(logits, index, inverse, seeded(width, seed=seed + 2) if options.with_bias else None, options)


def transformed(case: Case, logits: Tensor) -> Tensor:
    """z in the type of `logits`, by torch."""
    z, (softcap, _, bias_first) = logits, case.options
    bias = None if case.bias is None else case.bias.to(z.dtype)
    if bias is not None and bias_first:
        z = z + bias
    if softcap:
        z = torch.where(z == -INFINITY, z, softcap * torch.tanh(z / softcap))
    if bias is not None and not bias_first:
        z = z + bias
    return z * case.inverse.to(z.dtype)[:, None]


def by_torch(case: Case, dtype: torch.dtype, g: Tensor, h: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """((logprobs, logsumexp, entropy, sum of squares), gradient of the logits) in float64, or as torch users would."""
    leaf = case.logits.detach().clone().to(torch.float64 if dtype == torch.float64 else case.logits.dtype)
    leaf.requires_grad_()
    z = transformed(case, leaf.to(dtype))
    logp = torch.log_softmax(z, dim=1)
    logprobs = logp.gather(1, case.index[:, None]).squeeze(1)
    terms = torch.where(logp == -INFINITY, 0.0, logp.exp() * logp.clamp(min=-1e30))
    entropy = -terms.sum(dim=1)
    ((logprobs * g.to(dtype)).sum() + (entropy * h.to(dtype)).sum()).backward()
    statistics = (logprobs, torch.logsumexp(z, dim=1), entropy, logp.exp().square().sum(dim=1))
    return tuple(part.detach() for part in statistics), leaf.grad


def assert_good(case: Case, name: str) -> None:
    """Statistics and gradient, with and without the entropy's, into both the logits' type and float32."""
    rows, dtype = case.logits.shape[0], case.logits.dtype
    g, h = seeded(rows, seed=11), seeded(rows, seed=12)
    for entropy_gradient in (h, torch.zeros(rows)):
        exact, exact_gradient = by_torch(case, torch.float64, g, entropy_gradient)
        theirs, their_gradient = by_torch(case, torch.float32, g, entropy_gradient)
        found = case.forward()
        for part, ours, torchs, right in zip(
            ("logprob", "lse", "entropy", "squares"), found, theirs, exact, strict=True
        ):
            assert ours.dtype == torch.float32
            # Relative for large values, absolute for small ones: entropy and log-probability come from differences.
            size = float(right.abs().max())
            assert_no_worse_than_torch(
                ours, torchs, right, floor=4e-7 * max(1.0, 1 / max(size, 1e-6)), name=f"{name} {part}"
            )
        for out_dtype in {dtype, torch.float32}:
            out = torch.full_like(case.logits, torch.nan, dtype=out_dtype)
            case.backward(g, entropy_gradient if entropy_gradient is h else None, found, out)
            torchs = their_gradient if out_dtype == dtype else exact_gradient.float()
            size = float(exact_gradient.abs().max())
            # A gradient that cancels to nothing (one logit, say) is judged against the upstream gradient instead.
            floor = FLOOR[dtype] * max(1.0, float(g.abs().max() * case.inverse.max()) / max(size, 1e-6))
            assert_no_worse_than_torch(out, torchs, exact_gradient, floor=floor, name=f"{name} gradient in {out_dtype}")


@pytest.mark.parametrize("std", [1.0, 8.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_against_float64(width, dtype, std):
    assert_good(made(width, dtype, std=std), f"V = {width}")


@pytest.mark.parametrize("options", OPTIONS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 17, 33, BLOCK + 1])
def test_softcap_and_bias_in_both_orders(width, dtype, options):
    assert_good(made(width, dtype, std=3.0, options=options), f"V = {width}")


def test_flat_row_and_row_with_one_likely_token():
    logits = torch.zeros(2, 151936)
    logits[1, 77] = 40.0
    case = Case(logits, torch.tensor([3, 77]), torch.ones(2), None, OPTIONS[0])
    logprobs, logsumexp, entropy, squares = case.forward()
    size = torch.tensor(151936.0, dtype=torch.float64)
    torch.testing.assert_close(logprobs[0], -size.log().float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(logsumexp[0], size.log().float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(entropy[0], size.log().float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(squares[0], (1 / size).float(), rtol=1e-6, atol=0)
    rest = 151935 * torch.exp(torch.tensor(-40.0, dtype=torch.float64))  # 6.5e-13: the log-probability is minus that
    assert -2e-7 <= float(logprobs[1]) <= 0.0 and float(rest) < 1e-12
    assert float(squares[1]) == pytest.approx(1.0, abs=3e-7)


def test_single_logit_is_certain():
    """Any temperature: log-probability exactly 0, entropy 0, gradient 0 up to the rounding of logsumexp."""
    case = made(1, torch.float32, rows=64, std=20.0)
    logprobs, _, entropy, _ = case.forward()
    assert not logprobs.any() and float(entropy.abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprob_is_never_above_zero(dtype):
    case = made(300, dtype, rows=400, std=10.0)
    most_likely = case._replace(index=case.logits.float().argmax(dim=1))
    assert float(most_likely.forward()[0].max()) <= 0.0


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_logits_far_above_those_before_them(order):
    """Each block is hundreds above the one before: sums move to a new power of two, and none overflows."""
    width = 6 * BLOCK + 5
    logits = (torch.arange(width) // BLOCK) * 900.0 + seeded(width, seed=4)
    logits = (logits if order == "rising" else logits.flip(0))[None].repeat(2, 1)
    index = torch.tensor([int(logits[0].argmax()), width // 2])
    case = Case(logits, index, torch.tensor([1.0, 0.01]), None, OPTIONS[0])
    exact, _ = by_torch(case, torch.float64, torch.ones(2), torch.ones(2))
    for ours, right in zip(case.forward(), exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize("offset, inverse", [(3e4, 1.0), (20.0, 1e6), (-5e6, 1.0), (0.0, 1e-4)])
def test_large_logits_and_extreme_temperatures(offset, inverse):
    """Exponents beyond what float arithmetic holds exactly; differences of logits are exact, so results are too."""
    logits = (torch.randint(-40, 40, (3, 5000), generator=torch.Generator().manual_seed(1)) / 2 + offset).float()
    logits[1, :2500] -= 1e5
    case = Case(logits, torch.tensor([1, 2600, 4999]), torch.full((3,), inverse), None, OPTIONS[0])
    found = case.forward()
    g = torch.tensor([1.0, -2.0, 0.5])
    exact, exact_gradient = by_torch(case, torch.float64, g, torch.zeros(3))
    for ours, right in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-6, atol=1e-5)
    # The gradient starts from logsumexp as float32 holds it: half a step of that is its relative error.
    step = float(torch.finfo(torch.float32).eps * exact[1].abs().max())
    gradient = case.backward(g, None, found, torch.empty_like(logits))
    if step < 0.1:
        error = (gradient.double() - exact_gradient).abs().max() / exact_gradient.abs().max()
        assert float(error) <= step + 2e-6
    else:
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 33, BLOCK + 7])
def test_impossible_logits_count_for_nothing(width, dtype):
    case = made(width, dtype, rows=4)
    case.logits[0, ::3] = -INFINITY
    case.logits[1, : width - 2] = -INFINITY  # whole blocks before the first finite logit
    case.logits[2] = -INFINITY
    case.logits[2, 0] = 3.0
    case.logits[3, 1:] = -INFINITY
    index = torch.tensor([1, width - 1, 0, 5])  # the last has probability 0
    case = case._replace(index=index)
    found = case.forward()
    exact, _ = by_torch(case, torch.float64, torch.zeros(4), torch.zeros(4))
    for ours, right in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-6, atol=1e-6)
    assert found[0][3] == -INFINITY and found[0][2] == 0.0
    g, h = seeded(4, seed=1), seeded(4, seed=2)
    gradient = case.backward(g, h, found, torch.full_like(case.logits, torch.nan))
    assert gradient.isfinite().all()
    assert not gradient[case.logits == -INFINITY].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_without_a_finite_logit(dtype):
    case = made(BLOCK + 3, dtype, rows=2)
    case.logits[0] = -INFINITY
    logprobs, logsumexp, entropy, squares = found = case.forward()
    assert logprobs[0] == logsumexp[0] == -INFINITY and entropy[0] == squares[0] == 0.0
    assert all(part[1].isfinite() for part in found)
    ones = torch.ones(2)
    gradient = case.backward(ones, ones, found, torch.full_like(case.logits, torch.nan))
    assert not gradient[0].any() and gradient[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_are_not_read(dtype):
    case, mask = made(77, dtype, rows=6), torch.tensor([True, False, True, False, False, True])
    clean = case.forward()
    g, h = seeded(6, seed=1), seeded(6, seed=2)
    clean_gradient = case.backward(g, h, clean, torch.empty_like(case.logits))
    case.logits[~mask] = torch.nan
    case.index[~mask] = 2**40
    found = case.forward(mask)
    gradient = case.backward(g, h, found, torch.full_like(case.logits, torch.nan), mask)
    for ours, right in zip((*found, gradient), (*clean, clean_gradient), strict=True):
        assert torch.equal(ours[mask], right[mask]) and not ours[~mask].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, -1])
def test_nan_shows(dtype, bits):
    """In a row that counts, wherever it stands and whatever its bits (-1: memory never written)."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32).to(dtype)
    if dtype != torch.float32:
        nan = torch.tensor([bits >> 16 | 1], dtype=torch.int16).view(dtype)
    assert nan.isnan().all()
    for width, at in ((33, 0), (BLOCK + 40, 5), (BLOCK + 40, BLOCK + 39)):
        case = made(width, dtype, rows=2)
        case.logits[0, at] = nan
        case = case._replace(index=torch.tensor([(at + 1) % width, 0]))
        found = case.forward()
        assert all(part[0].isnan() and part[1].isfinite() for part in found)
        gradient = case.backward(torch.ones(2), None, found, torch.zeros_like(case.logits))
        assert gradient[0].isnan().all() and gradient[1].isfinite().all()
        statistics = made(width, dtype, rows=2).forward()
        gradient = case.backward(torch.ones(2), None, statistics, torch.zeros_like(case.logits, dtype=torch.bfloat16))
        assert gradient[0, at].isnan() and gradient[1].isfinite().all()


def test_nan_among_impossible_logits_shows():
    logits = torch.full((1, 3 * BLOCK), -INFINITY)
    logits[0, 7], logits[0, -1] = torch.nan, 1.0
    case = Case(logits, torch.tensor([3 * BLOCK - 1]), torch.ones(1), None, OPTIONS[0])
    assert case.forward()[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4]])
def test_gradient_in_place(dtype, options):
    case = made(BLOCK + 5, dtype, options=options)
    statistics, g, h = case.forward(), seeded(5, seed=3), seeded(5, seed=4)
    apart = case.backward(g, h, statistics, torch.empty_like(case.logits))
    in_place = case.backward(g, h, statistics, case.logits)
    assert torch.equal(in_place, apart)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_row_stride(dtype):
    """Rows of a wider matrix, every second row, one row for all, and columns apart: the same numbers."""
    wide = seeded(8, 100, seed=1, dtype=dtype)
    inverse, index, g = torch.ones(4), torch.tensor([0, 50, 36, 7]), seeded(4, seed=2)
    views = [wide[:4, 3:60], wide[::2, :57], wide[:1, :57].expand(4, 57), wide.T[:4, 2:].T.contiguous().T]
    views[3] = seeded(57, 4, seed=5, dtype=dtype).T
    for view in views:
        case = Case(view, index, inverse, None, OPTIONS[0])
        dense = case._replace(logits=view.contiguous())
        assert all(map(torch.equal, case.forward(), dense.forward()))
        target = torch.full((8, 100), 7.0, dtype=dtype)
        statistics = dense.forward()
        case.backward(g, None, statistics, target[::2, 3:60])
        assert torch.equal(target[::2, 3:60], dense.backward(g, None, statistics, torch.empty(4, 57, dtype=dtype)))
        target[::2, 3:60] = 7.0
        assert (target == 7.0).all(), "written outside of out"


def test_strided_columns_of_arguments():
    case = made(40, torch.float32, rows=6)
    twice = torch.stack([case.index, case.index + 1], dim=1)[:, 0]
    expanded = torch.ones(1).expand(6)
    found = case._replace(index=twice, inverse=expanded).forward()
    assert all(map(torch.equal, found, case._replace(inverse=torch.ones(6)).forward()))


def test_rows_without_gradient_are_zero_and_unread():
    case = made(50, torch.bfloat16, rows=3)
    statistics = case.forward()
    case.logits[1] = torch.nan
    g, h = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    gradient = case.backward(g, h, statistics, torch.full_like(case.logits, torch.nan))
    assert gradient.isfinite().all() and not gradient[1].any() and gradient[0].any() and gradient[2].any()


def test_index_outside_has_no_column():
    """Of a shard that the token is not in: the gradient is that of logsumexp alone."""
    case = made(60, torch.float32, rows=2)._replace(index=torch.tensor([-1, 60]))
    statistics = case.forward()
    assert statistics[0].isnan().all() and statistics[1].isfinite().all()
    gradient = case.backward(torch.ones(2), None, statistics, torch.empty_like(case.logits))
    z = transformed(case, case.logits.double())
    torch.testing.assert_close(
        gradient.double(), -torch.softmax(z, 1) * case.inverse.double()[:, None], rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_partials_of_a_shard(dtype, options):
    case = made(BLOCK + 9, dtype, rows=5, std=4.0, options=options)
    case.logits[3] = -INFINITY
    case = case._replace(index=torch.tensor([0, BLOCK + 9, -5, 3, BLOCK]))
    given = (case.logits, case.index, case.inverse, case.bias, options.softcap, options.bias_first)
    found = torch.ops.zs_native.token_logprobs_partials(*given)
    z = transformed(case, case.logits.double())
    top = z.amax(dim=1)
    e = torch.where(z == -INFINITY, 0.0, torch.exp(z - top[:, None]))
    zero = z.new_zeros(())
    chosen = torch.stack([z[0, 0], zero, zero, z[3, 3], z[4, BLOCK]])
    weighted = (e * z.clamp(min=-1e30)).sum(dim=1)
    right = torch.stack([top, e.sum(dim=1), weighted, e.square().sum(dim=1), chosen], dim=1)
    torch.testing.assert_close(found.double(), right, rtol=3e-6, atol=1e-5)


def test_nothing_to_do():
    none = Case(torch.empty(0, 7), torch.empty(0, dtype=torch.int64), torch.empty(0), None, OPTIONS[0])
    assert [part.shape for part in none.forward()] == [(0,)] * 4
    none.backward(torch.empty(0), None, none.forward(), torch.empty(0, 7))
    one = made(9, torch.float32)
    short = torch.ops.zs_native.token_logprobs_forward(
        one.logits, one.index, one.inverse, None, 0.0, None, False, False
    )
    assert [part.shape for part in short] == [(5,), (5,), (0,), (0,)]
    assert torch.equal(short[0], one.forward()[0])


@pytest.mark.parametrize(
    "change",
    [
        {"logits": torch.zeros(5, 9, dtype=torch.float64)},
        {"logits": torch.zeros(9)},
        {"index": torch.zeros(4, dtype=torch.int64)},
        {"index": torch.zeros(5, dtype=torch.int32)},
        {"inverse": torch.ones(5, dtype=torch.float64)},
        {"bias": torch.ones(8)},
    ],
)
def test_memory_is_never_left(change):
    """The doors check arguments; these checks keep a wrong call from reading what is not there."""
    with pytest.raises(RuntimeError, match="zs_native"):
        made(9, torch.float32)._replace(**change).forward()


DIGESTS = """
import hashlib, sys, torch
sys.path.insert(0, {folder!r})
import test_token_logprobs_native as here
def digest(*tensors):
    bits = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(bits).hexdigest()
for dtype in here.DTYPES:
    for options in here.OPTIONS:
        for std in (0.1, 5.0, 60.0):
            case = here.made(2 * here.BLOCK + 37, dtype, rows=6, std=std, options=options)
            case.logits[0, ::2] = -torch.inf
            found, g, h = case.forward(), here.seeded(6, seed=1), here.seeded(6, seed=2)
            grads = [case.backward(g, e, found, torch.empty_like(case.logits, dtype=out))
                     for out in here.DTYPES for e in (None, h)]
            parts = torch.ops.zs_native.token_logprobs_partials(
                case.logits, case.index, case.inverse, case.bias, options.softcap, options.bias_first)
            print(dtype, options, std, digest(*found), digest(*grads), digest(parts))
"""


def test_every_instruction_set_gives_the_same_bits():
    outputs = printed_by_each(DIGESTS.format(folder=str(Path(__file__).parent)))
    assert outputs[0].count("\n") == 45
    assert outputs[0].splitlines() == outputs[1].splitlines() == outputs[2].splitlines()


def test_threads_change_nothing():
    case = made(40000, torch.bfloat16, rows=7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = case.forward()
        torch.set_num_threads(2)
        assert all(map(torch.equal, case.forward(), alone))
    finally:
        torch.set_num_threads(threads)
