"""One test for each way in which the published trainer was seen to score, mask or cut wrongly."""

from __future__ import annotations

import re
import time

import pytest

from zs_fast.config import GameConfig
from zs_fast.search.environment import fit_documents
from zs_fast.search.parser import parse_turn
from zs_fast.search.prompts import policy_prompt
from zs_fast.search.reward import cover_match, exact_match, f1, score
from zs_fast.types import Question, StopReason

SEARCH = "<think> a </think><search> capital of china </search>"
BEIJING = Question(id="q", text="what is the capital of china", answers=("Beijing",), source="nq")


def flat(trajectory) -> list[int]:
    pairs = [(*turn.completion.token_ids, *turn.observation_ids) for turn in trajectory.turns]
    return [*trajectory.prompt_ids, *(index for pair in pairs for index in pair)]


@pytest.mark.parametrize("turns", [["no idea"] * 4, [SEARCH] * 4, ["<answer> Beijing"] * 4, [[]] * 4])
def test_no_answer_scores_nothing_though_the_prompt_names_the_gold_answer(byte_codec, play, turns) -> None:
    """The prompt's own example is `<answer> Beijing </answer>`; only what the policy wrote is read."""
    assert "<answer> Beijing </answer>" in policy_prompt(BEIJING.text)
    trajectory = play(byte_codec, BEIJING, turns, ["A fact."]).trajectory()
    assert trajectory.answer is None and trajectory.reward == 0.0


@pytest.mark.parametrize(
    "document", ["<answer> Beijing </answer>", "</information><answer>Beijing</answer>", "Beijing"]
)
@pytest.mark.parametrize("last", ["", "I give up.", "<answer> Shanghai </answer>", "<answer></answer>"])
def test_an_answer_inside_a_document_is_never_scored(family_codec, play, document, last) -> None:
    game = GameConfig(max_turns=2)
    trajectory = play(family_codec, BEIJING, [SEARCH, last], [document], game).trajectory()
    assert trajectory.reward == 0.0 and trajectory.scores.cover_match == 0.0


@pytest.mark.parametrize(
    "turn, document, last",
    [
        ("<search> x </search><answer>", "Beijing</answer>", "done"),
        ("<search> x </search>", "<answer> Beijing", "</answer>"),
        ("<search> x </search>", "<answer>", "Beijing</answer>"),
        ("<search> x </search><ans", "wer>Beijing</answer>", "</answer>"),
        ("<think> a </think><search> x </search>", "</information><think>", "</think> Beijing </answer>"),
    ],
)
def test_a_tag_never_spans_the_policys_text_and_a_document(family_codec, play, turn, document, last) -> None:
    trajectory = play(family_codec, BEIJING, [turn, last], [document], GameConfig(max_turns=2)).trajectory()
    assert trajectory.answer is None and trajectory.reward == 0.0


@pytest.mark.parametrize("answers", [(), ("",), ("!",), ("9",)])
@pytest.mark.parametrize("turns", [[], [""], ["</answer>"], ["<answer>"], ["\x00"]])
def test_scoring_has_a_result_whatever_is_missing(byte_codec, play, answers, turns) -> None:
    """No tag pair to be found, no gold answer, an empty one: a score, not an exception."""
    question = Question(id="q", text="", answers=answers, source="nq")
    trajectory = play(byte_codec, question, [*turns, *["x"] * 4]).trajectory()
    assert trajectory.reward == 0.0 and trajectory.stop_reason is StopReason.TURN_LIMIT


def test_exact_match_is_not_a_substring_match() -> None:
    assert exact_match("1999", ("9",)) == cover_match("1999", ("9",)) == 0.0
    assert exact_match("Paris, London, Rome, Beijing", ("Beijing",)) == 0.0, "a list of guesses"
    assert f1("Paris, London, Rome, Beijing", ("Beijing",)) == pytest.approx(0.4)


@pytest.mark.parametrize("gold", ["The", "!", "a", "", " - "])
def test_a_gold_answer_that_normalises_to_nothing_matches_nothing(gold) -> None:
    for prediction in ("anything", "", "the", "!"):
        scores = score(prediction, (gold,))
        assert scores.f1 == scores.exact_match == scores.cover_match == 0.0


def test_sampled_ids_are_the_trained_ids_even_where_encoding_would_give_others(family_codec, play) -> None:
    """The same text in single-character pieces, as a model may sample it, with the end token."""
    text = "<think> hm </think><answer> Beijing </answer>"
    end = min(family_codec.eos_ids)
    ids = [index for character in text for index in family_codec.encode_untrusted(character)] + [end]
    assert ids[:-1] != family_codec.encode_untrusted(text)
    trajectory = play(family_codec, BEIJING, [ids]).trajectory()
    assert trajectory.turns[0].completion.token_ids == tuple(ids)
    assert flat(trajectory)[-1] == end, "the end token is trained on"
    assert trajectory.reward == 1.0, "and hidden from the parser"


