"""Log-probability of chosen tokens under given logits, with entropy and other statistics of the same softmax.

    z[n, v]     = softcap * tanh(logits[n, v] / softcap) + bias[v]        (each part only when given)
    logsumexp_n = log sum_v exp(z[n, v] / temperature_n)
    logprob_n   = z[n, index_n] / temperature_n - logsumexp_n
    entropy_n   = - sum_v p log p,  sum_squares_n = sum_v p^2,  p = softmax of row n

N = rows (tokens), V = vocabulary. In nats; statistics and results are float32 (float64 for float64 logits) whatever the
type of the logits. Source: the definition of the softmax; entropy = logsumexp - sum_v p z.

    dlogits = (g (1[v = index] - p) - h p (log p + entropy)) / temperature * (1 - tanh(logits / softcap)^2)

g, h = upstream gradients of log-prob and entropy. One read of the logits forward, one read and one write backward; of
the forward pass only the logits themselves and [N] statistics are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import (
    require,
    require_floating,
    require_integers,
    require_mask,
    require_number,
    require_positive,
    require_tensor,
)
from zs_kernels._sweeps import Sweep, merge_partials, sweep_gradient, sweep_partials, sweep_statistics
from zs_kernels._token_logprobs_op import Rows, token_logprobs_forward

__all__ = [
    "Sweep",
    "TokenLogprobs",
    "merge_partials",
    "sweep_gradient",
    "sweep_partials",
    "sweep_statistics",
    "token_logprobs",
    "token_logprobs_reference",
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


def token_logprobs_reference(
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
    """What the op means, in plain torch with torch's own autograd. Every faster path answers to it."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if mask is not None:
        z = torch.where(mask[:, None], z, 0.0)
        index = torch.where(mask if index.dim() == 1 else mask[:, None], index, 0)
    z = torch.where(z == -torch.inf, -torch.inf, z)  # no gradient to what cannot be
    if softcap is not None:
        z = torch.where(z == -torch.inf, -torch.inf, softcap * torch.tanh(z / softcap))
    if bias is not None:
        z = z + bias
    if keep is not None:
        kept = Rows(1.0, keep=keep).dense_keep(logits.shape[1])
        assert kept is not None
        z = torch.where(kept, z, -torch.inf)
    z = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)

    alive = (z != -torch.inf).any(dim=-1)
    z = torch.where(alive[:, None], z, 0.0)  # a row without a finite logit must not turn the gradient into NaN
    logsumexp = torch.logsumexp(z, dim=-1)
    chosen = z.gather(-1, index.long() if index.dim() == 2 else index.long()[:, None])
    logprobs = chosen - logsumexp[:, None]
    logprobs = logprobs + (logprobs.clamp(max=0.0) - logprobs).detach()  # rounding may leave it a hair above 0
    logprobs = torch.where(alive[:, None], torch.where(chosen == -torch.inf, -torch.inf, logprobs), -torch.inf)
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
            top_logprobs = torch.where(alive[:, None], top_logprobs.clamp(max=0.0), -torch.inf)
            top_logprobs = torch.where(valid[:, None], top_logprobs, 0.0)
            top_ids = torch.where(valid[:, None], top_ids, 0)
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
    inplace_backward: bool = False,
) -> TokenLogprobs:
    """Log-probabilities of `index` under `logits`, differentiable through `logprobs` and `entropy`, once.

    logits: [N, V] floating point, any strides. index: [N] or [N, K] int64/int32 in [0, V); ignored where masked.
    temperature: above 0, a number or [N]. mask: [N] bool; a False row gives 0 everywhere and gets gradient 0, even
    where its logits are NaN; it is not read. bias: [V]; gets a gradient, too. keep: (offsets [N + 1], ids) int64, the
    tokens each row may use, each once; the softmax runs over them alone (as a top-k or top-p sampler's did), and no
    other logit is read. A logit of -inf has probability 0 and gradient 0. A row with no finite logit has
    log-probability -inf, entropy 0 and gradient 0.
    inplace_backward: the backward pass writes the gradient over the logits, which saves a tensor of their size.
    Nothing else may need the logits after it: autograd raises RuntimeError where it sees such a use, and a leaf's
    values are gone. Raises ValueError, TypeError or IndexError that names the argument.
    """
    _check(logits, index, temperature, mask, top_k, softcap, bias, keep, inplace_backward)
    temperatures = temperature if isinstance(temperature, Tensor) else None
    offsets, ids = (None, None) if keep is None else keep
    logprobs, logsumexp, entropy_N, squares, top_logprobs, top_ids = token_logprobs_forward(
        logits,
        index,
        temperatures,
        1.0 if temperatures is not None else float(temperature),
        mask,
        bias,
        offsets,
        ids,
        float(softcap or 0.0),
        entropy,
        sum_squares,
        top_k,
        inplace_backward,
    )
    return TokenLogprobs(
        logprobs=logprobs,
        entropy=entropy_N if entropy else None,
        logsumexp=logsumexp,
        sum_squares=squares if sum_squares else None,
        top_k_logprobs=top_logprobs if top_k else None,
        top_k_ids=top_ids if top_k else None,
    )


def _check(
    logits: Tensor,
    index: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    top_k: int,
    softcap: float | None,
    bias: Tensor | None,
    keep: tuple[Tensor, Tensor] | None,
    inplace_backward: bool,
) -> None:
    """All but the values of index tensors, which the operator reads. Sizes are written out in errors alone: a message
    made in vain would tie a compiled graph to them."""
    op = "token_logprobs"
    require_floating(op, "logits", logits)
    require(logits.dim() == 2 and logits.shape[1] > 0, op, "logits", "of shape [N, V] with V above 0", logits)
    rows, vocabulary = logits.shape
    device = logits.device
    require_mask(op, "mask", mask, (rows,), device)
    require_tensor(op, "index", index)
    require_integers(op, "index", index, (rows, *index.shape[1:2]), device=device)
    require_positive(op, "temperature", temperature, (rows,))
    if isinstance(temperature, Tensor):
        good = temperature.device == device and not temperature.requires_grad
        require(good, op, "temperature", f"on {device} and without a gradient", temperature)
    require_number(op, "top_k", top_k, low=0, high=vocabulary, integer=True)
    if softcap is not None:
        require_positive(op, "softcap", softcap)
    if bias is not None:
        require_floating(op, "bias", bias, shape=(vocabulary,))
        require(bias.device == device, op, "bias", f"on {device} like logits", bias)
    if keep is not None:
        good = isinstance(keep, tuple) and len(keep) == 2 and all(isinstance(part, Tensor) for part in keep)
        require(good, op, "keep", "a pair of tensors: offsets [N + 1] and ids", keep)
        require_integers(op, "keep", keep[0], (rows + 1,), device=device)
        require_integers(op, "keep", keep[1], (keep[1].numel(),), device=device)
    if inplace_backward:
        require(keep is None, op, "inplace_backward", "False with a keep set", inplace_backward)
        apart = rows < 2 or (logits.stride(0) >= vocabulary and logits.stride(1) == 1)
        require(apart, op, "logits", "of rows that lie apart, each in one piece, for inplace_backward", logits)
