"""Liger's layers in our models: every norm, MLP and rotary embedding, on a GPU only, and with what Liger documents.

Its kernels need a GPU: stand-ins with its signatures compute what they document; tests/gpu holds the real ones.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import types

import pytest
import torch
from torch import nn

from zs_fast.errors import PreflightError
from zs_fast.models import liger
from zs_fast.models.attention import PackedAttention
from zs_fast.models.lora import LoraLinear, attach_adapter, same_base
from zs_fast.testing import tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAYERS = 2


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for Liger's functions; how often each was called. Modules of transformers are as before afterwards."""
    counted = {"norm": 0, "swiglu": 0, "rope": 0}

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert offset == 0.0 and casting_mode == "llama" and in_place is False
        counted["norm"] += 1
        wide = X.float()
        return W * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(X.dtype)

    def liger_swiglu(a, b):
        counted["swiglu"] += 1
        return nn.functional.silu(a) * b

    def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        assert position_ids is None and unsqueeze_dim == 1 and rotary_dim is None
        assert cos.shape == (1, q.shape[2], q.shape[3])
        counted["rope"] += 1

        def turned(x):
            left, right = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]

        return turned(q), turned(k)

    functions = types.ModuleType(liger.FUNCTIONS)
    functions.liger_rms_norm, functions.liger_swiglu, functions.liger_rope = liger_rms_norm, liger_swiglu, liger_rope
    monkeypatch.setitem(sys.modules, liger.FUNCTIONS, functions)
    for kind in ("llama", "qwen2", "qwen3"):
        modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)
    return counted


def hidden_and_gradients(model):
    ids = torch.randint(0, 259, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(7), *range(5)]])
    model.zero_grad()
    hidden = model.model(
        input_ids=ids, position_ids=positions, use_cache=False, attention_state=PackedAttention([0, 7, 12])
    ).last_hidden_state
    hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(
    "kind, norms", [("llama", 2 * LAYERS + 1), ("qwen2", 2 * LAYERS + 1), ("qwen3", 4 * LAYERS + 1)]
)
def test_every_layer_is_fused_and_computes_the_same(kind, norms, calls, monkeypatch):
    model = tiny_model(kind, layers=LAYERS).model
    expected = hidden_and_gradients(model)
    liger.fuse_layers(model)
    liger.fuse_layers(model)  # a second time changes nothing
    monkeypatch.setattr(liger, "_on_gpu", lambda tensor: True)
    assert_close(hidden_and_gradients(model), expected)
    assert calls == {"norm": norms, "swiglu": LAYERS, "rope": LAYERS}


def test_tensors_on_a_cpu_go_the_old_way_bit_for_bit(calls):
    model = tiny_model(layers=LAYERS).model
    expected = hidden_and_gradients(model)
    liger.fuse_layers(model)
    assert all(map(torch.equal, hidden_and_gradients(model), expected)) and not any(calls.values())


def test_a_tree_on_the_same_base_keeps_its_own_adapter_and_its_layers(calls, monkeypatch):
    """A fused MLP must call the linear layers of its own tree, not those of the tree that it was copied from."""
    monkeypatch.setattr(liger, "_on_gpu", lambda tensor: True)
    model = tiny_model(layers=LAYERS).model
    plain = copy.deepcopy(model)
    liger.fuse_layers(model)
    attach_adapter(model, 2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.lora_B.weight.fill_(0.1)
    base = same_base(model)
    calls.update(dict.fromkeys(calls, 0))
    found, expected, adapted = (hidden(tree) for tree in (base, plain, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, expected, atol=1e-2)
    assert calls["swiglu"] == 2 * LAYERS


def hidden(model):
    with torch.no_grad():
        return model.model(
            input_ids=torch.arange(9)[None],
            position_ids=torch.arange(9)[None],
            use_cache=False,
            attention_state=PackedAttention([0, 9]),
        ).last_hidden_state


def test_names_and_weights_stay(calls):
    model = tiny_model(layers=LAYERS).model
    names = [(name, type(module).__name__) for name, module in model.named_modules()]
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    liger.fuse_layers(model)
    assert names == [(name, type(module).__name__) for name, module in model.named_modules()]
    assert weights == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_another_activation_is_left_alone(calls, monkeypatch):
    monkeypatch.setattr(liger, "_on_gpu", lambda tensor: True)
    model = tiny_model(layers=LAYERS).model
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    liger.fuse_layers(model)
    hidden(model)
    assert calls["swiglu"] == 0 and calls["norm"] == 2 * LAYERS + 1


@pytest.fixture
def setting(monkeypatch):
    monkeypatch.setattr(liger._Setting, "is_on", False)
    return liger._Setting


@pytest.mark.parametrize(
    "wanted, device, there, on",
    [
        ("auto", CUDA, True, True),
        ("auto", CUDA, False, False),
        ("auto", CPU, True, False),
        ("off", CUDA, True, False),
        ("on", CUDA, True, True),
    ],
)
def test_when_it_is_taken(wanted, device, there, on, setting, monkeypatch):
    monkeypatch.setattr(liger, "missing", lambda: "" if there else "no module liger_kernel is installed")
    assert liger.use_liger(wanted, device) is on and setting.is_on is on


@pytest.mark.parametrize("device, reason", [(CPU, "CUDA only"), (CUDA, "no module liger_kernel")])
def test_asked_for_and_not_to_be_had_is_one_error_with_its_command(device, reason, setting, monkeypatch):
    monkeypatch.setattr(liger, "missing", lambda: "no module liger_kernel is installed")
    with pytest.raises(PreflightError, match=rf"{reason}.*pip install liger-kernel"):
        liger.use_liger("on", device)
    assert not setting.is_on


def test_missing_names_what_is_not_there(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name="liger_kernel")

    monkeypatch.setattr(liger.importlib, "import_module", absent)
    assert liger.missing() == "no module liger_kernel is installed"


def test_models_are_loaded_with_the_setting(calls, setting):
    from zs_fast.models.load import load_model

    assert not any(hasattr(m, "without_liger") for m in load_model("quickstart:policy").model.modules())
    setting.is_on = True
    assert any(hasattr(m, "without_liger") for m in load_model("quickstart:policy").model.modules())


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_the_installed_package_takes_these_arguments():
    """Names and order, without a GPU."""
    functions = sys.modules.get(liger.FUNCTIONS) or importlib.import_module(liger.FUNCTIONS)
    assert list(inspect.signature(functions.liger_rms_norm).parameters)[:6] == [
        "X",
        "W",
        "eps",
        "offset",
        "casting_mode",
        "in_place",
    ]
    assert list(inspect.signature(functions.liger_swiglu).parameters)[:2] == ["a", "b"]
    assert list(inspect.signature(functions.liger_rope).parameters)[:6] == [
        "q",
        "k",
        "cos",
        "sin",
        "position_ids",
        "unsqueeze_dim",
    ]
