"""A decoder's forward for sampling on a CPU, over the module's own weights: no padding, no blocks, few calls a layer.

It computes what transformers' module computes, by the row operators of zs_kernels.decoder_rows: a token's bits depend
on its own sequence alone. Nothing is copied; every forward reads the module's parameters as they are then. One that is
replaced, rather than written to, is seen once weights are published: until then models are taken to share what they
shared. Hooks on modules inside the layers are not called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from zs_fast.models.lora import LoraLinear
from zs_fast.rollout.kv_slots import KvSlots
from zs_kernels.decoder_rows import (
    NO_ADAPTERS,
    ROW_DTYPES,
    Adapter,
    Adapters,
    LayerWeights,
    Places,
    Tenant,
    add_adapter,
    has_fast_rows,
    layer_rows,
    linear_rows,
    norm_rows,
)

DECODERS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
LANES = 16
"""head_dim must be a multiple of it."""


def why_not(model: PreTrainedModel) -> str:
    """Why `model` can't be computed by RowDecoder; empty where it can."""
    decoder: Any = model.get_decoder()
    if not isinstance(decoder, DECODERS):
        return f"its decoder is a {type(decoder).__name__}"
    if any(p.device.type != "cpu" for p in model.parameters()):
        return "it is not on the CPU"
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(ROW_DTYPES):
        return f"its parameters are {', '.join(sorted(map(str, dtypes)))}"
    if head_dim_of(model) % LANES:
        return f"head_dim is {head_dim_of(model)}, no multiple of {LANES}"
    if model.config.hidden_act != "silu":
        return f"its activation is {model.config.hidden_act}"
    if bad := [name for name, layer in _linears(model) if not _is_plain(layer)]:
        return f"{bad[0]} is no plain linear layer"
    if any(
        layer.mlp.gate_proj.bias is not None for layer in decoder.layers if isinstance(layer.mlp.gate_proj, nn.Linear)
    ):
        return "its MLP has biases"
    return "" if has_fast_rows() else "the C++ operators are not built, or the processor has no AVX2"


def head_dim_of(model: PreTrainedModel) -> int:
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    decoder: Any = model.get_decoder()
    for index, layer in enumerate(decoder.layers):
        for part in (layer.self_attn, layer.mlp):
            yield from (
                (f"layers.{index}.{name}", one) for name, one in part.named_children() if name.endswith("_proj")
            )
    yield "lm_head", model.get_output_embeddings()


def _is_plain(layer: nn.Module) -> bool:
    return type(_plain(layer)) is nn.Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderRows:
    """The next tokens of one model: ids, slots and positions, those of one sequence in rising order. `due` are the
    places among them after which logits are wanted."""

    decoder: RowDecoder
    input_ids: list[int]
    slots: list[int]
    positions: list[int]
    due: list[int]


