"""`zs-fast eval`: what it prints and leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import pytest
import torch
from rich.console import Console

import zs_fast.evaluate
from zs_fast import cli
from zs_fast.config import EvalConfig, GameConfig, ModelConfig, RunConfig, SimulatorConfig
from zs_fast.errors import PreflightError
from zs_fast.evaluate import evaluate_run
from zs_fast.models.load import load_model, resolve_path
from zs_fast.scoreboard import Result, summarise
from zs_fast.setup import build_arena, simulator_name
from zs_fast.system.console import LiveScreen
from zs_fast.types import Question, Role, Scores, StopReason, Trajectory


def test_each_search_has_a_result_and_its_trajectories(tmp_path, capfd):
    words = ["--eval.questions", "2", "--eval.search", "bm25", "none", "--output", str(tmp_path / "judged"), "--json"]
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", "quickstart", *words])
    captured = capfd.readouterr()
    assert end.value.code == 0 and captured.err == ""
    summary = json.loads(captured.out.splitlines()[-1])
    assert list(summary["results"]) == ["bm25", "closed_book"]
    assert summary["data"] == ["quickstart:heldout"] and summary["temperature"] == 0.0
    shown = [line for line in captured.out.splitlines() if ": F1 " in line]
    assert [line.partition(":")[0] for line in shown] == ["bm25", "closed_book"]
    assert all(f"F1 {r['f1']:.3f} " in line for line, r in zip(shown, summary["results"].values(), strict=True))
    assert json.loads((tmp_path / "judged" / "evaluation.json").read_text()) == summary
    for name, result in summary["results"].items():
        lines = (tmp_path / "judged" / f"trajectories_heldout_{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert result["num_questions"] == len(rows) == len({row["question_id"] for row in rows}) == 2
        assert result["f1"] == pytest.approx(sum(row["f1"] for row in rows) / 2)
        found = [turn["search"]["documents"] for row in rows for turn in row["turns"] if turn["search"]]
        assert all(bool(documents) == (name == "bm25") for documents in found)


def test_progress_on_a_terminal(tmp_path, monkeypatch):
    """Each evaluation counts up to all its questions, without the table and the bar of training steps."""
    screens = []

    class Watched(LiveScreen):
        def __init__(self, total_steps: int, name: str) -> None:
            self.output, self.told = io.StringIO(), []
            console = Console(file=self.output, width=100, force_terminal=True, legacy_windows=False)
            super().__init__(total_steps, name, console)
            screens.append(self)

        def progress(self, label: str, done: int, total: int) -> None:
            self.told.append((label, done, total))
            super().progress(label, done, total)

    monkeypatch.setattr(zs_fast.evaluate, "make_screen", Watched)
    config = RunConfig(
        name="my_run",
        output=tmp_path,
        game=GameConfig(max_context_tokens=1024, max_new_tokens=32),
        eval=EvalConfig(data="quickstart:heldout", questions=3, search=("none",)),
    )
    evaluate_run(config)
    (screen,) = screens
    assert screen.told[-1] == ("evaluation, closed_book", 3, 3) and screen.told == sorted(screen.told)
    text = screen.output.getvalue()
    assert "evaluation, closed_book" in text and "closed_book: F1 " in text
    assert "reward" not in text and "my_run" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the screen was closed: the cursor is back"


@pytest.fixture
def checkpoint(tmp_path):
    """The model folder of a checkpoint whose run began with quickstart:policy."""
    folder = tmp_path / "step_3" / "model"
    shutil.copytree(resolve_path("quickstart:simulator"), folder)
    (folder.parent / "trainer.json").write_text(json.dumps({"config": {"model": {"path": "quickstart:policy"}}}))
    return folder


def policy_simulates(model_path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(model_path)),
        simulator=SimulatorConfig(kind="policy", max_new_tokens=16),
        game=GameConfig(max_context_tokens=1024, max_new_tokens=32),
        eval=EvalConfig(data="quickstart:heldout", questions=1),
    )


def test_a_checkpoint_is_judged_with_the_simulator_it_was_trained_with(checkpoint, tmp_path):
    config = policy_simulates(checkpoint)
    arena = build_arena(config, load_model(checkpoint), device=torch.device("cpu"), training=False)
    with contextlib.closing(arena):
        assert arena.engine.module(Role.SIMULATOR).name_or_path == str(resolve_path("quickstart:policy"))
        assert arena.engine.module(Role.POLICY).name_or_path == str(checkpoint)
    summary = evaluate_run(config.model_copy(update={"output": tmp_path / "judged"}))
    assert (summary["model"], summary["simulator"]) == (str(checkpoint), "quickstart:policy")


def test_who_simulates(checkpoint, tmp_path):
    config = policy_simulates(checkpoint)
    assert simulator_name(config, training=True) == str(checkpoint), "a run that begins with it"
    assert simulator_name(policy_simulates("quickstart:policy"), training=False) == "quickstart:policy"
    shutil.copytree(checkpoint, tmp_path / "copied")
    assert simulator_name(policy_simulates(tmp_path / "copied"), training=False) == str(tmp_path / "copied")
    own = config.model_copy(update={"simulator": SimulatorConfig(kind="model", path="a/model")})
    assert simulator_name(own, training=False) == "a/model"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": {"model": null}}'])
def test_a_checkpoint_that_does_not_say_what_it_was(checkpoint, content):
    (checkpoint.parent / "trainer.json").write_text(content)
    with pytest.raises(PreflightError, match=r"does not say which model .* --simulator.path"):
        simulator_name(policy_simulates(checkpoint), training=False)


def trajectory(number: int, f1: float, source: str) -> Trajectory:
    question = Question(id=f"{source}:{number}", text="?", answers=("a",), source=source)
    return Trajectory(
        question=question,
        sample=0,
        prompt_ids=(1,),
        turns=(),
        stop_reason=StopReason.TURN_LIMIT,
        scores=Scores(f1=f1, cover_match=1.0),
        reward=f1,
    )


def test_means_by_hand_and_an_interval_around_them():
    played = [trajectory(n, float(n % 4 == 0), "even" if n % 2 == 0 else "odd") for n in range(100)]
    result = summarise([Result.of(one) for one in played])
    assert (result.f1, result.exact_match, result.cover_match, result.answered_share) == (0.25, 0.0, 1.0, 0.0)
    assert result.f1_by_source == {"even": 0.5, "odd": 0.0}
    deviation = (0.25 * 0.75 / 100) ** 0.5
    assert result.f1_low == pytest.approx(0.25 - 1.96 * deviation, abs=0.03)
    assert result.f1_high == pytest.approx(0.25 + 1.96 * deviation, abs=0.03)
    assert summarise([Result.of(one) for one in played]) == result and summarise([]).num_questions == 0
