"""The game, turn by turn: what is appended, what ends it, and what a trajectory says afterwards."""

from __future__ import annotations

import itertools

import pytest

from zs_fast.config import GameConfig
from zs_fast.errors import ConfigError, EngineError
from zs_fast.search.codec import ByteCodec, Codec
from zs_fast.search.environment import Episode, fit_documents
from zs_fast.search.prompts import INVALID_ACTION, observation, policy_prompt
from zs_fast.types import (
    Answer,
    FinishReason,
    Invalid,
    Question,
    Search,
    SearchMode,
    SearchResult,
    StopReason,
)

SEARCH = "<think> a </think><search> emma author </search>"
ANSWER = "<think> b </think><answer> Jane Austen </answer>"
NOTHING = "I am not sure."
DOCUMENTS = ("Emma is by Jane Austen.", "It appeared in 1815.")


def start(question: Question, codec: Codec | ByteCodec, **game: int) -> Episode:
    return Episode(question, sample=3, step=7, noise_probability=0.25, game=GameConfig(**game), codec=codec)


def result(request, *documents: str, failed: bool = False) -> SearchResult:
    return SearchResult(request=request, documents=documents, mode=SearchMode.USEFUL, failed=failed)


def flat(trajectory) -> list[int]:
    """The token sequence as its type describes it."""
    pairs = ((*turn.completion.token_ids, *turn.observation_ids) for turn in trajectory.turns)
    return [*trajectory.prompt_ids, *itertools.chain(*pairs)]


def test_a_search_and_an_answer(family_codec, question, sampled, encode_sample) -> None:
    episode = start(question, family_codec)
    assert not episode.done and episode.turn == 0
    assert list(episode.prompt_ids) == episode.context_ids == family_codec.encode_prompt(policy_prompt(question.text))
    first = encode_sample(family_codec, SEARCH)
    request = episode.on_completion(sampled(first))
    assert request is not None
    assert (request.step, request.sample, request.turn, request.query) == (7, 3, 0, "emma author")
    assert request.question is question and request.noise_probability == 0.25
    assert episode.context_ids == [*episode.prompt_ids, *first]
    episode.on_search_result(result(request, *DOCUMENTS))
    seen = family_codec.encode_untrusted(observation(DOCUMENTS))
    assert episode.context_ids == [*episode.prompt_ids, *first, *seen]
    last = encode_sample(family_codec, ANSWER)
    assert episode.on_completion(sampled(last)) is None and episode.done
    trajectory = episode.trajectory()
    assert trajectory.stop_reason is StopReason.ANSWER and trajectory.answer == "Jane Austen"
    assert trajectory.reward == trajectory.scores.f1 == trajectory.scores.exact_match == 1.0
    assert trajectory.trainable and trajectory.num_searches == 1 and trajectory.sample == 3
    assert flat(trajectory) == episode.context_ids == [*episode.prompt_ids, *first, *seen, *last]
    assert [turn.observation for turn in trajectory.turns] == [observation(DOCUMENTS), ""]
    assert [turn.action for turn in trajectory.turns] == [Search("emma author"), Answer("Jane Austen")]


def test_an_invalid_action_is_answered_with_the_message(byte_codec, question, play) -> None:
    episode = play(byte_codec, question, [NOTHING, "<search>  </search>", ANSWER])
    trajectory = episode.trajectory()
    assert [turn.action for turn in trajectory.turns[:2]] == [Invalid("no_action"), Invalid("empty_query")]
    assert [turn.observation for turn in trajectory.turns] == [INVALID_ACTION, INVALID_ACTION, ""]
    assert trajectory.reward == 1.0 and trajectory.num_searches == 0


