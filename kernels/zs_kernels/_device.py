"""Where an op runs: the one dispatch rule, and what of the compiled part is there.

    float64 anywhere                     the torch reference
    every tensor on a GPU                Triton
    every tensor on the CPU              the C++ operators of `_ops.so`, or the torch reference where it was not built

`_ops.so` is looked for beside this file and loaded once; its absence is a normal state. `use_backend` overrules the
rule for tests and benchmarks.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from zs_kernels import _triton

Backend = Literal["reference", "native", "triton"]

OPS_FILE = Path(__file__).with_name("_ops.so")
NEWEST_OPERATOR = "layer_of_tenants"
"""The one that was added or changed its arguments last: a file without it is of older sources."""

_forced: contextvars.ContextVar[Backend | None] = contextvars.ContextVar("zs_kernels_backend", default=None)


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """Is the compiled part usable, and if not, why and what would add it."""

    available: bool
    reason: str


@functools.cache
def native_status() -> NativeStatus:
    """Whether the C++ CPU operators are loaded; the first call loads them."""
    if not OPS_FILE.is_file():
        return NativeStatus(
            False, "_ops.so was not built: install a C++ compiler and torch first, then run `pip install -e .` again"
        )
    try:
        torch.ops.load_library(str(OPS_FILE))
    except OSError as error:
        return NativeStatus(
            False, f"_ops.so does not load in torch {torch.__version__} ({error}): rebuild it with `pip install -e .`"
        )
    if not hasattr(torch.ops.zs_native, NEWEST_OPERATOR):
        return NativeStatus(False, "_ops.so was built from older sources: run `pip install -e .` again")
    return NativeStatus(True, f"C++ operators for the CPU: {OPS_FILE.name}")


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the ops of this block (of this thread or task) on one backend, whatever the rule says.

    Raises ValueError for an unknown name, RuntimeError where that backend is not installed.
    """
    if name not in get_args(Backend):
        raise ValueError(f"use_backend: argument 'name' must be one of {', '.join(get_args(Backend))}, got {name!r}")
    if name == "native" and not native_status().available:
        raise RuntimeError(f"use_backend: 'native' is not there: {native_status().reason}")
    if name == "triton" and not _triton.AVAILABLE:
        raise RuntimeError("use_backend: 'triton' is not there: `pip install triton`")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def backend_of(*tensors: Tensor | None) -> Backend:
    """The backend that an op takes for these tensors (None: an argument that was not given)."""
    on_cpu = on_cuda = True
    for tensor in tensors:  # one plain loop: small models on a CPU come by here tens of times for each token
        if tensor is None:
            continue
        if tensor.dtype == torch.float64:
            return "reference"
        on_cpu = on_cpu and tensor.is_cpu
        on_cuda = on_cuda and tensor.is_cuda
    if (forced := _forced.get()) is not None:
        return forced
    if on_cuda and _triton.AVAILABLE:
        return "triton"
    if on_cpu and native_status().available:
        return "native"
    return "reference"
