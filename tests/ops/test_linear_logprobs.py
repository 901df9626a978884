from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zs_kernels import linear_logprobs, linear_logprobs_reference


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
    ours = gradients(linear_logprobs, *arguments, workspace_bytes=chunk_rows * vocabulary * 24, **options)
    for expected, got in zip(truth, ours, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_gradcheck() -> None:
    hidden, weight, bias, index = inputs(5, 3, 7, torch.float64)

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        result = linear_logprobs(hidden, weight, index, bias=bias, temperature=0.8, entropy=True, workspace_bytes=400)
        assert result.entropy is not None
        return result.logprobs, result.entropy

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))


@pytest.mark.parametrize("dtype, floor", [(torch.float32, 2e-5), (torch.bfloat16, 0.0)])
def test_no_worse_than_torch_in_that_type(dtype: torch.dtype, floor: float) -> None:
    hidden, weight, _, index = inputs(37, 19, 513, dtype)
    truth = linear_logprobs_reference(hidden.double(), weight.double(), index).logprobs
    in_torch = torch.log_softmax(hidden @ weight.T, -1).gather(-1, index[:, None]).squeeze(-1).double()
    ours = linear_logprobs(hidden, weight, index, workspace_bytes=8 * 513 * 12).logprobs
    assert ours.dtype == torch.float32
    # Both round the logits to the type, luck decides each row; the sizes of the errors are what compares.
    ours_error, torch_error = (ours - truth).abs(), (in_torch - truth).abs()
    assert ours_error.max() <= torch_error.max() + floor and ours_error.mean() <= torch_error.mean() + floor


def test_exact_mode_puts_no_rounding_between_the_products_and_the_softmax() -> None:
    hidden, weight, _, index = inputs(37, 19, 513, torch.bfloat16)
    truth = linear_logprobs_reference(hidden.double(), weight.double(), index).logprobs
    rounded = (linear_logprobs(hidden, weight, index).logprobs - truth).abs().max()
    result = linear_logprobs(hidden, weight, index, exact=True)
    assert (result.logprobs - truth).abs().max() <= 2e-5 < rounded
    result.logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_masked_rows_cost_nothing_and_may_hold_anything() -> None:
    hidden, weight, _, index = inputs(11, 5, 13, torch.float64)
    mask = torch.arange(11) % 3 == 0
    poisoned = torch.where(mask[:, None], hidden.detach(), float("nan")).requires_grad_()
    result = linear_logprobs(poisoned, weight, torch.where(mask, index, -100), mask=mask, entropy=True)
    (result.logprobs.sum() + result.entropy.sum()).backward()
    alone = linear_logprobs(hidden[mask], weight, index[mask], entropy=True)
    assert torch.equal(result.logprobs[mask], alone.logprobs)
    assert torch.equal(result.entropy[mask], alone.entropy)
    assert (result.logprobs[~mask] == 0).all() and (result.entropy[~mask] == 0).all()
    assert (poisoned.grad[~mask] == 0).all()
    assert torch.isfinite(poisoned.grad).all() and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("rows, mask", [(0, None), (4, torch.zeros(4, dtype=torch.bool))])
def test_nothing_to_score_gives_zero_gradients(rows: int, mask: Tensor | None) -> None:
    hidden, weight, bias, index = inputs(rows, 3, 5, torch.float32)
    result = linear_logprobs(hidden, weight, index, bias=bias, mask=mask, entropy=True)
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


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor made by an operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        self.elements = max([self.elements, *(t.numel() for t in made if isinstance(t, Tensor))])
        return result


def test_no_tokens_by_vocabulary_tensor_ever_exists() -> None:
    rows, vocabulary, chunk_rows = 64, 1000, 8
    hidden, weight, _, index = inputs(rows, 4, vocabulary, torch.float32)
    with LargestTensor() as largest:
        result = linear_logprobs(hidden, weight, index, entropy=True, workspace_bytes=chunk_rows * vocabulary * 12)
        (result.logprobs.sum() + result.entropy.sum()).backward()
    assert largest.elements <= chunk_rows * vocabulary


def test_the_same_inputs_give_the_same_bits() -> None:
    hidden, weight, bias, index = inputs(50, 16, 301, torch.float32)
    upstream = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
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
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], words: list[str]) -> None:
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "index": torch.tensor([0, 4])} | change
    hidden, weight, index = (arguments.pop(name) for name in ("hidden", "weight", "index"))
    with pytest.raises(error) as caught:
        linear_logprobs(hidden, weight, index, **arguments)
    for word in words:
        assert word in str(caught.value)