def test_the_last_turn_cannot_search(byte_codec, question, sampled) -> None:
    episode = start(question, byte_codec, max_turns=2)
    request = episode.on_completion(sampled(SEARCH.encode()))
    assert request is not None
    episode.on_search_result(result(request, *DOCUMENTS))
    assert episode.on_completion(sampled(SEARCH.encode())) is None
    trajectory = episode.trajectory()
    assert trajectory.stop_reason is StopReason.TURN_LIMIT
    assert trajectory.answer is None and trajectory.reward == 0.0
    assert trajectory.turns[1].search is None and trajectory.turns[1].observation_ids == ()
    assert flat(trajectory) == episode.context_ids


def test_an_invalid_last_turn_draws_no_message(byte_codec, question, play) -> None:
    trajectory = play(byte_codec, question, [NOTHING], game=GameConfig(max_turns=1)).trajectory()
    assert trajectory.stop_reason is StopReason.TURN_LIMIT and trajectory.turns[0].observation == ""


def test_an_answer_on_the_last_turn_counts(byte_codec, question, play) -> None:
    trajectory = play(byte_codec, question, [ANSWER], game=GameConfig(max_turns=1)).trajectory()
    assert trajectory.stop_reason is StopReason.ANSWER and trajectory.reward == 1.0


def test_a_cut_completion_ends_with_length_limit(byte_codec, question, play) -> None:
    trajectory = play(byte_codec, question, [ANSWER], game=GameConfig(max_new_tokens=10)).trajectory()
    assert trajectory.stop_reason is StopReason.LENGTH_LIMIT and trajectory.reward == 0.0
    assert len(trajectory.turns[0].completion.token_ids) == 10


def test_an_action_complete_at_the_limit_counts(byte_codec, question, sampled) -> None:
    episode = start(question, byte_codec, max_new_tokens=len(ANSWER))
    episode.on_completion(sampled(ANSWER.encode(), finish=FinishReason.LENGTH))
    assert episode.trajectory().stop_reason is StopReason.ANSWER


def test_an_empty_query_at_the_limit_is_an_invalid_action_not_a_cut(byte_codec, question, sampled) -> None:
    episode = start(question, byte_codec, max_new_tokens=30)
    episode.on_completion(sampled(b"<search></search>aaaaaaaaaaaaa", finish=FinishReason.LENGTH))
    assert not episode.done


def test_a_failed_search_is_never_trained_on(byte_codec, question, play) -> None:
    trajectory = play(byte_codec, question, [SEARCH, ANSWER], fail_search=True).trajectory()
    assert trajectory.stop_reason is StopReason.SEARCH_FAILED and not trajectory.trainable
    assert len(trajectory.turns) == 1 and trajectory.turns[0].search.failed and trajectory.reward == 0.0
    assert trajectory.turns[0].observation_ids == ()


def test_a_search_without_documents_shows_an_empty_wrapper(byte_codec, question, play) -> None:
    trajectory = play(byte_codec, question, [SEARCH, ANSWER]).trajectory()
    assert trajectory.turns[0].observation == "\n\n<information></information>\n\n" and trajectory.reward == 1.0


def test_a_long_query_is_cut_for_the_backend_only(byte_codec, question, sampled) -> None:
    episode = start(question, byte_codec, max_query_characters=6)
    request = episode.on_completion(sampled(b"<search> emma  author </search>"))
    assert request is not None and request.query == "emma"
    assert episode._turns[0].action == Search("emma  author")


def test_an_empty_completion_is_an_invalid_action(byte_codec, question, play) -> None:
    trajectory = play(byte_codec, question, [[], [], ANSWER]).trajectory()
    assert [turn.action for turn in trajectory.turns[:2]] == [Invalid("no_action")] * 2 and trajectory.reward == 1.0


def test_engine_faults_are_errors(byte_codec, question, sampled) -> None:
    episode = start(question, byte_codec, max_new_tokens=5)
    with pytest.raises(EngineError, match="nq_1"):
        episode.on_completion(sampled([], finish=FinishReason.FAILED))
    with pytest.raises(EngineError, match="6 tokens"):
        episode.on_completion(sampled([1] * 6))


