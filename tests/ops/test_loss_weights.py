from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from zs_kernels._device import native_status, use_backend
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.loss_weights import MODES, _loss_weights_triton, loss_weights
from zs_kernels.testing import poison_empty, seeded

interpreted = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=interpreted),
]

# Three sequences of 2 (of 4), 1 (of 1) and 0 (of 2) counted tokens, and an empty one.
MASK = torch.tensor([True, False, True, False, True, False, False])
BOUNDS = torch.tensor([0, 4, 4, 5, 7], dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mode, options, first, third",
    [
        ("token-mean", {}, 1 / 3, 1 / 3),
        ("token-mean", {"num_tokens": 12}, 1 / 12, 1 / 12),
        ("token-mean", {"num_tokens": torch.tensor(12), "scale": 4.0}, 1 / 3, 1 / 3),
        ("token-sum", {}, 1.0, 1.0),
        ("token-sum", {"scale": 2.0}, 2.0, 2.0),
        ("seq-mean-token-sum", {}, 1 / 2, 1 / 2),
        ("seq-mean-token-sum", {"num_sequences": 4}, 1 / 4, 1 / 4),
        ("seq-mean-token-mean", {}, 1 / 4, 1 / 2),
        ("seq-mean-token-mean", {"num_sequences": torch.tensor(5.0)}, 1 / 10, 1 / 5),
        ("seq-mean-token-sum-norm", {"max_length": 8}, 1 / 16, 1 / 16),
        ("seq-mean-token-sum-norm", {"max_length": 8, "num_sequences": 4}, 1 / 32, 1 / 32),
    ],
)
def test_absolute_values(mode: str, options: dict, first: float, third: float, backend: str) -> None:
    with use_backend(backend), poison_empty():
        weights = loss_weights(MASK, BOUNDS, mode, **options)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([first, 0, first, 0, third, 0, 0], rel=1e-6)


def aggregated(loss: Tensor, mask: Tensor, mode: str) -> Tensor:
    """The loss of rows, as the sentence says."""
    rows = [row[keep] for row, keep in zip(loss, mask, strict=True) if keep.any()]
    return {
        "token-mean": lambda: torch.cat(rows).mean(),
        "token-sum": lambda: torch.cat(rows).sum(),
        "seq-mean-token-sum": lambda: torch.stack([row.sum() for row in rows]).mean(),
        "seq-mean-token-mean": lambda: torch.stack([row.mean() for row in rows]).mean(),
        "seq-mean-token-sum-norm": lambda: torch.stack([row.sum() for row in rows]).mean() / loss.shape[1],
    }[mode]()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_weighted_sums_are_the_aggregation(mode: str, backend: str) -> None:
    loss, mask = seeded(6, 50, seed=1, dtype=torch.float64), seeded(6, 50, seed=2) > 0.2
    mask[3] = False
    with use_backend(backend):
        weights = loss_weights(mask, mode=mode)
        packed = loss_weights(mask.flatten(), torch.arange(7) * 50, mode, max_length=50)
    assert weights.shape == (6, 50) and torch.equal(weights.flatten(), packed)
    assert float((weights * loss).sum()) == pytest.approx(float(aggregated(loss, mask, mode)), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up_with_the_whole_counts(mode: str) -> None:
    mask = seeded(5, 20, seed=3) > 0
    whole = {"num_tokens": int(mask.sum()), "num_sequences": int(mask.any(1).sum()), "max_length": 20}
    parts = [loss_weights(mask[a:b], mode=mode, **whole) for a, b in itertools.pairwise((0, 1, 4, 5))]
    torch.testing.assert_close(torch.cat(parts), loss_weights(mask, mode=mode))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [0, 5])
def test_without_tokens_the_weights_are_zero(count: int, mode: str, backend: str) -> None:
    mask = torch.zeros(count, dtype=torch.bool)
    with use_backend(backend), poison_empty():
        weights = loss_weights(mask, torch.tensor([0, count]), mode, max_length=3)
        assert loss_weights(mask[None].expand(2, count), mode=mode, max_length=3).tolist() == [[0.0] * count] * 2
    assert weights.tolist() == [0.0] * count


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dimension_without_bounds_serves_the_token_modes(backend: str) -> None:
    mask = seeded(9000, seed=1) > 0
    with use_backend(backend):
        weights = loss_weights(mask)
    assert float(weights.double().sum()) == pytest.approx(1.0, rel=1e-5)
    assert weights[mask].unique().numel() == 1 and (weights[~mask] == 0).all()
    with pytest.raises(ValueError, match="'cu_seqlens'"):
        loss_weights(mask, mode="seq-mean-token-mean")


@interpreted
def test_sequences_and_counts_over_block_edges() -> None:
    mask = seeded(200, seed=1) > 0
    bounds = torch.tensor([0, 15, 31, 48, *range(49, 100), 200])
    with use_backend("reference"):
        expected = loss_weights(mask, bounds, "seq-mean-token-mean")
    found = _loss_weights_triton(mask, bounds, "seq-mean-token-mean", None, None, 1.0, 1.0, block=16)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    op = torch.ops.zs_kernels.loss_weights.default
    with use_backend(backend):
        torch.library.opcheck(op, (MASK, BOUNDS, "seq-mean-token-mean", None, None, 1.0, 1.0))
        torch.library.opcheck(op, (MASK, BOUNDS, "token-mean", torch.tensor(3), None, 1.0, 2.0))


def test_one_compilation_serves_every_length() -> None:
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda mask, bounds: loss_weights(mask, bounds, "seq-mean-token-mean"),
        fullgraph=True, backend=counted, dynamic=True,
    )  # fmt: skip
    frames = set()
    for count in range(10, 30):
        mask, bounds = seeded(count, seed=1) > 0, torch.tensor([0, *range(2, count - 4), count])
        assert torch.equal(compiled(mask, bounds), loss_weights(mask, bounds, "seq-mean-token-mean"))
        frames.add(counted.frame_count)
    assert len(frames) == 1, "a later length was compiled again"


@pytest.mark.parametrize(
    "options, word",
    [
        ({"mode": "mean"}, "'mode'"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "rise from 0 to 7"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 7])}, "rise from 0 to 7"),
        ({"cu_seqlens": torch.tensor([0.0, 7.0])}, "'cu_seqlens'"),
        ({"num_tokens": 0}, "'num_tokens'"),
        ({"num_sequences": torch.ones(2)}, "'num_sequences'"),
        ({"mode": "seq-mean-token-sum-norm"}, "'max_length'"),
        ({"mask": torch.ones(7)}, "'mask'"),
        ({"mask": torch.ones(1, 7, dtype=torch.bool)}, "'mask'"),
    ],
)
def test_wrong_arguments_are_named(options: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        loss_weights(**({"mask": MASK, "cu_seqlens": BOUNDS} | options))
