"""The remote engine against a real HTTP server on loopback, well-behaved and not."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
from aiohttp import web

from zs_fast.config import SimulatorConfig
from zs_fast.errors import EngineError, PreflightError
from zs_fast.rollout.openai_engine import MAX_REPLY_BYTES, OpenAIEngine
from zs_fast.types import Completion, FinishReason, Role, Sampling

Handler = Callable[[web.Request, dict, int], Awaitable[web.StreamResponse]]


class Server:
    """A chat-completions server whose every reply is written by `handler(request, body, number)`; 0 is the probe."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.runner, self.port = self.do(self._start())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    async def _start(self):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._reply)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, runner.addresses[0][1]

    async def _reply(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.handler(request, body, len(self.bodies) - 1)
        finally:
            self.in_flight -= 1

    def stop(self) -> None:
        if self.runner is not None:
            self.do(self.runner.cleanup())
            self.runner = None

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


def chat(text: str | None, reason: str = "stop") -> web.Response:
    return web.json_response(
        {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}
    )


def healthy_then(reply: Handler) -> Handler:
    async def handler(request: web.Request, body: dict, number: int) -> web.StreamResponse:
        return chat("p") if number == 0 else await reply(request, body, number)

    return handler


@contextmanager
def served(handler: Handler) -> Iterator[Server]:
    server = Server(handler)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def engine_on(server: Server, **settings) -> Iterator[OpenAIEngine]:
    config = SimulatorConfig(kind="openai", **{"url": server.url, "max_retries": 2, "timeout_s": 5.0} | settings)
    engine = OpenAIEngine(config, first_wait_s=0.01)
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: OpenAIEngine, *prompts: str, **sampling) -> list[Completion]:
    settings = Sampling(**{"max_new_tokens": 600, "temperature": 0.8} | sampling)
    for number, prompt in enumerate(prompts):
        engine.add(number, list(prompt.encode()), settings, role=Role.SIMULATOR)
    completions: list[Completion] = []
    deadline = time.monotonic() + 30
    while engine.num_unfinished:
        assert time.monotonic() < deadline, "the engine never answered"
        completions += engine.step()
        time.sleep(0.005)
    return sorted(completions, key=lambda completion: completion.request_id)


def text_of(completion: Completion) -> str:
    return bytes(completion.token_ids).decode()


def test_a_reply_comes_back_as_bytes_and_the_request_is_zerosearchs():
    async def reply(request, body, number):
        return chat("Doc 1: Zürich")

    with served(healthy_then(reply)) as server, engine_on(server, remote_model="") as engine:
        (completion,) = ask(engine, "Query: wo?")
    assert text_of(completion) == "Doc 1: Zürich" and completion.finish_reason is FinishReason.STOP
    assert completion.role is Role.SIMULATOR and completion.logprobs == () and completion.error == ""
    assert server.bodies[1] == {
        "model": "",
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "text", "text": "Query: wo?"}]},
        ],
        "temperature": 0.8,
        "max_tokens": 600,
    }


def test_a_cut_reply_says_so():
    async def reply(request, body, number):
        return chat("Doc 1: cut", "length")

    with served(healthy_then(reply)) as server, engine_on(server) as engine:
        assert ask(engine, "q")[0].finish_reason is FinishReason.LENGTH


def test_a_server_error_is_retried_and_then_answered():
    async def reply(request, body, number):
        return web.Response(status=500) if number < 3 else chat("there")

    with served(healthy_then(reply)) as server, engine_on(server) as engine:
        (completion,) = ask(engine, "q")
        assert text_of(completion) == "there"
        assert engine.stats().retries == 2 and engine.stats().failures == 0


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_retries_are_bounded_and_then_the_completion_fails_loudly(status):
    async def reply(request, body, number):
        return web.Response(status=status, text="overloaded")

    with served(healthy_then(reply)) as server, engine_on(server) as engine:
        (completion,) = ask(engine, "q")
        assert completion.finish_reason is FinishReason.FAILED and completion.token_ids == ()
        assert f"HTTP {status}: overloaded" in completion.error and server.url in completion.error
        assert len(server.bodies) == 1 + 3 and engine.stats().failures == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_errors_that_no_retry_can_mend_fail_at_once(status):
    async def reply(request, body, number):
        return web.Response(status=status, text="no")

    with served(healthy_then(reply)) as server, engine_on(server) as engine:
        (completion,) = ask(engine, "q")
        assert completion.finish_reason is FinishReason.FAILED and f"HTTP {status}" in completion.error
        assert len(server.bodies) == 2


