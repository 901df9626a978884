"""The models that a run builds from its config: which of them lie in the same memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from zs_fast.models.load import load_model, on_same_base, save_model
from zs_fast.models.lora import adapter_rank, adapter_tensors, attach_adapter
from zs_fast.recipe_files import load_recipe
from zs_fast.setup import build_arena, load_policy, use_device
from zs_fast.system.weights import check_shared
from zs_fast.types import Role


def places(model: torch.nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def test_a_simulator_with_its_own_adapter_speaks_over_the_policys_base(tmp_path: Path):
    """As `zs-fast sft --model.lora_rank` leaves it, on the base that the policy's new adapter is on too."""
    made = load_model("quickstart:policy")
    attach_adapter(made.model, 3, targets=("q_proj", "up_proj"))
    with torch.no_grad():
        for tensor in adapter_tensors(made.model).values():
            tensor.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    save_model(replace(made, base_name=made.name), tmp_path / "simulator")
    words = {"model.lora_rank": "8", "simulator.kind": "policy", "simulator.adapter": str(tmp_path / "simulator")}
    config = load_recipe(["quickstart"], {name: [value] for name, value in words.items()})
    device = use_device(config)
    policy = load_policy(config, device)
    arena = build_arena(config, policy, device=device)
    try:
        simulator = arena.engine.module(Role.SIMULATOR)
        base = places(on_same_base(policy).model)
        trained = {tensor.untyped_storage().data_ptr() for tensor in adapter_tensors(policy.model).values()}
        spoken = adapter_tensors(simulator)
        assert places(policy.model) == base | trained and not base & trained
        assert places(simulator) == base | {tensor.untyped_storage().data_ptr() for tensor in spoken.values()}
        assert not places(simulator) & trained
        assert (adapter_rank(policy.model), adapter_rank(simulator)) == (8, 3)
        assert spoken.keys() == adapter_tensors(made.model).keys()
        assert all(torch.equal(tensor, spoken[name]) for name, tensor in adapter_tensors(made.model).items())
        check_shared(policy.model, arena.engine.served(Role.POLICY))
    finally:
        arena.close()
