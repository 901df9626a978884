"""One chunk of logits swept row by row: softmax statistics, their gradient, and both over shards of the vocabulary.

    z[m, v]     = (softcap * tanh(logits[m, v] / softcap) + bias[v]) / temperature_m     (each part only when given;
                  bias_first: softcap * tanh((logits + bias) / softcap))
    logsumexp_m = log sum_v exp(z[m, v]),  logprob_m = z[m, index_m] - logsumexp_m,  p = exp(z - logsumexp)
    entropy_m   = - sum_v p log p,  sum_squares_m = sum_v p^2
    dlogits     = (g (1[v = index] - p) - h p (log p + entropy)) / temperature * dz/dlogits

M = rows of the chunk, V = its columns; g, h = upstream gradients of log-prob and entropy. Any floating type of logits
comes in (only the last dimension is made contiguous), statistics are float32 (float64 for float64 logits), in nats.
A logit of -inf has probability 0 and gradient 0, a row of nothing else log-probability and logsumexp -inf and entropy
0; a masked row has 0 everywhere and is not read. Plain functions without autograd: they choose the backend, the caller
has checked the arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zs_kernels import _sweeps_triton
from zs_kernels._device import backend_of
from zs_kernels._sweeps_triton import apart


class Sweep(NamedTuple):
    """Statistics of M rows; what was not asked for has shape [0]."""

    logprobs: Tensor
    """[M], at most 0; NaN where the index is outside [0, V)."""
    logsumexp: Tensor
    """[M]"""
    entropy: Tensor
    """[M] or [0]"""
    sum_squares: Tensor
    """[M] or [0]"""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which logits of `dtype` are summed and results given."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sweep_statistics(
    logits: Tensor,
    index: Tensor,
    inverse_temperature: float | Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: bool,
    sum_squares: bool = False,
    bias_first: bool = False,
    keep: tuple[Tensor, Tensor] | None = None,
) -> Sweep:
    """Statistics of the rows of `logits` [M, V] in one read.

    index: [M] int64. inverse_temperature: 1 / temperature, a number or [M]. bias: [V]. mask: [M] bool. keep (on the
    Triton backend alone): (offsets [M + 1], ids) int64, the columns that each row's softmax runs over.
    """
    backend = backend_of(logits)
    given = (logits, index, inverse_temperature, bias, softcap, mask)
    if backend == "triton":
        return Sweep(*_sweeps_triton.statistics_triton(*given, entropy, sum_squares, bias_first, keep))
    if keep is not None:
        raise NotImplementedError("sweep_statistics: argument 'keep' is for the triton backend")
    if backend == "native":
        return _statistics_native(*given, entropy, sum_squares, bias_first)
    return _statistics_reference(*given, entropy, sum_squares, bias_first)


def sweep_gradient(
    logits: Tensor,
    index: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor | None,
    inverse_temperature: float | Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    out: Tensor,
    bias_first: bool = False,
    keep: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write the gradient of the raw logits into `out` [M, V], which may be `logits` itself, in one read and write.

    index: [M] int64; outside [0, V) (the token is in another shard, or none is meant) no column is the chosen one.
    grad_logprobs, grad_entropy: upstream, [M]; logsumexp, entropy: of the whole row, [M]. With `keep` only the kept
    columns of `out` are written, and `out` must not be `logits`.
    """
    backend = backend_of(logits)
    given = (logits, index, grad_logprobs, grad_entropy, logsumexp, entropy, inverse_temperature, bias, softcap, mask)
    if backend == "triton":
        return _sweeps_triton.gradient_triton(*given, out, bias_first, keep)
    if keep is not None:
        raise NotImplementedError("sweep_gradient: argument 'keep' is for the triton backend")
    if backend == "native":
        return _gradient_native(*given, out, bias_first)
    return _gradient_reference(*given, out, bias_first)


