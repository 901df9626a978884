"""Lengths of a step's trajectories, from a seed, and an engine that makes random models write exactly these.

The player, the episodes and the simulated search run as in training. What is forced is how many tokens each completion
has, and what its text is read as: a search while documents are left in the trace, then the answer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from zs_fast.errors import EngineError
from zs_fast.rollout.engine import LocalEngine
from zs_fast.system.seeds import seed_for
from zs_fast.types import Completion, Question, Role, Sampling

TRACE = Path(__file__).with_name("traces") / "heavy_tailed_64.json"
GROUP_SIZE = 4
RUN_SEED = 0
ABOUT = (
    "64 trajectories of 1 to 4 searches (uniform). Actions: log-normal, median 40 tokens, sigma 1. Documents: Pareto, "
    "least 40 tokens, exponent 1.3. Both are cut to 8 .. 320 tokens. Each row: action, documents, action, documents, "
    "..., answer. Made by bench.rollout_trace.make_trace from the seed."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Token counts; what the simulator writes is what the policy reads."""

    about: str
    seed: int
    prompt_tokens: int
    simulator_prompt_tokens: int
    trajectories: tuple[tuple[int, ...], ...]
    """Action, documents, action, documents, ..., last action."""

    @property
    def num_turns(self) -> int:
        return sum(len(lengths) // 2 + 1 for lengths in self.trajectories)

    @property
    def num_searches(self) -> int:
        return sum(len(lengths) // 2 for lengths in self.trajectories)

    @property
    def least_prefill(self) -> tuple[int, int]:
        """Prompt tokens of (policy, simulator) that no way can do without: a question's prompt once, its last token for
        each sample, and with every observation the last sampled token before it, which no forward has seen yet."""
        observed = sum(n + 1 for lengths in self.trajectories for n in lengths[1::2])
        prompts = len(self.questions) * (self.prompt_tokens - 1) + len(self.trajectories)
        return prompts + observed, self.num_searches * self.simulator_prompt_tokens

    @property
    def questions(self) -> list[Question]:
        """One for every GROUP_SIZE trajectories."""
        return [
            Question(id=f"q{number}", text=f"question {number}", answers=("x",), source="trace")
            for number in range(len(self.trajectories) // GROUP_SIZE)
        ]


def make_trace(seed: int = 0, num_trajectories: int = 64) -> Trace:
    draws = random.Random(seed)

    def cut(tokens: float) -> int:
        return max(8, min(320, int(tokens)))

    def action() -> int:
        return cut(40 * draws.lognormvariate(0.0, 1.0))

    trajectories = []
    for _ in range(num_trajectories):
        lengths: list[int] = []
        for _ in range(draws.randint(1, 4)):
            lengths += [action(), cut(40 * draws.paretovariate(1.3))]
        trajectories.append((*lengths, action()))
    return Trace(about=ABOUT, seed=seed, prompt_tokens=64, simulator_prompt_tokens=64, trajectories=tuple(trajectories))


def load_trace(path: Path = TRACE) -> Trace:
    values = json.loads(path.read_text(encoding="utf-8"))
    return Trace(**values | {"trajectories": tuple(map(tuple, values["trajectories"]))})


def write_trace(trace: Trace, path: Path = TRACE) -> None:
    """One trajectory a line."""
    values = asdict(trace)
    rows = ",\n  ".join(json.dumps(row) for row in values.pop("trajectories"))
    head = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{{head},\n "trajectories": [\n  {rows}\n ]}}\n', encoding="utf-8")


class TraceCodec:
    """Text and ids of one role: prompts and documents have the lengths of the trace, completions a given meaning."""

    added_ids: frozenset[int] = frozenset()
    eos_ids: frozenset[int] = frozenset()
    reserved_strings: tuple[str, ...] = ()
    prompt_opens_thinking = False

    def __init__(self, trace: Trace, prompt_tokens: int, meanings: dict[tuple[int, ...], str]) -> None:
        self._trace = trace
        self._prompt_tokens = prompt_tokens
        self._meanings = meanings

    def encode_prompt(self, text: str) -> list[int]:
        return _ids(text, self._prompt_tokens)

    def encode_untrusted(self, text: str) -> list[int]:
        found = re.search(r"t(\d+)\.(\d+)", text)
        return _ids(text, self._trace.trajectories[int(found[1])][2 * int(found[2]) + 1] if found else 2)

    def cut_untrusted(self, text: str, max_tokens: int) -> str:
        raise AssertionError(f"the trace's documents fit, yet {text!r} was to be cut to {max_tokens} tokens")

    def decode(self, ids: Iterable[int]) -> str:
        return self._meanings[tuple(ids)]


class TraceEngine:
    """An engine whose completions have the trace's lengths; counts the steps in which there was something to do."""

    def __init__(self, engine: LocalEngine, trace: Trace, *, steps: int) -> None:
        self.engine = engine
        self.num_steps = 0
        self._meanings: dict[tuple[int, ...], str] = {}
        self._forced: dict[int, tuple[int, str]] = {}
        self._open: dict[tuple[Role, int], str] = {}
        self.policy_codec = TraceCodec(trace, trace.prompt_tokens, self._meanings)
        self.simulator_codec = TraceCodec(trace, trace.simulator_prompt_tokens, self._meanings)
        for step in range(1, steps + 1):
            for index, lengths in enumerate(trace.trajectories):
                for place, length in enumerate(lengths):
                    role = Role.SIMULATOR if place % 2 else Role.POLICY
                    name = f"t{index}.{place // 2}"
                    is_last = place == len(lengths) - 1
                    text = "<answer>x</answer>" if is_last else f"<search>{name}</search>"
                    seed = draw_seed(step, index, place // 2, role)
                    self._forced[seed] = (length, f"Doc 1: {name}" if role is Role.SIMULATOR else text)

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, *, role: Role, cache_salt: str | None = None
    ) -> None:
        length, self._open[role, request_id] = self._forced[sampling.seed]
        forced = replace(sampling, max_new_tokens=length, stop=())
        self.engine.add(request_id, prompt_ids, forced, role=role, cache_salt=cache_salt)

    def step(self) -> list[Completion]:
        self.num_steps += self.engine.num_unfinished > 0
        completions = self.engine.step()
        for completion in completions:
            text = self._open.pop((completion.role, completion.request_id))
            if self._meanings.setdefault(completion.token_ids, text) != text:
                raise EngineError("Two completions of the trace came out equal; take other seeds for the models.")
        return completions

    @property
    def num_unfinished(self) -> int:
        return self.engine.num_unfinished

    def end(self, role: Role, cache_salt: str) -> None:
        self.engine.end(role, cache_salt)

    def abort(self, role: Role, request_ids: Collection[int]) -> None:
        self.engine.abort(role, request_ids)

    def publish(self, version: int) -> None:
        self.engine.publish(version)


def draw_seed(step: int, index: int, turn: int, role: Role) -> int:
    """The seed that the player and the simulated search give to trajectory `index` of the trace."""
    return seed_for(
        RUN_SEED,
        step=step,
        question_id=f"q{index // GROUP_SIZE}",
        sample=index % GROUP_SIZE,
        turn=turn,
        role=role,
        purpose="sample",
    )


def _ids(text: str, count: int) -> list[int]:
    return random.Random(text).choices(range(256), k=count)