def test_calls_out_of_order_are_bugs(byte_codec, question, sampled) -> None:
    episode = start(question, byte_codec)
    with pytest.raises(AssertionError):
        episode.trajectory()
    request = episode.on_completion(sampled(SEARCH.encode()))
    with pytest.raises(AssertionError):
        episode.on_completion(sampled(ANSWER.encode()))
    other = start(question, byte_codec)
    other_request = other.on_completion(sampled(b"<search>other</search>"))
    with pytest.raises(AssertionError):
        episode.on_search_result(result(other_request, "x"))
    episode.on_search_result(result(request, "x"))
    with pytest.raises(AssertionError):
        episode.on_search_result(result(request, "x"))


def test_a_prompt_that_fills_the_context_is_over_at_once(byte_codec, question) -> None:
    prompt = len(byte_codec.encode_prompt(policy_prompt(question.text)))
    full = start(question, byte_codec, max_context_tokens=prompt, max_new_tokens=10)
    assert full.done and full.max_new_tokens() == 0
    trajectory = full.trajectory()
    assert trajectory.stop_reason is StopReason.CONTEXT_LIMIT and trajectory.turns == () and trajectory.answer is None
    assert not start(question, byte_codec, max_context_tokens=prompt + 1, max_new_tokens=10).done


def test_no_search_is_asked_whose_documents_nobody_could_read(byte_codec, question, sampled) -> None:
    prompt = len(byte_codec.encode_prompt(policy_prompt(question.text)))
    wrapper = len(observation(()))
    for extra, asks in ((wrapper, False), (wrapper + 1, True)):
        episode = start(question, byte_codec, max_context_tokens=prompt + len(SEARCH) + extra)
        assert (episode.on_completion(sampled(SEARCH.encode())) is not None) == asks
        assert episode.done != asks


def test_an_observation_nothing_can_follow_is_not_appended(byte_codec, question, sampled) -> None:
    prompt = len(byte_codec.encode_prompt(policy_prompt(question.text)))
    seen = len(observation(DOCUMENTS))
    for extra, fits in ((seen, False), (seen + 1, True)):
        episode = start(question, byte_codec, max_context_tokens=prompt + len(SEARCH) + extra)
        request = episode.on_completion(sampled(SEARCH.encode()))
        episode.on_search_result(result(request, *DOCUMENTS))
        assert episode.done != fits and episode.max_new_tokens() == (1 if fits else episode.max_new_tokens())
        if not fits:
            trajectory = episode.trajectory()
            assert trajectory.stop_reason is StopReason.CONTEXT_LIMIT and trajectory.num_searches == 1
            assert trajectory.turns[0].observation == "" and flat(trajectory) == episode.context_ids


def play_with_limits(play, codec, question, script, **limits: int):
    return play(codec, question, script, DOCUMENTS, GameConfig(**limits)).trajectory()


def test_every_context_size_is_played_whole_or_flagged(family_codec, question, play, encode_sample) -> None:
    """All sizes from under the prompt to over the need: one token short of the need is flagged, never cut."""
    script = [SEARCH, NOTHING, SEARCH, ANSWER]
    whole = play_with_limits(play, family_codec, question, script, max_context_tokens=16384)
    need, prompt = whole.num_tokens, len(whole.prompt_ids)
    assert whole.stop_reason is StopReason.ANSWER
    reached = set()
    for size in range(prompt - 2, need + 3):
        played = play_with_limits(play, family_codec, question, script, max_context_tokens=size, max_new_tokens=100)
        reached.add(len(played.turns))
        if size >= need:
            assert played.stop_reason is StopReason.ANSWER and flat(played) == flat(whole)
        else:
            assert played.stop_reason is StopReason.CONTEXT_LIMIT and played.reward == 0.0 and played.answer is None
        assert flat(played) == flat(whole)[: played.num_tokens], "the context is a start of the whole, never cut left"
        assert played.num_tokens <= max(size, prompt)
    assert reached == {0, 1, 2, 3, 4}