def sweep_partials(
    logits: Tensor,
    index: Tensor,
    inverse_temperature: float | Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    bias_first: bool = False,
) -> Tensor:
    """[M, 5] from one shard [M, Vs] of the vocabulary: max z, sum e, sum e z, sum e^2 with e = exp(z - max z), and
    the chosen z. index: [M] int64 relative to the shard; outside [0, Vs) the chosen z is 0. A -inf z adds 0."""
    backend = backend_of(logits)
    given = (logits, index, inverse_temperature, bias, softcap, bias_first)
    if backend == "triton":
        return _sweeps_triton.partials_triton(*given)
    if backend == "native":
        return _partials_native(*given)
    return _partials_reference(*given)


def merge_partials(stacked: Tensor) -> Sweep:
    """The statistics of whole rows from what each of R shards gave, [R, M, 5], added up in the order of the shards."""
    top = stacked[..., 0].amax(dim=0)
    top = torch.where(top == -torch.inf, 0.0, top)
    s = t = q = chosen = torch.zeros_like(top)
    for shard in stacked:
        factor = torch.exp(shard[:, 0] - top)
        # relative to the merged maximum: sum e (z - top)
        t = t + factor * (shard[:, 2] - top * shard[:, 1])
        s = s + factor * shard[:, 1]
        q = q + factor.square() * shard[:, 3]
        chosen = chosen + shard[:, 4]
    alive = s != 0
    some = torch.where(alive, s, 1.0)
    logprobs = torch.where(alive, (chosen - top - some.log()).clamp(max=0.0), -torch.inf)
    logsumexp = torch.where(alive, top + some.log(), -torch.inf)
    entropy = torch.where(alive, some.log() - t / some, 0.0)
    return Sweep(logprobs, logsumexp, entropy, torch.where(alive, q / some.square(), 0.0))


def transformed(
    logits: Tensor, bias: Tensor | None, softcap: float | None, bias_first: bool
) -> tuple[Tensor, Tensor | None]:
    """(z before the temperature, dz/dlogits or None for 1) in the statistics' type; z may be `logits` itself."""
    z = logits.to(statistics_dtype(logits.dtype))
    slope = None
    if bias is not None and bias_first:
        z = z + bias
    if softcap:
        tanh = torch.tanh(z / softcap)
        slope = 1.0 - tanh.square()
        z = torch.where(z == -torch.inf, z, softcap * tanh)
    if bias is not None and not bias_first:
        z = z + bias
    return z, slope


def _tempered(
    logits: Tensor,
    inverse_temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    bias_first: bool,
) -> tuple[Tensor, Tensor | None]:
    if mask is not None:
        logits = torch.where(mask[:, None], logits, 0.0)
    z, slope = transformed(logits, bias, softcap, bias_first)
    return z * column(inverse_temperature), slope


def column(value: float | Tensor) -> float | Tensor:
    """A number as it is, a vector [M] as [M, 1]."""
    return value[:, None] if isinstance(value, Tensor) else value


def _chosen(z: Tensor, index: Tensor, outside: float) -> Tensor:
    here = (index >= 0) & (index < z.shape[1])
    return torch.where(here, z.gather(1, torch.where(here, index, 0)[:, None]).squeeze(1), outside)


def _statistics_reference(
    logits: Tensor,
    index: Tensor,
    inverse_temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    entropy: bool,
    sum_squares: bool,
    bias_first: bool,
) -> Sweep:
    z, _ = _tempered(logits, inverse_temperature, bias, softcap, mask, bias_first)
    logsumexp = torch.logsumexp(z, dim=1)
    alive = logsumexp != -torch.inf
    logprobs = torch.where(alive, (_chosen(z, index, torch.nan) - logsumexp).clamp(max=0.0), -torch.inf)
    entropies, squares = z.new_empty(0), z.new_empty(0)
    if entropy or sum_squares:
        z = z - torch.where(alive, logsumexp, 0.0)[:, None]
        p = torch.exp(z)
        if entropy:
            entropies = -(p * z.clamp(min=torch.finfo(z.dtype).min)).sum(dim=1)
        if sum_squares:
            squares = p.square().sum(dim=1)
    result = Sweep(logprobs, logsumexp, entropies, squares)
    if mask is None:
        return result
    return Sweep(*(torch.where(mask, part, 0.0) if part.numel() else part for part in result))


