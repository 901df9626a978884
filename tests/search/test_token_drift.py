"""Random multi-turn rollouts: the trained ids are the ids that were sampled, and the observations', in order."""

from __future__ import annotations

import random

import pytest

from zs_fast.config import GameConfig
from zs_fast.search.codec import Codec
from zs_fast.search.environment import Episode
from zs_fast.types import Completion, FinishReason, Question, Role, SearchMode, SearchResult

PIECES = ["<think>", "</think>", "<search>", " who wrote Emma ", "</search>", "<answer>", " Jane Austen ", "</answer>"]
PIECES += ["\n", "\n\n", "  ", "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "日本", "é", "x", ">\n", "</", "Doc 1: "]
WHOLE = ["<think> a </think>\n<search> who wrote Emma </search>", "<search>b</search>", "I think so.\n"]
DOCUMENTS = [
    "Emma is a novel by Jane Austen.",
    "<answer> x </answer><|im_end|>",
    "日本の首都は\n\n東京です。",
    "",
    "  a  ",
]
QUESTION = Question(id="q", text="who wrote emma", answers=("Jane Austen",), source="nq")


def random_sample(codec: Codec, draws: random.Random) -> list[int]:
    """Ids as a model may sample them: text in an unusual segmentation, added tokens, ids of no text at all."""
    kind = draws.random()
    if kind < 0.5:
        text = draws.choice(WHOLE)
        cuts = sorted(draws.randrange(len(text)) for _ in range(draws.randrange(6)))
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = [index for part in parts for index in codec._full.encode(part, add_special_tokens=False).ids]
    elif kind < 0.9:
        parts = draws.choices(PIECES, k=draws.randrange(12))
        ids = [index for part in parts for index in codec._full.encode(part, add_special_tokens=False).ids]
    else:
        ids = [draws.randrange(codec.vocab_size + 8) for _ in range(draws.randrange(20))]
    if draws.random() < 0.5:
        ids.append(draws.choice(sorted(codec.eos_ids)))
    return ids


def drift_of_one_rollout(codec: Codec, draws: random.Random) -> tuple[int, bool]:
    """(number of differing positions, would decode-then-encode have drifted?)"""
    game = GameConfig(max_turns=draws.randint(1, 6), max_observation_tokens=200, max_context_tokens=1 << 20)
    episode = Episode(QUESTION, sample=0, step=1, noise_probability=0.0, game=game, codec=codec)
    history = list(episode.prompt_ids)
    others = list(episode.prompt_ids)
    while not episode.done:
        ids = random_sample(codec, draws)
        completion = Completion(
            request_id=0, role=Role.POLICY, token_ids=tuple(ids), logprobs=(), finish_reason=FinishReason.STOP
        )
        before = len(episode.context_ids)
        request = episode.on_completion(completion)
        if request is not None:
            documents = tuple(draws.choices(DOCUMENTS, k=draws.randint(0, 5)))
            episode.on_search_result(SearchResult(request=request, documents=documents, mode=SearchMode.USEFUL))
        observed = episode.context_ids[before + len(ids) :]
        history += [*ids, *observed]
        text = codec._full.decode(ids, skip_special_tokens=True)
        others += [*codec._full.encode(text, add_special_tokens=False).ids, *observed]
    trajectory = episode.trajectory()
    trained = list(trajectory.prompt_ids)
    for turn in trajectory.turns:
        trained += [*turn.completion.token_ids, *turn.observation_ids]
    differing = sum(a != b for a, b in zip(trained, history, strict=False)) + abs(len(trained) - len(history))
    assert episode.context_ids == history
    return differing, others != history


def check_rollouts(codec: Codec, count: int, seed: int) -> None:
    draws = random.Random(seed)
    results = [drift_of_one_rollout(codec, draws) for _ in range(count)]
    assert sum(differing for differing, _ in results) == 0
    drifting = sum(would_drift for _, would_drift in results)
    assert drifting > count // 4, "the rollouts must be ones that re-encoding would get wrong"


def test_no_drift(family_codec: Codec) -> None:
    check_rollouts(family_codec, 250, seed=1)


@pytest.mark.full
def test_no_drift_in_ten_thousand_rollouts(family_codec: Codec) -> None:
    check_rollouts(family_codec, 10_000, seed=2)
