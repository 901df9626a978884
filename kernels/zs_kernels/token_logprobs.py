"""Log-probability of chosen tokens under given logits, with entropy and other statistics of the same softmax.

    z[n, v]     = softcap * tanh(logits[n, v] / softcap) + bias[v]        (each part only when given)
    logsumexp_n = log sum_v exp(z[n, v] / temperature_n)
    logprob_n   = z[n, index_n] / temperature_n - logsumexp_n
    entropy_n   = - sum_v p log p,  sum_squares_n = sum_v p^2,  p = softmax of row n

N = rows (tokens), V = vocabulary. In nats; statistics and results are float32 (float64 for float64 logits) whatever the
type of the logits. Source: the definition of the softmax; entropy = logsumexp - sum_v p z.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_index, require_mask, require_positive
from zs_kernels._sweeps import Sweep, merge_partials, sweep_gradient, sweep_partials, sweep_statistics

__all__ = [
    "Sweep",
    "TokenLogprobs",
    "merge_partials",
    "sweep_gradient",
    "sweep_partials",
    "sweep_statistics",
    "token_logprobs",
]


class TokenLogprobs(NamedTuple):
    """Per-token results; a field that was not asked for is None."""

    logprobs: Tensor
    """[N] (or [N, K] for an index of that shape), at most 0."""
    entropy: Tensor | None = None
    """[N]"""
    logsumexp: Tensor | None = None
    """[N], at the temperature; no gradient flows through it."""
    sum_squares: Tensor | None = None
    """[N], no gradient flows through it."""
    top_k_logprobs: Tensor | None = None
    """[N, top_k], falling, no gradient flows through it."""
    top_k_ids: Tensor | None = None
    """[N, top_k] int64"""


def _keep_mask(keep: tuple[Tensor, Tensor], rows: int, vocabulary: int) -> Tensor:
    """[N, V] bool from a compressed-row keep set (offsets [N + 1], ids)."""
    offsets, ids = keep
    row = torch.repeat_interleave(torch.arange(rows, device=ids.device), offsets.diff(), output_size=ids.numel())
    kept = torch.zeros(rows, vocabulary, dtype=torch.bool, device=ids.device)
    kept[row, ids] = True
    return kept


def token_logprobs(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    sum_squares: bool = False,
    top_k: int = 0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
) -> TokenLogprobs:
    """Log-probabilities of `index` under `logits`, differentiable through `logprobs` and `entropy`.

    logits: [N, V] floating point, any strides. index: [N] or [N, K] int64/int32 in [0, V); ignored where masked.
    temperature: above 0, a number or [N]. mask: [N] bool; a False row gives 0 everywhere and gets gradient 0, even
    where its logits are NaN. bias: [V]. keep: (offsets [N + 1], ids) int64, the tokens each row may use; the softmax
    runs over them alone (as a top-k or top-p sampler's did). A logit of -inf has probability 0. A row with no finite
    logit has log-probability -inf, entropy 0 and gradient 0.
    Raises ValueError, TypeError or IndexError that names the argument.
    """
    op = "token_logprobs"
    require_floating(op, "logits", logits)
    require(logits.dim() == 2 and logits.shape[1] > 0, op, "logits", "of shape [N, V] with V above 0", logits)
    rows, vocabulary = logits.shape
    require_mask(op, "mask", mask, (rows,), logits.device)
    shape = (rows,) if index.dim() == 1 else (rows, index.shape[-1])
    require_index(op, "index", index, shape, vocabulary, device=logits.device, mask=mask)
    require_positive(op, "temperature", temperature, (rows,))
    require(0 <= top_k <= vocabulary, op, "top_k", f"between 0 and V = {vocabulary}", top_k)

    z = logits if logits.dtype == torch.float64 else logits.float()
    if mask is not None:
        z = torch.where(mask[:, None], z, 0.0)
        index = torch.where(mask if index.dim() == 1 else mask[:, None], index, 0)
    if softcap is not None:
        require_positive(op, "softcap", softcap)
        z = torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    if bias is not None:
        require_floating(op, "bias", bias, shape=(vocabulary,))
        z = z + bias
    if keep is not None:
        z = torch.where(_keep_mask(keep, rows, vocabulary), z, -torch.inf)
    z = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)

    alive = (z > -torch.inf).any(dim=-1)
    z = torch.where(alive[:, None], z, 0.0)  # a row without a finite logit must not turn the gradient into NaN
    logsumexp = torch.logsumexp(z, dim=-1)
    chosen = z.gather(-1, index.long() if index.dim() == 2 else index.long()[:, None])
    logprobs = chosen - logsumexp[:, None]
    logprobs = logprobs + (logprobs.clamp(max=0.0) - logprobs).detach()  # rounding may leave it a hair above 0
    logprobs = torch.where(alive[:, None], logprobs, -torch.inf)
    valid = torch.ones_like(alive) if mask is None else mask
    logprobs = torch.where(valid[:, None], logprobs, 0.0)

    entropy_N = sum_squares_N = top_logprobs = top_ids = None
    if entropy:
        p = torch.exp(z - logsumexp[:, None])
        entropy_N = logsumexp - (p * z.masked_fill(z == -torch.inf, 0.0)).sum(dim=-1)
        entropy_N = torch.where(valid & alive, entropy_N, 0.0)
    with torch.no_grad():
        if sum_squares:
            sum_squares_N = torch.exp(2.0 * (z - logsumexp[:, None])).sum(dim=-1)
            sum_squares_N = torch.where(valid & alive, sum_squares_N, 0.0)
        if top_k:
            top_logprobs, top_ids = torch.topk(z - logsumexp[:, None], top_k, dim=-1)
        result_logsumexp = torch.where(alive, logsumexp, -torch.inf)
        result_logsumexp = torch.where(valid, result_logsumexp, 0.0).detach()
    return TokenLogprobs(
        logprobs=logprobs.squeeze(-1) if index.dim() == 1 else logprobs,
        entropy=entropy_N,
        logsumexp=result_logsumexp,
        sum_squares=sum_squares_N,
        top_k_logprobs=top_logprobs,
        top_k_ids=top_ids,
    )
