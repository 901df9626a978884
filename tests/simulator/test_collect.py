"""Collecting real searches: every one kept with its trajectory, resumable anywhere, never from test questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.search.http_faults import MODES, faulty, good_retrieval
from zs_fast.config import RunConfig
from zs_fast.errors import ConfigError, DataError, PreflightError, SimulatorError
from zs_fast.recipe_files import load_recipe
from zs_fast.search.reward import contains_answer
from zs_fast.simulator import collect as collecting
from zs_fast.simulator.collect import FILE, collect, training_questions
from zs_fast.simulator.records import read_trajectories
from zs_fast.types import SearchMode, SearchResult


def recipe(output: Path, *, play: str = "policy", **more: str) -> RunConfig:
    flags = {
        "output": [str(output)],
        "collect.questions": ["6"],
        "collect.samples": ["2"],
        "collect.documents": ["6"],
        "collect.play": [play],
        "engine.slots": ["4"],
    }
    return load_recipe(["simulator_quickstart"], flags | {name: [value] for name, value in more.items()})


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    collect(recipe(folder))
    return folder


def by_key(path: Path) -> dict[tuple[str, int], object]:
    return {(found.question.id, found.sample): found for found in read_trajectories(path)}


def test_every_trajectory_is_there_with_its_searches_and_outcome(collected: Path) -> None:
    found = read_trajectories(collected / FILE)
    wanted = training_questions(recipe(collected))
    assert len(wanted) == 6
    assert sorted((t.question.id, t.sample) for t in found) == sorted((q.id, s) for q in wanted for s in (0, 1))
    searches = [(t, search) for t in found for search in t.searches]
    assert searches, "the policy searched at least once"
    for trajectory, search in searches:
        assert search.query and len(search.documents) == 6
        assert search.contains_answer == contains_answer(search.documents, trajectory.question.answers)
    assert all(t.f1 is not None and 0 <= t.f1 <= 1 for t in found)
    assert all((t.answer is not None) == (t.stop_reason == "answer") for t in found)
    summary = json.loads((collected / "collect.json").read_bytes())
    assert summary["trajectories"] == 12 and summary["searches"] == len(searches)


@pytest.mark.parametrize("kept_lines", [0, 1, 5, 11])
def test_a_killed_collection_goes_on_to_the_same_end(collected: Path, tmp_path: Path, kept_lines: int) -> None:
    lines = (collected / FILE).read_bytes().splitlines(keepends=True)
    torn = lines[kept_lines][: len(lines[kept_lines]) // 2]
    (tmp_path / FILE).write_bytes(b"".join(lines[:kept_lines]) + torn)
    collect(recipe(tmp_path), resume=True)
    assert by_key(tmp_path / FILE) == by_key(collected / FILE)
    assert (tmp_path / FILE).read_bytes().startswith(b"".join(lines[:kept_lines])), "finished lines stay"


def test_a_finished_collection_plays_nothing(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (collected / FILE).read_bytes()
    monkeypatch.setattr(collecting, "build_arena", lambda *_, **__: pytest.fail("a model was loaded"))
    collect(recipe(collected), resume=True)
    assert (collected / FILE).read_bytes() == before


def test_without_resume_nothing_is_written_over(collected: Path) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        collect(recipe(collected))


def test_another_collection_is_not_gone_on_with(collected: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes((collected / FILE).read_bytes())
    with pytest.raises(ConfigError, match="not among those"):
        collect(recipe(tmp_path, seed="1"), resume=True)


def test_questions_as_queries_need_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "build_arena", lambda *_, **__: pytest.fail("a model was loaded"))
    collect(recipe(tmp_path, play="question"))
    found = read_trajectories(tmp_path / FILE)
    assert len(found) == 12
    for trajectory in found:
        (search,) = trajectory.searches
        assert search.query == trajectory.question.text.rstrip("?") and len(search.documents) == 6
        assert trajectory.f1 is None and trajectory.stop_reason == "question_searched"


def test_a_search_engine_that_fails_is_said_and_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __init__(self) -> None:
            self.asked: list[object] = []

        def submit(self, request: object) -> None:
            self.asked.append(request)

        def poll(self) -> list[SearchResult]:
            asked, self.asked = self.asked, []
            return [
                SearchResult(request=request, documents=(), mode=SearchMode.REAL, failed=True, error="gone")  # type: ignore[arg-type]
                for request in asked
            ]

    monkeypatch.setattr(collecting, "real_search", lambda _: Failing())
    with pytest.raises(SimulatorError, match=r"gone.*--resume"):
        collect(recipe(tmp_path, play="question"))
    assert read_trajectories(tmp_path / FILE) == []


def test_a_server_is_collected_from_and_its_fault_is_one_error(tmp_path: Path) -> None:
    with faulty(good_retrieval) as server:
        words = {"collect.search": "retriever", "retriever.url": server.url, "retriever.max_retries": "0"}
        collect(recipe(tmp_path / "good", play="question", **words))
        for trajectory in read_trajectories(tmp_path / "good" / FILE):
            assert trajectory.searches[0].documents == ("Emma: A novel by Jane Austen",)
        server.misbehave(MODES["HTTP 500"], times=-1)
        with pytest.raises(PreflightError, match=r"does not answer: HTTP 500"):
            collect(recipe(tmp_path / "never", play="question", **words))
        server.misbehave(lambda exchange: exchange.reply(exchange.good if b"ping" in exchange.body else b"{}"))
        with pytest.raises(SimulatorError, match=r"'result'.*--resume"):
            collect(recipe(tmp_path / "failing", play="question", **words))
    assert read_trajectories(tmp_path / "failing" / FILE) == []


ROW = {"id": "a_train_1", "question": "who wrote emma?", "golden_answers": ["Jane Austen"], "data_source": "a"}


@pytest.mark.parametrize(
    "name, row_id, told",
    [
        ("nq.test.jsonl", "1", "no training questions"),
        ("dev.jsonl", "1", "no training questions"),
        ("nq.jsonl", "nq_test_1", "by their ids"),
        ("nq.jsonl", "heldout_0", "by their ids"),
    ],
)
def test_test_questions_are_refused(tmp_path: Path, name: str, row_id: str, told: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(ROW | {"id": row_id}) + "\n")
    with pytest.raises(DataError, match=told):
        training_questions(recipe(tmp_path / "out", data=str(path)))


def test_the_quickstarts_own_test_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training questions"):
        training_questions(recipe(tmp_path, data="quickstart:heldout"))


def test_a_question_of_the_evaluation_is_refused_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "judged.jsonl").write_text(json.dumps(ROW | {"id": "x", "question": "Who wrote  Emma"}) + "\n")
    data = {"data": str(tmp_path / "mine.jsonl"), "eval.data": str(tmp_path / "judged.jsonl")}
    with pytest.raises(DataError, match=r"1 of 1 questions are in eval\.data"):
        training_questions(recipe(tmp_path / "out", **data))


@pytest.mark.parametrize("name", ["contest.train.jsonl", "latest.jsonl", "development.jsonl", "nq.train.jsonl"])
def test_names_that_only_hold_such_a_word_are_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(ROW) + "\n")
    assert len(training_questions(recipe(tmp_path / "out", data=str(tmp_path / name)))) == 1