def test_pairs_of_limits_around_the_need(byte_codec, question, play) -> None:
    """Each limit at -2 .. +2 around what the script needs, all pairs: the first limit met is the one named."""
    script = [SEARCH, SEARCH, ANSWER]
    whole = play_with_limits(play, byte_codec, question, script, max_context_tokens=16384)
    longest = max(len(turn.completion.token_ids) for turn in whole.turns)
    seen = set()
    for new, context, turns in itertools.product(range(-2, 3), range(-2, 3), (2, 3)):
        limits = dict(max_new_tokens=longest + new, max_context_tokens=whole.num_tokens + context, max_turns=turns)
        played = play_with_limits(play, byte_codec, question, script, **limits)
        expected = StopReason.ANSWER
        if new < 0:
            expected = StopReason.LENGTH_LIMIT
        elif turns == 2:
            expected = StopReason.TURN_LIMIT
        elif context < 0:
            expected = StopReason.CONTEXT_LIMIT
        assert played.stop_reason is expected, limits
        seen.add(expected)
    assert len(seen) == 4


@pytest.mark.parametrize("room", [*range(20, 90), 200, 1000])
def test_documents_are_cut_each_and_the_wrapper_never(family_codec, room) -> None:
    documents = [
        "Emma is a novel by Jane Austen. " * 20,
        "Short.",
        "日本の首都は東京です。" * 20,
        "In 1815 it appeared. " * 3,
    ]
    text, ids = fit_documents(documents, room, family_codec)
    assert len(ids) <= room and ids == family_codec.encode_untrusted(text)
    assert text.startswith("\n\n<information>") and text.endswith("</information>\n\n")
    shown = text.removeprefix("\n\n<information>").removesuffix("</information>\n\n").split("\n")
    assert all(line.startswith(f"Doc {number}:") for number, line in enumerate(shown, 1) if line)
    if room >= 90:
        assert len(shown) == 4 and shown[1] == "Doc 2: Short.", "a short document is not cut while long ones are"
        bodies = [line.split(":", 1)[1].strip() for line in shown]
        assert all(document.strip().startswith(body) for document, body in zip(documents, bodies, strict=True))
        assert len(ids) > room * 0.7 or room == 1000, "room is used"


def test_documents_that_fit_are_untouched(family_codec) -> None:
    text, ids = fit_documents(DOCUMENTS, 500, family_codec)
    assert text == observation(DOCUMENTS) and ids == family_codec.encode_untrusted(text)


def test_many_documents_keep_as_many_labels_as_fit(byte_codec) -> None:
    text, ids = fit_documents(["x" * 50] * 1000, 100, byte_codec)
    assert len(ids) <= 100 and text.count("Doc ") >= 5 and text.endswith("</information>\n\n")


def test_an_observation_limit_below_the_wrapper_is_refused(byte_codec, question) -> None:
    with pytest.raises(ConfigError, match="max_observation_tokens is 5"):
        start(question, byte_codec, max_observation_tokens=5)


def test_tags_sampled_after_a_template_that_opened_thinking(families, question, play) -> None:
    from transformers import PreTrainedTokenizerFast

    family = families.family("qwen")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=family.tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = family.tokenizer.chat_template.replace("assistant\n{% e", "assistant\n<think>\n{% e")
    codec = Codec(tokenizer, True)
    trajectory = play(codec, question, ["not <answer>Austen</answer> yet", ANSWER]).trajectory()
    assert trajectory.turns[0].action == Invalid("no_action") and trajectory.turns[1].action == Answer("Jane Austen")
    closed = play(codec, question, ["so it is her. </think><answer>Austen</answer>"]).trajectory()
    assert closed.answer == "Austen"
