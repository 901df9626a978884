"""Token log-probabilities straight from hidden states and the output head, without a [tokens, vocabulary] tensor.

    logits  = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature      (bias, softcap only when given)
    logprob = logits[n, index_n] - logsumexp_n,    entropy = logsumexp - sum_v p logits

    dlogits[n, v] = g_n (1[v = index_n] - p[n, v]) - h_n p[n, v] (log p[n, v] + entropy_n)

g, h = upstream gradients of log-prob and entropy. N = rows (tokens), H = hidden size, V = vocabulary; sums, statistics
and results in float32 (float64 for float64 inputs), in nats. Rows are worked off in chunks whose logits fit in
`workspace_bytes`; the backward pass computes each chunk's logits again (or, where all rows fit in one chunk, reuses the
one that the forward pass has made, so that at no time more than one chunk exists).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zs_kernels._check import require, require_floating, require_index, require_mask, require_positive
from zs_kernels.token_logprobs import TokenLogprobs, token_logprobs

CPU_CHUNK_ROWS = 256
"""A CPU runs chunks of 128 to 256 rows fastest: enough for the matrix products, few enough to stay in the caches."""
DEFAULT_WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Most memory of one chunk, unless the caller says otherwise."""


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: bool = False,
) -> TokenLogprobs:
    """What the op means: all logits at once, autograd for the rest. Every faster path answers to it."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return token_logprobs(logits, index, temperature=temperature, mask=mask, entropy=entropy, softcap=softcap)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class _Head:
    """What turns a chunk of hidden states into log-probabilities over the vocabulary."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float | Tensor
    """1 / temperature: a number or [N]."""

    def log_softmax(self, hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """(log-probabilities [M, V], derivative of the softcap or None) of one chunk, in the statistics' type."""
        logits = torch.mm(hidden, self.weight.T).to(_statistics_dtype(hidden.dtype))
        if self.bias is not None:
            logits += self.bias
        slope = None
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            slope = 1.0 - logits * logits
            logits.mul_(self.softcap)
        if isinstance(self.scale, Tensor):
            logits *= self.scale[rows, None]
        elif self.scale != 1.0:
            logits *= self.scale
        return torch.log_softmax(logits, dim=1), slope


def _entropy_terms(logprobs: Tensor, probabilities: Tensor) -> Tensor:
    """Sum of p log p per row, where a probability of 0 adds 0."""
    bounded = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)  # 0 * finite instead of 0 * -inf
    return (probabilities * bounded).sum(dim=1)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        scale: float | Tensor,
        softcap: float | None,
        entropy: bool,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        rows, dtype = hidden.shape[0], _statistics_dtype(hidden.dtype)
        head = _Head(weight, bias, softcap, scale)
        chosen = torch.empty(rows, dtype=dtype, device=hidden.device)
        entropies = torch.zeros_like(chosen)
        kept: tuple[Tensor | None, Tensor | None] = (None, None)
        for start in range(0, rows, chunk_rows):
            here = slice(start, start + chunk_rows)
            logprobs, slope = head.log_softmax(hidden[here], here)
            chosen[here] = logprobs.gather(1, index[here, None]).squeeze(1)
            if entropy:
                entropies[here] = -_entropy_terms(logprobs, torch.exp(logprobs))
            if rows <= chunk_rows and any(ctx.needs_input_grad[:3]):
                kept = (logprobs, slope)
        ctx.save_for_backward(hidden, weight, bias, index, entropies, *kept)
        ctx.scale, ctx.softcap, ctx.chunk_rows = scale, softcap, chunk_rows
        ctx.set_materialize_grads(False)
        return chosen, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, index, entropies, kept, kept_slope = ctx.saved_tensors
        head = _Head(weight, bias, ctx.softcap, ctx.scale)
        rows, dtype = hidden.shape[0], _statistics_dtype(hidden.dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if need_bias else None
        for start in range(0, rows, ctx.chunk_rows):
            here = slice(start, start + ctx.chunk_rows)
            logprobs, slope = head.log_softmax(hidden[here], here) if kept is None else (kept, kept_slope)
            grad = _grad_logits(
                logprobs,
                index[here],
                None if grad_logprobs is None else grad_logprobs[here],
                None if grad_entropy is None else grad_entropy[here],
                entropies[here],
            )
            if isinstance(ctx.scale, Tensor):
                grad *= ctx.scale[here, None]
            elif ctx.scale != 1.0:
                grad *= ctx.scale
            if slope is not None:
                grad *= slope
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[here])
            if grad_weight is not None:
                if grad_weight.dtype == hidden.dtype:
                    grad_weight.addmm_(grad.T, hidden[here])
                else:
                    grad_weight += grad.T @ hidden[here]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 5,
        )