def _gradient_reference(
    logits: Tensor,
    index: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor | None,
    inverse_temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    out: Tensor,
    bias_first: bool,
) -> None:
    z, slope = _tempered(logits, inverse_temperature, bias, softcap, mask, bias_first)
    dead = logsumexp == -torch.inf
    impossible = z == -torch.inf
    log_p = z - torch.where(dead, 0.0, logsumexp)[:, None]
    weight = -grad_logprobs[:, None]
    if grad_entropy is not None:
        assert entropy is not None
        bounded = log_p.clamp(min=torch.finfo(log_p.dtype).min)  # p = 0 then gives 0, not 0 * inf
        weight = weight - grad_entropy[:, None] * (bounded + entropy[:, None])
    grad = torch.exp(log_p) * weight
    here = (index >= 0) & (index < z.shape[1])
    at, added = torch.where(here, index, 0), torch.where(here, grad_logprobs, 0.0).to(grad.dtype)
    grad.scatter_add_(1, at[:, None], added[:, None])
    grad = grad * column(inverse_temperature)
    if slope is not None:
        grad = grad * slope
    unwanted = impossible | dead[:, None]
    if mask is not None:
        unwanted |= ~mask[:, None]
    out.copy_(grad.masked_fill_(unwanted, 0.0))


def _partials_reference(
    logits: Tensor,
    index: Tensor,
    inverse_temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    bias_first: bool,
) -> Tensor:
    z, _ = _tempered(logits, inverse_temperature, bias, softcap, None, bias_first)
    top = z.amax(dim=1)
    e = torch.exp(z - torch.where(top == -torch.inf, 0.0, top)[:, None])
    weighted = (e * z.clamp(min=torch.finfo(z.dtype).min)).sum(dim=1)
    return torch.stack([top, e.sum(dim=1), weighted, e.square().sum(dim=1), _chosen(z, index, 0.0)], dim=1)


def _each_row(inverse_temperature: float | Tensor, rows: int) -> Tensor:
    if isinstance(inverse_temperature, Tensor):
        return inverse_temperature.float()
    return torch.full((rows,), inverse_temperature, dtype=torch.float32)


def _statistics_native(
    logits: Tensor,
    index: Tensor,
    inverse_temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    entropy: bool,
    sum_squares: bool,
    bias_first: bool,
) -> Sweep:
    inverse = _each_row(inverse_temperature, len(logits))
    given = (logits, index, inverse, bias, softcap or 0.0, mask, entropy, sum_squares, bias_first)
    return Sweep(*torch.ops.zs_native.token_logprobs_forward(*given))


def _gradient_native(
    logits: Tensor,
    index: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor | None,
    inverse_temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    out: Tensor,
    bias_first: bool,
) -> None:
    target = out if apart(out) else out.contiguous()
    inverse = _each_row(inverse_temperature, len(logits))
    statistics = (grad_logprobs.float(), grad_entropy, logsumexp, entropy)
    transforms = (inverse, bias, softcap or 0.0, mask)
    torch.ops.zs_native.token_logprobs_backward(logits, index, *statistics, *transforms, target, bias_first)
    if target is not out:
        out.copy_(target)


def _partials_native(
    logits: Tensor,
    index: Tensor,
    inverse_temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    bias_first: bool,
) -> Tensor:
    inverse = _each_row(inverse_temperature, len(logits))
    partials = torch.ops.zs_native.token_logprobs_partials(logits, index, inverse, bias, softcap or 0.0, bias_first)
    return partials
