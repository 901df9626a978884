"""Whole LoRA runs of the quickstart in small with engine.kind = "vllm": all roles in one engine, over one base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from zs_fast import train as train_module
from zs_fast.learn.critic import Critic
from zs_fast.models.load import load_model, on_same_base
from zs_fast.models.lora import adapter_rank, adapter_tensors
from zs_fast.recipe_files import load_recipe
from zs_fast.setup import build_arena, load_policy, use_device
from zs_fast.system.weights import check_shared
from zs_fast.train import train
from zs_fast.types import Role

STEPS = 2


def small_run(output: Path, **overrides: object):
    small = {
        "output": output,
        "engine.kind": "vllm",
        "model.lora_rank": 8,
        "algorithm.name": "ppo",
        "algorithm.kl_coefficient": 0.01,
        "algorithm.entropy_coefficient": 0.1,  # an untaught simulator earns no reward; this has a gradient all the same
        "simulator.kind": "policy",
        "simulator.max_new_tokens": 16,
        "train.steps": STEPS,
        "train.questions_per_step": 3,
        "train.group_size": 3,
        "train.learning_rate": 1e-2,
        "critic.learning_rate": 1e-2,
        "train.save_every": 1,
        "train.keep_checkpoints": 0,
        "eval.questions": 2,
        "eval.at_start": "false",
        "eval.search": "simulator",
    }
    return load_recipe(["quickstart"], {key: [str(value)] for key, value in (small | overrides).items()})


def state(run: Path, step: int) -> tuple[bytes, bytes]:
    folder = run / "checkpoints" / f"step_{step}"
    return (folder / "model" / "adapter_model.safetensors").read_bytes(), (folder / "trainer.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(run_of) -> Path:
    return run_of(small_run)


def test_a_run_samples_with_the_adapter_it_trained_and_saves_that_alone(rows, whole_run):
    steps = rows(whole_run)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(row["logprobs/rollout_mismatch"] < 1e-5 for row in steps)
    assert state(whole_run, 1)[0] != state(whole_run, 2)[0]
    assert not list(whole_run.rglob("model.safetensors"))
    trained = load_model(whole_run / "checkpoints" / f"step_{STEPS}" / "model")
    assert trained.base == "quickstart:policy" and adapter_rank(trained.model) == 8


def test_a_resume_goes_on_with_the_saved_adapter(rows, whole_run, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(whole_run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_2")
    train(small_run(resumed), resume=True)
    assert [row["step"] for row in rows(resumed)] == [1, 2]
    assert all(row["logprobs/rollout_mismatch"] < 1e-5 for row in rows(resumed))
    assert rows(resumed)[1]["kl/reference"] != 0.0, "the policy is the saved one, the reference the base"


def test_equal_rollouts_give_equal_trainer_state_whichever_engine_sampled_them(tmp_path, monkeypatch):
    """Adapters, the critic's adapter and head, and all moments, bit for bit."""
    played = []
    play = train_module.play
    monkeypatch.setattr(
        train_module, "play", lambda *args, **kwargs: played.append(play(*args, **kwargs)) or played[-1]
    )
    train(small_run(tmp_path / "one"))
    assert len(played) == STEPS
    replayed = iter(played)
    monkeypatch.setattr(train_module, "play", lambda *args, **kwargs: next(replayed))
    train(small_run(tmp_path / "other", **{"engine.kind": "transformers"}))
    for step in range(1, STEPS + 1):
        assert state(tmp_path / "one", step) == state(tmp_path / "other", step), step


@pytest.mark.parametrize("with_adapter", [False, True])
def test_policy_simulator_reference_and_critic_lie_in_the_one_engines_memory(whole_run, tmp_path, with_adapter):
    adapter = whole_run / "checkpoints" / f"step_{STEPS}" / "model" if with_adapter else ""
    config = small_run(tmp_path, **({"simulator.adapter": adapter} if adapter else {}))
    device = use_device(config)
    policy = load_policy(config, device)
    assert all(parameter.is_meta != (".lora_" in name) for name, parameter in policy.model.named_parameters())
    arena = build_arena(config, policy, device=device)
    try:
        (served,) = arena.engine._served
        assert set(served.roles) == {Role.POLICY, Role.SIMULATOR}, "both speak in the batches of one engine"
        check_shared(policy.model, arena.engine.served(Role.POLICY))
        base = {name: tensor for name, tensor in served.served().items() if ".lora_" not in name}
        places = {tensor.untyped_storage().data_ptr() for tensor in base.values()}
        reference, critic = on_same_base(policy), Critic.on_base(policy, 4)
        for module in (reference.model, critic.trunk):
            own = {id(tensor) for tensor in adapter_tensors(module).values()}
            held = {p.untyped_storage().data_ptr() for p in module.parameters() if id(p) not in own}
            assert held and held <= places
        assert served._slot_of[Role.SIMULATOR] == ("simulator" if adapter else "base")
        if adapter:
            slot = served._slots.tensors("simulator")
            for name, tensor in adapter_tensors(load_model(adapter).model).items():
                assert torch.equal(slot[name], tensor), name
    finally:
        arena.close()
