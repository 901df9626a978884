"""`zs-fast bench end_to_end`: a whole step of a recipe, ours, the pattern of ZeroSearch's own code, and TRL's.

All ways start from the same weights, play the same questions with the same draws, and take the same update; every round
runs all, in shuffled order. `reference_pattern` (turns.py) waits for the slowest after every turn, has at most 10
simulator calls under way, reads and encodes every context again, computes it again, scores it again after every turn,
and scores the whole once more before the update; it shares no prefix between trajectories. What else that code does
(copying weights for every turn, padding) is left out, in its favour. `trl` is TRL's GRPOTrainer with a rollout function
(trl_peer.py) that asks our simulator; in `trl_generate` the simulator speaks through transformers' generate.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any, NoReturn

import torch

from bench import peers, step_trace, usage
from bench.harness import spread_of
from bench.ops import ROOT, one_thread
from bench.results import verdict_lines, write_results
from bench.rollout_trace import Trace
from bench.turns import REFERENCE_CALLS
from bench.whole_step import (
    OURS,
    REFERENCE,
    TRL,
    Stage,
    Taken,
    build,
    ids_of,
    phase_seconds,
    step_seconds,
    take_steps,
    ways_of,
)
from zs_fast.errors import ConfigError
from zs_fast.models.load import DTYPES
from zs_fast.ranks import pack_share
from zs_fast.recipe_files import load_recipe
from zs_fast.system.environment import environment
from zs_fast.system.hardware import Hardware
from zs_fast.system.memory import Phase
from zs_fast.system.plan import PlanPhase
from zs_fast.system.plan_times import Workload, phase_floors

ROUNDS = 3
LEAST_SPEEDS = {REFERENCE: 2.0, TRL: 1.5}
"""Of a step, over each other way."""
COMPUTING = (Phase.ROLLOUT, Phase.SCORE, Phase.UPDATE)
PLAIN = {
    "eval.data": [""],
    "train.max_staleness": ["0"],
    "train.offload_optimizer_state": ["false"],
    "simulator.offload_weights": ["false"],
}
"""What a single step has no use for, or is not taken with here."""
QUICK = {
    "train.questions_per_step": ["2"],
    "train.group_size": ["2"],
    "game.max_turns": ["3"],
    "game.max_new_tokens": ["32"],
    "simulator.max_new_tokens": ["48"],
    "engine.slots": ["4"],
    "game.reward": ["bench.step_trace:alternating"],  # F1 is 0 for all so soon, and there would be no gradient
}


def main(words: Sequence[str]) -> dict[str, Any]:
    """Run with the words of the command line. Raises ConfigError, PreflightError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"zs-fast bench end_to_end: {message}")

    parser = Parser(prog="zs-fast bench end_to_end", add_help=False)
    parser.add_argument("--recipe", nargs="+", default=["quickstart"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--trace", nargs="?", const=step_trace.SHORT)
    parser.add_argument("--questions", type=int)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(list(words))
    if given.questions is not None and given.trace is None:
        raise ConfigError("zs-fast bench end_to_end --questions: takes that many of a trace; give --trace with it.")
    trace = None if given.trace is None else step_trace.read(given.trace, given.questions)
    return run(
        given.recipe,
        rounds=given.rounds,
        trace=trace,
        lora_rank=given.lora_rank,
        cold=given.cold,
        quick=given.quick,
    )


def run(
    recipes: Sequence[str] = ("quickstart",),
    *,
    rounds: int = ROUNDS,
    trace: Trace | None = None,
    lora_rank: int = 0,
    cold: bool = False,
    quick: bool = False,
) -> dict[str, Any]:
    """Take the recipe's first step in all ways, `rounds` times; print a table, write the JSON file, and return that.

    trace: at its lengths (step_trace.py). lora_rank: with an adapter on the policy in all ways; 0: as the recipe has
    it. cold: without a step of each way to warm up, where steps take minutes. quick: few short trajectories, once, and
    no file.
    Raises ConfigError for a recipe that one process can't play.
    """
    if rounds < 1:
        raise ConfigError(f"zs-fast bench end_to_end --rounds {rounds}: at least 1")
    changes = {**PLAIN, **(QUICK if quick else {}), **(step_trace.overrides(trace) if trace is not None else {})}
    if lora_rank:
        changes["model.lora_rank"] = [str(lora_rank)]
    config = load_recipe(recipes, changes)
    kind = "cuda" if torch.cuda.is_available() and config.model.device != "cpu" else "cpu"
    if kind == "cpu":
        config = config.model_copy(update={"threads": 1})
    with one_thread(kind):
        stage = build(config, trace)
        try:
            ceilings = measured_ceilings(stage, quick=quick)
            ways, absent = ways_of(stage)
            taken = take_steps(stage, ways, rounds=1 if quick else rounds, cold=cold)
        finally:
            stage.arena.close()
        summary = summarise(stage, recipes, changes, taken, ceilings) | {
            "absent": absent,
            "peers": peers.versions(),
            "trace": None if trace is None else trace.about,
            "warmed_up": not cold,
        }
    print(table(summary))
    if not quick:
        path = write_results(summary)
        print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return summary


def measured_ceilings(stage: Stage, *, quick: bool) -> usage.Ceilings:
    """What this machine does at best, in the type that the models compute in."""
    device = str(stage.device)
    rate = usage.matrix_rate(device, DTYPES[stage.config.model.dtype], quick=quick)
    return replace(usage.ceilings(device, quick=quick), flop_per_s=rate)


def workload(stage: Stage, taken: Taken) -> Workload:
    """The trajectories that were played, as a plan counts them."""
    trajectories = [trajectory for group in taken.groups for trajectory in group.trajectories]
    searches = [turn.search for trajectory in trajectories for turn in trajectory.turns if turn.search]
    calls = sum(not search.shared for search in searches)
    packed = pack_share(taken.groups, stage.config)

    def mean(values: Sequence[int]) -> float:
        return sum(values) / len(trajectories)

    return Workload(
        trajectories=len(trajectories),
        searches=calls / len(trajectories),
        prompt=mean([len(one.prompt_ids) for one in trajectories]),
        written=mean([one.num_action_tokens for one in trajectories]),
        documents=mean([one.num_observation_tokens for one in trajectories]),
        context=mean([one.num_tokens for one in trajectories]),
        computed=mean([micro.num_tokens for micro in packed.micro_batches(packed.token_budget)]),
        # What was computed of them: beginnings that prompts have in common count once.
        asked=taken.counts.get("simulator/prefill_tokens", 0.0) / max(1, calls),
        answered=sum(search.num_generated_tokens for search in searches) / max(1, calls),
    )


def summarise(
    stage: Stage,
    recipes: Sequence[str],
    changes: Mapping[str, Sequence[str]],
    taken: Mapping[str, list[Taken]],
    ceilings: usage.Ceilings,
) -> dict[str, Any]:
    """The JSON object of a run."""
    work = workload(stage, taken[OURS][0])
    rate = ceilings.flop_per_s or 1.0
    here = Hardware("measured", 0, ceilings.bytes_per_s, rate, is_cuda=False)
    floors = phase_floors(stage.config, here, work)
    flop = phase_floors(stage.config, replace(here, bytes_per_s=float("inf"), flop_per_s=1.0), work)
    ways = {name: _way(stage, steps, work, floors, flop, rate) for name, steps in taken.items()}
    speeds = {name: way["step"]["seconds"] / ways[OURS]["step"]["seconds"] for name, way in ways.items()}
    return {
        "subject": "end_to_end",
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environment": environment(stage.device),
        "recipes": list(recipes),
        "overrides": {name: list(value) for name, value in changes.items()},
        "models": {"policy": stage.config.model.path, "simulator": stage.config.simulator.path},
        "dtype": stage.config.model.dtype,
        "clock": "cpu_seconds" if stage.device.type == "cpu" else "seconds",
        "simulator_calls_at_once": {name: REFERENCE_CALLS if name == REFERENCE else None for name in ways},
        "same_trajectories": len({tuple(map(ids_of, one.groups)) for s in taken.values() for one in s}) == 1,
        "ceilings": asdict(ceilings),
        "workload": asdict(work),
        "needed_flop": {str(phase): value for phase, value in flop.items()},
        "floor_seconds": {str(phase): value for phase, value in floors.items()},
        "rounds": len(taken[OURS]),
        "ways": ways,
        "grad_norms": {name: steps[0].grad_norm for name, steps in taken.items()},
        "speed_over": {
            name: {"step": speeds[name]}
            | {str(phase): _ratio(way[phase]["seconds"], ways[OURS][phase]["seconds"]) for phase in COMPUTING}
            for name, way in ways.items()
            if name != OURS
        },
        "targets": [
            {
                "case": "end_to_end",
                "target": f"{OURS}: whole step, speed at least {least:g}x of {name}",
                "measured": speeds.get(name),
                "met": speeds[name] >= least if name in speeds else None,
            }
            for name, least in LEAST_SPEEDS.items()
        ],
    }


def _way(
    stage: Stage,
    steps: Sequence[Taken],
    work: Workload,
    floors: Mapping[PlanPhase, float],
    flop: Mapping[PlanPhase, float],
    rate: float,
) -> dict[str, Any]:
    """One way's phases and the whole step: medians over the rounds."""
    tokens = {Phase.ROLLOUT: work.written, Phase.SCORE: work.context, Phase.UPDATE: work.context}
    found: dict[str, Any] = {}
    for phase in COMPUTING:
        plan = PlanPhase(phase.value)
        times = [phase_seconds(one, phase, stage) for one in steps]
        found[phase.value] = _figures(times, tokens[phase] * work.trajectories, floors[plan], flop[plan], rate) | {
            "wall_seconds": statistics.median(one.timings[f"{phase}/seconds"] for one in steps),
            "peak_rss_bytes": max(one.timings[f"{phase}/peak_rss_bytes"] for one in steps),
            "peak_cuda_bytes": max(one.timings.get(f"{phase}/peak_cuda_bytes", 0.0) for one in steps),
        }
    times = [step_seconds(one, stage) for one in steps]
    whole = _figures(times, work.context * work.trajectories, sum(floors.values()), sum(flop.values()), rate)
    found["step"] = whole | {
        name: max(found[phase.value][name] for phase in COMPUTING) for name in ("peak_rss_bytes", "peak_cuda_bytes")
    }
    return found | {"counts": steps[0].counts}


def _figures(times: Sequence[float], tokens: float, floor: float, flop: float, rate: float) -> dict[str, Any]:
    seconds = statistics.median(times)
    return {
        "seconds": seconds,
        "spread": spread_of(times),
        "tokens_per_second": _ratio(tokens, seconds),
        "model_flop_utilisation": _ratio(flop, seconds * rate),
        "of_floor": _ratio(floor, seconds),
    }


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def table(summary: Mapping[str, Any]) -> str:
    """Phases of both ways, and the verdict."""
    work, best = summary["workload"], summary["ceilings"]
    lines = [
        f"{' '.join(summary['recipes'])}: {work['trajectories']} trajectories of {work['context']:.0f} tokens, "
        f"{work['searches']:.2f} searches each; matrix product {best['flop_per_s'] / 1e9:.4g} GFLOP/s "
        f"({summary['dtype']}), copy {best['bytes_per_s'] / 1e9:.4g} GB/s",
        f"{'way':<18} {'phase':<8} {summary['clock']:>12} {'spread':>7} {'tokens/s':>9} {'MFU':>7} {'of floor':>8} "
        f"{'peak MB':>8}",
    ]
    for way, phases in summary["ways"].items():
        for phase in ("rollout", "score", "update", "step"):
            one = phases[phase]
            peak = (one["peak_cuda_bytes"] or one["peak_rss_bytes"]) / 2**20
            lines.append(
                f"{way:<18} {phase:<8} {one['seconds']:>12.3f} {one['spread']:>7.1%} "
                f"{one['tokens_per_second'] or 0.0:>9.1f} {one['model_flop_utilisation'] or 0.0:>7.1%} "
                f"{one['of_floor'] or 0.0:>8.1%} {peak:>8.0f}"
            )
        counts = phases["counts"]
        lines.append("  " + ", ".join(f"{name} {value:.0f}" for name, value in counts.items()))
    for way, speeds in summary["speed_over"].items():
        lines.append(
            f"ours over {way}: " + ", ".join(f"{name} {speed:.2f}x" for name, speed in speeds.items() if speed)
        )
    lines += [f"{way} is absent: {reason}" for way, reason in summary.get("absent", {}).items()]
    return "\n".join([*lines, verdict_lines(summary["targets"])])
