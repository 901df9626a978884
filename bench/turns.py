"""The reference's way to play, for comparison: a barrier after every turn.

All trajectories write an action, then all searches are answered, at most `calls` of them at once. Without
`keep_prefix` every turn computes its whole context again, as a framework does that loads its weights for every turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from zs_fast.config import GameConfig, SamplingConfig
from zs_fast.rollout.engine import Engine
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.search.backends import SearchBackend
from zs_fast.search.codec import AnyCodec
from zs_fast.search.environment import Episode
from zs_fast.search.prompts import STOP_STRINGS
from zs_fast.system.seeds import seed_for
from zs_fast.types import Group, Question, Role, Sampling, SearchRequest, StopReason, Trajectory

REFERENCE_CALLS = 10
"""Simulator calls that ZeroSearch's code has under way at once."""


@contextmanager
def computed_apart(engine: Any) -> Iterator[None]:
    """In the block no prompt is computed for another that begins alike, as in the reference, whose vLLM has no prefix
    cache. The embedded engine's alone: another one stays as it is."""
    engine = getattr(engine, "engine", engine)
    if not isinstance(engine, TransformersEngine):
        yield
        return
    engine.share_prefixes(False)
    try:
        yield
    finally:
        engine.share_prefixes(True)


class TurnGame:
    """One step's questions, played in turns: `act`, then `search`, until nobody is `live`. Draws are the Player's.

    `retokenise`: read every context as text and encode that again before each turn, as the reference does. The ids
    that were sampled are kept all the same: it is the work that is copied, so that the trajectories stay the same.
    """

    def __init__(
        self,
        engine: Engine,
        search: SearchBackend,
        codec: AnyCodec,
        questions: Sequence[Question],
        *,
        game: GameConfig,
        sampling: SamplingConfig,
        group_size: int,
        run_seed: int,
        step: int,
        noise_probability: float = 0.0,
        calls: int | None = REFERENCE_CALLS,
        keep_prefix: bool = False,
        retokenise: bool = False,
    ) -> None:
        self._engine, self._search, self._codec = engine, search, codec
        self._sampling, self._group_size, self._run_seed, self._step = sampling, group_size, run_seed, step
        self._calls, self._keep_prefix, self._retokenise = calls, keep_prefix, retokenise
        self._questions = list(questions)
        self._episodes = [
            Episode(question, sample=sample, step=step, noise_probability=noise_probability, game=game, codec=codec)
            for question in questions
            for sample in range(group_size)
        ]
        self._waiting: list[tuple[int, SearchRequest]] = []
        self.live: list[int] = [index for index, episode in enumerate(self._episodes) if not episode.done]
        """Trajectories that are not over, by their place in the step."""

    def act(self) -> None:
        """One completion of every live trajectory."""
        assert not self._waiting, "the last turn's searches come first"
        if not self._keep_prefix:
            self._engine.publish(0)  # nothing computed before is found again
        for index in self.live:
            episode = self._episodes[index]
            if self._retokenise:
                self._codec.encode_untrusted(self._codec.decode(episode.context_ids))
            salt = f"turns-{index}" if self._keep_prefix else None
            context = list(episode.context_ids)
            self._engine.add(index, context, self._draw(episode), role=Role.POLICY, cache_salt=salt)
        while self._engine.num_unfinished:
            for completion in self._engine.step():
                request = self._episodes[completion.request_id].on_completion(completion)
                if request is not None:
                    self._waiting.append((completion.request_id, request))

    def search(self) -> None:
        """The documents that the last turn asked for; then those that are over leave."""
        under_way: dict[SearchRequest, int] = {}
        while self._waiting or under_way:
            while self._waiting and (self._calls is None or len(under_way) < self._calls):
                index, request = self._waiting.pop(0)
                under_way[request] = index
                self._search.submit(request)
            for completion in self._engine.step():
                self._search.deliver(completion)
            for result in self._search.poll():
                self._episodes[under_way.pop(result.request)].on_search_result(result)
        for index in [index for index in self.live if self._episodes[index].done]:
            self._engine.end(Role.POLICY, f"turns-{index}")
            self.live.remove(index)

    def so_far(self) -> list[Group]:
        """The live trajectories as far as they are, by question."""
        groups = []
        for number, question in enumerate(self._questions):
            first = number * self._group_size
            places = [place for place in self.live if first <= place < first + self._group_size]
            if places:
                groups.append(Group(question=question, trajectories=tuple(map(self._unfinished, places))))
        return groups

    def groups(self) -> list[Group]:
        """All of them, once nobody is live."""
        assert not self.live
        size = self._group_size
        return [
            Group(
                question=question,
                trajectories=tuple(one.trajectory() for one in self._episodes[number * size : (number + 1) * size]),
            )
            for number, question in enumerate(self._questions)
        ]

    def _draw(self, episode: Episode) -> Sampling:
        return Sampling(
            max_new_tokens=episode.max_new_tokens(),
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            top_k=self._sampling.top_k,
            seed=seed_for(
                self._run_seed,
                step=self._step,
                question_id=episode.question.id,
                sample=episode.sample,
                turn=episode.turn,
                role=Role.POLICY,
                purpose="sample",
            ),
            stop=STOP_STRINGS,
        )

    def _unfinished(self, place: int) -> Trajectory:
        episode = self._episodes[place]
        return Trajectory(
            question=episode.question,
            sample=episode.sample,
            prompt_ids=episode.prompt_ids,
            turns=episode.turns,
            stop_reason=StopReason.TURN_LIMIT,
        )
