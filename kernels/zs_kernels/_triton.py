"""Triton, or stand-ins where it is not installed: the kernels are then defined all the same and never launched.

Op files write `from zs_kernels._triton import INTERPRETED, tl, triton` and decorate as usual.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    AVAILABLE = False

    def _undecorated(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return (lambda given: given) if function is None else function

    triton: Any = SimpleNamespace(jit=_undecorated, cdiv=lambda a, b: -(-a // b))  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=object)  # type: ignore[no-redef]
else:
    AVAILABLE = True

INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run as numpy code on CPU tensors. Triton reads the variable when it decorates a kernel: set it first."""
