"""A language model plays the search engine (ZeroSearch, arXiv:2505.04588, sections 3.2 and 3.3).

Each search is one request with role SIMULATOR to the engine that also serves the policy (or to a remote one), added the
moment it is submitted: all searches of a step are in flight together. A failed request is not repeated here and nothing
is made up: a search without documents comes back as failed, once. With `simulator.max_samples` above 1 a text that is
not what its mode promises is sampled again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from zs_fast.config import SimulatorConfig
from zs_fast.errors import EngineError
from zs_fast.search.documents import parse_documents
from zs_fast.search.prompts import simulator_prompt
from zs_fast.search.reward import contains_answer, tells_nothing
from zs_fast.search.untrusted import one_line
from zs_fast.system.seeds import seed_for, uniform
from zs_fast.types import Completion, FinishReason, Role, Sampling, SearchMode, SearchRequest, SearchResult

_CONTROL_TOKEN = re.compile(r"<(?=[/|!]?[a-z_]|\|)|\[(?=/?(?:INST|SYSTEM|TOOL|AVAILABLE)\w*\])", re.IGNORECASE)


class SimulatorEngine(Protocol):
    """The part of an engine that a simulator needs."""

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, *, role: Role, cache_salt: str | None = None
    ) -> None: ...

    def abort(self, role: Role, request_ids: Collection[int]) -> None: ...


class SimulatorCodec(Protocol):
    """Text to ids and back for the simulator's model."""

    def encode_prompt(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class _Asked(NamedTuple):
    """What searches must agree in to share a reply."""

    step: int
    question_id: str
    turn: int
    query: str
    mode: SearchMode


@dataclass(slots=True, eq=False)
class _Call:
    """One request to the simulator, and all searches that wait for it."""

    asked: _Asked
    waiting: list[SearchRequest]
    num_samples: int = 0
    num_tokens: int = 0
    """Of the samples that were not taken."""


class SimulatedSearch:
    """A SearchBackend that asks a language model for documents, useful or noisy by a seeded draw.

    With `simulator.share_noise_in_group`, samples of a question that ask the same in the same turn share one call: its
    seed is a function of what is asked, so neither their number nor their order shows in the documents.

    `SearchResult.error` of a failed search is one of `empty_output`, `refused`, `engine_refused: ...` (the engine would
    not take the prompt) or the engine's own words.
    """

    def __init__(
        self,
        engine: SimulatorEngine,
        codec: SimulatorCodec,
        simulator: SimulatorConfig,
        *,
        run_seed: int,
        max_query_characters: int = 512,
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._simulator = simulator
        self._run_seed = run_seed
        self._max_query_characters = max_query_characters
        self._next_request_id = 0
        self._pending: dict[int, _Call] = {}
        self._under_way: dict[_Asked, _Call] = {}
        """Of `_pending`, those that further searches may join."""
        self._answered: dict[_Asked, SearchResult] = {}
        """Replies that further searches may share; of the two newest steps."""
        self._results: list[SearchResult] = []

    def submit(self, request: SearchRequest) -> None:
        """Draw the mode, and ask the engine by the request's own question."""
        mode = self.mode(request)
        query = clean_query(request.query, self._max_query_characters)
        asked = _Asked(request.step, request.question.id, request.turn, query, mode)
        if self._simulator.share_noise_in_group and self._joins(asked, request):
            return
        call = _Call(asked, [request])
        try:
            self._sample(call)
        except EngineError as error:
            self._results.append(_failed(request, mode, f"engine_refused: {error}"))
            return
        if self._simulator.share_noise_in_group:
            self._under_way[asked] = call

    def deliver(self, completion: Completion) -> None:
        """Turn a simulator completion into the results of the searches it was added for."""
        if completion.role is not Role.SIMULATOR or completion.request_id not in self._pending:
            raise EngineError(
                f"The simulator got a completion (role {completion.role}, request {completion.request_id}) that it did "
                f"not ask for; {len(self._pending)} calls are under way. Give each engine's completions to the "
                "backend that added them."
            )
        call = self._pending.pop(completion.request_id)
        first, *others = call.waiting
        result = self._result(first, call, completion)
        another = completion.finish_reason is not FinishReason.FAILED and call.num_samples < self._simulator.max_samples
        if another and not _is_as_asked(result):
            call.num_tokens += len(completion.token_ids)
            self._sample(call)
            return
        self._results += [result, *(_shared(result, other) for other in others)]
        if self._simulator.share_noise_in_group:
            del self._under_way[call.asked]
            self._answered = {asked: known for asked, known in self._answered.items() if asked.step >= first.step - 1}
            if not result.failed:
                self._answered[call.asked] = result

    def cancel(self) -> None:
        """Give up all searches under way. Asked again, they get the same documents: seeds are those of the request."""
        self._engine.abort(Role.SIMULATOR, list(self._pending))
        self._pending, self._under_way, self._answered, self._results = {}, {}, {}, []

    def recall(self, results: Sequence[SearchResult]) -> None:
        """Replies that were got before an interruption; with `share_noise_in_group` others may share them."""
        for result in results if self._simulator.share_noise_in_group else ():
            request = result.request
            query = clean_query(request.query, self._max_query_characters)
            if not result.failed:
                asked = _Asked(request.step, request.question.id, request.turn, query, result.mode)
                self._answered[asked] = result

    def poll(self) -> list[SearchResult]:
        """The searches finished since the last call, in the order they finished."""
        results, self._results = self._results, []
        return results

    @property
    def num_pending(self) -> int:
        """Searches that the engine has not finished yet."""
        return sum(len(call.waiting) for call in self._pending.values())

    def mode(self, request: SearchRequest) -> SearchMode:
        """NOISY with probability `request.noise_probability`; a pure function of the run seed and the request."""
        draw = uniform(self._seed(request, "noise"))
        return SearchMode.NOISY if draw < request.noise_probability else SearchMode.USEFUL

    def _sample(self, call: _Call) -> None:
        """Add the prompt of `call` to the engine. Raises EngineError where that does not take it."""
        request, settings = call.waiting[0], self._simulator
        asked = replace(request, query=call.asked.query)
        prompt = simulator_prompt(settings.template, call.asked.mode, asked, settings.documents)
        purpose = f"sample {call.asked.query}" if settings.share_noise_in_group else "sample"
        if call.num_samples:
            purpose += f" again {call.num_samples}"
        sampling = Sampling(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=self._seed(request, purpose),
        )
        request_id = self._next_request_id
        self._next_request_id += 1
        self._engine.add(request_id, self._codec.encode_prompt(prompt), sampling, role=Role.SIMULATOR)
        self._pending[request_id] = call
        call.num_samples += 1

    def _joins(self, asked: _Asked, request: SearchRequest) -> bool:
        """Has the same been asked already? Then its reply is this search's too."""
        if asked in self._answered:
            self._results.append(_shared(self._answered[asked], request))
            return True
        if asked in self._under_way:
            self._under_way[asked].waiting.append(request)
            return True
        return False

    def _seed(self, request: SearchRequest, purpose: str) -> int:
        return seed_for(
            self._run_seed,
            step=request.step,
            question_id=request.question.id,
            sample=0 if self._simulator.share_noise_in_group else request.sample,
            turn=request.turn,
            role=Role.SIMULATOR,
            purpose=purpose,
        )

    def _result(self, request: SearchRequest, call: _Call, completion: Completion) -> SearchResult:
        mode, num_tokens = call.asked.mode, call.num_tokens + len(completion.token_ids)
        if completion.finish_reason is FinishReason.FAILED:
            return _failed(request, mode, completion.error or "engine_failed", num_tokens)
        parsed = parse_documents(self._codec.decode(completion.token_ids), self._simulator.documents)
        if not parsed.documents:
            return _failed(request, mode, "refused" if parsed.refused else "empty_output", num_tokens)
        return SearchResult(
            request=request,
            documents=parsed.documents,
            mode=mode,
            contains_answer=contains_answer(parsed.documents, request.question.answers),
            malformed=parsed.malformed or completion.finish_reason is FinishReason.LENGTH,
            num_generated_tokens=num_tokens,
            num_samples=call.num_samples,
        )


def _is_as_asked(result: SearchResult) -> bool:
    """Are there documents, with a gold answer where they are useful and without one where they are noisy?"""
    if result.failed or tells_nothing(result.request.question.answers):
        return not result.failed
    return result.contains_answer == (result.mode is SearchMode.USEFUL)


def clean_query(query: str, max_characters: int) -> str:
    """The policy's query as one line of at most `max_characters`, for a prompt that holds the gold answer.

    Control, bidirectional and zero-width characters and line breaks become spaces, so that a query can't open a new
    line of the prompt. A space is put into anything that looks like a control token or a tag (`<|im_end|>`, `</s>`,
    `[INST]`): a local codec can't be injected anyway, but a remote server tokenises the text itself.
    """
    return _CONTROL_TOKEN.sub(lambda match: match[0] + " ", one_line(query))[:max_characters].strip()


def _shared(result: SearchResult, request: SearchRequest) -> SearchResult:
    """The same documents for another search; the tokens were written once."""
    return replace(result, request=request, shared=True, num_generated_tokens=0, num_samples=1)


def _failed(request: SearchRequest, mode: SearchMode, error: str, num_generated_tokens: int = 0) -> SearchResult:
    return SearchResult(
        request=request, documents=(), mode=mode, failed=True, error=error, num_generated_tokens=num_generated_tokens
    )
