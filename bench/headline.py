"""`make headline`: what a policy learns from each kind of search engine, judged with the real one. Three seeds each.

ZeroSearch's headline in small, on the quickstart's world: a prompted simulator, a fine-tuned one, a larger one that is
fine-tuned on the same examples, and the real retriever itself. The simulators come from `zs-fast simulator
simulator_quickstart`, which has never seen a held-out question. Writes docs/headline.md and a JSON file. A second call
goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.results import RESULTS, device_slug
from bench.sweep import PARALLEL, RECIPE, ROOT, SEEDS, Variant, by_seed, outcome, planned, run_all, untrained, verdict
from zs_fast.models.load import LoadedModel, load_model, save_model
from zs_fast.recipe_files import load_recipe
from zs_fast.system.environment import environment

CIRCLE = "simulator_quickstart"
BASE = "quickstart:policy"
LARGER_BLOCKS = 2
"""Layers of the larger simulator for each one of the smaller."""
PROMPTED, TUNED, LARGER, REAL = "prompted", "fine-tuned", "larger fine-tuned", "real retriever"
HELD = "fine-tuned held to its mode"
PAIRS = ((TUNED, PROMPTED), (LARGER, TUNED), (HELD, TUNED), (TUNED, REAL))
MEASURES = ("contains_answer", "well_formed", "reader_f1")


def expanded(loaded: LoadedModel, blocks: int) -> LoadedModel:
    """The same function with `blocks` layers for each: copies that add nothing until they are trained.

    A copy's two outputs, attention's and the MLP's, start at zero (block expansion, LLaMA Pro, arXiv:2401.02415).
    """
    old = loaded.model
    settings = old.config.to_dict() | {"num_hidden_layers": blocks * old.config.num_hidden_layers}
    settings.pop("layer_types", None)  # one entry a layer
    model_type = settings.pop("model_type")
    config = AutoConfig.for_model(model_type, **settings)
    new = AutoModelForCausalLM.from_config(config, dtype=old.dtype, attn_implementation=old.config._attn_implementation)
    new.load_state_dict(old.state_dict(), strict=False)
    with torch.no_grad():
        for number, layer in enumerate(new.model.layers):
            layer.load_state_dict(old.model.layers[number // blocks].state_dict())
            if number % blocks:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    return replace(loaded, model=new.eval())


def make_simulators(folder: Path) -> dict[str, Path]:
    """Both fine-tuned simulators, and what `zs-fast simulator-quality` says of all three; their model folders."""
    small = folder / "small"
    _zs_fast("simulator", CIRCLE, "--resume", output=small)
    labels, base = small / "labels", folder / "larger_base"
    if not (base / "config.json").is_file():
        save_model(expanded(load_model(BASE), LARGER_BLOCKS), base)
    large = folder / "larger"
    if not (large / "model" / "config.json").is_file():
        _zs_fast(
            "sft",
            CIRCLE,
            f"--data={labels / 'train_alpaca.jsonl'}",
            f"--sft.validation_data={labels / 'validation_alpaca.jsonl'}",
            f"--quality.data={labels / 'validation_searches.jsonl'}",
            f"--model.path={base}",
            output=large,
        )
    if not (folder / "larger_quality" / "quality.json").is_file():
        _zs_fast(
            "simulator-quality",
            CIRCLE,
            f"--quality.data={labels / 'validation_searches.jsonl'}",
            "--simulator.kind=model",
            f"--simulator.path={large / 'model'}",
            "--simulator.template=fine_tuned",
            output=folder / "larger_quality",
        )
    return {TUNED: small / "tuned" / "model", LARGER: large / "model"}


def _zs_fast(command: str, *words: str, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    environment_of_run = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    whole = [sys.executable, "-m", "zs_fast.cli", command, *words, f"--output={output}"]
    subprocess.run(whole, check=True, cwd=ROOT, env=environment_of_run)


def variants(simulators: Mapping[str, Path]) -> list[Variant]:
    """What stands behind the searches while the policy trains; everything else is the recipe's."""
    tuned = {
        name: Variant(name, {"simulator.path": str(path), "simulator.template": "fine_tuned"})
        for name, path in simulators.items()
    }
    prompted = Variant(PROMPTED, {"simulator.path": BASE, "simulator.template": "prompted"})
    held = Variant(HELD, {**tuned[TUNED].overrides, "simulator.max_samples": "3"})
    return [prompted, *tuned.values(), held, Variant(REAL, {"simulator.kind": "bm25"})]