def _grad_logits(
    logprobs: Tensor, index: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, entropies: Tensor
) -> Tensor:
    """Gradient of one chunk's logits [M, V] from the upstream gradients [M] of log-prob and entropy (None is 0)."""
    grad = torch.exp(logprobs)
    factor = torch.zeros_like(entropies) if grad_logprobs is None else -grad_logprobs
    if grad_entropy is None:
        grad *= factor[:, None]
    else:
        bounded = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)  # p = 0 then gives 0, not 0 * inf
        grad *= factor[:, None] - grad_entropy[:, None] * (bounded + entropies[:, None])
    if grad_logprobs is not None:
        grad.scatter_add_(1, index[:, None], grad_logprobs[:, None])
    return grad


def _chunk_rows(hidden: Tensor, vocabulary: int, workspace_bytes: int | None) -> int:
    """Rows of a chunk whose logits, with two temporaries of their size, fit in the workspace."""
    row_bytes = 3 * vocabulary * torch.finfo(_statistics_dtype(hidden.dtype)).bits // 8
    if workspace_bytes is not None:
        return max(1, workspace_bytes // row_bytes)
    kind = hidden.device.type
    rows = max(1, DEFAULT_WORKSPACE_BYTES.get(kind, DEFAULT_WORKSPACE_BYTES["cuda"]) // row_bytes)
    return min(rows, CPU_CHUNK_ROWS) if kind == "cpu" else rows


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: bool = False,
    exact: bool = False,
    workspace_bytes: int | None = None,
) -> TokenLogprobs:
    """`logprobs` [N] (and `entropy` [N] when asked) of `index` under softmax(head(hidden) / temperature).

    hidden: [N, H] floating point. weight: [V, H], bias: [V], of the same type. index: [N] int64/int32 in [0, V),
    ignored where masked. temperature: above 0, a number or [N]. mask: [N] bool; a False row costs nothing, gives 0 and
    gets gradient 0 even where its hidden state is NaN. exact: run the head in float32 for bfloat16 or float16 inputs,
    so that no rounding stands between the products and the softmax (costs a float32 copy of the head).
    workspace_bytes: bound of one chunk's logits and the two temporaries of its size; a chunk has at least one row.
    Gradients flow to hidden, weight and bias, once (no second derivative). Raises ValueError, TypeError or IndexError
    that names the argument.
    """
    op = "linear_logprobs"
    require_floating(op, "hidden", hidden)
    require(hidden.dim() == 2, op, "hidden", "of shape [N, H]", hidden)
    rows, size = hidden.shape
    require_floating(op, "weight", weight)
    good = weight.dim() == 2 and weight.shape[1] == size and weight.shape[0] > 0
    good = good and weight.dtype == hidden.dtype and weight.device == hidden.device
    require(good, op, "weight", f"of shape [V, {size}], {hidden.dtype}, on {hidden.device} like 'hidden'", weight)
    vocabulary = weight.shape[0]
    if bias is not None:
        require_floating(op, "bias", bias, shape=(vocabulary,))
    require_mask(op, "mask", mask, (rows,), hidden.device)
    require_index(op, "index", index, (rows,), vocabulary, device=hidden.device, mask=mask)
    require_positive(op, "temperature", temperature, (rows,))
    if softcap is not None:
        require_positive(op, "softcap", softcap)
    if workspace_bytes is not None:
        require_positive(op, "workspace_bytes", workspace_bytes)

    index = index.long()
    scale = temperature.reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature
    chosen_rows = None
    if mask is not None:
        chosen_rows = mask.nonzero().squeeze(1)
        hidden, index = hidden.index_select(0, chosen_rows), index.index_select(0, chosen_rows)
        scale = scale.index_select(0, chosen_rows) if isinstance(scale, Tensor) else scale
    if exact:
        dtype = _statistics_dtype(hidden.dtype)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    chunk_rows = _chunk_rows(hidden, vocabulary, workspace_bytes)
    arguments = (hidden, weight, bias, index, scale, softcap, entropy, chunk_rows)
    logprobs, entropies = _LinearLogprobs.apply(*arguments)  # type: ignore[no-untyped-call]
    if chosen_rows is not None:
        logprobs = logprobs.new_zeros(rows).index_put((chosen_rows,), logprobs)
        entropies = entropies.new_zeros(rows).index_put((chosen_rows,), entropies)
    return TokenLogprobs(logprobs=logprobs, entropy=entropies if entropy else None)
