"""Questions in, finished groups out: policy turns and searches of all trajectories advance in one event loop.

No barrier between turns: a trajectory goes on the moment its completion or its documents are there, whatever the
others do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from zs_fast.config import GameConfig, MethodName, SamplingConfig
from zs_fast.errors import CheckpointUnusableError, EngineError, SimulatorError
from zs_fast.rollout.carried import replay, turn_state
from zs_fast.rollout.engine import Engine
from zs_fast.rollout.journal import Journal, JournalKey, NullJournal
from zs_fast.rollout.watch import PlayWatcher, TrajectoryName, Wait
from zs_fast.search.backends import SearchBackend
from zs_fast.search.codec import AnyCodec
from zs_fast.search.environment import Episode
from zs_fast.search.prompts import STOP_STRINGS
from zs_fast.system.seeds import seed_for
from zs_fast.types import Completion, Group, Question, Role, Sampling, SearchRequest, SearchResult

STALL_TIMEOUT_S = 900.0
"""Longest wait without any completion or search result while only searches are under way."""
IDLE_SLEEP_S = 0.002

Progress = Callable[[int, int], None]
"""Is told (trajectories finished, trajectories asked for)."""

OnGroup = Callable[[Group], None]
"""Is told a group once it is finished."""


class Refill(NamedTuple):
    """Work for places that come free while the last trajectories of a step are played."""

    start: Callable[[], bool]
    """Submits one more question; False when there is none to start yet."""
    capacity: int
    """Trajectories under way at most."""


@dataclass(slots=True, eq=False)
class _Playing:
    """One trajectory, under way or over."""

    episode: Episode
    group: _PlayingGroup
    key_sample: int
    """Sample number in seeds and journal keys: unlike `episode.sample` unique over repeats of a question in a step."""
    cache_salt: str = ""


@dataclass(slots=True, eq=False)
class _PlayingGroup:
    question: Question
    step: int
    noise_probability: float
    sampling: SamplingConfig
    repeats: int
    """Groups of the same question and step that were submitted before and were not collected yet."""
    num_unfinished: int
    playing: list[_Playing] = field(default_factory=list)

    def finished(self) -> Group:
        return Group(question=self.question, trajectories=tuple(p.episode.trajectory() for p in self.playing))


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
        method: MethodName = "agent",
    ) -> None:
        self._engine = engine
        self._engines: list[Engine] = [engine]
        if simulator_engine is not None and simulator_engine is not engine:
            self._engines.append(simulator_engine)
        self._search = search
        self._codec = codec
        self._game = game
        self._method: MethodName = method
        self._sampling = sampling
        self._group_size = group_size
        self._run_seed = run_seed
        self._max_failed_share = max_failed_share
        self._journal: Journal = journal or NullJournal()
        self._groups: list[_PlayingGroup] = []
        self._is_paused = False
        self._sampled: dict[int, _Playing] = {}
        """By request id: trajectories that wait for the policy."""
        self._searching: dict[SearchRequest, list[_Playing]] = {}
        """Trajectories that wait for documents; more than one only where a question is played twice in a step."""
        self._next_request_id = 0
        self._next_salt = 0
        self.watcher: PlayWatcher | None = None
        """Is told what each trajectory waits for, from the moment that it waits."""

    def submit(
        self, question: Question, *, step: int, noise_probability: float, sampling: SamplingConfig | None = None
    ) -> None:
        """Start the trajectories of one question at once; `sampling` replaces the player's own for this group."""
        self._go_on()
        repeats = sum(group.question.id == question.id and group.step == step for group in self._groups)
        group = self._add_group(question, step, noise_probability, sampling or self._sampling, repeats)
        for playing in group.playing:
            self._start(playing)

    def collect(
        self,
        num_groups: int,
        *,
        on_progress: Progress | None = None,
        refill: Refill | None = None,
        may_all_fail: bool = False,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """Play until the first `num_groups` submitted groups are finished; return those, in order of submission.

        `on_group` is told each of them at once, in the order in which they are finished. Later groups advance meanwhile
        and stay for the next call; `refill` starts some where places come free. Raises EngineError when nothing is
        under way for an unfinished trajectory, and what `check_failures` raises unless `may_all_fail`: where these
        groups are a part of a step, the share of failed searches counts over the whole.
        """
        if num_groups > len(self._groups):
            raise EngineError(f"collect({num_groups}) of {len(self._groups)} submitted groups: submit more questions.")
        last_progress = time.monotonic()
        self._go_on()
        asked, reported = self._groups[:num_groups], -1
        untold = list(asked) if on_group is not None else []
        num_asked = sum(len(group.playing) for group in asked)
        while True:
            num_finished = num_asked - sum(group.num_unfinished for group in asked)
            if on_progress is not None and num_finished > reported:
                on_progress(num_finished, num_asked)
                reported = num_finished
            if on_group is not None:
                for group in untold:
                    if not group.num_unfinished:
                        on_group(group.finished())
                untold = [group for group in untold if group.num_unfinished]
            if num_finished == num_asked:
                break
            if refill is not None:
                while self.num_unfinished + self._group_size <= refill.capacity and refill.start():
                    pass
            started = time.monotonic()
            if self._play_on():
                last_progress = time.monotonic()
                continue
            self._check_alive(time.monotonic() - last_progress)
            # A round without work of our own ends at once: others (a server, a search backend) are waited for.
            if time.monotonic() - started < IDLE_SLEEP_S:
                time.sleep(IDLE_SLEEP_S)
        finished, self._groups = self._groups[:num_groups], self._groups[num_groups:]
        groups = [group.finished() for group in finished]
        if not may_all_fail:
            self.check_failures(groups)
        return groups

    def pause(self) -> None:
        """Give up all that engines and search work on, so that weights may change or another player take its turn.

        Finished turns stay. An unfinished completion or search is begun again, with its own seed, by the next `submit`
        or `collect`: each completion is of one policy version, and none rests on keys and values of another.
        """
        self._is_paused = True
        self._engine.abort(Role.POLICY, list(self._sampled))
        self._search.cancel()
        for playing in self._unfinished():
            self._engine.end(Role.POLICY, playing.cache_salt)
        self._sampled, self._searching = {}, {}

    def carried(self) -> list[dict[str, Any]]:
        """The groups that were submitted and not collected, as plain JSON for `restore`; only while paused."""
        assert self._is_paused or not self._groups, "what is under way now has no state to carry"
        return [
            {
                "question": asdict(group.question) | {"answers": list(group.question.answers)},
                "step": group.step,
                "noise_probability": group.noise_probability,
                "sampling": group.sampling.model_dump(mode="json"),
                "repeats": group.repeats,
                "trajectories": [[turn_state(turn) for turn in playing.episode.turns] for playing in group.playing],
            }
            for group in self._groups
        ]

    def restore(self, carried: Sequence[Mapping[str, Any]]) -> None:
        """Take over another player's `carried` groups in place of one's own; paused, as they were.

        Raises CheckpointUnusableError.
        """
        assert self._is_paused or not self._groups, "what is under way can't be dropped"
        self._groups, self._is_paused = [], True
        try:
            for state in carried:
                group = self._add_group(
                    Question(**state["question"] | {"answers": tuple(state["question"]["answers"])}),
                    state["step"],
                    state["noise_probability"],
                    SamplingConfig.model_validate(state["sampling"]),
                    state["repeats"],
                )
                for playing, turns in zip(group.playing, state["trajectories"], strict=True):
                    replay(playing.episode, turns)
                group.num_unfinished = sum(not playing.episode.done for playing in group.playing)
        except (KeyError, TypeError, ValueError, EngineError) as error:
            raise CheckpointUnusableError(
                "the unfinished trajectories in the checkpoint can't be played again "
                f"({type(error).__name__}: {error}); use another checkpoint"
            ) from error

    def recall(self) -> None:
        """Show the search backend what the journal's open scope holds, so that further searches may share it."""
        self._search.recall(self._journal.searches())

    @property
    def num_groups(self) -> int:
        """Groups that were submitted and not collected yet."""
        return len(self._groups)

    @property
    def num_unfinished(self) -> int:
        """Trajectories under way."""
        return sum(group.num_unfinished for group in self._groups)

    def _add_group(
        self, question: Question, step: int, noise_probability: float, sampling: SamplingConfig, repeats: int
    ) -> _PlayingGroup:
        group = _PlayingGroup(question, step, noise_probability, sampling, repeats, self._group_size)
        for sample in range(self._group_size):
            episode = Episode(
                question,
                sample=sample,
                step=step,
                noise_probability=noise_probability,
                game=self._game,
                codec=self._codec,
                method=self._method,
            )
            group.playing.append(_Playing(episode, group, repeats * self._group_size + sample))
        self._groups.append(group)
        return group

    def _unfinished(self) -> Iterator[_Playing]:
        for group in self._groups if self.num_unfinished else ():
            yield from (playing for playing in group.playing if not playing.episode.done)

    def _go_on(self) -> None:
        """After a pause: what was given up begins again, in order of submission."""
        if self._is_paused:
            self._is_paused = False
            for playing in list(self._unfinished()):
                self._start(playing)

    def _start(self, playing: _Playing) -> None:
        """Under a salt of its own, so that nothing computed before is found again."""
        playing.cache_salt = f"trajectory-{self._next_salt}"
        self._next_salt += 1
        if playing.episode.pending is not None:
            self._search_for(playing, playing.episode.pending)
        else:
            self._advance(playing)

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
        self._journal.record(self._key(playing, Role.POLICY), playing.episode.context_ids, completion)
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
        else:
            self._search_for(playing, request)

    def _search_for(self, playing: _Playing, request: SearchRequest) -> None:
        known = self._journal.lookup_search(self._key(playing, Role.SIMULATOR, turn=request.turn), request)
        if known is not None:
            playing.episode.on_search_result(known)
            self._advance(playing)
            return
        self._searching.setdefault(request, []).append(playing)
        self._tell(playing, Wait.SEARCH)
        self._search.submit(request)

    def _advance(self, playing: _Playing) -> None:
        """Ask for the trajectory's next completion, or file the trajectory when it is over."""
        episode = playing.episode
        if episode.done:
            playing.group.num_unfinished -= 1
            if all(turn.search is None or not turn.search.failed for turn in episode.turns):
                # Else the search is asked for again after an interruption, and the trajectory goes on from there.
                self._journal.record_end(self._key(playing, Role.POLICY))
            self._tell(playing, Wait.OTHERS)
            self._engine.end(Role.POLICY, playing.cache_salt)
            return
        key = self._key(playing, Role.POLICY)
        known = self._journal.lookup(key, episode.context_ids)
        if known is not None:
            self._take(playing, known)
            return
        request_id = self._next_request_id
        self._next_request_id += 1
        self._sampled[request_id] = playing
        sampling = Sampling(
            max_new_tokens=episode.max_new_tokens(),
            temperature=playing.group.sampling.temperature,
            top_p=playing.group.sampling.top_p,
            top_k=playing.group.sampling.top_k,
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
        self._tell(playing, Wait.POLICY, request_id)
        self._engine.add(
            request_id, list(episode.context_ids), sampling, role=Role.POLICY, cache_salt=playing.cache_salt
        )

    def _tell(self, playing: _Playing, wait: Wait, request_id: int | None = None) -> None:
        if self.watcher is not None:
            episode = playing.episode
            name = TrajectoryName(episode.step, episode.question.id, playing.key_sample)
            self.watcher.waits(name, wait, turn=episode.turn, request_id=request_id)

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
        results = [result for group in groups for trajectory in group.trajectories for result in trajectory.searches]
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
