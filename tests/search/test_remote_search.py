"""Real search over HTTP: what is sent and what is not, batches, the cache, cancelling, and what three servers reply."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.search.http_faults import FaultServer, faulty
from zs_fast.config import RetrieverConfig
from zs_fast.errors import PreflightError, SimulatorError
from zs_fast.search.backends.cache import SearchCache
from zs_fast.search.backends.remote import RemoteSearch
from zs_fast.search.backends.transport import retry_after_s, wait_s
from zs_fast.types import Question, SearchMode, SearchRequest, SearchResult

KEY = "canary-51c7-0e"


def request(query: str, *, question: Question | None = None, sample: int = 0) -> SearchRequest:
    question = question or Question(id="q", text="who wrote emma?", answers=("Jane Austen",), source="s")
    return SearchRequest(step=1, question=question, sample=sample, turn=0, query=query, noise_probability=0.0)


def search_r1(body: bytes) -> bytes:
    """Each query gets one passage that names it."""
    queries = json.loads(body)["queries"]
    return json.dumps(
        {"result": [[{"document": {"contents": f'"T"\nabout {query}'}, "score": 1.0}] for query in queries]}
    ).encode()


@contextmanager
def searching(server: FaultServer, *, documents: int = 5, **settings: object) -> Iterator[RemoteSearch]:
    config = RetrieverConfig(**{"url": server.url + "/retrieve", "timeout_s": 5.0, "max_retries": 2} | settings)
    search = RemoteSearch(config, documents=documents, first_wait_s=0.01)
    try:
        yield search
    finally:
        search.close()


def results_of(search: RemoteSearch, count: int) -> list[SearchResult]:
    results: list[SearchResult] = []
    deadline = time.monotonic() + 60
    while len(results) < count:
        assert time.monotonic() < deadline, f"{len(results)} of {count} results came"
        results += search.poll()
        time.sleep(0.001)
    assert search.poll() == []
    return results


def bodies(server: FaultServer) -> list[dict]:
    return [json.loads(body) for _, body in server.requests]


def test_searches_go_out_in_batches_and_come_back_to_their_own_requests() -> None:
    with faulty(search_r1) as server, searching(server, batch_size=4, max_in_flight=2) as search:
        for number in range(10):
            search.submit(request(f"query {number}", sample=number))
        results = results_of(search, 10)
    assert {result.request.sample: result.documents for result in results} == {
        number: (f"T: about query {number}",) for number in range(10)
    }
    assert all(result.mode is SearchMode.REAL and not result.failed for result in results)
    assert bodies(server)[0] == {"queries": ["ping"], "topk": 5, "return_scores": True}
    assert sorted(len(body["queries"]) for body in bodies(server)[1:]) == [2, 4, 4]


def test_the_same_query_is_asked_once_while_it_is_under_way() -> None:
    with faulty(search_r1) as server, searching(server) as search:
        for sample in range(5):
            search.submit(request(" the  same\n" if sample else "the same", sample=sample))
        assert sorted(result.request.sample for result in results_of(search, 5)) == [0, 1, 2, 3, 4]
        assert bodies(server)[1:] == [{"queries": ["the same"], "topk": 5, "return_scores": True}]
        search.submit(request("the same"))
        results_of(search, 1)
    assert len(server.requests) == 3, "without a cache it is asked again later"


def test_a_query_without_a_printable_character_is_not_sent() -> None:
    with faulty(search_r1) as server, searching(server) as search:
        search.submit(request("\u200b\x00\ud800"))
        (result,) = results_of(search, 1)
        assert result.documents == () and not result.failed
        search.submit(request("a\ud800b\u202ec\nd"))
        results_of(search, 1)
    assert [body["queries"] for body in bodies(server)] == [["ping"], ["a b c d"]]


def test_an_answer_is_noticed_and_surplus_documents_are_cut() -> None:
    def many(body: bytes) -> bytes:
        items = [{"id": "1", "contents": '"A"\nB'}, {"document": "C"}, {"text": "by Jane Austen", "title": "Emma"}, "D"]
        return json.dumps({"result": [items for _ in json.loads(body)["queries"]]}).encode()

    with faulty(many) as server, searching(server, documents=3) as search:
        search.submit(request("x"))
        (result,) = results_of(search, 1)
    assert result.documents == ("A: B", "C", "Emma: by Jane Austen") and result.contains_answer


def test_what_a_search_finds_nothing_for_is_no_failure() -> None:
    with faulty(lambda body: b'{"result": [[]]}') as server, searching(server) as search:
        search.submit(request("x"))
        (result,) = results_of(search, 1)
    assert result.documents == () and not result.failed


def test_one_query_that_a_server_refuses_costs_no_other_its_documents() -> None:
    def picky(exchange) -> None:
        if b"poison" in exchange.body:
            exchange.reply(b'{"detail": "no"}', "422 Unprocessable")
        else:
            exchange.reply(exchange.good)

    with faulty(search_r1) as server, searching(server, batch_size=8) as search:
        server.misbehave(picky)
        for number in range(8):
            search.submit(request("poison" if number == 5 else f"query {number}", sample=number))
        results = results_of(search, 8)
        assert [result.request.sample for result in results if result.failed] == [5]
        assert search.stats().failed_queries == 1
    assert "HTTP 422" in next(result.error for result in results if result.failed)


def test_cancelled_searches_do_not_come_back_and_what_was_sent_is_not_sent_again() -> None:
    def slow(body: bytes) -> bytes:
        if b"ping" not in body:
            time.sleep(0.3)
        return search_r1(body)

    with faulty(slow) as server, searching(server, batch_size=1, max_in_flight=1) as search:
        for query in ("sent", "unsent"):
            search.submit(request(query))
        assert search.poll() == []
        search.cancel()
        search.submit(request("sent", sample=7))
        (result,) = results_of(search, 1)
        assert result.request.sample == 7 and result.documents == ("T: about sent",)
    assert [body["queries"] for body in bodies(server)] == [["ping"], ["sent"]]


def test_requests_keep_their_pace_and_are_never_too_many_at_once() -> None:
    with faulty(search_r1) as server:
        with searching(server, batch_size=1, requests_per_second=20.0) as search:
            started = time.monotonic()
            for number in range(6):
                search.submit(request(f"query {number}"))
            results_of(search, 6)
            assert time.monotonic() - started >= 5 / 20.0
        assert len(server.requests) == 7


def test_zerosearchs_wiki_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def wiki(body: bytes) -> bytes:
        return json.dumps([{"text": json.loads(body)["query"].upper()}, {"text": "b"}]).encode()

    with faulty(wiki) as server, searching(server, kind="zerosearch_wiki") as search:
        search.submit(request("emma"))
        search.submit(request("dracula"))
        assert sorted(result.documents for result in results_of(search, 2)) == [("DRACULA", "b"), ("EMMA", "b")]
    assert bodies(server) == [{"query": query, "top_k": 5} for query in ("ping", "emma", "dracula")]


SERPAPI_REPLIES = {
    "found": (
        {"organic_results": [{"title": "Emma", "snippet": "by Jane Austen"}, {"title": "Bare"}, {"link": "x"}]},
        ("Emma: by Jane Austen", "Bare"),
    ),
    "nothing found": ({"error": "Google hasn't returned any results for this query."}, ()),
    "an error": ({"error": "Unsupported engine"}, None),
    "no object": ([], None),
    "results of another type": ({"organic_results": [1]}, None),
}


@pytest.mark.parametrize("name", SERPAPI_REPLIES)
def test_serpapi(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SER_API_KEY", KEY)
    reply, documents = SERPAPI_REPLIES[name]
    with faulty(lambda head: json.dumps(reply).encode()) as server:
        with searching(server, kind="serpapi", documents=3) as search:
            assert server.requests == [], "a probe would have to be paid for"
            search.submit(request("who wrote emma & when? #1"))
            (result,) = results_of(search, 1)
        (head, body), *_ = server.requests
    assert (None if result.failed else result.documents) == documents
    line = head.split(b"\r\n")[0].decode()
    assert parse_qs(urlsplit(line.split()[1]).query) == {
        "engine": ["google"], "q": ["who wrote emma & when? #1"], "num": ["3"], "output": ["json"], "api_key": [KEY],
    }  # fmt: skip
    assert line.startswith("GET /retrieve?") and body == b""


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"kind": "serpapi"}, "SER_API_KEY"),
        ({"api_key_env": "ZS_NO_SUCH_KEY"}, "ZS_NO_SUCH_KEY"),
        ({"url": "http://example.invalid/retrieve", "api_key_env": "ZS_TEST_KEY"}, "plain http to another machine"),
        ({"url": f"http://me:{KEY}@127.0.0.1:9/"}, "retriever.api_key_env"),
        ({"url": f"https://127.0.0.1:9/?api_key={KEY}"}, "retriever.api_key_env"),
        ({"url": "ftp://127.0.0.1/"}, "must look like"),
        ({"url": "127.0.0.1:8000"}, "must look like"),
        ({"url": "http://127.0.0.1:99999/"}, "no address"),
        ({"cache": "/proc/none/cache.sqlite"}, "retriever.cache"),
    ],
)
def test_a_wrong_setting_is_one_refusal_without_the_key(
    monkeypatch: pytest.MonkeyPatch, settings: dict, words: str
) -> None:
    monkeypatch.setenv("ZS_TEST_KEY", KEY)
    monkeypatch.delenv("SER_API_KEY", raising=False)
    with pytest.raises(PreflightError) as caught:
        RemoteSearch(RetrieverConfig(**settings), documents=5)
    assert words in str(caught.value) and KEY not in str(caught.value)


def test_a_server_of_ones_own_gets_its_key_in_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZS_TEST_KEY", KEY)
    with faulty(search_r1) as server, searching(server, api_key_env="ZS_TEST_KEY") as search:
        search.submit(request("x"))
        results_of(search, 1)
        assert all(f"Authorization: Bearer {KEY}".lower() in head.decode().lower() for head, _ in server.requests)
    with faulty(search_r1) as server, searching(server) as search:
        assert b"uthorization" not in server.received


@pytest.mark.parametrize("kind, count", [("search_r1", 10_000), ("zerosearch_wiki", 300), ("serpapi", 300)])
def test_gold_answers_questions_and_ids_never_leave_the_process(
    monkeypatch: pytest.MonkeyPatch, kind: str, count: int
) -> None:
    monkeypatch.setenv("SER_API_KEY", KEY)
    draws = random.Random(0)

    def answer(body: bytes) -> bytes:
        if kind == "search_r1":
            return search_r1(body)
        return b'[{"text": "x"}]' if kind == "zerosearch_wiki" else b'{"organic_results": []}'

    with faulty(answer) as server, searching(server, kind=kind) as search:
        for number in range(count):
            canary = f"{draws.getrandbits(64):016x}"
            question = Question(
                id=f"canaryid{canary}",
                text=f"canarytext{canary}?",
                answers=(f"canarygold{canary}",),
                source="canarysrc",
            )
            search.submit(request(f"honest {number}", question=question, sample=number))
        results = results_of(search, count)
        received = bytes(server.received)
    assert len(results) == count and not any(result.failed for result in results)
    assert b"canarygold" not in received and b"canary" not in received.replace(KEY.encode(), b"")
    assert f"honest {count - 1}".encode() in received.replace(b"+", b" ").replace(b"%20", b" ")


def test_the_cache_answers_what_was_answered_before(tmp_path: Path) -> None:
    cache = str(tmp_path / "new" / "cache.sqlite")
    with faulty(search_r1) as server:
        with searching(server, cache=cache) as search:
            search.submit(request("emma"))
            (first,) = results_of(search, 1)
        with searching(server, cache=cache) as search:
            search.submit(request("emma", sample=3))
            (second,) = results_of(search, 1)
            assert search.stats().cached_queries == 1
        assert [body["queries"] for body in bodies(server)] == [["ping"], ["emma"], ["ping"]]
        with searching(server, cache=cache, documents=2) as search:
            search.submit(request("emma"))
            results_of(search, 1)
    assert first.documents == second.documents and second.request.sample == 3
    assert len(server.requests) == 5, "another number of documents is another search"


def test_failures_are_not_kept_and_empty_results_are(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache.sqlite")
    with faulty(lambda body: b'{"result": [[]]}') as server, searching(server, cache=cache, max_retries=0) as search:
        server.misbehave(lambda exchange: exchange.reply(b"", "500 No"), times=1)
        for expected_failure in (True, False, False):
            search.submit(request("emma"))
            (result,) = results_of(search, 1)
            assert result.failed is expected_failure and result.documents == ()
        assert len(server.requests) == 3


@pytest.mark.parametrize("content", [b"not a database, but long enough to be one" * 50, None])
def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "cache.sqlite"
    if content is None:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE mine (x)")
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(PreflightError, match=r"retriever\.cache .*cache\.sqlite can't be used"):
        SearchCache(str(path), "n")
    assert content is None or path.read_bytes() == before


def test_a_cache_that_breaks_in_mid_run_is_one_error(tmp_path: Path) -> None:
    cache = SearchCache(str(tmp_path / "cache.sqlite"), "n")
    cache._connection.execute("DROP TABLE searches")
    with pytest.raises(SimulatorError, match=r"retriever\.cache"):
        cache.get("x")
    with pytest.raises(SimulatorError, match=r"retriever\.cache"):
        cache.put({"x": ("y",)})


WRITER = """
import sys
from zs_fast.search.backends.cache import SearchCache
path, name = sys.argv[1:]
cache = SearchCache(path, "n")
print("ready", flush=True)
for number in range(100_000):
    cache.put({f"{name} {number}": (f"document {number} " * 50, "\\ud800 and more")})
    print(number, flush=True)
