"""The two passes of `linear_logprobs` over its chunks: statistics forward, gradients backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zs_kernels import _linear, _wide_products
from zs_kernels._linear import Head, HeadGradients, Wanted
from zs_kernels._linear_shards import Shards
from zs_kernels.token_logprobs import Sweep, merge_partials, sweep_gradient, sweep_partials, sweep_statistics


def forward_statistics(
    head: Head,
    hidden: Tensor,
    index: Tensor,
    inverse: float | Tensor,
    *,
    entropy: bool,
    sum_squares: bool,
    chunks: list[slice],
    fixed_rows: int,
    kept: Tensor,
    unit: Tensor | None,
    shards: Shards | None,
) -> Sweep:
    """Statistics of all rows [M] of hidden [M, H]; also fills `kept` [M, V] with the logits (unless it is empty) and
    `unit` [M, H] with the gradient of each row's log-probability by its hidden state (unless None).

    fixed_rows: 0, or the rows that each chunk is filled up to: a row's result then doesn't depend on the others.
    index: relative to the shard, where there are shards.
    """
    height = fixed_rows or max((here.stop - here.start for here in chunks), default=0)
    keep = kept.numel() > 0
    workspace = kept if keep else hidden.new_empty(height, head.vocabulary, dtype=head.logits_dtype)
    options: dict[str, Any] = {"bias": head.bias, "softcap": head.softcap, "bias_first": True}
    sweeps: list[Sweep] = []
    partials: list[Tensor] = []
    for here in chunks:
        states, count = hidden[here], here.stop - here.start
        if fixed_rows:
            states = functional.pad(states, (0, 0, 0, height - count))
        logits = workspace[here] if keep else workspace[: states.shape[0]]
        head.logits(states, logits)
        logits, targets, scale = logits[:count], index[here], _linear.part_of(inverse, here)
        if shards is not None:
            partials.append(sweep_partials(logits, targets, scale, **options))
            continue
        sweep = sweep_statistics(logits, targets, scale, entropy=entropy, sum_squares=sum_squares, **options)
        sweeps.append(sweep)
        if unit is not None:
            dlogits = logits if logits.dtype == hidden.dtype else torch.empty_like(logits, dtype=hidden.dtype)
            ones = torch.ones_like(sweep.logprobs)
            sweep_gradient(logits, targets, ones, None, sweep.logsumexp, None, scale, out=dlogits, **options)
            if _wide_products.pay(dlogits):
                _wide_products.multiply_gradient(
                    dlogits, head.weight, states, grad_hidden=unit[here], add_to_weight=None
                )
            else:
                torch.mm(dlogits, head.weight, out=unit[here])
    if shards is not None:
        return merge_partials(shards.gather(torch.cat([*partials, hidden.new_empty(0, 5, dtype=torch.float32)])))
    none = hidden.new_empty(0, dtype=_linear.statistics_dtype(hidden.dtype))
    sweeps.append(Sweep(none, none, none, none))
    return Sweep(*(torch.cat(column) for column in zip(*sweeps, strict=True)))


def rows_with_gradient(*gradients: Tensor) -> Tensor | None:
    """Indices of the rows [M] where an upstream gradient is not 0; None where too few are left out to be worth it.

    Only on a CPU: a GPU's host would have to wait for the answer.
    """
    if gradients[0].device.type != "cpu":
        return None
    alive = torch.stack([gradient != 0 for gradient in gradients]).any(dim=0)
    live = alive.nonzero().squeeze(1)
    return live if 8 * live.numel() <= 7 * alive.numel() else None


def pack_rows(values: Tensor, rows: Tensor) -> None:
    """Move the given rows (rising) of a matrix to its front, in place."""
    for place, row in enumerate(rows.tolist()):
        if place != row:
            values[place].copy_(values[row])


def backward_gradients(
    head: Head,
    hidden: Tensor,
    index: Tensor,
    inverse: float | Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor | None,
    wanted: Wanted,
    *,
    chunks: list[slice],
    kept: Tensor,
    overwrite: bool,
    shards: Shards | None,
) -> HeadGradients:
    """Gradients of hidden [M, H] and the head. kept: the logits [M, V], or [0] to compute them again. overwrite: kept
    logits that have the gradient's type become the gradient."""
    height = max((here.stop - here.start for here in chunks), default=0)
    gradients = HeadGradients(head, hidden, wanted, len(chunks))
    keep = kept.numel() > 0
    apart = head.logits_dtype != hidden.dtype or (keep and not overwrite)
    workspace = kept if keep else hidden.new_empty(height, head.vocabulary, dtype=head.logits_dtype)
    own = hidden.new_empty(height if apart else 0, head.vocabulary)
    for here in chunks:
        count = here.stop - here.start
        logits = workspace[here] if keep else workspace[:count]
        if not keep:
            head.logits(hidden[here], logits)
        dlogits = own[:count] if apart else logits
        sweep_gradient(
            logits,
            index[here],
            grad_logprobs[here],
            None if grad_entropy is None else grad_entropy[here],
            logsumexp[here],
            None if entropy is None else entropy[here],
            _linear.part_of(inverse, here),
            bias=head.bias,
            softcap=head.softcap,
            bias_first=True,
            out=dlogits,
        )
        gradients.add(dlogits, hidden[here], here)
    del workspace, own  # before the weight's gradient changes its type
    if shards is not None:
        gradients.sum_over(shards)
    return gradients
