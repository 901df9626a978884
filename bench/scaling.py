"""`zs-fast bench scaling`: a step's time and memory against the number of trajectories and their length.

The quickstart's models at forced lengths (rollout_trace.py): every trajectory searches once and answers, all alike, so
that a point has exactly `trajectories` x `length` times the work of the first. Each point is a process of its own,
which imports everything, notes its resident memory, takes the step once to warm up and then a few times, and reports
the median of its processor time by phase and the most it held above the imports; beside it stands what `zs-fast plan`
says.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from bench import step_trace
from bench.child import ROOT, held_at_start, report_of
from bench.ops import one_thread
from bench.results import verdict_lines, write_results
from bench.rollout_trace import GROUP_SIZE, Trace
from zs_fast.config import RunConfig
from zs_fast.errors import ConfigError
from zs_fast.recipe_files import load_recipe
from zs_fast.system.environment import environment
from zs_fast.system.hardware import Hardware
from zs_fast.system.memory import Phase, peak_rss_bytes
from zs_fast.system.plan import Lengths, plan_memory
from zs_fast.system.plan_times import Workload, phase_floors

TRAJECTORIES, PROMPT, ACTION, DOCUMENTS = 16, 96, 24, 40
"""Of the first point, in tokens."""
POINTS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4))
"""(times the trajectories, times the length)."""
ROUNDS = 3
MARGIN = 0.1
"""The time may grow with a power of the tokens that is this much larger than that of the operations no way can do
without: those grow in a line with the trajectories, and faster with their length, by the attention."""
WITHIN = 0.15
"""How far the plan may be from what was held, as a share of that."""
COMPUTING = (Phase.ROLLOUT, Phase.SCORE, Phase.UPDATE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One number of trajectories of one length."""

    trajectories: int
    length: int
    """Tokens of each trajectory."""
    cpu_seconds: dict[str, float]
    """By phase, and of the step."""
    measured_bytes: int
    planned_bytes: int
    needed_flop: float
    """Of the step: what no way can do without."""

    @property
    def tokens(self) -> int:
        return self.trajectories * self.length


