"""F01: a run is killed at instants it does not choose, resumed, killed again; its end is that of one left alone.

ZS_FAULT_TRIALS is the number of kills (6 without it); about a third of them strike while the run resumes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

import zs_fast.train
from tests.faults.toy import toy
from zs_fast.system.checkpoint import CheckpointStore, fault
from zs_fast.system.journal import RunJournal
from zs_fast.train import train

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("no_pictures")]

KILLS = int(os.environ.get("ZS_FAULT_TRIALS", "6"))
SEED = int(os.environ.get("ZS_FAULT_SEED", "0"))
STEPS = 4
KILLS_PER_RUN = 4
"""More, and a run would hardly get further than its resume."""


def small_run(output: Path):
    return toy(
        output,
        STEPS,
        **{
            "simulator.kind": "model",
            "simulator.max_new_tokens": 60,
            "train.learning_rate": 1e-3,
            "train.save_every": 2,
            "train.eval_every": 2,
            "eval.data": "quickstart:heldout",
            "eval.questions": 1,
            "eval.search": "bm25",
        },
    )


def start(output: Path, calls: Path) -> int:
    """The run in a child of its own, which notes each search reply that it puts into the journal."""
    child = os.fork()
    if child:
        return child
    try:
        log, real = os.open(calls, os.O_WRONLY | os.O_CREAT | os.O_APPEND), RunJournal._append

        def append(journal: RunJournal, head: dict, body: bytes = b"") -> None:
            real(journal, head, body)
            if "search" in head:
                os.write(log, (json.dumps([journal._path.name, head["search"]]) + "\n").encode())

        RunJournal._append = append
        train(small_run(output), resume=True)
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zs_fast.train, "reward_curve", lambda *_: None)
        patch.setattr(zs_fast.train, "write_report", lambda *_: None)
        yield


def test_every_killed_run_ends_in_the_bytes_of_one_left_alone(tmp_path, record_property):
    whole = tmp_path / "whole"
    started = time.monotonic()
    assert wait(start(whole, tmp_path / "calls_of_whole")) == 0
    whole_s = time.monotonic() - started
    assert (tmp_path / "calls_of_whole").read_text(), "it searches"
    draws, kills, number = random.Random(SEED), 0, 0
    while kills < KILLS:
        run, calls = tmp_path / f"run_{number}", tmp_path / f"calls_{number}"
        number += 1
        for attempt in range(KILLS_PER_RUN + 1):
            child = start(run, calls)
            if attempt == KILLS_PER_RUN or kills == KILLS:
                assert wait(child) == 0
                break
            # Stratified over the length of a run; two of three resumes are left time to get past their set-up.
            time.sleep(whole_s * (draws.random() if attempt % 3 else (kills % 10 + draws.random()) / 10))
            os.kill(child, signal.SIGKILL)
            if wait(child) == 0:
                break
            kills += 1
            for path in (run / "checkpoints").glob("step_*"):
                assert fault(path, int(path.name[5:])) == "", f"a kill left a damaged checkpoint (seed {SEED})"
        last = f"checkpoints/step_{STEPS}/model/model.safetensors"
        for name in ("metrics.jsonl", "rollouts.jsonl", last):
            assert (run / name).read_bytes() == (whole / name).read_bytes(), f"{name}, run {number}, seed {SEED}"
        searches = calls.read_text().splitlines()
        assert CheckpointStore(run, 2).newest() is not None
        # A reply is in the journal until a checkpoint covers its step, so that none is ever recorded twice.
        assert len(searches) == len(set(searches)), f"a finished search was asked again (seed {SEED})"
    record_property("trials", kills)
