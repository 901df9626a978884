"""What a run says about itself in numbers that are made from others: rates of a step, keys of the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zs_fast.evaluate import Evaluation
from zs_fast.system.memory import Phase
from zs_fast.types import Group


def step_rates(groups: Sequence[Group], timings: Mapping[str, float], *, scores: bool) -> dict[str, float]:
    """Seconds of the step, and tokens per second: of all tokens, and of what each phase worked on.

    The simulator's are the tokens it wrote during the rollout. `scores`: is there a pass before the update?
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    written = sum(trajectory.num_action_tokens for trajectory in trajectories)
    total = sum(trajectory.num_tokens for trajectory in trajectories)
    simulated = sum(turn.search.num_generated_tokens for t in trajectories for turn in t.turns if turn.search)
    seconds = sum(timings[f"{phase}/seconds"] for phase in Phase)
    rates = {
        "seconds": seconds,
        "tokens_per_second": total / max(seconds, 1e-9),
        "rollout/tokens_per_second": written / max(timings["rollout/seconds"], 1e-9),
        "simulator/tokens_per_second": simulated / max(timings["rollout/seconds"], 1e-9),
        "update/tokens_per_second": total / max(timings["update/seconds"], 1e-9),
    }
    if scores:
        rates["score/tokens_per_second"] = total / max(timings["score/seconds"], 1e-9)
    return rates


def summary_key(name: str, when: str) -> str:
    """`f1_before`, `f1_bm25_after`, ...; closed-book play is stated once, after training."""
    if name == "closed_book":
        return "f1_closed_book" if when == "after" else "f1_closed_book_before"
    return f"f1_{when}" if name == "simulator" else f"f1_{name}_{when}"


def jsonable(evaluation: Evaluation) -> dict[str, Any]:
    return {key.removeprefix("eval/"): value for key, value in evaluation.metrics("eval").items()}
