"""Every op once, forward and backward, at a small odd size with real data: for what is too slow at full size.

compute-sanitizer --tool memcheck python -m bench.small_calls
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import zs_kernels
from zs_kernels import _cuda
from zs_kernels._policy_terms import PolicyLossSettings

V, H = 1003, 48
LENGTHS = (1, 2, 33, 96)

Call = Callable[[], Any]


def small_calls(device: str, rows: int) -> dict[str, Call]:
    """The ops by name, on tensors that are there already; an op that has a gradient computes it."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    index = torch.randint(V, (rows,), generator=generator, device=device)
    mask = torch.arange(rows, device=device) % 3 < 2
    masking = {"mask": mask, "mask_count": int(mask.sum())}
    one, two, three, four = (normal(rows) for _ in range(4))
    leaf, logits = normal(rows).requires_grad_(), normal(rows, V).bfloat16().requires_grad_()
    hidden, weight = normal(rows, H).bfloat16().requires_grad_(), normal(V, H).bfloat16().requires_grad_()
    other, bias = normal(rows, H).bfloat16(), normal(V)
    bounds = torch.tensor([0, rows // 2, rows], device=device)
    groups = torch.arange(rows, device=device) // 4

    def gradient(loss: Tensor, *leaves: Tensor) -> Any:
        return torch.autograd.grad(loss, leaves)

    def log_probs(**options: Any) -> Any:
        found = zs_kernels.token_logprobs(logits, index, entropy=True, **options)
        return gradient(found.logprobs.sum() + found.entropy.sum(), logits)

    def head(**options: Any) -> Any:
        found = zs_kernels.linear_logprobs(hidden, weight, index, entropy=True, **options)
        return gradient(found.logprobs.sum() + found.entropy.sum(), hidden, weight)

    def fused(**options: Any) -> Any:
        settings = PolicyLossSettings(entropy_coefficient=0.01)
        given = (hidden, weight, index, one, two, three)
        return gradient(zs_kernels.linear_policy_loss(*given, settings=settings, **options).loss, hidden, weight)

    def loss(**options: Any) -> Any:
        return gradient(zs_kernels.policy_loss(leaf, one, two, three, **options).loss, leaf)

    return {
        "token_logprobs": log_probs,
        "token_logprobs transformed": lambda: log_probs(
            temperature=one.abs() + 0.5, mask=mask, softcap=20.0, bias=bias, sum_squares=True
        ),
        "linear_logprobs": lambda: head(**masking),
        "linear_logprobs exact": lambda: head(exact=True),
        "linear_policy_loss": lambda: fused(**masking),
        "linear_policy_loss in chunks": lambda: fused(workspace_bytes=16 * V * 2),
        "linear_kl": lambda: gradient(
            zs_kernels.linear_kl(hidden, other, weight, weight.detach()).sum(), hidden, weight
        ),
        "policy_loss": lambda: loss(mask=mask, ref_logprobs=four, kl_coefficient=0.1, dual_clip=3.0),
        "gspo": lambda: loss(form="gspo", cu_seqlens=bounds),
        "value_loss": lambda: gradient(zs_kernels.value_loss(leaf, one, two, three, mask=mask).loss, leaf),
        "gae": lambda: zs_kernels.gae(one, two, mask, bounds, gamma=0.99, lam=0.95, whiten=True),
        "group_advantages": lambda: zs_kernels.group_advantages(one, groups, rows // 4 + 1),
        "kl_estimates": lambda: zs_kernels.kl_estimates(one, two, mask=mask),
        "masked_whiten": lambda: zs_kernels.masked_whiten(one, mask),
        "loss_weights": lambda: zs_kernels.loss_weights(mask, bounds, "token-mean"),
    }


def cuda_rows(rows: int) -> None:
    """The CUDA kernel, by as many blocks a row as there can be."""
    columns = 1000
    logits = torch.randn(rows, columns, device="cuda").bfloat16()
    index = torch.randint(columns, (rows,), device="cuda")
    old, advantages, weights = torch.randn(3, rows, device="cuda").unbind()
    for blocks in (1, 2, 4, 8):
        out = torch.empty_like(logits)
        settings = PolicyLossSettings(entropy_coefficient=0.01)
        _cuda.policy_rows(logits, out, index, 1.0, old, advantages, weights, None, None, None, settings, blocks=blocks)


def main(device: str = "cuda") -> int:
    """All of them on the GPU; on the CPU to see that they run."""
    if device == "cuda" and not torch.cuda.is_available():
        print("bench.small_calls: no CUDA device here", file=sys.stderr)
        return 1
    for rows in LENGTHS:
        for name, call in small_calls(device, rows).items():
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            print(f"{name}, {rows} rows", flush=True)
        if device == "cuda" and _cuda.cuda_status().available and torch.cuda.get_device_capability() >= (9, 0):
            cuda_rows(rows)
            torch.cuda.synchronize()
            print(f"CUDA rows, {rows} rows", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
