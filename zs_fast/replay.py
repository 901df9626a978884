"""What a step's rollout gave, played or found again in the run's journal after an interruption."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zs_fast import __version__
from zs_fast.config import RunConfig
from zs_fast.rollout.journal import NullJournal, StepJournal
from zs_fast.rollout.play import Player
from zs_fast.system.distributed import rank
from zs_fast.system.exchange import groups_from_json, groups_to_json
from zs_fast.system.journal import RunJournal
from zs_fast.types import Group

CHANGE_NO_REPLY = frozenset({"name", "output", "log"})
CHANGE_NO_REPLY_OF_TRAIN = frozenset(
    {"save_every", "keep_checkpoints", "eval_every", "rank_timeout_s"}
    | {"max_failed_saves", "max_nonfinite_steps", "phase_timeout_s"}
)
"""Config keys that no reply depends on: a journal stays valid when they change."""


class Played(NamedTuple):
    """What a step's rollout gave."""

    groups: list[Group]
    chosen: list[Group]
    """Those to learn from: `questions_per_step`."""
    batches_played: int
    """Batches of questions played in the run."""
    carried: list[dict[str, Any]]
    """Groups of coming steps that were begun (`Player.carried`)."""


@dataclass(frozen=True, slots=True)
class Journalled:
    """The journal of a run's rollouts and evaluations."""

    journal: StepJournal
    keeps_outcomes: bool
    """With trajectories begun early, the replies alone don't tell how far each had come when its step ended."""

    @contextmanager
    def rollout(self, step: int, player: Player) -> Iterator[Played | None]:
        """The block plays the step's rollout; it gets what the rollout came to, where it had ended already."""
        with self._scope(f"rollout_{step}", player):
            kept = self.journal.outcome()
            yield None if kept is None else _from_kept(kept, player)

    @contextmanager
    def evaluation(self, step: int, name: str, player: Player) -> Iterator[None]:
        """The block plays the evaluation of this name after `step` finished steps."""
        with self._scope(f"evaluation_{step}_{name}", player):
            yield

    def forget_all(self) -> None:
        """For a start over: no earlier replies are used."""
        self.journal.forget(rollouts=sys.maxsize, evaluations=sys.maxsize)

    def keep(self, played: Played) -> None:
        """The open rollout came to this."""
        if not self.keeps_outcomes:
            return
        places = {id(group): place for place, group in enumerate(played.groups)}
        self.journal.keep_outcome(
            {
                "groups": groups_to_json(played.groups),
                "chosen": [places[id(group)] for group in played.chosen],
                "batches_played": played.batches_played,
                "carried": played.carried,
            }
        )

    @contextmanager
    def _scope(self, name: str, player: Player) -> Iterator[None]:
        with self.journal.scope(name):
            player.recall()
            yield


def _from_kept(kept: dict[str, Any], player: Player) -> Played:
    player.restore(kept["carried"])
    groups = groups_from_json(kept["groups"])
    return Played(groups, [groups[place] for place in kept["chosen"]], kept["batches_played"], kept["carried"])


def run_journal(config: RunConfig, output: Path, *, on_cpu: bool, warn: Callable[[str], None]) -> StepJournal:
    """The journal of this process of the run."""
    if not config.train.journal:
        return NullJournal()
    values = config.model_dump(mode="json")
    values = {key: value for key, value in values.items() if key not in CHANGE_NO_REPLY}
    values["train"] = {key: value for key, value in values["train"].items() if key not in CHANGE_NO_REPLY_OF_TRAIN}
    run = hashlib.sha256(json.dumps([__version__, values], sort_keys=True).encode()).hexdigest()
    # An engine of our own decides by its own pace what is begun early: only played again from the start does it decide
    # the same. A remote pace is never the same, but its replies may have been paid for.
    replays = not config.train.max_staleness or config.simulator.kind in ("openai", "retriever")
    invariant = on_cpu if config.engine.batch_invariant is None else config.engine.batch_invariant
    exact = invariant and config.engine.kind == "transformers"
    return RunJournal(output / "journal", run=run, rank=rank(), exact=exact, replays=replays, warn=warn)
