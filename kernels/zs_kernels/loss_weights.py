"""Aggregation of a per-token loss as one weight per token: loss = sum_n weight_n loss_n."""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor

from zs_kernels._check import require, require_tensor


def require_cu_seqlens(op: str, cu_seqlens: Tensor, device: torch.device) -> None:
    """Raise unless `cu_seqlens` is an int64/int32 tensor of shape [S + 1] on `device`; its values are not read."""
    require_tensor(op, "cu_seqlens", cu_seqlens)
    good = cu_seqlens.dtype in (torch.int64, torch.int32) and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0
    wanted = f"an int64 or int32 tensor of shape [S + 1] on {device}"
    require(good and cu_seqlens.device == device, op, "cu_seqlens", wanted, cu_seqlens)


def require_segments(op: str, cu_seqlens: Tensor, count: int) -> None:
    """Raise unless the bounds rise from 0 to `count`. Values on a device are read in checked mode only (a sync)."""
    if cu_seqlens.device.type != "cpu" and os.environ.get("ZS_KERNELS_CHECKED") != "1":
        return
    bounds = cu_seqlens.tolist()
    rising = bounds[0] == 0 and bounds[-1] == count and all(a <= b for a, b in pairwise(bounds))
    require(rising, op, "cu_seqlens", f"bounds that rise from 0 to {count}", bounds)