def test_a_slow_reply_times_out_as_a_whole_even_if_bytes_trickle():
    async def reply(request, body, number):
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100):
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    with served(healthy_then(reply)) as server, engine_on(server, timeout_s=0.3, max_retries=1) as engine:
        started = time.monotonic()
        (completion,) = ask(engine, "q")
        assert completion.finish_reason is FinishReason.FAILED and "0.3 s" in completion.error
        assert time.monotonic() - started < 4 and len(server.bodies) == 3


@pytest.mark.parametrize(
    "body", [b"not json", b"{}", b"[]", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"[" * 5000]
)
def test_a_malformed_reply_fails_without_a_retry(body):
    async def reply(request, _, number):
        return web.Response(body=body, content_type="application/json")

    with served(healthy_then(reply)) as server, engine_on(server) as engine:
        (completion,) = ask(engine, "q")
        assert completion.finish_reason is FinishReason.FAILED
        assert "no chat completion" in completion.error or "no JSON" in completion.error
        assert len(server.bodies) == 2


def test_null_content_fails():
    async def reply(request, body, number):
        return chat(None)

    with served(healthy_then(reply)) as server, engine_on(server) as engine:
        (completion,) = ask(engine, "q")
        assert completion.finish_reason is FinishReason.FAILED and "no text" in completion.error


def test_an_endless_reply_is_cut_off_while_it_is_read():
    sent = [0]

    async def reply(request, body, number):
        response = web.StreamResponse()
        await response.prepare(request)
        while sent[0] < 256 * MAX_REPLY_BYTES:
            await response.write(b"x" * 65536)
            sent[0] += 65536
        return response

    with served(healthy_then(reply)) as server, engine_on(server) as engine:
        (completion,) = ask(engine, "q")
        assert completion.finish_reason is FinishReason.FAILED and str(MAX_REPLY_BYTES) in completion.error
    assert sent[0] < 128 * MAX_REPLY_BYTES  # what the sockets hold on top of the limit is far less


def test_an_endless_error_page_is_cut_off_too():
    async def reply(request, body, number):
        response = web.StreamResponse(status=404)
        await response.prepare(request)
        for _ in range(10_000):
            await response.write(b"x" * 65536)
        return response

    with served(healthy_then(reply)) as server, engine_on(server) as engine:
        (completion,) = ask(engine, "q")
        assert "HTTP 404" in completion.error and len(completion.error) < 500


def test_lone_surrogates_in_a_reply_become_valid_utf8():
    async def reply(request, body, number):
        return web.Response(
            text='{"choices": [{"message": {"content": "a\\ud800b"}, "finish_reason": "stop"}]}',
            content_type="application/json",
        )

    with served(healthy_then(reply)) as server, engine_on(server) as engine:
        assert text_of(ask(engine, "q")[0]) == "a\ufffdb"


def test_redirects_are_not_followed_and_carry_no_key(monkeypatch):
    monkeypatch.setenv("ZS_TEST_KEY", "secret")

    async def elsewhere(request, body, number):
        return chat("stolen")

    async def reply(request, body, number):
        raise web.HTTPTemporaryRedirect(other.url + "/chat/completions")

    with served(elsewhere) as other, served(healthy_then(reply)) as server:
        with engine_on(server, api_key_env="ZS_TEST_KEY") as engine:
            (completion,) = ask(engine, "q")
        assert completion.finish_reason is FinishReason.FAILED and "redirect" in completion.error
        assert other.bodies == []


def test_only_the_named_key_is_sent_and_nothing_else_of_the_environment(monkeypatch):
    monkeypatch.setenv("ZS_TEST_KEY", "mine")
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "http://leak.invalid" if name.endswith("URL") else "leak")

    async def reply(request, body, number):
        return chat("x")

    with served(reply) as server, engine_on(server, api_key_env="ZS_TEST_KEY") as engine:
        ask(engine, "q")
    for headers in server.headers:
        assert headers["Authorization"] == "Bearer mine"
        assert "leak" not in json.dumps(headers)


