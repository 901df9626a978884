"""How the processes of a run share its work. With one process every function here does the plain thing.

Each rank plays its share of the questions with its own engine, then shows all others what it played: from there every
rank knows the whole step, so metrics, the choice of groups and the files are those of a single process. Draws are a
function of (run seed, step, question, ...), never of the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zs_fast.config import RunConfig
from zs_fast.errors import PreflightError
from zs_fast.learn.batch import PackedBatch
from zs_fast.learn.pack import pack
from zs_fast.learn.sharding import shard_model
from zs_fast.models.load import DTYPES, LoadedModel, load_model
from zs_fast.models.lora import adapter_rank
from zs_fast.rollout.play import OnGroup, Player, Progress, Refill
from zs_fast.setup import Arena
from zs_fast.system.checkpoint import CheckpointStore
from zs_fast.system.distributed import gather, is_main, rank, together, world_size
from zs_fast.system.exchange import groups_from_json, groups_to_json
from zs_fast.system.lock import check_writable, run_lock
from zs_fast.system.weights import WeightPublisher, check_held, copy_pieces
from zs_fast.types import Group, Question, Role


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank trains on."""

    groups: list[Group]
    places: list[int]
    """Where each stands among the step's groups; rising"""


def check_recipe(config: RunConfig) -> None:
    """Raise PreflightError for what several processes can't do."""
    if world_size() > 1 and config.engine.kind == "vllm":
        raise PreflightError(
            f"engine.kind = 'vllm' runs in one process, but torchrun started {world_size()}. Take "
            "engine.kind = 'transformers', or start one process."
        )
    if world_size() > 1 and config.simulator.process == "child":
        raise PreflightError(
            f"simulator.process is 'child', but torchrun started {world_size()} processes, each of which would start a "
            "server. Start one server yourself and take simulator.kind = 'openai', or start one process."
        )
    if world_size() > 1 and config.train.max_staleness:
        raise PreflightError(
            f"train.max_staleness is {config.train.max_staleness}, which runs in one process, but torchrun started "
            f"{world_size()}: what a rank begins early is not shared. Set it to 0, or start one process."
        )


def check_sharding(config: RunConfig) -> None:
    """Raise PreflightError for what can't be trained in pieces."""
    if config.train.sharding == "none":
        return
    if world_size() == 1:
        raise PreflightError(
            "train.sharding = 'fsdp2' cuts the weights over several processes, but there is one. Start more with "
            "`torchrun --nproc-per-node N -m zs_fast.cli train RECIPE`, or leave train.sharding at 'none'."
        )
    if config.model.lora_rank or config.critic.lora_rank:
        raise PreflightError(
            "train.sharding = 'fsdp2' is for training all weights: an adapter is a small part, on the base that each "
            "process holds to play with. Set model.lora_rank and critic.lora_rank to 0, or train.sharding to 'none'."
        )
    if config.train.optimizer == "adamw_8bit":
        raise PreflightError(
            "train.optimizer = 'adamw_8bit' keeps moments in blocks that fit no cut; with train.sharding = 'fsdp2' "
            "take 'adamw' or 'adamw_offload'."
        )


def trained_policy(config: RunConfig, served: LoadedModel, weights: str | Path, device: torch.device) -> LoadedModel:
    """The policy that the update trains: what the engine samples with itself, or the same weights, read from `weights`
    and in pieces."""
    if config.train.sharding == "none":
        return served
    if adapter_rank(served.model):
        raise PreflightError(
            f"model.path {config.model.path!r} is an adapter; train.sharding = 'fsdp2' is for training all weights. "
            "Merge the adapter into its base first, or leave train.sharding at 'none'."
        )
    loaded = load_model(weights, dtype=DTYPES[config.model.dtype])
    return replace(served, model=in_pieces(config, loaded.model, device))


def loading_device(config: RunConfig, device: torch.device) -> torch.device:
    """Where a model is read to that `in_pieces` takes next."""
    return device if config.train.sharding == "none" else torch.device("cpu")


def in_pieces(config: RunConfig, model: Any, device: torch.device, *, train: bool = True) -> Any:
    """`model` with its weights cut over all processes, where `train.sharding` asks for it."""
    if config.train.sharding != "none":
        shard_model(model, device, compute_dtype=DTYPES[config.model.dtype], train=train)
    return model


