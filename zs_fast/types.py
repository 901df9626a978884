"""The plain nouns of the data's walk: Question -> Completion -> Turn -> Trajectory -> Group. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    """Who speaks through an engine, or whose weights are meant."""

    POLICY = "policy"
    REFERENCE = "reference"
    CRITIC = "critic"
    SIMULATOR = "simulator"


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """An end-of-sequence token or a stop string; both stay in `token_ids`."""
    LENGTH = "length"
    """`Sampling.max_new_tokens` was reached."""
    FAILED = "failed"
    """The engine gave up (a remote server that is gone). `error` says why; `token_ids` is empty."""


class StopReason(StrEnum):
    """Why a trajectory ended. Every cut has its own name; each is counted in the metrics."""

    ANSWER = "answer"
    """The policy gave a complete answer."""
    TURN_LIMIT = "turn_limit"
    """`game.max_turns` completions were used without an answer."""
    LENGTH_LIMIT = "length_limit"
    """One completion reached `game.max_new_tokens` before a complete action."""
    CONTEXT_LIMIT = "context_limit"
    """The next observation or completion would not fit in `game.max_context_tokens`."""
    SEARCH_FAILED = "search_failed"
    """The search backend gave no documents. Never trained on."""


class SearchMode(StrEnum):
    """What a search request asks the simulator for. Real backends know only `REAL`."""

    USEFUL = "useful"
    NOISY = "noisy"
    REAL = "real"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One task. `Question(id="nq_train_3", text="who wrote emma?", answers=("Jane Austen",), source="nq")`."""

    id: str
    """Unique within a run; two data sets that both count from 0 don't collide (the source is part of it)."""
    text: str
    answers: tuple[str, ...]
    """Accepted strings; at least one, each with something left after normalisation. The first is the canonical one."""
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What an engine sampled for one request. `token_ids` are exactly the sampled ids, stop or EOS token included."""

    request_id: int
    role: Role
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The sampler's log-probability of each token, in nats. Empty for a remote engine that gives none."""
    finish_reason: FinishReason
    policy_version: int = 0
    """The version last passed to `Engine.publish` when the request was added."""
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one request is sampled. `temperature=0` is greedy. Token i is drawn with draw i of `seed`'s own stream."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end the completion once the decoded text holds one; the token that completed it is kept, whole."""


@dataclass(frozen=True, slots=True)
class Search:
    """The policy asks for documents. `query` is stripped and never empty."""

    query: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The policy answers. `text` is stripped; it may be empty (and then scores 0)."""

    text: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """No complete action. `reason` is one of a few fixed words, for the metrics: `no_action`, `empty_query`."""

    reason: str


Action = Search | Answer | Invalid


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRequest:
    """One search with the whole record of its trajectory, so that no two lists are ever matched by position."""

    step: int
    question: Question
    sample: int
    """Which trajectory of the question's group: 0 .. group_size - 1."""
    turn: int
    query: str
    noise_probability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The documents of one search: plain untrusted text, one string a document, without `Doc i:` prefixes."""

    request: SearchRequest
    documents: tuple[str, ...]
    mode: SearchMode
    contains_answer: bool = False
    """Does any document contain any gold answer (normalised words)? For the leak and usefulness statistics."""
    malformed: bool = False
    """The simulator's output did not have the asked-for form and was repaired."""
    failed: bool = False
    """No documents could be had; the trajectory ends with `StopReason.SEARCH_FAILED`."""
    error: str = ""
    num_generated_tokens: int = 0
    num_samples: int = 1
    """Texts that the simulator wrote until one was taken (`simulator.max_samples`)."""
    shared: bool = False
    """The documents are those of another trajectory's search for the same; no call was made for this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One completion, what it meant, and the observation it drew (empty when the game ended with it)."""

    completion: Completion
    action: Action
    observation: str = ""
    observation_ids: tuple[int, ...] = ()
    search: SearchResult | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """A trajectory's result, each in [0, 1]. `f1` is the training reward; the other two are only reported."""

    f1: float = 0.0
    exact_match: float = 0.0
    cover_match: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One played question. The token sequence is prompt_ids + (completion ids + observation ids) of each turn."""

    question: Question
    sample: int
    prompt_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    scores: Scores = field(default_factory=Scores)
    reward: float = 0.0
    """What the game gave; never overwritten by a normalised one."""
    opening: SearchResult | None = None
    """What was found before the first turn and stands in the prompt (the baseline `rag`)."""
    trainable: bool = True
    """False masks the whole trajectory out of the loss and of its group's statistics (a failed search)."""

    @property
    def answer(self) -> str | None:
        """The text of the terminating answer, or None when the trajectory ended without one."""
        last = self.turns[-1].action if self.turns else None
        return last.text if isinstance(last, Answer) and self.stop_reason is StopReason.ANSWER else None

    @property
    def num_searches(self) -> int:
        return len(self.searches)

    @property
    def searches(self) -> tuple[SearchResult, ...]:
        """What was searched for, in order."""
        found = (self.opening, *(turn.search for turn in self.turns))
        return tuple(search for search in found if search is not None)

    @property
    def num_action_tokens(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    @property
    def num_observation_tokens(self) -> int:
        return sum(len(turn.observation_ids) for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + self.num_action_tokens + self.num_observation_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The trajectories of one question in one step, in the order of `sample`, rewards already set."""

    question: Question
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """Numbers of one update, each a pure function of config and seed (clocks go elsewhere). Keys are metric names."""

    values: Mapping[str, float]
