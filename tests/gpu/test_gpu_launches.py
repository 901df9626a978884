"""What the ops ask of the host: no waiting for the GPU, no compiling for a new length, few launches, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.small_calls import small_calls
from bench.usage import count_launches
from zs_kernels import gae

OPS = tuple(small_calls("cpu", 4))


@pytest.mark.parametrize("name", OPS)
def test_the_host_never_waits(name):
    run = small_calls("cuda", 96)[name]
    run()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", OPS)
def test_twenty_lengths_compile_nothing_new(name):
    from triton.runtime.jit import JITFunction

    for rows in range(96, 145):  # Triton keeps a variant for numbers that 16 divides: every mix of them once
        small_calls("cuda", rows)[name]()
    compiled = []
    compile_one = JITFunction._do_compile

    def count(self: JITFunction, *args: Any, **options: Any) -> Any:
        compiled.append(self.fn.__name__)
        return compile_one(self, *args, **options)

    runs = [small_calls("cuda", rows)[name] for rows in range(145, 185, 2)]
    JITFunction._do_compile = count
    try:
        for run in runs:
            run()
    finally:
        JITFunction._do_compile = compile_one
    assert not compiled


def test_gae_is_two_launches():
    rewards, values = torch.randn(2, 1024 * 512, device="cuda")
    mask = torch.rand(1024 * 512, device="cuda") < 0.5
    bounds = torch.arange(0, 1024 * 512 + 1, 512, device="cuda")
    for whiten in (False, True):
        gae(rewards, values, mask, bounds, whiten=whiten)
        with count_launches("cuda") as counted:
            gae(rewards, values, mask, bounds, whiten=whiten)
            torch.cuda.synchronize()
        assert counted.number is not None and counted.number <= 2


@pytest.mark.parametrize("name", ["gae", "group_advantages", "policy_loss", "token_logprobs"])
def test_a_cuda_graph_can_hold_it(name):
    run = small_calls("cuda", 96)[name]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    graph.replay()
    torch.cuda.synchronize()
    fresh = run()

    def tensors(result: Any) -> list[torch.Tensor]:
        return [one for one in result if isinstance(one, torch.Tensor)]

    for got, want in zip(tensors(held), tensors(fresh), strict=True):
        assert torch.equal(got, want)
