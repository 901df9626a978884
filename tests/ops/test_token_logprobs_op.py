"""token_logprobs as an operator: torch's own checks, compiled graphs, memory, in-place, no waiting for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from zs_kernels import _sweeps, _sweeps_triton, token_logprobs
from zs_kernels._device import native_status, use_backend
from zs_kernels._token_logprobs_op import token_logprobs_backward, token_logprobs_backward_, token_logprobs_forward
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.testing import seeded

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")),
]
ROWS, VOCABULARY = 8, 40
NOTHING: dict[str, Any] = {
    "temperatures": None,
    "temperature": 0.7,
    "mask": None,
    "bias": None,
    "keep_offsets": None,
    "keep_ids": None,
    "softcap": 0.0,
}
EVERYTHING = NOTHING | {
    "temperatures": torch.linspace(0.5, 2.0, ROWS),
    "mask": torch.arange(ROWS) % 3 != 0,
    "bias": seeded(VOCABULARY, seed=1),
    "softcap": 5.0,
}
KEEP = NOTHING | {"keep_offsets": torch.arange(ROWS + 1) * 5, "keep_ids": torch.arange(ROWS * 5)}
ASKED = {"entropy": True, "sum_squares": True, "top_k": 2, "inplace_backward": False}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("options", [NOTHING, EVERYTHING, KEEP], ids=["nothing", "everything", "keep"])
@pytest.mark.parametrize("several", [False, True])
def test_opcheck(backend: str, options: dict[str, Any], several: bool) -> None:
    if several and backend == "triton":
        pytest.skip("slow under the interpreter; nothing of it is the backend's")
    logits = seeded(ROWS, VOCABULARY, seed=2, dtype=torch.bfloat16)
    index = torch.arange(ROWS * 3).reshape(ROWS, 3) if several else torch.arange(ROWS)
    leaf = logits.clone().requires_grad_()
    bias = options["bias"]
    wanting = options | {"bias": None if bias is None else bias.clone().requires_grad_()}
    torch.library.opcheck(token_logprobs_forward, (leaf, index), wanting | ASKED)
    bare = options | {"entropy": False, "sum_squares": False, "top_k": 0, "inplace_backward": False}
    torch.library.opcheck(token_logprobs_forward, (logits, index), bare)
    logprobs, logsumexp, entropy, *_ = token_logprobs_forward(logits, index, **options, **ASKED)
    statistics = (logprobs.clone(), entropy.clone(), index, logsumexp, entropy)
    backward = options | {"bias_gradient": bias is not None}
    torch.library.opcheck(token_logprobs_backward, (logits, *statistics), backward)
    if options is not KEEP:
        torch.library.opcheck(token_logprobs_backward_, (logits.clone(), *statistics), backward)


@pytest.mark.parametrize("inplace", [False, True])
def test_one_compiled_graph_serves_any_number_of_rows(inplace: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden: Tensor, index: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
        options = {"temperature": temperature, "mask": mask, "entropy": True, "top_k": 2, "inplace_backward": inplace}
        result = token_logprobs(hidden * 2, index, **options)
        return (result.logprobs * 3 + result.entropy).sum() + result.logsumexp.sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for rows in range(3, 23):
        hidden = seeded(rows, VOCABULARY, seed=rows)
        rest = (torch.arange(rows), torch.arange(rows) % 4 != 0, torch.linspace(0.5, 2.0, rows))
        grads = []
        for function in (step, compiled):
            leaf = hidden.clone().requires_grad_()
            function(leaf, *rest).backward()
            grads.append(leaf.grad)
        assert torch.equal(grads[0], grads[1])
    assert counter.frame_count == 1


def test_what_the_forward_pass_keeps(backend: str) -> None:
    logits = seeded(16, 1000, seed=1, dtype=torch.bfloat16).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        token_logprobs(logits, torch.arange(16), entropy=True, sum_squares=True, mask=torch.ones(16, dtype=torch.bool))
    others = [one for one in kept if one.data_ptr() != logits.data_ptr()]
    assert len(others) < len(kept), "the logits themselves are kept"
    assert sum(one.untyped_storage().nbytes() for one in others) <= 16 * (8 + 4 + 4 + 1)


def test_inplace_backward_writes_over_the_logits(backend: str) -> None:
    hidden = seeded(6, 300, seed=1, dtype=torch.bfloat16).requires_grad_()
    index, upstream = torch.arange(6), seeded(6, seed=2)
    grads: list[Tensor] = []
    for inplace in (False, True):
        logits = hidden * 2
        logits.register_hook(grads.append)
        before = logits.detach().clone()
        result = token_logprobs(logits, index, entropy=True, inplace_backward=inplace)
        (result.logprobs * upstream + result.entropy).sum().backward()
        assert (grads[-1].data_ptr() == logits.data_ptr()) == inplace
        assert torch.equal(logits.detach(), before) != inplace
        grads.append(hidden.grad)
        hidden.grad = None
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])


@pytest.mark.parametrize("how", ["another op that needs the logits", "the same backward again"])
def test_what_needs_overwritten_logits_is_told(backend: str, how: str) -> None:
    logits = seeded(4, 9, seed=1).requires_grad_() * 1
    total = token_logprobs(logits, torch.arange(4), inplace_backward=True).logprobs.sum()
    if how == "another op that needs the logits":
        other = logits.square().sum()
        total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()
        return
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


class Launches:
    """Stands for a kernel: counts its launches."""

    def __init__(self, seen: list[str], name: str) -> None:
        self.seen, self.name = seen, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 1
        return lambda *arguments, **options: self.seen.append(self.name)


@pytest.mark.parametrize("rows", [16, 512])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("shape", ["[N]", "[N, 3]"])
@pytest.mark.parametrize("everything", [False, True])
def test_no_waiting_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, rows: int, keep: bool, shape: str, everything: bool
) -> None:
    """On tensors without memory: reading a value, for which the host would wait for a GPU, raises."""
    seen: list[str] = []
    names = ("statistics_kernel", "blocks_kernel", "merge_kernel", "gradient_kernel")
    monkeypatch.setattr(_sweeps_triton, "kernels", SimpleNamespace(**{name: Launches(seen, name) for name in names}))
    monkeypatch.setattr(_sweeps, "backend_of", lambda *tensors: "triton")
    monkeypatch.setattr("zs_kernels._token_logprobs_op.backend_of", lambda *tensors: "triton")

    def made(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    logits = made(rows, 20_000, dtype=torch.bfloat16)
    index = made(*((rows,) if shape == "[N]" else (rows, 3)), dtype=torch.int64)
    options = dict(NOTHING)
    if everything:
        options |= {"temperatures": made(rows), "softcap": 3.0, "bias": made(20_000)}
        options["mask"] = made(rows, dtype=torch.bool)
    if keep:
        options["keep_offsets"] = made(rows + 1, dtype=torch.int64)
        options["keep_ids"] = made(50 * rows, dtype=torch.int64)
    logprobs, logsumexp, entropy, *_ = token_logprobs_forward._init_fn(logits, index, **options, **ASKED)
    statistics = (logprobs, entropy, index, logsumexp, entropy)
    token_logprobs_backward._init_fn(logits, *statistics, **options, bias_gradient=everything)
    forward = (
        ["blocks_kernel", "merge_kernel"] if rows < _sweeps_triton.FEW_ROWS and not keep else ["statistics_kernel"]
    )
    assert seen[: len(forward)] == forward and set(seen[len(forward) :]) == {"gradient_kernel"}
