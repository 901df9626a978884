"""F53: a run takes no more memory, files and threads after thousands of steps than after a few.

ZS_FAULT_TRIALS is the number of steps (24 without it: enough for files and threads, and for gross leaks of memory).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest

import zs_fast.train
from tests.faults.toy import toy
from zs_fast.system.metrics import RunLog
from zs_fast.train import train

STEPS = int(os.environ.get("ZS_FAULT_TRIALS", "24"))
LIMIT_KIB = 50.0
"""Of growth in a step."""
NOISE_KIB = 8192.0
"""Standard deviation of what allocators keep and give back; a short run's growth is hardly told from it."""
WARM_UP = 10


class Held(NamedTuple):
    """What the process holds after a step."""

    resident_kib: int
    files: int
    threads: int


def held() -> Held:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Held(int(status["VmRSS"].split()[0]), len(os.listdir("/proc/self/fd")), int(status["Threads"]))


def leaks(samples: list[Held]) -> list[str]:
    """What grows over the steps after the warm-up; empty when nothing does."""
    settled = samples[max(WARM_UP, len(samples) // 3) :]
    slope = float(numpy.polyfit(range(len(settled)), [sample.resident_kib for sample in settled], 1)[0])
    found = []
    error_of_slope = NOISE_KIB * 12**0.5 / len(settled) ** 1.5
    if slope > LIMIT_KIB + 4 * error_of_slope:
        found.append(f"resident memory grows by {slope:.1f} KiB a step")
    quarter = max(1, len(settled) // 4)
    for name in ("files", "threads"):
        # The least of each quarter: a timer's thread that is just going may be seen once in hundreds of steps.
        least = {
            min(getattr(sample, name) for sample in settled[start : start + quarter])
            for start in range(0, len(settled) - quarter + 1, quarter)
        }
        if len(least) > 1:
            found.append(f"{name} grow: {sorted(least)}")
    return found


def test_a_run_holds_no_more_after_many_steps(tmp_path, record_property):
    """In a child, whose memory is the run's alone."""
    told = tmp_path / "held.jsonl"
    child = os.fork()
    if child == 0:
        try:
            real = RunLog.step

            def step(log: RunLog, *arguments: object, **named: object) -> None:
                real(log, *arguments, **named)
                with told.open("a") as file:
                    file.write(json.dumps(held()) + "\n")

            RunLog.step = step
            zs_fast.train.reward_curve = zs_fast.train.write_report = lambda *_: None
            train(toy(tmp_path / "run", STEPS, **{"train.save_every": 5, "log.rollouts_per_step": 2}))
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    samples = [Held(*json.loads(line)) for line in told.read_text().splitlines()]
    assert len(samples) == STEPS
    assert leaks(samples) == [], samples[:: max(1, STEPS // 20)]
    record_property("trials", STEPS)


@pytest.mark.parametrize("grows", Held._fields)
def test_a_leak_would_be_found(grows):
    step = {"resident_kib": 100 if STEPS >= 500 else 4000, "files": 1, "threads": 1}[grows]
    flat = Held(500_000, 20, 5)
    samples = [flat._replace(**{grows: getattr(flat, grows) + step * number}) for number in range(STEPS)]
    assert leaks([flat] * STEPS) == [] and len(leaks(samples)) == 1
