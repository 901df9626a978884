"""`make algorithms`: every algorithm on the quickstart's world, three seeds each, and two ablations.

Each run is one `zs-fast train quickstart_sweep` in a process of its own, on one thread, two runs at a time. A run that
is finished is not run again and one that was stopped starts over, so a second call goes on where the first was stopped.
Then docs/algorithms.md, its picture and a JSON file are written from what the runs left.
"""

from __future__ import annotations

import argparse
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

from bench.results import RESULTS, device_slug
from zs_fast.system.environment import environment

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "quickstart_sweep"
SEEDS = (0, 1, 2)
PARALLEL = 2
SEARCH = "bm25"
LEAST_GAIN, GOOD_F1, COLLAPSED_GAIN = 0.25, 0.70, 0.05
STUDENT_T = {2: 4.303, 3: 3.182, 4: 2.776}
"""Two-sided 95 % quantiles by degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of a table: its overrides of the recipe."""

    name: str
    overrides: Mapping[str, str]
    note: str = ""


def algorithm(name: str, *, learning_rate: str = "3e-4", note: str = "", **overrides: str) -> Variant:
    fixed = {"algorithm.name": name, "train.learning_rate": learning_rate}
    return Variant(name, fixed | {key.replace("__", "."): value for key, value in overrides.items()}, note)


ALGORITHMS = (
    algorithm("reinforce"),
    algorithm("grpo"),
    algorithm("ppo", critic__learning_rate="1e-3", note="critic of its own, learning rate 1e-3"),
    algorithm("reinforce++"),
    algorithm("reinforce++-baseline"),
    algorithm("rloo"),
    algorithm("dr_grpo"),
    algorithm("dapo", note="up to two more batches of questions a step"),
    algorithm("gspo"),
    algorithm("cispo"),
)
ABLATIONS = {
    "Documents in the loss": (
        Variant("documents masked", {"algorithm.name": "grpo"}),
        Variant("documents trained on", {"algorithm.name": "grpo", "algorithm.mask_documents": "false"}),
    ),
    "Curriculum of noise": (
        Variant("noise 0 to 0.5", {"algorithm.name": "grpo", "curriculum.end": "0.5"}),
        Variant("noise 0.5 throughout", {"algorithm.name": "grpo", "curriculum.start": "0.5", "curriculum.end": "0.5"}),
    ),
}
SAME_RUNS = {"documents masked": "grpo"}
"""Rows whose runs are those of another row."""


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


def runs(folder: Path) -> list[Run]:
    """All of them, seed after seed, so that an unfinished sweep has whole columns."""
    variants = [*ALGORITHMS, *(v for pair in ABLATIONS.values() for v in pair if v.name not in SAME_RUNS)]
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
            print(f"{run.variant.name}, seed {run.seed}: F1 {_final(summary):.3f}, {seconds:.0f} s", flush=True)


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


def _final(summary: Mapping[str, Any]) -> float:
    return float(summary[f"f1_{SEARCH}_after"])


def rows_of(folder: Path, variant: Variant) -> list[dict[str, Any]]:
    """One entry per seed: final F1 with its interval over questions, seconds, and the curve of rewards."""
    name = SAME_RUNS.get(variant.name, variant.name)
    entries = []
    for run in (run for run in runs(folder) if run.variant.name == name):
        summary = run.summary()
        assert summary is not None, f"{run.folder} is not finished"
        after = summary["evaluations"][SEARCH]["after"]
        metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in metrics if "reward/mean" in row]
        entries.append(
            {
                "seed": run.seed,
                "f1": after["f1"],
                "f1_low": after["f1_low"],
                "f1_high": after["f1_high"],
                "seconds": summary["seconds"],
                "reward": [row["reward/mean"] for row in steps],
                "nonfinite": sum(row["update/nonfinite_losses"] for row in steps),
            }
        )
    return entries


def collect(folder: Path) -> dict[str, Any]:
    """Everything that the page and the JSON file say."""
    started_at = {seed: result["f1"] for seed, result in untrained(folder).items()}
    tables = {"algorithms": ALGORITHMS, **ABLATIONS}
    return {
        "subject": "algorithms",
        "recipe": RECIPE,
        "search": SEARCH,
        "seeds": SEEDS,
        "environment": environment("cpu"),
        "untrained_f1": started_at,
        "tables": {
            title: {
                variant.name: {
                    "overrides": dict(variant.overrides),
                    "note": variant.note,
                    "runs": rows_of(folder, variant),
                }
                for variant in variants
            }
            for title, variants in tables.items()
        },
    }


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """(mean of first - second over the seeds they share, half width of its 95 % interval by Student's t)."""
    deltas = [a - b for a, b in zip(first, second, strict=True)]
    return statistics.mean(deltas), STUDENT_T[len(deltas) - 1] * statistics.stdev(deltas) / len(deltas) ** 0.5


