"""Every kind of optimizer takes the steps of float32 AdamW, to what its moments allow, and resumes bit for bit."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from zs_fast.errors import CheckpointUnusableError, PreflightError
from zs_fast.learn.adamw import AdamW8
from zs_fast.learn.optimizer import Optimizer, Schedule
from zs_fast.learn.policy import training_mode
from zs_fast.testing import tiny_model

HAS_8_BIT = importlib.util.find_spec("bitsandbytes") is not None
needs_8_bit = pytest.mark.skipif(not HAS_8_BIT, reason="bitsandbytes is not installed: pip install bitsandbytes")
KINDS = ["adamw", "adamw_offload", pytest.param("adamw_8bit", marks=needs_8_bit)]
RATE = 1e-3
TOLERANCE = {"adamw": 2e-6, "adamw_offload": 2e-6, "adamw_8bit": 0.03}
"""Largest Euclidean distance from float32 AdamW's weights, relative to the way these have come. Rounding of sums for
32-bit moments; for 8 bits 256 levels in each block of 256, which arXiv:2110.02861 finds without effect on training."""


class Net(nn.Module):
    """Odd sizes: a matrix of many blocks with a short last one, one below 8 bits' least size, a vector."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("large", (67, 131)), ("small", (3, 5)), ("vector", (129,))):
            values = 0.02 * torch.randn(shape, generator=generator)
            setattr(self, name, nn.Parameter(values.to(dtype)))


def make(net: nn.Module, kind: str, *, rate: float = RATE) -> Optimizer:
    schedule = Schedule(peak=rate, warmup_steps=0, total_steps=100, final_fraction=1.0)
    return Optimizer(net, schedule, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, max_grad_norm=1e9, kind=kind)


def take_steps(net: nn.Module, optimizer, number: int, *, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        for parameter in net.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            (parameter * gradient.to(parameter.dtype)).sum().backward()
        optimizer.step()
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.zero_grad()


def plain_adamw(net: nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), eps=1e-8)


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_float32_adamw(kind, steps):
    net, twin, start = Net(torch.float32), Net(torch.float32), Net(torch.float32)
    take_steps(net, make(net, kind), steps)
    take_steps(twin, plain_adamw(twin), steps)
    for (name, ours), theirs, before in zip(net.named_parameters(), twin.parameters(), start.parameters(), strict=True):
        way = float((theirs - before).detach().norm())
        assert way > 0
        assert float((ours - theirs).detach().norm()) <= TOLERANCE[kind] * way, name


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_weights_follow_their_float32_masters(kind):
    """At a rate of 1e-6 bfloat16 weights would stand still under plain AdamW on them."""
    net, start = Net(torch.bfloat16), Net(torch.bfloat16)
    optimizer = make(net, kind, rate=1e-6)
    generator = torch.Generator().manual_seed(2)
    signs = [torch.randn(p.shape, generator=generator).sign() for p in net.parameters()]
    for _ in range(60):
        for parameter, sign in zip(net.parameters(), signs, strict=True):
            (parameter * sign.to(parameter.dtype)).sum().backward()
        optimizer.step()
    plain = Net(torch.bfloat16)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-6, weight_decay=0.01)
    for _ in range(60):
        for parameter, sign in zip(plain.parameters(), signs, strict=True):
            (parameter * sign.to(parameter.dtype)).sum().backward()
        adamw.step()
        adamw.zero_grad()
    moved = [(ours != before).float().mean() for ours, before in zip(net.parameters(), start.parameters(), strict=True)]
    stood = [
        (ours != before).float().mean() for ours, before in zip(plain.parameters(), start.parameters(), strict=True)
    ]
    assert float(moved[0]) > 0.3 > 5 * float(stood[0])
    masters = {key: t for key, t in optimizer.state_tensors().items() if key.startswith("master.")}
    drift = masters["master.large"] - start.large.detach().float()
    torch.testing.assert_close(drift, -60e-6 * signs[0], atol=3e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimizer_goes_on_bit_for_bit(kind, dtype):
    whole, first = Net(dtype), Net(dtype)
    optimizer = make(whole, kind)
    take_steps(whole, optimizer, 3)
    take_steps(whole, optimizer, 3, seed=9)
    half = make(first, kind)
    take_steps(first, half, 3)
    saved = {name: tensor.clone() for name, tensor in half.state_tensors().items()}
    assert all(tensor.dtype is not torch.float64 for tensor in saved.values())
    again = Net(dtype)
    again.load_state_dict(first.state_dict())
    resumed = make(again, kind)
    resumed.load_state_tensors(saved)
    take_steps(again, resumed, 3, seed=9)
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, resumed.state_tensors()[name]), name


