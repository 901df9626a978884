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
    LayerWeights,
    attend_rows,
    has_fast_rows,
    layer_rows,
    linear_rows,
    norm_rows,
    rotate_rows,
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
            pass_on = layer.adapted if layer.has_adapter else layer.plain
            hidden = pass_on(
                hidden,
                cos,
                sin,
                slots=slots,
                positions=positions,
                keys=keys[index],
                values=values[index],
                due=due if index == last else None,  # what follows is read of these tokens only
            )
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
        self._q, self._k, self._v, self._o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        self._q_norm, self._k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._gate, self._up, self._down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        linears = (self._q, self._k, self._v, self._o, self._gate, self._up, self._down)
        self.has_adapter = any(isinstance(linear, LoraLinear) for linear in linears)

    def plain(self, x: Tensor, cos: Tensor, sin: Tensor, *, due: Tensor | None, **places: Tensor) -> Tensor:
        """By one operator."""
        weights = LayerWeights(
            input_norm=self._input_norm.weight,
            q=self._q.weight,
            q_bias=self._q.bias,
            k=self._k.weight,
            k_bias=self._k.bias,
            v=self._v.weight,
            v_bias=self._v.bias,
            q_norm=None if self._q_norm is None else self._q_norm.weight,
            k_norm=None if self._k_norm is None else self._k_norm.weight,
            o=self._o.weight,
            o_bias=self._o.bias,
            post_norm=self._post_norm.weight,
            gate=self._gate.weight,
            up=self._up.weight,
            down=self._down.weight,
        )
        return layer_rows(x, weights, cos, sin, eps=self._eps, scale=self._scale, due=due, **places)

    def adapted(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        slots: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        due: Tensor | None,
    ) -> Tensor:
        """By one operator for each piece, and two more for each adapter."""
        normed = norm_rows(x, self._input_norm.weight, self._eps)
        q, k, v = (_linear(linear, normed) for linear in (self._q, self._k, self._v))
        rotate_rows(
            q,
            k,
            v,
            cos,
            sin,
            slots=slots,
            positions=positions,
            keys=keys,
            values=values,
            q_norm=None if self._q_norm is None else self._q_norm.weight,
            k_norm=None if self._k_norm is None else self._k_norm.weight,
            eps=self._eps,
        )
        if due is not None:
            q, x, slots, positions = q[due], x[due], slots[due], positions[due]
        mixed = attend_rows(q, keys, values, slots=slots, positions=positions, scale=self._scale)
        hidden = _linear(self._o, mixed, x.clone(), add=True)
        normed = norm_rows(hidden, self._post_norm.weight, self._eps)
        return _linear(self._down, _gated(self._gate, self._up, normed), hidden, add=True)


def _linear(layer: Any, x: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
    if not isinstance(layer, LoraLinear):
        return linear_rows(x, layer.weight, layer.bias, out=out, add=add)
    out = linear_rows(x, layer.base_layer.weight, layer.base_layer.bias, out=out, add=add)
    if layer.is_on:
        linear_rows(linear_rows(x, layer.lora_A.weight), layer.lora_B.weight, out=out, add=True)
    return out


def _gated(gate: Any, up: Any, x: Tensor) -> Tensor:
    if not isinstance(gate, LoraLinear) and not isinstance(up, LoraLinear):
        return linear_rows(x, up.weight, gate=gate.weight)
    gates = _linear(gate, x)
    return silu_rows(gates, _linear(up, x), out=gates)
