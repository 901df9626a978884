"""One call of each op's own Triton host function at full size: what `bench.ahead_of_time` compiles.

A call takes the number of tokens and makes its tensors on "cuda" (fake ones, see ahead_of_time). Each call stands for
one way a trainer uses the op; a kernel that no call reaches fails the ahead-of-time test.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zs_kernels

Call = Callable[[int], Any]

PACKAGE = Path(zs_kernels.__file__).parent
V = 151_936
"""Vocabulary of Qwen2.5 and Qwen3."""
H = 2048


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor on the GPU that is or is not there."""
    return torch.empty(shape, dtype=dtype, device="cuda")


CALLS: dict[str, Call] = {}


def jit_functions() -> set[Any]:
    """Every @triton.jit function of the package."""
    from triton.runtime.jit import JITFunction

    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        if "triton.jit" in file.read_text(encoding="utf-8"):
            name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
            values = vars(importlib.import_module(name)).values()
            found |= {one for one in values if isinstance(one, JITFunction) and one.fn.__module__ == name}
    return found


def called_by(function: Any) -> set[Any]:
    """The @triton.jit functions that one of them names in its body."""
    from triton.runtime.jit import JITFunction

    names = function.fn.__code__.co_names
    return {value for name in names if isinstance(value := function.fn.__globals__.get(name), JITFunction)}


def never_reached(launched: Iterable[Any]) -> list[str]:
    """A line for each @triton.jit function of the package that is neither launched nor called by one that is."""
    reached: set[Any] = set()
    queue = list(launched)
    while queue:
        function = queue.pop()
        if function not in reached:
            reached.add(function)
            queue += called_by(function)
    return [
        f"{function.fn.__module__}.{function.fn.__name__}: no call of bench/kernel_calls.py reaches this kernel"
        for function in sorted(jit_functions() - reached, key=lambda f: (f.fn.__module__, f.fn.__name__))
    ]
