"""`zs-fast eval`: what it prints and leaves behind."""

from __future__ import annotations

import json

import pytest

from zs_fast import cli
from zs_fast.evaluate import summarise
from zs_fast.types import Question, Scores, StopReason, Trajectory


def test_each_search_has_a_result_and_its_trajectories(tmp_path, capfd):
    words = ["--eval.questions", "2", "--eval.search", "bm25", "none", "--output", str(tmp_path / "judged"), "--json"]
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", "quickstart", *words])
    captured = capfd.readouterr()
    assert end.value.code == 0 and captured.err == ""
    summary = json.loads(captured.out.splitlines()[-1])
    assert list(summary["results"]) == ["bm25", "closed_book"]
    assert summary["data"] == "quickstart:heldout" and summary["temperature"] == 0.0
    assert json.loads((tmp_path / "judged" / "evaluation.json").read_text()) == summary
    for name, result in summary["results"].items():
        lines = (tmp_path / "judged" / f"trajectories_{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert result["num_questions"] == len(rows) == len({row["question_id"] for row in rows}) == 2
        assert result["f1"] == pytest.approx(sum(row["f1"] for row in rows) / 2)
        found = [turn["search"]["documents"] for row in rows for turn in row["turns"] if turn["search"]]
        assert all(bool(documents) == (name == "bm25") for documents in found)


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
    result = summarise(played)
    assert (result.f1, result.exact_match, result.cover_match, result.answered_share) == (0.25, 0.0, 1.0, 0.0)
    assert result.f1_by_source == {"even": 0.5, "odd": 0.0}
    deviation = (0.25 * 0.75 / 100) ** 0.5
    assert result.f1_low == pytest.approx(0.25 - 1.96 * deviation, abs=0.03)
    assert result.f1_high == pytest.approx(0.25 + 1.96 * deviation, abs=0.03)
    assert summarise(played) == result and summarise([]).num_questions == 0
