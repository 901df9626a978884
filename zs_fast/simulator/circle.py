"""`zs-fast simulator`: from a policy and a real search engine to a simulator that was measured, in one command.

    <output>/collect             real searches over the questions of `data`               zs-fast collect
    <output>/labels              useful and noisy examples, some questions held out       zs-fast label
    <output>/tuned/model         the simulator: a peft or model folder                    zs-fast sft
    <output>/quality_tuned       what it writes for the held-out searches                 zs-fast simulator-quality
    <output>/quality_prompted    the same of the model it was made from, only prompted
    <output>/summary.json        both, side by side

Each step is skipped once its own summary is there, and collecting goes on where it was stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from zs_fast.config import RunConfig, write_config
from zs_fast.errors import ConfigError
from zs_fast.learn.sft import sft_command
from zs_fast.models.load import whole_model
from zs_fast.ranks import hold_run_folder
from zs_fast.recipe_files import load_recipe
from zs_fast.setup import use_device
from zs_fast.simulator import collect as collecting
from zs_fast.simulator import label as labelling
from zs_fast.simulator import quality as judging
from zs_fast.simulator.records import write_json

TUNED_FILE = "sft.json"


def make_simulator(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Run all steps that are not done; the summary. Raises ConfigError when the folder holds another run's."""
    output = config.output or Path("runs") / config.name
    steps = Steps(config, output)
    if (output / "config.toml").exists():
        _check_same(config, output, resume=resume)
    with ExitStack() as stack:
        hold_run_folder(output, stack)
        write_config(config, output / "config.toml")
        done: dict[str, Any] = {}
        for name, summary, run in steps.all():
            if (output / name / summary).exists():
                print(f"{name}: done before", flush=True)
            else:
                print(f"{name} ...", flush=True)
                run(output / name)
            done[name] = _read(output / name / summary)
        summary_of_all = _summary(output, done)
        write_json(output / "summary.json", summary_of_all)
    return summary_of_all


class Steps:
    """What each step runs, on what the ones before it left in `output`."""

    def __init__(self, config: RunConfig, output: Path) -> None:
        self._config = config
        self._output = output
        self._base = config.simulator.path if config.simulator.kind == "model" else whole_model(config.model.path)

    def all(self) -> list[tuple[str, str, Callable[[Path], object]]]:
        """(folder, the file that says it is done, what does it) in order."""
        return [
            ("collect", collecting.SUMMARY_FILE, self._collect),
            ("labels", labelling.SUMMARY_FILE, self._label),
            ("tuned", TUNED_FILE, self._tune),
            ("quality_tuned", judging.SUMMARY_FILE, self._judge_tuned),
            ("quality_prompted", judging.SUMMARY_FILE, self._judge_prompted),
        ]

    def _with(self, output: Path, **update: Any) -> RunConfig:
        return self._config.model_copy(update={"output": output} | update)

    def _collect(self, output: Path) -> None:
        collecting.collect(self._with(output), resume=True)

    def _label(self, output: Path) -> None:
        labelling.label(self._with(output, data=str(self._output / "collect")))

    def _tune(self, output: Path) -> None:
        shutil.rmtree(output / "model", ignore_errors=True)  # of a fine-tuning that was killed as it saved
        labels = self._output / "labels"
        config = self._with(
            output,
            data=str(labels / "train_alpaca.jsonl"),
            model=self._config.model.model_copy(update={"path": self._base}),
            sft=self._config.sft.model_copy(
                update={"validation_data": str(labels / "validation_alpaca.jsonl"), "validation_fraction": 0.0}
            ),
            quality=self._config.quality.model_copy(update={"data": self._searches()}),
        )
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / TUNED_FILE, tune(config))

    def _judge_tuned(self, output: Path) -> None:
        self._judge(output, path=str(self._output / "tuned" / "model"), template="fine_tuned")

    def _judge_prompted(self, output: Path) -> None:
        self._judge(output, path=self._base, template="prompted")

    def _judge(self, output: Path, **simulator: str) -> None:
        config = self._with(
            output,
            simulator=self._config.simulator.model_copy(update={"kind": "model", "adapter": ""} | simulator),
            quality=self._config.quality.model_copy(update={"data": self._searches()}),
        )
        judging.simulator_quality(config)

    def _searches(self) -> str:
        return str(self._output / "labels" / "validation_searches.jsonl")


def tune(config: RunConfig) -> dict[str, Any]:
    """`zs-fast sft`, with the simulator's quality at each validation where `quality.during_training` asks for it."""
    device = use_device(config)
    wanted = config.quality.data and config.quality.during_training
    return sft_command(config, device, quality=judging.quality_in_training(config, device) if wanted else None)


def _check_same(config: RunConfig, output: Path, *, resume: bool) -> None:
    if not resume:
        raise ConfigError(f"{output} holds a run already. Go on with --resume, or choose another --output.")
    before = load_recipe([output / "config.toml"])
    if before.model_copy(update={"output": None}) != config.model_copy(update={"output": None}):
        raise ConfigError(
            f"{output / 'config.toml'} differs from this configuration, so its finished steps can't be used. Resume "
            "with the same recipe and flags, or choose another --output."
        )


def _read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _summary(output: Path, done: dict[str, Any]) -> dict[str, Any]:
    return {"simulator": str(output / "tuned" / "model")} | done
