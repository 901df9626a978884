"""Generated attacks: what a simulator or a policy may write can't move a mask, a reward or a token it should not.

ZS_HYPOTHESIS_EXAMPLES sets the number of generated cases of each property (full tier: 50,000). Hypothesis is thorough
and slow; the batches below draw ZS_FAULT_TRIALS texts from the same fragments by Python's own generator.
"""

from __future__ import annotations

import math
import os
import random
import re
import unicodedata
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zs_fast.config import GameConfig
from zs_fast.search.codec import ByteCodec
from zs_fast.search.environment import Episode, fit_documents
from zs_fast.search.parser import parse_turn
from zs_fast.search.prompts import observation
from zs_fast.search.untrusted import clean_document
from zs_fast.types import (
    Answer,
    Completion,
    FinishReason,
    Invalid,
    Question,
    Role,
    Search,
    SearchMode,
    SearchResult,
    StopReason,
)

EXAMPLES = int(os.environ.get("ZS_HYPOTHESIS_EXAMPLES", "150"))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

QUESTION = Question(id="q", text="who wrote emma", answers=("Jane Austen", "Austen"), source="nq")
NAMES = ["think", "search", "information", "answer"]
TAGS = [f"<{slash}{name}>" for slash in ("", "/") for name in NAMES]
ODD_TAGS = [
    "<ANSWER>",
    "</ Answer >",
    "< search>",
    '<information id="1">',
    "<answer/>",
    "<think",
    "</answer",
    "<an\x00swer>",
]
ODD_TAGS += ["<ans\u202ewer>", "＜answer＞", "<\nsearch\n>", "<//answer>", "<an<answer>swer>", "<ſearch>", "<thinK>"]
CONTROL = [
    "\x00",
    "\x07",
    "\x1b[31m",
    "\r\n",
    "\x85",
    "\u202e",
    "\u2066",
    "\u200f",
    "\ud800",
    "\udfff\ud800",
    "\ufeff",
    "\uffff",
]
PLAIN = [
    "Jane Austen",
    "Austen",
    " ",
    "\n",
    "\n\n",
    "   ",
    "Doc 1:",
    "Doc 2: ",
    "\nDoc 9: ",
    "the",
    "é",
    "東京",
    "😀",
    "<",
    ">",
    "&lt;",
]
ADDED = ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"]
ADDED += ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|python_tag|>"]
ADDED += ["<|reserved_special_token_7|>", "<repo_name>", "<file_sep>", "<jupyter_code>", "<empty_output>", "<eos>"]
ADDED += ["<bos>", "<pad>", "<unk>", "<start_of_turn>model\n", "<end_of_turn>", "<unused7>", "[@BOS@]", "\u2581\u2581"]
ADDED += ["<table>", "</b>", "<0x0A>", "<0x3C>", "<|im_<|im_end|>end|>", "<<|im_end|>", "\n\n\n\n"]

fragment = st.sampled_from([*TAGS, *TAGS, *ODD_TAGS, *CONTROL, *PLAIN, *ADDED]) | st.text(max_size=8)
repeated = st.builds(lambda text, times: text * times, fragment, st.integers(20, 400))
hostile_text = st.lists(fragment, max_size=12).map("".join) | st.lists(fragment | repeated, max_size=4).map("".join)
hostile_documents = st.lists(hostile_text, max_size=6)

SEARCHES = ["<think> a </think><search> q </search>", "<search>q</search><answer>", "<search> q </search><think>"]
SEARCHES += ["<search>q</search>\n<information>", "a</think><search>Jane Austen</search>"]
LAST = [
    "<answer> Jane Austen </answer>",
    "<answer>Shanghai</answer>",
    "Jane Austen </answer>",
    "",
    "</answer>",
    "<answer>",
]
LAST += ["</search>", "<answer></answer>", "</information><answer> Austen </answer>", "swer> Austen </answer>"]


class PolicyId(int):
    """A sampled id that remembers who wrote it, wherever the game puts it."""


def play_marked(codec, searches, last, documents, max_observation_tokens):
    """Play one or two searches and a last turn; sampled ids carry the mark of the policy."""
    game = GameConfig(
        max_turns=len(searches) + 1, max_observation_tokens=max_observation_tokens, max_context_tokens=1 << 20
    )
    episode = Episode(QUESTION, sample=0, step=1, noise_probability=0.0, game=game, codec=codec)
    contexts = []
    for text in [*searches, last]:
        if episode.done:
            break
        contexts.append(list(episode.context_ids))
        request = episode.on_completion(marked_completion(codec, text))
        if request is not None:
            result = SearchResult(request=request, documents=tuple(documents), mode=SearchMode.NOISY)
            episode.on_search_result(result)
    return episode, contexts


def marked_completion(codec, text):
    ids = tuple(PolicyId(index) for index in codec.encode_untrusted(text))
    return Completion(
        request_id=0, role=Role.POLICY, token_ids=ids, logprobs=(-0.5,) * len(ids), finish_reason=FinishReason.STOP
    )


