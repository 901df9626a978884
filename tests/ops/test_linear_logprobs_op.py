"""linear_logprobs as an operator: torch's own checks, compiled graphs, products and memory, batches, Triton tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.ops.op_bodies import Products
from zs_kernels import _linear_liger, linear_logprobs, linear_logprobs_reference
from zs_kernels._device import native_status, use_backend
from zs_kernels._linear import WeightGradient
from zs_kernels._linear_tiles import _tile_partials_triton
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.testing import assert_no_worse_than_torch, error_against, poison_empty, seeded
from zs_kernels.token_logprobs import merge_partials

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")),
]
needs_interpreter = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def head(
    rows: int, size: int, vocabulary: int, dtype: torch.dtype = torch.float32, *, spread: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = seeded(rows, size, seed=1), seeded(vocabulary, size, seed=2, scale=spread / size**0.5)
    index = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(3))
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), index


# hidden, weight and bias need gradients; bytes of the workspace, of kept logits; unit gradients; entropy and others
@pytest.mark.parametrize(
    "needs, kept_bytes, unit, entropy", [(3, 1 << 20, False, True), (3, 0, False, False), (1, 0, True, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_op_passes_opcheck(
    needs: int, kept_bytes: int, unit: bool, entropy: bool, dtype: torch.dtype
) -> None:
    hidden, weight, index = head(5, 4, 33, dtype)
    bias = seeded(33, seed=4).to(dtype).requires_grad_(needs > 2)
    weight.requires_grad_(needs > 1)
    mask, heat = torch.arange(5) != 2, seeded(5, seed=5).abs() + 0.5
    numbers = (1.0, 1.0, 0.0, entropy, entropy, dtype != torch.float32, False, False, unit, 40 * dtype.itemsize)
    torch.library.opcheck(
        torch.ops.zs_kernels.linear_logprobs.default,
        (hidden, weight, index, bias, None, None, heat, mask, 4, *numbers, kept_bytes, "", 0, False),
    )


def test_backward_op_passes_opcheck() -> None:
    hidden, weight, index = (x.detach() for x in head(5, 4, 33))
    for kept in (hidden @ weight.T, torch.zeros(0)):
        operands = (hidden, weight, index, seeded(33, seed=4), None, None, None, None)
        numbers = (-1, 1.0, 1.0, 0.0, False, 0, "", 0, [True, True, True, False, False])
        upstream, statistics = seeded(2, 5, seed=6), seeded(2, 5, seed=7)
        arguments = (*upstream, kept, torch.zeros(0), *statistics, *operands, *numbers)
        torch.library.opcheck(torch.ops.zs_kernels.linear_logprobs_backward.default, (*arguments, False))
        torch.library.opcheck(torch.ops.zs_kernels.linear_logprobs_backward_.default, (*arguments, True))


def test_compiles_to_one_graph_that_serves_any_number_of_rows() -> None:
    torch._dynamo.reset()

    def step(hidden: Tensor, weight: Tensor, index: Tensor, mask: Tensor, heat: Tensor) -> Tensor:
        result = linear_logprobs(hidden * 2, weight, index, mask=mask, temperature=heat, entropy=True)
        return (result.logprobs * 3 + result.entropy).sum() + result.logsumexp.sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows in range(5, 25):
        rest = (torch.arange(rows) % 4 != 1, seeded(rows, seed=5).abs() + 0.5)
        grads = []
        for function in (step, compiled):
            hidden, weight, index = head(rows, 4, 33)
            function(hidden, weight, index, *rest).backward()
            grads.append((hidden.grad, weight.grad))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "options, forward, total",
    [
        ({}, 1, 3),  # one chunk: its logits are kept, as far as the workspace goes
        ({"logits_bytes": 0}, 1, 4),
        ({"workspace_bytes": 3 * 700 * 4}, 2, 8),
        ({"workspace_bytes": 3 * 700 * 4, "logits_bytes": 6 * 700 * 4}, 2, 6),
    ],
)
def test_number_of_products(options: dict[str, Any], forward: int, total: int) -> None:
    hidden, weight, index = head(6, 5, 700)
    with Products(3 * 5 * 700) as products:
        result = linear_logprobs(hidden, weight, index, **options)
        assert products.count == forward
        result.logprobs.sum().backward()
    assert products.count == total


def test_a_frozen_head_costs_two_products_however_long_the_batch(backend: str) -> None:
    hidden, weight, index = head(7, 5, 700)
    upstream, mask = torch.where(torch.arange(7) == 1, torch.nan, seeded(7, seed=3)), torch.arange(7) != 1
    with Products(3 * 5 * 700) as products:
        options = {"mask": mask, "workspace_bytes": 3 * 700 * 4}
        logprobs = linear_logprobs(hidden, weight.detach(), index, **options).logprobs
        assert products.count == 4
        (logprobs * upstream).sum().backward(retain_graph=True)  # NaN where masked must not come through
        assert products.count == 4
    found, hidden.grad = hidden.grad, None
    (linear_logprobs_reference(hidden, weight, index, mask=mask).logprobs * upstream.nan_to_num()).sum().backward()
    torch.testing.assert_close(found, hidden.grad, rtol=1e-4, atol=1e-6)
    with Products(3 * 5 * 700) as products, torch.no_grad():
        linear_logprobs(hidden, weight, index)
    assert products.count == 1


def test_a_second_backward_pass_computes_the_kept_logits_again(backend: str) -> None:
    hidden, weight, index = head(6, 5, 70)
    logprobs = linear_logprobs(hidden, weight, index).logprobs
    grads = []
    for _ in range(2):
        hidden.grad = weight.grad = None
        (logprobs * seeded(6, seed=3)).sum().backward(retain_graph=True)
        grads.append((hidden.grad, weight.grad))
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


def test_kept_logits_do_not_outlive_the_graph() -> None:
    hidden, weight, index = head(6, 5, 70)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        result = linear_logprobs(hidden, weight, index)
    node: Any = result.logprobs.grad_fn
    assert node.kept.shape == (6, 70)
    result.logprobs.sum().backward()
    assert node.kept is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_rows_have_the_same_bits_alone(backend: str, dtype: torch.dtype) -> None:
    hidden, weight, index = head(37, 48, 130, dtype)
    options = {"entropy": True, "batch_invariant": True, "workspace_bytes": 16 * 130 * 4}
    together = linear_logprobs(hidden, weight, index, **options)
    for rows in (slice(0, 1), slice(5, 6), slice(20, 37)):
        alone = linear_logprobs(hidden[rows], weight, index[rows], **options)
        assert torch.equal(alone.logprobs, together.logprobs[rows])
        assert torch.equal(alone.entropy, together.entropy[rows])
    plain = linear_logprobs(hidden, weight, index)
    torch.testing.assert_close(together.logprobs, plain.logprobs, rtol=1e-4, atol=0.05)


def test_autocast_casts_the_operands_and_nothing_within() -> None:
    hidden, weight, index = head(9, 16, 130)
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_logprobs(hidden.bfloat16(), weight, index, exact=True)
        result.logprobs.sum().backward()
    exact = linear_logprobs_reference(hidden.bfloat16().double(), weight.bfloat16().double(), index)
    assert (result.logprobs - exact.logprobs).abs().max() <= 2e-5
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradients_of_many_chunks_keep_more_than_sixteen_bits(backend: str, dtype: torch.dtype) -> None:
    dlogits, hidden = seeded(256, 70, seed=1, dtype=dtype), seeded(256, 24, seed=2, dtype=dtype)
    exact = dlogits.double().T @ hidden.double()
    ours, plain = WeightGradient(torch.zeros(70, 24, dtype=dtype), 64), torch.zeros(70, 24, dtype=dtype)
    for first in range(0, 256, 4):
        part = slice(first, first + 4)
        ours.add(dlogits[part], hidden[part])
        plain.addmm_(dlogits[part].T, hidden[part])
    found = ours.result()
    assert found.dtype == dtype
    assert error_against(exact, found) <= 0.7 * error_against(exact, plain)
    assert_no_worse_than_torch(found, dlogits.T @ hidden, exact, floor=2.0 ** (-8 if dtype == torch.bfloat16 else -11))


@needs_interpreter
@pytest.mark.parametrize("rows, size, vocabulary", [(1, 1, 1), (5, 7, 33), (16, 16, 32), (17, 33, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_triton_tiles_keep_exact_sums(
    rows: int, size: int, vocabulary: int, dtype: torch.dtype, softcap: float | None
) -> None:
    hidden, weight, index = head(rows, size, vocabulary, dtype, spread=8.0)
    bias, heat = seeded(vocabulary, seed=4).to(dtype), seeded(rows, seed=5).abs() + 0.5
    with poison_empty():
        partials = _tile_partials_triton(
            hidden, weight, index, heat.reciprocal(), bias, softcap, blocks=(16, 16, 16), programs=4
        )
    found = merge_partials(partials)
    exact = linear_logprobs_reference(
        hidden.double(), weight.double(), index, bias=bias.double(), temperature=heat.double(), softcap=softcap,
        entropy=True,
    )  # fmt: skip
    torch.testing.assert_close(found.logprobs.double(), exact.logprobs.detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.entropy.double(), exact.entropy.detach(), rtol=1e-5, atol=2e-5)


@needs_interpreter
def test_triton_tiles_as_the_forward_pass() -> None:
    hidden, weight, index = head(6, 20, 140, torch.bfloat16, spread=8.0)
    upstream, mask = seeded(2, 6, seed=3), torch.arange(6) != 4
    exact_leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = linear_logprobs_reference(*exact_leaves, index, mask=mask, entropy=True)
    (exact.logprobs * upstream[0] + exact.entropy * upstream[1]).sum().backward()
    with use_backend("triton"), Products(6 * 20) as products:
        result = linear_logprobs(hidden, weight, index, mask=mask, entropy=True, head_backend="triton")
        assert products.count == 0
        (result.logprobs * upstream[0] + result.entropy * upstream[1]).sum().backward()
    assert (result.logprobs - exact.logprobs).abs().max() <= 2e-5
    for leaf, truth in zip((hidden, weight), exact_leaves, strict=True):
        assert error_against(truth.grad, leaf.grad) <= 2.0**-7


class FakeGpu:
    is_cuda, device, dtype = True, "cuda:0", torch.bfloat16


def test_liger_is_refused_where_it_cannot_do_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = FakeGpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "capability 9.0" in _linear_liger.obstacle(gpu, gpu, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "no bias" in _linear_liger.obstacle(gpu, gpu, False)
    monkeypatch.setattr(_linear_liger, "_function", lambda: (None, "cannot be imported"))
    assert "cannot be imported" in _linear_liger.obstacle(gpu, gpu, True)
    gpu.dtype = torch.float16
    assert "bfloat16 alone" in _linear_liger.obstacle(gpu, gpu, True)


def test_liger_is_called_with_its_own_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator itself runs on GPUs of capability 9.0 alone: here a stand-in with its results stands for it."""

    class StandIn:
        @staticmethod
        def apply(hidden, weight, target, temperature, ignore_index, tiles, return_entropy):  # type: ignore[no-untyped-def]
            result = linear_logprobs_reference(hidden, weight, target, temperature=temperature, entropy=True)
            return (-result.logprobs, result.entropy.bfloat16()) if return_entropy else -result.logprobs

    monkeypatch.setattr(_linear_liger, "_function", lambda: (StandIn, ""))
    monkeypatch.setattr(_linear_liger, "obstacle", lambda *given: "")
    hidden, weight, index = head(7, 5, 33)
    mask = torch.arange(7) != 3
    for entropy in (False, True):
        options = {"temperature": 0.7, "mask": mask, "entropy": entropy}
        result = linear_logprobs(hidden, weight, index, head_backend="liger", **options)
        expected = linear_logprobs_reference(hidden, weight, index, **options)
        torch.testing.assert_close(result.logprobs, expected.logprobs)
        assert (result.entropy is None) == (not entropy)
        result.logprobs.sum().backward()
        found, hidden.grad = hidden.grad, None
        expected.logprobs.sum().backward()
        torch.testing.assert_close(found, hidden.grad)
        hidden.grad = weight.grad = None
