"""The run's files: exact numbers, whole lines, cut back on resume; and the places that numbers are copied to."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import struct
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from zs_fast.config import LogConfig
from zs_fast.errors import CheckpointError, CheckpointUnusableError, PreflightError
from zs_fast.system.console import LiveScreen, PlainScreen, Screen, make_screen
from zs_fast.system.files import FileOperations
from zs_fast.system.jsonl import JsonlWriter, cut_back, encode_row, number, read_rows
from zs_fast.system.metrics import RunLog, choose_rollouts
from zs_fast.types import (
    Answer,
    Completion,
    FinishReason,
    Group,
    Invalid,
    Question,
    Role,
    Scores,
    Search,
    SearchMode,
    SearchRequest,
    SearchResult,
    StopReason,
    Trajectory,
    Turn,
)

EXAMPLES = int(os.environ.get("ZS_HYPOTHESIS_EXAMPLES", "200"))


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def quiet() -> Screen:
    return PlainScreen(0, Console(file=io.StringIO()))


def open_log(folder: Path, log: LogConfig | None = None, **kwargs: Any) -> RunLog:
    return RunLog(folder, log or LogConfig(), decode=decode, screen=quiet(), **kwargs)


def make_groups(step: int, num_questions: int = 2, group_size: int = 2) -> list[Group]:
    groups = []
    for index in range(num_questions):
        question = Question(id=f"nq_{index}", text=f"who wrote “emma” {index}?", answers=("Jane Austen",), source="nq")

        def completion(text: str) -> Completion:
            ids = tuple(text.encode())
            return Completion(
                request_id=0, role=Role.POLICY, token_ids=ids, logprobs=(), finish_reason=FinishReason.STOP
            )

        trajectories = []
        for sample in range(group_size):
            request = SearchRequest(
                step=step, question=question, sample=sample, turn=0, query="emma", noise_probability=0.25
            )
            found = SearchResult(request=request, documents=("Jane \ud800 Austen\x00",), mode=SearchMode.NOISY)
            turns = (
                Turn(
                    completion=completion("<search>emma</search>"),
                    action=Search("emma"),
                    observation="Doc",
                    search=found,
                ),
                Turn(completion=completion("hm"), action=Invalid("no_action"), observation="again"),
                Turn(completion=completion("<answer>Jané</answer>"), action=Answer("Jané")),
            )
            trajectories.append(
                Trajectory(
                    question=question,
                    sample=sample,
                    prompt_ids=tuple(b"prompt"),
                    turns=turns,
                    stop_reason=StopReason.ANSWER,
                    scores=Scores(f1=1 / 3),
                    reward=1 / 3,
                )
            )
        groups.append(Group(question=question, trajectories=tuple(trajectories)))
    return groups


def write_steps(folder: Path, steps: range, log: LogConfig | None = None) -> None:
    with open_log(folder, log) as run_log:
        for step in steps:
            values = {"reward/mean": step / 7, "loss": math.nan if step == 2 else -step / 3}
            run_log.step(step, values, {"seconds": 0.1}, make_groups(step))
            run_log.sync()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_float_comes_back_bit_for_bit(value: float) -> None:
    line = encode_row({"step": 1, "x": number(value)})
    found = float(json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["x"])
    assert struct.pack("<d", found) == struct.pack("<d", value) or (math.isnan(found) and math.isnan(value))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text(st.characters(), max_size=40))
def test_every_text_is_one_line_of_valid_utf8_and_comes_back(text: str) -> None:
    line = encode_row({"text": text})
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    found = json.loads(line.decode("utf-8"))["text"]
    assert found == text or found.encode("utf-16", "surrogatepass").decode("utf-16", "replace") == text.encode(
        "utf-16", "surrogatepass"
    ).decode("utf-16", "replace")


def test_tensors_numpy_numbers_and_integers_are_taken() -> None:
    assert number(torch.tensor(0.5)) == 0.5  # type: ignore[arg-type]
    assert number(np.float32(0.1)) == float(np.float32(0.1))  # type: ignore[arg-type]
    assert json.dumps([number(3), number(True), number(2**60 + 1)]) == "[3, 1, 1152921504606846977]"
    assert [number(math.nan), number(math.inf), number(-math.inf)] == ["nan", "inf", "-inf"]


def test_metrics_and_timings_never_mix(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.record(0, {"eval/f1": 0.25}, {"eval/seconds": 3.5})
        log.step(1, {"reward/mean": 0.5}, {"rollout/seconds": 1.25})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "eval/f1": 0.25}\n{"step": 1, "reward/mean": 0.5}\n'
    assert (tmp_path / "timings.jsonl").read_text() == (
        '{"step": 0, "eval/seconds": 3.5}\n{"step": 1, "rollout/seconds": 1.25}\n'
    )


def test_the_same_run_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_steps(tmp_path / name, range(1, 5))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("checkpoint", range(7))
def test_resume_from_any_step_gives_the_bytes_of_an_uninterrupted_run(tmp_path: Path, checkpoint: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    write_steps(whole, range(1, 7))
    write_steps(broken, range(1, 7))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (broken / name).open("ab") as file:
            file.write(b'{"step": 7, "reward/me')  # torn by the crash
    with open_log(broken) as log:
        assert log.truncate(checkpoint) == []
        assert [row["step"] for row in read_rows(broken / "metrics.jsonl")] == list(range(1, checkpoint + 1))
    write_steps(broken, range(checkpoint + 1, 7))
    assert files_of(broken) == files_of(whole)


def test_truncate_before_the_first_step_keeps_only_what_was_measured_before_it(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.record(0, {"eval/f1": 0.25})
        log.step(1, {"x": 1.0}, {})
        log.truncate(0)
        assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0]
        log.truncate(-1)
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""
        log.step(1, {"x": 2.0}, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "x": 2.0}\n'


def test_truncate_tells_of_rows_that_are_gone(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    with open_log(tmp_path) as log:
        warnings = log.truncate(5)
    assert len(warnings) == 1 and "no row for 3 of 5 steps, first 3" in warnings[0]


@pytest.mark.parametrize("broken", [b"not json\n", b"[1]\n", b"\xff\n", b'{"no_step": 1}\n', b'{"step": "3"}\n', b"\n"])
def test_a_broken_row_inside_a_file_is_one_error_and_the_file_is_kept(tmp_path: Path, broken: bytes) -> None:
    content = b'{"step": 1}\n' + broken + b'{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(CheckpointUnusableError, match=r"metrics\.jsonl"):
        cut_back(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_cutting_back_is_atomic_at_each_operation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(encode_row({"step": step}) for step in range(1, 9))
    cut = b"".join(encode_row({"step": step}) for step in range(1, 4))

    class Counted(FileOperations):
        """Operation `at` fails, and so does all that follows, as if the process were gone."""

        def __init__(self, at: int) -> None:
            self.at, self.count = at, 0

        def __getattribute__(self, name: str) -> Any:
            attribute = super().__getattribute__(name)
            if name.startswith("_") or not callable(attribute):
                return attribute

            def counted(*arguments: Any) -> Any:
                self.count += 1
                if self.count > self.at:
                    if name == "close":
                        attribute(*arguments)
                    raise OSError(errno.EIO, "Input/output error")
                return attribute(*arguments)

            return counted

    outcomes = []
    for at in range(100):
        path.write_bytes(whole)
        files = Counted(at)
        try:
            assert cut_back(path, 3, files=files) == 5
        except CheckpointError:
            outcomes.append(path.read_bytes())
            assert outcomes[-1] in (whole, cut)
        else:
            break
    assert path.read_bytes() == cut
    assert outcomes.count(whole) >= 4 and outcomes.count(cut) >= 1


def test_a_full_disk_is_one_error_and_no_torn_row(tmp_path: Path) -> None:
    class Full(FileOperations):
        left = 100

        def write(self, descriptor: int, data: memoryview) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = os.write(descriptor, data[: self.left])
            self.left -= taken
            return taken

    writer = JsonlWriter(tmp_path / "metrics.jsonl", files=Full())
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        for step in range(100):
            writer.append({"step": step, "x": 0.5})
    assert caught.value.exit_code == 4 and "free there" in str(caught.value)
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert content.endswith(b"\n") and [row["step"] for row in read_rows(writer.path)] == list(
        range(content.count(b"\n"))
    )
    writer.close()
    writer.close()


def test_rows_reach_the_system_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.step(1, {"x": 1.0}, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "x": 1.0}\n'
    log.close()


def test_rollouts_are_whole_and_one_per_question_first(tmp_path: Path) -> None:
    groups = make_groups(1, num_questions=3, group_size=2)
    chosen = choose_rollouts(groups, 4)
    assert [(trajectory.question.id, trajectory.sample) for trajectory in chosen] == [
        ("nq_0", 0),
        ("nq_1", 0),
        ("nq_2", 0),
        ("nq_0", 1),
    ]
    assert choose_rollouts(groups, 0) == [] and choose_rollouts([], 3) == [] and len(choose_rollouts(groups, 99)) == 6
    with open_log(tmp_path, LogConfig(rollouts_per_step=4)) as log:
        log.step(1, {}, {}, groups)
    rows = list(read_rows(tmp_path / "rollouts.jsonl"))
    assert len(rows) == 4
    row = rows[0]
    assert row["question"] == "who wrote “emma” 0?" and row["answers"] == ["Jane Austen"] and row["step"] == 1
    assert (
        row["answer"] == "Jané" and row["f1"] == 1 / 3 and row["stop_reason"] == "answer" and row["prompt"] == "prompt"
    )
    first, second, third = row["turns"]
    assert first["text"] == "<search>emma</search>" and first["action"] == {"kind": "search", "text": "emma"}
    assert first["observation"] == "Doc"
    assert first["search"]["documents"] == ["Jane \ud800 Austen\x00"] and first["search"]["mode"] == "noisy"
    assert second["action"] == {"kind": "invalid", "text": "no_action"} and second["search"] is None
    assert third["action"] == {"kind": "answer", "text": "Jané"}


def test_plain_lines_where_output_is_no_terminal(tmp_path: Path) -> None:
    output = io.StringIO()
    screen = make_screen(200, "run", Console(file=output, width=60))
    assert isinstance(screen, PlainScreen)
    metrics = {
        "reward/mean": 0.3141,
        "reward/f1": 0.3,
        "trajectory/searches": 1.2,
        "curriculum/noise_probability": 0.125,
    }
    timings = {
        "rollout/tokens_per_second": 12345.6,
        "rollout/seconds": 3.0,
        "update/seconds": 1.1,
        "rollout/cpu_seconds": 9,
    }
    screen.step(12, metrics, timings)
    screen.step(13, {}, {})
    screen.progress("rollout", 1, 2)
    screen.note("from [bold]/a/path[/bold]")
    screen.close()
    assert output.getvalue().splitlines() == [
        "step 12/200  reward 0.314  f1 0.300  searches 1.20  noise 0.12  tokens/s 12,346  seconds 4.1",
        "step 13/200  reward -  f1 -  searches -  noise -  tokens/s -  seconds -",
        "from [bold]/a/path[/bold]",
    ]


def test_a_table_with_bars_on_a_terminal() -> None:
    output = io.StringIO()
    screen = make_screen(3, "my [run]", Console(file=output, width=100, force_terminal=True, legacy_windows=False))
    assert isinstance(screen, LiveScreen)
    for step in (1, 2):
        screen.progress("rollout", step, 4)
        screen.step(step, {"reward/mean": step / 4}, {})
    screen.note("hello [x]")
    screen.close()
    text = output.getvalue()
    assert "0.250" in text and "0.500" in text and "my [run]" in text and "2/3" in text and "hello [x]" in text


def test_tensorboard_gets_every_number_and_forgets_what_a_resume_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, LogConfig(tensorboard=True)) as log:
        for step in (1, 2, 3):
            log.step(step, {"reward/mean": float(step)}, {"seconds": 0.5})
        log.truncate(1)
        log.step(2, {"reward/mean": 20.0}, {})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 1.0), (2, 20.0)]
    assert "timings/seconds" in events.Tags()["scalars"]


def test_sinks_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PreflightError, match="pip install wandb"):
        open_log(tmp_path, LogConfig(wandb=True))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PreflightError, match="pip install tensorboard"):
        open_log(tmp_path, LogConfig(tensorboard=True))
    open_log(tmp_path).close()  # neither is touched unless asked for


def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    calls: list[tuple[str, Any]] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", (step, values))), finish=lambda: calls.append(("finish", None))
    )

    def init(**kwargs: Any) -> Any:
        calls.append(("init", kwargs))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return calls


def test_wandb_continues_the_same_run_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_wandb(monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "canary-91d2")
    for step in (1, 2):
        with open_log(tmp_path, LogConfig(wandb=True, wandb_project="p"), name="n", config={"seed": 3}) as log:
            log.step(step, {"x": 0.5}, {"seconds": 1.0})
    kinds = [kind for kind, _ in calls]
    assert kinds == ["init", "log", "finish", "init", "log", "finish"]
    first, second = (value for kind, value in calls if kind == "init")
    assert first == second and first["project"] == "p" and first["name"] == "n" and first["resume"] == "allow"
    assert first["config"] == {"seed": 3} and len(first["id"]) == 32
    assert calls[1][1] == (1, {"x": 0.5, "timings/seconds": 1.0})
    assert "canary" not in repr(calls) and not any(b"canary" in data for data in files_of(tmp_path).values())


def test_wandb_without_a_key_refuses_instead_of_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_wandb(monkeypatch)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(PreflightError, match="WANDB_API_KEY is not set"):
        open_log(tmp_path, LogConfig(wandb=True))
    assert calls == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    open_log(tmp_path, LogConfig(wandb=True)).close()
    assert [kind for kind, _ in calls] == ["init", "finish"]
