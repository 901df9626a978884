"""Cases on an output head: from hidden states to a loss and the gradients of hidden states and weight.

All ways of a case read the same tensors: tokens drawn from the head's own distribution, old log-probabilities near the
present ones and some of them far off, so that clipping happens, and one advantage a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import zs_kernels
from bench.harness import Results
from zs_kernels import _wide_products
from zs_kernels._cuda import use_cuda

CHUNK = 256
SEQUENCES = 8
EXACT_ROWS = 128
"""Tokens, and rows of the weight, whose results are held against float64."""
EXACT_WEIGHT_TOKENS = 1024
"""With more tokens than this the weight's gradient is not computed in float64: it takes all of them."""

LogprobsOf = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, index) -> log-probabilities"""


@dataclass(frozen=True, slots=True)
class Head:
    """The tensors of a case. T tokens in SEQUENCES sequences of one length."""

    hidden: Tensor
    weight: Tensor
    index: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    """[SEQUENCES]"""
    mask: Tensor

    @property
    def token_advantages(self) -> Tensor:
        return self.advantages.repeat_interleave(self.index.numel() // SEQUENCES)

    @property
    def token_weights(self) -> Tensor:
        return self.mask.float() / self.mask.sum()

    @property
    def shape(self) -> str:
        kept = int(self.mask.sum())
        T, (V, H) = self.index.numel(), self.weight.shape
        share = "" if kept == T else f", {kept / T:.0%}"
        return f"{V}x{H} T={T}{share} {str(self.weight.dtype).removeprefix('torch.')}"


def make_head(device: str, T: int, H: int, V: int, *, masked: bool = False) -> Head:
    """bf16, logits of standard deviation 3; masked: 36 % of the tokens carry loss, in spans of 9 of every 25."""
    generator = torch.Generator(device).manual_seed(0)
    settings: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(T, H, dtype=torch.bfloat16, **settings).requires_grad_()
    weight = torch.randn(V, H, dtype=torch.bfloat16, **settings).mul_(3.0 / H**0.5).requires_grad_()
    index, logprobs = [], []
    with torch.no_grad():
        for rows in hidden.split(64):
            every = torch.log_softmax((rows @ weight.T).float(), -1)
            index.append(torch.multinomial(every.exp(), 1, generator=generator))
            logprobs.append(every.gather(1, index[-1]).squeeze(1))
    far = torch.rand(T, **settings) < 0.2
    noise = torch.randn(T, **settings).sign() * torch.where(far, 0.5, 0.05)
    mask = torch.arange(T, device=device) % 25 < 9 if masked else torch.ones(T, dtype=torch.bool, device=device)
    advantages = torch.randn(SEQUENCES, **settings)
    return Head(hidden, weight, torch.cat(index).squeeze(1), torch.cat(logprobs) + noise, advantages, mask)


def clipped_loss(head: Head, logprobs: Tensor) -> Tensor:
    """PPO's clipped loss as anyone writes it, from the log-probabilities of all tokens."""
    ratio = torch.exp(logprobs - head.old_logprobs)
    gain = head.token_advantages * ratio
    clipped = head.token_advantages * ratio.clamp(0.8, 1.2)
    return -(torch.minimum(gain, clipped) * head.token_weights).sum()


def gradients(head: Head, loss: Tensor, **results: Tensor) -> Results:
    """The results of a variant: what it computed, and the gradients of its loss."""
    grad_hidden, grad_weight = torch.autograd.grad(loss, (head.hidden, head.weight))
    return {name: value.detach() for name, value in results.items()} | {
        "grad_hidden": grad_hidden,
        "grad_weight": grad_weight,
    }


def with_torch_loss(head: Head, logprobs_of: LogprobsOf, rows: Tensor | None = None) -> Callable[[], Results]:
    """A variant from a way to compute log-probabilities, of all tokens or of some."""

    def run() -> Results:
        if rows is None:
            logprobs = logprobs_of(head.hidden, head.weight, head.index)
        else:
            some = logprobs_of(head.hidden[rows], head.weight, head.index[rows])
            logprobs = some.float().new_zeros(head.index.shape).index_put((rows,), some.float())
        logprobs = logprobs.float()
        return gradients(head, clipped_loss(head, logprobs), logprobs=logprobs)

    return run


def naive(hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Logits in float32, log_softmax, gather: the form of Hugging Face's losses."""
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, index[:, None]).squeeze(-1)


