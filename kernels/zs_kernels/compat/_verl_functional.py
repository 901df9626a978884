"""verl.utils.torch_functional and verl's fused heads on our ops."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zs_kernels._check import require, require_tensor
from zs_kernels.compat._rows import boolean, shaped_logprobs
from zs_kernels.linear_logprobs import linear_logprobs
from zs_kernels.reductions import masked_whiten as whiten

FLASH_ATTENTION = importlib.util.find_spec("flash_attn") is not None
Axis = int | tuple[int, ...] | None


def _flash_cross_entropy(logits: Tensor) -> bool:
    """Whether verl would take flash-attn's cross-entropy: float32 results, logits overwritten by the backward pass."""
    if not FLASH_ATTENTION or not logits.is_cuda or logits.dtype == torch.float64:
        return False
    return os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """[...] from logits [..., V] and labels [...].

    As in verl: float32 and, with inplace_backward, logits that the backward pass overwrites where flash-attn is
    installed and not disabled; else in the type of the logits, and these are left alone.
    """
    flash = _flash_cross_entropy(logits)
    inplace = flash and inplace_backward
    found = shaped_logprobs("logprobs_from_logits", logits, labels, inplace_backward=inplace)
    return found.logprobs if flash else found.logprobs.to(logits.dtype)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """[...] from logits [..., V], in their type."""
    return shaped_logprobs("entropy_from_logits", logits, None, entropy=True).entropy.to(logits.dtype)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """[N] float32 from logits [N, V]. chunk_size is not needed and not read."""
    op = "entropy_from_logits_with_chunking"
    require(logits.dim() == 2, op, "logits", "of shape [N, V]", logits)
    return shaped_logprobs(op, logits, None, entropy=True).entropy.float()


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """[...] from logits [..., V], in their type. Where a gradient is asked for, plain torch: the op has none here."""
    if logits.requires_grad and torch.is_grad_enabled():
        return torch.exp(torch.logsumexp(2.0 * logits, dim=-1) - 2.0 * torch.logsumexp(logits, dim=-1))
    op = "calculate_sum_pi_squared_from_logits"
    return shaped_logprobs(op, logits, None, sum_squares=True).sum_squares.to(logits.dtype)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def masked_sum(values: Tensor, mask: Tensor, axis: Axis = None) -> Tensor:
    """Sum of mask * values where the mask is not 0, over all dimensions or `axis`; the mask may weigh."""
    chosen = torch.where(mask.bool(), _wide(values), 0.0) * mask
    total = chosen.sum() if axis is None else chosen.sum(dim=axis)
    return total.to(torch.promote_types(values.dtype, mask.dtype))


def masked_mean(values: Tensor, mask: Tensor, axis: Axis = None) -> Tensor:
    """masked_sum / (sum of the mask + 1e-8)."""
    count = mask.sum() if axis is None else mask.sum(dim=axis)
    return masked_sum(values, mask, axis) / (count + 1e-8)


def require_two(count: Tensor) -> None:
    """Raise ValueError for 0 or 1 unmasked entries, as verl does."""
    number = int(count)
    if number == 0:
        raise ValueError("At least one element in the mask has to be 1.")
    if number == 1:
        raise ValueError("The sum of the mask is one, which can cause a division by zero.")


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance over the unmasked entries. Unbiased: raises ValueError for fewer than two."""
    centred = torch.where(mask.bool(), _wide(values), 0.0) - masked_mean(_wide(values), mask)
    variance = masked_mean(centred * centred, mask)
    if unbiased:
        count = mask.sum()
        require_two(count)
        variance = variance * (count / (count - 1))
    return variance.to(torch.promote_types(values.dtype, mask.dtype))


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / sqrt(unbiased variance + 1e-8), masked entries too; raises ValueError for fewer than two."""
    chosen = boolean("masked_whiten", "mask", mask)
    require_two(chosen.sum())
    whitened = whiten(values, chosen, shift_mean=shift_mean, preset="verl")
    return whitened.to(torch.promote_types(values.dtype, mask.dtype))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl.utils.kernel: (log-probabilities [N], entropy [N]) float32, gradients through both; N = all tokens.

    hidden [..., H], weight [V, H], labels [...]; reduction none, sum or mean, of the log-probabilities alone.
    dist_process_group: each process holds an equal part of the vocabulary; without gradients only.
    """
    op = "linear_cross_entropy"
    if not isinstance(temperature, float):
        raise AssertionError(f"{op}: argument 'temperature' must be a float, got {temperature!r}")
    known = isinstance(reduction, str) and reduction.lower() in ("none", "sum", "mean")
    require(known, op, "reduction", "none, sum or mean", reduction)
    require_tensor(op, "hidden", hidden)
    shard: dict[str, Any] = {}
    if dist_process_group is not None and dist.get_world_size(dist_process_group) > 1:
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            raise NotImplementedError(
                f"{op}: with a process group verl leaves the sum of hidden's gradient over the shards to the caller, "
                "the op does it itself; call zs_kernels.linear_logprobs(process_group=...), or leave this name out: "
                "patch(only=[...])"
            )
        start = dist.get_rank(dist_process_group) * weight.shape[0]
        shard = {"process_group": dist_process_group, "vocabulary_start": start}
    found = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature, entropy=True, **shard
    )
    logprobs = found.logprobs
    if reduction.lower() != "none":
        logprobs = logprobs.sum() if reduction.lower() == "sum" else logprobs.mean()
    return logprobs, found.entropy


class FusedLinearForPPO(nn.Module):
    """verl.utils.experimental.torch_functional.FusedLinearForPPO; both arguments are checked and not needed."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"Unsupported FusedLinearForPPO backend: {impl_backend}. Choose 'torch' or 'liger'.")
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities float32, entropy in the hidden states' type), each of the shape of input_ids.

        hidden_states [..., H], vocab_weights [V, H], input_ids [...]; temperature: a number, a tensor with one, or
        one per token.
        """
        op = "FusedLinearForPPO"
        same = tuple(input_ids.shape) == tuple(hidden_states.shape[:-1])
        require(same, op, "input_ids", f"of shape {list(hidden_states.shape[:-1])}", input_ids)
        if isinstance(temperature, Tensor):
            temperature = temperature.expand(input_ids.shape) if temperature.numel() == 1 else temperature
            temperature = temperature.reshape(-1)
        found = linear_logprobs(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            vocab_weights,
            input_ids.reshape(-1),
            temperature=temperature,
            entropy=True,
        )
        shape = input_ids.shape
        return found.logprobs.reshape(shape), found.entropy.to(hidden_states.dtype).reshape(shape)