def test_the_key_is_withheld_from_plain_http_to_another_machine(monkeypatch):
    from zs_fast.rollout import openai_engine

    monkeypatch.setenv("ZS_TEST_KEY", "secret")
    monkeypatch.setattr(openai_engine, "is_loopback", lambda host: False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    async def reply(request, body, number):
        return web.Response(status=401, text="who are you?")

    with served(reply) as server:
        with pytest.raises(PreflightError, match=r"HTTP 401.*ZS_TEST_KEY was not sent.*https"):
            engine_on(server, api_key_env="ZS_TEST_KEY").__enter__()
        assert "secret" not in json.dumps(server.headers)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("127.0.0.1.evil.com", False),
        ("localhost.evil.com", False),
        ("0x7f.1", False),
    ],
)
def test_what_counts_as_this_machine(host, loopback):
    from zs_fast.search.backends.transport import is_loopback

    assert is_loopback(host) is loopback


def test_a_dead_server_is_refused_at_start():
    async def reply(request, body, number):
        return chat("x")

    with served(reply) as server:
        url = server.url
    started = time.monotonic()
    with pytest.raises(PreflightError, match=rf"{url}.*does not answer.*simulator\.url"):
        OpenAIEngine(SimulatorConfig(kind="openai", url=url))
    assert time.monotonic() - started < 10
    assert not [thread for thread in threading.enumerate() if thread.name == "openai-engine"]


@pytest.mark.parametrize("url", ["ftp://x/v1", "127.0.0.1:6001", "http:///v1", ""])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(PreflightError, match=r"simulator\.url"):
        OpenAIEngine(SimulatorConfig(kind="openai", url=url))


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(PreflightError, match=r"simulator\.api_key_env") as caught:
        OpenAIEngine(SimulatorConfig(kind="openai", url="https://me:secret51c7@127.0.0.1:9/v1"))
    assert "secret51c7" not in str(caught.value)


def test_a_server_that_dies_in_mid_run_fails_every_open_request():
    async def reply(request, body, number):
        await asyncio.sleep(60)
        return chat("too late")

    with served(healthy_then(reply)) as server, engine_on(server) as engine:
        for number in range(5):
            engine.add(number, [65], Sampling(max_new_tokens=5), role=Role.SIMULATOR)
        while len(server.bodies) < 6:
            time.sleep(0.01)
        server.stop()
        completions: list[Completion] = []
        deadline = time.monotonic() + 20
        while engine.num_unfinished and time.monotonic() < deadline:
            completions += engine.step()
            time.sleep(0.01)
    assert len(completions) == 5
    assert all(c.finish_reason is FinishReason.FAILED and "attempt 3" in c.error for c in completions)


def test_all_requests_are_in_flight_together_up_to_the_limit():
    async def reply(request, body, number):
        await asyncio.sleep(0.2)
        return chat(body["messages"][1]["content"][0]["text"].upper())

    with served(healthy_then(reply)) as server, engine_on(server, max_in_flight=6) as engine:
        completions = ask(engine, *(f"q{number}" for number in range(12)))
    assert [text_of(completion) for completion in completions] == [f"Q{number}" for number in range(12)]
    assert server.most_in_flight == 6


def test_an_aborted_request_never_comes_back_even_if_its_id_is_used_again():
    async def reply(request, body, number):
        text = body["messages"][1]["content"][0]["text"]
        await asyncio.sleep(0.0 if text == "quick" else 0.3)
        return chat(text.upper())

    with served(healthy_then(reply)) as server, engine_on(server) as engine:
        for number, prompt in enumerate(("quick", "slow")):
            engine.add(number, list(prompt.encode()), Sampling(max_new_tokens=600), role=Role.SIMULATOR)
        deadline = time.monotonic() + 10
        while engine._finished.empty():
            assert time.monotonic() < deadline, "the quick one never answered"
            time.sleep(0.005)
        engine.abort(Role.SIMULATOR, [0, 1, 2])
        assert engine.num_unfinished == 0
        completions = ask(engine, "again", "and again")
        assert [text_of(completion) for completion in completions] == ["AGAIN", "AND AGAIN"]
        time.sleep(0.4)
        assert engine.step() == []


def test_the_engine_refuses_the_policy_repeats_and_use_after_close():
    async def reply(request, body, number):
        if number:
            await asyncio.sleep(5)
        return chat("x")

    with served(reply) as server, engine_on(server) as engine:
        with pytest.raises(EngineError, match="policy"):
            engine.add(0, [65], Sampling(max_new_tokens=1), role=Role.POLICY)
        engine.add(0, [65], Sampling(max_new_tokens=1), role=Role.SIMULATOR)
        with pytest.raises(EngineError, match="twice"):
            engine.add(0, [65], Sampling(max_new_tokens=1), role=Role.SIMULATOR)
        engine.close()
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            engine.add(1, [65], Sampling(max_new_tokens=1), role=Role.SIMULATOR)