def main(words: Sequence[str]) -> dict[str, Any]:
    """Run with the words of the command line. Raises ConfigError, PreflightError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"zs-fast bench scaling: {message}")

    parser = Parser(prog="zs-fast bench scaling", add_help=False)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(list(words))
    return run(rounds=given.rounds, quick=given.quick)


def run(*, rounds: int = ROUNDS, quick: bool = False) -> dict[str, Any]:
    """Measure all points, print a table, write the JSON file, and return its content. quick: two points, no file."""
    points = []
    for times, longer in ((1, 1), (2, 1)) if quick else POINTS:
        points.append(measured(times, longer, rounds=1 if quick else rounds))
        print(line(points[-1]), flush=True)
    summary = summarise(points)
    for name, fit in summary["fits"].items():
        print(
            f"{name}: {fit['fixed_seconds']:.3f} s + {1e3 * fit['seconds_per_token']:.4f} ms a token, at most "
            f"{fit['farthest']:.1%} off; exponent {fit['exponent']:.3f}, of the needed operations "
            f"{fit['needed_exponent']:.3f}"
        )
    print(verdict_lines(summary["targets"]))
    if not quick:
        path = write_results(summary)
        print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return summary


def trace_of(times: int, longer: int) -> Trace:
    """All trajectories alike: an action, documents, an answer."""
    return Trace(
        about="bench.scaling",
        seed=0,
        prompt_tokens=PROMPT * longer,
        simulator_prompt_tokens=PROMPT * longer,
        trajectories=((ACTION * longer, DOCUMENTS * longer, ACTION * longer),) * (TRAJECTORIES * times),
    )


def config_of(times: int, longer: int) -> RunConfig:
    """The quickstart with room for these lengths."""
    changes = step_trace.overrides(trace_of(times, longer)) | {
        "threads": ["1"],
        "model.device": ["cpu"],
        "eval.data": [""],
        "engine.slots": [str(TRAJECTORIES * times)],
        "game.max_context_tokens": [str(256 * longer)],
    }
    return load_recipe(["quickstart"], changes)


def lengths_of(longer: int) -> Lengths:
    written = 2 * ACTION
    return Lengths(
        trajectory=(PROMPT + written + DOCUMENTS) * longer,
        written=written * longer,
        simulation=(PROMPT + DOCUMENTS) * longer,
        alike=True,
        shared=PROMPT * longer,
    )


def needed_flop(times: int, longer: int) -> float:
    """Operations of the step that no way can do without, as a plan counts them."""
    written = ACTION * longer
    work = Workload(
        trajectories=TRAJECTORIES * times,
        searches=1.0,
        prompt=PROMPT * longer,
        written=2 * written,
        documents=DOCUMENTS * longer,
        context=lengths_of(longer).trajectory,
        computed=lengths_of(longer).trajectory - PROMPT * longer * (1.0 - 1.0 / GROUP_SIZE),
        asked=PROMPT * longer,
        answered=DOCUMENTS * longer,
    )
    counting = Hardware("one operation a second", 0, math.inf, 1.0, is_cuda=False)
    return sum(phase_floors(config_of(times, longer), counting, work).values())


def measured(times: int, longer: int, *, rounds: int) -> Point:
    """One point, in a process of its own. Raises PreflightError where that fails."""
    lengths = lengths_of(longer)
    what = f"bench scaling: x{times}, length x{longer}"
    found = report_of("bench.scaling", str(times), str(longer), str(rounds), what=what)
    return Point(
        trajectories=TRAJECTORIES * times,
        length=lengths.trajectory,
        cpu_seconds=found["cpu_seconds"],
        measured_bytes=found["bytes"],
        planned_bytes=plan_memory(config_of(times, longer), lengths=lengths).peak_bytes,
        needed_flop=needed_flop(times, longer),
    )


def run_child(times: int, longer: int, rounds: int, report: Path) -> None:
    """The process that is measured."""
    from bench.whole_step import build, our_step, phase_seconds, step_seconds, take_step

    before = held_at_start()
    with one_thread("cpu"):
        stage = build(config_of(times, longer), trace_of(times, longer))
        peaks = [peak_rss_bytes()]
        steps = [take_step(stage, our_step) for _ in range(rounds + 1)]
    peaks += [int(step.timings[f"{phase}/peak_rss_bytes"]) for step in steps for phase in COMPUTING]
    kept = steps[1:]
    seconds = {str(phase): statistics.median(phase_seconds(one, phase, stage) for one in kept) for phase in COMPUTING}
    seconds["step"] = statistics.median(step_seconds(one, stage) for one in kept)
    # The bench alone keeps a second copy of the weights to start over from.
    copies = sum(tensor.numel() * tensor.element_size() for tensor in stage.start.values())
    report.write_text(json.dumps({"cpu_seconds": seconds, "bytes": max(peaks) - before - copies}), encoding="utf-8")


def line(point: Point) -> str:
    seconds = ", ".join(f"{name} {value:.3f}" for name, value in point.cpu_seconds.items())
    return (
        f"{point.trajectories:>4} trajectories of {point.length:>4} tokens: CPU s {seconds}; held "
        f"{point.measured_bytes / 2**20:.0f} MiB, planned {point.planned_bytes / 2**20:.0f}"
    )


def fit(points: Sequence[Point], phase: str) -> dict[str, float]:
    """Least squares of seconds = fixed + per token, and the exponent of the tokens between the first and last point."""
    tokens, seconds = [p.tokens for p in points], [p.cpu_seconds[phase] for p in points]
    slope, fixed = statistics.linear_regression(tokens, seconds)
    farthest = max(abs(fixed + slope * x - y) / y for x, y in zip(tokens, seconds, strict=True))
    more = math.log(tokens[-1] / tokens[0])
    return {
        "fixed_seconds": fixed,
        "seconds_per_token": slope,
        "farthest": farthest,
        "exponent": math.log(seconds[-1] / seconds[0]) / more,
        "needed_exponent": math.log(points[-1].needed_flop / points[0].needed_flop) / more,
    }


def summarise(points: Sequence[Point]) -> dict[str, Any]:
    """The JSON object of a run."""
    series = {
        "trajectories": [point for point in points if point.length == points[0].length],
        "length": [point for point in points if point.trajectories == points[0].trajectories],
    }
    fits = {
        f"{name}, {phase}": fit(part, phase)
        for name, part in series.items()
        if len(part) > 1
        for phase in (*map(str, COMPUTING), "step")
    }
    targets = [
        {
            "case": "scaling",
            "target": f"{name}: its time grows with at most the power {found['needed_exponent'] + MARGIN:.3f} of the "
            f"tokens ({found['needed_exponent']:.3f} of the operations that are needed, and {MARGIN:g})",
            "measured": found["exponent"],
            "met": found["exponent"] <= found["needed_exponent"] + MARGIN,
        }
        for name, found in fits.items()
        if name.endswith(", step")
    ]
    for point in points:
        error = point.planned_bytes / point.measured_bytes - 1.0
        name = f"{point.trajectories} trajectories of {point.length} tokens"
        target = f"{name}: plan within {WITHIN:.0%} of the memory held"
        targets.append({"case": "scaling", "target": target, "measured": error, "met": abs(error) <= WITHIN})
    return {
        "subject": "scaling",
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environment": environment("cpu"),
        "points": [asdict(point) for point in points],
        "fits": fits,
        "targets": targets,
    }


if __name__ == "__main__":
    run_child(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
