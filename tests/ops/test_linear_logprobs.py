from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
