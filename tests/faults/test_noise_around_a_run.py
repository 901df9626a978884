"""F56: neither the order in which replies come, nor Python's hash seed, nor the clock shows in a run's results.

ZS_FAULT_TRIALS is the number of noisy runs (1 without it), each in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.faults.toy import outcome

RUNS = int(os.environ.get("ZS_FAULT_TRIALS", "1"))
SEED = int(os.environ.get("ZS_FAULT_SEED", "0"))
STEPS = 3
ROOT = Path(__file__).resolve().parents[2]

RUN = """
import json, random, sys, time
from pathlib import Path
from tests.faults.toy import chat_reply, toy
from tests.search.http_faults import faulty
import zs_fast.train

output, noise, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
draws = random.Random(noise)
zs_fast.train.reward_curve = zs_fast.train.write_report = lambda *_: None
inside = most = 0
order = []

def late(exchange):
    order.append(len(exchange.body))
    if noise:
        time.sleep(draws.random() * 0.05)
    exchange.reply(exchange.good)

if noise:
    real, shift = time.time, draws.choice([-86400.0, 86400.0])
    time.time = lambda: real() + shift + draws.uniform(-2, 2)  # a day off, and neither even nor rising
    from zs_fast.rollout.transformers_engine import TransformersEngine
    step = TransformersEngine.step
    def slow(engine):
        time.sleep(draws.random() * 0.003)
        return step(engine)
    TransformersEngine.step = slow

with faulty(chat_reply) as server:
    server.misbehave(late)
    zs_fast.train.train(toy(output, steps, **{
        "simulator.kind": "openai", "simulator.url": server.url + "/v1", "train.group_size": 4, "engine.slots": 8,
        "game.max_turns": 3,
    }))
print(json.dumps([hash("a string"), time.time(), len(order)]))
"""


def run(output: Path, noise: str) -> tuple[dict[str, str], list[float]]:
    """(what must not differ, the process's string hash, clock and number of requests)."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTHONHASHSEED": noise or "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(output), noise, str(STEPS)],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return outcome(output, STEPS), json.loads(done.stdout.splitlines()[-1])


def test_noise_does_not_show(tmp_path, record_property):
    expected, (hash_of_quiet, clock_of_quiet, requests) = run(tmp_path / "quiet", "")
    assert requests > STEPS, "it searches"
    for number in range(RUNS):
        noise = str(1 + SEED * 1000 + number)
        found, (hashed, clock, _) = run(tmp_path / noise, noise)
        assert hashed != hash_of_quiet and abs(clock - clock_of_quiet) > 80_000, "there is noise"
        assert found == expected, f"noise {noise} shows"
    record_property("trials", RUNS)