class RowDecoder:
    """One model's decoder and output head."""

    def __init__(self, model: PreTrainedModel, slots: KvSlots, vocab_size: int) -> None:
        assert not why_not(model)
        decoder: Any = model.get_decoder()
        self._model = model
        self._decoder = decoder
        self._slots = slots
        self._vocab_size = vocab_size
        self._eps = float(model.config.rms_norm_eps)
        self._head_dim = head_dim_of(model)
        self._layers: list[_Layer]
        self._lm_head: Any
        self.find_modules()
        self._tables: tuple[Tensor, Tensor] | None = None

    def find_modules(self) -> None:
        """Look for the layers' modules again: an adapter that is attached or taken off replaces some."""
        self._layers = [_Layer(layer) for layer in self._decoder.layers]
        self._lm_head = self._model.get_output_embeddings()

    def stands_on_the_base_of(self, other: RowDecoder) -> bool:
        """Do both read the very same weights, but for adapters (`lora.same_base`)? Then one forward does for both."""
        if len(self._layers) != len(other._layers) or self._numbers() != other._numbers():
            return False
        return all(mine is its for mine, its in zip(self._base(), other._base(), strict=True))

    def _numbers(self) -> tuple[float, ...]:
        return (self._eps, *(layer.scale for layer in self._layers))

    def _base(self) -> Iterator[Tensor | None]:
        yield from (self._decoder.embed_tokens.weight, self._decoder.norm.weight)
        yield from (_plain(self._lm_head).weight, _plain(self._lm_head).bias)
        for layer in self._layers:
            yield from layer.weights()

    def _tenant(self, index: int, tokens: int, slots: Tensor, positions: Tensor) -> Tenant:
        cos, sin = self._rotary_tables()
        keys, values = self._slots.keys, self._slots.values
        assert keys is not None and values is not None
        places = Places(cos, sin, slots, positions, keys[index], values[index])
        return Tenant(tokens, places, self._layers[index].adapters())

    def _adapted_logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """[R, own vocabulary] from those of the base."""
        logits = logits[:, : self._vocab_size]
        if not isinstance(self._lm_head, LoraLinear) or not self._lm_head.is_on:
            return logits
        a, b = _adapter(self._lm_head)
        return add_adapter(hidden, Adapter(a, b[: self._vocab_size]), logits)

    def _rotary_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, head_dim / 2] of every position that a slot can hold, as the module computes them."""
        if self._tables is None:
            positions = torch.arange(self._slots.max_capacity)[None]
            cos, sin = self._decoder.rotary_emb(self._decoder.norm.weight, positions)  # of that type
            half = self._head_dim // 2
            self._tables = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return self._tables


def logits_of(rows: Sequence[DecoderRows]) -> list[Tensor]:
    """For each of `rows` [R, vocabulary] after its tokens that are due; keys and values of all tokens are in the slots
    then. All stand on the same base, which every token passes in one forward."""
    first = rows[0].decoder
    ids, slots, positions = torch.tensor(
        [
            [token for one in rows for token in one.input_ids],
            [slot for one in rows for slot in one.slots],
            [position for one in rows for position in one.positions],
        ]
    )
    counts = [len(one.input_ids) for one in rows]
    starts = [0, *accumulate(counts)]
    due = torch.tensor(
        [start + place for start, one in zip(starts, rows, strict=False) for place in one.due], dtype=torch.int64
    )
    own_slots, own_positions = slots.split(counts), positions.split(counts)
    hidden: Tensor = first._decoder.embed_tokens(ids)
    last = len(first._layers) - 1
    for index, layer in enumerate(first._layers):
        tenants = [
            one.decoder._tenant(index, *of_one)
            for one, *of_one in zip(rows, counts, own_slots, own_positions, strict=True)
        ]
        passing = due if index == last else None  # what follows is read of these only
        hidden = layer_rows(hidden, layer.weights(), tenants, eps=first._eps, scale=layer.scale, due=passing)
    hidden = norm_rows(hidden, first._decoder.norm.weight, first._eps)
    head, size = _plain(first._lm_head), max(one.decoder._vocab_size for one in rows)
    logits = linear_rows(hidden, head.weight[:size], None if head.bias is None else head.bias[:size])
    due_counts = [len(one.due) for one in rows]
    found = zip(rows, hidden.split(due_counts), logits.split(due_counts), strict=True)
    return [one.decoder._adapted_logits(of_one, logits_of_one) for one, of_one, logits_of_one in found]


class _Layer:
    """A layer's modules; their parameters are read at every forward."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.scale = float(attention.scaling)
        self._input_norm, self._post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._q_norm, self._k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        parts = {"q": attention, "k": attention, "v": attention, "o": attention, "gate": mlp, "up": mlp, "down": mlp}
        found: dict[str, Any] = {name: getattr(part, f"{name}_proj") for name, part in parts.items()}
        self._linears = {name: _plain(linear) for name, linear in found.items()}
        self._adapted = {name: linear for name, linear in found.items() if isinstance(linear, LoraLinear)}

    def weights(self) -> LayerWeights:
        linears = self._linears
        return LayerWeights(
            input_norm=self._input_norm.weight,
            q=linears["q"].weight,
            q_bias=linears["q"].bias,
            k=linears["k"].weight,
            k_bias=linears["k"].bias,
            v=linears["v"].weight,
            v_bias=linears["v"].bias,
            q_norm=None if self._q_norm is None else self._q_norm.weight,
            k_norm=None if self._k_norm is None else self._k_norm.weight,
            o=linears["o"].weight,
            o_bias=linears["o"].bias,
            post_norm=self._post_norm.weight,
            gate=linears["gate"].weight,
            up=linears["up"].weight,
            down=linears["down"].weight,
        )

    def adapters(self) -> Adapters:
        on = {name: _adapter(linear) for name, linear in self._adapted.items() if linear.is_on}
        return Adapters(**on) if on else NO_ADAPTERS


def _plain(linear: Any) -> Any:
    return linear.base_layer if isinstance(linear, LoraLinear) else linear


def _adapter(linear: LoraLinear) -> Adapter:
    return Adapter(linear.lora_A.weight, linear.lora_B.weight)
