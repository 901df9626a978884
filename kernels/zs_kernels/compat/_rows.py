"""Logits and masks of any shape, as other frameworks have them, to the rows [N] that the ops take, and back."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from zs_kernels._check import require, require_tensor
from zs_kernels.token_logprobs import TokenLogprobs, token_logprobs


def boolean(op: str, argument: str, mask: Tensor) -> Tensor:
    """A mask of zeros and ones, of any type, as bool.

    Raises ValueError for other values, for which a framework's own function would weigh instead of choose. Asks the
    device (the frameworks' functions do so as well).
    """
    require_tensor(op, argument, mask)
    if mask.dtype == torch.bool:
        return mask
    chosen = mask != 0
    wanted = "zeros and ones (weights belong in importance weights, or into the advantages)"
    require(bool(((mask == 1) | ~chosen).all()), op, argument, wanted, mask)
    return chosen


def constant(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor that the op takes as given asks for a gradient."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: argument '{name}' must not ask for a gradient, none flows there; pass .detach()")


def _mergeable(tensor: Tensor) -> bool:
    """Whether all dimensions but the last can be seen as one without a copy."""
    strides = [(size, stride) for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(strides))


def pieces(tensor: Tensor) -> list[Tensor]:
    """Views [N, V] of a tensor [..., V] whose rows, one after the other, are its rows: one where its strides allow.

    `logits[:, :-1]` gives one per sequence: a copy of a batch of logits would cost more than the launches.
    """
    if tensor.dim() <= 2:
        return [tensor if tensor.dim() == 2 else tensor.unsqueeze(0)]
    if tensor.numel() == 0 or _mergeable(tensor):
        return [tensor.reshape(-1, tensor.shape[-1])]
    return [piece for part in tensor.unbind(0) for piece in pieces(part)]


def shaped_logprobs(
    op: str,
    logits: Tensor,
    index: Tensor | None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    sum_squares: bool = False,
    inplace_backward: bool = False,
) -> TokenLogprobs:
    """`token_logprobs` for logits [..., V], index [...] or [..., K], mask [...]; results [...], or [..., K].

    index None: log-probabilities of token 0, for who asks for something else.
    """
    require_tensor(op, "logits", logits)
    shape = tuple(logits.shape[:-1])
    if index is None:
        index = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    require_tensor(op, "index", index)
    many = index.dim() == logits.dim()
    good = tuple(index.shape[:-1] if many else index.shape) == shape
    require(good, op, "index", f"of shape {list(shape)} or {[*shape, 'K']}", index)
    if mask is not None:
        require(tuple(mask.shape) == shape, op, "mask", f"of shape {list(shape)}", mask)
        mask = mask.reshape(-1)
    parts = pieces(logits)
    sizes = [part.shape[0] for part in parts]
    rows = index.reshape(-1, index.shape[-1]) if many else index.reshape(-1)
    masks = [None] * len(parts) if mask is None else mask.split(sizes)
    results = [
        token_logprobs(
            part,
            chosen,
            temperature=temperature,
            mask=valid,
            entropy=entropy,
            sum_squares=sum_squares,
            inplace_backward=inplace_backward,
        )
        for part, chosen, valid in zip(parts, rows.split(sizes), masks, strict=True)
    ]
    return TokenLogprobs(*(_joined(column, shape) for column in zip(*results, strict=True)))


def _joined(columns: tuple[Tensor | None, ...], shape: tuple[int, ...]) -> Tensor | None:
    given = [column for column in columns if column is not None]
    if not given:
        return None
    whole = given[0] if len(given) == 1 else torch.cat(given)
    return whole.reshape(*shape, *whole.shape[1:])


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, valid: Tensor) -> Tensor:
    """[B, T]: at each token the mean log ratio of its sequence's unmasked tokens, with the gradient of that mean."""
    difference = torch.where(valid, logprobs - old_logprobs, 0.0)
    mean = difference.sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    return mean.expand(logprobs.shape)
