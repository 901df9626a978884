"""Bad input as a person meets it: one clear line on stderr, the right exit code, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zs_fast import cli

ROW = {"id": "1", "question": "who wrote emma?", "golden_answers": ["Jane Austen"], "data_source": "nq"}
EARLIER = '{"step": 1}\n'
KEY = "sk-canary-51c7"


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    return end.value.code


@pytest.fixture
def output(tmp_path) -> Path:
    """A run folder in which an earlier run left its metrics before it had a checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(EARLIER)
    return folder


def check(code: int, expected_code: int, words: list[str], output: Path, capfd) -> None:
    captured = capfd.readouterr()
    assert code == expected_code, captured.err
    assert len(captured.err.splitlines()) == 1 and captured.err.startswith("zs-fast: "), captured.err
    for word in words:
        assert word in captured.err
    assert (output / "metrics.jsonl").read_text() == EARLIER
    assert {path.name for path in output.iterdir()} <= {"metrics.jsonl", "lock"}


def parquet(path: Path, **changes: object) -> Path:
    row = {key: value for key, value in (ROW | changes).items() if value is not None}
    pq.write_table(pa.Table.from_pylist([row]), path)
    return path


def json_lines(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"id": "2"} | changes) + "\n")
    return path


DATA = {
    "no question column": (parquet, {"question": None}, ["bad.parquet", "question"]),
    "no answer column": (parquet, {"golden_answers": None}, ["bad.parquet", "golden_answers"]),
    "an empty gold list": (parquet, {"golden_answers": pa.array([], pa.string()).to_pylist()}, ["golden_answers"]),
    "numbers as answers": (parquet, {"golden_answers": [1813, 7]}, ["bad.parquet", "golden_answers"]),
    "an empty gold list in one line": (json_lines, {"golden_answers": []}, ["line 2", "golden_answers", "empty list"]),
    "a number in one line": (json_lines, {"golden_answers": ["x", 7]}, ["line 2", "golden_answers", "7"]),
}


@pytest.mark.parametrize("write, changes, words", DATA.values(), ids=DATA)
@pytest.mark.parametrize("flag", ["--data", "--eval.data"])
def test_bad_data(write, changes, words, flag, tmp_path, output, capfd):
    path = write(tmp_path / ("bad.parquet" if write is parquet else "bad.jsonl"), **changes)
    code = call("train", "quickstart", "--output", output, flag, path)
    check(code, 2, [str(path), *words], output, capfd)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_missing_model(command, output, capfd):
    code = call(command, "quickstart", "--output", output, "--model.path", "no_such_model")
    check(code, 3, ["no_such_model", "no such folder or file"], output, capfd)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"name = \n"], ids=["a folder", "no text", "no TOML"])
def test_an_unreadable_recipe(content, tmp_path, output, capfd):
    path = tmp_path / "mine.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    check(call("train", path, "--output", output), 2, [str(path)], output, capfd)


def test_a_remote_simulator_that_is_down_and_no_word_of_the_key(output, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    remote = ["--simulator.kind", "openai", "--simulator.url", "http://127.0.0.1:9/v1"]
    code = call("train", "quickstart", "--output", output, *remote)
    err = capfd.readouterr().err
    assert code == 3 and len(err.splitlines()) == 1, err
    assert "http://127.0.0.1:9/v1" in err and "simulator.url" in err
    assert (output / "metrics.jsonl").read_text() == EARLIER
    assert KEY not in err and not any(KEY in path.read_text(errors="replace") for path in output.iterdir())


def test_an_evaluation_never_replaces_a_training_runs_files(output, capfd):
    (output / "checkpoints").mkdir()
    assert call("eval", "quickstart", "--output", output) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and str(output) in err and "another --output" in err


SFT = ["--sft.steps", "1", "--sft.batch_size", "1"]


def test_bad_examples_for_fine_tuning(tmp_path, output, capfd):
    path = tmp_path / "examples.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 3}\n')
    code = call("sft", "quickstart", "--data", path, "--output", output, *SFT)
    check(code, 2, [str(path), "row 2", "completion"], output, capfd)
    assert call("sft", "quickstart", "--output", output, *SFT) == 2
    assert "holds questions, not examples" in capfd.readouterr().err


def test_fine_tuning_leaves_a_model_and_is_not_repeated_over_it(tmp_path, capfd):
    path = tmp_path / "examples.jsonl"
    path.write_text('{"prompt": "who wrote emma?", "completion": "Jane Austen"}\n')
    words = ["sft", "quickstart", "--data", path, "--output", tmp_path / "tuned", *SFT]
    assert call(*words, "--json") == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 1 and (Path(summary["model"]) / "model.safetensors").is_file()
    assert call(*words) == 2
    assert "exists already" in capfd.readouterr().err
    assert call(*words, "--output", tmp_path / "other", "--sft.max_tokens", "2") == 2
    assert f"{path}: example 1 has" in capfd.readouterr().err
