"""How long the phases of a step take at least, and about how long in practice: rooflines over sizes and speeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from zs_fast.config import RunConfig
from zs_fast.system.hardware import Hardware
from zs_fast.system.plan import ITEM_BYTES, POLICY_PROMPT_TOKENS, SIMULATOR_PROMPT_TOKENS, PlanPhase, policy_rank
from zs_fast.system.shapes import Shape, shape_of

SEARCHES_PER_CHANCE = 0.48
"""Of the turns that may search, those that do: 2.4 searches where five are allowed."""
TOKENS_PER_TURN, TOKENS_PER_ANSWER = 150, 250
"""What a policy writes in a turn, and a simulator for a search, where they may write more."""
REACHED = {PlanPhase.ROLLOUT: 0.5, PlanPhase.SCORE: 0.5, PlanPhase.UPDATE: 0.4}
"""Shares of the roofline that a phase is taken to reach. Assumed; not measured on a GPU."""
FLOAT32_SLOWER = 8.0
"""Of a card's float32 products over its bfloat16 ones. Assumed: 2 to 15 by card."""
LAUNCH_S = 0.002
"""Of the host in a decoding step on a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A step's trajectories, as numbers; what is per trajectory is a mean."""

    trajectories: int
    searches: float
    """Per trajectory."""
    prompt: float
    """Tokens of the game's prompt."""
    written: float
    """Tokens of the policy, per trajectory."""
    documents: float
    """Tokens of all observations, per trajectory."""
    context: float
    """Tokens of a whole trajectory."""
    computed: float
    """Of those, what a pass over the batch computes: prefixes that trajectories share count once."""
    asked: float = 0.0
    """Tokens of the simulator's prompt for a search."""
    answered: float = 0.0
    """Tokens that the simulator writes for a search."""


def usual_workload(config: RunConfig) -> Workload:
    """Trajectories of usual length: a prompt, and for each search a turn, an answer, and a last turn."""
    game, simulator, train = config.game, config.simulator, config.train
    searches = SEARCHES_PER_CHANCE * (game.max_turns - 1)
    written = (searches + 1) * min(TOKENS_PER_TURN, game.max_new_tokens)
    documents = searches * min(TOKENS_PER_ANSWER, game.max_observation_tokens)
    context = min(POLICY_PROMPT_TOKENS + written + documents, game.max_context_tokens)
    shared = POLICY_PROMPT_TOKENS * (1.0 - 1.0 / train.group_size) if train.share_prefixes else 0.0
    return Workload(
        trajectories=train.questions_per_step * train.group_size,
        searches=searches,
        prompt=POLICY_PROMPT_TOKENS,
        written=written,
        documents=documents,
        context=context,
        computed=context - min(shared, context),
        asked=SIMULATOR_PROMPT_TOKENS[simulator.template],
        answered=min(TOKENS_PER_ANSWER, simulator.max_new_tokens),
    )


def phase_seconds(config: RunConfig, hardware: Hardware) -> dict[PlanPhase, float]:
    """About how many seconds each phase of a step takes, for trajectories of usual length."""
    floors = phase_floors(config, hardware, usual_workload(config))
    return {phase: seconds / REACHED[phase] for phase, seconds in floors.items()}


def phase_floors(config: RunConfig, hardware: Hardware, work: Workload) -> dict[PlanPhase, float]:
    """The fewest seconds that each phase of a step can take: prefixes are computed once, slots are always full."""
    train, simulator = config.train, config.simulator
    if hardware.is_cuda and config.model.dtype == "float32":
        hardware = replace(hardware, flop_per_s=hardware.flop_per_s / FLOAT32_SLOWER)
    number, slots = work.trajectories, config.engine.slots
    policy, item = shape_of(config.model.path), ITEM_BYTES[config.model.dtype]
    writing = [_decode(policy, item, number, work.written, work.context, slots)]
    rollout = _forward(policy, number / train.group_size * work.prompt + number * work.documents, 0, hardware)
    calls = number * work.searches
    if simulator.kind in ("model", "policy") and calls:
        other = shape_of(simulator.path) if simulator.kind == "model" else policy
        writing.append(_decode(other, item, calls, work.answered, work.asked + work.answered, slots))
        rollout += _forward(other, calls * work.asked, 0, hardware)
        if simulator.kind == "policy" and _shares_forwards(config, hardware):
            writing = [_together(*writing)]
    rollout += sum(one.seconds(hardware) for one in writing)
    one = _forward(policy, number * work.computed, number * work.written, hardware, context=work.context)
    passes = (config.algorithm.kl_coefficient > 0) + (train.mini_batches * train.epochs > 1)
    trained = (2.0 if policy_rank(config) else 3.0) + train.gradient_checkpointing
    update = one * trained * train.epochs
    if config.algorithm.name == "ppo":
        passes, update = passes + 1, 2 * update
    return {PlanPhase.ROLLOUT: rollout, PlanPhase.SCORE: one * passes, PlanPhase.UPDATE: update}


def _attention_flop(shape: Shape, tokens: float, context: float) -> float:
    """Of causal attention, for tokens that see half the context on average."""
    return 2.0 * shape.layers * shape.query_size * tokens * context


def _forward(shape: Shape, tokens: float, head_tokens: float, hardware: Hardware, *, context: float = 0.0) -> float:
    flop = 2.0 * shape.linear_parameters * tokens + 2.0 * shape.head_parameters * head_tokens
    return (flop + _attention_flop(shape, tokens, context)) / hardware.flop_per_s


def _shares_forwards(config: RunConfig, hardware: Hardware) -> bool:
    """Do the rows of two roles on one base pass by its weights together? vLLM's always do, the embedded engine's by the
    row operators."""
    by_rows = (
        not hardware.is_cuda and config.engine.batch_invariant is not False and config.model.quantization == "none"
    )
    return bool(policy_rank(config)) and (config.engine.kind == "vllm" or by_rows)


class _Decode(NamedTuple):
    """Decode steps and what each of them takes."""

    steps: float
    weight_bytes: float
    kv_bytes: float
    flop: float

    def seconds(self, hardware: Hardware) -> float:
        moved = (self.weight_bytes + self.kv_bytes) / hardware.bytes_per_s
        return self.steps * (max(moved, self.flop / hardware.flop_per_s) + LAUNCH_S * hardware.is_cuda)


def _decode(shape: Shape, itemsize: int, sequences: float, tokens: float, context: float, slots: int) -> _Decode:
    """Of `sequences` that write `tokens` each, at most `slots` at a time."""
    batch = max(1.0, min(sequences, slots))
    weights = shape.linear_parameters + shape.head_parameters
    return _Decode(
        steps=sequences * tokens / batch,
        weight_bytes=itemsize * weights,
        kv_bytes=shape.kv_bytes_per_token(itemsize) * context * batch,
        flop=batch * (2.0 * weights + 4.0 * shape.layers * shape.query_size * context),
    )


def _together(one: _Decode, other: _Decode) -> _Decode:
    """The same steps by the same weights, where those of both go through at once as long as both have some."""
    steps = max(one.steps, other.steps)
    kv_bytes, flop = ((one.steps * a + other.steps * b) / steps for a, b in zip(one[2:], other[2:], strict=True))
    return _Decode(steps, one.weight_bytes, kv_bytes, flop)