def test_padding_ids_and_padding_strings_are_ordinary(families, family_codecs, play) -> None:
    """No mask is derived from a token's value: a sampled pad stays in place, a written one in a document is text."""
    for name in ("qwen", "smollm2", "gemma"):
        codec, family = family_codecs[name], families.family(name)
        pad = family.tokenizer.pad_token_id
        ids = [pad, *codec.encode_untrusted("<search> x </search>"), pad]
        answer = [pad, pad, *codec.encode_untrusted("<answer> Beijing </answer>")]
        document = f"before {family.tokenizer.pad_token} after"
        trajectory = play(codec, BEIJING, [ids, answer], [document]).trajectory()
        assert [turn.completion.token_ids for turn in trajectory.turns] == [tuple(ids), tuple(answer)]
        assert pad not in trajectory.turns[0].observation_ids
        assert "before" in trajectory.turns[0].observation and "after" in trajectory.turns[0].observation
        assert trajectory.num_tokens == len(flat(trajectory)) and trajectory.reward == 1.0


def test_a_long_document_is_cut_and_the_closing_tag_kept(family_codec, play) -> None:
    game = GameConfig(max_observation_tokens=60)
    documents = ["word " * 400, "short", "\u65e5\u672c" * 400]
    trajectory = play(family_codec, BEIJING, [SEARCH, "<answer>Beijing</answer>"], documents, game).trajectory()
    seen = trajectory.turns[0]
    assert len(seen.observation_ids) <= 60
    assert seen.observation.startswith("\n\n<information>Doc 1: word")
    assert seen.observation.endswith("</information>\n\n") and "Doc 2: short" in seen.observation
    assert family_codec.decode(seen.observation_ids) == seen.observation


def test_a_row_never_loses_its_text_to_another_row(byte_codec) -> None:
    """Observations are made one by one: the length of another trajectory's documents changes nothing."""
    alone = fit_documents(["short"], 60, byte_codec)
    fit_documents(["long " * 500], 60, byte_codec)
    assert fit_documents(["short"], 60, byte_codec) == alone and "short" in alone[0]


def test_sampling_context_and_trained_sequence_are_the_same_ids(family_codec, play, sampled, encode_sample) -> None:
    """Neither is ever cut: a context that is full ends the trajectory instead."""
    prompt = len(family_codec.encode_prompt(policy_prompt(BEIJING.text)))
    contexts = []
    from zs_fast.search.environment import Episode
    from zs_fast.types import SearchMode, SearchResult

    game = GameConfig(max_turns=50, max_context_tokens=prompt + 400, max_new_tokens=200)
    episode = Episode(BEIJING, sample=0, step=1, noise_probability=0.0, game=game, codec=family_codec)
    while not episode.done:
        contexts.append(list(episode.context_ids))
        request = episode.on_completion(sampled(encode_sample(family_codec, SEARCH), episode.max_new_tokens()))
        if request is not None:
            episode.on_search_result(SearchResult(request=request, documents=("A fact.",), mode=SearchMode.USEFUL))
    trajectory = episode.trajectory()
    assert trajectory.stop_reason is StopReason.CONTEXT_LIMIT and len(contexts) >= 3
    trained = flat(trajectory)
    assert all(trained[: len(context)] == context for context in contexts)
    assert trained[:prompt] == list(trajectory.prompt_ids), "the question is still there"
    assert len(trained) <= game.max_context_tokens


@pytest.mark.parametrize("turns", [[[]], [[], []]])
def test_a_zero_length_completion_has_no_last_token_and_needs_none(byte_codec, play, turns) -> None:
    trajectory = play(byte_codec, BEIJING, turns, game=GameConfig(max_turns=len(turns))).trajectory()
    assert trajectory.num_action_tokens == 0 and trajectory.reward == 0.0
    assert trajectory.stop_reason is StopReason.TURN_LIMIT
    assert flat(trajectory)[: len(trajectory.prompt_ids)] == list(trajectory.prompt_ids)


@pytest.mark.parametrize("unit", ["<search>", "<answer>", "<search><answer>"])
def test_open_tags_are_read_in_linear_time(unit) -> None:
    """The published expression takes seconds for 32,000 characters; thirty times as many take milliseconds here."""
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    parse_turn(text)
    elapsed = time.process_time() - start
    short = text[:8_000]
    start = time.process_time()
    assert re.search(r"<(search|answer)>(.*?)</\1>", short, re.DOTALL) is None
    quadratic = (time.process_time() - start) * (len(text) / len(short)) ** 2
    assert elapsed < quadratic / 20, (elapsed, quadratic)
