"""The row sweeps: block edges, shards of the vocabulary, where the gradient goes, independence of the other rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from zs_kernels import _sweeps_triton
from zs_kernels._device import native_status, use_backend
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.testing import error_against, poison_empty, seeded
from zs_kernels.token_logprobs import Sweep, merge_partials, sweep_gradient, sweep_partials, sweep_statistics

INF = float("inf")
interpreter = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=interpreter),
]
TRANSFORMS: dict[str, dict[str, Any]] = {
    "bare": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "softcap, then bias": {"bias": True, "softcap": 4.0},
    "bias, then softcap": {"bias": True, "softcap": 4.0, "bias_first": True},
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def case(rows: int, vocabulary: int, name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict]:
    """(logits with some -inf, index, transforms)."""
    logits = seeded(rows, vocabulary, seed=vocabulary, scale=6.0, dtype=dtype)
    logits[0, : vocabulary // 3] = -INF
    options = dict(TRANSFORMS[name])
    if "bias" in options:
        options["bias"] = seeded(vocabulary, seed=1)
    return logits, (torch.arange(rows) * 37) % vocabulary, options


def exact(logits: Tensor, index: Tensor, inverse: Tensor | float, options: dict) -> tuple[Sweep, Tensor]:
    """(statistics, softmax) in float64, from the definition."""
    z, bias, softcap = logits.double(), options.get("bias", 0.0), options.get("softcap")
    if options.get("bias_first"):
        z = z + bias
    if softcap:
        z = torch.where(z == -INF, z, softcap * torch.tanh(z / softcap))
    if not options.get("bias_first"):
        z = z + bias
    z = z * (inverse[:, None] if isinstance(inverse, Tensor) else inverse)
    log_p = torch.log_softmax(z, dim=1)
    p = log_p.exp()
    entropy = -(p * log_p.clamp(min=-1e300)).sum(1)
    chosen = log_p.gather(1, index[:, None]).squeeze(1)
    return Sweep(chosen, torch.logsumexp(z, 1), entropy, p.square().sum(1)), p


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Errors as a share of the largest value, or of 1 where that is larger."""
    found, expected = (torch.cat([part.double().flatten(), torch.ones(1)]) for part in (found, expected))
    assert error_against(expected, found) <= tolerance


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 640, 641, 1300])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_and_gradient(backend: str, vocabulary: int, transform: str, dtype: torch.dtype) -> None:
    logits, index, options = case(4, vocabulary, transform, dtype)
    inverse = torch.tensor([0.5, 1.0, 1.7, 0.9])
    mask = torch.tensor([True, True, False, True])
    truth, p = exact(logits, index, inverse, options)
    logits[2] = torch.nan
    g, h = seeded(2, 4, seed=5)
    with poison_empty():
        sweep = sweep_statistics(logits, index, inverse, mask=mask, entropy=True, sum_squares=True, **options)
        out = torch.empty(4, vocabulary)
        rest = (sweep.logsumexp, sweep.entropy, inverse)
        sweep_gradient(logits, index, g, h, *rest, mask=mask, out=out, **options)
        alone = torch.empty(4, vocabulary)
        sweep_gradient(logits, index, g, None, sweep.logsumexp, None, inverse, mask=mask, out=alone, **options)
    for name, found in sweep._asdict().items():
        assert found[2] == 0.0
        close(found[mask], getattr(truth, name)[mask])
    onehot = torch.zeros_like(p).scatter_(1, index[:, None], 1.0)
    log_p = p.clamp(min=1e-300).log()
    slope = torch.ones_like(p) * inverse[:, None]
    if "softcap" in options:
        inner = logits.double() + (options["bias"] if options.get("bias_first") else 0.0)
        slope = slope * (1 - torch.tanh(inner / 4.0).square())
    by_logprob = g[:, None] * (onehot - p)
    by_entropy = h[:, None] * -p * (log_p + truth.entropy[:, None])
    for found, expected in ((out, by_logprob + by_entropy), (alone, by_logprob)):
        expected = (expected * slope).masked_fill(logits == -INF, 0.0)
        expected[2] = 0.0
        assert (found[2] == 0.0).all()
        close(found, expected, tolerance=4e-6)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("cuts", [(0, 300), (0, 1, 300), (0, 130, 131, 300), (0, 100, 200, 300)])
