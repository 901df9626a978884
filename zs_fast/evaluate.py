"""Judge a policy: the same play as in training, every question, greedy unless told otherwise, with intervals."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from zs_fast.config import RunConfig, write_config
from zs_fast.errors import ConfigError
from zs_fast.ranks import check_recipe, hold_run_folder, play
from zs_fast.rollout.play import Player, Progress
from zs_fast.search.data import QuestionOrder, load_questions
from zs_fast.setup import build_arena, load_policy, simulator_name, use_device
from zs_fast.system.console import make_screen
from zs_fast.system.distributed import is_main, process_group, together
from zs_fast.system.environment import write_environment
from zs_fast.system.files import FileOperations, replace_file
from zs_fast.system.metrics import rollout_row
from zs_fast.types import Question, Trajectory

BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result on one set of questions. Means are over all rows; `f1_low` and `f1_high` bound f1 at 95 %."""

    num_questions: int
    f1: float
    f1_low: float
    f1_high: float
    exact_match: float
    cover_match: float
    searches_per_question: float
    answered_share: float
    """Share of trajectories that ended on a complete answer."""
    f1_by_source: dict[str, float]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat numbers for the metrics file: `{prefix}/f1`, `{prefix}/f1/{source}`, ..."""
        values = asdict(self)
        by_source = values.pop("f1_by_source")
        return {f"{prefix}/{name}": float(value) for name, value in values.items()} | {
            f"{prefix}/f1/{source}": value for source, value in by_source.items()
        }

    def line(self, name: str) -> str:
        """The result in one line, for the screen."""
        return (
            f"{name}: F1 {self.f1:.3f} ({self.f1_low:.3f} to {self.f1_high:.3f}), "
            f"{self.searches_per_question:.2f} searches per question, {self.num_questions} questions"
        )


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """Evaluate the policy `model.path` against each search of `eval.search`; what `zs-fast eval` does.

    Returns the summary and writes it to `<output>/evaluation.json`, with every trajectory beside it in
    `trajectories_<search>.jsonl`. The default output is runs/<name>_eval.
    """
    if not config.eval.data:
        raise ConfigError(
            "eval.data is empty, so there are no questions to judge by. Give a file: --eval.data FILE, or "
            "--eval.data quickstart:heldout."
        )
    output = config.output or Path("runs") / f"{config.name}_eval"
    if (output / "checkpoints").exists():
        raise ConfigError(
            f"{output} holds a training run, whose config.toml an evaluation would replace. Choose another --output."
        )
    questions = evaluation_questions(config)
    with process_group(config.model.device, timeout_s=config.train.rank_timeout_s), ExitStack() as stack:
        check_recipe(config)
        hold_run_folder(output, stack)
        screen = stack.enter_context(closing(make_screen(0, config.name))) if is_main() else None
        with together():
            device = use_device(config)
            policy = load_policy(config, device)
            arena = build_arena(config, policy, device=device, training=False)
            stack.callback(arena.close)
        results: dict[str, Any] = {}
        for name, player in arena.evaluation_players.items():
            progress = partial(screen.progress, f"evaluation, {name}") if screen else None
            evaluation, trajectories = evaluate(player, questions, step=0, on_progress=progress)
            results[name] = asdict(evaluation)
            if screen is None:
                continue
            screen.note(evaluation.line(name))
            rows = (json.dumps(rollout_row(0, t, arena.codec.decode), allow_nan=False) for t in trajectories)
            path = output / f"trajectories_{name}.jsonl"
            replace_file(FileOperations(), path, "".join(f"{row}\n" for row in rows).encode())
        summary: dict[str, Any] = {
            "model": config.model.path,
            "data": config.eval.data,
            "temperature": config.eval.temperature,
            "seed": config.seed,
            "results": results,
        }
        if "simulator" in config.eval.search:
            summary["simulator"] = simulator_name(config, training=False, policy=policy)
        if is_main():
            replace_file(FileOperations(), output / "evaluation.json", json.dumps(summary, indent=2).encode() + b"\n")
            write_config(config, output / "config.toml")
            write_environment(output, device)
    return summary


def evaluation_questions(config: RunConfig) -> list[Question]:
    """The questions of `eval.data`: the first `eval.questions` in seeded order, all when that is 0."""
    if not config.eval.data:
        return []
    questions = load_questions(config.eval.data)
    count = config.eval.questions or len(questions)
    return QuestionOrder(questions, config.seed).batch(0, min(count, len(questions)))


def evaluate(
    player: Player, questions: Sequence[Question], *, step: int, on_progress: Progress | None = None
) -> tuple[Evaluation, list[Trajectory]]:
    """Play every question once with `player` (whose group size is 1) and no noise."""
    groups = play(player, questions, step=step, noise=0.0, on_progress=on_progress)
    trajectories = [group.trajectories[0] for group in groups]
    return summarise(trajectories), trajectories


def summarise(trajectories: Sequence[Trajectory]) -> Evaluation:
    """Means, a bootstrap interval of F1 (percentiles of resampled means, fixed seed), and F1 per source."""
    f1 = [trajectory.scores.f1 for trajectory in trajectories]
    low, high = _bootstrap_interval(f1)
    by_source: dict[str, list[float]] = {}
    for trajectory in trajectories:
        by_source.setdefault(trajectory.question.source, []).append(trajectory.scores.f1)
    return Evaluation(
        num_questions=len(trajectories),
        f1=_mean(f1),
        f1_low=low,
        f1_high=high,
        exact_match=_mean([trajectory.scores.exact_match for trajectory in trajectories]),
        cover_match=_mean([trajectory.scores.cover_match for trajectory in trajectories]),
        searches_per_question=_mean([trajectory.num_searches for trajectory in trajectories]),
        answered_share=_mean([trajectory.answer is not None for trajectory in trajectories]),
        f1_by_source={source: _mean(values) for source, values in sorted(by_source.items())},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 0.0
    draws = random.Random(0)
    means = sorted(_mean(draws.choices(values, k=len(values))) for _ in range(BOOTSTRAP_SAMPLES))
    return means[int(0.025 * BOOTSTRAP_SAMPLES)], means[int(0.975 * BOOTSTRAP_SAMPLES) - 1]
