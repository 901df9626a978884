"""The registered operators behind `token_logprobs`: `zs_kernels::token_logprobs` and its two backward passes.

Here are the parts of the definition that a row sweep does not know: several chosen tokens to a row, keep sets, the
highest log-probabilities, the gradient of a bias. N = rows, V = vocabulary, K = chosen tokens of a row; results and
statistics float32 (float64 for float64 logits), in nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zs_kernels._check import require, require_index
from zs_kernels._device import backend_of
from zs_kernels._sweeps import (
    column,
    statistics_dtype,
    sweep_gradient,
    sweep_statistics,
    transformed,
)

DENSE_BYTES = 32 << 20
"""Most memory of a float32 copy of some rows, where one cannot be avoided."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What turns rows of logits into rows of z: every argument but the logits and the chosen tokens."""

    inverse_temperature: float | Tensor
    """A number or [N]."""
    bias: Tensor | None = None
    """[V]"""
    softcap: float | None = None
    mask: Tensor | None = None
    """[N] bool"""
    keep: tuple[Tensor, Tensor] | None = None
    """(offsets [N + 1], ids) int64"""

    def z_of(self, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """(z over the temperature, dz/dlogits before the temperature) of the logits `values` [N, K] of tokens `ids`."""
        bias = None if self.bias is None else self.bias[ids]
        z, slope = transformed(values, bias, self.softcap, False)
        return z * column(self.inverse_temperature), slope

    def keeps(self, ids: Tensor, vocabulary: int) -> Tensor:
        """Which tokens `ids` [N, K] are in their row's keep set; without a host synchronisation."""
        assert self.keep is not None
        row, kept = self.kept_rows(), self.keep[1]
        if kept.numel() == 0:
            return torch.zeros_like(ids, dtype=torch.bool)
        known = (row * vocabulary + kept).sort().values
        asked = torch.arange(ids.shape[0], device=ids.device)[:, None] * vocabulary + ids
        return known[torch.searchsorted(known, asked).clamp(max=known.numel() - 1)] == asked

    def kept_rows(self) -> Tensor:
        """The row of each id of the keep set."""
        assert self.keep is not None
        offsets, ids = self.keep
        rows = torch.arange(offsets.numel() - 1, device=ids.device)
        return torch.repeat_interleave(rows, offsets.diff(), output_size=ids.numel())

    def dense_keep(self, vocabulary: int) -> Tensor | None:
        """[N, V] bool, or None without a keep set."""
        if self.keep is None:
            return None
        kept = torch.zeros(self.keep[0].numel() - 1, vocabulary, dtype=torch.bool, device=self.keep[1].device)
        kept[self.kept_rows(), self.keep[1]] = True
        return kept

    def part(self, here: slice) -> Rows:
        """Some of the rows, without keep set, bias and softcap."""
        inverse = self.inverse_temperature
        inverse = inverse[here] if isinstance(inverse, Tensor) else inverse
        return Rows(inverse, mask=None if self.mask is None else self.mask[here])


def prepared(
    index: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    bias: Tensor | None,
    keep_offsets: Tensor | None,
    keep_ids: Tensor | None,
    softcap: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Rows]:
    """(index [N, K] int64 with 0 where masked, the rest), from the operators' arguments."""
    index = (index if index.dim() == 2 else index[:, None]).long()
    if mask is not None:
        index = torch.where(mask[:, None], index, 0)
    inverse = 1.0 / temperature if temperatures is None else temperatures.to(statistics_dtype(dtype)).reciprocal()
    keep = None if keep_offsets is None or keep_ids is None else (keep_offsets.long(), keep_ids.long())
    return index, Rows(inverse, bias, softcap or None, mask, keep)


@torch.library.custom_op("zs_kernels::token_logprobs", mutates_args=())
def token_logprobs_forward(
    logits: Tensor,
    index: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    bias: Tensor | None,
    keep_offsets: Tensor | None,
    keep_ids: Tensor | None,
    softcap: float,
    entropy: bool,
    sum_squares: bool,
    top_k: int,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs like index, logsumexp [N], entropy, sum_squares [N] or [0], top log-probs and ids [N, top_k] or [0]).

    temperatures [N] rules over temperature; softcap 0 is none; inplace_backward: what the backward pass does.
    """
    check_values(logits, index, mask, keep_offsets, keep_ids)
    several, rows = prepared(
        index, temperatures, temperature, mask, bias, keep_offsets, keep_ids, softcap, logits.dtype
    )
    compact = rows.keep is not None and backend_of(logits) != "triton"
    if compact:
        z, _, _, _ = compacted(logits, rows)
        bare = Rows(rows.inverse_temperature, mask=mask)
        sweep = sweep_statistics(
            z, several.new_zeros(len(z)), bare.inverse_temperature, mask=mask, entropy=entropy, sum_squares=sum_squares
        )
    else:
        first = several[:, 0] if several.shape[1] else several.new_zeros(len(several))
        sweep = sweep_statistics(
            logits,
            first,
            rows.inverse_temperature,
            bias=bias,
            softcap=rows.softcap,
            mask=mask,
            entropy=entropy,
            sum_squares=sum_squares,
            keep=rows.keep,
        )
    if compact or several.shape[1] != 1:
        logprobs = chosen_logprobs(logits, several, sweep.logsumexp, rows)
    else:
        logprobs = sweep.logprobs[:, None]
    if rows.keep is not None:
        unlikely = ~rows.keeps(several, logits.shape[1])
        logprobs = logprobs.masked_fill(unlikely if mask is None else unlikely & mask[:, None], -torch.inf)
    top = highest(logits, sweep.logsumexp, rows, top_k) if top_k else (logprobs.new_empty(0), several.new_empty(0))
    return logprobs.reshape(index.shape), sweep.logsumexp, sweep.entropy, sweep.sum_squares, *top


@token_logprobs_forward.register_fake
def _(
    logits: Tensor,
    index: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    bias: Tensor | None,
    keep_offsets: Tensor | None,
    keep_ids: Tensor | None,
    softcap: float,
    entropy: bool,
    sum_squares: bool,
    top_k: int,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], statistics_dtype(logits.dtype)
    shapes = [index.shape, (rows,), (rows if entropy else 0,), (rows if sum_squares else 0,)]
    top = (rows, top_k) if top_k else (0,)
    made = [logits.new_empty(shape, dtype=dtype) for shape in [*shapes, top]]
    return *made, logits.new_empty(top, dtype=torch.int64)


def check_values(
    logits: Tensor, index: Tensor, mask: Tensor | None, keep_offsets: Tensor | None, keep_ids: Tensor | None
) -> None:
    """The values of index tensors, which are read on the CPU alone (or with ZS_KERNELS_CHECKED=1)."""
    op, (rows, vocabulary) = "token_logprobs", logits.shape
    shape = (rows,) if index.dim() == 1 else (rows, index.shape[-1])
    require_index(op, "index", index, shape, vocabulary, device=logits.device, mask=mask)
    if keep_offsets is None or keep_ids is None:
        return
    require_index(op, "keep", keep_ids, (keep_ids.numel(),), vocabulary, device=logits.device, mask=None)
    if keep_ids.device.type == "cpu":
        bounds = keep_offsets.tolist()
        rising = bounds[0] == 0 and bounds[-1] == keep_ids.numel() and bounds == sorted(bounds)
        require(rising, op, "keep", f"offsets that rise from 0 to the {keep_ids.numel()} ids, and the ids", bounds)
        keys = Rows(1.0, keep=(keep_offsets.long(), keep_ids)).kept_rows() * vocabulary + keep_ids
        require(keys.unique().numel() == keys.numel(), op, "keep", "without a token twice in a row's set", keep_ids)


def chosen_logprobs(logits: Tensor, index: Tensor, logsumexp: Tensor, rows: Rows) -> Tensor:
    """[N, K], from the logits of the chosen tokens alone."""
    z, _ = rows.z_of(logits.gather(1, index), index)
    dead = logsumexp == -torch.inf
    logprobs = (z - torch.where(dead, 0.0, logsumexp)[:, None]).clamp(max=0.0).masked_fill(dead[:, None], -torch.inf)
    return logprobs if rows.mask is None else torch.where(rows.mask[:, None], logprobs, 0.0)


def compacted(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The kept tokens side by side, W = the most that a row keeps: (z before the temperature [N, W] with -inf in
    unused places, dz/dlogits, ids, which places are used). Reads W from the device."""
    assert rows.keep is not None
    offsets, ids = rows.keep
    counts = offsets.diff()
    width = max(1, int(counts.max())) if counts.numel() else 1
    place = torch.arange(width, device=ids.device)[None, :]
    used = place < counts[:, None]
    padded = torch.cat([ids, ids.new_zeros(1)])
    ids = torch.where(used, padded[torch.where(used, offsets[:-1, None] + place, ids.numel())], 0)
    z, slope = transformed(logits.gather(1, ids), None if rows.bias is None else rows.bias[ids], rows.softcap, False)
    return torch.where(used, z, -torch.inf), slope, ids, used


def slices(rows: int, vocabulary: int) -> Iterator[slice]:
    """Row ranges whose float32 logits take at most DENSE_BYTES."""
    step = max(1, DENSE_BYTES // (4 * vocabulary))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def highest(logits: Tensor, logsumexp: Tensor, rows: Rows, top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k log-probabilities of each row, falling, and their tokens; zeros in masked rows."""
    if rows.bias is None and rows.keep is None:  # the order of z is that of the logits
        values, ids = logits.topk(top_k, dim=1)
        z, _ = rows.z_of(values, ids)
    else:
        kept, parts = rows.dense_keep(logits.shape[1]), []
        for here in slices(*logits.shape):
            dense, _ = transformed(logits[here], rows.bias, rows.softcap, False)
            if kept is not None:
                dense = torch.where(kept[here], dense, -torch.inf)
            parts.append(dense.topk(top_k, dim=1))
        z = torch.cat([part.values for part in parts]) if parts else logsumexp.new_empty(0, top_k)
        ids = torch.cat([part.indices for part in parts]) if parts else z.new_empty(0, top_k, dtype=torch.int64)
        z = z * column(rows.inverse_temperature)
    dead = (logsumexp == -torch.inf)[:, None]
    logprobs = (z - logsumexp[:, None]).clamp(max=0.0).masked_fill(dead, -torch.inf)
    if rows.mask is None:
        return logprobs, ids
    return torch.where(rows.mask[:, None], logprobs, 0.0), torch.where(rows.mask[:, None], ids, 0)


def gradient(
    logits: Tensor,
    index: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    out: Tensor,
) -> None:
    """Write the gradient of the logits into `out` (which may be the logits where there is no keep set).

    index, grad_logprobs: [N, K]; the rest as in `sweep_gradient`.
    """
    total = grad_logprobs.sum(dim=1) if index.shape[1] != 1 else grad_logprobs[:, 0]
    statistics = (total, grad_entropy, logsumexp, entropy, rows.inverse_temperature)
    compact = rows.keep is not None and backend_of(logits) != "triton"
    by_hand = compact or index.shape[1] != 1
    nothing = index.new_full((len(index),), -1) if by_hand else index[:, 0]
    if by_hand:  # before `out`, which may be the logits, is written
        chosen = chosen_gradient(logits, index, grad_logprobs, *statistics[1:4], rows)
    if compact:
        z, slope, ids, used = compacted(logits, rows)
        grad = torch.empty_like(z)
        sweep_gradient(z, nothing, *statistics, mask=rows.mask, out=grad)
        grad = grad if slope is None else torch.where(grad == 0.0, 0.0, grad * slope)
        out.zero_().scatter_add_(1, ids, torch.where(used, grad, 0.0).to(out.dtype))
    else:
        if rows.keep is not None:
            out.zero_()
        options = {"bias": rows.bias, "softcap": rows.softcap, "mask": rows.mask, "keep": rows.keep}
        sweep_gradient(logits, nothing, *statistics, **options, out=out)
    if by_hand:
        out.scatter_(1, index, chosen.to(out.dtype))


def chosen_gradient(
    logits: Tensor,
    index: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor | None,
    rows: Rows,
) -> Tensor:
    """The gradient of the chosen logits alone, [N, K]; a token chosen twice has its whole gradient twice."""
    z, slope = rows.z_of(logits.gather(1, index), index)
    dead = (logsumexp == -torch.inf)[:, None]
    log_p = z - logsumexp[:, None].masked_fill(dead, 0.0)
    weight = -grad_logprobs.sum(dim=1, keepdim=True)
    if grad_entropy is not None and entropy is not None:
        bounded = log_p.clamp(min=torch.finfo(log_p.dtype).min)
        weight = weight - grad_entropy[:, None] * (bounded + entropy[:, None])
    grad = torch.exp(log_p) * weight
    for k in range(index.shape[1]):
        grad = grad + torch.where(index == index[:, k, None], grad_logprobs[:, k, None], 0.0)
    grad = grad * column(rows.inverse_temperature)
    grad = grad if slope is None else grad * slope
    unwanted = dead | (z == -torch.inf)
    if rows.mask is not None:
        unwanted = unwanted | ~rows.mask[:, None]
    if rows.keep is not None:
        unwanted = unwanted | ~rows.keeps(index, logits.shape[1])
    return grad.masked_fill(unwanted, 0.0)


def gradient_with_bias(
    logits: Tensor,
    index: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    out: Tensor,
) -> Tensor:
    """As `gradient`, and the gradient [V] of the bias: some rows at a time, whose dz is held in float32."""
    assert rows.bias is not None
    vocabulary, dtype = logits.shape[1], statistics_dtype(logits.dtype)
    kept = rows.dense_keep(vocabulary)
    grad_bias = torch.zeros(vocabulary, dtype=dtype, device=logits.device)
    for here in slices(*logits.shape):
        z, slope = transformed(logits[here], rows.bias, rows.softcap, False)
        if kept is not None:
            z = torch.where(kept[here], z, -torch.inf)
        by_entropy = (None, None) if grad_entropy is None or entropy is None else (grad_entropy[here], entropy[here])
        dz = torch.empty_like(z, memory_format=torch.contiguous_format)
        gradient(
            z, index[here], grad_logprobs[here], by_entropy[0], logsumexp[here], by_entropy[1], rows.part(here), dz
        )
        grad_bias += dz.sum(dim=0)
        out[here] = dz if slope is None else torch.where(dz == 0.0, 0.0, dz * slope)  # a masked slope may be NaN
    return grad_bias


def run_backward(
    logits: Tensor,
    out: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    index: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    bias: Tensor | None,
    keep_offsets: Tensor | None,
    keep_ids: Tensor | None,
    softcap: float,
    bias_gradient: bool,
) -> Tensor:
    """Write the gradient of the logits into `out`; returns that of the bias, [V] or [0]."""
    index, rows = prepared(index, temperatures, temperature, mask, bias, keep_offsets, keep_ids, softcap, logits.dtype)
    upstream = torch.zeros_like(index, dtype=logsumexp.dtype) if grad_logprobs is None else grad_logprobs
    upstream = upstream.reshape(index.shape)
    arguments = (logits, index, upstream, grad_entropy, logsumexp, None if grad_entropy is None else entropy, rows)
    if not bias_gradient or bias is None:
        gradient(*arguments, out)
        return logsumexp.new_empty(0)
    return gradient_with_bias(*arguments, out).to(bias.dtype)


@torch.library.custom_op("zs_kernels::token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    logits: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    index: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    bias: Tensor | None,
    keep_offsets: Tensor | None,
    keep_ids: Tensor | None,
    softcap: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of the logits [N, V], of the bias [V] or [0])."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad_bias = run_backward(
        logits, out, grad_logprobs, grad_entropy, index, logsumexp, entropy, temperatures, temperature, mask, bias,
        keep_offsets, keep_ids, softcap, bias_gradient,
    )  # fmt: skip
    return out, grad_bias


@token_logprobs_backward.register_fake
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    bias, bias_gradient = arguments[8], arguments[-1]
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return out, bias.new_empty(bias.shape) if bias_gradient else _statistic(logits)


def _statistic(logits: Tensor) -> Tensor:
    return logits.new_empty(0, dtype=statistics_dtype(logits.dtype))


@torch.library.custom_op("zs_kernels::token_logprobs_backward_", mutates_args=("logits",))
def token_logprobs_backward_(
    logits: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    index: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    bias: Tensor | None,
    keep_offsets: Tensor | None,
    keep_ids: Tensor | None,
    softcap: float,
    bias_gradient: bool,
) -> Tensor:
    """Write the gradient of the logits over them; returns that of the bias, [V] or [0]."""
    return run_backward(
        logits, logits, grad_logprobs, grad_entropy, index, logsumexp, entropy, temperatures, temperature, mask, bias,
        keep_offsets, keep_ids, softcap, bias_gradient,
    )  # fmt: skip


@token_logprobs_backward_.register_fake
def _(logits: Tensor, *arguments: Any) -> Tensor:
    bias, bias_gradient = arguments[8], arguments[-1]
    return bias.new_empty(bias.shape) if bias_gradient else _statistic(logits)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, index, temperatures, temperature, mask, bias, keep_offsets, keep_ids, softcap = inputs[:9]
    _, logsumexp, entropy, *others = output
    ctx.save_for_backward(logits, index, logsumexp, entropy, temperatures, mask, bias, keep_offsets, keep_ids)
    ctx.temperature, ctx.softcap, ctx.inplace = temperature, softcap, inputs[-1]
    ctx.mark_non_differentiable(logsumexp, *others)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, _: Any, grad_entropy: Tensor | None, *others: Any) -> Any:
    logits, index, logsumexp, entropy, temperatures, mask, bias, keep_offsets, keep_ids = ctx.saved_tensors
    bias_gradient = bias is not None and ctx.needs_input_grad[5]
    if grad_entropy is not None and grad_entropy.numel() == 0 != logsumexp.numel():
        grad_entropy = None
    arguments = (
        logits, grad_logprobs, grad_entropy, index, logsumexp, entropy, temperatures, ctx.temperature, mask, bias,
        keep_offsets, keep_ids, ctx.softcap, bias_gradient,
    )  # fmt: skip
    if ctx.inplace:
        grad_bias = torch.ops.zs_kernels.token_logprobs_backward_(*arguments)
        grad_logits = logits.detach()
    else:
        grad_logits, grad_bias = torch.ops.zs_kernels.token_logprobs_backward(*arguments)
    none = [None] * 8
    return (grad_logits, None, None, None, None, grad_bias if bias_gradient else None, *none[:7])


token_logprobs_forward.register_autograd(_backward, setup_context=_remember)