"""


def test_several_processes_share_a_cache_and_kill_9_leaves_it_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "cache.sqlite")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.getcwd()])}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, name], stdout=subprocess.PIPE, text=True, env=environment)
        for name in ("a", "b", "c")
    ]
    confirmed = {}
    for name, writer in zip("abc", writers, strict=True):
        assert writer.stdout is not None
        for line in writer.stdout:
            if line.strip().isdecimal() and int(line) >= 30:
                break
        writer.send_signal(signal.SIGKILL)
        left = [int(line) for line in writer.stdout.read().splitlines() if line.strip().isdecimal()]
        confirmed[name] = max([30, *left])
        writer.wait()
    cache = SearchCache(path, "n")
    assert cache._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for name, last in confirmed.items():
        for number in range(last + 1):
            assert cache.get(f"{name} {number}") == (f"document {number} " * 50, "\ud800 and more")
    cache.close()


@pytest.mark.parametrize(
    "value, seconds",
    [
        ("", 0),
        ("0", 0),
        ("7", 7),
        ("-5", 0),
        ("soon", 0),
        ("1.5", 0),
        ("٣", 0),
        ("9" * 40, 999_999_999_999),
        ("x" * 9999, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Fri, 99 Oct 2015 99:28:00 GMT", 0),
    ],
)
def test_what_a_retry_after_asks_for(value: str, seconds: float) -> None:
    assert retry_after_s(value) == seconds


def test_waits_double_with_jitter_up_to_a_limit() -> None:
    assert [wait_s(attempt, 0.5, first_s=0.5, asked_s=0.0) for attempt in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert wait_s(0, 0.0, first_s=0.5, asked_s=0.0) == 0.25 and wait_s(0, 0.5, first_s=0.5, asked_s=9.0) == 9.0
    assert wait_s(0, 0.5, first_s=0.5, asked_s=1e9) == 30.0
