"""Whole runs of the quickstart in small with engine.kind = "vllm": what is trained, saved, resumed and evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from zs_fast import train as train_module
from zs_fast.evaluate import evaluate_run
from zs_fast.models.load import load_model
from zs_fast.recipe_files import load_recipe
from zs_fast.setup import build_arena, load_served, use_device
from zs_fast.system.weights import check_shared
from zs_fast.train import train
from zs_fast.types import Role

STEPS = 3


def small_run(output: Path, **overrides: object):
    small = {
        "output": output,
        "engine.kind": "vllm",
        "engine.release_kv": "true",
        "train.steps": STEPS,
        "train.questions_per_step": 3,
        "train.group_size": 3,
        "train.learning_rate": 1e-3,
        "train.save_every": 1,
        "train.keep_checkpoints": 0,
        "train.mini_batches": 2,
        "eval.questions": 4,
        "eval.at_start": "false",
        "eval.search": "simulator",
    }
    return load_recipe(["quickstart"], {key: [str(value)] for key, value in (small | overrides).items()})


def state(run: Path, step: int) -> tuple[bytes, bytes]:
    folder = run / "checkpoints" / f"step_{step}"
    return (folder / "model" / "model.safetensors").read_bytes(), (folder / "trainer.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(run_of) -> Path:
    return run_of(small_run)


def test_a_run_samples_with_what_it_trained_in_the_step_before(rows, whole_run):
    steps = rows(whole_run)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(row["logprobs/rollout_mismatch"] < 1e-5 for row in steps)
    assert sum(row.get("grad_norm", 0.0) > 0 for row in steps) >= 2
    assert len({state(whole_run, step) for step in range(1, STEPS + 1)}) == STEPS
    timings = [json.loads(line) for line in (whole_run / "timings.jsonl").read_text().splitlines()]
    released = [row["kv_released_bytes"] for row in timings if "kv_released_bytes" in row]
    assert len(released) == STEPS and all(size > 100e6 for size in released)
    summary = json.loads((whole_run / "summary.json").read_text())
    assert 0.0 <= summary["f1_after"] <= 1.0


def test_the_same_seed_gives_the_same_run(whole_run, tmp_path):
    """On a CPU with one number of threads. A resume does not: its cache starts empty, and batches round differently."""
    train(small_run(tmp_path / "again"))
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (whole_run / "metrics.jsonl").read_bytes()
    assert state(tmp_path / "again", STEPS) == state(whole_run, STEPS)


def test_a_resume_goes_on_with_the_saved_weights(rows, whole_run, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(whole_run, resumed)
    for later in range(2, STEPS + 1):
        shutil.rmtree(resumed / "checkpoints" / f"step_{later}")
    train(small_run(resumed), resume=True)
    assert [row["step"] for row in rows(resumed)] == list(range(1, STEPS + 1))
    assert all(row["logprobs/rollout_mismatch"] < 1e-5 for row in rows(resumed))
    assert rows(resumed)[1]["kl/reference"] > 0, "the policy is the saved one, the reference the one before training"
    saved = load_model(resumed / "checkpoints" / f"step_{STEPS}" / "model")
    assert all(torch.isfinite(parameter).all() for parameter in saved.model.parameters())


def test_a_run_with_copied_weights_is_the_same_run_and_so_is_its_resume(rows, whole_run, tmp_path):
    copied = tmp_path / "copied"
    train(small_run(copied, **{"engine.weights": "copied"}))
    assert (copied / "metrics.jsonl").read_bytes() == (whole_run / "metrics.jsonl").read_bytes()
    assert state(copied, STEPS) == state(whole_run, STEPS)
    written = [
        json.loads(line).get("sync/copied_bytes") for line in (copied / "timings.jsonl").read_text().splitlines()
    ]
    size = sum(parameter.nbytes for parameter in load_model("quickstart:policy").model.parameters())
    assert [count for count in written if count is not None] == [size] * STEPS
    for later in range(2, STEPS + 1):
        shutil.rmtree(copied / "checkpoints" / f"step_{later}")
    train(small_run(copied, **{"engine.weights": "copied"}), resume=True)
    assert [row["step"] for row in rows(copied)] == list(range(1, STEPS + 1))
    assert all(row["logprobs/rollout_mismatch"] < 1e-5 for row in rows(copied)), "vLLM has the saved weights, too"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_rollouts_give_equal_trainer_state_whichever_engine_sampled_them(dtype, tmp_path, monkeypatch):
    """Weights, moments and masters, bit for bit; both engines sample (evaluations) between the updates."""
    played = []
    play = train_module.play
    monkeypatch.setattr(
        train_module, "play", lambda *args, **kwargs: played.append(play(*args, **kwargs)) or played[-1]
    )
    options = {"model.dtype": dtype, "train.eval_every": 1, "eval.questions": 2}
    train(small_run(tmp_path / "one", **options))
    assert len(played) == STEPS
    replayed = iter(played)
    monkeypatch.setattr(train_module, "play", lambda *args, **kwargs: next(replayed))
    train(small_run(tmp_path / "other", **options | {"engine.kind": "transformers"}))
    for step in range(1, STEPS + 1):
        assert state(tmp_path / "one", step) == state(tmp_path / "other", step), step


def test_a_simulator_that_is_the_base_shares_the_reference(tmp_path):
    config = small_run(tmp_path, **{"simulator.kind": "policy"})
    device = use_device(config)
    policy, base = (load_served(config.model.path, config, device) for _ in range(2))
    arena = build_arena(config, policy, device=device, base=base)
    try:
        for role, loaded in ((Role.POLICY, policy), (Role.SIMULATOR, base)):
            assert arena.engine.module(role) is loaded.model
            check_shared(loaded.model, arena.engine.served(role))
        weights = [loaded.model.model.norm.weight for loaded in (policy, base)]
        assert torch.equal(*weights) and weights[0].data_ptr() != weights[1].data_ptr()
    finally:
        arena.close()


def test_a_checkpoint_is_evaluated_through_vllm(whole_run, tmp_path):
    model = whole_run / "checkpoints" / f"step_{STEPS}" / "model"
    summary = evaluate_run(small_run(tmp_path / "eval", **{"model.path": model}))
    trained = json.loads((whole_run / "summary.json").read_text())
    assert summary["results"]["simulator"]["f1"] == pytest.approx(trained["f1_after"], abs=0.26)
