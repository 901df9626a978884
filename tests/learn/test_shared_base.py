"""Roles on one set of base weights: no copy is made, and training one leaves the others as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zs_fast.config import AlgorithmConfig, CriticConfig, TrainConfig
from zs_fast.errors import ConfigError, PreflightError
from zs_fast.learn.algorithms import credit
from zs_fast.learn.critic import Critic
from zs_fast.learn.pack import pack
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.models.load import LoadedModel, load_model, on_same_base, save_model
from zs_fast.models.lora import adapter_tensors, attach_adapter, read_adapter, same_base
from zs_fast.testing import tiny_model
from zs_fast.types import Role

KINDS = ["llama", "qwen2", "qwen3"]


def adapted(kind: str = "qwen2", rank: int = 4) -> LoadedModel:
    loaded = tiny_model(kind)
    attach_adapter(loaded.model, rank, seed=7)
    return loaded


def addresses(module: torch.nn.Module) -> dict[str, int]:
    """Name in a plain model -> where the tensor lies; adapters left out."""
    named = {name: tensor for name, tensor in module.named_parameters() if ".lora_" not in name}
    return {name.replace(".base_layer", ""): tensor.data_ptr() for name, tensor in named.items()}


@pytest.fixture
def groups(make_group, make_trajectory):
    return [
        make_group(
            [
                make_trajectory([1, 2, 3], [([4, 5], [6, 7, 8]), ([9], [])], reward=1.0),
                make_trajectory([1, 2, 3], [([7, 8], [])]),
            ]
        ),
        make_group([make_trajectory([5, 6], [([4], [])], reward=0.5), make_trajectory([5, 6], [([8, 8, 8], [])])]),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_roles_weights_lie_in_the_same_memory(kind):
    policy = adapted(kind)
    critic = Critic.on_base(policy, 2)
    reference = on_same_base(policy)
    plain = addresses(tiny_model(kind).model).keys()
    assert addresses(policy.model).keys() == plain
    assert addresses(reference.model) == addresses(policy.model)
    trunk = {name: place for name, place in addresses(policy.model).items() if name.startswith("model.")}
    assert {f"model.{name}": place for name, place in addresses(critic.trunk).items()} == trunk
    assert not adapter_tensors(reference.model)
    own = {tensor.data_ptr() for tensor in adapter_tensors(critic).values()}
    assert own and own.isdisjoint({tensor.data_ptr() for tensor in adapter_tensors(policy.model).values()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_updates_move_the_adapters_alone(kind, algorithm, groups):
    policy = adapted(kind)
    reference, simulator = on_same_base(policy), on_same_base(policy)
    critic = Critic.on_base(policy, 2, seed=1) if algorithm == "ppo" else None
    config = AlgorithmConfig(name=algorithm, kl_coefficient=0.1)
    train = TrainConfig(learning_rate=1e-2, weight_decay=0.1)
    roles = Roles(policy=policy, reference=reference, critic=critic, temperature=1.0)
    updater = Updater(roles, train, config, total_steps=4, critic=CriticConfig(learning_rate=1e-2))
    packed = pack(groups, token_budget=16)
    base = {name: tensor.clone() for name, tensor in reference.model.named_parameters()}
    before = roles.logprobs(Role.REFERENCE, packed), roles.logprobs(Role.POLICY, packed)
    assert torch.equal(*before), "a new adapter changes nothing"
    for _ in range(2):
        scored = score(packed, roles, old_logprobs=updater.needs_old_logprobs)
        stats = updater.update(credit(scored, config))
    assert stats.values["grad_norm"] > 0
    assert torch.equal(roles.logprobs(Role.REFERENCE, packed), before[0])
    assert not torch.equal(roles.logprobs(Role.POLICY, packed), before[1])
    for model in (reference, simulator):
        assert all(torch.equal(tensor, base[name]) for name, tensor in model.model.named_parameters())
    for adapter in (policy.model, critic):
        if adapter is not None:
            assert all(tensor.abs().sum() > 0 for name, tensor in adapter_tensors(adapter).items())
    state = updater.state_tensors()
    assert state and all(".lora_" in name or "value_head" in name for name in state), "no state for frozen weights"


def test_one_step_on_an_adapter_is_adamw_on_it(groups):
    """The same gradients in torch's own AdamW, in float32: equal to rounding of one fused step."""
    policy = adapted()
    config = AlgorithmConfig(name="reinforce", kl_coefficient=0.0)
    roles = Roles(policy=policy, reference=None, temperature=1.0)
    updater = Updater(roles, TrainConfig(learning_rate=1e-3, max_grad_norm=1e9), config, total_steps=1)
    batch = credit(score(pack(groups, token_budget=64), roles), config)
    twin = adapted()
    twin_roles = Roles(policy=twin, reference=None, temperature=1.0)
    parameters = list(adapter_tensors(twin.model).values())
    logprobs = twin_logprobs(twin_roles, batch)
    (-(logprobs * batch.advantages[batch.scored.packed.loss_index]).sum() / len(logprobs)).backward()
    torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01).step()
    updater.update(batch)
    for name, tensor in adapter_tensors(policy.model).items():
        torch.testing.assert_close(tensor, adapter_tensors(twin.model)[name], atol=2e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_moves_every_weight_and_no_frozen_copy(kind, dtype, groups):
    policy, frozen = tiny_model(kind, dtype=dtype), tiny_model(kind, dtype=dtype)
    roles = Roles(policy=policy, reference=frozen, temperature=1.0)
    config = AlgorithmConfig(kl_coefficient=0.1)
    updater = Updater(roles, TrainConfig(learning_rate=1e-1), config, total_steps=2)
    packed = pack(groups, token_budget=16)
    before = roles.logprobs(Role.REFERENCE, packed)
    for _ in range(2):
        updater.update(credit(score(packed, roles), config))
    assert torch.equal(roles.logprobs(Role.REFERENCE, packed), before)
    for name, tensor in policy.model.named_parameters():
        assert not torch.equal(tensor, frozen.model.get_parameter(name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_adapter_is_stepped_in_float32_and_rounded_once(kind, groups):
    """Against torch's AdamW on float32 copies with the gradients that the backward pass gave: masters to 1e-8."""
    loaded = tiny_model(kind, dtype="bfloat16")
    attach_adapter(loaded.model, 4, seed=7)
    config = AlgorithmConfig(name="reinforce", kl_coefficient=0.0)
    roles = Roles(policy=loaded, reference=None, temperature=1.0)
    updater = Updater(roles, TrainConfig(learning_rate=1e-3, max_grad_norm=1e9), config, total_steps=1)
    ours = adapter_tensors(loaded.model)
    exact = {name: torch.nn.Parameter(tensor.detach().float()) for name, tensor in ours.items()}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in ours}
    for name, tensor in ours.items():
        tensor.register_hook(lambda gradient, name=name: gradients[name].append(gradient.float()))
    base = {name: tensor.clone() for name, tensor in loaded.model.named_parameters() if ".lora_" not in name}
    updater.update(credit(score(pack(groups, token_budget=64), roles), config))
    for name, copy in exact.items():
        copy.grad = torch.stack(gradients[name]).sum(0)
    torch.optim.AdamW(exact.values(), lr=1e-3, weight_decay=0.01).step()
    masters = updater.state_tensors()
    for name, tensor in ours.items():
        torch.testing.assert_close(masters[f"master.{name}"], exact[name].detach(), atol=1e-8, rtol=1e-6)
        assert torch.equal(tensor, masters[f"master.{name}"].bfloat16()), name
    assert all(torch.equal(loaded.model.get_parameter(name), tensor) for name, tensor in base.items())


def twin_logprobs(roles: Roles, batch) -> torch.Tensor:
    from zs_fast.learn.policy import logprobs_at_loss_tokens

    packed = batch.scored.packed
    return torch.cat(
        [logprobs_at_loss_tokens(roles.policy.model, m, temperature=1.0).logprobs for m in packed.micro_batches(10_000)]
    )


def test_a_critic_on_a_moving_base_is_refused():
    with pytest.raises(ConfigError, match=r"model\.lora_rank"):
        Critic.on_base(tiny_model("llama"), 4)


def test_a_saved_adapter_is_loaded_with_its_base(tmp_path: Path):
    base = tmp_path / "base"
    save_model(tiny_model("qwen3"), base)
    loaded = load_model(base)
    attach_adapter(loaded.model, 3)
    with torch.no_grad():
        for number, tensor in enumerate(adapter_tensors(loaded.model).values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    save_model(loaded, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = load_model(tmp_path / "adapter")
    assert again.base == str(base) and again.name == str(tmp_path / "adapter")
    for name, tensor in loaded.model.named_parameters():
        assert torch.equal(tensor, dict(again.model.named_parameters())[name]), name
    assert [name for name, p in again.model.named_parameters() if p.requires_grad] == list(adapter_tensors(again.model))
    frozen = on_same_base(again, str(tmp_path / "adapter"))
    assert all(
        torch.equal(tensor, adapter_tensors(frozen.model)[name])
        and not adapter_tensors(frozen.model)[name].requires_grad
        for name, tensor in read_adapter(tmp_path / "adapter").items()
    )


def test_an_adapter_without_its_base_says_so(tmp_path: Path):
    loaded = adapted()
    save_model(loaded, tmp_path / "adapter")
    with pytest.raises(PreflightError, match="no such folder"):
        load_model(tmp_path / "adapter")


def test_a_tree_without_an_adapter_is_the_same_model():
    loaded = tiny_model("llama")
    assert addresses(same_base(loaded.model)) == addresses(loaded.model)
