"""`zs-fast bench ops`: the operations against what one would write in plain torch.

An op is timed only if its own tests pass here and its variants agree on these inputs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, measure, summarise, table, write_results
from zs_fast.errors import PreflightError
from zs_kernels import linear_logprobs
from zs_kernels._device import native_status
from zs_kernels.gae import gae, gae_reference

ROOT = Path(__file__).resolve().parent.parent


def run_ops(*, quick: bool, run_tests_first: bool) -> dict[str, Any]:
    """Time every op, print the table, write the JSON file, and return its content.

    quick: few rounds and small shapes, to see that everything runs, and no file. Raises PreflightError for a red op.
    """
    if run_tests_first:
        refuse_red(["tests/ops"])
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    cases = [linear_logprobs_case(device, quick, gradient=gradient) for gradient in (False, True)]
    if device == "cpu":  # gae has no CUDA path yet: there it would time its one-token-at-a-time reference
        cases.insert(0, gae_case(quick))
    timings = [timing for case in cases for timing in measure(case, rounds=5 if quick else 21)]
    print(table(timings))
    if not native_status().available:
        print(f"note: {native_status().reason}")
    summary = summarise("ops", timings, device)
    if not quick:
        print(f"written to {write_results(summary).relative_to(ROOT)}")
    return summary


def refuse_red(paths: list[str]) -> None:
    """Run the ops' tests first: a fast wrong op is no result."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    if done.returncode != 0:
        tail = (done.stdout + done.stderr).strip().splitlines()
        raise PreflightError(
            f"bench: the tests of {' '.join(paths)} fail, so nothing is timed: {tail[-1] if tail else ''}"
        )


def gae_case(quick: bool) -> Case:
    """Masked GAE: the packed op against a loop over time on padded rows, and against its reference."""
    S, T = (16, 64) if quick else (256, 512)
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(S, T, generator=generator) for _ in range(2))
    mask = torch.rand(S, T, generator=generator) < 0.5
    cu_seqlens = torch.arange(0, S * T + 1, T)
    packed = (rewards.flatten(), values.flatten(), mask.flatten(), cu_seqlens)

    variants: dict[str, Callable[[], Any]] = {
        "padded torch loop": lambda: padded_gae(rewards, values, mask, gamma=0.99, lam=0.95),
        "zs_kernels.gae": lambda: gae(*packed, gamma=0.99, lam=0.95),
    }
    if quick:
        variants["reference"] = lambda: gae_reference(*packed, gamma=0.99, lam=0.95)
    torch.testing.assert_close(
        variants["zs_kernels.gae"]()[0], variants["padded torch loop"]()[0].flatten(), rtol=1e-4, atol=1e-4
    )
    return Case("masked gae", f"[{S} x {T}] fp32", variants)


def padded_gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The usual way: one step of the recurrence per time step for all rows, masked steps carried. [S, T] in and out."""
    next_value = last = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        candidate = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * last
        next_value = torch.where(here, values[:, t], next_value)
        last = torch.where(here, candidate, last)
        columns.append(torch.where(here, last, 0.0))
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, torch.where(mask, advantages + values, 0.0)


def linear_logprobs_case(device: str, quick: bool, *, gradient: bool) -> Case:
    """Log-probabilities of sampled tokens from hidden states: the op at loss tokens, the naive way at all."""
    N, H, V = (64, 64, 2048) if quick else (512, 576, 49_152)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, device=device).requires_grad_(gradient)
    weight = (torch.randn(V, H, generator=generator, device=device) / H**0.5).requires_grad_(gradient)
    index = torch.randint(V, (N,), generator=generator, device=device)
    mask = torch.rand(N, generator=generator, device=device) < 0.5

    def finish(logprobs: Tensor) -> Tensor:
        chosen = logprobs.masked_fill(~mask, 0.0)
        return torch.autograd.grad(chosen.sum(), hidden)[0] if gradient else chosen

    def naive() -> Tensor:
        return finish(torch.log_softmax(hidden @ weight.T, -1).gather(-1, index[:, None]).squeeze(-1))

    def ours() -> Tensor:
        return finish(linear_logprobs(hidden, weight, index, mask=mask).logprobs)

    torch.testing.assert_close(ours(), naive(), rtol=1e-3, atol=1e-4)
    name = "logprobs fwd+bwd" if gradient else "logprobs fwd"
    return Case(name, f"{N}x{H}x{V} fp32, 50%", {"naive, all tokens": naive, "linear_logprobs": ours}, device)
