"""Frozen base weights in 4 bits (nf4, arXiv:2305.14314), for adapters on the smallest cards.

The linear layers inside the decoder layers are packed; embedding, head and norms stay as they are. bitsandbytes does
the packing and the products, on GPUs and CPUs. A packed model is another model: its reference is itself without the
adapter.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from typing import Any

import torch
from torch import nn

from zs_fast.errors import PreflightError

BLOCK = 64
"""Weights that share a scale."""


def quantize_base(model: nn.Module, *, device: torch.device) -> None:
    """Pack the linear layers of `model` in place and move the model to `device`, layer by layer.

    Adapters that are on it stay as they are. Raises PreflightError where bitsandbytes is not installed.
    """
    library = bitsandbytes("model.quantization = 'nf4'", "leave model.quantization out")
    for name, layer in packable(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _packed(layer, library, device))
    model.to(device)


def bitsandbytes(setting: str, otherwise: str) -> Any:
    """The bitsandbytes module. PreflightError that names the setting that needs it, and the way without it, where it is
    not installed.

    On import it would fetch a compiled kernel from a hub, where the package `kernels` is installed. Here nothing is
    downloaded and nobody's binary is run that was not installed on purpose: it finds no such package.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PreflightError(
            f"{setting} needs bitsandbytes, which is not installed: pip install bitsandbytes, or {otherwise}."
        )
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    hub_kernels = sys.modules.get("kernels")
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    sys.modules["kernels"] = None  # type: ignore[assignment]
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if hub_kernels is not None:
            sys.modules["kernels"] = hub_kernels


def packable(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers inside the decoder layers by name; an adapter's own are not among them."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and ".layers." in f".{name}" and ".lora_" not in name
    }


def is_quantized(model: nn.Module) -> bool:
    """Does the model hold packed weights?"""
    return any(parameter.dtype == torch.uint8 for parameter in model.parameters())


def _packed(layer: nn.Linear, library: Any, device: torch.device) -> nn.Module:
    packed: Any = library.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    weight = layer.weight.detach()
    packed.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=BLOCK)
    if layer.bias is not None:
        packed.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    moved: nn.Module = packed.to(device)
    return moved