def test_states_of_another_kind_are_refused():
    net = Net(torch.float32)
    optimizer = make(net, "adamw")
    take_steps(net, optimizer, 1)
    saved = dict(optimizer.state_tensors())
    with pytest.raises(CheckpointUnusableError, match=r"lacks 'master\.large'"):
        make(Net(torch.float32), "adamw_offload").load_state_tensors(saved)
    with pytest.raises(CheckpointUnusableError, match=r"adamw_8bit\.state1\.large"):
        optimizer.load_state_tensors({"adamw_8bit.state1.large": torch.zeros(67, 131)})
    with pytest.raises(CheckpointUnusableError, match=r"shape \[1\]"):
        optimizer.load_state_tensors(saved | {"adamw.m.large": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_state_shares_no_memory_with_the_weights(dtype):
    net = Net(dtype)
    optimizer = make(net, "adamw_offload")
    take_steps(net, optimizer, 1)
    places = {parameter.data_ptr() for parameter in net.parameters()}
    state = optimizer.state_tensors()
    assert {name for name in state if name.startswith("master.")} == {"master.large", "master.small", "master.vector"}
    assert all(tensor.data_ptr() not in places and tensor.device.type == "cpu" for tensor in state.values())
    assert all(parameter.grad is None for parameter in net.parameters())
    stand_ins = [holder for name, holder in optimizer._holders.items() if holder is not getattr(net, name)]
    assert len(stand_ins) == (3 if dtype == torch.bfloat16 else 0)
    assert all(holder.untyped_storage().nbytes() == 4 for holder in stand_ins), "a place to hang a gradient on, no more"


@needs_8_bit
def test_8_bit_moments_take_two_bytes_a_parameter():
    net = Net(torch.float32)
    optimizer = make(net, "adamw_8bit")
    take_steps(net, optimizer, 1)
    state = {name: t for name, t in optimizer.state_tensors().items() if name.endswith(".large") and "qmap" not in name}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert 2.0 <= num_bytes / net.large.numel() <= 2.05


def test_8_bit_moments_without_their_library_say_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PreflightError, match="pip install bitsandbytes"):
        AdamW8([], betas=(0.9, 0.99), eps=1e-8)


def test_offloaded_activations_change_no_bit(monkeypatch):
    model = tiny_model("llama").model
    ids = torch.arange(1, 12)[None]
    from zs_fast.models.attention import PackedAttention

    def gradients(**options) -> list[torch.Tensor]:
        model.zero_grad()
        with training_mode(model, **options):
            hidden = model.model(
                input_ids=ids,
                position_ids=torch.arange(11)[None],
                use_cache=False,
                attention_state=PackedAttention([0, 4, 11]),
            ).last_hidden_state
            hidden.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    moved = []
    real = torch.autograd.graph.save_on_cpu

    class Counting(real):
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(pin_memory)
            pack = self.pack_hook

            def counted(tensor: torch.Tensor):
                moved.append(tensor.numel())
                return pack(tensor)

            self.pack_hook = counted

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counting)
    plain = gradients(gradient_checkpointing=False)
    recomputed = gradients(gradient_checkpointing=True)
    assert not moved
    offloaded = gradients(gradient_checkpointing=True, offload=True)
    assert len(moved) >= model.config.num_hidden_layers, "the hidden state before each layer at least"
    for a, b, c in zip(plain, recomputed, offloaded, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw_offload"])
def test_gradients_that_have_a_place_already_are_the_same(kind, dtype):
    """And stay in it, over several backward passes."""
    weights = []
    for placed in (False, True):
        net = Net(dtype)
        optimizer = make(net, kind)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            if placed:
                optimizer.place_gradients()
            where = [placed and holder.grad.data_ptr() for holder in optimizer._holders.values()]
            for _ in range(2):
                for parameter in net.parameters():
                    (parameter * torch.randn(parameter.shape, generator=generator).to(dtype)).sum().backward()
            assert where == [placed and holder.grad.data_ptr() for holder in optimizer._holders.values()]
            optimizer.step()
        weights.append({name: parameter.detach().clone() for name, parameter in net.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