def publisher(config: RunConfig, arena: Arena, trained: LoadedModel) -> WeightPublisher:
    """How new weights come to the engine: it has them already, or gets a copy, of whole weights or of pieces."""
    served = partial(arena.engine.served, Role.POLICY)
    in_pieces = config.train.sharding != "none"
    if in_pieces:
        check_held(trained.model, served())
    copy = partial(copy_pieces, trained.model, served) if in_pieces else arena.copy_policy
    return WeightPublisher(arena.engine, trained=trained.model, served=served, copy=copy)


def hold_run_folder(output: Path, stack: ExitStack, store: CheckpointStore | None = None) -> None:
    """Lock the run folder on the main process, the only one that writes there, until `stack` closes."""
    with together():
        if is_main():
            check_writable(output)
            stack.enter_context(run_lock(output))
            if store is not None:
                store.clean_up()


def play(
    player: Player,
    questions: Sequence[Question],
    *,
    step: int,
    noise: float,
    on_progress: Progress | None = None,
    refill: Refill | None = None,
    on_group: OnGroup | None = None,
) -> list[Group]:
    """The groups of all questions, in their order; each rank plays every world_size-th question.

    `on_group` is told each group as it is finished; with several processes, on all of them, once all are.

    In a run of one process the first of them may have begun in an earlier step, by its `refill`. Raises what playing
    raises on any rank, on all of them.
    """
    own: list[Group] = []
    with together():
        share = questions[rank() :: world_size()]
        for question in share[player.num_groups :]:
            player.submit(question, step=step, noise_probability=noise)
        several = world_size() > 1
        own = player.collect(
            len(share),
            on_progress=on_progress,
            refill=refill,
            may_all_fail=several,
            on_group=None if several else on_group,
        )
    if world_size() == 1:
        return own
    shares = [groups_from_json(share) for share in gather(groups_to_json(own))]
    groups = [shares[number % world_size()][number // world_size()] for number in range(len(questions))]
    with together():
        if on_group is not None:
            for group in groups:
                on_group(group)
        player.check_failures(groups)
    return groups


def pack_share(groups: Sequence[Group], config: RunConfig) -> PackedBatch:
    """This rank's share of the step's groups, packed on the CPU."""
    own = own_share(groups, config.train.mini_batches, share_prefixes=config.train.share_prefixes)
    return pack(
        own.groups,
        token_budget=config.train.token_budget,
        share_prefixes=config.train.share_prefixes,
        mask=config.algorithm.mask_stop_reasons,
        mask_documents=config.algorithm.mask_documents,
        places=own.places,
        num_places=len(groups),
    )


def own_share(groups: Sequence[Group], mini_batches: int, *, share_prefixes: bool = True) -> Share:
    """The groups this rank trains on: whole ones, about as many tokens to compute as every other rank, in each mini
    batch."""
    if world_size() == 1:
        return Share(groups=list(groups), places=list(range(len(groups))))
    owners = balanced([_weight(group, share_prefixes=share_prefixes) for group in groups], mini_batches, world_size())
    places = [place for place, owner in enumerate(owners) if owner == rank()]
    return Share(groups=[groups[place] for place in places], places=places)


def balanced(weights: Sequence[int], mini_batches: int, num_ranks: int) -> list[int]:
    """Which rank each group goes to: in every mini batch the heaviest first, each to the rank with the least so far."""
    owners = [0] * len(weights)
    total = [0] * num_ranks
    for part in range(mini_batches):
        first, last = (bound * len(weights) // mini_batches for bound in (part, part + 1))
        load = [0] * num_ranks
        for place in sorted(range(first, last), key=lambda place: (-weights[place], place)):
            owner = min(range(num_ranks), key=lambda number: (load[number], total[number], number))
            owners[place] = owner
            load[owner] += weights[place]
            total[owner] += weights[place]
    return owners


def _weight(group: Group, *, share_prefixes: bool) -> int:
    """Tokens that the update computes, about: the prompt once, or for each. A group with none still has a place."""
    trained = [trajectory for trajectory in group.trajectories if trajectory.trainable]
    again = len(trained[0].prompt_ids) * (len(trained) - 1) if trained and share_prefixes else 0
    return 1 + sum(trajectory.num_tokens for trajectory in trained) - again
