"""linear_logprobs on every backend: values and gradients against float64, options, masks, adapters, memory, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.op_bodies import Products
from zs_kernels import linear_logprobs, linear_logprobs_reference
from zs_kernels._device import native_status, use_backend
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.testing import assert_no_worse_than_torch, poison_empty, seeded

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def inputs(
    rows: int, size: int, vocabulary: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, size, generator=generator, dtype=torch.float64) * (8 / size**0.5)  # peaky rows
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    index = torch.randint(0, vocabulary, (rows,), generator=generator)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    return leaves[0], leaves[1], leaves[2], index


def gradients(function, hidden, weight, bias, index, upstream, **options):  # type: ignore[no-untyped-def]
    result = function(hidden, weight, index, bias=bias, entropy=True, **options)
    (result.logprobs * upstream[0] + result.entropy * upstream[1]).sum().backward()
    grads = [leaf.grad for leaf in (hidden, weight, bias) if leaf is not None]
    for leaf in (hidden, weight, bias):
        if leaf is not None:
            leaf.grad = None
    return [result.logprobs.detach(), result.entropy.detach(), *grads]


# one row; odd sizes; one row above and below a chunk boundary; one chunk (kept) and many (recomputed)
@pytest.mark.parametrize(
    "rows, size, vocabulary, chunk_rows", [(1, 3, 7, 1), (17, 5, 33, 4), (16, 8, 129, 16), (33, 7, 65, 16)]
)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 1.3}, {"temperature": "rows"}]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_and_backward_equal_the_reference_in_float64(
    rows: int, size: int, vocabulary: int, chunk_rows: int, options: dict, with_bias: bool
) -> None:
    hidden, weight, bias, index = inputs(rows, size, vocabulary, torch.float64)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, rows, generator=generator, dtype=torch.float64)  # signed, different in each row
    if options.get("temperature") == "rows":
        options = {"temperature": torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5}
    arguments = (hidden, weight, bias if with_bias else None, index, upstream)
    truth = gradients(linear_logprobs_reference, *arguments, **options)
    ours = gradients(linear_logprobs, *arguments, workspace_bytes=chunk_rows * vocabulary * 8, **options)
    for expected, got in zip(truth, ours, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_gradcheck() -> None:
    hidden, weight, bias, index = inputs(5, 3, 7, torch.float64)

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        result = linear_logprobs(hidden, weight, index, bias=bias, temperature=0.8, entropy=True, workspace_bytes=400)
        assert result.entropy is not None
        return result.logprobs, result.entropy

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))


@pytest.mark.parametrize("rows, size, vocabulary", [(3, 5, 127), (9, 19, 1025), (5, 16, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks, kept", [(1, True), (3, True), (3, False)])
def test_no_worse_than_torch_in_that_type(
    backend: str, rows: int, size: int, vocabulary: int, dtype: torch.dtype, chunks: int, kept: bool
) -> None:
    spread = 6.0 if dtype == torch.float32 else 1.0  # large logits rounded to 16 bits leave it to luck who errs more
    leaves = [seeded(rows, size, seed=1), seeded(vocabulary, size, seed=2, scale=spread / size**0.5)]
    index = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(3))
    upstream, heat = seeded(2, rows, seed=4), seeded(rows, seed=5).abs() + 0.5

    def graded(function: Any, wide: torch.dtype, **options: Any) -> list[Tensor]:
        hidden, weight = (leaf.to(dtype).to(wide, copy=True).requires_grad_() for leaf in leaves)
        result = gradients(function, hidden, weight, None, index, upstream.to(wide), temperature=heat, **options)
        return result

    exact, by_torch = (graded(linear_logprobs_reference, wide) for wide in (torch.float64, dtype))
    workspace = -(-rows // chunks) * vocabulary * dtype.itemsize
    with poison_empty():
        found = graded(linear_logprobs, dtype, workspace_bytes=workspace, logits_bytes=(1 << 30) * kept)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert found[2].dtype == found[3].dtype == dtype
    floor = {torch.float32: 6e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    for name, *parts in zip(("logprobs", "entropy", "hidden", "weight"), found, by_torch, exact, strict=True):
        assert_no_worse_than_torch(*parts, floor=floor, name=name)


@pytest.mark.parametrize("workspace_rows", [100, 8])
def test_exact_mode_puts_no_rounding_between_the_products_and_the_softmax(backend: str, workspace_rows: int) -> None:
    hidden, weight, bias, index = inputs(37, 19, 513, torch.bfloat16)
    truth = linear_logprobs_reference(hidden.double(), weight.double(), index, bias=bias.double())
    rounded = (linear_logprobs(hidden, weight, index, bias=bias).logprobs - truth.logprobs).abs().max()
    workspace = workspace_rows * 513 * 6
    result = linear_logprobs(hidden, weight, index, bias=bias, exact=True, workspace_bytes=workspace)
    assert (result.logprobs - truth.logprobs).abs().max() <= 2e-5 < rounded
    upstream = seeded(37, seed=2)
    (result.logprobs * upstream).sum().backward()
    found = [leaf.grad for leaf in (hidden, weight, bias)]
    hidden.grad = weight.grad = bias.grad = None
    (truth.logprobs * upstream).sum().backward()
    for leaf, gradient in zip((hidden, weight, bias), found, strict=True):
        assert gradient.dtype == torch.bfloat16
        exact = leaf.grad.double()
        torch.testing.assert_close(gradient.double(), exact, rtol=0.02, atol=0.01 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"mask_count": 4}, {"logits_bytes": 0}, {"workspace_bytes": 3 * 13 * 4}])
def test_masked_rows_cost_nothing_and_may_hold_anything(backend: str, dtype: torch.dtype, options: dict) -> None:
    hidden, weight, _, index = inputs(11, 5, 13, dtype)
    mask = torch.arange(11) % 3 == 0
    poisoned = torch.where(mask[:, None], hidden.detach(), float("nan")).requires_grad_()
    with poison_empty():
        result = linear_logprobs(poisoned, weight, torch.where(mask, index, -100), mask=mask, entropy=True, **options)
    (result.logprobs.sum() + result.entropy.sum()).backward()
    alone = linear_logprobs(hidden[mask], weight, index[mask], entropy=True)
    torch.testing.assert_close(result.logprobs[mask], alone.logprobs)
    torch.testing.assert_close(result.entropy[mask], alone.entropy)
    assert (result.logprobs[~mask] == 0).all() and (result.entropy[~mask] == 0).all()
    assert (poisoned.grad[~mask] == 0).all()
    assert torch.isfinite(poisoned.grad).all() and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("rows, mask", [(0, None), (4, torch.zeros(4, dtype=torch.bool))])
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"batch_invariant": True}, {"sum_squares": True}])
def test_nothing_to_score_gives_zero_gradients(backend: str, rows: int, mask: Tensor | None, options: dict) -> None:
    hidden, weight, bias, index = inputs(rows, 3, 5, torch.bfloat16)
    result = linear_logprobs(hidden, weight, index, bias=bias, mask=mask, entropy=True, **options)
    assert result.logprobs.shape == (rows,) and (result.logprobs == 0).all()
    (result.logprobs.sum() + result.entropy.sum()).backward()
    for leaf in (hidden, weight, bias):
        assert (leaf.grad == 0).all()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, index = inputs(6, 3, 5, torch.float32)
    linear_logprobs(hidden, weight.detach(), index).logprobs.sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_a_head_tied_to_the_embedding_gets_one_summed_gradient() -> None:
    _, weight, _, index = inputs(6, 3, 5, torch.float64)
    grads = []
    for function in (linear_logprobs_reference, linear_logprobs):
        function(weight[index], weight, index.flip(0)).logprobs.sum().backward()
        grads.append(weight.grad)
        weight.grad = None
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("exact", [False, True])
def test_no_tokens_by_vocabulary_tensor_ever_exists(exact: bool) -> None:
    rows, vocabulary, chunk_rows = 64, 1000, 8
    hidden, weight, _, index = inputs(rows, 4, vocabulary, torch.bfloat16)
    with Products() as watched:
        workspace = chunk_rows * vocabulary * (6 if exact else 2)
        result = linear_logprobs(hidden, weight, index, entropy=True, exact=exact, workspace_bytes=workspace)
        (result.logprobs.sum() + result.entropy.sum()).backward()
    assert watched.largest == chunk_rows * vocabulary


def test_the_same_inputs_give_the_same_bits(backend: str) -> None:
    hidden, weight, bias, index = inputs(50, 16, 301, torch.float32)
    upstream = seeded(2, 50, seed=3)
    arguments = (linear_logprobs, hidden, weight, bias, index, upstream)
    first, second = (gradients(*arguments, workspace_bytes=7 * 301 * 12) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"hidden": torch.zeros(4)}, ValueError, ["linear_logprobs", "'hidden'", "[N, H]", "[4]"]),
        ({"weight": torch.zeros(5, 4)}, ValueError, ["'weight'", "[V, 3]", "[5, 4]"]),
        ({"weight": torch.zeros(5, 3, dtype=torch.float64)}, ValueError, ["'weight'", "float32", "float64"]),
        ({"index": torch.tensor([0, 5])}, IndexError, ["'index'", "[0, 5)"]),
        ({"index": torch.tensor([0])}, ValueError, ["'index'", "[2]", "[1]"]),
        ({"bias": torch.zeros(3)}, ValueError, ["'bias'", "[5]"]),
        ({"temperature": -1.0}, ValueError, ["'temperature'", "above 0", "-1.0"]),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, ["'mask'", "[2]", "[3]"]),
        ({"workspace_bytes": 0}, ValueError, ["'workspace_bytes'", "above 0"]),
        ({"logits_bytes": -1}, ValueError, ["'logits_bytes'", "at least 0", "-1"]),
        ({"mask_count": 2}, ValueError, ["'mask_count'", "None without a mask", "2"]),
        ({"mask": torch.tensor([True, False]), "mask_count": 2}, ValueError, ["'mask_count'", "1", "2"]),
        ({"mask": torch.tensor([True, False]), "mask_count": 3}, ValueError, ["'mask_count'", "0 to 2", "3"]),
        ({"lora": torch.zeros(2, 3)}, ValueError, ["'lora'", "tuple"]),
        ({"lora": (torch.zeros(2, 4), torch.zeros(5, 2), 1.0)}, ValueError, ["'lora A'", "[r, 3]", "[2, 4]"]),
        ({"lora": (torch.zeros(2, 3), torch.zeros(5, 1), 1.0)}, ValueError, ["'lora B'", "[5, 2]", "[5, 1]"]),
        ({"process_group": 7}, ValueError, ["'process_group'", "process group", "7"]),
        ({"vocabulary_start": 2}, ValueError, ["'vocabulary_start'", "process_group", "2"]),
        ({"head_backend": "cutlass"}, ValueError, ["'head_backend'", "gemm, triton, liger", "cutlass"]),
        ({"head_backend": "liger"}, ValueError, ["'head_backend'", "NVIDIA GPU", "liger"]),
        ({"head_backend": "triton"}, ValueError, ["'head_backend'", "GPU", "triton"]),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], words: list[str]) -> None:
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "index": torch.tensor([0, 4])} | change
    hidden, weight, index = (arguments.pop(name) for name in ("hidden", "weight", "index"))
    with use_backend("reference"), pytest.raises(error) as caught:
        linear_logprobs(hidden, weight, index, **arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_distributed_weight_is_refused_with_the_ways_out() -> None:
    class Distributed(Tensor):
        device_mesh = None

    weight = torch.zeros(5, 3).as_subclass(Distributed)
    with pytest.raises(TypeError, match=r"'weight'.*distributed.*forward.*to_local\(\)"):
        linear_logprobs(torch.zeros(2, 3), weight, torch.tensor([0, 4]))


def test_logsumexp_and_sum_of_squares(backend: str) -> None:
    hidden, weight, bias, index = inputs(7, 5, 130, torch.float32)
    mask = torch.arange(7) != 2
    result = linear_logprobs(hidden, weight, index, bias=bias, temperature=0.8, mask=mask, sum_squares=True)
    logits = (hidden.double() @ weight.double().T + bias.double()) / 0.8
    assert result.entropy is None and not result.sum_squares.requires_grad and not result.logsumexp.requires_grad
    expected = torch.softmax(logits, -1).square().sum(-1)
    torch.testing.assert_close(result.sum_squares.double(), torch.where(mask, expected, 0.0), rtol=1e-4, atol=1e-6)
    expected = torch.logsumexp(logits, -1)
    torch.testing.assert_close(result.logsumexp.double(), torch.where(mask, expected, 0.0), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_adapter_on_the_head(backend: str, dtype: torch.dtype, exact: bool, frozen: bool) -> None:
    hidden, weight, _, index = inputs(9, 6, 70, torch.float64)
    a, b = (x.double().requires_grad_() for x in (seeded(2, 6, seed=20), seeded(70, 2, seed=21)))
    upstream = seeded(2, 9, seed=3, dtype=torch.float64)
    leaves = (hidden, a, b) if frozen else (hidden, a, b, weight)
    expected = linear_logprobs_reference(hidden, weight + 0.5 * b @ a, index, entropy=True)
    (expected.logprobs * upstream[0] + expected.entropy * upstream[1]).sum().backward()
    gradients = [leaf.grad for leaf in leaves]
    hidden, a, b, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, a, b, weight))
    leaves = (hidden, a, b) if frozen else (hidden, a, b, weight)
    result = linear_logprobs(
        hidden,
        weight.detach() if frozen else weight,
        index,
        lora=(a, b, 0.5),
        entropy=True,
        exact=exact,
        workspace_bytes=4 * 70 * 8,
    )
    (result.logprobs * upstream[0] + result.entropy * upstream[1]).sum().backward()
    floor = 1e-9 if dtype == torch.float64 else 0.06  # peaky logits in bfloat16
    torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=floor, atol=6 * floor)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=0.0, atol=floor * float(gradient.abs().max()))
    assert frozen or weight.grad is not None


def test_rows_without_an_upstream_gradient_are_left_out_and_change_nothing(backend: str) -> None:
    hidden, weight, bias, index = inputs(24, 6, 65, torch.float64)
    upstream = torch.where(torch.arange(24) % 5 == 1, seeded(2, 24, seed=3, dtype=torch.float64), 0.0)
    truth = gradients(linear_logprobs_reference, hidden, weight, bias, index, upstream)
    for options in ({}, {"workspace_bytes": 9 * 65 * 8}, {"workspace_bytes": 9 * 65 * 8, "logits_bytes": 1 << 30}):
        for expected, got in zip(
            truth, gradients(linear_logprobs, hidden, weight, bias, index, upstream, **options), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
