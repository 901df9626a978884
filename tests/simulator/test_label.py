"""Labels: right by each of the three ways, balanced, without duplicates, and no question on both sides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from zs_fast.config import RunConfig
from zs_fast.errors import ConfigError, DataError
from zs_fast.learn.sft_data import read_conversations
from zs_fast.recipe_files import load_recipe
from zs_fast.search.codec import ByteCodec
from zs_fast.search.documents import parse_documents
from zs_fast.search.prompts import simulator_prompt
from zs_fast.search.reward import contains_answer
from zs_fast.simulator.collect import FILE
from zs_fast.simulator.judge import judge_prompt, read_verdicts
from zs_fast.simulator.label import label
from zs_fast.simulator.records import CollectedTrajectory, FoundSearch, read_searches, to_row, write_rows
from zs_fast.testing import ScriptedEngine
from zs_fast.types import Question, Role, SearchMode


def trajectory(number: int, *, hits: int = 1, found: int = 6, f1: float = 1.0, text: str = "") -> CollectedTrajectory:
    """A question whose answer stands in the last `hits` of `found` documents."""
    question = Question(id=f"s:{number}", text=text or f"what is {number}?", answers=(f"thing {number}",), source="s")
    documents = [f"Passage {n} speaks of {number}." for n in range(found - hits)]
    documents += [f"Passage {n} says: thing {number}." for n in range(hits)]
    search = FoundSearch(turn=0, query=f"what {number}", documents=tuple(documents), contains_answer=hits > 0)
    return CollectedTrajectory(
        question=question,
        sample=0,
        searches=(search,),
        failed_searches=0,
        answer="thing",
        f1=f1,
        exact_match=0.0,
        cover_match=0.0,
        stop_reason="answer",
    )


def settings(folder: Path, trajectories: list[CollectedTrajectory], **more: str) -> RunConfig:
    write_rows(folder / FILE, map(to_row, trajectories))
    flags = {"output": str(folder / "labels"), "data": str(folder), "simulator.documents": "2"} | more
    return load_recipe(["simulator_quickstart"], {name: [value] for name, value in flags.items()})


def examples(folder: Path, split: str = "train") -> list[tuple[str, list[str]]]:
    """(prompt, documents) of each example."""
    rows = [json.loads(line) for line in (folder / "labels" / f"{split}_alpaca.jsonl").read_text().splitlines()]
    return [(row["instruction"], list(parse_documents(row["output"], 2).documents)) for row in rows]


def test_by_answer_each_search_can_give_one_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    played = [trajectory(number) for number in range(20)]
    summary = label(settings(tmp_path, played))
    shown = capsys.readouterr().out
    assert "train: questions 16" in shown and "useful_contains_answer 1, noisy_contains_answer 0" in shown
    found = examples(tmp_path)
    assert len(found) == summary["train"]["examples"] == 2 * 16 and summary["validation"]["examples"] == 2 * 4
    for prompt, documents in found:
        answer = prompt.partition("whose answer is ")[2].partition(".")[0]
        useful = "two useful documents" in prompt
        assert len(documents) == 2 and contains_answer(documents, [answer]) == useful
        assert not useful or contains_answer(documents[:1], [answer]), "the best document comes first"
    train = summary["train"]
    assert (train["useful_contains_answer"], train["noisy_contains_answer"]) == (1.0, 0.0)
    assert train["real_contains_answer"] == 0.0, "it stands in the sixth document, and two are shown"
    assert train["query_contains_answer"] == 0.0


def test_by_answer_a_useful_example_may_draw_on_another_search_for_its_question(tmp_path: Path) -> None:
    played = []
    for number in range(20):
        last = trajectory(number)
        first = replace(last.searches[0], turn=0, query=f"what leads to {number}", documents=("Bridge.", "River."))
        played.append(replace(last, searches=(first, replace(last.searches[0], turn=1))))
    for answers_from, useful in (("search", 16), ("question", 32)):
        folder = tmp_path / answers_from
        folder.mkdir()
        summary = label(settings(folder, played, **{"label.answers_from": answers_from}))["train"]
        assert (summary["useful_found"], summary["noisy_found"]) == (useful, 32)
        bridging = [d for p, d in examples(folder) if "what leads to" in p and "two useful" in p]
        assert len(bridging) == useful - 16
        assert all(" says: thing " in documents[0] and documents[1] == "Bridge." for documents in bridging)


def test_both_forms_are_what_sft_reads_and_say_the_same(tmp_path: Path) -> None:
    played = [trajectory(number) for number in range(10)]
    config = settings(tmp_path, played)
    label(config)
    alpaca = read_conversations(tmp_path / "labels" / "train_alpaca.jsonl")
    assert alpaca == read_conversations(tmp_path / "labels" / "train_sharegpt.jsonl")
    first, reply = alpaca[0]
    known = {one.question.text: one for one in played}
    text = first.content.partition('answer the question: "')[2].partition('" whose')[0]
    question, mode = known[text].question, SearchMode("useful" if "useful" in first.content else "noisy")
    request = replace(read_searches(tmp_path / "labels" / "train_searches.jsonl")[0], question=question).request()
    request = replace(request, query=known[text].searches[0].query)
    assert first.content == simulator_prompt("fine_tuned", mode, request, 2), "as it will be asked in training"
    assert not parse_documents(reply.content, 2).malformed


def test_no_question_is_on_both_sides_even_under_two_ids(tmp_path: Path) -> None:
    played = [trajectory(number, text=f"what is {number // 2}?") for number in range(40)]
    label(settings(tmp_path, played, **{"label.validation_fraction": "0.5"}))
    sides = [
        {search.question.text for search in read_searches(tmp_path / "labels" / f"{split}_searches.jsonl")}
        for split in ("train", "validation")
    ]
    assert len(sides[0]) == len(sides[1]) == 10 and not sides[0] & sides[1]


def test_the_same_search_counts_once(tmp_path: Path) -> None:
    played = [trajectory(number) for number in range(10)]
    again = [replace(one, sample=1) for one in played]
    summary = label(settings(tmp_path, played + again))
    assert summary["train"]["duplicates_left_out"] == 8 and summary["train"]["examples"] == 16


def test_the_frequent_mode_is_cut_to_the_rare_one(tmp_path: Path) -> None:
    played = [trajectory(number, hits=0) for number in range(12)] + [trajectory(number) for number in range(12, 24)]
    summary = label(settings(tmp_path, played))
    train = summary["train"]
    assert train["noisy_found"] > train["useful_found"] and train["examples"] == 2 * train["useful_found"]
    assert sum("two useful" in prompt for prompt, _ in examples(tmp_path)) == train["useful_found"]


def test_by_answer_yes_and_no_can_not_be_told(tmp_path: Path) -> None:
    odd = trajectory(99)
    odd = replace(odd, question=replace(odd.question, answers=("Yes",)))
    summary = label(settings(tmp_path, [odd] + [trajectory(number) for number in range(20)]))
    assert summary["train"]["without_a_label"] + summary["validation"]["without_a_label"] == 1
    assert not any("whose answer is Yes" in prompt for prompt, _ in examples(tmp_path))


def test_by_outcome_the_trajectory_decides(tmp_path: Path) -> None:
    played = [trajectory(number, f1=1.0 if number % 2 else 0.5, found=2, hits=1) for number in range(40)]
    label(settings(tmp_path, played, **{"label.by": "outcome", "label.correct_f1": "0.8"}))
    for prompt, documents in examples(tmp_path):
        number = int(prompt.partition("thing ")[2].partition(".")[0])
        assert ("two useful documents" in prompt) == bool(number % 2)
        assert contains_answer(documents, [f"thing {number}"]), "outcome asks nothing of the documents"


def test_by_outcome_needs_a_policy_that_played(tmp_path: Path) -> None:
    played = [replace(trajectory(number), f1=None) for number in range(10)]
    with pytest.raises(DataError, match=r"collect\.play"):
        label(settings(tmp_path, played, **{"label.by": "outcome"}))


def test_the_judge_is_asked_about_each_search_and_its_word_counts() -> None:
    codec = ByteCodec()
    replies = {"a": "Yes.", "b": " no", "c": "Perhaps", "d": "**NO**, they"}

    def script(ids: list[int]) -> str:
        query = codec.decode(ids).partition("Query: ")[2].partition("\n")[0]
        return replies[query]

    engine = ScriptedEngine({Role.SIMULATOR: script}, codec, steps_needed=lambda number: 4 - number)
    searches = [(query, [f"about {query}", "left out"]) for query in replies]
    assert read_verdicts(engine, codec, searches, 1) == [True, False, None, False]
    asked = codec.decode(engine.requests[0][2])
    assert asked == judge_prompt("a", ["about a"]) and "left out" not in asked


def test_by_judge_what_it_can_not_tell_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zs_fast.simulator import label as labelling

    def judged(searches: list[tuple[str, tuple[str, ...]]], config: RunConfig) -> list[bool | None]:
        return [(True, False, None)[int(query.split()[1]) % 3] for query, _ in searches]

    monkeypatch.setattr(labelling, "judged_useful", judged)
    summary = label(settings(tmp_path, [trajectory(number) for number in range(30)], **{"label.by": "judge"}))
    assert summary["train"]["without_a_label"] + summary["validation"]["without_a_label"] == 10
    numbers = {int(prompt.partition("thing ")[2].partition(".")[0]) % 3 for prompt, _ in examples(tmp_path)}
    assert numbers == {0, 1}


def test_what_can_not_be_learnt_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 useful"):
        label(settings(tmp_path, [trajectory(number, hits=0) for number in range(10)]))
    with pytest.raises(DataError, match="no such file"):
        label(settings(tmp_path, []).model_copy(update={"data": str(tmp_path / "nowhere")}))


def test_labels_are_not_written_over(tmp_path: Path) -> None:
    config = settings(tmp_path, [trajectory(number) for number in range(10)])
    label(config)
    with pytest.raises(ConfigError, match="exists already"):
        label(config)
