"""zs-fast as a person or a script meets it: words in, exit code, stdout and stderr out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import pytest

from zs_fast import cli
from zs_fast.errors import CheckpointUnusableError, DataError, EngineError, ZsError
from zs_fast.recipe_files import fields, recipe_names


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('name = "example"\n')
    return str(path)


@pytest.fixture
def trained(monkeypatch):
    """Stands in for zs_fast.train; what `train` was called with lands in the list."""
    calls = []
    module = types.ModuleType("zs_fast.train")

    def train(config, *, resume):
        calls.append((config, resume))
        return {"f1_after": 0.5, "loss": float("nan"), "name": config.name}

    module.train = train
    monkeypatch.setitem(sys.modules, "zs_fast.train", module)
    return calls


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    return end.value.code


def test_train_gets_the_merged_config(recipe, trained):
    words = ["--output", "out", "--data", "q.jsonl", "--seed=3", "--train.steps", "4", "--algorithm.name", "reinforce"]
    assert call("train", recipe, *words, "--model.path", "m", "--resume") == 0
    config, resume = trained[0]
    assert (str(config.output), config.data, config.seed, config.train.steps) == ("out", "q.jsonl", 3, 4)
    assert (config.algorithm.name, config.model.path, config.name, resume) == ("reinforce", "m", "example", True)


def test_words_may_stand_in_any_order(recipe, trained):
    assert call("train", "--resume", "--model.chat_template", recipe, "--train.betas", "0.5", "0.6") == 0
    assert call("train", "--train.betas", "0.5", "0.6", "--model.chat-template", "false", recipe) == 0
    assert [config.model.chat_template for config, _ in trained] == [True, False]
    assert [config.train.betas for config, _ in trained] == [(0.5, 0.6)] * 2


def test_a_list_flag_without_words_is_the_empty_list(tmp_path, trained):
    path = tmp_path / "masked.toml"
    path.write_text('[algorithm]\nmask_stop_reasons = ["turn_limit"]\n')
    assert call("train", str(path), "--algorithm.mask_stop_reasons", "--seed", "1") == 0
    assert trained[0][0].algorithm.mask_stop_reasons == ()


def test_json_is_the_last_line_and_has_no_nan(recipe, trained, capsys):
    assert call("train", recipe, "--json") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"f1_after": 0.5, "loss": None, "name": "example"}


WRONG = {
    "unknown flag": (["--train.stepz", "3"], 2, ["train.stepz", '"3"', "did you mean train.steps"]),
    "flag without its section": (["--steps", "3"], 2, ["did you mean train.steps or sft.steps"]),
    "bad value": (["--train.steps", "abc"], 2, ["train.steps", '"abc"', "whole number >= 1"]),
    "bad choice": (["--algorithm.name", "grpq"], 2, ["'reinforce' or 'grpo'", "did you mean grpo?"]),
    "no value": (["--train.steps"], 2, ["--train.steps needs a value", "whole number >= 1"]),
    "bad switch": (["--model.chat_template", "maybe"], 2, ["model.chat_template", '"maybe"', "true or false"]),
    "unknown recipe": (["nosuchrecipe"], 2, ["nosuchrecipe", "path, ending in .toml"]),
    "empty value": (["--train.steps="], 2, ["train.steps", "whole number >= 1"]),
    "negative": (["--train.steps", "-1"], 2, ["train.steps = -1"]),
}


@pytest.mark.parametrize("words, code, expected", WRONG.values(), ids=WRONG)
def test_wrong_words_are_one_clean_line(words, code, expected, recipe, trained, capsys):
    assert call("train", recipe, *words) == code
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("zs-fast: "), err
    assert "Traceback" not in err and not trained
    for part in expected:
        assert part in err


@pytest.mark.parametrize(
    "words, part", [([], "usage"), (["tran"], "did you mean train"), (["train"], "needs a recipe")]
)
def test_what_is_missing_is_said(words, part, capsys):
    assert call(*words) == 2
    captured = capsys.readouterr()
    assert part in captured.out + captured.err


@pytest.mark.parametrize("error", [ZsError, DataError, EngineError, CheckpointUnusableError])
def test_errors_of_a_run_are_a_line_and_their_code(error, recipe, trained, monkeypatch, capsys):
    def fail(config, *, resume):
        raise error("row 3 of q.jsonl: no answers")

    monkeypatch.setattr(sys.modules["zs_fast.train"], "train", fail)
    assert call("train", recipe) == error.exit_code
    assert capsys.readouterr().err == "zs-fast: row 3 of q.jsonl: no answers\n"
    monkeypatch.setenv("ZS_FAST_TRACEBACK", "1")
    assert call("train", recipe) == error.exit_code
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_no_clean_line(recipe, trained, monkeypatch):
    """Only errors raised on purpose are turned into a line; anything else keeps its traceback."""

    def fail(config, *, resume):
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys.modules["zs_fast.train"], "train", fail)
    with pytest.raises(RuntimeError):
        cli.main(["train", recipe])


def test_interrupt_has_its_own_code(recipe, trained, monkeypatch, capsys):
    def interrupt(config, *, resume):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["zs_fast.train"], "train", interrupt)
    assert call("train", recipe) == 130
    assert "--resume" in capsys.readouterr().err


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "COLUMNS": "400"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)


def test_a_bare_install_names_the_extra(recipe, package="pydantic"):
    script = f"import sys; sys.modules[{package!r}] = None\nfrom zs_fast.cli import main; main(['train', {recipe!r}])"
    done = run_script(script)
    assert done.returncode == 3, done.stderr
    assert done.stderr == f"zs-fast: zs-fast train needs the package {package}, which is not installed: " + (
        "pip install 'zs-fast[train]'\n"
    )


@pytest.mark.parametrize("command", ["train", "eval", "sft"])
def test_help_shows_every_field_without_importing_torch(command):
    script = (
        "import sys\n"
        "from zs_fast.cli import main\n"
        "try:\n"
        f"    main([{command!r}, '--help'])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    for name, field in fields().items():
        assert f"--{name} " in done.stdout, name
        first = field.description.split()[0].strip("`")
        assert first in done.stdout, (name, first)
    for name in recipe_names():
        assert name in done.stdout


def test_doctor_json_names_what_is_missing_and_its_fix(capsys):
    assert call("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"devices", "triton", "compiled", "attention", "vllm", "extras", "disk", "versions", "data"} <= set(report)
    assert all(one["what"] and one["fix"] for one in report["missing"])
    assert report["devices"][0]["name"] == "cpu"


def test_doctor_says_what_an_absent_package_costs(monkeypatch, capsys):
    from zs_fast import doctor

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "pyarrow" else real(name))
    assert call("doctor") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert any("pyarrow" in line and "zs-fast[train]" in line for line in lines)


def test_bench_outside_a_checkout_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("zs_fast.__file__", str(tmp_path / "site-packages" / "zs_fast" / "__init__.py"))
    assert call("bench", "ops") == 3
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "checkout" in err


def test_bench_names_its_subjects(capsys):
    assert call("bench", "opps") == 2
    assert "ops" in capsys.readouterr().err
