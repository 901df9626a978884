"""Modes that watch what happens inside our registered operators, which torch shows as one operation each."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode


def opened(mode: TorchDispatchMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation; of ours run the body under the mode, too, which otherwise sees them as one operation."""
    if func.namespace != "zs_kernels":
        return func(*args, **kwargs)
    with mode:
        return OPDEFS[func.name().removesuffix(".default")]._init_fn(*args, **kwargs)


class Products(TorchDispatchMode):
    """Counts matrix products of at least `size` multiplications, and the largest tensor made."""

    def __init__(self, size: int = 6 * 5 * 700) -> None:
        super().__init__()
        self.size, self.count, self.largest = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = opened(self, func, args, kwargs or {})
        if func.overloadpacket.__name__ in ("mm", "matmul", "addmm", "addmm_"):
            operands = [a for a in args if isinstance(a, Tensor)][-2:]
            self.count += operands[0].numel() * operands[1].shape[1] >= self.size
        made = result if isinstance(result, tuple | list) else (result,)
        self.largest = max([self.largest, *(t.numel() for t in made if isinstance(t, Tensor))])
        return result


class Made(TorchDispatchMode):
    """Where tensors of one size lie."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.places: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = opened(self, func, args, kwargs or {})
        if isinstance(result, Tensor) and result.numel() == self.elements:
            self.places.add(result.untyped_storage().data_ptr())
        return result
