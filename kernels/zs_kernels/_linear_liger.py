"""`linear_logprobs` by Liger's fused Hopper kernel, where liger-kernel >= 0.8.5 and its CuTe DSL are installed.

Its results come from float32 sums with the logits staged as float16, its entropy is bfloat16.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

MODULE = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
FUNCTION = "LigerFusedScaledCrossEntropySM90Function"


@functools.cache
def _function() -> tuple[Any, str]:
    """(the autograd function or None, why it is not there)."""
    try:
        return getattr(importlib.import_module(MODULE), FUNCTION), ""
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return None, f"{MODULE}.{FUNCTION} cannot be imported ({error})"


def obstacle(hidden: Tensor, weight: Tensor, plain: bool) -> str:
    """Why Liger's kernel cannot take this call, or ''. plain: no bias, softcap, adapter, shards, row temperatures,
    exact mode or further statistics."""
    if not hidden.is_cuda or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, 'hidden' is on {hidden.device}"
    if torch.cuda.get_device_capability(hidden.device) != (9, 0):
        return f"it needs compute capability 9.0, got {torch.cuda.get_device_capability(hidden.device)}"
    if hidden.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"it takes bfloat16 alone, got {hidden.dtype} and {weight.dtype}"
    if not plain:
        return "it has one temperature, and no bias, softcap, exact, lora, process_group, sum_squares, batch_invariant"
    return _function()[1]


def logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, index: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """([N], [N] or None) float32, differentiable. Only where `obstacle` found none."""
    function, reason = _function()
    if function is None:
        raise RuntimeError(f"linear_logprobs: head_backend 'liger': {reason}")
    if hidden.shape[0] == 0:  # the kernel refuses no rows
        nothing = (hidden.sum() + weight.sum()).float() * 0.0 + hidden.new_zeros(0, dtype=torch.float32)
        return nothing, nothing if entropy else None
    result = function.apply(hidden, weight, index, float(temperature), -100, 1, entropy)
    if not entropy:
        return -result, None
    return -result[0], result[1].float()