def naive_bf16(hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """The same in the type of the logits."""
    return torch.log_softmax(hidden @ weight.T, -1).gather(-1, index[:, None]).squeeze(-1)


def checkpointed(hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Chunks of tokens whose logits are computed again in the backward pass."""
    parts = zip(hidden.split(CHUNK), index.split(CHUNK), strict=True)
    return torch.cat([checkpoint(naive, rows, weight, ids, use_reentrant=False) for rows, ids in parts])


def three_products(head: Head) -> Callable[[], None]:
    """The matrix products that every way needs, of the tokens that carry loss, and nothing else."""
    hidden, weight = head.hidden.detach()[head.mask], head.weight.detach()

    def run() -> None:
        logits = hidden @ weight.T
        logits @ weight
        logits.T @ hidden

    return run


def three_wide_products(head: Head) -> Callable[[], None]:
    """The same by way of float32 copies of slices of the head, as our ops do it on some processors."""
    hidden, weight = head.hidden.detach()[head.mask], head.weight.detach()

    def run() -> None:
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
        _wide_products.multiply(hidden, weight, logits)
        _wide_products.multiply_gradient(
            logits, weight, hidden, grad_hidden=grad_hidden, add_to_weight=grad_weight.__setitem__
        )

    return run


def exact_results(head: Head) -> Results:
    """In float64: log-probabilities and gradients of the first rows, as far as the size allows."""
    weight, hidden = head.weight.detach().double(), head.hidden.detach().double()
    chosen, logsumexp, corner = [], [], []
    whole = hidden.shape[0] <= EXACT_WEIGHT_TOKENS
    first = hidden[:EXACT_ROWS] @ weight.T
    for rows, ids in zip(hidden.split(EXACT_ROWS), head.index.split(EXACT_ROWS), strict=True):
        logits = rows @ weight.T if chosen else first
        chosen.append(logits.gather(1, ids[:, None]).squeeze(1))
        logsumexp.append(torch.logsumexp(logits, 1))
        corner.append(logits[:, :EXACT_ROWS])
        if not whole:
            break
    logprobs = torch.cat(chosen) - torch.cat(logsumexp)
    tokens = logprobs.numel()
    leaf = torch.cat([logprobs, head.old_logprobs[tokens:].double()]).requires_grad_()
    slope = torch.autograd.grad(clipped_loss(head, leaf), leaf)[0][:tokens]
    grad_first = _grad_logits(first, logsumexp[0], head.index[:EXACT_ROWS], slope[:EXACT_ROWS])
    results = {"grad_hidden": grad_first @ weight}
    if bool(head.mask.all()):
        results["logprobs"] = logprobs[:EXACT_ROWS]
    if whole:
        grad_corner = _grad_logits(torch.cat(corner), torch.cat(logsumexp), head.index[:tokens], slope)
        results["grad_weight"] = grad_corner.T @ hidden
    return results


def _grad_logits(logits: Tensor, logsumexp: Tensor, index: Tensor, slope: Tensor) -> Tensor:
    """Gradient of the first columns' logits; an index past them stands in none of them."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    return slope[:, None] * ((index[:, None] == columns).double() - torch.exp(logits - logsumexp[:, None]))


def ours(head: Head, *, cuda: bool = False, **options: Any) -> Callable[[], Results]:
    """The fused op; cuda: with the CUDA kernel for rows where the Triton kernel is the rule."""
    masking = {} if bool(head.mask.all()) else {"mask": head.mask, "mask_count": int(head.mask.sum())}
    advantages, weights = head.token_advantages, head.token_weights

    def run() -> Results:
        with use_cuda(cuda):
            made = zs_kernels.linear_policy_loss(
                head.hidden, head.weight, head.index, head.old_logprobs, advantages, weights,
                settings=zs_kernels.PolicyLossSettings(), **masking, **options,
            )  # fmt: skip
        return gradients(head, made.loss, logprobs=made.logprobs)

    return run


def ours_in_two_steps(head: Head) -> Callable[[], Results]:
    """Log-probabilities first, any loss afterwards."""
    masking = {} if bool(head.mask.all()) else {"mask": head.mask, "mask_count": int(head.mask.sum())}
    advantages, weights = head.token_advantages, head.token_weights

    def run() -> Results:
        logprobs = zs_kernels.linear_logprobs(head.hidden, head.weight, head.index, **masking).logprobs
        loss = zs_kernels.policy_loss(logprobs, head.old_logprobs, advantages, weights).loss
        return gradients(head, loss, logprobs=logprobs)

    return run


def liger_grpo(head: Head, liger: Any) -> Callable[[], Results]:
    """Liger's fused linear GRPO loss, whose batch has a row for each sequence."""
    loss_of = liger(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo")

    def run() -> Results:
        def by_sequence(values: Tensor) -> Tensor:
            return values.reshape(SEQUENCES, -1, *values.shape[1:])

        loss = loss_of(
            by_sequence(head.hidden), head.weight, by_sequence(head.index), by_sequence(head.mask.float()),
            head.advantages, old_per_token_logps=by_sequence(head.old_logprobs),
        )[0]  # fmt: skip
        return gradients(head, loss)

    return run


def trl_chunked(function: Any) -> LogprobsOf:
    """TRL's head in tiles of 4096 tokens x 32768 words."""

    def logprobs_of(hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        return function.apply(hidden, weight, None, index, 1.0, 32_768, None, 1.0, ())[0]

    return logprobs_of


def liger_scaled(function: Any) -> LogprobsOf:
    """Liger's fused linear scaled cross-entropy (per-token results)."""

    def logprobs_of(hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        return -function.apply(hidden, weight, index, 1.0, -100, 1, False)

    return logprobs_of


def compiled(head: Head) -> Callable[[], Results]:
    """torch.compile of the naive loss, compiled before it is timed."""
    loss_of = torch.compile(lambda h, w, i: clipped_loss(head, naive(h, w, i)), dynamic=False)

    def run() -> Results:
        return gradients(head, loss_of(head.hidden, head.weight, head.index))

    run()
    return run
