"""F50: one of two processes is killed, stopped, raises or leaves, in each phase of a step: both end in time, and a
resume ends in the bytes of a run left alone.

The ranks are forked here, and meet as torchrun's do; no launcher is there that would end the other one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed

import zs_fast.train
from tests.faults.toy import outcome, toy
from zs_fast.errors import ZsError
from zs_fast.learn.update import Updater
from zs_fast.rollout.child_server import free_port
from zs_fast.system.checkpoint import CheckpointStore
from zs_fast.system.weights import WeightPublisher
from zs_fast.train import train

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo"),
]

STEPS = 3
RANK_TIMEOUT_S = 12.0
"""Longest wait for another rank; that long a stopped one goes unnoticed."""
DEADLINE_S = RANK_TIMEOUT_S + 10.0
UNCLEAN = 70


def leaves() -> None:
    os._exit(3)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def raises() -> None:
    raise RuntimeError("a bug in one rank")


DEEDS = (is_killed, is_stopped, raises, leaves)
PHASES = {
    "rollout": (zs_fast.train, "play"),
    "score": (zs_fast.train, "score"),
    "update": (Updater, "update"),
    "sync": (WeightPublisher, "publish"),
    "save": (CheckpointStore, "save"),
    "evaluation": (zs_fast.train, "evaluate"),
}
"""Phase -> what is called in it once a step."""
VICTIM = {"save": 0}
"""The rank that fails; only the main one saves."""


def config(output: Path):
    return toy(
        output,
        STEPS,
        **{
            "train.questions_per_step": 2,
            "train.save_every": 1,
            "train.eval_every": 1,
            "train.rank_timeout_s": RANK_TIMEOUT_S,
            "eval.data": "quickstart:heldout",
            "eval.questions": 2,
            "eval.search": "bm25",
            "eval.at_start": "false",
        },
    )


def fail_in(phase: str, deed: Callable[[], None], output: Path) -> None:
    owner, name = PHASES[phase]
    real, calls = getattr(owner, name), iter(range(10**9))

    def failing(*arguments: object, **named: object) -> object:
        if next(calls) == 1:
            (output / "failed").touch()
            deed()
        return real(*arguments, **named)

    setattr(owner, name, failing)


def start(output: Path, phase: str = "", deed: Callable[[], None] | None = None, *, resume: bool = False) -> list[int]:
    """Two ranks; the victim does its deed in the second step's phase, and leaves the time in a file."""
    port, children = free_port(), []
    for number in range(2):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            os.environ |= {
                "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            if deed is not None and number == VICTIM.get(phase, 1):
                fail_in(phase, deed, output)
            train(config(output), resume=resume)
            os._exit(0)
        except ZsError as error:
            print(f"rank {number}: {type(error).__name__}: {error}", flush=True)
            os._exit(error.exit_code)
        except BaseException as error:
            print(f"rank {number}: {type(error).__name__}: {error}", flush=True)
            os._exit(UNCLEAN)
    return children


def wait(children: list[int], deadline_s: float = 300.0) -> list[int]:
    """Exit codes; fails if they are not over in time."""
    codes: dict[int, int] = {}
    ends = time.monotonic() + deadline_s
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (status := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(status[1])
        if time.monotonic() > ends:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
            pytest.fail(f"ranks were still there after {deadline_s} s; exit codes so far: {codes}")
        time.sleep(0.02)
    return [codes[child] for child in children]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("ranks") / "whole"
    assert wait(start(output)) == [0, 0]
    return outcome(output, STEPS)


@pytest.mark.full
@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
@pytest.mark.parametrize("phase", PHASES)
def test_both_end_in_time_and_a_resume_ends_the_same(whole, tmp_path, phase, deed):
    output = tmp_path / "run"
    children = start(output, phase, deed)
    victim = VICTIM.get(phase, 1)
    if deed is is_stopped:  # it is the other that has to notice
        (code,) = wait([children[1 - victim]])
        os.kill(children[victim], signal.SIGKILL)
        os.waitpid(children[victim], 0)
        codes = [code]
    else:
        codes = wait(children)
    assert time.time() - (output / "failed").stat().st_mtime < DEADLINE_S
    survivor = codes[0] if deed is is_stopped else codes[1 - victim]
    assert survivor not in (0, UNCLEAN), "the other rank says what happened, as an error of its own"
    assert wait(start(output, resume=True)) == [0, 0]
    assert outcome(output, STEPS) == whole
