"""A copy of the weights in the engine: checked, discarded between rollouts and written again. No vLLM is needed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zs_fast.errors import EngineError, PreflightError
from zs_fast.rollout import vllm_model
from zs_fast.rollout.vllm_model import ServedModel
from zs_fast.testing import tiny_model


class Core:
    """What a ServedModel knows of vLLM: a module with a loader of its own."""

    def __init__(self, model: nn.Module, *, writes: bool = True) -> None:
        self.module = nn.Module()
        self.held = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
        for number, parameter in enumerate(self.held.values()):
            self.module.register_parameter(str(number), parameter)
        self.module.load_weights = self.load_weights
        self.num_unfinished, self.writes, self.num_loads = 0, writes, 0

    def load_weights(self, values):
        self.num_loads += 1
        for name, value in values:
            if self.writes:
                self.held[name].data.copy_(value)


def copied(monkeypatch, *, viewable: bool = True, **options) -> ServedModel:
    loaded = tiny_model()
    served = ServedModel.__new__(ServedModel)
    served.loaded, served.core = loaded, Core(loaded.model, **options)
    served.unshared_because, served._rank, served._slots = "engine.weights is 'copied'", 0, None
    served._keeps_addresses, served._discarded, served._is_proven, served._num_probes = False, [], True, 0

    def tensors(module):
        if not viewable:
            raise PreflightError("split over 2 GPUs")
        return served.core.held

    monkeypatch.setattr(vllm_model, "served_tensors", tensors)
    return served


def change(served: ServedModel, value: float) -> None:
    with torch.no_grad():
        for parameter in served.loaded.model.parameters():
            parameter.flatten()[0] = value


@pytest.mark.parametrize("value", [0.5, math.nan, -0.0])
def test_what_was_written_is_there_bit_for_bit(monkeypatch, value):
    served = copied(monkeypatch)
    change(served, value)
    assert served.copy_weights() == sum(p.nbytes for p in served.loaded.model.parameters())


def test_a_hand_over_that_wrote_nothing_is_noticed(monkeypatch):
    served = copied(monkeypatch, writes=False)
    assert served.copy_weights() > 0, "the values are the same still"
    change(served, 0.5)
    with pytest.raises(EngineError, match="holds other values afterwards"):
        served.copy_weights()


def test_a_layout_that_can_not_be_viewed_is_proven_by_what_comes_out_of_it(monkeypatch):
    served, probes = copied(monkeypatch, viewable=False), []
    monkeypatch.setattr(vllm_model, "probe", lambda loaded, sample: probes.append(loaded) or 0.0)
    served.prove_copy()
    assert not probes, "nothing was written since the start"
    change(served, 0.5)
    served.copy_weights()
    served.core.num_unfinished = 1
    served.prove_copy()
    assert not probes, "requests are under way"
    served.core.num_unfinished = 0
    served.prove_copy()
    served.prove_copy()
    assert len(probes) == 1
    change(served, math.nan)
    served.copy_weights()
    served.prove_copy()
    assert len(probes) == 1, "of such weights every forward gives the same"


def test_a_discarded_copy_is_written_again(monkeypatch):
    served = copied(monkeypatch)
    size = sum(p.nbytes for p in served.loaded.model.parameters())
    change(served, 0.25)
    assert served.can_discard and served.discard_copy() == size and served.discard_copy() == 0
    assert all(p.untyped_storage().nbytes() == 0 for p in served.core.held.values())
    served.restore_copy()
    for name, parameter in served.loaded.model.named_parameters():
        assert torch.equal(served.core.held[name], parameter), name
    served.restore_copy()
    assert served.core.num_loads == 1
    served.discard_copy()
    change(served, 0.75)
    assert served.copy_weights() == size and served.core.num_loads == 2, "a publish brings it back, once"
    served.restore_copy()
    assert served.core.num_loads == 2


def test_memory_of_the_trainer_and_addresses_that_graphs_hold_stay(monkeypatch):
    served = copied(monkeypatch)
    name, parameter = next(iter(served.loaded.model.named_parameters()))
    served.core.held[name].data = parameter.data
    assert served.discard_copy() == sum(p.nbytes for p in served.loaded.model.parameters()) - parameter.nbytes
    assert parameter.untyped_storage().nbytes() == parameter.nbytes
    served.restore_copy()
    served._keeps_addresses = True
    assert not served.can_discard and served.discard_copy() == 0
    served._keeps_addresses, served.unshared_because = False, ""
    assert not served.can_discard and served.discard_copy() == 0 and served.copy_weights() == 0
