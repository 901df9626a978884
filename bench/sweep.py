"""Many short training runs beside each other: each a `zs-fast train` in a process of its own, on one thread.

A run that is finished is not run again and one that was stopped starts over, so a second call goes on where the first
was stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "quickstart_sweep"
SEEDS = (0, 1, 2)
PARALLEL = 2
SEARCH = "bm25"
STUDENT_T = {2: 4.303, 3: 3.182, 4: 2.776}
"""Two-sided 95 % quantiles by degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of a table: its overrides of the recipe."""

    name: str
    overrides: Mapping[str, str]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """One seed of a variant, and where it lies."""

    variant: Variant
    seed: int
    folder: Path

    def command(self) -> list[str]:
        words = [f"--{key}={value}" for key, value in self.variant.overrides.items()]
        output = [f"--seed={self.seed}", f"--output={self.folder}"]
        return [sys.executable, "-m", "zs_fast.cli", "train", RECIPE, *output, *words, "--resume"]

    def summary(self) -> dict[str, Any] | None:
        """What the finished run says of itself; None before that."""
        path = self.folder / "summary.json"
        return json.loads(path.read_bytes()) if path.is_file() else None


def planned(variants: Sequence[Variant], folder: Path) -> list[Run]:
    """A run of each variant and seed: seed after seed, so that an unfinished sweep has whole columns."""
    return [
        Run(variant, seed, folder / f"{variant.name.replace(' ', '_').replace('+', 'p')}_seed{seed}")
        for seed in SEEDS
        for variant in variants
    ]


def run_all(todo: Sequence[Run], *, parallel: int) -> None:
    """Run those that are not finished, `parallel` at a time. Raises RuntimeError for one that fails."""
    waiting = [run for run in todo if run.summary() is None]
    print(f"{len(todo) - len(waiting)} of {len(todo)} runs are finished", flush=True)
    active: list[tuple[Run, subprocess.Popen[bytes], float]] = []
    environment_of_runs = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    while waiting or active:
        while waiting and len(active) < parallel:
            run = waiting.pop(0)
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            with run.folder.with_suffix(".log").open("wb") as log:
                process = subprocess.Popen(
                    run.command(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment_of_runs
                )
            active.append((run, process, time.monotonic()))
        time.sleep(0.5)
        for entry in [entry for entry in active if entry[1].poll() is not None]:
            active.remove(entry)
            run, process, started = entry
            summary = run.summary()
            if process.returncode or summary is None:
                for _, other, _ in active:
                    other.terminate()
                raise RuntimeError(f"{' '.join(run.command())} ended with {process.returncode}: see {run.folder}.log")
            seconds = time.monotonic() - started
            print(f"{run.variant.name}, seed {run.seed}: F1 {final_f1(summary):.3f}, {seconds:.0f} s", flush=True)


def untrained(folder: Path) -> dict[int, dict[str, float]]:
    """By seed: the evaluation of the policy before training, on the very questions of that seed's runs."""
    from zs_fast.evaluate import evaluate_run
    from zs_fast.recipe_files import load_recipe

    results = {}
    for seed in SEEDS:
        output = folder / f"untrained_seed{seed}"
        path = output / "evaluation.json"
        if not path.is_file():
            evaluate_run(load_recipe([RECIPE], {"seed": [str(seed)], "output": [str(output)]}), resume=True)
        results[seed] = json.loads(path.read_bytes())["results"][SEARCH]
    return results


def outcome(run: Run) -> dict[str, Any]:
    """Final F1 of a finished run with its interval over questions, seconds, and the curve of rewards."""
    summary = run.summary()
    assert summary is not None, f"{run.folder} is not finished"
    after = summary["evaluations"][SEARCH]["after"]
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "reward/mean" in row]
    return {
        "seed": run.seed,
        "f1": after["f1"],
        "f1_low": after["f1_low"],
        "f1_high": after["f1_high"],
        "seconds": summary["seconds"],
        "reward": [row["reward/mean"] for row in steps],
        "nonfinite": sum(row["update/nonfinite_losses"] for row in steps),
    }


def final_f1(summary: Mapping[str, Any]) -> float:
    return float(summary[f"f1_{SEARCH}_after"])


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """(mean of first - second over the seeds they share, half width of its 95 % interval by Student's t)."""
    deltas = [a - b for a, b in zip(first, second, strict=True)]
    return statistics.mean(deltas), STUDENT_T[len(deltas) - 1] * statistics.stdev(deltas) / len(deltas) ** 0.5


def by_seed(rows: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a table: of each variant F1 by seed, with the interval over that seed's questions."""
    yield "| variant | seed 0 | seed 1 | seed 2 | mean |"
    yield "|---|---|---|---|---|"
    for name, row in rows.items():
        cells = [f"{run['f1']:.3f} ({run['f1_low']:.3f} to {run['f1_high']:.3f})" for run in row["runs"]]
        yield f"| {name} | {' | '.join(cells)} | {statistics.mean(run['f1'] for run in row['runs']):.3f} |"


def verdict(first: str, ours: Mapping[str, Any], second: str, theirs: Mapping[str, Any]) -> str:
    """One sentence: how far the first is above the second, and whether that shows."""
    mean, width = difference([run["f1"] for run in ours["runs"]], [run["f1"] for run in theirs["runs"]])
    said = "no difference shown" if abs(mean) <= width else f"{first if mean > 0 else second} is better"
    interval = f"{mean - width:+.3f} to {mean + width:+.3f}"
    return f"{first} less {second}: {mean:+.3f}, 95 % interval over seeds {interval}: {said}."
