"""`zs-fast retriever` as other trainers meet it: their requests word for word, wrong requests, limits, and its end."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from zs_fast.config import Bm25Config, RetrieverConfig
from zs_fast.errors import ConfigError, PreflightError
from zs_fast.retriever_command import retriever_command
from zs_fast.search import retriever_server
from zs_fast.search.backends.bm25 import Bm25Index
from zs_fast.search.backends.passages import Passage
from zs_fast.search.backends.remote import RemoteSearch
from zs_fast.search.retriever_server import MAX_REQUEST_BYTES, RetrieverServer
from zs_fast.types import Question, SearchRequest

PASSAGES = [
    Passage(id="7", title="Emma", text="A novel by Jane Austen"),
    Passage(id="8", title="Dracula", text="A novel by Bram Stoker"),
    Passage(id="9", title="Cork", text="Cork is a city in Ireland"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[RetrieverServer]:
    with RetrieverServer(PASSAGES, Bm25Index.over(PASSAGES, Bm25Config()), port=0, documents=2) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_search_r1s_own_request_and_reading_of_the_reply(server: RetrieverServer) -> None:
    payload = {"queries": ["who wrote Emma?", "bram stoker"], "topk": 3, "return_scores": True}
    result = requests.post(server.url, json=payload, timeout=10).json()["result"]
    assert [len(items) for items in result] == [3, 3]
    for items, title, text in zip(result, ("Emma", "Dracula"), ("Jane Austen", "Bram Stoker"), strict=True):
        content = items[0]["document"]["contents"]  # its client shows the first line as title, the rest as text
        assert content.split("\n")[0] == f'"{title}"' and text in "\n".join(content.split("\n")[1:])
        assert [item["score"] for item in items] == sorted((item["score"] for item in items), reverse=True)
    assert result[0][0]["document"]["id"] == "7"


def test_verls_request_with_its_headers(server: RetrieverServer) -> None:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    payload = {"queries": ["city in ireland"], "topk": 1, "return_scores": True}
    reply = requests.post(server.url, headers=headers, json=payload, timeout=30)
    reply.raise_for_status()
    ((item,),) = reply.json()["result"]
    assert item["document"]["contents"] == '"Cork"\nCork is a city in Ireland' and isinstance(item["score"], float)


def test_what_a_request_leaves_out(server: RetrieverServer) -> None:
    for payload in ({"queries": ["emma"]}, {"queries": ["emma"], "topk": None, "return_scores": False}):
        (items,) = requests.post(server.url, json=payload, timeout=10).json()["result"]
        assert len(items) == 2 and items[0] == {"id": "7", "contents": '"Emma"\nA novel by Jane Austen'}
    assert requests.post(server.url, json={"queries": []}, timeout=10).json() == {"result": []}
    assert requests.get(server.url.replace("/retrieve", "/health"), timeout=10).json() == {"status": "ok"}


def test_our_own_client(server: RetrieverServer) -> None:
    search = RemoteSearch(RetrieverConfig(url=server.url), documents=1)
    question = Question(id="q", text="who wrote emma?", answers=("Jane Austen",), source="s")
    for turn, query in enumerate(("emma", "\x00\ud800", "zzz")):
        search.submit(SearchRequest(step=1, question=question, sample=0, turn=turn, query=query, noise_probability=0.0))
    results = []
    deadline = time.monotonic() + 30
    while len(results) < 3 and time.monotonic() < deadline:
        results += search.poll()
    search.close()
    documents = {result.request.turn: result.documents for result in results}
    assert documents == {0: ("Emma: A novel by Jane Austen",), 1: (), 2: ("Emma: A novel by Jane Austen",)}


@pytest.mark.parametrize(
    "body, status, words",
    [
        (b"not json", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[]", 422, "queries"),
        (b"{}", 422, "queries"),
        (b'{"queries": "emma"}', 422, "list of texts"),
        (b'{"queries": [1]}', 422, "list of texts"),
        (b'{"queries": ["a"], "topk": 0}', 422, "1 to 100"),
        (b'{"queries": ["a"], "topk": 101}', 422, "1 to 100"),
        (b'{"queries": ["a"], "topk": true}', 422, "1 to 100"),
        (b'{"queries": ["a"], "topk": 1e400}', 422, "1 to 100"),
        (b'{"queries": ["a"], "return_scores": "yes"}', 422, "return_scores"),
        (json.dumps({"queries": ["a"] * 4097}).encode(), 413, "4096"),
        (json.dumps({"queries": ["a" * 10_001]}).encode(), 413, "10000"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(server: RetrieverServer, body: bytes, status: int, words: str) -> None:
    reply = requests.post(server.url, data=body, timeout=10)
    assert reply.status_code == status and words in reply.json()["detail"]


def raw(server: RetrieverServer, request: bytes) -> bytes:
    with socket.create_connection(server.server_address, timeout=10) as connection:
        connection.sendall(request)
        reply = b""
        while piece := connection.recv(65536):
            reply += piece
        return reply


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
        (b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 411),
        (b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (MAX_REQUEST_BYTES + 1), 413),
        (b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
        (b"POST /retrieve HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n\r\n{}", 403),
        (b"GET /health HTTP/1.1\r\nHost: evil.example:8000\r\n\r\n", 403),
        (b"POST /retrieve HTTP/1.1\r\nHost: [::1\r\nContent-Length: 2\r\n\r\n{}", 403),
        (b"POST /else HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", 404),
        (b"GET /retrieve HTTP/1.0\r\n\r\n", 405),
        (b"BREW /retrieve HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 501),
        (b"POST /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    ],
)
def test_what_the_wire_can_do_wrong(server: RetrieverServer, request_bytes: bytes, status: int) -> None:
    assert raw(server, request_bytes).startswith(b"HTTP/1.1 %d " % status)
    assert requests.post(server.url, json={"queries": ["emma"]}, timeout=10).ok, "others are served as before"


def test_a_connection_is_kept_for_the_next_request_and_an_idle_one_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retriever_server._Handler, "timeout", 0.3)
    with RetrieverServer(PASSAGES, Bm25Index.over(PASSAGES, Bm25Config()), port=0, documents=2) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
        for _ in range(3):
            connection.request("POST", "/retrieve", b'{"queries": ["emma"]}')
            assert connection.getresponse().read().startswith(b'{"result"')
            assert connection.sock is not None
        assert connection.sock.recv(1) == b"", "closed after a while of silence"
        server.shutdown()


def test_many_clients_at_once(server: RetrieverServer) -> None:
    replies: list[int] = []

    def ask() -> None:
        replies.append(requests.post(server.url, json={"queries": ["emma"] * 50}, timeout=60).status_code)

    threads = [threading.Thread(target=ask) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [200] * 32


@pytest.mark.parametrize(
    "words, part",
    [
        ([], "--corpus"),
        (["--corpus", "quickstart:world", "--port", "70000"], "70000"),
        (["--corpus", "quickstart:world", "--port", "x"], "'x'"),
        (["--corpus", "quickstart:world", "--topk", "0"], "--topk is 0"),
        (["--corpus", "quickstart:world", "--host", "10.0.0.1"], "--host"),
    ],
)
def test_a_wrong_command_is_one_line(words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)):
        retriever_command(words)


def test_a_port_that_is_taken_is_one_error(server: RetrieverServer) -> None:
    with pytest.raises(PreflightError, match=r"127\.0\.0\.1.*--port"):
        retriever_command(["--corpus", "quickstart:world", "--port", str(server.server_address[1])])


def test_the_command_serves_several_files_on_loopback_and_ends_cleanly(tmp_path: Path) -> None:
    for name, text in (("a", "alpha one"), ("b", "beta two")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": name, "title": name, "text": text}) + "\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "zs_fast.cli", "retriever", "--corpus", "a.jsonl", "b.jsonl", "--port", "0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.getcwd()])},
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests themselves run in the background, the signal would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        (url,) = re.findall(r"2 passages at (http://127\.0\.0\.1:\d+/retrieve) ", line)
        (items,) = requests.post(url, json={"queries": ["beta"], "topk": 1}, timeout=30).json()["result"]
        assert items == [{"id": "b", "contents": '"b"\nbeta two'}]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "zs-fast: interrupted\n"
    finally:
        process.kill()
        process.wait()
