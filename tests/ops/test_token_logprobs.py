from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zs_kernels import token_logprobs

INF = float("inf")


def plain(logits: Tensor, index: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy, straight from the definition, in float64."""
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    logprobs = torch.log_softmax(logits.double() / scale, dim=-1)
    return logprobs.gather(-1, index[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def inputs(rows: int, vocabulary: int, dtype: torch.dtype, spread: float = 8.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * spread
    return logits.to(dtype), torch.randint(0, vocabulary, (rows,), generator=generator)


# one token in the vocabulary; odd sizes; just past a power of two; float32 sums over many terms
@pytest.mark.parametrize("rows, vocabulary", [(1, 1), (3, 7), (17, 1025), (2, 32_001)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.1, 8.0])  # flat and peaky rows
def test_no_worse_than_torch(rows: int, vocabulary: int, dtype: torch.dtype, spread: float) -> None:
    logits, index = inputs(rows, vocabulary, dtype, spread)
    truth, true_entropy = plain(logits, index)
    torch_error = (torch.log_softmax(logits, -1).gather(-1, index[:, None]).squeeze(-1).double() - truth).abs()
    result = token_logprobs(logits, index, entropy=True, sum_squares=True)
    assert result.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((result.logprobs - truth).abs() <= torch_error + 1e-5).all()
    assert (result.logprobs <= 0).all()
    torch.testing.assert_close(result.entropy.double(), true_entropy, rtol=1e-4, atol=1e-4)
    squares = torch.softmax(logits.double(), -1).square().sum(-1)
    torch.testing.assert_close(result.sum_squares.double(), squares, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.logsumexp.double(), torch.logsumexp(logits.double(), -1), rtol=1e-6, atol=1e-5)


def test_gradient_equals_the_definition_at_per_row_temperatures() -> None:
    logits, index = inputs(9, 33, torch.float64)
    generator = torch.Generator().manual_seed(5)
    temperature = torch.rand(9, generator=generator, dtype=torch.float64) + 0.5
    upstream = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    grads = []
    for function in (plain, lambda *args: token_logprobs(*args[:2], temperature=args[2], entropy=True)[:2]):
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = function(leaf, index, temperature)
        (logprobs * upstream[0] + entropy * upstream[1]).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


def test_masked_rows_are_zero_with_zero_gradient_whatever_they_hold() -> None:
    logits, index = inputs(4, 5, torch.float32)
    logits[1], logits[3, 2] = float("nan"), INF
    index[1] = -100
    logits.requires_grad_()
    mask = torch.tensor([True, False, True, False])
    result = token_logprobs(logits, index, mask=mask, entropy=True, sum_squares=True)
    (result.logprobs.sum() + result.entropy.sum()).backward()
    for column in (result.logprobs, result.entropy, result.sum_squares, result.logsumexp):
        assert column[~mask].tolist() == [0.0, 0.0]
    assert (logits.grad[~mask] == 0).all()
    assert torch.isfinite(logits.grad).all() and (logits.grad[mask] != 0).any()


def test_infinitely_unlikely_tokens_and_rows_without_any_token() -> None:
    logits = torch.tensor([[0.0, -INF, 0.0], [-INF, -INF, -INF], [1.0, -INF, -INF]], requires_grad=True)
    index = torch.tensor([0, 1, 0])
    result = token_logprobs(logits, index, entropy=True, sum_squares=True)
    torch.testing.assert_close(result.logprobs.detach(), torch.tensor([-0.6931472, -INF, 0.0]))
    torch.testing.assert_close(result.entropy.detach(), torch.tensor([0.6931472, 0.0, 0.0]))
    torch.testing.assert_close(result.sum_squares, torch.tensor([0.5, 0.0, 1.0]))
    (result.logprobs[[0, 2]].sum() + result.entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1].tolist() == [0.0, 0.0, 0.0]


def test_options_change_the_distribution_as_documented() -> None:
    logits, index = inputs(6, 9, torch.float64)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(9, generator=generator, dtype=torch.float64)
    capped = 3.0 * torch.tanh(logits / 3.0) + bias
    result = token_logprobs(logits, index, softcap=3.0, bias=bias, temperature=0.5)
    torch.testing.assert_close(result.logprobs, plain(capped, index, 0.5)[0])

    several = torch.randint(0, 9, (6, 4), generator=generator)
    expected = torch.stack([plain(logits, several[:, k])[0] for k in range(4)], dim=1)
    torch.testing.assert_close(token_logprobs(logits, several).logprobs, expected)

    top = token_logprobs(logits, index, top_k=2)
    torch.testing.assert_close(top.top_k_ids, logits.topk(2, dim=-1).indices)
    torch.testing.assert_close(top.top_k_logprobs[:, 0], plain(logits, top.top_k_ids[:, 0])[0])


def test_a_keep_set_renormalises_over_the_kept_tokens_alone() -> None:
    logits, _ = inputs(2, 5, torch.float64)
    keep = (torch.tensor([0, 2, 5]), torch.tensor([1, 3, 0, 2, 4]))
    result = token_logprobs(logits, torch.tensor([3, 4]), keep=keep)
    first = logits[0, 3] - torch.logsumexp(logits[0, [1, 3]], 0)
    second = logits[1, 4] - torch.logsumexp(logits[1, [0, 2, 4]], 0)
    torch.testing.assert_close(result.logprobs, torch.stack([first, second]))


def test_strided_views_and_no_rows() -> None:
    logits, index = inputs(8, 12, torch.float32)
    view = logits[1::2, 2:9]
    dense = token_logprobs(view.contiguous(), index[:4] % 7).logprobs
    assert torch.equal(token_logprobs(view, index[:4] % 7).logprobs, dense)
    assert token_logprobs(logits[:0], index[:0], entropy=True).entropy.shape == (0,)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"index": torch.tensor([0.0, 1.0])}, ValueError, ["token_logprobs", "'index'", "int64", "float32 [2]"]),
        ({"index": torch.tensor([0, 1, 2])}, ValueError, ["'index'", "[2]", "int64 [3]"]),
        ({"index": torch.tensor([0, 5])}, IndexError, ["'index'", "[0, 5)", "[0, 5]"]),
        ({"index": torch.tensor([-1, 0])}, IndexError, ["'index'", "[-1, 0]"]),
        ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, ["'logits'", "floating-point", "int64 [2, 5]"]),
        ({"logits": torch.zeros(2, 5, 1)}, ValueError, ["'logits'", "[N, V]"]),
        ({"temperature": 0.0}, ValueError, ["'temperature'", "above 0", "0.0"]),
        ({"temperature": torch.ones(3)}, ValueError, ["'temperature'", "[2]", "[3]"]),
        ({"mask": torch.ones(2)}, ValueError, ["'mask'", "bool", "float32"]),
        ({"top_k": 6}, ValueError, ["'top_k'", "6"]),
        ({"bias": torch.zeros(4)}, ValueError, ["'bias'", "[5]", "[4]"]),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], words: list[str]) -> None:
    arguments = {"logits": torch.zeros(2, 5), "index": torch.tensor([0, 4])} | change
    logits, index = arguments.pop("logits"), arguments.pop("index")
    with pytest.raises(error) as caught:
        token_logprobs(logits, index, **arguments)
    for word in words:
        assert word in str(caught.value)