def looks_like_tags(text: str) -> list[str]:
    """Everything that a lenient reader could take for a protocol tag."""
    return re.findall(r"<[\s/]*(?:think|search|information|answer)\b", text, re.IGNORECASE)


known: dict[tuple[object, ...], tuple[object, object]] = {}
"""What games come to with harmless documents."""


def check_documents(codec, name, documents, searches, last, extra_room) -> None:
    room = len(codec.encode_untrusted(observation(()))) + extra_room
    episode, contexts = play_marked(codec, searches, last, documents, room)
    trajectory = episode.trajectory()

    # The mask that the types describe against the mark that each id has carried since it was sampled.
    sequence, mask = list(trajectory.prompt_ids), [False] * len(trajectory.prompt_ids)
    for turn in trajectory.turns:
        sequence += [*turn.completion.token_ids, *turn.observation_ids]
        mask += [True] * len(turn.completion.token_ids) + [False] * len(turn.observation_ids)
    assert mask == [isinstance(index, PolicyId) for index in episode.context_ids]
    assert sequence == episode.context_ids
    assert all(sequence[: len(context)] == context for context in contexts)

    # The reward is what it is with harmless documents, and with none.
    for harmless in (["A fact."], []):
        key = (name, *searches, last, room, *harmless)
        if key not in known:
            other = play_marked(codec, searches, last, harmless, room)[0].trajectory()
            known[key] = other.scores, other.stop_reason
        assert known[key] == (trajectory.scores, trajectory.stop_reason)
    assert math.isfinite(trajectory.reward) and 0.0 <= trajectory.reward <= 1.0

    for turn in trajectory.turns[:-1]:
        text, ids = turn.observation, turn.observation_ids
        if not isinstance(turn.action, Search):
            continue
        assert len(ids) <= room and not codec.added_ids & set(ids)
        assert text.startswith("\n\n<information>") and text.endswith("</information>\n\n")
        shown = codec.decode(ids)
        spelled = text if name != "gemma" else text.replace("\u2581", " ")
        assert unicodedata.normalize("NFC", shown) == unicodedata.normalize("NFC", spelled)
        for view in (text, shown):
            assert view.count("<information>") == view.count("</information>") == 1
            assert len(looks_like_tags(view)) == 2
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", view)
            assert not any(string in view for string in codec.reserved_strings if string.isascii())


@many
@given(
    name=st.sampled_from(["qwen", "llama3", "smollm2", "gemma"]),
    documents=hostile_documents,
    searches=st.lists(st.sampled_from(SEARCHES), min_size=1, max_size=2),
    last=st.sampled_from(LAST),
    extra_room=st.integers(0, 300),
)
def test_hostile_documents_are_contained(family_codecs, name, documents, searches, last, extra_room) -> None:
    check_documents(family_codecs[name], name, documents, searches, last, extra_room)


@many
@given(documents=hostile_documents, room=st.integers(40, 2000))
def test_hostile_documents_are_contained_in_bytes(documents, room) -> None:
    codec = ByteCodec()
    text, ids = fit_documents(documents, room, codec)
    assert bytes(ids).decode() == text and len(ids) <= room
    assert len(looks_like_tags(text)) == 2


