"""Trajectories or examples -> one packed batch. The only place that shifts inputs against targets.

Nothing is padded. A sequence is cut after its last loss token (what follows it can't change any loss), and one without
loss tokens takes no room at all, though it still counts as a sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from zs_fast.host import shared_prefixes
from zs_fast.learn.batch import PackedBatch, PackedTokens
from zs_fast.types import Group, StopReason, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSequence:
    """Token ids, and for each whether it is a loss token: written by the policy (or to be imitated) and trained on."""

    ids: Sequence[int]
    is_loss: Sequence[bool]


def pack_tokens(sequences: Iterable[TokenSequence], *, share_prefixes: bool = True) -> PackedTokens:
    """Sequences laid end to end on the CPU. A sequence's first token can't be a loss token: nothing precedes it.

    share_prefixes: let passes compute once what several sequences begin with.
    """
    inputs: list[int] = []
    targets: list[int] = []
    flags: list[bool] = []
    cu_seqlens, loss_offsets = [0], [0]
    for number, sequence in enumerate(sequences):
        ids, is_loss = list(sequence.ids), list(sequence.is_loss)
        if len(ids) != len(is_loss):
            raise ValueError(f"sequence {number} has {len(ids)} token ids but {len(is_loss)} loss flags; give one each")
        if is_loss and is_loss[0]:
            raise ValueError(f"sequence {number} starts with a loss token, which nothing predicts; give it a prompt")
        end = max((position for position, flag in enumerate(is_loss) if flag), default=0)
        inputs += ids[:end]
        targets += ids[1 : end + 1]
        flags += is_loss[1 : end + 1]
        cu_seqlens.append(len(inputs))
        loss_offsets.append(loss_offsets[-1] + sum(is_loss))
    prefixes = shared_prefixes([inputs[a:b] for a, b in pairwise(cu_seqlens)]) if share_prefixes else []
    lengths = torch.tensor(cu_seqlens).diff()
    starts = torch.tensor(cu_seqlens[:-1], dtype=torch.int64)
    loss_mask = torch.tensor(flags, dtype=torch.bool)
    return PackedTokens(
        inputs=torch.tensor(inputs, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        positions=torch.arange(len(inputs)) - starts.repeat_interleave(lengths),
        sequence=torch.arange(len(lengths)).repeat_interleave(lengths),
        loss_mask=loss_mask,
        loss_index=loss_mask.nonzero().squeeze(1),
        cu_seqlens=tuple(cu_seqlens),
        loss_offsets=tuple(loss_offsets),
        prefixes=tuple(prefixes),
    )


def token_sequence(trajectory: Trajectory, *, trainable: bool, mask_documents: bool = True) -> TokenSequence:
    """A trajectory's ids as sampled, flagged by who wrote them. No id is compared with anything: a sampled
    end-of-sequence or padding id is trained on like every other sampled token.

    mask_documents: False makes loss tokens of what the search returned, too.
    """
    ids, is_loss = list(trajectory.prompt_ids), [False] * len(trajectory.prompt_ids)
    for turn in trajectory.turns:
        ids += turn.completion.token_ids
        is_loss += [trainable] * len(turn.completion.token_ids)
        ids += turn.observation_ids
        is_loss += [trainable and not mask_documents] * len(turn.observation_ids)
    return TokenSequence(ids=ids, is_loss=is_loss)


def _sampler_logprobs(trajectory: Trajectory, *, mask_documents: bool) -> list[float]:
    """One number per loss token: NaN for a completion whose engine gave none, and for what nobody sampled."""
    values: list[float] = []
    for turn in trajectory.turns:
        completion = turn.completion
        if completion.logprobs and len(completion.logprobs) != len(completion.token_ids):
            raise ValueError(
                f"a completion of question {trajectory.question.id!r} has {len(completion.token_ids)} token ids but "
                f"{len(completion.logprobs)} log-probabilities; an engine gives one each, or none at all"
            )
        values += completion.logprobs or [float("nan")] * len(completion.token_ids)
        if not mask_documents:
            values += [float("nan")] * len(turn.observation_ids)
    return values


def pack(
    groups: Sequence[Group],
    *,
    token_budget: int,
    share_prefixes: bool = True,
    mask: Collection[StopReason | str] = (),
    mask_documents: bool = True,
    places: Sequence[int] | None = None,
    num_places: int | None = None,
) -> PackedBatch:
    """One step's groups, or this process's share of them, as a packed batch on the CPU, in their order.

    token_budget: most tokens that one micro batch computes; a longer trajectory is a micro batch of its own.
    share_prefixes: compute what trajectories begin with alike once (`train.share_prefixes`).
    mask: trajectories that ended so are not trainable (`algorithm.mask_stop_reasons`); neither are those whose
    `trainable` is False. mask_documents: False trains on the search's documents as if the policy had written them.
    places, num_places: where each group stands among how many of the step; by default these groups are all.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    trainable = [t.trainable and t.stop_reason not in mask for t in trajectories]
    sequences = [
        token_sequence(t, trainable=keep, mask_documents=mask_documents)
        for t, keep in zip(trajectories, trainable, strict=True)
    ]
    tokens = pack_tokens(sequences, share_prefixes=share_prefixes)
    group_offsets = [0]
    for group in groups:
        group_offsets.append(group_offsets[-1] + len(group.trajectories))
    sizes = torch.tensor(group_offsets).diff()

    sampled = [
        value
        for t, keep in zip(trajectories, trainable, strict=True)
        if keep
        for value in _sampler_logprobs(t, mask_documents=mask_documents)
    ]
    rollout_logprobs = torch.zeros(tokens.num_tokens)
    rollout_logprobs[tokens.loss_index] = torch.tensor(sampled, dtype=torch.float32)
    return PackedBatch(
        **_columns(tokens),
        cu_seqlens=tokens.cu_seqlens,
        loss_offsets=tokens.loss_offsets,
        prefixes=tokens.prefixes,
        rollout_logprobs=rollout_logprobs,
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float64),
        group=torch.arange(len(groups)).repeat_interleave(sizes),
        trainable=torch.tensor(trainable, dtype=torch.bool),
        group_offsets=tuple(group_offsets),
        stop_reasons=tuple(t.stop_reason for t in trajectories),
        token_budget=token_budget,
        places=tuple(range(len(groups)) if places is None else places),
        num_places=len(groups) if num_places is None else num_places,
    )


def _columns(tokens: PackedTokens) -> dict[str, Tensor]:
    names = ("inputs", "targets", "positions", "sequence", "loss_mask", "loss_index")
    return {name: getattr(tokens, name) for name in names}
