"""A head whose vocabulary lies in two processes gives what the whole head gives in one."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from zs_kernels import linear_logprobs, linear_policy_loss
from zs_kernels.policy_loss import PolicyLossSettings
from zs_kernels.testing import seeded

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")

BOUNDS = (0, 20, 33)  # shards of unequal size
ROWS, SIZE = 9, 6
TOLERANCE = {torch.float64: (1e-9, 1e-10), torch.float32: (1e-4, 1e-5), torch.bfloat16: (0.02, 0.02)}


def compare(found: Tensor, expected: Tensor) -> None:
    rtol, atol = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol * max(1.0, float(expected.abs().max())))


def operands(dtype: torch.dtype) -> dict[str, Tensor]:
    made = {"hidden": seeded(ROWS, SIZE, seed=1), "weight": seeded(33, SIZE, seed=2), "bias": seeded(33, seed=3)}
    made |= {"a": seeded(2, SIZE, seed=4), "b": seeded(33, 2, seed=5)}
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


def check(call: Any, dtype: torch.dtype, rank: int, lora: bool, **options: Any) -> None:
    """Results and gradients of this process's shard against those of the whole."""
    shard = slice(BOUNDS[rank], BOUNDS[rank + 1])
    results, gradients = [], []
    for sharded in (False, True):
        given = operands(dtype)
        part = shard if sharded else slice(None)
        where = {"process_group": distributed.group.WORLD, "vocabulary_start": shard.start} if sharded else {}
        adapter = {"lora": (given["a"], given["b"][part], 0.5)} if lora else {}
        result, loss = call(given["hidden"], given["weight"][part], given["bias"][part], **adapter, **where, **options)
        loss.backward()
        results.append(result)
        found = {name: leaf.grad for name, leaf in given.items() if leaf.grad is not None}
        gradients.append({name: g if name in ("hidden", "a") else g[shard] for name, g in found.items()})
    for one, other in zip(*results, strict=True):
        compare(other, one)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        compare(gradients[1][name], gradient)


def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> tuple[list[Tensor], Tensor]:
    index = torch.arange(ROWS) * 4 % 33
    mask, heat = torch.arange(ROWS) != 2, seeded(ROWS, seed=8).abs() + 0.5
    result = linear_logprobs(
        hidden, weight, index, bias=bias, temperature=heat, mask=mask, entropy=True, sum_squares=True, **options
    )
    loss = (result.logprobs * seeded(ROWS, seed=6) + result.entropy * seeded(ROWS, seed=7)).sum()
    return [x.detach() for x in (result.logprobs, result.entropy, result.logsumexp, result.sum_squares)], loss


def loss(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> tuple[list[Tensor], Tensor]:
    tokens = (seeded(ROWS, seed=6) - 4.0, seeded(ROWS, seed=7), seeded(ROWS, seed=8).abs())
    settings = PolicyLossSettings(form="cispo", entropy_coefficient=0.1)
    index = torch.arange(ROWS) * 4 % 33
    result = linear_policy_loss(hidden, weight, index, *tokens, bias=bias, settings=settings, **options)
    return [x.detach() for x in result], result.loss * 0.5


def refusals(rank: int) -> None:
    given, index = operands(torch.float32), torch.zeros(ROWS, dtype=torch.int64)
    group = {"process_group": distributed.group.WORLD}
    with pytest.raises(ValueError, match=r"'vocabulary_start'.*cover"):
        linear_logprobs(given["hidden"], given["weight"][:10], index, vocabulary_start=rank * 11, **group)
    with pytest.raises(ValueError, match=r"'hidden'.*same rows"):
        rows = slice(0, 3 + rank)
        linear_logprobs(given["hidden"][rows], given["weight"][:10], index[rows], vocabulary_start=rank * 10, **group)
    with pytest.raises(IndexError, match=r"\[0, 20\)"):
        linear_logprobs(given["hidden"], given["weight"][:10], index + 20, vocabulary_start=rank * 10, **group)


def work(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for dtype in TOLERANCE:
        for call in (logprobs, loss):
            for lora in (False, True):
                check(call, dtype, rank, lora)
            check(call, dtype, rank, False, workspace_bytes=4 * 20 * dtype.itemsize)
    check(logprobs, torch.bfloat16, rank, False, exact=True)
    check(logprobs, torch.float32, rank, False, logits_bytes=0)
    refusals(rank)
    gc.collect()  # what an error's traceback still holds of the group would outlive it, threads and all
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_processes_with_unequal_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(work, args=(str(tmp_path / "meeting"),), nprocs=2)
