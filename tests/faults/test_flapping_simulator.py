"""F42, F43: a simulator's server that fails three requests in ten changes no byte; one that comes back is not overrun.

ZS_FAULT_TRIALS is the number of steps of the run behind the flapping server (6 without it), and that of the requests
which wait for one to come back (300 without it).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import Counter

import pytest

from tests.faults.toy import chat_reply, outcome, toy
from tests.search.http_faults import Exchange, _reset, faulty, good_retrieval
from zs_fast.config import RetrieverConfig, SimulatorConfig
from zs_fast.rollout import openai_engine
from zs_fast.rollout.openai_engine import OpenAIEngine
from zs_fast.search.backends import remote, transport
from zs_fast.search.backends.remote import RemoteSearch
from zs_fast.train import train
from zs_fast.types import FinishReason, Question, Role, Sampling, SearchRequest

STEPS = int(os.environ.get("ZS_FAULT_TRIALS", "6"))
SEED = int(os.environ.get("ZS_FAULT_SEED", "0"))
SHARE = 0.3


class Flapping:
    """Fails a share of all attempts, in turn in six ways; which ones is a function of seed, request and attempt."""

    def __init__(self) -> None:
        self.attempts: Counter[bytes] = Counter()
        self.failed = 0
        self._lock = threading.Lock()

    def __call__(self, exchange: Exchange) -> None:
        if not exchange.body.startswith(b"{") or b'"ping"' in exchange.body:
            exchange.reply(exchange.good)  # the start's probe is not retried
            return
        with self._lock:
            attempt = self.attempts[exchange.body]
            self.attempts[exchange.body] += 1
        draw = hashlib.sha256(f"{SEED} {attempt} ".encode() + exchange.body).digest()
        if draw[0] >= SHARE * 256:
            exchange.reply(exchange.good)
            return
        with self._lock:
            self.failed += 1
        ways = [
            lambda: exchange.reply(b"overloaded", "503 Service Unavailable"),
            lambda: exchange.reply(b"", "429 Too Many Requests", headers="Retry-After: 0\r\n"),
            lambda: exchange.reply(b"", "500 Internal Server Error"),
            lambda: exchange.reply(exchange.good[:-9], length=len(exchange.good)),  # and hangs up
            lambda: exchange.send(b"HTTP/1.1 200 OK\r\nContent-Le"),
            lambda: _reset(exchange),
        ]
        ways[draw[1] % len(ways)]()


def test_a_run_behind_a_flapping_server_is_the_run_behind_a_sound_one(tmp_path, monkeypatch, record_property):
    monkeypatch.setattr("zs_fast.train.reward_curve", lambda *_: None)
    monkeypatch.setattr("zs_fast.train.write_report", lambda *_: None)
    monkeypatch.setattr(transport, "LONGEST_WAIT_S", 0.01)
    with faulty(chat_reply) as server:
        settings = {"simulator.kind": "openai", "simulator.url": f"{server.url}/v1", "simulator.max_retries": 12}
        settings |= {"simulator.max_failed_share": 0.0, "seed": SEED}
        train(toy(tmp_path / "sound", STEPS, **settings))
        flapping = Flapping()
        server.misbehave(flapping)
        train(toy(tmp_path / "flapping", STEPS, **settings))
    rows = [json.loads(line) for line in (tmp_path / "flapping" / "metrics.jsonl").read_text().splitlines()]
    searches = sum(row["search/count"] for row in rows)
    assert flapping.failed >= max(1, searches * SHARE / 2 - 1) and searches >= STEPS / 4, "the fault did happen"
    assert all(row.get("search/failed_share", 0.0) == 0.0 and row["stop/search_failed"] == 0.0 for row in rows)
    assert outcome(tmp_path / "flapping", STEPS) == outcome(tmp_path / "sound", STEPS)
    record_property("trials", flapping.failed)


QUEUED, CAP = int(os.environ.get("ZS_FAULT_TRIALS", "300")), 24


class Returning:
    """Nobody answers until `returns`; then each request takes a moment. Counts how many are inside at once."""

    def __init__(self) -> None:
        self.is_back = threading.Event()
        self.inside = self.most = self.first_attempts = 0
        self._lock = threading.Lock()

    def __call__(self, exchange: Exchange) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.first_attempts += not self.is_back.is_set()
        try:
            if self.is_back.is_set() or b'"ping"' in exchange.body:
                time.sleep(0.02)
                exchange.reply(exchange.good)
            else:
                exchange.reply(b"", "503 Service Unavailable")
        finally:
            with self._lock:
                self.inside -= 1


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """By attempt: how long clients chose to wait."""
    chosen: dict[int, list[float]] = {}

    def noted(attempt: int, jitter: float, *, first_s: float, asked_s: float) -> float:
        wait = transport.wait_s(attempt, jitter, first_s=first_s, asked_s=asked_s)
        chosen.setdefault(attempt, []).append(wait)
        return wait

    monkeypatch.setattr(openai_engine, "wait_s", noted)
    monkeypatch.setattr(remote, "wait_s", noted)
    return chosen


def in_step(waits: dict[int, list[float]]) -> bool:
    """Do clients come back at the same instants?"""
    first = sorted(waits[0])
    return len(set(first)) < 0.9 * len(first) or first[-1] < 2 * first[0]


def test_a_simulators_server_that_comes_back_is_not_overrun(waits, record_property) -> None:
    with faulty(chat_reply) as server:
        server.misbehave(returning := Returning())
        config = SimulatorConfig(kind="openai", url=f"{server.url}/v1", max_retries=20, max_in_flight=CAP)
        engine = OpenAIEngine(config, first_wait_s=0.02)
        for number in range(QUEUED):
            engine.add(number, [65], Sampling(max_new_tokens=5, seed=number), role=Role.SIMULATOR)
        completions, started = [], time.monotonic()
        while len(completions) < QUEUED and time.monotonic() - started < 60:
            completions += engine.step()
            if returning.first_attempts > 2 * CAP:
                returning.is_back.set()
            time.sleep(0.002)
        engine.close()
    assert len(completions) == QUEUED
    assert all(completion.finish_reason is FinishReason.STOP for completion in completions)
    assert CAP / 2 < returning.most <= CAP
    assert len(waits[0]) >= CAP and not in_step(waits)
    record_property("trials", QUEUED)


def test_a_retriever_that_comes_back_is_not_overrun(waits, record_property) -> None:
    question = Question(id="q", text="x", answers=("y",), source="s")
    with faulty(good_retrieval) as server:
        config = RetrieverConfig(url=f"{server.url}/retrieve", max_retries=20, max_in_flight=CAP, batch_size=1)
        search = RemoteSearch(config, documents=1, first_wait_s=0.02)
        server.misbehave(returning := Returning())
        for number in range(QUEUED):
            search.submit(
                SearchRequest(
                    step=1, question=question, sample=number, turn=0, query=f"q{number}", noise_probability=0.0
                )
            )
        results, started = [], time.monotonic()
        while len(results) < QUEUED and time.monotonic() - started < 60:
            results += search.poll()
            if returning.first_attempts > 2 * CAP:
                returning.is_back.set()
            time.sleep(0.002)
        search.close()
    assert len(results) == QUEUED and not any(result.failed for result in results)
    assert CAP / 2 < returning.most <= CAP
    assert len(waits[0]) >= CAP and not in_step(waits)
    record_property("trials", QUEUED)


def test_clients_without_jitter_would_come_back_in_step() -> None:
    assert in_step({0: [0.5] * 20}) and in_step({0: [0.5, 0.6] * 10})
