"""One trajectory being played: completions and search results in, search requests out, a scored trajectory at the end.

The context only ever grows: the ids of the prompt, of each completion as sampled, and of each observation. It is never
cut or re-encoded, so the next completion is sampled from, and later trained on, exactly these ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from zs_fast.config import GameConfig, MethodName
from zs_fast.errors import ConfigError, EngineError
from zs_fast.search.codec import AnyCodec
from zs_fast.search.parser import parse_turn
from zs_fast.search.prompts import INVALID_ACTION, method_prompt, observation
from zs_fast.search.reward import reward_of, score
from zs_fast.search.untrusted import clean_document, without_cut_tag
from zs_fast.types import (
    Action,
    Answer,
    Completion,
    FinishReason,
    Invalid,
    Question,
    Search,
    SearchRequest,
    SearchResult,
    StopReason,
    Trajectory,
    Turn,
)

_CHARACTERS_PER_TOKEN = 64
"""A document is cut to this many characters per token of room before it is looked at, to bound the work."""


class Episode:
    """The game of one trajectory. The caller samples while `done` is False and no search result is awaited.

        episode = Episode(question, sample=0, step=1, noise_probability=0.1, game=game, codec=codec)
        while not episode.done:
            request = episode.on_completion(<sample from episode.context_ids, at most episode.max_new_tokens()>)
            if request is not None:
                episode.on_search_result(<documents for request>)
        trajectory = episode.trajectory()

    A prompt that leaves no room for one new token is over at once, with `context_limit` and no turns. With a `method`
    other than `agent` there is one completion; with `rag` a search, for the question, is awaited before it.
    """

    def __init__(
        self,
        question: Question,
        *,
        sample: int,
        step: int,
        noise_probability: float,
        game: GameConfig,
        codec: AnyCodec,
        method: MethodName = "agent",
    ) -> None:
        self.question = question
        self.sample = sample
        self.step = step
        self.noise_probability = noise_probability
        self._game = game
        self._codec = codec
        self._method = method
        self._max_turns = game.max_turns if method == "agent" else 1
        self._num_wrapper_tokens = len(codec.encode_untrusted(observation(())))
        if game.max_observation_tokens < self._num_wrapper_tokens:
            raise ConfigError(
                f"game.max_observation_tokens is {game.max_observation_tokens}, but the tags around the documents "
                f"alone take {self._num_wrapper_tokens} tokens. Raise it."
            )
        self.prompt_ids: tuple[int, ...] = ()
        self.context_ids: list[int] = []
        """Prompt, sampled and observation ids so far: what the next completion is sampled from."""
        self._turns: list[Turn] = []
        self._opening: SearchResult | None = None
        self._pending: SearchRequest | None = None
        self._stop_reason: StopReason | None = None
        self._trajectory: Trajectory | None = None
        if method == "rag":
            self._pending = self._request(question.text)
        else:
            self._open("")

    @property
    def turn(self) -> int:
        """Number of completions so far, which is the index of the next one."""
        return len(self._turns)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Those so far."""
        return tuple(self._turns)

    @property
    def pending(self) -> SearchRequest | None:
        """The search whose documents are awaited."""
        return self._pending

    @property
    def done(self) -> bool:
        return self._stop_reason is not None

    def max_new_tokens(self) -> int:
        """Tokens that the next completion may have: the turn's own limit, or what is left in the context."""
        return max(0, min(self._game.max_new_tokens, self._room()))

    def on_completion(self, completion: Completion) -> SearchRequest | None:
        """Take the next completion. A request waits for documents; None: over, or ready for the next completion.

        Raises EngineError for a failed completion, or one with more tokens than were asked for.
        """
        assert not self.done and self._pending is None, (self._stop_reason, self._pending)
        if completion.finish_reason is FinishReason.FAILED:
            raise EngineError(
                f"the engine gave no completion for question {self.question.id!r}, sample {self.sample}, turn "
                f"{self.turn}: {completion.error or 'no reason given'}"
            )
        limit = self.max_new_tokens()
        if len(completion.token_ids) > limit:
            raise EngineError(
                f"the engine gave {len(completion.token_ids)} tokens for question {self.question.id!r}, sample "
                f"{self.sample}, turn {self.turn}, where at most {limit} were asked for"
            )
        self.context_ids.extend(completion.token_ids)
        index = self.turn
        opening = "<think>" if index == 0 and self._codec.prompt_opens_thinking else ""
        action = parse_turn(opening + self._codec.decode(completion.token_ids))
        self._turns.append(Turn(completion=completion, action=action))
        self._stop_reason = self._why_over(completion, action, limit)
        if self.done:
            return None
        if isinstance(action, Search):
            self._pending = self._request(action.query, turn=index)
            return self._pending
        self._observe(INVALID_ACTION, self._codec.encode_untrusted(INVALID_ACTION), None)
        return None

    def on_search_result(self, result: SearchResult) -> None:
        """Take the documents that were waited for; a failed search ends the trajectory."""
        assert self._pending is not None and result.request == self._pending, (self._pending, result.request)
        self._pending = None
        is_opening = not self._turns
        if is_opening:
            self._opening = result
        if result.failed:
            self._stop_reason = StopReason.SEARCH_FAILED
            if not is_opening:
                self._replace_last(search=result)
            return
        text, ids = fit_documents(result.documents, self._game.max_observation_tokens, self._codec)
        if is_opening:
            self._open(text)
        else:
            self._observe(text, ids, result)

    def trajectory(self) -> Trajectory:
        """The finished trajectory with the scores of its terminating answer, and its reward (`game.reward`)."""
        assert self._stop_reason is not None, "the trajectory is not over"
        if self._trajectory is None:
            self._trajectory = self._scored(self._stop_reason)
        return self._trajectory

    def _scored(self, stop_reason: StopReason) -> Trajectory:
        last = self._turns[-1].action if self._turns else None
        answered = stop_reason is StopReason.ANSWER and isinstance(last, Answer)
        scores = score(last.text if answered and isinstance(last, Answer) else None, self.question.answers)
        played = Trajectory(
            question=self.question,
            sample=self.sample,
            prompt_ids=self.prompt_ids,
            turns=tuple(self._turns),
            stop_reason=stop_reason,
            scores=scores,
            opening=self._opening,
            trainable=stop_reason is not StopReason.SEARCH_FAILED,
        )
        return replace(played, reward=reward_of(self._game.reward)(played))

    def _open(self, documents: str) -> None:
        """Begin with the prompt, if a completion has room behind it."""
        prompt = method_prompt(self._method, self.question.text, documents)
        self.prompt_ids = tuple(self._codec.encode_prompt(prompt))
        self.context_ids = list(self.prompt_ids)
        if self.max_new_tokens() < 1:
            self._stop_reason = StopReason.CONTEXT_LIMIT

    def _request(self, query: str, turn: int = 0) -> SearchRequest:
        return SearchRequest(
            step=self.step,
            question=self.question,
            sample=self.sample,
            turn=turn,
            query=query[: self._game.max_query_characters].rstrip(),
            noise_probability=self.noise_probability,
        )

    def _room(self) -> int:
        return self._game.max_context_tokens - len(self.context_ids)

    def _why_over(self, completion: Completion, action: Action, limit: int) -> StopReason | None:
        """Why the game ends with this completion, or None. A cut completion is told apart from an invalid one."""
        if isinstance(action, Answer):
            return StopReason.ANSWER
        if completion.finish_reason is FinishReason.LENGTH and action == Invalid("no_action"):
            return StopReason.LENGTH_LIMIT if limit == self._game.max_new_tokens else StopReason.CONTEXT_LIMIT
        if self.turn >= self._max_turns:
            return StopReason.TURN_LIMIT
        if isinstance(action, Search) and self._room() < self._num_wrapper_tokens + 1:
            return StopReason.CONTEXT_LIMIT  # nobody could read the documents
        return None

    def _observe(self, text: str, ids: Sequence[int], result: SearchResult | None) -> None:
        """Append an observation if a completion can follow it; else the context is full and it is left out."""
        if len(ids) + 1 > self._room():
            self._stop_reason = StopReason.CONTEXT_LIMIT
            self._replace_last(search=result)
            return
        self.context_ids.extend(ids)
        self._replace_last(observation=text, observation_ids=tuple(ids), search=result)

    def _replace_last(
        self, *, search: SearchResult | None, observation: str = "", observation_ids: tuple[int, ...] = ()
    ) -> None:
        last = self._turns[-1]
        self._turns[-1] = Turn(
            completion=last.completion,
            action=last.action,
            observation=observation,
            observation_ids=observation_ids,
            search=search,
        )


