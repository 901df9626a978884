from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from zs_kernels._device import native_status, use_backend
from zs_kernels._policy_backends import sequence_log_ratios
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.importance_weights import importance_weights
from zs_kernels.testing import seeded

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")),
]
NAN = float("nan")
# Ratios 4, 1/4, 1 | unknown | 2, masked 64, 1/2; two sequences.
LOG_RATIOS = torch.tensor([4.0, 0.25, 1.0, NAN, 2.0, 64.0, 0.5]).log()
MASK = torch.tensor([True, True, True, True, True, False, True])
BOUNDS = torch.tensor([0, 4, 7])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options, expected",
    [
        ({"high": 2.0}, [2.0, 0.25, 1.0, 1.0, 2.0, 1.0, 0.5]),
        ({"low": 0.5, "high": 3.0}, [3.0, 0.5, 1.0, 1.0, 2.0, 1.0, 0.5]),
        ({"bound": "mask", "low": 0.5, "high": 3.0}, [0.0, 0.0, 1.0, 1.0, 2.0, 1.0, 0.5]),
        ({"level": "sequence", "high": 3.0}, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"normalize": True, "high": 2.0}, [w / 1.15 for w in (2.0, 0.25, 1.0)] + [1.0, 2 / 1.15, 1.0, 0.5 / 1.15]),
    ],
)
def test_absolute_values(options: dict, expected: list[float], backend: str) -> None:
    rollout = torch.full((7,), -1.0)
    rollout = torch.where(LOG_RATIOS.isnan(), NAN, rollout)
    logprobs = -1.0 + LOG_RATIOS.nan_to_num()
    with use_backend(backend):
        found = importance_weights(logprobs, rollout, mask=MASK, cu_seqlens=BOUNDS, **options)
    assert found.weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert float(found.metrics.token_count) == 5
    assert float(found.metrics.square_sum) == pytest.approx(16 + 1 / 16 + 1 + 4 + 1 / 4, rel=1e-6)
    assert float(found.metrics.log_ratio_sum) == pytest.approx(0.0, abs=1e-6)
    assert float(found.metrics.absolute_sum) == pytest.approx(6 * math.log(2), rel=1e-6)
    assert float(found.metrics.weight_sum) == pytest.approx(sum(expected) - 2.0, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_levels(backend: str) -> None:
    log_ratios = torch.tensor([0.1, 0.2, 0.0, -0.4, 9.0])
    mask = torch.tensor([True, True, True, True, False])
    rollout, bounds = torch.full((5,), -2.0), torch.tensor([0, 2, 5], dtype=torch.int32)
    with use_backend(backend):
        product = importance_weights(rollout + log_ratios, rollout, mask=mask, cu_seqlens=bounds, level="sequence")
        mean = importance_weights(
            rollout + log_ratios, rollout, mask=mask, cu_seqlens=bounds, level="geometric", bound="mask",
            low=0.999, high=1.2,
        )  # fmt: skip
    first, second = math.exp(0.3), math.exp(-0.4)
    assert product.weights.tolist() == pytest.approx([first, first, second, second, 1.0], rel=1e-5)
    assert mean.weights.tolist() == pytest.approx([math.exp(0.15)] * 2 + [0.0, 0.0, 1.0], rel=1e-5)
    assert mean.kept.tolist() == [True, True, False, False, True]
    assert float(mean.metrics.outside_count) == 2
    assert float(mean.metrics.rho_max) == pytest.approx(math.exp(0.15), rel=1e-5)
    assert float(mean.metrics.rho_min) == pytest.approx(math.exp(-0.2), rel=1e-5)


def test_huge_differences_stay_finite_and_no_gradient_passes() -> None:
    logprobs = torch.tensor([0.0, -500.0], requires_grad=True)
    found = importance_weights(logprobs, torch.tensor([-500.0, 0.0]), high=math.inf)
    assert (
        found.weights.tolist() == pytest.approx([math.exp(20.0), math.exp(-20.0)]) and not found.weights.requires_grad
    )
    assert all(value.isfinite() for value in found.metrics)


def test_nothing_counted() -> None:
    found = importance_weights(torch.zeros(3), torch.full((3,), NAN), normalize=True)
    assert found.weights.tolist() == [1.0] * 3 and found.kept.all() and float(found.metrics.token_count) == 0
    assert importance_weights(torch.zeros(0), torch.zeros(0)).weights.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_sequence_sums(backend: str) -> None:
    log_ratio, mask = seeded(30, seed=1), seeded(30, seed=2) > 0
    with use_backend(backend):
        torch.library.opcheck(sequence_log_ratios._opoverload, (log_ratio, mask, torch.tensor([0, 4, 30]), True))


def test_one_compilation_serves_every_length() -> None:
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *columns: importance_weights(*columns[:2], cu_seqlens=columns[2], level="sequence").weights,
        fullgraph=True, backend=counted, dynamic=True,
    )  # fmt: skip
    frames = set()
    for count in range(10, 30):
        columns = (
            seeded(count, seed=1) * 0.1,
            seeded(count, seed=1) * 0.2,
            torch.tensor([0, *range(2, count - 4), count]),
        )
        expected = importance_weights(*columns[:2], cu_seqlens=columns[2], level="sequence").weights
        torch.testing.assert_close(compiled(*columns), expected)
        frames.add(counted.frame_count)
    assert len(frames) == 1, "a later length was compiled again"


@pytest.mark.parametrize(
    "options, word",
    [
        ({"level": "word"}, "'level'"),
        ({"level": "sequence"}, "'cu_seqlens'"),
        ({"bound": "drop"}, "'bound'"),
        ({"low": 2.0, "high": 2.0}, "'low'"),
        ({"mask": torch.ones(3)}, "'mask'"),
        ({"level": "sequence", "cu_seqlens": torch.tensor([0, 2])}, "rise from 0 to 3"),
    ],
)
def test_wrong_arguments_are_named(options: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        importance_weights(torch.zeros(3), torch.zeros(3), **options)
