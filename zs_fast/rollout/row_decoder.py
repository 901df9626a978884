"""A decoder's forward for sampling on a CPU, over the module's own weights: no padding, no blocks, few calls a layer.

It computes what transformers' module computes, by the row operators of zs_kernels.decoder_rows: a token's bits depend
on its own sequence alone. Nothing is copied; every forward reads the module's parameters as they are then. Hooks on
modules inside the layers are not called.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    ROW_DTYPES,
    LayerNorms,
    LayerWeights,
    Places,
    has_fast_rows,
    layer_by_pieces,
    layer_rows,
    linear_rows,
    norm_rows,
    silu_rows,
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
    inner = layer.base_layer if isinstance(layer, LoraLinear) else layer
    return type(inner) is nn.Linear


class RowDecoder:
    """One model's decoder and output head."""

    def __init__(self, model: PreTrainedModel, slots: KvSlots, vocab_size: int) -> None:
        assert not why_not(model)
        decoder: Any = model.get_decoder()
        self._decoder = decoder
        self._lm_head: Any = model.get_output_embeddings()
        self._slots = slots
        self._vocab_size = vocab_size
        self._eps = float(model.config.rms_norm_eps)
        self._head_dim = head_dim_of(model)
        self._layers: list[_Layer] = []
        self.find_modules()
        self._tables: tuple[Tensor, Tensor] | None = None

    def find_modules(self) -> None:
        """Look for the layers' modules again: an adapter that is attached or taken off replaces some."""
        self._layers = [_Layer(layer, self._eps) for layer in self._decoder.layers]

    def logits(self, input_ids: Tensor, slots: Tensor, positions: Tensor, due: Tensor) -> Tensor:
        """[R, vocabulary] after the tokens `due` [R] of the T tokens `input_ids` [T]; their keys and values are in the
        slots then. slots, positions: [T] int64, those of one sequence in rising order."""
        hidden: Tensor = self._decoder.embed_tokens(input_ids)
        cos, sin = self._rotary_tables(hidden)
        keys, values = self._slots.keys, self._slots.values
        assert keys is not None and values is not None
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            places = Places(cos, sin, slots, positions, keys[index], values[index])
            hidden = layer.forward(hidden, places, due if index == last else None)  # what follows is read of these only
        hidden = norm_rows(hidden, self._decoder.norm.weight, self._eps)
        if isinstance(self._lm_head, LoraLinear):
            return _linear(self._lm_head, hidden)[:, : self._vocab_size]
        bias = self._lm_head.bias
        return linear_rows(
            hidden, self._lm_head.weight[: self._vocab_size], None if bias is None else bias[: self._vocab_size]
        )

    def _rotary_tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, head_dim / 2] of every position that a slot can hold, as the module computes them."""
        if self._tables is None:
            positions = torch.arange(self._slots.max_capacity)[None]
            cos, sin = self._decoder.rotary_emb(like, positions)
            half = self._head_dim // 2
            self._tables = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return self._tables


class _Layer:
    """A layer's modules; their parameters are read at every forward."""

    def __init__(self, layer: Any, eps: float) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._eps, self._scale = eps, float(attention.scaling)
        self._input_norm, self._post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._q_norm, self._k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        parts = {"q": attention, "k": attention, "v": attention, "o": attention, "gate": mlp, "up": mlp, "down": mlp}
        self._linears: dict[str, Any] = {name: getattr(part, f"{name}_proj") for name, part in parts.items()}
        self._has_adapter = any(isinstance(linear, LoraLinear) for linear in self._linears.values())

    def forward(self, x: Tensor, places: Places, due: Tensor | None) -> Tensor:
        """[R, H] by one operator; where there is an adapter by one for each piece, and two more for each adapter."""
        norms = LayerNorms(
            input=self._input_norm.weight,
            q=None if self._q_norm is None else self._q_norm.weight,
            k=None if self._k_norm is None else self._k_norm.weight,
            post=self._post_norm.weight,
        )
        if self._has_adapter:
            return layer_by_pieces(
                x, norms, self._product, self._gated, places, eps=self._eps, scale=self._scale, due=due
            )
        linears = self._linears
        weights = LayerWeights(
            input_norm=norms.input,
            q=linears["q"].weight,
            q_bias=linears["q"].bias,
            k=linears["k"].weight,
            k_bias=linears["k"].bias,
            v=linears["v"].weight,
            v_bias=linears["v"].bias,
            q_norm=norms.q,
            k_norm=norms.k,
            o=linears["o"].weight,
            o_bias=linears["o"].bias,
            post_norm=norms.post,
            gate=linears["gate"].weight,
            up=linears["up"].weight,
            down=linears["down"].weight,
        )
        return layer_rows(x, weights, places, eps=self._eps, scale=self._scale, due=due)

    def _product(self, name: str, x: Tensor, out: Tensor | None = None) -> Tensor:
        return _linear(self._linears[name], x, out)

    def _gated(self, x: Tensor) -> Tensor:
        gate, up = self._linears["gate"], self._linears["up"]
        if not isinstance(gate, LoraLinear) and not isinstance(up, LoraLinear):
            return linear_rows(x, up.weight, gate=gate.weight)
        gates = _linear(gate, x)
        return silu_rows(gates, _linear(up, x), out=gates)


def _linear(layer: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
    """[M, N], added to `out` where one is given."""
    plain = layer.base_layer if isinstance(layer, LoraLinear) else layer
    out = linear_rows(x, plain.weight, plain.bias, out=out, add=out is not None)
    if isinstance(layer, LoraLinear) and layer.is_on:
        linear_rows(linear_rows(x, layer.lora_A.weight), layer.lora_B.weight, out=out, add=True)
    return out
