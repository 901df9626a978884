"""How much memory a run will take, by phase and by role, from sizes alone: no model is loaded, torch is not imported.

What is counted, and where the numbers come from, is told in docs/plan.md. All functions here are pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from zs_fast.config import RunConfig
from zs_fast.errors import PreflightError
from zs_fast.host import held_prefix, pack_segments
from zs_fast.system.shapes import Shape, adapter_rank_at, shape_of
from zs_fast.types import Role

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
POLICY_PROMPT_TOKENS = 192
"""The game's prompt in a chat template, with a question: 130 to 200 by tokenizer."""
SIMULATOR_PROMPT_TOKENS = {"fine_tuned": 128, "prompted": 352}
"""The simulator's prompt by template, with a query."""
SLOT_TOKENS, SLOT_STEP = 256, 64
"""What a slot of the embedded engine holds at first, and what its size is a multiple of (rollout/kv_slots.py)."""
BLOCK_TOKENS = 16
"""Tokens of a block of vLLM's cache on a GPU."""
HEAD_WORKSPACE_BYTES = {"cpu": 320 << 20, "cuda": 5 << 29}
HEAD_ROWS = {"cpu": (1024, 512), "cuda": (8192, 8192)}
"""Of the fused loss: most memory of a chunk's logits, and most rows of a single one and of each of several."""
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0, "adamw_offload": 8.0}
"""Of the optimizer's moments, for each trained number (learn/optimizer.py)."""
PACKED_BYTES = 0.5 + 4 / 64
"""Of a weight in 4 bits with its share of a block's scale."""
SAMPLER_BYTES = 22
"""Of temporaries for each logit that is sampled from."""
CPU_PROCESS_BYTES = 64 << 20
"""Of tokenizers, questions and what the allocator keeps between small blocks: measured on SmolLM2-135M's rollout."""
CPU_HEAP_SHARE = 0.2
"""Of the update's activations, what glibc's allocator (before 2.38) leaves idle: it looks for 64 bytes more than an
aligned block has, so that a tensor doesn't fit into the place of a freed one as large. Measured: 14 to 28 %."""
CUDA_CONTEXT_BYTES = 640 << 20
"""Of the driver, the libraries and their workspaces. Assumed; not measured."""
VLLM_BYTES = 1 << 30
"""Of vLLM's own buffers and CUDA graphs. Assumed; not measured."""
SPARE_SHARE = 0.04
"""Of a card, lost between the allocator's blocks. Assumed; not measured."""


class PlanPhase(StrEnum):
    """When memory is held: `load` before the first step, then the phases of a step that compute."""

    LOAD = "load"
    ROLLOUT = "rollout"
    SCORE = "score"
    UPDATE = "update"