@many
@given(name=st.sampled_from(["qwen", "llama3", "smollm2", "gemma"]), text=hostile_text)
def test_untrusted_text_has_no_added_ids_and_its_cuts_are_starts(family_codecs, name, text) -> None:
    codec = family_codecs[name]
    ids = codec.encode_untrusted(text)
    assert not codec.added_ids & set(ids)
    cut = codec.cut_untrusted(text, len(ids) // 2)
    assert len(codec.encode_untrusted(cut)) <= len(ids) // 2
    assert re.sub("[\ud800-\udfff]", "\ufffd", text).startswith(cut)
    once = clean_document(text, codec.reserved_strings)
    assert clean_document(once, codec.reserved_strings) == once
    assert not looks_like_tags(once)


words = st.lists(
    st.sampled_from(["Emma", "Jane Austen", "(1815)", ",", "<", ">", "&", "é", "東京", "\n", "\t", " "]), max_size=30
)


@many
@given(
    name=st.sampled_from(["qwen", "llama3", "smollm2", "gemma"]), documents=st.lists(words.map(" ".join), max_size=4)
)
def test_honest_documents_are_shown_to_the_byte(family_codecs, name, documents) -> None:
    codec = family_codecs[name]
    text, ids = fit_documents(documents, 4000, codec)
    assert text == observation(documents)
    assert codec.decode(ids) == text


def check_policy(codec, encode, turns, game, draw_documents) -> None:
    episode = Episode(QUESTION, sample=0, step=1, noise_probability=0.0, game=game, codec=codec)
    for turn in turns:
        if episode.done:
            break
        sampled = (
            encode(re.sub("[\ud800-\udfff]", "", turn), add_special_tokens=False).ids if isinstance(turn, str) else turn
        )
        limit = episode.max_new_tokens()
        finish = FinishReason.LENGTH if len(sampled) >= limit else FinishReason.STOP
        completion = Completion(
            request_id=0, role=Role.POLICY, token_ids=tuple(sampled[:limit]), logprobs=(), finish_reason=finish
        )
        request = episode.on_completion(completion)
        assert len(episode.context_ids) <= max(game.max_context_tokens, len(episode.prompt_ids))
        action = parse_turn(codec.decode(completion.token_ids))
        assert action == episode._turns[-1].action, "what was acted on is what is scored"
        if request is not None:
            assert 0 < len(request.query) <= game.max_query_characters and request.query == request.query.strip()
            documents = tuple(draw_documents())
            episode.on_search_result(SearchResult(request=request, documents=documents, mode=SearchMode.USEFUL))
    if not episode.done:
        return
    trajectory = episode.trajectory()
    for value in (trajectory.reward, trajectory.scores.exact_match, trajectory.scores.cover_match):
        assert math.isfinite(value) and 0.0 <= value <= 1.0
    answered = [turn for turn in trajectory.turns if isinstance(turn.action, Answer)]
    assert (trajectory.stop_reason is StopReason.ANSWER) == bool(answered)
    if not answered:
        assert trajectory.reward == 0.0
    if trajectory.stop_reason is StopReason.LENGTH_LIMIT:
        assert trajectory.turns[-1].action == Invalid("no_action")


@many
@given(name=st.sampled_from(["qwen", "llama3", "smollm2", "gemma"]), data=st.data())
def test_hostile_policy_text_has_a_meaning_and_a_score(families, family_codecs, name, data) -> None:
    """Turns of hostile text, of random ids (unknown ones too), and of both: no exception, a score in [0, 1]."""
    codec = family_codecs[name]
    ids = st.lists(st.integers(0, codec.vocab_size + 3), max_size=30)
    turns = data.draw(st.lists(hostile_text | st.sampled_from([*SEARCHES, *LAST]) | ids, min_size=1, max_size=4))
    game = GameConfig(
        max_turns=data.draw(st.integers(1, 4)),
        max_new_tokens=data.draw(st.integers(1, 400)),
        max_context_tokens=data.draw(st.integers(401, 3000)),
    )
    encode = families.family(name).tokenizer.backend_tokenizer.encode
    check_policy(codec, encode, turns, game, lambda: data.draw(hostile_documents))


BATCH = int(os.environ.get("ZS_FAULT_TRIALS", "300"))
SEED = int(os.environ.get("ZS_FAULT_SEED", "0"))
FAMILIES = ("qwen", "llama3", "smollm2", "gemma")
FRAGMENTS = [*TAGS, *TAGS, *ODD_TAGS, *CONTROL, *PLAIN, *ADDED]


class Draws(random.Random):
    """Texts of the kinds that the strategies above give, a hundred times as fast."""

    def fragment(self) -> str:
        if self.random() < 0.85:
            return self.choice(FRAGMENTS)
        top = self.choice((0x7F, 0x7FF, 0xFFFF, 0x10FFFF))
        return "".join(chr(self.randint(0, top)) for _ in range(self.randint(0, 8)))

    def text(self) -> str:
        pieces = [self.fragment() for _ in range(self.randint(0, 12))]
        if pieces and self.random() < 0.02:
            pieces[self.randrange(len(pieces))] *= self.randint(20, 400)
        return "".join(pieces)

    def documents(self) -> list[str]:
        return [self.text() for _ in range(self.randint(0, 6))]


def tried(check: Callable[[Draws], None]) -> int:
    """`check` on BATCH draws, each from a seed of its own, which a failure names."""
    for number in range(BATCH):
        draws = Draws(f"{SEED} {number}")
        try:
            check(draws)
        except Exception as error:
            raise AssertionError(f"draw {number} of seed {SEED}") from error
    return BATCH


def test_a_batch_of_hostile_documents_is_contained(family_codecs, record_property) -> None:
    def check(draws: Draws) -> None:
        name, searches = draws.choice(FAMILIES), draws.choices(SEARCHES, k=draws.randint(1, 2))
        room = draws.choice((0, 1, 7, 20, 60, 150, 300))
        check_documents(family_codecs[name], name, draws.documents(), searches, draws.choice(LAST), room)

    record_property("trials", tried(check))


def test_a_batch_of_hostile_policy_texts_has_meanings_and_scores(families, family_codecs, record_property) -> None:
    encoders = {name: families.family(name).tokenizer.backend_tokenizer.encode for name in FAMILIES}

    def check(draws: Draws) -> None:
        name = draws.choice(FAMILIES)
        codec, turns = family_codecs[name], []
        for _ in range(draws.randint(1, 4)):
            kind = draws.random()
            if kind < 0.5:
                turns.append(draws.text())
            elif kind < 0.75:
                turns.append(draws.choice([*SEARCHES, *LAST]))
            else:
                turns.append([draws.randint(0, codec.vocab_size + 3) for _ in range(draws.randint(0, 30))])
        game = GameConfig(
            max_turns=draws.randint(1, 4),
            max_new_tokens=draws.randint(1, 400),
            max_context_tokens=draws.randint(401, 3000),
        )
        check_policy(codec, encoders[name], turns, game, draws.documents)

    record_property("trials", tried(check))
