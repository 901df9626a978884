"""Runs that are stopped from outside: what was finished is kept, and a resume ends in the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import zs_fast.train
from zs_fast.errors import ConfigError, SimulatorError
from zs_fast.recipe_files import load_recipe
from zs_fast.system.metrics import RunLog
from zs_fast.train import train

pytestmark = pytest.mark.usefixtures("no_pictures")

STEPS = 2


def short_run(output: Path, **overrides: object):
    """Two steps of one question with real search; checkpoints only at the end."""
    short = {
        "output": output,
        "simulator.kind": "bm25",
        "train.steps": STEPS,
        "train.questions_per_step": 1,
        "train.group_size": 2,
        "train.save_every": 0,
        "eval.questions": 1,
        "eval.at_start": "false",
        "eval.search": "none",
    }
    return load_recipe(["quickstart"], {key: [str(value)] for key, value in (short | overrides).items()})


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[Path, list[tuple[str, int, int]]]:
    """An undisturbed run's folder, and all that its screen was told about progress."""
    told: list[tuple[str, int, int]] = []
    output = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "progress", lambda self, *call: told.append(call))
        train(short_run(output))
    return output, told


def fail_at(monkeypatch, name: str, step: int, error: type[BaseException]) -> None:
    """Let the function of zs_fast.train of this name raise when it is called for `step`."""
    real = getattr(zs_fast.train, name)

    def fails(*arguments: object, **named: object) -> object:
        if named["step"] == step:
            raise error("stopped from outside")
        return real(*arguments, **named)

    monkeypatch.setattr(zs_fast.train, name, fails)


def test_each_phase_tells_how_far_it_is(whole_run):
    _, told = whole_run
    assert told.count(("rollout", 0, 2)) == told.count(("rollout", 2, 2)) == STEPS
    assert told[-1] == ("evaluation, closed_book", 1, 1)


@pytest.mark.parametrize(
    "name, error, kept",
    [("play", KeyboardInterrupt, 1), ("evaluate", SimulatorError, 2)],
)
def test_finished_steps_are_kept_and_a_resume_ends_in_the_same_bytes(
    whole_run, tmp_path, monkeypatch, name, error, kept
):
    run = tmp_path / "run"
    fail_at(monkeypatch, name, STEPS, error)
    with pytest.raises(error):
        train(short_run(run))
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{kept}"]
    monkeypatch.undo()
    summary = train(short_run(run), resume=True)
    whole, _ = whole_run
    for log in ("metrics.jsonl", "rollouts.jsonl"):
        assert (run / log).read_bytes() == (whole / log).read_bytes(), log
    assert summary["evaluations"] == json.loads((whole / "summary.json").read_text())["evaluations"]
    assert (run / "checkpoints" / f"step_{STEPS}" / "model" / "model.safetensors").read_bytes() == (
        whole / "checkpoints" / f"step_{STEPS}" / "model" / "model.safetensors"
    ).read_bytes()


def test_a_run_cut_shorter_on_resume_still_gets_its_last_evaluation(tmp_path, monkeypatch):
    run = tmp_path / "run"
    fail_at(monkeypatch, "play", 2, SimulatorError)
    with pytest.raises(SimulatorError):
        train(short_run(run))
    monkeypatch.undo()
    summary = train(short_run(run, **{"train.steps": 1}), resume=True)
    assert "f1_closed_book" in summary
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1] and "eval/closed_book/f1" in rows[-1]
    state = json.loads((run / "checkpoints" / "step_1" / "trainer.json").read_text())
    assert state["evaluated_step"] == 1 and summary["seconds"] >= round(state["seconds"], 2)


def test_more_questions_per_step_than_the_data_holds_is_found_before_anything_is_played(tmp_path, monkeypatch):
    monkeypatch.setattr(zs_fast.train, "load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"train\.questions_per_step is 801"):
        train(short_run(tmp_path / "run", **{"train.questions_per_step": 801}))
