"""F41: the simulator's server dies in the middle of a step and comes back: the run goes on to the same bytes.

What it had answered is in the journal, and is not asked for again. In full, it dies before each of its replies in turn.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

import zs_fast.train
from tests.faults.toy import chat_reply, outcome, toy
from tests.search.http_faults import Exchange, FaultServer, faulty
from zs_fast.errors import SimulatorError
from zs_fast.search.backends import transport
from zs_fast.train import train

STEPS = 3


class Mortal:
    """Answers this many requests, then refuses all others."""

    def __init__(self, answers: int) -> None:
        self.left, self.answered = answers, Counter[bytes]()

    def __call__(self, exchange: Exchange) -> None:
        if b'"ping"' in exchange.body:
            exchange.reply(exchange.good)
        elif self.left > 0:
            self.left -= 1
            self.answered[exchange.body] += 1
            exchange.reply(exchange.good)
        else:
            exchange.reply(b"going down", "503 Service Unavailable")


def run(server: FaultServer, output, mortal: Mortal, *, resume: bool = False) -> None:
    server.misbehave(mortal)
    settings = {
        "simulator.kind": "openai",
        "simulator.url": f"{server.url}/v1",
        "simulator.max_retries": 1,
        "simulator.max_failed_share": 0.0,
        "train.questions_per_step": 2,
        "train.group_size": 3,
        "engine.slots": 6,
        "game.max_turns": 3,
    }
    train(toy(output, STEPS, **settings), resume=resume)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(transport, "LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(zs_fast.train, "reward_curve", lambda *_: None)
    monkeypatch.setattr(zs_fast.train, "write_report", lambda *_: None)


@pytest.mark.parametrize(
    "every", [pytest.param(False, id="once"), pytest.param(True, id="each", marks=pytest.mark.full)]
)
def test_a_simulator_that_dies_and_comes_back_does_not_show(tmp_path, record_property, every):
    with faulty(chat_reply) as server:
        run(server, tmp_path / "whole", whole := Mortal(10**9))
        replies = sum(whole.answered.values())
        assert replies >= 6, "it searches"
        for dies_after in range(replies) if every else [replies // 2]:
            output, first, second = tmp_path / f"run_{dies_after}", Mortal(dies_after), Mortal(10**9)
            with pytest.raises(SimulatorError, match=r"searches failed, more than simulator\.max_failed_share"):
                run(server, output, first)
            rows = output / "metrics.jsonl"
            finished = len(rows.read_text().splitlines()) if rows.exists() else 0
            saved = [path.name for path in (output / "checkpoints").glob("step_*")]
            assert saved == ([f"step_{finished}"] if finished else [])
            run(server, output, second, resume=True)
            assert outcome(output, STEPS) == outcome(tmp_path / "whole", STEPS), f"dead after {dies_after} replies"
            assert first.answered + second.answered == whole.answered, "a reply was asked for twice, or never"
    record_property("trials", replies if every else 1)


def test_the_reply_is_a_function_of_the_request():
    assert chat_reply(b"a") == chat_reply(b"a") != chat_reply(b"b") and json.loads(chat_reply(b"a"))
