"""Low-rank adapters: y = W x + B (A x), with W frozen and A, B trained (arXiv:2106.09685).

The scaling alpha / r is folded into B, here and in whatever reads an adapter: B alone is what another sampler needs,
and its memory can be shared. Files are peft's (`adapter_config.json`, `adapter_model.safetensors`), with alpha = r.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zs_fast.errors import PreflightError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


UNSUPPORTED_FIELDS = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out", "target_parameters",
    "alora_invocation_tokens", "trainable_token_indices", "use_qalora",
)  # fmt: skip
"""What makes one of peft's adapters more than A and B on linear layers."""

Model = TypeVar("Model", bound=nn.Module)


class LoraLinear(nn.Module):
    """A linear layer with an adapter on it. `lora_A` is [r, in], `lora_B` [out, r] and starts at zero.

    The layer may hold packed weights (4 bits): the adapter is of the type that it computes in.
    """

    def __init__(self, base: Any, rank: int) -> None:
        super().__init__()
        weight: Tensor = base.weight
        dtype = weight.dtype if weight.is_floating_point() else getattr(base, "compute_dtype", None) or torch.float32
        # A base without values yet (on the meta device) gets them from the engine; an adapter always has its own.
        options: dict[str, Any] = {"bias": False, "dtype": dtype, "device": "cpu" if weight.is_meta else weight.device}
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, base.out_features, **options)
        self.is_on = True

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.base_layer(inputs)
        return output + self.lora_B(self.lora_A(inputs)) if self.is_on else output


def attach_adapter(model: nn.Module, rank: int, *, targets: Sequence[str] = TARGETS, seed: int = 0) -> None:
    """Freeze `model` and put a new adapter on every linear layer whose name ends with one of `targets`.

    A is drawn uniformly from +-1/sqrt(in), as peft draws it. Raises PreflightError where a target is on no layer.
    """
    layers = _linear_layers(model)
    found = {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in targets}
    missing = sorted(set(targets) - {name.rpartition(".")[2] for name in found})
    if missing or not found:
        raise PreflightError(f"The model has no linear layer called {', '.join(missing)}; adapters go on those it has.")
    generator = torch.Generator().manual_seed(seed)
    for layer in _wrap(model, found, rank):
        size = layer.lora_A.in_features
        values = (2.0 * torch.rand(rank, size, generator=generator) - 1.0) / math.sqrt(size)
        with torch.no_grad():
            layer.lora_A.weight.copy_(values)
            layer.lora_B.weight.zero_()


def attach_stored_adapter(model: nn.Module, folder: Path) -> None:
    """Freeze `model` and put the adapter of a peft folder on the layers that it was made for.

    Raises PreflightError where the model has no such layer, or one of another size.
    """
    tensors = read_adapter(folder)
    layers = _linear_layers(model)
    names = sorted({name.rpartition(".lora_")[0] for name in tensors})
    if missing := [name for name in names if name not in layers]:
        raise PreflightError(
            f"Adapter {str(folder)!r} is for {missing[0]}, a linear layer that the model does not have."
        )
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))
    _wrap(model, {name: layers[name] for name in names}, rank)
    load_adapter(model, tensors)


def _linear_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that an adapter can go on, by name; those with packed weights among them."""
    if adapter_rank(model):
        raise PreflightError(f"The model carries an adapter of rank {adapter_rank(model)} already.")
    return {name: m for name, m in model.named_modules() if hasattr(m, "in_features") and hasattr(m, "out_features")}


def _wrap(model: nn.Module, layers: Mapping[str, Any], rank: int) -> list[LoraLinear]:
    """Freeze `model` and put an adapter without values on `layers`."""
    model.requires_grad_(False)
    adapted = {name: LoraLinear(layer, rank) for name, layer in layers.items()}
    for name, layer in adapted.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return list(adapted.values())


def same_base(model: Model) -> Model:
    """Another module tree over the very parameters and buffers of `model`, without its adapter: no weight is copied.

    So several roles stand on one set of base weights, each in a tree of its own: as it is (the reference, a prompted
    simulator), or with its own adapter attached. The base stays frozen where an adapter was attached to `model`. Made
    after an engine that moves the weights into its own memory, which replaces the parameters of one tree only.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    tree = copy.deepcopy(model, shared)
    layers = [(name, layer) for name, layer in tree.named_modules() if isinstance(layer, LoraLinear)]
    for name, layer in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(tree.get_submodule(parent), leaf, layer.base_layer)
    return tree


