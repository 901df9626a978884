"""Runs that begin coming steps' questions early: what they carry over, and that a resume ends in the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from zs_fast.errors import ConfigError
from zs_fast.recipe_files import load_recipe
from zs_fast.rollout.play import Player
from zs_fast.train import train

pytestmark = pytest.mark.usefixtures("no_pictures")

STEPS = 4


def refilled_run(output: Path, **overrides: object):
    """Two models in one engine, with fewer slots than trajectories: some begin early, some do not."""
    small = {
        "output": output,
        "train.steps": STEPS,
        "train.questions_per_step": 3,
        "train.group_size": 2,
        "train.max_staleness": 1,
        "train.learning_rate": 1e-3,
        "train.save_every": 1,
        "train.keep_checkpoints": 0,
        "train.eval_every": 2,
        "algorithm.correction": "token",
        "simulator.share_noise_in_group": "true",
        "engine.slots": 4,
        "eval.questions": 2,
        "eval.at_start": "false",
    }
    return load_recipe(["quickstart"], {key: [str(value)] for key, value in (small | overrides).items()})


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    train(refilled_run(output))
    return output


def rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "reward/mean" in row]


def carried(run: Path, step: int) -> list[dict]:
    return json.loads((run / "checkpoints" / f"step_{step}" / "trainer.json").read_text())["carried"]


def assert_same_end(run: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("model/model.safetensors", "trainer.safetensors"):
        last = Path("checkpoints") / f"step_{STEPS}" / name
        assert (run / last).read_bytes() == (whole / last).read_bytes(), name


def test_a_run_trains_on_tokens_of_the_last_two_versions(whole_run):
    steps = rows(whole_run)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert steps[0]["staleness/mean"] == 0.0, "the first step has nothing to begin from"
    for row in steps[1:]:
        assert 0.0 < row["staleness/share_1"] < 1.0
        assert row["staleness/share_0"] + row["staleness/share_1"] == pytest.approx(1.0)
        assert row["staleness/mean"] == row["staleness/share_1"]
    assert any(row["staleness/mixed_share"] > 0 for row in steps)


def test_checkpoints_carry_half_played_trajectories_of_the_next_step(whole_run):
    groups = [group for step in range(1, STEPS) for group in carried(whole_run, step)]
    played = [len(turns) for group in groups for turns in group["trajectories"]]
    assert max(played) > 0
    assert 0 < len(groups) < 3 * (STEPS - 1), "some questions began in their own step"
    for step in range(1, STEPS):
        assert {group["step"] for group in carried(whole_run, step)} <= {step + 1}
        versions = [t["policy_version"] for g in carried(whole_run, step) for turns in g["trajectories"] for t in turns]
        assert set(versions) <= {step - 1}
    assert carried(whole_run, STEPS) == []


EVERY_STEP = [step if step == 2 else pytest.param(step, marks=pytest.mark.full) for step in range(1, STEPS)]


@pytest.mark.parametrize("step", EVERY_STEP)
def test_a_resume_from_any_step_ends_in_the_same_bytes(whole_run, tmp_path, step):
    resumed = tmp_path / "resumed"
    shutil.copytree(whole_run, resumed)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(resumed / "checkpoints" / f"step_{later}")
    train(refilled_run(resumed), resume=True)
    assert_same_end(resumed, whole_run)


def test_a_run_stopped_in_the_middle_of_a_rollout_goes_on_from_the_last_update(whole_run, tmp_path, monkeypatch):
    """Saved is what was carried at the update, not what has been played since."""
    real = Player._play_on
    rounds = iter(range(10**9))
    stopped = tmp_path / "stopped"

    def stops(player):
        if player.num_groups and player._groups[0].step == 3 and next(rounds) == 30:
            raise KeyboardInterrupt
        return real(player)

    monkeypatch.setattr(Player, "_play_on", stops)
    with pytest.raises(KeyboardInterrupt):
        train(refilled_run(stopped, **{"train.save_every": 0, "train.eval_every": 2}))
    monkeypatch.undo()
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step_2"]
    assert carried(stopped, 2) == carried(whole_run, 2)
    train(refilled_run(stopped, **{"train.save_every": 0}), resume=True)
    assert_same_end(stopped, whole_run)


def test_at_a_learning_rate_of_nothing_early_trajectories_are_the_same_as_late_ones(tmp_path):
    """The completions that an update cuts begin again with their own seed: staleness alone never changes a draw."""
    options = {"train.learning_rate": 1e-30, "train.steps": 2, "train.weight_decay": 0}
    train(refilled_run(tmp_path / "early", **options))
    train(refilled_run(tmp_path / "late", **options | {"train.max_staleness": 0}))
    assert rows(tmp_path / "early")[1]["staleness/share_1"] > 0

    def trajectories(run: Path) -> list[dict]:
        found = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
        for row in found:
            for turn in row["turns"]:
                turn.pop("policy_version")
        return found

    assert trajectories(tmp_path / "early") == trajectories(tmp_path / "late")


@pytest.mark.full
def test_resampled_batches_take_up_what_was_begun_for_the_next_step(tmp_path):
    """The batch that was begun ahead may be needed at once, in place of dead groups: no question is lost or doubled."""
    options = {"algorithm.name": "dapo", "train.steps": 3, "train.eval_every": 0}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(refilled_run(whole, **options))
    used = [json.loads((whole / "checkpoints" / f"step_{n}" / "trainer.json").read_text()) for n in (1, 2, 3)]
    batches = [state["batches_played"] for state in used]
    assert batches[-1] > 3, "an untrained policy has dead groups, so batches were played again"
    played = [json.loads(line) for line in (whole / "rollouts.jsonl").read_text().splitlines()]
    for step in (1, 2, 3):
        samples = [(row["question_id"], row["sample"]) for row in played if row["step"] == step]
        assert len(set(samples)) == len(samples)
    shutil.copytree(whole, resumed)
    for later in (2, 3):
        shutil.rmtree(resumed / "checkpoints" / f"step_{later}")
    train(refilled_run(resumed, **options), resume=True)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name


def test_staleness_needs_something_that_weighs_it(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.max_staleness is 1.*algorithm\.correction = 'token'"):
        refilled_run(tmp_path, **{"algorithm.correction": "none"})
    sampler = {"algorithm.correction": "none", "algorithm.old_logprobs": "sampler"}
    assert refilled_run(tmp_path, **sampler).train.max_staleness == 1
