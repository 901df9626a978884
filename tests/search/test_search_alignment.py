"""Every simulator prompt carries its own trajectory's question, gold answer and query.

Batches mix trajectories that answer, search and write nothing valid, so that the searching ones of a turn are never
the first n. An engine that finishes requests in random order writes documents out of what it read in the prompt;
each trajectory must find its own question, gold and query in its observation, and nobody else's.
"""

from __future__ import annotations

import random
import re

import pytest

from zs_fast.config import GameConfig, SimulatorConfig
from zs_fast.search.codec import ByteCodec
from zs_fast.search.environment import Episode
from zs_fast.search.simulator import SimulatedSearch
from zs_fast.types import Completion, FinishReason, Question, Role, Sampling, SearchRequest, StopReason, Trajectory

CODEC = ByteCodec()
GAME = GameConfig(max_turns=4, max_new_tokens=200, max_observation_tokens=900, max_context_tokens=8000)
TEMPLATES = ("fine_tuned", "prompted")
_PROMPT = re.compile(
    r'answer the question: "(?P<question>[^"\n]*)" whose answer is (?P<gold>[^.\n]*)\..*Query: (?P<query>[^\n]*)\n'
    r"(?P<mode>Useful|Noisy) Output:\n\Z",
    re.DOTALL,
)
_NOISY_PROMPT = re.compile(r"\nQuery: (?P<query>[^\n]*)\n(?P<mode>Noisy) Output:\n\Z")
_MARK = re.compile(r"(?:question|gold|query)-[0-9-]+")


class EchoEngine:
    """Answers each simulator prompt with documents made of what the prompt says, in random order, some at a time."""

    def __init__(self, draws: random.Random) -> None:
        self._draws = draws
        self._waiting: list[tuple[int, str]] = []

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, *, role: Role, cache_salt: str | None = None
    ) -> None:
        assert role is Role.SIMULATOR
        self._waiting.append((request_id, CODEC.decode(prompt_ids)))

    def step(self) -> list[Completion]:
        self._draws.shuffle(self._waiting)
        count = self._draws.randint(0, len(self._waiting))
        finished, self._waiting = self._waiting[:count], self._waiting[count:]
        return [completion(request_id, echo(prompt), Role.SIMULATOR) for request_id, prompt in finished]


def echo(prompt: str) -> str:
    match = _PROMPT.search(prompt) or _NOISY_PROMPT.search(prompt)
    assert match is not None, prompt
    return "\n".join(f"Doc {number}: {value}" for number, value in enumerate(match.groupdict().values(), 1))


def completion(request_id: int, text: str, role: Role) -> Completion:
    return Completion(
        request_id=request_id,
        role=role,
        token_ids=tuple(text.encode()),
        logprobs=(),
        finish_reason=FinishReason.STOP,
    )


def write_turn(draws: random.Random, number: int, sample: int, turn: int) -> str:
    action = draws.choice(["search", "search", "answer", "invalid"])
    if action == "search":
        return f"<think> hm </think> <search> query-{number}-{sample}-{turn} </search>"
    return "<answer> gold-0 </answer>" if action == "answer" else "no tag at all"


def play_batch(seed: int) -> tuple[list[Trajectory], list[SearchRequest]]:
    """One batch of 3 to 5 questions with 3 trajectories each, played to the end as the searches come in."""
    draws = random.Random(seed)
    engine = EchoEngine(draws)
    simulator = SimulatorConfig(template=draws.choice(TEMPLATES), share_noise_in_group=draws.random() < 0.5)
    search = SimulatedSearch(engine, CODEC, simulator, run_seed=seed)
    questions = [
        Question(id=f"s:{number}", text=f"who is question-{number}?", answers=(f"gold-{number}", "alias"), source="s")
        for number in draws.sample(range(1000), draws.randint(3, 5))
    ]
    probability = draws.random()
    episodes = {
        (question.id, sample): Episode(
            question, sample=sample, step=seed, noise_probability=probability, game=GAME, codec=CODEC
        )
        for question in questions
        for sample in range(3)
    }
    waiting: set[tuple[str, int]] = set()
    requests: list[SearchRequest] = []
    while any(not episode.done for episode in episodes.values()):
        for key, episode in episodes.items():
            if episode.done or key in waiting or draws.random() < 0.3:
                continue
            number = int(episode.question.id[2:])
            text = write_turn(draws, number, episode.sample, episode.turn)
            request = episode.on_completion(completion(0, text, Role.POLICY))
            if request is not None:
                waiting.add(key)
                requests.append(request)
                search.submit(request)
        for finished in engine.step():
            search.deliver(finished)
        for result in search.poll():
            key = (result.request.question.id, result.request.sample)
            waiting.remove(key)
            episodes[key].on_search_result(result)
    return [episode.trajectory() for episode in episodes.values()], requests


def mismatches(trajectory: Trajectory) -> int:
    """Observations that hold anything but this trajectory's own question, gold and query of that very turn."""
    number = trajectory.question.id[2:]
    wrong = 0
    for index, turn in enumerate(trajectory.turns):
        if turn.search is None:
            continue
        query = f"query-{number}-{trajectory.sample}-{index}"
        found = set(_MARK.findall(turn.observation))
        asked = {f"question-{number}", f"gold-{number}", query}
        wrong += found != ({query} if found == {query} and "Noisy" in turn.observation else asked)
        wrong += turn.search.request.query != query
        wrong += turn.search.request.question is not trajectory.question
    return wrong


def check_batches(seeds: range) -> None:
    wrong = observed = answered = invalid = 0
    for seed in seeds:
        trajectories, requests = play_batch(seed)
        assert len(requests) >= sum(trajectory.num_searches for trajectory in trajectories)
        for trajectory in trajectories:
            wrong += mismatches(trajectory)
            observed += trajectory.num_searches
            answered += trajectory.stop_reason is StopReason.ANSWER
            invalid += trajectory.stop_reason is StopReason.TURN_LIMIT
    assert wrong == 0
    assert min(observed, answered, invalid) > len(seeds)  # each kind of trajectory took part


def test_prompts_and_trajectories_stay_together() -> None:
    check_batches(range(300))


@pytest.mark.full
def test_prompts_and_trajectories_stay_together_in_10_000_batches() -> None:
    check_batches(range(10_000))


def test_the_check_sees_a_swapped_pair() -> None:
    """The test above can fail: two searches answered with each other's documents are two mismatches."""
    trajectories = [trajectory for seed in range(20) for trajectory in play_batch(seed)[0]]
    searching = [t for t in trajectories if t.turns[0].search is not None]
    first, second = searching[0], next(t for t in searching if t.question != searching[0].question)
    object.__setattr__(first, "question", second.question)
    assert mismatches(first) > 0