def fit_documents(documents: Sequence[str], max_tokens: int, codec: AnyCodec) -> tuple[str, list[int]]:
    """The observation for untrusted documents and its ids, at most `max_tokens`; the wrapper is always whole.

    Documents are cleaned. Where all of them don't fit, the longest are cut first, each at its end, until they share
    the room equally; labels (`Doc 3:`) go last. `max_tokens` must have room for the empty wrapper.
    """
    most_characters = max_tokens * _CHARACTERS_PER_TOKEN
    texts = [
        clean_document(document[:most_characters], codec.reserved_strings).strip()
        for document in documents[:max_tokens]  # a label takes at least one token
    ]
    text = observation(texts)
    ids = codec.encode_untrusted(text)
    if len(ids) <= max_tokens:
        return text, ids
    texts = texts[: _num_labels(len(texts), max_tokens, codec)]
    lengths = [len(codec.encode_untrusted(document)) for document in texts]
    room = max(0, max_tokens - (len(ids) - sum(lengths)))
    while True:
        share = _equal_share(lengths, room)
        text = observation([without_cut_tag(codec.cut_untrusted(document, share)) for document in texts])
        ids = codec.encode_untrusted(text)
        if len(ids) <= max_tokens:
            return text, ids
        # Pieces may merge differently next to their labels, so the first guess can miss by a few tokens.
        assert room > 0, (max_tokens, len(ids), len(texts))
        room = max(0, room - (len(ids) - max_tokens))


def _num_labels(num_documents: int, max_tokens: int, codec: AnyCodec) -> int:
    """How many documents can be shown at least by their labels."""
    fitting, failing = 0, num_documents + 1
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if len(codec.encode_untrusted(observation([""] * middle))) <= max_tokens:
            fitting = middle
        else:
            failing = middle
    return fitting


def _equal_share(lengths: Sequence[int], room: int) -> int:
    """The largest share such that documents cut to it fit in `room` together."""
    share = 0
    for position, length in enumerate(sorted(lengths)):
        share = room // (len(lengths) - position)
        if length > share:
            return share
        room -= length
    return max(lengths, default=0)
