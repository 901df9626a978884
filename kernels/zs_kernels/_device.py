"""Where an op runs: the one dispatch rule, and what of the compiled part is there.

`_ops.so` holds the CPU operators. It is looked for beside this file, loaded once, and its absence is a normal state:
every op then runs its torch reference.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

OPS_FILE = Path(__file__).with_name("_ops.so")


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
    return NativeStatus(True, f"C++ operators for the CPU: {OPS_FILE.name}")


def runs_native(*tensors: Tensor) -> bool:
    """True if the C++ operator takes these tensors: all on the CPU, none needs a gradient, the library is loaded."""
    if any(tensor.device.type != "cpu" or tensor.requires_grad for tensor in tensors):
        return False
    return native_status().available