def test_shards_of_the_vocabulary_add_up(backend: str, transform: str, cuts: tuple[int, ...]) -> None:
    logits, index, options = case(5, 300, transform)
    logits[0, :100], logits[1], logits[2, :] = -INF, -INF, logits[2, :] + 60.0  # a shard, a row, far from 0
    index[3] = 299
    inverse = torch.tensor([0.5, 1.0, 1.7, 0.9, 1.2])
    truth, _ = exact(logits, index, inverse, options)
    whole = sweep_statistics(logits, index, inverse, entropy=True, sum_squares=True, **options)
    pieces, grads = [], []
    shards = [slice(*ends) for ends in pairwise(cuts)]

    def of(here: slice) -> dict:
        return options | ({"bias": options["bias"][here]} if "bias" in options else {})

    with poison_empty():
        for here in shards:
            pieces.append(sweep_partials(logits[:, here], index - here.start, inverse, **of(here)))
        merged = merge_partials(torch.stack(pieces))
        g, h = seeded(2, 5, seed=6)
        for here in shards:
            grads.append(torch.empty(5, here.stop - here.start))
            rest = (g, h, merged.logsumexp, merged.entropy, inverse)
            sweep_gradient(logits[:, here], index - here.start, *rest, out=grads[-1], **of(here))
        full = torch.empty(5, 300)
        sweep_gradient(logits, index, g, h, whole.logsumexp, whole.entropy, inverse, out=full, **options)
    assert merged.logprobs[1] == merged.logsumexp[1] == -INF and merged.entropy[1] == merged.sum_squares[1] == 0.0
    for name, found in merged._asdict().items():
        expected = getattr(truth, name).clone()
        expected[1] = 0.0 if name in ("entropy", "sum_squares") else -INF
        close(found, expected, tolerance=2e-5 if name == "entropy" else 3e-6)
    torch.testing.assert_close(torch.cat(grads, dim=1), full, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("where", ["over the logits", "wide rows", "transposed", "float32", "float32 transposed"])
def test_where_the_gradient_goes(backend: str, where: str) -> None:
    logits, index, _ = case(4, 200, "bare", torch.bfloat16)
    sweep = sweep_statistics(logits, index, 1.0, entropy=True)
    g, h = seeded(2, 4, seed=5)
    expected = torch.empty(4, 200, dtype=torch.bfloat16)
    sweep_gradient(logits, index, g, h, sweep.logsumexp, sweep.entropy, 1.0, out=expected)
    around = None
    if where == "over the logits":
        out = logits
    elif where == "wide rows":
        around = torch.full((4, 210), 7.0, dtype=torch.bfloat16)
        out = around[:, 5:205]
    elif where == "transposed":
        out = torch.empty(200, 4, dtype=torch.bfloat16).T
    else:
        out = torch.empty(200, 4).T if "transposed" in where else torch.empty(4, 200)
    sweep_gradient(logits, index, g, h, sweep.logsumexp, sweep.entropy, 1.0, out=out)
    if where.startswith("float32"):
        torch.testing.assert_close(out, expected.float(), rtol=2.0**-7, atol=1e-6)
        assert not torch.equal(out, expected.float()), "it was rounded to bfloat16 on the way"
    else:
        assert torch.equal(out, expected)
    if around is not None:
        assert (around[:, :5] == 7.0).all() and (around[:, 205:] == 7.0).all()


@pytest.mark.parametrize("offset", [-4000.0, 4000.0])
def test_rows_far_from_zero(backend: str, offset: float) -> None:
    """A maximum that started at 0, or none at all, would leave nothing of the sums."""
    logits = seeded(3, 9000, seed=1, scale=4.0) + offset
    index = logits.argmax(dim=1)
    found = sweep_statistics(logits, index, 0.9, entropy=True, sum_squares=True)
    truth, _ = exact(logits, index, 0.9, {})
    for name, one in found._asdict().items():
        close(one, getattr(truth, name), tolerance=2e-4)  # z = 4000 has float32 steps of 2.4e-4
    merged = merge_partials(torch.stack([sweep_partials(logits, index, 0.9)]))
    close(merged.logprobs, truth.logprobs, tolerance=5e-4)


def test_a_row_alone_equals_the_row_among_others(backend: str) -> None:
    logits, index, _ = case(6, 1000, "bare", torch.bfloat16)
    together = sweep_statistics(logits, index, 0.8, entropy=True, sum_squares=True)
    for row in range(6):
        here = slice(row, row + 1)
        alone = sweep_statistics(logits[here], index[here], 0.8, entropy=True, sum_squares=True)
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one, all_of_them[here])


@interpreter
@pytest.mark.parametrize("vocabulary", [255, 256, 257, 1000])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_many_programs_to_a_row_give_the_same_bits_as_one(vocabulary: int, transform: str) -> None:
    """Few rows are spread over the GPU block by block; what a row gives must not depend on how many there are."""
    logits, index, options = case(3, vocabulary, transform)
    logits[1, :128], logits[2] = -INF, -INF
    mask = torch.tensor([True, True, True])
    transforms = (options.get("bias"), options.get("softcap"), mask, True, True, options.get("bias_first", False))
    with poison_empty():
        spread, together = (
            _sweeps_triton.statistics_triton(logits, index, 0.8, *transforms, None, 128, few) for few in (1000, 0)
        )
    for one, other in zip(spread, together, strict=True):
        assert torch.equal(one, other)
    truth, _ = exact(logits[:2], index[:2], 0.8, options)
    for found, expected in zip(together, truth, strict=True):
        close(found[:2], expected)
