"""An evaluation that was killed: what is finished stays, a resume ends in the same table, another recipe is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zs_fast.config import RunConfig
from zs_fast.errors import CheckpointUnusableError, ConfigError
from zs_fast.evaluate import evaluate_run
from zs_fast.recipe_files import load_recipe

WORDS = {
    "eval.questions": ["4"],
    "eval.search": ["bm25", "none"],
    "eval.methods": ["agent", "direct", "rag"],
    "engine.slots": ["2"],
    "game.max_turns": ["2"],
    "game.max_new_tokens": ["24"],
}
STOPS_AFTER_THREE = """
import sys, time
from zs_fast import cli
from zs_fast.evaluation_folder import EvaluationFolder

append, count = EvaluationFolder.append, 0

def counted(self, *arguments):
    global count
    append(self, *arguments)
    count += 1
    if count == 3:
        print("three", flush=True)
        time.sleep(600)

EvaluationFolder.append = counted
cli.main(sys.argv[1:])
"""


def recipe(data: Path, output: Path, **changes: list[str]) -> RunConfig:
    words = WORDS | {"eval.data": ["quickstart:heldout", str(data)], "output": [str(output)]}
    return load_recipe(["quickstart"], words | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A set of its own beside the embedded one."""
    path = tmp_path_factory.mktemp("data") / "emma.test.jsonl"
    rows = [{"id": n, "question": f"who wrote novel {n}?", "golden_answers": ["Jane Austen"]} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The folder of an undisturbed evaluation."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    evaluate_run(recipe(data, folder))
    return folder


def rows(folder: Path) -> dict[str, list[dict]]:
    """Of each file, its rows in the order of the question ids: when a trajectory is finished depends on the others."""
    read = {path.name: path.read_text().splitlines() for path in folder.glob("trajectories_*.jsonl")}
    return {name: sorted(map(json.loads, lines), key=lambda row: row["question_id"]) for name, lines in read.items()}


def test_what_an_evaluation_leaves(whole):
    summary = json.loads((whole / "evaluation.json").read_text())
    names = ["bm25", "closed_book", "direct", "rag_bm25"]
    assert list(summary["results"]) == names and list(summary["sets"]) == ["heldout", "emma"]
    assert summary["num_questions"] == {"heldout": 4, "emma": 3}, "all rows where there are fewer than asked for"
    assert summary["settings"]["decoding"] == "greedy" and summary["settings"]["max_turns"] == 2
    files = rows(whole)
    assert sorted(files) == sorted(f"trajectories_{s}_{n}.jsonl" for s in summary["sets"] for n in names)
    for set_name, by_name in summary["sets"].items():
        for name, result in by_name.items():
            played = files[f"trajectories_{set_name}_{name}.jsonl"]
            assert len(played) == len({row["question_id"] for row in played}) == summary["num_questions"][set_name]
            assert result["cover_match"] == pytest.approx(sum(row["cover_match"] for row in played) / len(played))
            assert all((row["set"], row["evaluation"]) == (set_name, name) for row in played)
            assert ("opening" in played[0]) == (name == "rag_bm25")
    page = (whole / "evaluation.md").read_text()
    assert "Greedy; 7 questions (the first 4 of each set)" in page and page.count("| average of sets") == 4
    assert summary["settings"]["fingerprint"] in page
    for name in names:
        mean = sum(summary["sets"][s][name]["f1"] for s in summary["sets"]) / 2
        assert summary["average_of_sets"][name]["f1"]["mean"] == pytest.approx(mean)


def test_killed_and_resumed_it_gives_the_same_table(whole, data, tmp_path):
    folder = tmp_path / "killed"
    words = WORDS | {"eval.data": ["quickstart:heldout", str(data)], "output": [str(folder)]}
    flags = [word for name, values in words.items() for word in (f"--{name}", *values)]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS_AFTER_THREE, "eval", "quickstart", *flags],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert any(line == "three\n" for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "evaluation.json").exists()
    kept = rows(folder)
    assert sum(map(len, kept.values())) == 3
    torn = folder / next(iter(kept))
    torn.write_bytes(torn.read_bytes() + b'{"evaluation": "bm25", "ques')

    with pytest.raises(ConfigError, match=r"already holds an evaluation\. Add --resume"):
        evaluate_run(recipe(data, folder))
    evaluate_run(recipe(data, folder), resume=True)
    assert rows(folder) == rows(whole)
    for name in ("evaluation.json", "evaluation.md", "settings.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    once_more = evaluate_run(recipe(data, folder), resume=True)
    assert rows(folder) == rows(whole) and once_more == json.loads((whole / "evaluation.json").read_text())


@pytest.mark.parametrize(
    "name, value, key",
    [
        ("eval.temperature", "0.5", "recipe.eval.temperature: was 0.0, is 0.5"),
        ("game.max_turns", "3", "recipe.game.max_turns: was 2, is 3"),
        ("seed", "1", "recipe.seed: was 0, is 1"),
        ("model.path", "quickstart:simulator", "files.quickstart:simulator: was '(absent)'"),
    ],
)
def test_another_recipe_is_refused(whole, data, name, value, key):
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.name != "lock"}
    with pytest.raises(ConfigError) as error:
        evaluate_run(recipe(data, whole, **{name: [value]}), resume=True)
    assert key in str(error.value) and "another --output" in str(error.value)
    assert {path.name: path.read_bytes() for path in whole.iterdir() if path.name != "lock"} == before


def test_other_questions_in_the_same_file_are_refused(whole, data):
    content = data.read_text()
    try:
        data.write_text(content.replace("novel 1", "book 1"))
        with pytest.raises(ConfigError, match=r"questions.emma: was '3 of "):
            evaluate_run(recipe(data, whole), resume=True)
    finally:
        data.write_text(content)


def test_rows_that_nobody_wrote_are_named(data, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "trajectories_emma_bm25.jsonl").write_text('{"stop_reason": "answer"}\n')
    with pytest.raises(ConfigError, match=r"no settings\.json"):
        evaluate_run(recipe(data, folder), resume=True)


def test_a_failed_search_is_played_again(data, tmp_path, whole):
    """Its trajectory counts in the table, and a resume gives it another chance."""
    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    for path in whole.glob("trajectories_*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        if path.name == "trajectories_emma_bm25.jsonl":
            row = json.loads(lines[0]) | {"stop_reason": "search_failed", "f1": 0.0, "answer": None}
            lines[0] = json.dumps(row, ensure_ascii=False) + "\n"
        (folder / path.name).write_text("".join(lines))
    evaluate_run(recipe(data, folder), resume=True)
    assert rows(folder) == rows(whole)
    (folder / "trajectories_emma_bm25.jsonl").write_text('{"stop_reason": "answer"}\n')
    with pytest.raises(CheckpointUnusableError, match="KeyError"):
        evaluate_run(recipe(data, folder), resume=True)
