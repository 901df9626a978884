from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from zs_kernels._device import native_status, use_backend
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.testing import assert_no_worse_than_torch, poison_empty, seeded
from zs_kernels.value_loss import METRICS, _value_terms_triton, value_loss

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")),
]


def plain(values: Tensor, old: Tensor, returns: Tensor, weights: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """(loss, clipped tokens) under autograd."""
    first = (values - returns).square()
    if clip is None:
        return (weights * 0.5 * first).sum(), torch.zeros(())
    second = (torch.max(torch.min(values, old + clip), old - clip) - returns).square()
    return (weights * 0.5 * torch.maximum(first, second)).sum(), (second > first).sum()


def batch(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = seeded(count, seed=1)
    return (
        values,
        values + 0.6 * seeded(count, seed=2),
        seeded(count, seed=3),
        seeded(count, seed=4).abs() / (count + 1),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("count", [1, 16, 1030])
def test_values_gradients_and_metrics(count: int, clip: float | None, backend: str) -> None:
    mask = torch.arange(count) % 4 != 1
    columns, results = batch(count), {}
    for name, dtype in (("exact", torch.float64), ("torch", torch.float32)):
        chosen = [column[mask].to(dtype) for column in columns]
        chosen[0].requires_grad_()
        loss, clipped = plain(*chosen, clip)
        results[name] = loss.detach(), torch.autograd.grad(loss, chosen[0], torch.tensor(-1.7, dtype=dtype))[0]
    poisoned = [torch.where(mask, column, float("nan")).requires_grad_() for column in columns]
    with use_backend(backend), poison_empty():
        result = value_loss(*poisoned, clip_range=clip, mask=mask)
        (-1.7 * result.loss).backward()
    assert all(column.grad is None for column in poisoned[1:])
    grad = poisoned[0].grad
    assert_no_worse_than_torch(result.loss.detach(), results["torch"][0], results["exact"][0], floor=3e-7, name="loss")
    assert_no_worse_than_torch(grad[mask], results["torch"][1], results["exact"][1], floor=3e-7, name="gradient")
    assert (grad[~mask] == 0).all()
    values, _, returns, _ = (column[mask].double() for column in columns)
    expected = {
        "token_count": int(mask.sum()),
        "clipped": int(clipped),
        "value_sum": float(values.sum()),
        "return_sum": float(returns.sum()),
        "error_sum": float((values - returns).sum()),
        "squared_error_sum": float((values - returns).square().sum()),
    }
    for name in METRICS:
        assert float(getattr(result, name)) == pytest.approx(expected[name], rel=1e-5, abs=1e-4), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "value, old, target, loss, slope",
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),  # not moved: half the squared error
        (1.2, 1.0, 3.0, 0.5 * 1.8**2, -1.8),  # moved by less than the range
        (2.0, 1.0, 3.0, 0.5 * 1.5**2, 0.0),  # moved 1.0 towards the return: counted as 0.5, no gradient
        (0.0, 1.0, 3.0, 0.5 * 3.0**2, -3.0),  # moved away: the whole error
    ],
)
def test_absolute_values(value: float, old: float, target: float, loss: float, slope: float, backend: str) -> None:
    values = torch.tensor([value], requires_grad=True)
    with use_backend(backend):
        result = value_loss(values, torch.tensor([old]), torch.tensor([target]), torch.ones(1), clip_range=0.5)
        result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(loss, rel=1e-6)
    assert float(values.grad) == pytest.approx(slope, rel=1e-6)
    assert float(result.clipped) == (slope == 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 5])
def test_no_counted_token_gives_zero(count: int, backend: str) -> None:
    nan = torch.full((count,), float("nan"))
    values = nan.clone().requires_grad_()
    with use_backend(backend), poison_empty():
        result = value_loss(values, nan, nan, nan, mask=torch.zeros(count, dtype=torch.bool))
        result.loss.backward()
    assert [float(part.detach()) for part in result] == [0.0] * len(result)
    assert values.grad.tolist() == [0.0] * count


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_expanded_weights_and_narrow_types(backend: str) -> None:
    values, old, returns, _ = (column.reshape(5, 12) for column in batch(60))
    with use_backend(backend):
        found = value_loss(values.t(), old.t(), returns.t(), torch.tensor(0.1).expand(12, 5))
        expected = value_loss(*(x.t().contiguous() for x in (values, old, returns)), torch.full((12, 5), 0.1))
        narrow = values.bfloat16().requires_grad_()
        value_loss(narrow, old, returns, torch.full((5, 12), 0.1)).loss.backward()
    torch.testing.assert_close(tuple(found), tuple(expected))
    assert narrow.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unmasked_nan_is_not_hidden(backend: str) -> None:
    columns = [column.clone() for column in batch(20)]
    columns[2][4] = float("nan")
    columns[0].requires_grad_()
    with use_backend(backend):
        result = value_loss(*columns)
        result.loss.backward()
    assert result.loss.isnan() and columns[0].grad.isnan().tolist() == [n == 4 for n in range(20)]


@pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")
@pytest.mark.parametrize("count", [15, 16, 17, 16 * 7 + 1])
def test_block_edges_and_programs_of_several_blocks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zs_kernels._policy_backends.MAX_PROGRAMS", 3)
    columns = batch(count)
    grad, totals = _value_terms_triton(*columns, None, 0.3, block=16)
    with use_backend("reference"):
        loss, expected, metrics = torch.ops.zs_kernels.value_loss(*columns, None, 0.3)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(totals, torch.cat([loss.reshape(1), metrics]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    values, old, returns, weights = batch(37)
    values.requires_grad_()
    with use_backend(backend):
        op = torch.ops.zs_kernels.value_loss.default
        torch.library.opcheck(op, (values, old, returns, weights, torch.arange(37) % 3 != 0, 0.5))
        torch.library.opcheck(op, (values, None, returns, weights, None, None))


def test_one_compilation_serves_every_length() -> None:
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *columns: value_loss(*columns, clip_range=0.3).loss, fullgraph=True, backend=counted, dynamic=True
    )
    frames = set()
    for count in range(10, 30):
        columns = batch(count)
        columns[0].requires_grad_()
        loss = compiled(*columns)
        loss.backward()
        assert torch.equal(loss, value_loss(*columns, clip_range=0.3).loss)
        frames.add(counted.frame_count)
    assert len(frames) == 1, "a later length was compiled again"


@pytest.mark.parametrize(
    "change, word",
    [
        ({"returns": torch.zeros(4)}, "'returns'"),
        ({"old_values": torch.zeros(3, dtype=torch.int64)}, "'old_values'"),
        ({"weights": torch.zeros(2)}, "'weights'"),
        ({"clip_range": 0.0}, "'clip_range'"),
        ({"mask": torch.zeros(3)}, "'mask'"),
    ],
)
def test_wrong_arguments_are_named(change: dict, word: str) -> None:
    columns = {name: torch.zeros(3) for name in ("values", "old_values", "returns", "weights")}
    with pytest.raises(ValueError, match=word):
        value_loss(**(columns | change))
