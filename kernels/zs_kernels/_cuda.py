"""The CUDA operators of `_ops_cuda.so`: what CUDA C++ can do and Triton cannot.

One so far: `linear_policy_loss`'s pass over a chunk of logits with one read and one write of device memory, by blocks
that share a row through distributed shared memory (csrc/cuda/policy_rows.cu). It has not been measured yet, so the
Triton kernel is what runs unless ZS_KERNELS_CUDA=1 is set.
"""

from __future__ import annotations

import contextvars
import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zs_kernels._device import NativeStatus
from zs_kernels._policy_terms import PolicyLossSettings, policy_terms_arguments

OPS_FILE = Path(__file__).with_name("_ops_cuda.so")
ROW_BYTES = 16
"""What rows must be aligned to."""
MOST_COLUMNS = 8 * (224 << 10) // 2
"""bfloat16 logits of a row that eight blocks can keep."""


_wanted: contextvars.ContextVar[bool | None] = contextvars.ContextVar("zs_kernels_cuda", default=None)


@functools.cache
def cuda_status() -> NativeStatus:
    """Whether the CUDA operators are loaded; the first call loads them."""
    if not OPS_FILE.is_file():
        return NativeStatus(False, "_ops_cuda.so was not built: `ZS_CUDA=1 pip install -e .` with nvcc on the PATH")
    try:
        torch.ops.load_library(str(OPS_FILE))
    except OSError as error:
        return NativeStatus(False, f"_ops_cuda.so does not load in torch {torch.__version__} ({error})")
    return NativeStatus(True, f"CUDA operators: {OPS_FILE.name}")


@contextmanager
def use_cuda(wanted: bool) -> Iterator[None]:
    """Whether the CUDA operators run in this block (of this thread or task), whatever ZS_KERNELS_CUDA says."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def asked_for() -> bool:
    """As `use_cuda` says, else whether ZS_KERNELS_CUDA=1 is set."""
    wanted = _wanted.get()
    return os.environ.get("ZS_KERNELS_CUDA") == "1" if wanted is None else wanted


def takes(logits: Tensor, out: Tensor, bias: Tensor | None, softcap: float | None) -> bool:
    """Whether `policy_rows` can work on this chunk; nothing is waited for."""
    return (
        logits.is_cuda
        and asked_for()
        and cuda_status().available
        and bias is None
        and not softcap
        and logits.shape[1] <= MOST_COLUMNS
        and all(_aligned(tensor) for tensor in (logits, out))
        and torch.cuda.get_device_capability(logits.device) >= (9, 0)
    )


def _aligned(rows: Tensor) -> bool:
    row_bytes = rows.stride(0) * rows.element_size()
    return (
        rows.dtype == torch.bfloat16
        and rows.stride(1) == 1
        and rows.data_ptr() % ROW_BYTES == 0
        and row_bytes % ROW_BYTES == 0
    )


def policy_rows(
    logits: Tensor,
    out: Tensor,
    index: Tensor,
    inverse: float | Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    gradient_scale: Tensor | None,
    settings: PolicyLossSettings,
    *,
    blocks: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, logsumexps, entropies [M]) of logits [M, V]; out [M, V] <- the loss's gradient by them.

    `takes` has said yes. out may be `logits`. blocks: thread blocks that share a row (1, 2, 4, 8; 0: as few as leave
    room for two on a multiprocessor). Raises RuntimeError where the launch fails.
    """

    def column(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.float().contiguous()

    by_row = isinstance(inverse, Tensor)
    return torch.ops.zs_native.policy_rows(
        logits,
        out,
        index.long().contiguous(),
        column(inverse) if by_row else None,
        1.0 if by_row else float(inverse),
        column(old_logprobs),
        column(advantages),
        column(weights),
        column(ref_logprobs),
        column(importance_weights),
        None if gradient_scale is None else column(gradient_scale.reshape(1)),
        *settings_arguments(settings, has_ref=ref_logprobs is not None).values(),
        blocks,
        torch.cuda.current_stream(logits.device).cuda_stream,
    )


def settings_arguments(settings: PolicyLossSettings, *, has_ref: bool) -> dict[str, Any]:
    """The numbers of the settings by the operator's names and in its order; a bound that does not apply is infinite."""
    has_entropy = settings.entropy_coefficient != 0.0
    given = policy_terms_arguments(settings, has_ref=has_ref, has_entropy=has_entropy, has_importance=False)
    return {
        "form": given["FORM"],
        "ratio_low": given["ratio_low"],
        "ratio_high": given["ratio_high"],
        "dual_clip": given["dual_clip"] if given["DUAL_CLIP"] else math.inf,
        "ratio_cap": given["ratio_cap"] if given["RATIO_CAP"] else math.inf,
        "min_log_ratio": given["min_log_ratio"],
        "max_log_ratio": given["max_log_ratio"],
        "kl_coefficient": given["kl_coefficient"] if has_ref else 0.0,
        "kl_estimator": given["KL"],
        "kl_straight_through": given["STRAIGHT_THROUGH"],
        "kl_bound": given["kl_bound"],
        "kl_output_bound": given["kl_output_bound"],
        "entropy_coefficient": given["entropy_coefficient"],
    }
