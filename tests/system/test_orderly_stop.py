"""Signals, a phase that hangs, losses that are not finite, saves that fail: each ends a run in order, to be resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

import zs_fast.train
from zs_fast.errors import CheckpointError, EngineError, NonFiniteError
from zs_fast.learn.update import Updater
from zs_fast.recipe_files import load_recipe
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.system.checkpoint import CheckpointStore
from zs_fast.system.signals import Interrupted, OrderlyStop
from zs_fast.system.watchdog import Watchdog
from zs_fast.train import train
from zs_fast.types import StepStats

pytestmark = pytest.mark.usefixtures("no_pictures")

STEPS = 3
LAST = f"checkpoints/step_{STEPS}/model/model.safetensors"


def short_run(output: Path, **overrides: object):
    short = {
        "output": output,
        "simulator.kind": "bm25",
        "train.steps": STEPS,
        "train.questions_per_step": 1,
        "train.group_size": 2,
        "train.save_every": 0,
        "train.learning_rate": 1e-3,
        "eval.data": "",
    }
    return load_recipe(["quickstart"], {key: [str(value)] for key, value in (short | overrides).items()})


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("stops") / "whole"
    train(short_run(output))
    return output


def saved(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def ends_like(run: Path, whole: Path) -> None:
    train(short_run(run), resume=True)
    for name in ("metrics.jsonl", LAST):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("name", ["play", "score", "credit", "rollout_metrics"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_any_phase_saves_what_is_finished(whole_run, tmp_path, monkeypatch, name, number):
    """In a rollout it is heeded at once; in the phases that change weights, when the step is whole."""
    run, calls = tmp_path / "run", iter(range(10**6))
    real = getattr(zs_fast.train, name)

    def signalled(*arguments: object, **named: object) -> object:
        if next(calls) == 1:  # in the second step
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return real(*arguments, **named)

    monkeypatch.setattr(zs_fast.train, name, signalled)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        train(short_run(run))
    assert stopped.value.number == number and signal.getsignal(number) is before
    assert saved(run) == ["step_1" if name == "play" else "step_2"]
    monkeypatch.undo()
    ends_like(run, whole_run)


def test_signals_wait_where_something_is_half_done_and_a_second_one_does_not():
    stop, done = OrderlyStop(), []
    with stop.handling():
        with pytest.raises(Interrupted), stop.allowed():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("never")
        assert done == []
    stop = OrderlyStop()
    with stop.handling():
        os.kill(os.getpid(), signal.SIGHUP)
        done.append("finished")
        with pytest.raises(Interrupted, match="SIGHUP"), stop.allowed():
            done.append("never")
    assert done == ["finished"]
    child = os.fork()
    if child == 0:
        with OrderlyStop().handling():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGINT


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_says_so_and_exits_with_128_and_the_number(tmp_path, number, code):
    run, root = tmp_path / "run", Path(zs_fast.train.__file__).resolve().parents[1]
    flags = {"train.steps": 400, "train.questions_per_step": 1, "train.group_size": 2, "simulator.kind": "bm25"}
    words = [word for key, value in (flags | {"eval.data": ""}).items() for word in (f"--{key}", str(value))]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "zs_fast.cli", "train", "quickstart", "--output", str(run), *words],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, cwd=root,
    ) as process:  # fmt: skip
        log, deadline = run / "metrics.jsonl", time.monotonic() + 100
        while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert said.count("\n") == 1 and signal.Signals(number).name in said and "--resume" in said
    assert len(saved(run)) == 1


def test_a_phase_without_a_sign_of_life_ends_the_process_with_its_stacks(tmp_path, capfd):
    ended = threading.Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    with closing(Watchdog(0.2, tmp_path / "stacks.txt", end=end)) as watchdog:
        with watchdog.phase("rollout"):
            for _ in range(8):
                time.sleep(0.1)
                watchdog.beat()
            assert not codes
        time.sleep(0.5)
        assert not codes, "no phase is open"
        with watchdog.phase("update"):
            assert ended.wait(10)
    assert codes == [8]
    assert "test_orderly_stop.py" in (tmp_path / "stacks.txt").read_text()
    assert "update showed no sign of life" in capfd.readouterr().err


def test_steps_without_a_finite_update_stop_the_run_with_everything_saved(tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = Updater.update

    def broken(self: Updater, batch: object) -> StepStats:
        values = dict(real(self, batch).values)
        return StepStats(values=values | {"update/optimizer_steps": 0.0, "update/nonfinite_losses": 1.0})

    monkeypatch.setattr(Updater, "update", broken)
    with pytest.raises(NonFiniteError, match="2 steps in a row") as stopped:
        train(short_run(run, **{"train.max_nonfinite_steps": 2}))
    assert stopped.value.exit_code == 7 and saved(run) == ["step_2"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_published_nor_saved(whole_run, tmp_path, monkeypatch, value):
    """As a damaged optimizer state makes them."""
    run, calls = tmp_path / "run", iter(range(10))
    real = Updater.update

    def damages(self: Updater, batch: object) -> StepStats:
        stats = real(self, batch)
        if next(calls) == 1:
            with torch.no_grad():
                next(self.roles.policy.model.parameters()).view(-1)[3] = value
        return stats

    monkeypatch.setattr(Updater, "update", damages)
    with pytest.raises(NonFiniteError, match=r"after step 2.*not finite"):
        train(short_run(run, **{"train.save_every": 1}))
    assert saved(run) == ["step_1"]
    monkeypatch.undo()
    ends_like(run, whole_run)


def test_a_failing_disk_stops_the_run_after_the_budget_is_spent(whole_run, tmp_path, monkeypatch):
    real, failing = CheckpointStore._write, {1, 2}

    def write(self: CheckpointStore, folder: Path, step: int, *rest: object) -> None:
        if step in failing:
            raise OSError(28, "No space left on device")
        real(self, folder, step, *rest)

    monkeypatch.setattr(CheckpointStore, "_write", write)
    run = tmp_path / "goes_on"
    train(short_run(run, **{"train.save_every": 1}))
    assert saved(run) == ["step_3"]
    assert (run / LAST).read_bytes() == (whole_run / LAST).read_bytes()
    with pytest.raises(CheckpointError, match="No space left") as stopped:
        train(short_run(tmp_path / "stops", **{"train.save_every": 1, "train.max_failed_saves": 1}))
    assert stopped.value.exit_code == 4
    failing.add(STEPS)
    with pytest.raises(CheckpointError):
        train(short_run(tmp_path / "last", **{"train.save_every": 0}))


def child_that(deed, output: Path, **overrides: object) -> tuple[int, str, float]:
    """(exit code, what it said, seconds from the deed on) of a run in a child whose engine does `deed` at its 20th
    step."""
    said, spoke = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sys.stderr = os.fdopen(spoke, "w")
            real, calls = TransformersEngine.step, iter(range(10**9))

            def step(engine: TransformersEngine) -> object:
                if next(calls) == 20:
                    (output / "deed").touch()
                    deed()
                return real(engine)

            TransformersEngine.step = step
            train(short_run(output, **overrides))
            os._exit(0)
        except EngineError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(error.exit_code)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(99)
    os.close(spoke)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ended = time.time()
    with os.fdopen(said, "rb") as file:
        return code, file.read().decode(), ended - (output / "deed").stat().st_mtime


def dies() -> None:
    raise EngineError("the engine is gone")


@pytest.mark.full
@pytest.mark.parametrize("hangs", [lambda: time.sleep(600), lambda: threading.Event().wait()], ids=["sleeps", "waits"])
def test_an_engine_that_hangs_ends_the_run_at_the_deadline_and_a_resume_ends_the_same(whole_run, tmp_path, hangs):
    run, limit_s = tmp_path / "run", 10.0
    code, said, seconds = child_that(hangs, run, **{"train.phase_timeout_s": limit_s})
    assert code == 8 and "rollout showed no sign of life" in said
    assert seconds < limit_s * 1.25 + 5.0
    assert "test_orderly_stop.py" in (run / "stacks.txt").read_text()
    ends_like(run, whole_run)


@pytest.mark.full
def test_an_engine_that_dies_ends_the_run_and_a_resume_ends_the_same(whole_run, tmp_path):
    run = tmp_path / "run"
    code, said, seconds = child_that(dies, run)
    assert code == EngineError("").exit_code and "the engine is gone" in said and seconds < 5.0
    ends_like(run, whole_run)
