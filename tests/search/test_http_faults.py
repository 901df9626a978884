"""Every way a server can go wrong, in every phase: a bounded wait, and a success, a counted failure or one error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from tests.search.http_faults import FINAL, MODES, RETRIED, FaultServer, faulty, good_chat, good_retrieval
from zs_fast.config import GameConfig, RetrieverConfig, SamplingConfig, SimulatorConfig
from zs_fast.errors import PreflightError, SimulatorError
from zs_fast.evaluate import evaluate
from zs_fast.rollout import openai_engine
from zs_fast.rollout.openai_engine import OpenAIEngine
from zs_fast.rollout.play import Player
from zs_fast.search.backends import transport
from zs_fast.search.backends.remote import RemoteSearch
from zs_fast.search.codec import ByteCodec
from zs_fast.search.simulator import SimulatedSearch
from zs_fast.testing import ScriptedEngine
from zs_fast.types import Question, Role, StopReason, Trajectory

Client = Literal["retriever", "simulator"]
TIMEOUT_S, RETRIES = 0.4, 1
TIMED_OUT = ("silence", "slow headers", "slow body", "stalled body", "endless 102", "promised terabyte")
"""Modes that cost whole timeouts; their evaluations belong to the long suite."""
SLACK_S = 10.0
"""A machine with others on it is late; a hang lasts for ever."""
LONGEST_WAIT_S = 0.05
QUESTION = Question(id="q", text="who wrote emma?", answers=("Jane Austen",), source="s")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LONGEST_WAIT_S", LONGEST_WAIT_S)


@dataclass(slots=True)
class Stack:
    """A client of a faulty server, and players of one question that search through it."""

    server: FaultServer
    client: RemoteSearch | OpenAIEngine

    def player(self, max_failed_share: float) -> Player:
        policy = ScriptedEngine({Role.POLICY: searching_policy}, ByteCodec())
        search: Any = self.client
        remote = None
        if isinstance(self.client, OpenAIEngine):
            remote = self.client
            search = SimulatedSearch(remote, ByteCodec(), SimulatorConfig(documents=1), run_seed=0)
        return Player(
            policy,
            search,
            ByteCodec(),
            game=GameConfig(max_context_tokens=8192),
            sampling=SamplingConfig(),
            group_size=1,
            run_seed=0,
            max_failed_share=max_failed_share,
            simulator_engine=remote,
        )

    def num_requests_of(self, play: Callable[[], object]) -> int:
        before = len(self.server.requests)
        play()
        return len(self.server.requests) - before


def searching_policy(ids: list[int]) -> str:
    """Searches once, then answers with what it read."""
    text = bytes(ids).decode("utf-8", "replace")
    return "<answer>Jane Austen</answer>" if "Jane Austen</information>" in text else "<search>emma</search>"


def connect(client: Client, server: FaultServer) -> RemoteSearch | OpenAIEngine:
    settings = {"timeout_s": TIMEOUT_S, "max_retries": RETRIES}
    if client == "retriever":
        config = RetrieverConfig(url=server.url + "/retrieve", **settings)
        return RemoteSearch(config, documents=1, first_wait_s=0.005)
    return OpenAIEngine(SimulatorConfig(kind="openai", url=server.url + "/v1", **settings), first_wait_s=0.005)


def good_reply(client: Client) -> Callable[[bytes], bytes]:
    return good_retrieval if client == "retriever" else good_chat


@pytest.fixture(scope="module", params=["retriever", "simulator"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with faulty(good_reply(request.param)) as server:
        client = connect(request.param, server)
        yield Stack(server, client)
        client.close()


@pytest.fixture
def misbehaving(stack: Stack, request: pytest.FixtureRequest) -> Iterator[Stack]:
    yield stack
    stack.server.misbehave(None)
    if stack.server._listener is None:
        stack.server.listen()


def misbehave(server: FaultServer, mode: str, *, times: int = -1) -> None:
    if MODES[mode] is None:
        server.refuse()
    else:
        server.misbehave(MODES[mode], times=times)


def play(player: Player) -> Trajectory:
    player.submit(QUESTION, step=1, noise_probability=0.0)
    return player.collect(1)[0].trajectories[0]


def budget_s(mode: str) -> float:
    attempts = RETRIES + 1 if mode in RETRIED else 1
    return attempts * TIMEOUT_S + (attempts - 1) * LONGEST_WAIT_S


def test_there_are_enough_modes() -> None:
    assert len(MODES) == len(RETRIED) + len(FINAL) >= 35


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("client", ["retriever", "simulator"])
def test_at_the_start_it_is_one_clear_refusal(client: Client, mode: str) -> None:
    with faulty(good_reply(client)) as server:
        misbehave(server, mode)
        started = time.monotonic()
        if client == "simulator" and mode == "null content":
            connect(client, server).close()  # a server that answers a probe of one token with nothing is there
            return
        with pytest.raises(PreflightError) as caught:
            connect(client, server)
        assert time.monotonic() - started < TIMEOUT_S + SLACK_S
        name = "retriever.url" if client == "retriever" else "simulator.url"
        assert server.url in str(caught.value) and name in str(caught.value) and len(str(caught.value)) < 900


@pytest.mark.parametrize("mode", MODES)
def test_in_training_the_search_fails_and_is_not_trained_on(misbehaving: Stack, mode: str) -> None:
    misbehave(misbehaving.server, mode)
    started = time.monotonic()
    trajectories: list[Trajectory] = []
    requests = misbehaving.num_requests_of(lambda: trajectories.append(play(misbehaving.player(1.0))))
    assert time.monotonic() - started < budget_s(mode) * 1.1 + SLACK_S
    (trajectory,) = trajectories
    assert trajectory.stop_reason is StopReason.SEARCH_FAILED
    assert not trajectory.trainable and trajectory.reward == 0.0
    assert trajectory.turns[-1].observation == "" and trajectory.turns[-1].observation_ids == ()
    result = trajectory.turns[-1].search
    assert result is not None and result.failed and result.documents == ()
    attempts = RETRIES + 1 if mode in RETRIED else 1
    assert misbehaving.server.url in result.error and f"(attempt {attempts})" in result.error
    assert len(result.error) < 700
    if mode != "refused":
        assert requests == attempts, "the table of what is retried holds exactly"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "refused"])
def test_a_fault_that_passes_is_retried_if_that_can_help(misbehaving: Stack, mode: str) -> None:
    misbehave(misbehaving.server, mode, times=1)
    trajectory = play(misbehaving.player(1.0))
    if mode in RETRIED:
        assert trajectory.stop_reason is StopReason.ANSWER and trajectory.reward == 1.0 and trajectory.trainable
    else:
        assert trajectory.stop_reason is StopReason.SEARCH_FAILED and not trajectory.trainable


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.full) if mode in TIMED_OUT else mode for mode in MODES]
)
def test_in_an_evaluation_it_is_one_error_and_no_score(misbehaving: Stack, mode: str) -> None:
    misbehave(misbehaving.server, mode)
    started = time.monotonic()
    with pytest.raises(SimulatorError, match=r"1 of 1 searches failed.*max_failed_share") as caught:
        evaluate(misbehaving.player(0.0), [QUESTION], step=0)
    assert time.monotonic() - started < budget_s(mode) * 1.1 + SLACK_S
    assert misbehaving.server.url in str(caught.value) and len(str(caught.value)) < 1000


def test_after_all_that_the_same_clients_still_work(stack: Stack) -> None:
    trajectory = play(stack.player(0.0))
    assert trajectory.stop_reason is StopReason.ANSWER and trajectory.reward == 1.0


def test_the_simulators_client_takes_its_waits_from_the_same_place() -> None:
    assert openai_engine.wait_s is transport.wait_s


@pytest.mark.full
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_flapping_server_loses_no_search(stack: Stack, share: float) -> None:
    """Every mode in turn on a share of all requests, hundreds of questions at once: each search ends in one result."""
    import random

    draws = random.Random(0)
    modes = [behaviour for behaviour in MODES.values() if behaviour is not None]

    def flap(exchange: Any) -> None:
        if draws.random() < share:
            draws.choice(modes)(exchange)
        else:
            exchange.reply(exchange.good)

    stack.server.misbehave(flap)
    player = stack.player(1.0)
    for number in range(300):
        question = Question(id=f"q{number}", text="who wrote emma?", answers=("Jane Austen",), source="s")
        player.submit(question, step=1, noise_probability=0.0)
    groups = player.collect(300)
    stack.server.misbehave(None)
    reasons = {trajectory.stop_reason for group in groups for trajectory in group.trajectories}
    assert len(groups) == 300 and reasons <= {StopReason.ANSWER, StopReason.SEARCH_FAILED}
