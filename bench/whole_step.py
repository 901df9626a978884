"""A run's first step, taken again and again: as train.py takes it, in the reference's pattern, and by TRL."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import step_trace, trl_peer
from bench.rollout_trace import Trace
from bench.trl_peer import TrlPeer
from bench.turns import TurnGame, computed_apart
from zs_fast.config import RunConfig
from zs_fast.errors import ConfigError, PreflightError
from zs_fast.learn.algorithms import credit
from zs_fast.learn.batch import MicroBatch
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.models.load import LoadedModel
from zs_fast.ranks import pack_share, play, publisher
from zs_fast.run_models import critic_of, frozen_copy, reference_of
from zs_fast.search.curriculum import noise_probability
from zs_fast.search.data import QuestionOrder, load_questions
from zs_fast.search.simulator import SimulatorCodec
from zs_fast.setup import Arena, build_arena, load_policy, use_device
from zs_fast.system.memory import Memory, Phase
from zs_fast.system.plan_report import changed
from zs_fast.types import Group, Question, Role

OURS, REFERENCE = "ours", "reference_pattern"
TRL, TRL_GENERATE = "trl", "trl_generate"
GRADIENTS_AGREE_TO = 0.01
"""Of their norm: TRL adds 1e-4 to the deviation that advantages are divided by, and sums in another order."""
COUNTED = ("prefill_tokens", "reused_tokens", "decode_tokens", "steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A run's objects before its first step, which both ways take again and again."""

    config: RunConfig
    device: torch.device
    policy: LoadedModel
    roles: Roles
    arena: Arena
    questions: list[Question]
    noise: float
    start: dict[str, Tensor]
    """The trained weights as they were loaded."""
    speaker: SimulatorCodec | None = None
    """How the simulator is spoken with where its tokenizer is not."""

    @property
    def trained(self) -> dict[str, Tensor]:
        models = {"policy": self.policy.model} | ({"critic": self.roles.critic} if self.roles.critic else {})
        return {
            f"{role}.{name}": parameter
            for role, model in models.items()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def start_over(self) -> None:
        """Weights of the first step, and no keys and values of others."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.start[name])
                parameter.grad = None
        if self.arena.copy_policy is not None:
            self.arena.copy_policy()
        self.arena.engine.publish(0)


@dataclass(frozen=True, slots=True)
class Played:
    """What a way comes to."""

    groups: list[Group]
    grad_norm: float
    counts: Mapping[str, float] = field(default_factory=dict)
    """Of what the engine did not count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """One step, taken in one way."""

    timings: dict[str, float]
    """Of Memory.take."""
    groups: list[Group]
    counts: dict[str, float]
    """<role>/<count> of the engine, and score/tokens: those that went through a scoring pass."""
    grad_norm: float


Way = Callable[[Stage, Memory, Updater], Played]
"""Takes the step."""


def build(config: RunConfig, trace: Trace | None = None) -> Stage:
    """What `zs-fast train` builds for the first step of one process; with `trace`, at forced lengths.

    Raises ConfigError for a remote simulator.
    """
    simulator = config.simulator
    if simulator.kind == "openai" or simulator.process == "child" or config.train.sharding != "none":
        raise ConfigError(
            "zs-fast bench end_to_end takes recipes of one process with a simulator in it (or bm25); this one has "
            f"simulator.kind = {simulator.kind!r}, simulator.process = {simulator.process!r}, train.sharding = "
            f"{config.train.sharding!r}."
        )
    questions: Sequence[Question] = ()
    if trace is None:
        number = config.train.questions_per_step
        questions = QuestionOrder(load_questions(config.data), config.seed).batch(0, number)
    device = use_device(config)
    policy = load_policy(config, device)
    frozen = frozen_copy(config, policy, device)
    arena = build_arena(config, policy, device=device, base=frozen)
    roles = Roles(
        policy=policy,
        reference=reference_of(config, policy, frozen),
        critic=critic_of(config, policy, device),
        temperature=config.sampling.temperature,
    )
    stage = Stage(
        config=config,
        device=device,
        policy=policy,
        roles=roles,
        arena=arena,
        questions=list(questions),
        noise=noise_probability(1, config.curriculum, config.train.steps),
        start={},
    )
    stage = replace(stage, start={name: tensor.detach().clone() for name, tensor in stage.trained.items()})
    return stage if trace is None else step_trace.on_trace(stage, trace)


def ways_of(stage: Stage) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways to take the step, and why others are absent. Ours is taken once, so that TRL knows what to write."""
    ways: dict[str, Way] = {OURS: our_step, REFERENCE: reference_step}
    if reason := trl_peer.why_not(stage):
        return ways, {TRL: reason, TRL_GENERATE: reason}
    with trl_peer.recording(stage.arena.engine) as written:
        take_step(stage, our_step)
    for name in (TRL, TRL_GENERATE):
        peer = TrlPeer(stage=stage, written=written, searches_by_generate=name == TRL_GENERATE)
        ways[name] = partial(_by_trl, peer)
    return ways, {}


def _by_trl(peer: TrlPeer, stage: Stage, memory: Memory, updater: Updater) -> Played:
    return peer.step(memory)


def take_steps(stage: Stage, ways: Mapping[str, Way], *, rounds: int, cold: bool = False) -> dict[str, list[Taken]]:
    """All ways, once to warm up (unless `cold`) and then `rounds` times, in shuffled order. Raises PreflightError where
    they play other trajectories or have other gradients, though nothing should make them."""
    taken: dict[str, list[Taken]] = {name: [] for name in ways}
    order = random.Random(0)
    for round_number in range(1 if cold else 0, rounds + 1):
        for name in order.sample(list(ways), len(ways)):
            found = take_step(stage, ways[name])
            if round_number:
                taken[name].append(found)
                print(f"  round {round_number}, {name}: {step_seconds(found, stage):.2f} s", flush=True)
    played = {tuple(map(ids_of, one.groups)) for steps in taken.values() for one in steps}
    if len(played) > 1 and stage.device.type == "cpu" and stage.config.engine.batch_invariant is not False:
        raise PreflightError("bench: not timed: the ways played other trajectories, though all draws are the same.")
    norms = {name: steps[0].grad_norm for name, steps in taken.items()}
    if any(abs(norm - norms[OURS]) > GRADIENTS_AGREE_TO * abs(norms[OURS]) for norm in norms.values()):
        raise PreflightError(f"bench: not timed: the norms of the gradients differ between the ways: {norms}.")
    return taken


def ids_of(group: Group) -> tuple[Any, ...]:
    """What a group's trajectories are: every sampled and observed id."""
    return tuple(
        (trajectory.prompt_ids, tuple((turn.completion.token_ids, turn.observation_ids) for turn in trajectory.turns))
        for trajectory in group.trajectories
    )


def take_step(stage: Stage, way: Way) -> Taken:
    """The first step, from the weights that were loaded and a new optimizer."""
    config = stage.config
    stage.start_over()
    updater = Updater(
        stage.roles,
        config.train,
        config.algorithm,
        total_steps=config.train.steps,
        longest=config.game.max_turns * config.game.max_new_tokens,
        critic=config.critic,
    )
    memory = Memory(stage.device, engine=stage.arena.engine if config.engine.release_kv else None)
    before = _counts(stage)
    scored: list[int] = []

    def count(micro: MicroBatch) -> AbstractContextManager[None]:
        scored.append(micro.num_tokens)
        return nullcontext()

    for passes in stage.roles.scoring_passes().values():
        passes.watch = count
    played = way(stage, memory, updater)
    counts = {name: value - before[name] for name, value in _counts(stage).items()}
    counts |= {"score/tokens": float(sum(scored))} | dict(played.counts)
    return Taken(timings=memory.take(), groups=played.groups, counts=counts, grad_norm=played.grad_norm)


def our_step(stage: Stage, memory: Memory, updater: Updater) -> Played:
    """As train.py takes it."""
    with memory.phase(Phase.ROLLOUT):
        player = stage.arena.training_player
        groups = play(player, stage.questions, step=1, noise=stage.noise)
        player.pause()
    return Played(groups, _learn(stage, memory, updater, groups, updater.needs))


def reference_step(stage: Stage, memory: Memory, updater: Updater) -> Played:
    """The reference's pattern; its repeated scoring counts as such, whenever it happens. No prefix is shared."""
    apart = replace(stage, config=changed(stage.config, "train.share_prefixes", False))
    with computed_apart(stage.arena.engine):
        return _in_turns(apart, memory, updater)


def _in_turns(stage: Stage, memory: Memory, updater: Updater) -> Played:
    config = stage.config
    with memory.phase(Phase.ROLLOUT):
        game = TurnGame(
            stage.arena.engine,
            stage.arena.training_search,
            stage.arena.codec,
            stage.questions,
            game=config.game,
            sampling=config.sampling,
            group_size=config.train.group_size,
            run_seed=config.seed,
            step=1,
            noise_probability=stage.noise,
            retokenise=stage.speaker is None,  # a trace's contexts have no text
        )
    while game.live:
        with memory.phase(Phase.ROLLOUT):
            game.act()
        with memory.phase(Phase.SCORE):
            stage.roles.logprobs(Role.POLICY, pack_share(game.so_far(), config).to(stage.device))
        with memory.phase(Phase.ROLLOUT):
            game.search()
    groups = game.groups()
    return Played(groups, _learn(stage, memory, updater, groups, updater.needs | {"old_logprobs": True}))


def _learn(stage: Stage, memory: Memory, updater: Updater, groups: list[Group], needs: Mapping[str, bool]) -> float:
    """The norm of the gradient."""
    packed = pack_share(groups, stage.config)
    with memory.phase(Phase.SCORE):
        scored = score(packed, stage.roles, **needs)
    with memory.phase(Phase.UPDATE):
        stats = updater.update(credit(scored, stage.config.algorithm, kl_coefficient=updater.kl_coefficient))
    with memory.phase(Phase.SYNC):
        publisher(stage.config, stage.arena, stage.policy).publish(1)
    return stats.values.get("grad_norm", 0.0)


def _counts(stage: Stage) -> dict[str, float]:
    stats = stage.arena.engine.stats()
    return {f"{role}/{name}": float(getattr(one, name)) for role, one in stats.items() for name in COUNTED}


def phase_seconds(taken: Taken, phase: Phase, stage: Stage) -> float:
    """By the clock that counts on the device: processor time on a CPU."""
    clock = "cpu_seconds" if stage.device.type == "cpu" else "seconds"
    return taken.timings.get(f"{phase}/{clock}", 0.0)


def step_seconds(taken: Taken, stage: Stage) -> float:
    """Of all its phases."""
    return sum(phase_seconds(taken, phase, stage) for phase in Phase)
