"""Liger's fused layers in loaded models: RMSNorm, SwiGLU and the rotary embedding. Never its loss, which is ours.

Each norm and MLP of a model gets a subclass of its own class, so that copies of the model (`same_base`) and adapters on
its linear layers work as before; norms of queries and keys are included. Tensors on a CPU go the old way, bit for bit.
Not measured here on a GPU.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zs_fast.errors import PreflightError

FUNCTIONS = "liger_kernel.transformers.functional"
INSTALL = "pip install liger-kernel"


class _Setting:
    """The process's, like its number of threads."""

    is_on = False


def use_liger(wanted: str, device: torch.device) -> bool:
    """From now on models are loaded with fused layers, or not (`model.liger`: auto, on, off).

    `auto` takes them on CUDA where the package is. Raises PreflightError where `on` can't be had.
    """
    _Setting.is_on = False
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return False
    reason = missing() if device.type == "cuda" else f"Liger's kernels run on CUDA only, and model.device is {device}"
    if reason and wanted == "on":
        raise PreflightError(f"model.liger is 'on', but {reason}. Set model.liger = 'auto', or run `{INSTALL}`.")
    _Setting.is_on = not reason
    return _Setting.is_on


def missing() -> str:
    """Why the package can't be used here; empty where it can."""
    try:
        importlib.import_module(FUNCTIONS)
    except ModuleNotFoundError as error:
        return f"no module {error.name} is installed"
    except (ImportError, OSError, RuntimeError) as error:
        return f"{FUNCTIONS} can't be imported: {str(error).strip().splitlines()[0][:200]}"
    return ""


def fuse_if_on(model: nn.Module) -> None:
    """`fuse_layers` where `use_liger` said so."""
    if _Setting.is_on:
        fuse_layers(model)


def fuse_layers(model: nn.Module) -> None:
    """Give a decoder's norms, MLPs and rotary embedding Liger's kernels, in place.

    The rotary embedding is a function of transformers' module, so there it serves every model of this architecture.
    """
    functions = importlib.import_module(FUNCTIONS)
    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm"):
            module.__class__ = _fused(kind, functions, _norm)
        elif kind.__name__.endswith("MLP") and isinstance(module.act_fn, nn.SiLU | _silu_of_transformers()):
            module.__class__ = _fused(kind, functions, _mlp)
    modeling: Any = sys.modules[type(model).__module__]
    if not hasattr(modeling.apply_rotary_pos_emb, "without_liger"):
        modeling.apply_rotary_pos_emb = _rotary(modeling.apply_rotary_pos_emb, functions)


def _silu_of_transformers() -> type[nn.Module]:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


@functools.cache
def _fused(kind: type[nn.Module], functions: Any, make: Callable[[Any], Callable[[Any, Tensor], Tensor]]) -> Any:
    """A subclass of `kind`, of the same name, whose forward is Liger's on a GPU."""
    if hasattr(kind, "without_liger"):
        return kind
    fast = make(functions)

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return fast(self, hidden) if _on_gpu(hidden) else kind.forward(self, hidden)

    names = {"forward": forward, "without_liger": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names)


def _norm(functions: Any) -> Callable[[Any, Tensor], Tensor]:
    def norm(self: Any, hidden: Tensor) -> Tensor:
        # `llama`: statistics in float32, the product with the weight in the weight's type, as transformers has it.
        # Not in place: what arrives on the way back may be used elsewhere too.
        result: Tensor = functions.liger_rms_norm(hidden, self.weight, self.variance_epsilon, 0.0, "llama", False)
        return result

    return norm


def _mlp(functions: Any) -> Callable[[Any, Tensor], Tensor]:
    def mlp(self: Any, hidden: Tensor) -> Tensor:
        result: Tensor = self.down_proj(functions.liger_swiglu(self.gate_proj(hidden), self.up_proj(hidden)))
        return result

    return mlp


def _rotary(plain: Callable[..., Any], functions: Any) -> Callable[..., Any]:
    @functools.wraps(plain)
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if _on_gpu(q):
            return functions.liger_rope(q, k, cos, sin, None, unsqueeze_dim)
        return plain(q, k, cos, sin, unsqueeze_dim)

    rotary.without_liger = plain  # type: ignore[attr-defined]
    return rotary


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
