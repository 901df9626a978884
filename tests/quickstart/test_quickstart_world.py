"""The embedded world is what its documentation says, and its files are what its code writes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from zs_fast.models.load import load_model
from zs_fast.quickstart import build_world
from zs_fast.quickstart.demonstrations import BEHAVIOURS, labelled_search, policy_demonstration
from zs_fast.quickstart.tokenizer import CHAT_TEMPLATE, build_tokenizer
from zs_fast.quickstart.world import name_pool
from zs_fast.search.backends.bm25 import Bm25Search
from zs_fast.search.backends.passages import load_passages
from zs_fast.search.codec import Codec
from zs_fast.search.data import load_questions
from zs_fast.search.environment import Episode
from zs_fast.search.parser import parse_turn
from zs_fast.types import Answer, Invalid, SearchRequest

WORLD = Path(build_world.__file__).parent / "world"


def test_the_files_are_what_the_code_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(build_world, "FOLDER", tmp_path)
    build_world.main()
    for name in ("passages.jsonl", "train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (WORLD / name).read_bytes(), name


def test_heldout_answers_are_never_training_answers():
    train, heldout = load_questions("quickstart:train"), load_questions("quickstart:heldout")
    assert len(train) == 800 and len(heldout) == 400
    assert not {q.answers for q in train} & {q.answers for q in heldout}
    assert not {q.text for q in train} & {q.text for q in heldout}
    for questions in (train, heldout):
        assert sum(question.source == "quickstart_two_hop" for question in questions) == len(questions) // 2


def test_every_heldout_question_can_be_solved_with_bm25():
    """Each hop's statement is among the top five passages for the hop's query, so F1 1.0 is within reach."""
    world = build_world.build_world()
    _, heldout = build_world.split_questions(world, random.Random("zs_fast quickstart questions"))
    search = Bm25Search(load_passages("quickstart:world"), documents=5)
    question = load_questions("quickstart:heldout")[0]
    assert question.text.rstrip("?") == heldout[0].text.rstrip("?")
    for hop in (hop for question in heldout for hop in question.hops):
        search.submit(
            SearchRequest(step=0, question=question, sample=0, turn=0, query=hop.query, noise_probability=0.0)
        )
    results = search.poll()
    hops = [hop for question in heldout for hop in question.hops]
    missed = [
        hop.query for hop, result in zip(hops, results, strict=True) if hop.statement not in " ".join(result.documents)
    ]
    assert missed == []


def test_demonstrations_are_played_in_the_wire_format():
    draws = random.Random(0)
    for _ in range(200):
        demonstration = policy_demonstration(draws)
        actions = [parse_turn(text) for text, by_policy in demonstration.segments if by_policy]
        assert not any(isinstance(action, Invalid) for action in actions)
        assert [isinstance(action, Answer) for action in actions] == [False] * (len(actions) - 1) + [True]
        assert all(
            text.startswith("\n\n<information>Doc 1: ") for text, by_policy in demonstration.segments if not by_policy
        )


def test_most_demonstrations_are_bad_play():
    assert sum(BEHAVIOURS.values()) == pytest.approx(1.0)
    assert BEHAVIOURS["full"] == 0.2


def test_noisy_pairs_never_hold_the_answer_and_useful_ones_answer_their_query():
    draws = random.Random(1)
    pairs = [labelled_search(draws) for _ in range(400)]
    held = {"useful": 0, "noisy": 0}
    count = {"useful": 0, "noisy": 0}
    for pair in pairs:
        mode = "useful" if "five useful documents" in pair.prompt else "noisy"
        answer = pair.prompt.split("whose answer is ", 1)[1].split(".\n", 1)[0]
        count[mode] += 1
        held[mode] += answer in pair.documents
        assert pair.documents.count("\n") == 4
    assert min(count.values()) > 150
    assert held["noisy"] == 0
    assert held["useful"] / count["useful"] > 0.6  # the rest are first hops, whose answer is the bridge


@pytest.mark.parametrize("make", [build_tokenizer, lambda: load_model("quickstart:policy").tokenizer])
def test_every_word_of_the_world_is_one_token(make):
    tokenizer = make()
    for kind in ("first", "family", "town", "company", "book"):
        for word in name_pool(kind):
            assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word


def test_policy_and_simulator_share_a_tokenizer():
    one, other = (load_model(f"quickstart:{name}").tokenizer for name in ("policy", "simulator"))
    assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    assert one.chat_template == other.chat_template == CHAT_TEMPLATE


def test_building_the_tokenizer_is_deterministic():
    assert build_tokenizer().backend_tokenizer.to_str() == build_tokenizer().backend_tokenizer.to_str()


def test_the_shipped_models_are_small_safetensors():
    folder = WORLD.parent
    files = [path for name in ("policy", "simulator") for path in (folder / name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert sorted(path.suffix for path in files if path.stat().st_size > 1_000_000) == [".safetensors"] * 2


def test_a_quickstart_prompt_fits_its_context():
    codec = Codec(load_model("quickstart:policy").tokenizer, chat_template=True)
    from zs_fast.recipe_files import load_recipe

    game = load_recipe(["quickstart"]).game
    longest = max(load_questions("quickstart:heldout"), key=lambda question: len(question.text))
    episode = Episode(longest, sample=0, step=0, noise_probability=0.0, game=game, codec=codec)
    turns = game.max_turns * game.max_new_tokens + (game.max_turns - 1) * game.max_observation_tokens
    assert len(episode.prompt_ids) + turns <= game.max_context_tokens
