"""Keys go to the server they are for and nowhere else, even where that server repeats them in all it says."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.search.http_faults import Exchange, faulty, good_chat
from zs_fast.config import RetrieverConfig, SimulatorConfig
from zs_fast.errors import PreflightError
from zs_fast.rollout.openai_engine import OpenAIEngine
from zs_fast.search.backends.remote import RemoteSearch
from zs_fast.search.backends.transport import HideKey, Key
from zs_fast.types import Question, Role, Sampling, SearchRequest

KEY = 'canary/51c7+0e"d9'
FORMS = {KEY, quote(KEY, safe=""), quote(KEY), json.dumps(KEY)[1:-1], "canary/51c7", "canary%2F51c7"}

RUN = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, filename=sys.argv[1], force=True)
from zs_fast.cli import main
main(sys.argv[2:])
"""


def leaks(content: bytes) -> list[str]:
    return [form for form in FORMS if form.encode() in content]


def echo(exchange: Exchange) -> None:
    """Documents, headers and all else hold what the client sent, the key included, plain and escaped."""
    text = f"{exchange.head.decode()} {KEY} {quote(KEY, safe='')}"
    reply = {"organic_results": [{"title": "echo", "snippet": text}], "search_metadata": {"url": text}}
    exchange.reply(json.dumps(reply).encode(), headers=f"X-Echo: {quote(KEY)}\r\n")


def refuse(exchange: Exchange) -> None:
    page = f"<html>Invalid API key {KEY}: {exchange.head.decode()}</html>"
    exchange.reply(page.encode(), "401 Unauthorized", headers=f"WWW-Authenticate: {quote(KEY)}\r\n")


def redirect(exchange: Exchange) -> None:
    path = exchange.head.split()[1].decode()
    exchange.reply(b"", "307 Temporary Redirect", headers=f"Location: http://127.0.0.2:9{path}\r\n")


def run_with_key(tmp_path: Path, url: str) -> subprocess.CompletedProcess[bytes]:
    words = {
        "output": tmp_path / "run", "train.steps": 1, "train.questions_per_step": 2, "train.group_size": 2,
        "eval.questions": 2, "eval.at_start": "true", "eval.search": "retriever", "simulator.kind": "retriever",
        "retriever.kind": "serpapi", "retriever.url": url, "retriever.cache": tmp_path / "cache.sqlite",
        "retriever.max_retries": 0, "log.tensorboard": "true", "threads": 1,
    }  # fmt: skip
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    return subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "debug.log"), "train", "quickstart", *flags],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "SER_API_KEY": KEY, "ZS_FAST_TRACEBACK": "1"},
        capture_output=True,
        timeout=500,
        check=False,
    )


@pytest.mark.full
def test_a_whole_run_leaves_no_key_in_any_place_it_writes_to(tmp_path: Path) -> None:
    with faulty(lambda head: b"") as server:
        server.misbehave(echo)
        done = run_with_key(tmp_path, server.url + "/search")
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        assert leaks(bytes(server.received)), "the server it is for has it"
    sinks = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    sinks |= {"stdout": done.stdout, "stderr": done.stderr, "argv": " ".join(map(str, done.args)).encode()}
    expected = {
        "run/config.toml", "run/env.json", "run/metrics.jsonl", "run/timings.jsonl", "run/rollouts.jsonl",
        "run/summary.json", "run/report.html", "run/reward.png", "debug.log", "cache.sqlite", "stdout", "stderr",
    }  # fmt: skip
    assert expected <= set(sinks) and len(sinks) >= 15, sorted(sinks)
    assert any("trainer.json" in name for name in sinks) and any("tfevents" in name for name in sinks), sorted(sinks)
    assert {name: found for name, content in sinks.items() if (found := leaks(content))} == {}
    assert b"[key]" in sinks["run/rollouts.jsonl"] and b"[key]" in sinks["debug.log"], "there was something to hide"


@pytest.mark.parametrize("behaviour", [refuse, redirect], ids=["refused", "redirected"])
def test_a_failing_search_says_why_without_the_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, behaviour
) -> None:
    monkeypatch.setenv("SER_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    question = Question(id="q", text="x", answers=("y",), source="s")
    with faulty(lambda head: b"{}") as server:
        server.misbehave(behaviour)
        url = server.url + "/search"
        search = RemoteSearch(RetrieverConfig(kind="serpapi", url=url, max_retries=0), documents=5)
        search.submit(SearchRequest(step=1, question=question, sample=0, turn=0, query="emma", noise_probability=0.0))
        results = []
        deadline = time.monotonic() + 30
        while not results and time.monotonic() < deadline:
            results = search.poll()
        search.close()
    assert results[0].failed and "[key]" in results[0].error
    assert not leaks(results[0].error.encode())
    assert not leaks(caplog.text.encode()) and not leaks(repr(search).encode())


def shown_with_locals(error: BaseException) -> str:
    """The traceback with the values of all local variables, causes and contexts included."""
    return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


@pytest.mark.parametrize("client", ["retriever", "simulator"])
def test_a_traceback_with_local_variables_shows_no_key(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    monkeypatch.setenv("ZS_TEST_KEY", KEY)
    with faulty(lambda body: b"{}") as server:
        server.misbehave(refuse)
        with pytest.raises(PreflightError) as caught:
            if client == "retriever":
                RemoteSearch(RetrieverConfig(url=server.url, api_key_env="ZS_TEST_KEY"), documents=5)
            else:
                OpenAIEngine(SimulatorConfig(kind="openai", url=server.url, api_key_env="ZS_TEST_KEY"))
        assert leaks(bytes(server.received))
    shown = shown_with_locals(caught.value)
    inside = shown.partition("test_key_leaks.py")[0] + "".join(
        part for part in shown.split('File "')[1:] if "test_key_leaks.py" not in part.partition('"')[0]
    )
    assert "HTTP 401" in shown and not leaks(inside.encode()), "of our frames and the libraries'"


def test_a_simulators_server_that_repeats_the_key_teaches_it_to_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ZS_TEST_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def repeat(exchange: Exchange) -> None:
        exchange.reply(json.dumps({"choices": [{"message": {"content": f"Doc 1: {KEY}"}}]}).encode())

    with faulty(good_chat) as server:
        engine = OpenAIEngine(SimulatorConfig(kind="openai", url=server.url, api_key_env="ZS_TEST_KEY", max_retries=0))
        completions = []
        for behaviour in (repeat, refuse):
            server.misbehave(behaviour)
            engine.add(0, [65], Sampling(max_new_tokens=5), role=Role.SIMULATOR)
            while engine.num_unfinished:
                completions += engine.step()
                time.sleep(0.005)
        engine.close()
    assert bytes(completions[0].token_ids) == b"Doc 1: [key]"
    assert "[key]" in completions[1].error and not leaks(completions[1].error.encode())
    assert not leaks(caplog.text.encode())


def test_a_key_shows_itself_to_reveal_alone() -> None:
    key = Key(KEY)
    assert key.reveal() == KEY and bool(key) and not Key("")
    assert not leaks(f"{key} {key!r} {[key]} {vars(HideKey(key))}".encode())
    assert key.hide_in(f"a {KEY} b {quote(KEY, safe='')}") == "a [key] b [key]"
    assert Key("abc").hide_in("abc") == "abc" and Key("").hide_in("abc") == "abc"
