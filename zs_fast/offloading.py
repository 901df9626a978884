"""What of a run leaves the device between the phases, and a line on each choice (system/memory.py moves it)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zs_fast.config import RunConfig
from zs_fast.errors import PreflightError
from zs_fast.learn.optimizer import Optimizer
from zs_fast.learn.sharding import own_piece
from zs_fast.learn.update import Updater
from zs_fast.rollout.engine import LocalEngine
from zs_fast.system.memory import OPTIMIZER_AWAY, SIMULATOR_AWAY, Offload
from zs_fast.system.offload import SMALLEST_BYTES, Copies, CudaCopies, Movable
from zs_fast.types import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class Offloading:
    """What Memory is given."""

    parts: tuple[Offload, ...] = ()
    copies: Copies | None = None
    choices: tuple[str, ...] = ()


def offloads(
    config: RunConfig,
    engine: LocalEngine,
    updater: Updater,
    device: torch.device,
    *,
    copies: Copies | None = None,
    smallest_bytes: int = SMALLEST_BYTES,
) -> Offloading:
    """What `simulator.offload_weights` and `train.offload_optimizer_state` ask for, where there is something to gain.

    `copies` are CUDA's by default. Raises PreflightError where vLLM's CUDA graphs hold the simulator's addresses.
    """
    asked = [
        name
        for name, is_asked in (
            ("simulator.offload_weights", config.simulator.offload_weights),
            ("train.offload_optimizer_state", config.train.offload_optimizer_state),
        )
        if is_asked
    ]
    if not asked:
        return Offloading()
    if copies is None and device.type != "cuda":
        because = "all tensors are in main memory already"
        return Offloading(choices=tuple(f"{name} moves nothing: {because}" for name in asked))
    captures = config.engine.kind == "vllm" and device.type == "cuda" and not config.engine.enforce_eager
    if config.simulator.offload_weights and captures:
        raise PreflightError(
            "simulator.offload_weights is true, but vLLM's CUDA graphs hold the addresses of the simulator's weights. "
            "Set engine.enforce_eager = true, or leave simulator.offload_weights at false."
        )
    copies = copies or CudaCopies(device)
    parts, choices = [], []
    if config.simulator.offload_weights:
        simulator = Movable(
            "the simulator's weights",
            lambda: engine.module(Role.SIMULATOR).parameters(),
            copies,
            kept=partial(_read_by_others, engine, updater),
            constant=True,
            smallest_bytes=smallest_bytes,
        )
        because = "" if simulator.num_bytes else "no other weights than those the policy or the reference reads"
        if engine.copies(Role.SIMULATOR):
            because = "vLLM samples from a copy (engine.weights), which engine.release_kv gives back"
        if not because:
            engine.before_use(Role.SIMULATOR, simulator.need)
            parts.append(Offload(simulator, SIMULATOR_AWAY))
        choices.append(_line("simulator.offload_weights", simulator, because))
    if config.train.offload_optimizer_state:
        largest = max(parameter.numel() for _, one in _optimizers(updater) for parameter in one.trained())
        if 4 * largest < smallest_bytes:
            choices.append("train.offload_optimizer_state moves nothing: what is trained are small tensors only")
        elif parts or config.engine.release_kv:
            for name, optimizer in _optimizers(updater):
                state = Movable(
                    f"the optimizer's state of the {name}",
                    optimizer.own_tensors,
                    copies,
                    kept=partial(_sampled_or_trained, engine, updater),
                    smallest_bytes=smallest_bytes,
                )
                optimizer.before_use = state.need
                parts.append(Offload(state, OPTIMIZER_AWAY))
            choices.append("train.offload_optimizer_state: in main memory during the rollout")
        else:
            choices.append(
                "train.offload_optimizer_state moves nothing: the update needs its room beside the keys and values "
                "in any case, unless engine.release_kv is true"
            )
    return Offloading(parts=tuple(parts), copies=copies if parts else None, choices=tuple(choices))


def _line(name: str, movable: Movable, because: str) -> str:
    if because:
        return f"{name} moves nothing: {because}"
    return f"{name}: {movable.num_bytes / 2**20:.1f} MiB, in main memory while the policy is scored and updated"


def _optimizers(updater: Updater) -> Iterator[tuple[str, Optimizer]]:
    yield "policy", updater.optimizer
    if updater.critic is not None:
        yield "critic", updater.critic.optimizer


def _sampled_or_trained(engine: LocalEngine, updater: Updater) -> Iterator[Tensor]:
    """What the policy is sampled with, and every parameter that is trained."""
    if not engine.copies(Role.POLICY):
        yield from engine.served(Role.POLICY).values()
    yield from map(own_piece, updater.roles.policy.model.parameters())
    if updater.roles.critic is not None:
        yield from map(own_piece, updater.roles.critic.parameters())


def _read_by_others(engine: LocalEngine, updater: Updater) -> Iterator[Tensor]:
    yield from _sampled_or_trained(engine, updater)
    if updater.roles.reference is not None:
        yield from map(own_piece, updater.roles.reference.model.parameters())
