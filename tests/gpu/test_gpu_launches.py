"""What the ops ask of the host: no waiting for the GPU, no compiling for a new length, few launches, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from zs_kernels import gae, group_advantages, kl_estimates, masked_whiten, policy_loss, token_logprobs
from zs_kernels._policy_terms import PolicyLossSettings
from zs_kernels.linear_kl import linear_kl
from zs_kernels.linear_logprobs import linear_logprobs
from zs_kernels.linear_policy_loss import linear_policy_loss
from zs_kernels.value_loss import value_loss

V, H = 5003, 128


def step(name: str, rows: int) -> Callable[[], Any]:
    """One op, forward and (where it has one) backward, on tensors that are there already."""
    if not torch.cuda.is_available():
        return lambda: None
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    index = torch.randint(V, (rows,), generator=generator, device="cuda")
    mask = torch.arange(rows, device="cuda") % 3 > 0
    count = int(mask.sum())
    one, two, three, four = (normal(rows) for _ in range(4))
    leaf, logits = normal(rows).requires_grad_(), normal(rows, V).bfloat16().requires_grad_()
    hidden, weight = normal(rows, H).bfloat16().requires_grad_(), normal(V, H).bfloat16().requires_grad_()
    other = normal(rows, H).bfloat16()
    bounds = torch.tensor([0, rows // 2, rows], device="cuda")
    groups = torch.arange(rows, device="cuda") // 4
    settings = PolicyLossSettings(entropy_coefficient=0.01)

    def log_probs() -> Any:
        found = token_logprobs(logits, index, mask=mask, entropy=True)
        return torch.autograd.grad(found.logprobs.sum() + found.entropy.sum(), logits)

    def head() -> Any:
        found = linear_logprobs(hidden, weight, index, mask=mask, mask_count=count, entropy=True)
        return torch.autograd.grad(found.logprobs.sum() + found.entropy.sum(), (hidden, weight))

    def fused() -> Any:
        found = linear_policy_loss(
            hidden, weight, index, one, two, three, settings=settings, mask=mask, mask_count=count
        )
        return torch.autograd.grad(found.loss, (hidden, weight))

    def kl() -> Any:
        return torch.autograd.grad(linear_kl(hidden, other, weight, weight.detach()).sum(), (hidden, weight))

    return {
        "token_logprobs": log_probs,
        "linear_logprobs": head,
        "linear_policy_loss": fused,
        "linear_kl": kl,
        "policy_loss": lambda: torch.autograd.grad(
            policy_loss(leaf, one, two, three, mask=mask, ref_logprobs=four, kl_coefficient=0.1).loss, leaf
        ),
        "gspo": lambda: policy_loss(leaf, one, two, three, form="gspo", cu_seqlens=bounds).loss,
        "value_loss": lambda: torch.autograd.grad(value_loss(leaf, one, two, three, mask=mask).loss, leaf),
        "gae": lambda: gae(one, two, mask, bounds, gamma=0.99, lam=0.95, whiten=True),
        "group_advantages": lambda: group_advantages(one, groups, rows // 4 + 1),
        "kl_estimates": lambda: kl_estimates(one, two, mask=mask),
        "masked_whiten": lambda: masked_whiten(one, mask),
    }[name]


OPS = (
    "token_logprobs", "linear_logprobs", "linear_policy_loss", "linear_kl", "policy_loss", "gspo", "value_loss", "gae",
    "group_advantages", "kl_estimates", "masked_whiten",
)  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_the_host_never_waits(name):
    run = step(name, 96)
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
        step(name, rows)()
    compiled = []
    compile_one = JITFunction._do_compile

    def count(self: JITFunction, *args: Any, **options: Any) -> Any:
        compiled.append(self.fn.__name__)
        return compile_one(self, *args, **options)

    runs = [step(name, rows) for rows in range(145, 185, 2)]
    JITFunction._do_compile = count
    try:
        for run in runs:
            run()
    finally:
        JITFunction._do_compile = compile_one
    assert not compiled


def test_gae_is_two_launches():
    from bench.usage import count_launches

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
    run = step(name, 96)
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
