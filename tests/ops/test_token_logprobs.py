"""token_logprobs on every backend: values and gradients against float64, options, masks, infinities, in-place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from zs_kernels import token_logprobs
from zs_kernels._device import native_status, use_backend
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.testing import assert_no_worse_than_torch, poison_empty, seeded
from zs_kernels.token_logprobs import token_logprobs_reference

INF = float("inf")
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")),
]
OUTPUT_FLOOR = 2e-6  # of the largest result: a few units in the last place of float32
GRADIENT_FLOOR = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Rounding of the stored gradient (the interpreter cuts bfloat16 off instead of rounding it)."""


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def plain(logits: Tensor, index: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy, straight from the definition, in the type of the logits."""
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    logprobs = torch.log_softmax(logits / scale, dim=-1)
    return logprobs.gather(-1, index[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def inputs(rows: int, vocabulary: int, dtype: torch.dtype, spread: float = 8.0) -> tuple[Tensor, Tensor]:
    logits = seeded(rows, vocabulary, seed=rows * 1000 + vocabulary, scale=spread, dtype=dtype)
    generator = torch.Generator().manual_seed(vocabulary)
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def graded(function, logits: Tensor, index: Tensor, temperature: float | Tensor, upstream: Tensor) -> list[Tensor]:
    """(log-probs, entropy, gradient) with these signed upstream gradients, different in each row."""
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = function(leaf, index, temperature)
    (logprobs * upstream[0].to(logprobs.dtype) + entropy * upstream[1].to(entropy.dtype)).sum().backward()
    assert leaf.grad is not None
    return [logprobs.detach(), entropy.detach(), leaf.grad]


def ours(logits: Tensor, index: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor | None]:
    result = token_logprobs(logits, index, temperature=temperature, entropy=True)
    return result.logprobs, result.entropy


# one token in the vocabulary; odd sizes; one beside a block of 128 and 1024; several blocks of 8192 with a tail
@pytest.mark.parametrize("rows, vocabulary", [(1, 1), (3, 7), (2, 127), (2, 128), (2, 129), (5, 1025), (2, 20_001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.1, 8.0])  # flat and peaky rows
@pytest.mark.parametrize("temperature", [1.0, "rows"])
def test_no_worse_than_torch(
    rows: int, vocabulary: int, dtype: torch.dtype, spread: float, temperature: float | str
) -> None:
    logits, index = inputs(rows, vocabulary, dtype, spread)
    heat = seeded(rows, seed=3).abs() + 0.5 if temperature == "rows" else 0.75
    upstream = seeded(2, rows, seed=7)
    exact_heat = heat.double() if isinstance(heat, Tensor) else heat
    exact = graded(plain, logits.double(), index, exact_heat, upstream)
    by_torch = graded(plain, logits.float(), index, heat, upstream)[:2]  # the statistics are never rounded to 16 bits
    by_torch.append(graded(plain, logits, index, heat.to(dtype) if isinstance(heat, Tensor) else heat, upstream)[2])
    with poison_empty():
        found = graded(ours, logits, index, heat, upstream)
    assert found[0].dtype == found[1].dtype == torch.float32 and found[2].dtype == dtype
    floors = (OUTPUT_FLOOR, OUTPUT_FLOOR, GRADIENT_FLOOR[dtype])
    for name, *parts, floor in zip(("logprobs", "entropy", "grad"), found, by_torch, exact, floors, strict=True):
        # a 1 among the values: errors of what is nothing but rounding (one token alone) count as a share of it
        parts = [torch.cat([part.flatten().double(), torch.ones(1)]) for part in parts]
        assert_no_worse_than_torch(*parts, floor=floor, name=name)
    assert (found[0] <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_other_statistics(dtype: torch.dtype) -> None:
    logits, index = inputs(6, 1025, dtype)
    with poison_empty():
        result = token_logprobs(logits, index, temperature=2.0, sum_squares=True, top_k=3)
    assert result.entropy is None and result.sum_squares is not None
    z = logits.double() / 2.0
    torch.testing.assert_close(result.sum_squares.double(), torch.softmax(z, -1).square().sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.logsumexp.double(), torch.logsumexp(z, -1), rtol=1e-6, atol=1e-6)
    top = torch.log_softmax(z, -1).topk(3, dim=-1).values
    torch.testing.assert_close(result.top_k_logprobs.double(), top, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(torch.log_softmax(z, -1).gather(1, result.top_k_ids), top)
    assert result.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_gradient_equals_the_definition_in_float64() -> None:
    logits, index = inputs(9, 33, torch.float64)
    temperature = seeded(9, seed=5, dtype=torch.float64).abs() + 0.5
    upstream = seeded(2, 9, seed=6, dtype=torch.float64)
    expected = graded(plain, logits, index, temperature, upstream)
    for one, other in zip(graded(ours, logits, index, temperature, upstream), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def keep_set(rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """From one token to all of them; row 3 keeps none. Not sorted."""
    generator = torch.Generator().manual_seed(rows)
    sets = [torch.randperm(vocabulary, generator=generator)[: (n * 7) % vocabulary + 1] for n in range(rows)]
    sets[3] = sets[3][:0]
    offsets = torch.tensor([0, *(len(one) for one in sets)]).cumsum(0)
    return offsets, torch.cat(sets)


@pytest.mark.parametrize("index_shape", ["[N]", "[N, 1]", "[N, 3]", "[N, 0]"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("way", ["plain", "keep", "inplace_backward"])
def test_every_option_with_every_other_equals_the_reference(
    backend: str, index_shape: str, softcap: float | None, bias: bool, mask: bool, way: str
) -> None:
    """In float32 as well, where the reference runs in float64: its own entropy cancels."""
    rows, vocabulary = 8, 131
    logits, index = inputs(rows, vocabulary, torch.float32, 3.0)
    logits[1, :5], logits[2] = -INF, -INF
    generator = torch.Generator().manual_seed(1)
    if index_shape != "[N]":
        index = torch.randint(0, vocabulary, (rows, int(index_shape[4])), generator=generator)
        index[:, 1:2] = index[:, 0:1]  # a token asked for twice
    options = {"softcap": softcap, "entropy": True, "sum_squares": True, "top_k": 2}
    options["temperature"] = torch.rand(rows, generator=generator) + 0.5
    if way == "keep":
        options["keep"] = keep_set(rows, vocabulary)
    if mask:
        options["mask"] = torch.arange(rows) % 3 != 0
        logits[::3], index[::3] = torch.nan, -100
    upstream = seeded(*index.shape, seed=2), seeded(rows, seed=3)
    given = torch.randn(vocabulary, generator=generator) if bias else None

    def run(function, dtype: torch.dtype, **more) -> list[Tensor]:
        leaf = logits.to(dtype, copy=True).requires_grad_()
        bias_leaf = None if given is None else given.to(dtype, copy=True).requires_grad_()
        result = function(leaf * 1, index, bias=bias_leaf, **options, **more)
        likely = torch.where(result.logprobs == -INF, 0.0, result.logprobs)
        ((likely * upstream[0]).sum() + (result.entropy * upstream[1]).sum()).backward()
        return [part.detach() for part in result] + [leaf.grad] + ([] if bias_leaf is None else [bias_leaf.grad])

    expected = run(token_logprobs_reference, torch.float64)
    assert expected[6].abs().sum() > 0
    tolerances = {torch.float32: (1e-5, 5e-6)} | ({torch.float64: (1e-9, 1e-11)} if backend == "reference" else {})
    for dtype, (rtol, atol) in tolerances.items():
        with poison_empty():
            found = run(token_logprobs, dtype, inplace_backward=way == "inplace_backward")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, check_dtype=False)


def test_masked_rows_are_zero_with_zero_gradient_whatever_they_hold() -> None:
    logits, index = inputs(4, 5, torch.float32)
    logits[1], logits[3, 2] = float("nan"), INF
    index[1] = -100
    logits.requires_grad_()
    mask = torch.tensor([True, False, True, False])
    with poison_empty():
        result = token_logprobs(logits, index, mask=mask, entropy=True, sum_squares=True, top_k=2)
        upstream = torch.tensor([1.0, torch.nan, -2.0, INF])
        (result.logprobs * upstream).sum().backward(retain_graph=True)
        result.entropy.sum().backward()
    for column in (result.logprobs, result.entropy, result.sum_squares, result.logsumexp):
        assert column[~mask].tolist() == [0.0, 0.0]
    assert not result.top_k_logprobs[~mask].any() and not result.top_k_ids[~mask].any()
    assert (logits.grad[~mask] == 0).all()
    assert torch.isfinite(logits.grad).all() and (logits.grad[mask] != 0).any()


def test_nothing_but_masked_rows() -> None:
    logits = torch.full((3, 5), torch.nan, requires_grad=True)
    result = token_logprobs(logits, torch.tensor([9, 9, 9]), mask=torch.zeros(3, dtype=torch.bool), entropy=True)
    (result.logprobs.sum() + result.entropy.sum()).backward()
    assert not result.logprobs.any() and not result.entropy.any() and not logits.grad.any()


def test_nan_in_a_row_that_counts_shows() -> None:
    logits, index = inputs(3, 300, torch.float32)
    logits[1, 7] = torch.nan
    result = token_logprobs(logits, index, entropy=True)
    assert result.logprobs.isnan().tolist() == result.entropy.isnan().tolist() == [False, True, False]


def test_infinitely_unlikely_tokens_and_rows_without_any_token() -> None:
    logits = torch.tensor([[0.0, -INF, 0.0], [-INF, -INF, -INF], [1.0, -INF, -INF], [0.0, -INF, 1.0]])
    logits.requires_grad_()
    index = torch.tensor([0, 1, 0, 1])
    result = token_logprobs(logits, index, entropy=True, sum_squares=True)
    torch.testing.assert_close(result.logprobs.detach(), torch.tensor([-0.6931472, -INF, 0.0, -INF]))
    torch.testing.assert_close(result.entropy.detach(), torch.tensor([0.6931472, 0.0, 0.0, 0.5822031]))
    torch.testing.assert_close(result.sum_squares, torch.tensor([0.5, 0.0, 1.0, 0.6067761]))
    (result.logprobs * torch.tensor([1.0, 1.0, 1.0, 2.0])).sum().backward()
    expected = [[0.5, 0.0, -0.5], [0.0] * 3, [0.0] * 3, [-2 * 0.2689414, 0.0, -2 * 0.7310586]]
    torch.testing.assert_close(logits.grad, torch.tensor(expected))


def test_blocks_without_a_finite_logit() -> None:
    """The first block, a block in the middle, all blocks but the last: the running maximum starts late or stands."""
    logits, _ = inputs(3, 25_000, torch.float32)
    logits[0, :9000], logits[1, 8000:20_000], logits[2, :24_990] = -INF, -INF, -INF
    index = torch.tensor([20_000, 1, 24_995])
    exact = plain(torch.where(logits == -INF, -1e30, logits.double()), index)
    result = token_logprobs(logits, index, entropy=True)
    torch.testing.assert_close(result.logprobs, exact[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy, exact[1].float(), rtol=1e-5, atol=1e-5)


def test_options_change_the_distribution_as_documented() -> None:
    logits, index = inputs(6, 9, torch.float64)
    bias = seeded(9, seed=1, dtype=torch.float64)
    capped = 3.0 * torch.tanh(logits / 3.0) + bias
    result = token_logprobs(logits, index, softcap=3.0, bias=bias, temperature=0.5)
    torch.testing.assert_close(result.logprobs, plain(capped, index, 0.5)[0])
    several = torch.stack([index, (index + 1) % 9], dim=1)
    expected = torch.stack([plain(logits, several[:, k])[0] for k in range(2)], dim=1)
    torch.testing.assert_close(token_logprobs(logits, several).logprobs, expected)


def test_a_keep_set_renormalises_over_the_kept_tokens_alone() -> None:
    logits, _ = inputs(3, 5, torch.float32)
    keep = (torch.tensor([0, 2, 5, 6]), torch.tensor([1, 3, 0, 2, 4, 1]))
    expected = [
        logits[0, 3] - torch.logsumexp(logits[0, [1, 3]], 0),
        logits[1, 4] - torch.logsumexp(logits[1, [0, 2, 4]], 0),
        torch.tensor(-INF),  # its own token was not kept
    ]
    logits[0, [0, 2, 4]] = torch.nan  # not kept: not read
    result = token_logprobs(logits, torch.tensor([3, 4, 0]), keep=keep)
    torch.testing.assert_close(result.logprobs, torch.stack(expected))


def test_strided_views_expanded_gradients_and_no_rows() -> None:
    logits, index = inputs(8, 12, torch.float32)
    for view, chosen in [
        (logits[1::2, 2:9], index[:4] % 7),
        (logits.T[:, ::2], torch.arange(12) % 4),
        (logits[:1].expand(5, 12), index[:5]),
    ]:
        grads = []
        for given in (view, view.clone(memory_format=torch.contiguous_format)):
            leaf = given.detach().requires_grad_()
            result = token_logprobs(leaf, chosen, entropy=True)
            (result.logprobs.sum() + result.entropy.sum()).backward()  # sum() gives gradients of stride 0
            grads.append((result.logprobs.detach(), leaf.grad))
        assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    empty = logits[:0].clone().requires_grad_()
    none = token_logprobs(empty, index[:0], entropy=True, top_k=2)
    (none.logprobs.sum() + none.entropy.sum()).backward()
    assert none.entropy.shape == (0,) and none.top_k_ids.shape == (0, 2) and empty.grad.shape == (0, 12)
    assert token_logprobs(logits, index.int()).logprobs.equal(token_logprobs(logits, index).logprobs)


def test_only_what_is_asked_for_has_a_gradient() -> None:
    logits, index = inputs(4, 9, torch.float32)
    leaf = logits.clone().requires_grad_()
    result = token_logprobs(leaf, index, entropy=True, sum_squares=True, top_k=1)
    assert result.logprobs.requires_grad and result.entropy.requires_grad
    assert not any(part.requires_grad for part in (result.logsumexp, result.sum_squares, result.top_k_logprobs))
    result.entropy.sum().backward()  # nothing comes back through logprobs
    by_torch = logits.double().requires_grad_()
    plain(by_torch, index)[1].sum().backward()
    torch.testing.assert_close(leaf.grad, by_torch.grad.float(), rtol=1e-5, atol=1e-6)


def test_a_second_derivative_is_refused() -> None:
    logits, index = inputs(2, 5, torch.float32)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(token_logprobs(logits, index).logprobs.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), logits)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"index": torch.tensor([0.0, 1.0])}, ValueError, ["token_logprobs", "'index'", "int64", "float32 [2]"]),
        ({"index": torch.tensor([0, 1, 2])}, ValueError, ["'index'", "[2]", "int64 [3]"]),
        ({"index": torch.tensor(0)}, ValueError, ["'index'", "[2]", "int64 []"]),
        ({"index": [0, 1]}, TypeError, ["'index'", "tensor", "list"]),
        ({"index": torch.tensor([0, 5])}, IndexError, ["'index'", "[0, 5)", "[0, 5]"]),
        ({"index": torch.tensor([-1, 0])}, IndexError, ["'index'", "[-1, 0]"]),
        ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, ["'logits'", "floating-point", "int64 [2, 5]"]),
        ({"logits": torch.zeros(2, 5, 1)}, ValueError, ["'logits'", "[N, V]"]),
        ({"logits": torch.zeros(2, 0)}, ValueError, ["'logits'", "V above 0", "[2, 0]"]),
        ({"temperature": 0.0}, ValueError, ["'temperature'", "above 0", "0.0"]),
        ({"temperature": torch.ones(3)}, ValueError, ["'temperature'", "[2]", "[3]"]),
        ({"temperature": torch.ones(2, requires_grad=True)}, ValueError, ["'temperature'", "without a gradient"]),
        ({"softcap": -1.0}, ValueError, ["'softcap'", "above 0"]),
        ({"mask": torch.ones(2)}, ValueError, ["'mask'", "bool", "float32"]),
        ({"top_k": 6}, ValueError, ["'top_k'", "6"]),
        ({"bias": torch.zeros(4)}, ValueError, ["'bias'", "[5]", "[4]"]),
        ({"keep": torch.zeros(2)}, ValueError, ["'keep'", "pair"]),
        ({"keep": (torch.tensor([0, 1]), torch.tensor([0]))}, ValueError, ["'keep'", "[3]", "[2]"]),
        ({"keep": (torch.tensor([0, 2, 1]), torch.tensor([0, 1]))}, ValueError, ["'keep'", "rise from 0 to"]),
        ({"keep": (torch.tensor([0, 1, 2]), torch.tensor([0, 5]))}, IndexError, ["'keep'", "[0, 5)"]),
        ({"keep": (torch.tensor([0, 2, 3]), torch.tensor([1, 1, 1]))}, ValueError, ["'keep'", "twice"]),
        (
            {"keep": (torch.tensor([0, 1, 2]), torch.tensor([0, 4])), "inplace_backward": True},
            ValueError,
            ["'inplace_backward'", "keep"],
        ),
        ({"logits": torch.zeros(1, 5).expand(2, 5), "inplace_backward": True}, ValueError, ["'logits'", "rows"]),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], words: list[str]) -> None:
    arguments = {"logits": torch.zeros(2, 5), "index": torch.tensor([0, 4])} | change
    logits, index = arguments.pop("logits"), arguments.pop("index")
    with pytest.raises(error) as caught:
        token_logprobs(logits, index, **arguments)
    for word in words:
        assert word in str(caught.value)