def quality(folder: Path) -> dict[str, dict[str, Any]]:
    files = {
        PROMPTED: folder / "small" / "quality_prompted",
        TUNED: folder / "small" / "quality_tuned",
        LARGER: folder / "larger_quality",
    }
    return {name: json.loads((path / "quality.json").read_bytes())["quality"] for name, path in files.items()}


def collect(folder: Path, arms: Sequence[Variant]) -> dict[str, Any]:
    """Everything that the page and the JSON file say."""
    done = planned(arms, folder)
    return {
        "subject": "headline",
        "recipe": RECIPE,
        "seeds": SEEDS,
        "environment": environment("cpu"),
        "untrained_f1": {seed: result["f1"] for seed, result in untrained(folder).items()},
        "parameters": {name: _parameters(folder / path) for name, path in _MODELS.items()},
        "quality": quality(folder),
        "arms": {arm.name: {"runs": [outcome(run) for run in done if run.variant == arm]} for arm in arms},
    }


_MODELS = {TUNED: "small/tuned/model", LARGER: "larger/model"}


def _parameters(folder: Path) -> int:
    return sum(parameter.numel() for parameter in load_model(str(folder)).model.parameters())


def page(found: Mapping[str, Any]) -> str:
    """docs/headline.md"""
    config = load_recipe([RECIPE], {})
    parameters = found["parameters"]
    lines = [
        PREFACE.format(
            steps=config.train.steps,
            questions=config.train.questions_per_step,
            group=config.train.group_size,
            end=config.curriculum.end,
            heldout=config.eval.questions,
            start=", ".join(f"{value:.3f}" for value in found["untrained_f1"].values()),
            small=f"{parameters[TUNED] / 1e6:.2f}",
            large=f"{parameters[LARGER] / 1e6:.2f}",
            blocks=LARGER_BLOCKS,
        ),
        *by_seed(found["arms"]),
        "",
    ]
    lines += [f"- {verdict(one, found['arms'][one], other, found['arms'][other])}" for one, other in PAIRS]
    lines += ["", "| search in training | F1 gained, mean of the seeds | seconds a run |", "|---|---|---|"]
    for name, arm in found["arms"].items():
        gain = statistics.mean(run["f1"] - found["untrained_f1"][run["seed"]] for run in arm["runs"])
        lines.append(f"| {name} | {gain:+.3f} | {statistics.mean(run['seconds'] for run in arm['runs']):.0f} |")
    lines += ["", "## The simulators", "", QUALITY]
    lines += [
        "| simulator | asked for | " + " | ".join(f"`{name}`" for name in MEASURES) + " |",
        "|---|---|---|---|---|",
    ]
    for name, modes in found["quality"].items():
        for mode in ("useful", "noisy"):
            cells = [_interval(modes[mode][measure]) for measure in MEASURES]
            lines.append(f"| {name} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


PREFACE = """# Simulated against real search

Written by `make headline` from what its runs left (`bench/headline.py`); figures by hand are in no table.

Recipe `quickstart_sweep` with another search engine in training each time: {steps} GRPO steps of {questions} questions
x {group} trajectories, noise 0 to {end} for simulators and none for the real retriever. All are judged alike: greedy
play on {heldout} held-out questions with the real retriever, BM25. Untrained: {start}.

- prompted: the untrained policy ({small} million parameters), asked as any instruct model is;
- fine-tuned: the same weights after `zs-fast simulator simulator_quickstart`;
- larger fine-tuned: {blocks} layers for each one of these ({large} million parameters), the added ones starting as
  copies that add nothing, fine-tuned on the same examples;
- fine-tuned held to its mode: the fine-tuned one, up to three samples a search until useful documents hold the answer
  and noisy ones don't (`simulator.max_samples`);
- real retriever: BM25 in training too.

These are tiny models in an invented world. Larger language models may order the rows differently.
"""
QUALITY = """Held-out searches of the policy, repeated (`zs-fast simulator-quality`, see
[simulators.md](simulators.md)), up to three samples a search. The reader is the untrained policy.
"""


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "headline", help="where the runs lie")
    parser.add_argument("--parallel", type=int, default=PARALLEL, help="runs at a time")
    arguments = parser.parse_args(words)
    folder = arguments.folder.absolute()
    arms = variants(make_simulators(folder))
    run_all(planned(arms, folder), parallel=arguments.parallel)
    found = collect(folder, arms)
    target = RESULTS / device_slug(found["environment"])
    target.mkdir(parents=True, exist_ok=True)
    (target / "headline.json").write_text(json.dumps(found, indent=1) + "\n")
    (ROOT / "docs" / "headline.md").write_text(page(found))
    print(f"written: docs/headline.md, {target / 'headline.json'}")


if __name__ == "__main__":
    main()
