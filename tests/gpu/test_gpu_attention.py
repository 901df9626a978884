"""Every installed variable-length kernel against one call of torch's attention per sequence, on the card; and Liger's
layers against transformers' own."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("transformers")  # `scripts/gpu.sh ops` runs without it too

from zs_fast.models import liger
from zs_fast.models.attention import PackedAttention
from zs_fast.models.varlen import DOORS, choose
from zs_fast.testing import tiny_model

LENGTHS = [1, 33, 700, 128, 2049]
BOUNDS = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]


SHARED = 600
"""Tokens that the last two segments begin with alike with the third."""


def prefixes():
    """PackedAttention's arguments where the third segment's beginning is computed once."""
    rows, computed = list(range(BOUNDS[3])), [*BOUNDS[:4]]
    for length in (100, SHARED):
        number = LENGTHS[len(computed) - 1] - length
        rows += [*range(BOUNDS[2], BOUNDS[2] + length), *range(computed[-1], computed[-1] + number)]
        computed.append(computed[-1] + number)
    return {"rows": torch.tensor(rows, device="cuda"), "computed_cu_seqlens": computed}


def outputs_and_gradients(door, heads, kv_heads, head_dim, dtype, shared):
    draws = torch.Generator(device="cuda").manual_seed(0)
    inputs = [
        torch.randn(
            1,
            shared["computed_cu_seqlens"][-1] if shared else BOUNDS[-1],
            number,
            head_dim,
            generator=draws,
            device="cuda",
        )
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for number in (heads, kv_heads, kv_heads)
    ]
    output = PackedAttention(BOUNDS, door, **shared).attend(0, *inputs, head_dim**-0.5)
    weights = torch.randn(output.shape, generator=draws, device="cuda").to(dtype)
    return [output, *torch.autograd.grad(output, inputs, weights)]


@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(9, 3, 64), (16, 2, 128), (8, 8, 96), (4, 1, 256)])
@pytest.mark.parametrize("shares", [False, True])
def test_door_agrees_with_per_segment(shares, door, dtype, heads, kv_heads, head_dim):
    if DOORS[door].missing:
        pytest.skip(DOORS[door].missing)
    assert choose(door, torch.device("cuda", 0), dtype, head_dim).name == door
    shared = prefixes() if shares else {}
    found = outputs_and_gradients(door, heads, kv_heads, head_dim, dtype, shared)
    expected = outputs_and_gradients("per_segment", heads, kv_heads, head_dim, dtype, shared)
    for one, other in zip(found, expected, strict=True):
        error = torch.linalg.vector_norm((one - other).float()) / torch.linalg.vector_norm(other.float())
        assert error < 2e-2


@pytest.mark.parametrize("door", list(DOORS))
def test_a_model_runs_through_the_door(door):
    if DOORS[door].missing:
        pytest.skip(DOORS[door].missing)
    model = tiny_model("qwen2").model.to("cuda", torch.bfloat16)
    ids = torch.randint(0, 259, (1, BOUNDS[-1]), device="cuda")
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].cuda()

    def hidden(name):
        state = PackedAttention(BOUNDS, name)
        return model.model(
            input_ids=ids, position_ids=positions, use_cache=False, attention_state=state
        ).last_hidden_state

    found, expected = hidden(door).float(), hidden("per_segment").float()
    assert torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected) < 2e-2


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_liger_layers_agree_with_those_of_transformers(kind, dtype, tolerance, monkeypatch):
    if reason := liger.missing():
        pytest.skip(reason)
    model = tiny_model(kind).model.to("cuda", dtype)
    modeling = sys.modules[type(model).__module__]
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)
    ids = torch.randint(0, 259, (1, BOUNDS[-1]), device="cuda")
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].cuda()

    def results():
        model.zero_grad()
        state = PackedAttention(BOUNDS, "per_segment")
        output = model.model(input_ids=ids, position_ids=positions, use_cache=False, attention_state=state)
        output.last_hidden_state.float().square().sum().backward()
        return [output.last_hidden_state.detach(), *(p.grad.clone() for p in model.model.parameters())]

    expected = results()
    liger.fuse_layers(model)
    for one, other in zip(results(), expected, strict=True):
        assert torch.linalg.vector_norm((one - other).float()) <= tolerance * torch.linalg.vector_norm(other.float())
