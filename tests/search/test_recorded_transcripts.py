"""Real transcripts of two other trainers, read with our parser. Skipped where the data folder is absent.

Data: `trajectories/search_r1_cases.jsonl.gz` and `trajectories/r1_searcher_qwen.jsonl.gz` under the folder that the
environment variable ZS_FAST_DATA names (default: shared/data beside the repository).
"""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from zs_fast.config import GameConfig
from zs_fast.search.parser import parse_turn
from zs_fast.search.prompts import policy_prompt
from zs_fast.types import Answer, Question, Search, StopReason

DATA = Path(os.environ.get("ZS_FAST_DATA") or Path(__file__).parents[3] / "shared" / "data")


def rows(name: str) -> list[dict]:
    path = DATA / "trajectories" / name
    if not path.is_file():
        pytest.skip(f"no {path}: set ZS_FAST_DATA to the folder that holds trajectories/")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def search_r1_turns(row: dict) -> tuple[str, list[str], list[str]]:
    """The user's message, the policy's turns, and the documents between them."""
    before, _, played = row["text"].partition("<|im_start|>assistant\n")
    pieces = re.split(r"\n\n<information>(.*?)</information>\n\n", played, flags=re.DOTALL)
    return before.partition("<|im_start|>user\n")[2].removesuffix("<|im_end|>\n"), pieces[0::2], pieces[1::2]


def test_search_r1_transcripts_mean_what_they_say() -> None:
    for row in rows("search_r1_cases.jsonl.gz"):
        prompt, turns, documents = search_r1_turns(row)
        assert prompt == policy_prompt(row["question"]), "the prompt is Search-R1's, to the byte"
        assert len(turns) == len(documents) + 1 >= 2
        for turn in turns[:-1]:
            action = parse_turn(turn)
            assert isinstance(action, Search) and f"<search> {action.query} </search>" in turn
        last = parse_turn(turns[-1])
        assert isinstance(last, Answer) and f"<answer> {last.text} </answer>" in turns[-1]


def test_search_r1_transcripts_can_be_played(family_codec, play) -> None:
    for row in rows("search_r1_cases.jsonl.gz"):
        _, turns, documents = search_r1_turns(row)
        answer = parse_turn(turns[-1])
        assert isinstance(answer, Answer)
        question = Question(id=row["id"], text=row["question"], answers=(answer.text,), source="search_r1")
        game = GameConfig(max_context_tokens=16384, max_observation_tokens=4000, max_new_tokens=2000)
        trajectory = play(family_codec, question, turns, documents[:1], game).trajectory()
        assert trajectory.stop_reason is StopReason.ANSWER and trajectory.reward == 1.0
        assert trajectory.num_searches == len(turns) - 1
        assert documents[0].strip() in trajectory.turns[0].observation, "an honest document is shown as it is"


def test_r1_searcher_transcripts_give_their_recorded_answers() -> None:
    """The same game with other marks: queries are mapped to ours, every turn starts anew after its documents."""
    answers = searches = 0
    for row in rows("r1_searcher_qwen.jsonl.gz"):
        text = row["text"].replace("<|begin_of_query|>", "</think><search>").replace("<|end_of_query|>", "</search>")
        turns = re.split(r"<\|begin_of_documents\|>.*?<\|end_of_documents\|>", text, flags=re.DOTALL)
        for turn in turns[:-1]:
            action = parse_turn(turn)
            assert isinstance(action, Search), turn
            searches += 1
        last = parse_turn(turns[-1])
        assert isinstance(last, Answer) and last.text in turns[-1], row["id"]
        answers += last.text == row["pred_answer"].strip()
    # One record (bamboogle 65) names another wording of the date than the text it was taken from.
    assert answers == 183 and searches >= 184