def page(found: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """docs/algorithms.md"""
    start = found["untrained_f1"]
    tables = found["tables"]
    lines = [PREFACE.format(start=", ".join(f"{value:.3f}" for value in start.values()), **_settings())]
    lines += [
        "| algorithm | learning rate | F1 by seed | mean | spread | gain | collapsed | s per run |",
        "|" + "---|" * 8,
    ]
    for name, row in tables["algorithms"].items():
        lines.append(_algorithm_row(name, row, start))
    minutes = sum(run["seconds"] for table in tables.values() for row in table.values() for run in row["runs"]) / 60
    lines.append(f"\nAll runs together, those of the ablations included: {minutes:.0f} minutes, {PARALLEL} at a time.")
    lines.append(f"Spread is largest less smallest; a run has collapsed when it gains less than {COLLAPSED_GAIN}.")
    lines += [f"`{name}`: {row['note']}." for name, row in tables["algorithms"].items() if row["note"]]
    lines.append("")
    for name, row in tables["algorithms"].items():
        low = [run["seed"] for run in row["runs"] if run["f1"] < GOOD_F1]
        if low:
            which = ", ".join(f"seed {seed}" for seed in low)
            lines.append(f"**{name}** ends below {GOOD_F1:.2f} ({which}): {reasons.get(name, 'no reason found yet')}")
    lines.append("\n![Reward by step, mean of the seeds](algorithms.png)\n")
    for title in ABLATIONS:
        lines += _ablation(title, tables[title])
    return "\n".join(lines) + "\n"


def _settings() -> dict[str, Any]:
    from zs_fast.recipe_files import load_recipe

    config = load_recipe([RECIPE], {})
    return {
        "steps": config.train.steps,
        "questions": config.train.questions_per_step,
        "group": config.train.group_size,
        "warmup": config.train.warmup_steps,
        "mini": config.train.mini_batches,
        "heldout": config.eval.questions,
    }


def _algorithm_row(name: str, row: Mapping[str, Any], start: Mapping[Any, float]) -> str:
    values = [run["f1"] for run in row["runs"]]
    gains = [run["f1"] - start[run["seed"]] for run in row["runs"]]
    collapsed = sum(gain < COLLAPSED_GAIN or run["nonfinite"] > 0 for gain, run in zip(gains, row["runs"], strict=True))
    return (
        f"| {name} | {row['overrides']['train.learning_rate']} | {', '.join(f'{value:.3f}' for value in values)} "
        f"| {statistics.mean(values):.3f} | {max(values) - min(values):.3f} | {statistics.mean(gains):+.3f} "
        f"| {collapsed} of {len(values)} | {statistics.mean(run['seconds'] for run in row['runs']):.0f} |"
    )


def _ablation(title: str, rows: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {title}\n"
    yield "GRPO; F1 of each seed with the 95 % interval over its questions.\n"
    yield "| variant | seed 0 | seed 1 | seed 2 | mean |"
    yield "|---|---|---|---|---|"
    values = {}
    for name, row in rows.items():
        cells = [f"{run['f1']:.3f} ({run['f1_low']:.3f} to {run['f1_high']:.3f})" for run in row["runs"]]
        values[name] = [run["f1"] for run in row["runs"]]
        yield f"| {name} | {' | '.join(cells)} | {statistics.mean(values[name]):.3f} |"
    (first, ours), (second, theirs) = values.items()
    mean, width = difference(ours, theirs)
    verdict = "no difference shown" if abs(mean) <= width else f"{first if mean > 0 else second} is better"
    interval = f"{mean - width:+.3f} to {mean + width:+.3f}"
    yield f"\n{first} less {second}: {mean:+.3f}, 95 % interval over seeds {interval}: {verdict}.\n"


PREFACE = """# Algorithms against each other

Written by `make algorithms` from what its runs left (`bench/algorithms.py`); figures by hand are in no table.

Recipe `quickstart_sweep`: {steps} steps of {questions} questions x {group} trajectories, {mini} optimizer steps on each
batch, {warmup} warm-up steps, the same data, noise (0 to 0.25) and learning-rate schedule for all; one thread a run. F1
is that of greedy play on {heldout} held-out questions with BM25, which training never sees. Untrained: {start}.

These are 1-million-parameter models in an invented world, on few steps: a check that each algorithm works as it stands,
not a ranking for large models. Learning rates were not tuned for each beyond what the table says.
"""


def picture(found: Mapping[str, Any], path: Path) -> None:
    """The rewards of all algorithms by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, row) in enumerate(found["tables"]["algorithms"].items()):
        curves = [run["reward"] for run in row["runs"]]
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, label=name, color=f"C{number}")
    axes.set_xlabel("step")
    axes.set_ylabel("reward (F1 with the simulator, mean of the seeds)")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=110)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "algorithms", help="where the runs lie")
    parser.add_argument("--parallel", type=int, default=PARALLEL, help="runs at a time")
    parser.add_argument("--write-only", action="store_true", help="write the page from finished runs")
    arguments = parser.parse_args(words)
    folder = arguments.folder.absolute()
    if not arguments.write_only:
        run_all(runs(folder), parallel=arguments.parallel)
    found = collect(folder)
    target = RESULTS / device_slug(found["environment"])
    target.mkdir(parents=True, exist_ok=True)
    (target / "algorithms.json").write_text(json.dumps(found, indent=1) + "\n")
    notes = Path(__file__).with_name("algorithm_notes.json")
    reasons = json.loads(notes.read_bytes()) if notes.is_file() else {}
    (ROOT / "docs" / "algorithms.md").write_text(page(found, reasons))
    picture(found, ROOT / "docs" / "algorithms.png")
    print(f"written: docs/algorithms.md, docs/algorithms.png, {target / 'algorithms.json'}")


if __name__ == "__main__":
    main()
