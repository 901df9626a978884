"""Argument errors that name the operation, the argument, what was expected and what came.

Index values are looked at on the CPU only: on a device that costs a synchronisation, so there it happens only while
`ZS_KERNELS_CHECKED=1` is set in the environment.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor


def describe(value: object) -> str:
    """`float32 [3, 5] on cpu` for a tensor, type and value for anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def require(condition: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raise ValueError `op: argument 'argument' must be ..., got ...` unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: argument '{argument}' must be {expected}, got {describe(got)}")


def require_tensor(op: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: argument '{argument}' must be a tensor, got {describe(value)}")


def require_floating(op: str, argument: str, value: Tensor, *, shape: tuple[int, ...] | None = None) -> None:
    """Raise unless `value` is a floating-point tensor (of exactly `shape`, when given)."""
    require_tensor(op, argument, value)
    if value.is_floating_point() and (shape is None or tuple(value.shape) == shape):
        return  # the message is made only when needed: writing sizes out would tie a compiled graph to them
    wanted = "a floating-point tensor" + (f" of shape {list(shape)}" if shape is not None else "")
    require(False, op, argument, wanted, value)


def require_mask(op: str, argument: str, mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `mask` is None or a bool tensor of `shape` on `device`."""
    if mask is None:
        return
    require_tensor(op, argument, mask)
    if not (mask.dtype == torch.bool and tuple(mask.shape) == shape and mask.device == device):
        require(False, op, argument, f"a bool tensor of shape {list(shape)} on {device}", mask)


def require_integers(op: str, argument: str, value: Tensor, shape: tuple[int, ...], *, device: torch.device) -> None:
    """Raise unless `value` is an int64/int32 tensor of `shape` on `device`; its values are not read."""
    require_tensor(op, argument, value)
    if not (value.dtype in (torch.int64, torch.int32) and tuple(value.shape) == shape and value.device == device):
        require(False, op, argument, f"an int64 or int32 tensor of shape {list(shape)} on {device}", value)


def require_index(
    op: str,
    argument: str,
    index: Tensor,
    shape: tuple[int, ...],
    limit: int,
    *,
    device: torch.device,
    mask: Tensor | None,
) -> None:
    """Raise unless `index` is an int64/int32 tensor of `shape` whose unmasked values lie in [0, limit)."""
    require_integers(op, argument, index, shape, device=device)
    if index.device.type != "cpu" and os.environ.get("ZS_KERNELS_CHECKED") != "1":
        return
    chosen = index if mask is None else index[mask]
    if chosen.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(chosen))
    if low < 0 or high >= limit:
        raise IndexError(f"{op}: argument '{argument}' must hold values in [0, {limit}), got values in [{low}, {high}]")


def require_positive(op: str, argument: str, value: float | Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Raise unless a number is above 0 (a tensor: of `shape`; its values are not read)."""
    if isinstance(value, Tensor):
        require(tuple(value.shape) == shape, op, argument, f"a number or a tensor of shape {list(shape or ())}", value)
        return
    require(isinstance(value, int | float) and value > 0, op, argument, "a number above 0", value)


def require_number(
    op: str, argument: str, value: object, *, low: float = -math.inf, high: float = math.inf, integer: bool = False
) -> None:
    """Raise unless `value` is a number (an int, with `integer`) in [low, high]; NaN is in no such range."""
    kind = int if integer else (int, float)
    if isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high:  # type: ignore[operator]
        return
    wanted = "a whole number" if integer else "a number"
    bounds = f" from {low} to {high}" if high < math.inf else f" of at least {low}" if low > -math.inf else ""
    require(False, op, argument, wanted + bounds, value)