def adapter_rank(model: nn.Module) -> int:
    """Rank of the adapter on `model`; 0 when there is none."""
    return next((m.lora_A.out_features for m in model.modules() if isinstance(m, LoraLinear)), 0)


def adapter_targets(model: nn.Module) -> tuple[str, ...]:
    """Last names of the layers that carry the adapter, in order of appearance."""
    names = (name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LoraLinear))
    return tuple(dict.fromkeys(names))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by name: `model.layers.0.self_attn.q_proj.lora_A.weight` and so on."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is its base: the weights as they were before any training."""
    layers = [m for m in model.modules() if isinstance(m, LoraLinear) and m.is_on]
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def is_adapter_folder(folder: Path) -> bool:
    """Does the folder hold a peft adapter?"""
    return (folder / CONFIG_FILE).is_file()


def base_of_adapter(folder: Path) -> str:
    """The model that a peft folder names as its base. Raises PreflightError where it names none."""
    config = _read_config(folder)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise PreflightError(
            f"Adapter {str(folder)!r}: its {CONFIG_FILE} names no base_model_name_or_path. Write the base model's "
            "folder there."
        )
    return base


def write_adapter(model: nn.Module, folder: Path, *, base: str) -> None:
    """Write the adapter of `model` as a peft folder that names `base` as the model it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = adapter_rank(model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _target_modules(model),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {PEFT_PREFIX + name: tensor.detach().contiguous() for name, tensor in adapter_tensors(model).items()}
    save_file(
        {name: tensor.cpu() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE, metadata={"format": "pt"}
    )


def _target_modules(model: nn.Module) -> list[str]:
    """Last names of the adapted layers; whole names where a layer of the same last name has no adapter."""
    adapted = {name for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    plain = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return sorted(adapted if plain & set(adapter_targets(model)) else adapter_targets(model))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of a peft folder, scaling folded into B, by the names of `adapter_tensors`.

    Raises PreflightError for missing or damaged files, and for adapters that are more than A and B.
    """
    config = _read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise PreflightError(f"Adapter {str(folder)!r} can't be read: {type(error).__name__}: {error}") from error
    for field in UNSUPPORTED_FIELDS:
        if config.get(field):
            raise PreflightError(f"Adapter {str(folder)!r} uses {field}, which is not supported; plain LoRA is.")
    if rank < 1 or not tensors:
        raise PreflightError(
            f"Adapter {str(folder)!r} has rank {rank} and {len(tensors)} tensors: there is none in it."
        )
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise PreflightError(f"Adapter {str(folder)!r} holds {key}, which is neither an A nor a B of plain LoRA.")
        named[name] = (tensor.float() * scaling).to(tensor.dtype) if name.endswith(".lora_B.weight") else tensor
    return named


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise PreflightError(f"Adapter {str(folder)!r} can't be read: {type(error).__name__}: {error}") from error
    if not isinstance(config, dict):
        raise PreflightError(f"Adapter {str(folder)!r}: its {CONFIG_FILE} holds no JSON object.")
    return config


def load_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the adapter that `model` carries. PreflightError unless names and shapes are the same."""
    ours = adapter_tensors(model)
    for name in sorted(ours.keys() | tensors.keys()):
        if name not in ours or name not in tensors or ours[name].shape != tensors[name].shape:
            raise PreflightError(
                f"The adapter's {name} does not fit the one on the model: another rank or other layers."
            )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(tensors[name])