class Part(StrEnum):
    """What memory is held for."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    MASTERS = "masters"
    MOMENTS = "moments"
    KV_CACHE = "kv cache"
    ACTIVATIONS = "activations"
    HEAD = "head"
    OVERHEAD = "overhead"


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """Memory of one role for one purpose."""

    role: str
    part: Part
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseUse:
    """All that is held at the fullest moment of a phase."""

    phase: PlanPhase
    uses: tuple[Use, ...]

    @property
    def total_bytes(self) -> int:
        return sum(use.num_bytes for use in self.uses)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """The memory of a run: bytes above a process that has imported everything (CPU), or all of a card's."""

    phases: tuple[PhaseUse, ...]

    @property
    def fullest(self) -> PhaseUse:
        return max(self.phases, key=lambda use: use.total_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.fullest.total_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of a trajectory and of a simulator's prompt and answer, which a plan is made for."""

    trajectory: int
    written: int
    """Of the trajectory's, by the policy: loss tokens."""
    simulation: int
    alike: bool = False
    """All are exactly as long; otherwise shorter ones may fill a micro batch up to its budget."""
    shared: int = 0
    """Of the trajectory's: what its group begins with, which passes may compute once."""


def longest(config: RunConfig) -> Lengths:
    """Every turn and every document as long as the game allows."""
    game = config.game
    written = game.max_turns * game.max_new_tokens
    trajectory = POLICY_PROMPT_TOKENS + written + (game.max_turns - 1) * game.max_observation_tokens
    trajectory = min(trajectory, game.max_context_tokens)
    asked = SIMULATOR_PROMPT_TOKENS[config.simulator.template] + config.simulator.max_new_tokens
    return Lengths(
        trajectory=trajectory,
        written=min(written, trajectory),
        shared=min(POLICY_PROMPT_TOKENS, trajectory - 1),
        simulation=min(asked, game.max_context_tokens + config.simulator.max_new_tokens),
    )


def shortest(config: RunConfig) -> Lengths:
    """Nothing but prompts: what even the most taciturn policy needs."""
    trajectory = min(POLICY_PROMPT_TOKENS * 2 // 3, config.game.max_context_tokens)
    return Lengths(trajectory=trajectory, written=1, simulation=1, shared=trajectory - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """A model that the run holds. `copies`: 0 where its weights are another role's."""

    role: str
    shape: Shape
    copies: int
    rank: int = 0
    """Of its adapter; 0 for none."""
    trained: bool = False
    has_head: bool = True


def plan_memory(config: RunConfig, *, is_cuda: bool = False, lengths: Lengths | None = None) -> MemoryPlan:
    """The memory of `zs-fast train` for this recipe, in one process, with a batch of trajectories of these lengths (the
    longest by default). Raises PreflightError for a model whose sizes are unknown, and for weights in pieces.
    """
    if config.train.sharding != "none":
        raise PreflightError(
            f"train.sharding is {config.train.sharding!r}, but a plan is made for one process that holds all its "
            "weights. Leave train.sharding out to plan that."
        )
    lengths = lengths or longest(config)
    models = _models(config)
    kept = [*_states(config, models, is_cuda=is_cuda)]
    playing, learning = _after_offloads(config, kept, is_cuda=is_cuda)
    kv = [*_kv_caches(config, models, lengths)]
    kv_beside_update = [] if config.engine.release_kv else kv
    overhead = [*_overhead(config, is_cuda=is_cuda)]
    phases = [
        (PlanPhase.ROLLOUT, [*playing, *kv, *_sampling(config, models, lengths, kv)]),
        (PlanPhase.UPDATE, [*learning, *kv_beside_update, *_update(config, models, lengths, is_cuda=is_cuda)]),
    ]
    if config.algorithm.kl_coefficient or config.algorithm.name == "ppo":
        phases.insert(1, (PlanPhase.SCORE, [*learning, *kv_beside_update, *_scoring(config, models, lengths, is_cuda)]))
    if not is_cuda:
        phases.insert(0, (PlanPhase.LOAD, [*_loading(config, models)]))
    return MemoryPlan(phases=tuple(PhaseUse(phase=phase, uses=(*uses, *overhead)) for phase, uses in phases))


def policy_rank(config: RunConfig) -> int:
    """Rank of the adapter that is trained; 0 where all weights are."""
    return config.model.lora_rank or adapter_rank_at(config.model.path)


def _models(config: RunConfig) -> list[_Model]:
    """What the run holds, as train.py and setup.py build it."""
    policy, rank = shape_of(config.model.path), policy_rank(config)
    held = [_Model(role=Role.POLICY, shape=policy, copies=1, rank=rank, trained=True)]
    frozen_copy = bool(config.algorithm.kl_coefficient) and not rank
    if frozen_copy:
        held.append(_Model(role=Role.REFERENCE, shape=policy, copies=1))
    if config.simulator.kind == "model":
        held.append(_Model(role=Role.SIMULATOR, shape=shape_of(config.simulator.path), copies=1))
    elif config.simulator.kind == "policy":
        shared = frozen_copy or rank
        own_rank = adapter_rank_at(config.simulator.adapter) if config.simulator.adapter else 0
        held.append(_Model(role=Role.SIMULATOR, shape=policy, copies=0 if shared else 1, rank=own_rank))
    if config.algorithm.name == "ppo":
        own = config.critic.lora_rank
        if own is None:
            own = 0 if config.critic.path else rank
        shape = shape_of(config.critic.path) if config.critic.path and not own else policy
        held.append(
            _Model(role=Role.CRITIC, shape=shape, copies=0 if own else 1, rank=own, trained=True, has_head=False)
        )
    return held


def _trained_parameters(config: RunConfig, model: _Model) -> int:
    if model.rank:
        return model.shape.adapter_parameters(model.rank, config.model.lora_targets)
    return model.shape.parameters - (0 if model.has_head or model.shape.tied else model.shape.head_parameters)


def _states(config: RunConfig, models: list[_Model], *, is_cuda: bool) -> Iterator[Use]:
    """Weights, and what the optimizer keeps from step to step."""
    itemsize = ITEM_BYTES[config.model.dtype]
    kind = config.train.optimizer
    elsewhere = is_cuda and kind == "adamw_offload"  # in main memory, which is not the card's
    for model in models:
        adapter = model.shape.adapter_parameters(model.rank, config.model.lora_targets) if model.rank else 0
        base = model.copies * model.shape.parameters * itemsize
        if model.role == Role.POLICY and config.model.quantization == "nf4":
            base -= int(model.shape.linear_parameters * (itemsize - PACKED_BYTES))
        yield Use(role=model.role, part=Part.WEIGHTS, num_bytes=base + adapter * itemsize)
        if not model.trained or elsewhere:
            continue
        count = _trained_parameters(config, model)
        if itemsize < 4 or kind == "adamw_offload":
            yield Use(role=model.role, part=Part.MASTERS, num_bytes=4 * count)
        yield Use(role=model.role, part=Part.MOMENTS, num_bytes=int(MOMENT_BYTES[kind] * count))


def _after_offloads(config: RunConfig, kept: list[Use], *, is_cuda: bool) -> tuple[list[Use], list[Use]]:
    """What of it is on a card in the rollout, and what in the other phases (system/memory.py). Weights that roles share
    count as the policy's, and stay."""
    moves_simulator = is_cuda and config.simulator.offload_weights
    moves_state = is_cuda and config.train.offload_optimizer_state and (config.engine.release_kv or moves_simulator)
    playing = [use for use in kept if not (moves_state and use.part in (Part.MASTERS, Part.MOMENTS))]
    return playing, [use for use in kept if not (moves_simulator and use.role == Role.SIMULATOR)]


def _kv_caches(config: RunConfig, models: list[_Model], lengths: Lengths) -> Iterator[Use]:
    engine, itemsize = config.engine, ITEM_BYTES[config.model.dtype]
    samplers = [model for model in models if model.role in (Role.POLICY, Role.SIMULATOR)]
    limits = {
        Role.POLICY: (lengths.trajectory, config.game.max_context_tokens),
        Role.SIMULATOR: (lengths.simulation, config.game.max_context_tokens + config.simulator.max_new_tokens),
    }
    for model in samplers:
        used, limit = limits[Role(model.role)]
        per_token = model.shape.kv_bytes_per_token(itemsize)
        if engine.kind == "transformers":
            tokens = (engine.slots + 1) * slot_capacity(used, limit) if used > 1 else 0
        elif model.role == Role.SIMULATOR and models[0].rank and not model.copies:
            continue  # vLLM serves all roles on one base in one batch, from one cache
        else:
            limit = max(limits[Role(one.role)][1] for one in samplers if one is model or not one.copies)
            tokens = (engine.slots * -(-(limit + 1) // BLOCK_TOKENS) + 1) * BLOCK_TOKENS
            tokens = int(engine.kv_cache_gib * 2**30) // per_token or tokens
        yield Use(role=model.role, part=Part.KV_CACHE, num_bytes=tokens * per_token)


def slot_capacity(used: int, limit: int) -> int:
    """Tokens for which each slot of the embedded engine has room once a sequence of `used` was in one."""
    most = -(-limit // SLOT_STEP) * SLOT_STEP
    capacity = min(most, SLOT_TOKENS)
    while capacity < min(used, most):
        capacity = min(2 * capacity, most)
    return capacity


def _sampling(config: RunConfig, models: list[_Model], lengths: Lengths, kv: list[Use]) -> Iterator[Use]:
    """A step of the embedded engine that prefills every slot, its logits, and slots that grow."""
    if config.engine.kind != "transformers":
        return
    itemsize = ITEM_BYTES[config.model.dtype]
    prompt = min(POLICY_PROMPT_TOKENS, lengths.trajectory)
    caches = {use.role: use.num_bytes for use in kv}
    for model in models:
        if model.role == Role.POLICY:
            running = min(config.engine.slots, config.train.questions_per_step * config.train.group_size)
            passing = _passing_elements(model.shape) * itemsize * running * prompt
            logits = SAMPLER_BYTES * running * model.shape.vocabulary
            growth = caches[Role.POLICY] // 4 if lengths.trajectory > SLOT_TOKENS else 0
            yield Use(role=model.role, part=Part.ACTIVATIONS, num_bytes=max(passing, logits, growth))


def _passing_elements(shape: Shape) -> int:
    """Numbers per token that a layer holds at once in a pass without gradients."""
    return 3 * shape.hidden + max(3 * shape.intermediate, 3 * shape.query_size + 2 * shape.kv_size)


class MicroBatchSize(NamedTuple):
    """Tokens of the largest micro batch of a mini batch."""

    computed: int
    packed: int
    """Those whose keys and values each trajectory holds for itself: a prefix that is shared counts for each."""
    loss: int
    is_only: bool
    """It is the mini batch's only one."""


def largest_micro_batch(config: RunConfig, lengths: Lengths) -> MicroBatchSize:
    """The budget, where a mini batch has that many to compute and one trajectory no more. Trajectories that are all
    alike are cut into as few as the budget allows, as evenly as that."""
    size, budget = config.train.group_size, config.train.token_budget
    trajectories = -(-config.train.questions_per_step // config.train.mini_batches) * size
    shared = lengths.shared if config.train.share_prefixes else 0
    if lengths.alike:
        prefixes = [[(number - 1, shared)] if shared and number % size else [] for number in range(trajectories)]
        bounds = pack_segments([lengths.trajectory] * trajectories, budget, prefixes)
        computed, number = max(
            (sum(lengths.trajectory - held_prefix(prefixes[one], first)[1] for one in range(first, last)), last - first)
            for first, last in pairwise(bounds)
        )
        return MicroBatchSize(computed, number * lengths.trajectory, number * lengths.written, len(bounds) == 2)
    own = lengths.trajectory - shared * (size - 1) / size  # of a group's trajectories, on average
    everything = math.ceil(trajectories * own)
    computed = min(max(budget, lengths.trajectory), everything)
    number_of_them = computed / own
    return MicroBatchSize(
        computed=computed,
        packed=math.ceil(number_of_them * lengths.trajectory),
        loss=max(1, math.floor(number_of_them * lengths.written)),
        is_only=budget >= everything,
    )


def head_rows(rows: int, vocabulary: int, itemsize: int, *, is_cuda: bool) -> int:
    """Rows of logits that the fused loss has in memory at once."""
    kind = "cuda" if is_cuda else "cpu"
    single, several = HEAD_ROWS[kind]
    most = max(1, min(single, HEAD_WORKSPACE_BYTES[kind] // (vocabulary * itemsize)))
    return rows if rows <= most else min(most, several)


def _scoring(config: RunConfig, models: list[_Model], lengths: Lengths, is_cuda: bool) -> Iterator[Use]:
    micro = largest_micro_batch(config, lengths)
    itemsize = ITEM_BYTES[config.model.dtype]
    policy = models[0].shape
    copies = 2 * policy.kv_size * (micro.packed if micro.packed > micro.computed else 0)
    rows = head_rows(micro.loss, policy.vocabulary, itemsize, is_cuda=is_cuda)
    yield Use(
        role=Role.REFERENCE,
        part=Part.ACTIVATIONS,
        num_bytes=(_passing_elements(policy) * micro.computed + copies) * itemsize,
    )
    yield Use(role=Role.REFERENCE, part=Part.HEAD, num_bytes=rows * policy.vocabulary * itemsize)


def layer_elements(shape: Shape, itemsize: int, *, rank: int, targets: int) -> int:
    """Numbers per token that one layer keeps for its backward pass.

    Counted from the tensors that autograd saves (Llama, Qwen2 and Qwen3 in transformers 5.19, our packed attention):
    inputs of each product, rotated queries and keys, values, the attention's output before and after the pieces are
    joined, four of the MLP's width; the norms' inputs, which narrow types keep in float32 too. With an adapter the
    base's products keep no inputs where the adapter keeps them already, and each adapter keeps `rank` numbers.
    """
    hidden = 6 if itemsize == 4 else 8
    heads = ((2 if itemsize == 4 else 3) - (1 if rank else 0)) * shape.head_norms
    return (
        4 * shape.intermediate
        + (2 + heads) * shape.kv_size
        + (3 + heads) * shape.query_size
        + (hidden - (2 if rank else 0)) * shape.hidden
        + rank * targets
    )


def _update(config: RunConfig, models: list[_Model], lengths: Lengths, *, is_cuda: bool) -> Iterator[Use]:
    """The fullest moment of a mini batch's last micro batch: at its head, or at the end of its backward pass."""
    micro = largest_micro_batch(config, lengths)
    loss_tokens = micro.loss
    itemsize = ITEM_BYTES[config.model.dtype]
    trained = [model for model in models if model.trained]
    options: list[list[Use]] = []
    for model in trained:
        shape = model.shape
        per_token = layer_elements(shape, itemsize, rank=model.rank, targets=len(config.model.lora_targets)) * itemsize
        # Keys and values are kept as each trajectory has them.
        per_layer = micro.computed * per_token + 2 * shape.kv_size * itemsize * (micro.packed - micro.computed)
        layers = per_layer * shape.layers
        if config.train.gradient_checkpointing:
            inputs = 0 if is_cuda and config.train.offload_activations else shape.layers * shape.hidden * itemsize
            layers = micro.computed * inputs + per_layer
        activations = layers + micro.computed * 3 * shape.hidden * itemsize
        rows = head_rows(loss_tokens, shape.vocabulary, itemsize, is_cuda=is_cuda)
        head = rows * shape.vocabulary * itemsize + 2 * loss_tokens * shape.hidden * itemsize
        if not model.has_head:
            head = 0
        elif not model.rank:
            head += shape.head_parameters * (itemsize if itemsize == 4 or not is_cuda else 4)
        gradients = 4 * _trained_parameters(config, model)
        at_head = [
            Use(role=model.role, part=Part.ACTIVATIONS, num_bytes=activations),
            Use(role=model.role, part=Part.HEAD, num_bytes=head),
        ]
        if not (is_cuda and micro.is_only):
            at_head.append(Use(role=model.role, part=Part.GRADIENTS, num_bytes=gradients))
        at_end = [
            Use(role=model.role, part=Part.ACTIVATIONS, num_bytes=per_layer),
            Use(role=model.role, part=Part.GRADIENTS, num_bytes=gradients),
        ]
        options += [at_head, at_end]
    fullest = max(options, key=lambda uses: sum(use.num_bytes for use in uses))
    yield from fullest
    if not is_cuda:
        idle = int(CPU_HEAP_SHARE * fullest[0].num_bytes)
        yield Use(role=fullest[0].role, part=Part.OVERHEAD, num_bytes=idle)


def _loading(config: RunConfig, models: list[_Model]) -> Iterator[Use]:
    """The last model's loading, with the ones before it in place. Files that are unpacked are held twice."""
    itemsize = ITEM_BYTES[config.model.dtype]
    loaded = [model for model in models if model.copies]
    for model in loaded:
        yield Use(role=model.role, part=Part.WEIGHTS, num_bytes=model.shape.parameters * itemsize)
    last = loaded[-1]
    if last.shape.packed_file:
        yield Use(role=last.role, part=Part.OVERHEAD, num_bytes=last.shape.parameters * 4)


def _overhead(config: RunConfig, *, is_cuda: bool) -> Iterator[Use]:
    yield Use(role="process", part=Part.OVERHEAD, num_bytes=CUDA_CONTEXT_BYTES if is_cuda else CPU_PROCESS_BYTES)
    if is_cuda and config.engine.kind == "vllm":
        simulator = config.simulator.kind
        engines = 1 + (simulator == "model" or (simulator == "policy" and not policy_rank(config)))
        yield Use(role="process", part=Part.OVERHEAD, num_bytes=engines * VLLM_BYTES)
