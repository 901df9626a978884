"""A whole step at forced lengths: for models that do not play the game by themselves, and for equal work in all ways.

`zs-fast bench end_to_end --trace NAME` plays the recipe's models over bench/traces/NAME.json: they compute and sample
as always, but each completion has the trace's length and is read as a search or an answer by its place
(rollout_trace.py). The simulator writes as many tokens as the policy then reads.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.rollout_trace import GROUP_SIZE, RUN_SEED, Trace, TraceEngine, load_trace, write_trace
from zs_fast.config import RunConfig
from zs_fast.errors import ConfigError
from zs_fast.rollout.play import Player
from zs_fast.search.simulator import SimulatedSearch
from zs_fast.types import Role, Trajectory

if TYPE_CHECKING:
    from bench.whole_step import Stage

FOLDER = Path(__file__).with_name("traces")
SHORT = "whole_step_16"
"""The trace that is made here; bench/traces/heavy_tailed_64.json is that of the rollout."""
ABOUT = (
    "16 trajectories of 1 or 2 searches. Actions: log-normal, median 24 tokens, sigma 0.6. Documents: log-normal, "
    "median 40 tokens, sigma 0.4. Both are cut to 8 .. 64 tokens. Made by bench.step_trace from the seed."
)


def overrides(trace: Trace) -> dict[str, list[str]]:
    """What a trace asks of a recipe: its questions, and room for its lengths."""
    actions = max(length for lengths in trace.trajectories for length in lengths[::2])
    documents = max(length for lengths in trace.trajectories for length in lengths[1::2])
    return {
        "seed": [str(RUN_SEED)],
        "train.questions_per_step": [str(len(trace.questions))],
        "train.group_size": [str(GROUP_SIZE)],
        "train.mini_batches": ["1"],
        "simulator.documents": ["1"],
        "simulator.max_new_tokens": [str(documents)],
        "game.max_turns": [str(max(len(lengths) // 2 + 1 for lengths in trace.trajectories))],
        "game.max_new_tokens": [str(actions)],
        "game.max_observation_tokens": [str(documents)],
        "game.max_context_tokens": [str(trace.prompt_tokens + max(map(sum, trace.trajectories)))],
        "game.reward": ["bench.step_trace:alternating"],
        "sampling.temperature": ["3.0"],  # a completion is known again by its ids: no two may be equal
        "simulator.temperature": ["3.0"],
    }


def make(seed: int = 0, trajectories: int = 16) -> Trace:
    draws = random.Random(seed)

    def cut(tokens: float) -> int:
        return max(8, min(64, round(tokens)))

    rows = []
    for _ in range(trajectories):
        lengths: list[int] = []
        for _ in range(draws.randint(1, 2)):
            lengths += [cut(24 * draws.lognormvariate(0.0, 0.6)), cut(40 * draws.lognormvariate(0.0, 0.4))]
        rows.append((*lengths, cut(24 * draws.lognormvariate(0.0, 0.6))))
    return Trace(about=ABOUT, seed=seed, prompt_tokens=96, simulator_prompt_tokens=96, trajectories=tuple(rows))


def read(name: str = SHORT, questions: int | None = None) -> Trace:
    """A committed trace by its name; of its questions the first ones. Raises ConfigError for one that is not there."""
    path = FOLDER / f"{name}.json"
    known = sorted(
        file.stem for file in FOLDER.glob("*.json") if "prompt_tokens" in json.loads(file.read_text(encoding="utf-8"))
    )
    if name not in known:
        raise ConfigError(f"There is no trace {name!r} in {FOLDER}; there are {', '.join(known)}.")
    trace = load_trace(path)
    if questions is not None and not 1 <= questions <= len(trace.questions):
        raise ConfigError(f"--questions {questions}: trace {name} has {len(trace.questions)}, and one is the least.")
    return replace(trace, trajectories=trace.trajectories[: None if questions is None else questions * GROUP_SIZE])


def alternating(trajectory: Trajectory) -> float:
    """A reward that teaches something: 0 or 1 by the sample's number."""
    return float(trajectory.sample % 2)


class TracedEngine(TraceEngine):
    """A TraceEngine that is an engine in all else, too."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def on_trace(stage: Stage, trace: Trace) -> Stage:
    """The stage's engine under the trace, and players of its lengths."""
    config: RunConfig = stage.config
    for role in (Role.POLICY, Role.SIMULATOR):
        stage.arena.engine.eos_ids(role).clear()  # type: ignore[attr-defined]  # no token that is sampled ends a text
    engine: Any = TracedEngine(stage.arena.engine, trace, steps=1)
    search = SimulatedSearch(engine, engine.simulator_codec, config.simulator, run_seed=RUN_SEED)
    player = Player(
        engine,
        search,
        engine.policy_codec,
        game=config.game,
        sampling=config.sampling,
        group_size=GROUP_SIZE,
        run_seed=RUN_SEED,
        max_failed_share=0.0,
    )
    arena = replace(
        stage.arena, engine=engine, codec=engine.policy_codec, training_player=player, training_search=search
    )
    return replace(stage, arena=arena, questions=trace.questions, speaker=engine.simulator_codec)


if __name__ == "__main__":
    write_trace(make(), FOLDER / f"{SHORT}.json")
