"""One question from a person: the policy's words as they come, what each search found, the answer and its sources."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol, TextIO, runtime_checkable

from zs_fast.config import RunConfig
from zs_fast.errors import ConfigError, SimulatorError
from zs_fast.ranks import check_recipe
from zs_fast.rollout.engine import LocalEngine
from zs_fast.rollout.play import IDLE_SLEEP_S, STALL_TIMEOUT_S
from zs_fast.search.backends import SearchBackend
from zs_fast.search.codec import Codec
from zs_fast.search.environment import Episode
from zs_fast.search.prompts import STOP_STRINGS
from zs_fast.search.untrusted import without_controls
from zs_fast.setup import SearchEngines, build_arena, load_policy, use_device
from zs_fast.system.seeds import seed_for
from zs_fast.types import Completion, Question, Role, Sampling, SearchRequest, SearchResult, Trajectory

SHOWN_CHARACTERS = 240
"""Of a document, on the screen; the result has all of it."""
_SALT = "ask"


@runtime_checkable
class Streams(Protocol):
    """An engine that shows a completion before it is finished."""

    def sampled_so_far(self, role: Role, request_id: int) -> list[int]: ...


def ask(config: RunConfig, text: str, *, screen: TextIO | None = None) -> dict[str, Any]:
    """Let the policy answer `text` and show how on `screen` (standard output): what it writes, token by token where the
    engine can, else turn by turn; the documents of each search; the answer. Returns the same as plain JSON.

    The search is the first of `eval.search` that needs no gold answer, else BM25.
    """
    if not text.strip():
        raise ConfigError("the question is empty. Ask one: zs-fast ask 'who wrote emma?'")
    name = next((search for search in config.eval.search if search != "simulator"), "bm25")
    check_recipe(config)
    with ExitStack() as stack:
        device = use_device(config)
        policy = load_policy(config, device)
        # No evaluation is planned, so that the engine holds the policy alone.
        alone = config.model_copy(update={"eval": config.eval.model_copy(update={"data": ()})})
        arena = build_arena(alone, policy, device=device, training=False)
        stack.callback(arena.close)
        searches = SearchEngines(config=config, engine=arena.engine, remote=None, models={})
        stack.callback(searches.close)
        search = searches.judge(name, {})
        page = _Page(screen or sys.stdout)
        question = Question(id="ask:1", text=text.strip(), answers=(), source="ask")
        try:
            trajectory = _play(question, config, arena.engine, search, arena.codec, page)
        except KeyboardInterrupt:
            page.break_off()
            raise
    page.end(trajectory)
    return {
        "question": question.text,
        "answer": trajectory.answer,
        "stop_reason": str(trajectory.stop_reason),
        "model": config.model.path,
        "search": name,
        "searches": [
            {"query": found.request.query, "documents": list(found.documents)} for found in trajectory.searches
        ],
    }


def _play(
    question: Question, config: RunConfig, engine: LocalEngine, search: SearchBackend, codec: Codec, page: _Page
) -> Trajectory:
    episode = Episode(question, sample=0, step=0, noise_probability=0.0, game=config.game, codec=codec)
    while not episode.done:
        draw = seed_for(
            config.seed,
            step=0,
            question_id=question.id,
            sample=0,
            turn=episode.turn,
            role=Role.POLICY,
            purpose="sample",
        )
        sampling = Sampling(
            max_new_tokens=episode.max_new_tokens(),
            temperature=config.eval.temperature,
            seed=draw,
            stop=STOP_STRINGS,
        )
        engine.add(episode.turn, list(episode.context_ids), sampling, role=Role.POLICY, cache_salt=_SALT)
        completion = _completion(engine, episode.turn, lambda ids: page.written(codec.decode(ids)))
        page.written(codec.decode(completion.token_ids), is_whole=True)
        request = episode.on_completion(completion)
        if request is not None:
            result = _documents(search, request)
            page.found(result)
            episode.on_search_result(result)
    engine.end(Role.POLICY, _SALT)
    return episode.trajectory()


def _completion(engine: LocalEngine, request_id: int, show: Callable[[list[int]], None]) -> Completion:
    """The one completion that is under way; `show` gets its tokens as they come, where the engine has them."""
    while True:
        for completion in engine.step():
            return completion
        if isinstance(engine, Streams):
            show(engine.sampled_so_far(Role.POLICY, request_id))


def _documents(search: SearchBackend, request: SearchRequest) -> SearchResult:
    search.submit(request)
    started = time.monotonic()
    while not (results := search.poll()):
        if time.monotonic() - started > STALL_TIMEOUT_S:
            raise SimulatorError(f"The search gave no result for {STALL_TIMEOUT_S:.0f} s. Is its server alive?")
        time.sleep(IDLE_SLEEP_S)
    return results[0]


class _Page:
    """The screen of one question. Whatever others wrote is printed without control characters."""

    def __init__(self, screen: TextIO) -> None:
        self._screen = screen
        self._shown = 0
        """Characters of the present turn that stand on the screen."""
        self._num_documents = 0

    def written(self, text: str, *, is_whole: bool = False) -> None:
        """The present turn up to now; with `is_whole` it ends here. Half a character waits for its other half."""
        ready = text if is_whole else text.rstrip("\ufffd")
        self._print(ready[self._shown :])
        self._shown = max(self._shown, len(ready))
        if is_whole:
            self._shown = 0
            self._print("\n")

    def break_off(self) -> None:
        """What is said next begins on a line of its own."""
        self._print("\n")

    def found(self, result: SearchResult) -> None:
        """Numbers go on over all searches, so that the list at the end can name them."""
        if result.failed:
            self._print(f"  the search failed: {result.error}\n")
        elif not result.documents:
            self._print("  nothing was found\n")
        for line in _numbered(result, self._num_documents):
            self._print(f"  {line}\n")
        self._num_documents += len(result.documents)

    def end(self, trajectory: Trajectory) -> None:
        if trajectory.answer is None:
            self._print(f"\nno answer ({trajectory.stop_reason})\n")
        else:
            self._print(f"\nanswer: {trajectory.answer}\n")
        number = 0
        for result in trajectory.searches:
            last = number + len(result.documents)
            span = f"[{number + 1}] to [{last}]" if last > number else "nothing"
            self._print(f"sources: {span}, for {result.request.query!r}\n")
            number = last

    def _print(self, text: str) -> None:
        encoding = self._screen.encoding or "utf-8"
        clean = without_controls(text).encode(encoding, "replace").decode(encoding)
        self._screen.write(clean)
        self._screen.flush()


def _numbered(result: SearchResult, first: int) -> Iterator[str]:
    for number, document in enumerate(result.documents, first + 1):
        text = " ".join(document.split())
        yield f"[{number}] {text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + '...'}"
