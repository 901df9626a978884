"""Whole runs of the quickstart in small: the same numbers every time, and from every step on."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from zs_fast.errors import CheckpointUnusableError, ConfigError, PreflightError
from zs_fast.evaluate import evaluate_run
from zs_fast.recipe_files import load_recipe
from zs_fast.train import train

STEPS = 12


def small_run(output: Path, **overrides: object):
    """The quickstart recipe with 2 questions of 2 trajectories a step, and an evaluation of 4 questions."""
    small = {
        "output": output,
        "train.steps": STEPS,
        "train.questions_per_step": 2,
        "train.group_size": 2,
        "train.save_every": 1,
        "train.keep_checkpoints": 0,
        "train.mini_batches": 2,
        "eval.questions": 2,
        "eval.at_start": "false",
        "eval.search": "bm25",
    }
    return load_recipe(["quickstart"], {key: [str(value)] for key, value in (small | overrides).items()})


def weights(run: Path, step: int = STEPS) -> bytes:
    return (run / "checkpoints" / f"step_{step}" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    train(small_run(output))
    return output


def test_a_run_leaves_its_files_and_learns_something(whole_run):
    rows = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(row["update/nonfinite_losses"] == 0 and row["tokens"] > 0 for row in steps)
    assert any(row["grad_norm"] > 0 for row in steps if "grad_norm" in row)
    assert weights(whole_run) != weights(whole_run, 1)
    summary = json.loads((whole_run / "summary.json").read_text())
    assert summary["steps"] == STEPS and 0.0 <= summary["f1_bm25_after"] <= 1.0
    for name in ("config.toml", "env.json", "timings.jsonl", "rollouts.jsonl", "reward.png", "report.html", "latest"):
        assert (whole_run / name).stat().st_size > 0, name


def test_the_same_seed_gives_the_same_metrics_byte_for_byte(whole_run, tmp_path):
    train(small_run(tmp_path / "again"))
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (whole_run / "metrics.jsonl").read_bytes()
    assert (tmp_path / "again" / "rollouts.jsonl").read_bytes() == (whole_run / "rollouts.jsonl").read_bytes()
    assert weights(tmp_path / "again") == weights(whole_run)


def test_another_seed_gives_other_metrics(whole_run, tmp_path):
    train(small_run(tmp_path / "other", seed=1, **{"train.steps": 1}))
    first = (whole_run / "metrics.jsonl").read_text().splitlines()[0]
    assert (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()[0] != first


EVERY_STEP = [step if step in (1, 6, 11) else pytest.param(step, marks=pytest.mark.full) for step in range(STEPS)]


@pytest.mark.parametrize("step", EVERY_STEP)
def test_a_resume_from_any_step_ends_in_the_same_bytes(whole_run, tmp_path, step):
    """What a crash after `step` leaves: later rows may be in the logs already, later checkpoints are not there."""
    resumed = tmp_path / "resumed"
    shutil.copytree(whole_run, resumed)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(resumed / "checkpoints" / f"step_{later}")
    (resumed / "summary.json").unlink()
    train(small_run(resumed), resume=True)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (resumed / name).read_bytes() == (whole_run / name).read_bytes(), name
    assert weights(resumed) == weights(whole_run)


def test_a_finished_run_is_not_overwritten(whole_run):
    with pytest.raises(ConfigError, match="--resume"):
        train(small_run(whole_run))


def test_resume_with_another_learning_rate_is_refused(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "copy")
    with pytest.raises(CheckpointUnusableError, match=r"train\.learning_rate"):
        train(small_run(tmp_path / "copy", **{"train.learning_rate": 1e-5}), resume=True)


def test_a_missing_model_leaves_no_run_behind(tmp_path):
    with pytest.raises(PreflightError, match="no_such_model"):
        train(small_run(tmp_path / "run", **{"model.path": "no_such_model"}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_dead_remote_simulator_is_found_before_the_first_rollout(tmp_path):
    remote = {"simulator.kind": "openai", "simulator.url": "http://127.0.0.1:9/v1", "simulator.max_retries": 0}
    with pytest.raises(PreflightError, match=r"127\.0\.0\.1:9"):
        train(small_run(tmp_path / "run", **remote))
    assert not (tmp_path / "run" / "checkpoints").exists()


ADAPTER = {
    "model.lora_rank": 4,
    "simulator.kind": "policy",
    "simulator.template": "prompted",
    "simulator.max_new_tokens": 8,
    "train.learning_rate": 3e-3,
    "train.steps": 3,
    "eval.search": "simulator",
}


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_run_with_adapters_goes_on_from_each_step_as_if_it_had_never_stopped(algorithm, tmp_path):
    overrides = ADAPTER | {"algorithm.name": algorithm}
    whole = tmp_path / "whole"
    train(small_run(whole, **overrides))
    for step in (1, 2):
        resumed = tmp_path / f"from_{step}"
        shutil.copytree(whole, resumed)
        for later in range(step + 1, 4):
            shutil.rmtree(resumed / "checkpoints" / f"step_{later}")
        train(small_run(resumed, **overrides), resume=True)
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            assert (resumed / name).read_bytes() == (whole / name).read_bytes(), (step, name)
        for file in ("model/adapter_model.safetensors", "trainer.safetensors"):
            last = Path("checkpoints") / "step_3" / file
            assert (resumed / last).read_bytes() == (whole / last).read_bytes(), (step, file)
    assert not list(whole.rglob("model.safetensors")), "checkpoints hold the adapter alone"
    evaluated = evaluate_run(
        small_run(tmp_path / "evaluated", **ADAPTER | {"model.path": whole / "checkpoints" / "step_3" / "model"})
    )
    assert evaluated["simulator"] == "quickstart:policy"
    summary = json.loads((whole / "summary.json").read_text())
    assert evaluated["results"]["simulator"]["f1"] == pytest.approx(summary["f1_after"])


def test_groups_without_signal_are_replaced_and_a_resume_goes_on_with_the_same_questions(tmp_path):
    """DAPO's dynamic sampling: of questions all of whose trajectories earn the same, others take the place."""
    overrides = {"algorithm.name": "dapo", "simulator.kind": "bm25", "train.steps": 3, "train.mini_batches": 1}
    whole = tmp_path / "whole"
    train(small_run(whole, **overrides))
    states = [json.loads((whole / "checkpoints" / f"step_{s}" / "trainer.json").read_text()) for s in (1, 2, 3)]
    played = [state["batches_played"] for state in states]
    added = [later - earlier for earlier, later in pairwise([0, *played])]
    assert played[-1] > 3 and set(added) <= {1, 2, 3}
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    for later in (2, 3):
        shutil.rmtree(resumed / "checkpoints" / f"step_{later}")
    train(small_run(resumed, **overrides), resume=True)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    assert weights(resumed, 3) == weights(whole, 3)
