"""`make algorithms`: every algorithm on the quickstart's world, three seeds each, and two ablations.

Two runs at a time (see sweep.py). Then docs/algorithms.md, its picture and a JSON file are written from what they left.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import RESULTS, device_slug
from bench.sweep import (
    PARALLEL,
    RECIPE,
    ROOT,
    SEARCH,
    SEEDS,
    Run,
    Variant,
    by_seed,
    outcome,
    planned,
    run_all,
    untrained,
    verdict,
)
from zs_fast.system.environment import environment

LEAST_GAIN, GOOD_F1, COLLAPSED_GAIN = 0.25, 0.70, 0.05


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


def runs(folder: Path) -> list[Run]:
    return planned([*ALGORITHMS, *(v for pair in ABLATIONS.values() for v in pair if v.name not in SAME_RUNS)], folder)


def rows_of(folder: Path, variant: Variant) -> list[dict[str, Any]]:
    name = SAME_RUNS.get(variant.name, variant.name)
    return [outcome(run) for run in runs(folder) if run.variant.name == name]


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
    yield from by_seed(rows)
    first, second = rows
    yield f"\n{verdict(first, rows[first], second, rows[second])}\n"


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
