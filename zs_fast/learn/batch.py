"""The tensor nouns of the learning step: PackedBatch -> ScoredBatch -> TrainBatch, and micro batches that view them.

Index n of every per-token column speaks of `targets[n]`: the token that follows `inputs[n]` in its sequence.
Dimensions: N packed tokens, M loss tokens, S sequences (trajectories), G groups.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from zs_fast.host import Prefixes, held_prefix, pack_segments
from zs_fast.types import StopReason

PER_SEQUENCE_COLUMNS = frozenset({"rewards", "group", "trainable"})


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrefixes:
    """Which tokens of a micro batch a pass computes where sequences begin alike: every prefix once.

    Sequences (p q a) and (p q b c): computed [0 1 2 5 6], rows [0 1 2 | 0 1 3 4], cu_seqlens (0, 3, 5).
    """

    computed: Tensor
    """[u] int64, rising: the tokens that are computed"""
    rows: Tensor
    """[n] int64, which computed token stands for each token"""
    cu_seqlens: tuple[int, ...]
    """Start of each sequence's computed tokens, then u. Each has one at least: its last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """A contiguous range of a packed batch's sequences, for one forward and backward pass. Its columns are views."""

    inputs: Tensor
    """[n] int64"""
    targets: Tensor
    """[n] int64"""
    positions: Tensor
    """[n] int64, counting from 0 in each sequence"""
    loss_index: Tensor
    """[m] int64, where in this micro batch the loss tokens are"""
    cu_seqlens: tuple[int, ...]
    """Start of each sequence that has tokens, then n: [0, ..., n]"""
    loss_cu_seqlens: tuple[int, ...]
    """Number of loss tokens before each of those sequences, then m: [0, ..., m]"""
    tokens: slice
    """Where these tokens are in the batch's per-token columns."""
    loss_tokens: slice
    """Where these loss tokens are among the batch's M loss tokens."""
    shared: SharedPrefixes | None = None
    """None where every token is computed."""

    @property
    def num_tokens(self) -> int:
        """Tokens that a pass computes: a prefix that sequences share counts once."""
        return self.cu_seqlens[-1] if self.shared is None else self.shared.cu_seqlens[-1]

    @property
    def num_loss_tokens(self) -> int:
        return len(range(self.loss_tokens.start, self.loss_tokens.stop))

    @property
    def loss_targets(self) -> Tensor:
        """[m] int64"""
        return self.targets[self.loss_index]

    def response_index(self) -> Tensor:
        """[r] int64: every token from each sequence's first loss token on, documents included."""
        if not self.num_loss_tokens:
            return self.loss_index
        starts = [int(self.loss_index[first]) for first in self.loss_cu_seqlens[:-1]]
        ranges = [torch.arange(start, end) for start, end in zip(starts, self.cu_seqlens[1:], strict=True)]
        return torch.cat(ranges).to(self.loss_index.device)

    def at_loss_tokens(self, column: Tensor) -> Tensor:
        """[m]: this micro batch's share of a per-token column [N] of the batch, at the loss tokens."""
        return column[self.tokens][self.loss_index]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTokens:
    """Sequences laid end to end, without padding.

    Sequences (p a) and (q b c), where the policy wrote a and c: inputs [p | q b], targets [a | b c],
    positions [0 | 0 1], loss_mask [1 | 0 1], loss_index [0 2], cu_seqlens (0, 1, 3), loss_offsets (0, 1, 2).
    """

    inputs: Tensor
    """[N] int64"""
    targets: Tensor
    """[N] int64"""
    positions: Tensor
    """[N] int64"""
    sequence: Tensor
    """[N] int64, which of the S sequences a token belongs to"""
    loss_mask: Tensor
    """[N] bool, True exactly where targets[n] was written by the policy and is trained on"""
    loss_index: Tensor
    """[M] int64, where loss_mask is True"""
    cu_seqlens: tuple[int, ...]
    """[S + 1] start of each sequence, then N. A sequence without loss tokens has no tokens at all."""
    loss_offsets: tuple[int, ...]
    """[S + 1] number of loss tokens before each sequence, then M"""
    prefixes: tuple[Prefixes, ...] = ()
    """[S] which earlier sequences each begins alike with (`host.shared_prefixes`); empty where none is to be shared"""

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def num_loss_tokens(self) -> int:
        return self.loss_offsets[-1]

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its per-token columns on `device`. Per-sequence columns stay on the CPU."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in values.items()
            if isinstance(value, Tensor) and name not in PER_SEQUENCE_COLUMNS
        }
        return replace(self, **moved)

    def response_mask(self) -> Tensor:
        """[N] bool: every token from each sequence's first loss token on, documents included."""
        seen = self.loss_mask.long().cumsum(0)
        before = torch.tensor(self.loss_offsets[:-1], device=seen.device)[self.sequence]
        return seen > before

    def view(self, first: int, last: int) -> MicroBatch:
        """Sequences first .. last - 1 as a micro batch."""
        start, stop = self.cu_seqlens[first], self.cu_seqlens[last]
        loss_start, loss_stop = self.loss_offsets[first], self.loss_offsets[last]
        bounds = self.cu_seqlens[first : last + 1]
        loss_bounds = self.loss_offsets[first : last + 1]
        return MicroBatch(
            inputs=self.inputs[start:stop],
            targets=self.targets[start:stop],
            positions=self.positions[start:stop],
            loss_index=self.loss_index[loss_start:loss_stop] - start,
            cu_seqlens=tuple(dict.fromkeys(bound - start for bound in bounds)),
            loss_cu_seqlens=tuple(dict.fromkeys(bound - loss_start for bound in loss_bounds)),
            tokens=slice(start, stop),
            loss_tokens=slice(loss_start, loss_stop),
            shared=self._shared(first, last),
        )

    def _shared(self, first: int, last: int) -> SharedPrefixes | None:
        """What sequences first .. last - 1 have in common; None for nothing."""
        held = [held_prefix(pairs, first) for pairs in self.prefixes[first:last]]
        if not any(length for _, length in held):
            return None
        start = self.cu_seqlens[first]
        rows: list[Tensor] = []
        computed: list[Tensor] = []
        bounds = [0]
        for number, (source, length) in enumerate(held, start=first):
            begin, end = self.cu_seqlens[number] - start, self.cu_seqlens[number + 1] - start
            own = torch.arange(begin + length, end)
            own_rows = torch.arange(bounds[-1], bounds[-1] + len(own))
            rows.append(torch.cat([rows[source - first][:length], own_rows]) if length else own_rows)
            computed.append(own)
            if len(own):
                bounds.append(bounds[-1] + len(own))
        device = self.inputs.device
        return SharedPrefixes(
            computed=torch.cat(computed).to(device, non_blocking=True),
            rows=torch.cat(rows).to(device, non_blocking=True),
            cu_seqlens=tuple(bounds),
        )

    def micro_batches(self, token_budget: int, first: int = 0, last: int | None = None) -> Iterator[MicroBatch]:
        """Sequences first .. last - 1 (all by default) in order, cut into views that compute at most `token_budget`.

        As few views as the budget allows, as even as that allows. A single sequence longer than the budget is a micro
        batch of its own. Views without loss tokens are left out: they would add nothing to a loss.
        """
        last = self.num_sequences if last is None else last
        lengths = [stop - start for start, stop in pairwise(self.cu_seqlens[first : last + 1])]
        prefixes = [
            [(source - first, length) for source, length in pairs if source >= first]
            for pairs in self.prefixes[first:last]
        ]
        for begin, end in pairwise(pack_segments(lengths, token_budget, prefixes)):
            yield from self._with_loss(first + begin, first + end)

    def _with_loss(self, first: int, last: int) -> Iterator[MicroBatch]:
        if self.loss_offsets[last] > self.loss_offsets[first]:
            yield self.view(first, last)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch(PackedTokens):
    """One step's trajectories, packed, with what is known of each sequence. Made by `pack`, once per step."""

    rollout_logprobs: Tensor
    """[N] float32, the sampler's, at loss tokens; NaN where the engine gave none, 0 elsewhere"""
    rewards: Tensor
    """[S] float64, as the game gave them"""
    group: Tensor
    """[S] int64, which of the G groups; counted by occurrence in the step, whatever ids the questions have"""
    trainable: Tensor
    """[S] bool, False for a trajectory that is left out of the loss and of its group's statistics"""
    group_offsets: tuple[int, ...]
    """[G + 1] first sequence of each group, then S"""
    stop_reasons: tuple[StopReason, ...]
    """[S]"""
    token_budget: int
    """Most tokens in one micro batch"""
    places: tuple[int, ...]
    """[G] where each group stands among the step's groups, which several processes share; rising"""
    num_places: int
    """Groups in the step"""

    @property
    def num_groups(self) -> int:
        return len(self.group_offsets) - 1

    def mini_batches(self, number: int) -> Iterator[tuple[int, int]]:
        """(first, last) sequence of each of `number` parts of the step, none of which splits a group.

        The step's groups are split evenly, not this process's: a part holds the same groups however many share it.
        """
        for part in range(number):
            first, last = (bound * self.num_places // number for bound in (part, part + 1))
            yield (
                self.group_offsets[bisect_left(self.places, first)],
                self.group_offsets[bisect_left(self.places, last)],
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBatch:
    """A packed batch with log-probabilities from frozen weights, on the policy's device. Made by `score`."""

    packed: PackedBatch
    old_logprobs: Tensor | None
    """[N] float32 at loss tokens, 0 elsewhere: the policy's before this step's first update. None when the step makes
    one update only: the policy's own log-probabilities in that update are the old ones, and every ratio is 1."""
    ref_logprobs: Tensor | None
    """[N] float32 at loss tokens, 0 elsewhere: the reference's. None without a KL term."""
    old_values: Tensor | None = None
    """[N] float32 at loss tokens, 0 elsewhere: the critic's before this step's first update. None without a critic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """A scored batch with credit for each token. Made by `credit`."""

    scored: ScoredBatch
    advantages: Tensor
    """[N] float32, 0 outside the loss tokens"""
    sequence_advantages: Tensor
    """[S] float32, on the CPU: mean over a trajectory's loss tokens, 0 for one without"""
    dead_groups: Tensor
    """[G] bool, on the CPU; True where a group's rewards give no gradient"""
    kl_coefficient: float
    """Weight of the KL to the reference in this step"""
    returns: Tensor | None = None
    """[N] float32, what the critic's values are trained to; None without a critic"""
