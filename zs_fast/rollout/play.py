"""Questions in, finished groups out: policy turns and searches of all trajectories advance in one event loop.

No barrier between turns: a trajectory goes on the moment its completion or its documents are there, whatever the
others do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from zs_fast.config import GameConfig, SamplingConfig
from zs_fast.errors import EngineError, SimulatorError
from zs_fast.rollout.engine import Engine
from zs_fast.search.backends import SearchBackend
from zs_fast.search.codec import AnyCodec
from zs_fast.search.environment import Episode
from zs_fast.search.prompts import STOP_STRINGS
from zs_fast.system.seeds import seed_for
from zs_fast.types import Completion, Group, Question, Role, Sampling, SearchRequest, SearchResult, Trajectory

STALL_TIMEOUT_S = 900.0
"""Longest wait without any completion or search result while only searches are under way."""
IDLE_SLEEP_S = 0.002

Progress = Callable[[int, int], None]
"""Is told (trajectories finished, trajectories asked for)."""


class JournalKey(NamedTuple):
    """What a reply was for. `sample` counts on over repeats of a question in one step."""

    step: int
    question_id: str
    sample: int
    turn: int
    role: Role


class Journal(Protocol):
    """Keeps replies already paid for, so that an interrupted step can be played again without asking twice."""

    def lookup(self, key: JournalKey) -> Completion | None: ...

    def record(self, key: JournalKey, completion: Completion) -> None: ...

    def lookup_search(self, key: JournalKey, request: SearchRequest) -> SearchResult | None: ...

    def record_search(self, key: JournalKey, result: SearchResult) -> None: ...


class NullJournal:
    """Remembers nothing."""

    def lookup(self, key: JournalKey) -> Completion | None:
        return None

    def record(self, key: JournalKey, completion: Completion) -> None:
        pass

    def lookup_search(self, key: JournalKey, request: SearchRequest) -> SearchResult | None:
        return None

    def record_search(self, key: JournalKey, result: SearchResult) -> None:
        pass


@dataclass(slots=True, eq=False)
class _Playing:
    """One trajectory under way."""

    episode: Episode
    sampling: SamplingConfig
    cache_salt: str
    key_sample: int
    """Sample number in seeds and journal keys: unlike `episode.sample` unique over repeats of a question in a step."""


@dataclass(slots=True, eq=False)
class _PlayingGroup:
    question: Question
    step: int
    num_unfinished: int
    trajectories: list[Trajectory | None] = field(default_factory=list)


class Player:
    """Plays submitted questions `group_size` times each against a search backend.

    `engine` samples the policy, and the simulator too unless `simulator_engine` is given. Every draw is a function of
    (run_seed, step, question, sample, turn), so results don't depend on the order in which replies arrive.
    """

    def __init__(
        self,
        engine: Engine,
        search: SearchBackend,
        codec: AnyCodec,
        *,
        game: GameConfig,
        sampling: SamplingConfig,
        group_size: int,
        run_seed: int,
        max_failed_share: float,
        journal: Journal | None = None,
        simulator_engine: Engine | None = None,
    ) -> None:
        self._engine = engine
        self._engines: list[Engine] = [engine]
        if simulator_engine is not None and simulator_engine is not engine:
            self._engines.append(simulator_engine)
        self._search = search
        self._codec = codec
        self._game = game
        self._sampling = sampling
        self._group_size = group_size
        self._run_seed = run_seed
        self._max_failed_share = max_failed_share
        self._journal: Journal = journal or NullJournal()
        self._groups: list[_PlayingGroup] = []
        self._group_of: dict[int, _PlayingGroup] = {}
        self._sampled: dict[int, _Playing] = {}
        """By request id: trajectories that wait for the policy."""
        self._searching: dict[SearchRequest, list[_Playing]] = {}
        """Trajectories that wait for documents; more than one only where a question is played twice in a step."""
        self._next_request_id = 0
        self._next_salt = 0

    def submit(
        self, question: Question, *, step: int, noise_probability: float, sampling: SamplingConfig | None = None
    ) -> None:
        """Start the trajectories of one question at once; `sampling` replaces the player's own for this group."""
        repeats = sum(group.question.id == question.id and group.step == step for group in self._groups)
        group = _PlayingGroup(question, step, self._group_size, [None] * self._group_size)
        self._groups.append(group)
        for sample in range(self._group_size):
            episode = Episode(
                question,
                sample=sample,
                step=step,
                noise_probability=noise_probability,
                game=self._game,
                codec=self._codec,
            )
            salt = f"trajectory-{self._next_salt}"
            self._next_salt += 1
            playing = _Playing(episode, sampling or self._sampling, salt, repeats * self._group_size + sample)
            self._group_of[id(playing)] = group
            self._advance(playing)

    def collect(
        self, num_groups: int, *, on_progress: Progress | None = None, may_all_fail: bool = False
    ) -> list[Group]:
        """Play until the first `num_groups` submitted groups are finished; return those, in order of submission.

        Later groups advance meanwhile and stay for the next call. Raises EngineError when nothing is under way for an
        unfinished trajectory, and what `check_failures` raises unless `may_all_fail`: where these groups are a part of
        a step, the share of failed searches counts over the whole.
        """
        if num_groups > len(self._groups):
            raise EngineError(f"collect({num_groups}) of {len(self._groups)} submitted groups: submit more questions.")
        last_progress = time.monotonic()
        asked, reported = self._groups[:num_groups], -1
        num_asked = sum(len(group.trajectories) for group in asked)
        while True:
            num_finished = num_asked - sum(group.num_unfinished for group in asked)
            if on_progress is not None and num_finished > reported:
                on_progress(num_finished, num_asked)
                reported = num_finished
            if num_finished == num_asked:
                break
            started = time.monotonic()
            if self._play_on():
                last_progress = time.monotonic()
                continue
            self._check_alive(time.monotonic() - last_progress)
            # A round without work of our own ends at once: others (a server, a search backend) are waited for.
            if time.monotonic() - started < IDLE_SLEEP_S:
                time.sleep(IDLE_SLEEP_S)
        finished, self._groups = self._groups[:num_groups], self._groups[num_groups:]
        groups = [_finished(group) for group in finished]
        if not may_all_fail:
            self.check_failures(groups)
        return groups

    @property
    def num_unfinished(self) -> int:
        """Trajectories under way."""
        return sum(group.num_unfinished for group in self._groups)

    def _play_on(self) -> bool:
        """One round of all engines and the search backend; False when nothing came out of it."""
        completions = [completion for engine in self._engines for completion in engine.step()]
        for completion in completions:
            if completion.role is Role.POLICY:
                self._on_completion(completion)
            else:
                self._search.deliver(completion)
        results = self._search.poll()
        for result in results:
            self._on_search_result(result)
        return bool(completions or results)

    def _on_completion(self, completion: Completion) -> None:
        playing = self._sampled.pop(completion.request_id, None)
        if playing is None:
            raise EngineError(
                f"The engine returned policy request {completion.request_id}, which this player does not wait for. "
                "Two players on one engine must take turns: collect everything from one before using the other."
            )
        self._journal.record(self._key(playing, Role.POLICY), completion)
        self._take(playing, completion)

    def _on_search_result(self, result: SearchResult) -> None:
        waiting = self._searching.get(result.request)
        if not waiting:
            raise EngineError(f"The search backend returned a result that nobody waits for: {result.request}")
        playing = waiting.pop(0)
        if not waiting:
            del self._searching[result.request]
        key = self._key(playing, Role.SIMULATOR, turn=result.request.turn)
        self._journal.record_search(key, result)
        playing.episode.on_search_result(result)
        self._advance(playing)

    def _take(self, playing: _Playing, completion: Completion) -> None:
        request = playing.episode.on_completion(completion)
        if request is None:
            self._advance(playing)
            return
        known = self._journal.lookup_search(self._key(playing, Role.SIMULATOR, turn=request.turn), request)
        if known is not None:
            playing.episode.on_search_result(known)
            self._advance(playing)
            return
        self._searching.setdefault(request, []).append(playing)
        self._search.submit(request)

    def _advance(self, playing: _Playing) -> None:
        """Ask for the trajectory's next completion, or file the trajectory when it is over."""
        episode = playing.episode
        if episode.done:
            group = self._group_of.pop(id(playing))
            group.trajectories[episode.sample] = episode.trajectory()
            group.num_unfinished -= 1
            self._engine.end(Role.POLICY, playing.cache_salt)
            return
        key = self._key(playing, Role.POLICY)
        known = self._journal.lookup(key)
        if known is not None:
            self._take(playing, known)
            return
        request_id = self._next_request_id
        self._next_request_id += 1
        self._sampled[request_id] = playing
        sampling = Sampling(
            max_new_tokens=episode.max_new_tokens(),
            temperature=playing.sampling.temperature,
            top_p=playing.sampling.top_p,
            top_k=playing.sampling.top_k,
            seed=seed_for(
                self._run_seed,
                step=key.step,
                question_id=key.question_id,
                sample=key.sample,
                turn=key.turn,
                role=Role.POLICY,
                purpose="sample",
            ),
            stop=STOP_STRINGS,
        )
        self._engine.add(
            request_id, list(episode.context_ids), sampling, role=Role.POLICY, cache_salt=playing.cache_salt
        )

    def _key(self, playing: _Playing, role: Role, *, turn: int | None = None) -> JournalKey:
        episode = playing.episode
        return JournalKey(
            episode.step, episode.question.id, playing.key_sample, episode.turn if turn is None else turn, role
        )

    def _check_alive(self, idle_s: float) -> None:
        """Nothing came out of a round: raise unless something is under way for every unfinished trajectory."""
        in_engines = sum(engine.num_unfinished for engine in self._engines)
        if in_engines:
            return
        searching = sum(len(waiting) for waiting in self._searching.values())
        if self._sampled or not searching:
            raise EngineError(
                f"{self.num_unfinished} trajectories are unfinished, but the engine has no request left "
                f"({len(self._sampled)} wait for the policy, {searching} for documents). A request was lost."
            )
        if idle_s > STALL_TIMEOUT_S:
            raise SimulatorError(
                f"{searching} searches gave no result for {idle_s:.0f} s (limit {STALL_TIMEOUT_S:.0f} s) and no engine "
                "works on them. The search backend lost them, or has no timeout of its own."
            )

    def check_failures(self, groups: Sequence[Group]) -> None:
        """Raise SimulatorError when more than `max_failed_share` of the groups' searches failed; while that share is
        above 0, a single failed search never stops a run."""
        results = [turn.search for group in groups for t in group.trajectories for turn in t.turns if turn.search]
        failed = [result for result in results if result.failed]
        allowed = int(self._max_failed_share * len(results))
        if self._max_failed_share > 0:
            allowed = max(allowed, 1)
        if len(failed) > allowed:
            errors = sorted({result.error for result in failed})
            raise SimulatorError(
                f"{len(failed)} of {len(results)} searches failed, more than simulator.max_failed_share = "
                f"{self._max_failed_share} allows ({allowed}). First reasons: {'; '.join(errors[:3])[:600]}. "
                "Repair the search backend and resume, or raise the share."
            )


def _finished(group: _PlayingGroup) -> Group:
    trajectories = tuple(trajectory for trajectory in group.trajectories if trajectory is not None)
    assert len(trajectories) == len(group.trajectories), "a group was returned before it was finished"
    return Group(question=group.question, trajectories=trajectories)
