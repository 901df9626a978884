"""A server that goes wrong in every way we know of, byte by byte, and what is to come of each."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

Behaviour = Callable[["Exchange"], None]
HOLD_S = 10.0
"""How long a server that says nothing keeps the connection; longer than any client of the tests waits."""


@dataclass(slots=True)
class Exchange:
    """One request on a connection: what came, the right reply's body, and ways to answer wrongly."""

    connection: socket.socket
    head: bytes
    body: bytes
    good: bytes
    server: FaultServer
    closes: bool = False
    """The connection ends with this exchange; a reply that is whole says so, or the next request might go into it."""

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def reply(self, body: bytes, status: str = "200 OK", *, headers: str = "", length: int | None = None) -> None:
        size = len(body) if length is None else length
        headers += "Connection: close\r\n" if self.closes else ""
        self.send(
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n{headers}\r\n".encode()
            + body
        )

    def chunked(self, *chunks: bytes) -> None:
        self.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(chunks))

    def hold(self) -> None:
        """Say nothing more, until the client hangs up."""
        self.connection.settimeout(HOLD_S)
        self.connection.recv(1)

    def trickle(self, piece: bytes) -> None:
        until = time.monotonic() + HOLD_S
        while time.monotonic() < until:
            self.send(piece)
            time.sleep(0.02)

    def pour(self, piece: bytes) -> None:
        until = time.monotonic() + HOLD_S
        while time.monotonic() < until:
            self.send(piece)


class FaultServer:
    """Answers with `good(body)` while `behaviour` is None or `faults_left` is 0, else misbehaves.

    `requests` are the heads and bodies of all requests, `received` every byte that came.
    """

    def __init__(self, good: Callable[[bytes], bytes]) -> None:
        self._good = good
        self.behaviour: Behaviour | None = None
        self.faults_left = -1
        """How often it misbehaves from now on; -1: always."""
        self.requests: list[tuple[bytes, bytes]] = []
        self.received = bytearray()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.port = 0
        self.listen()
        self.url = f"http://127.0.0.1:{self.port}"

    def listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def refuse(self) -> None:
        """No one listens any more, and open connections are gone."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.drop_connections()

    def drop_connections(self) -> None:
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def misbehave(self, behaviour: Behaviour | None, *, times: int = -1) -> None:
        with self._lock:
            self.behaviour, self.faults_left = behaviour, times

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)
        with suppress(OSError, ValueError), connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (exchange := self._read(connection)) is not None:
                with self._lock:
                    faulty = self.behaviour if self.faults_left else None
                    self.faults_left -= faulty is not None and self.faults_left > 0
                if faulty is None:
                    exchange.reply(exchange.good)
                else:
                    exchange.closes = True
                    faulty(exchange)
                    break
        with self._lock:
            self._open.discard(connection)

    def _read(self, connection: socket.socket) -> Exchange | None:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = connection.recv(65536)
            if not piece:
                return None
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        while len(body) < length:
            body += connection.recv(65536)
        with self._lock:
            self.requests.append((head, body))
            self.received += head + b"\r\n\r\n" + body
        return Exchange(connection, head, body, self._good(body if body else head), self)


@contextmanager
def faulty(good: Callable[[bytes], bytes]) -> Iterator[FaultServer]:
    server = FaultServer(good)
    try:
        yield server
    finally:
        server.refuse()


def _reset(exchange: Exchange) -> None:
    exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.connection.close()


def _slow_headers(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\n")
    exchange.trickle(b"X: y\r\n")


def _slow_body(exchange: Exchange) -> None:
    exchange.reply(b"", length=1 << 20)
    exchange.trickle(b" ")


def _stalled_body(exchange: Exchange) -> None:
    exchange.reply(exchange.good[:-4], length=len(exchange.good))
    exchange.hold()


def _endless_body(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\n\r\n")
    exchange.pour(b"x" * 65536)


def _endless_chunks(exchange: Exchange) -> None:
    exchange.chunked()
    exchange.pour(b"10000\r\n" + b"x" * 65536 + b"\r\n")


def _endless_error(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 404 Not Found\r\n\r\n")
    exchange.pour(b"x" * 65536)


def _endless_headers(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\n")
    exchange.pour(b"X-Filler: " + b"y" * 1000 + b"\r\n")


def _informational(exchange: Exchange) -> None:
    exchange.trickle(b"HTTP/1.1 102 Processing\r\n\r\n")


def _bomb(exchange: Exchange) -> None:
    exchange.reply(_BOMB, headers="Content-Encoding: gzip\r\n")


def _silence(exchange: Exchange) -> None:
    exchange.hold()


_BOMB = gzip.compress(b" " * (64 << 20), 9)


def _body(body: bytes, *, status: str = "200 OK", headers: str = "") -> Behaviour:
    return lambda exchange: exchange.reply(body, status, headers=headers)


def _status(status: str, headers: str = "") -> Behaviour:
    return _body(b'{"error": {"message": "no"}, "detail": "no"}', status=status, headers=headers)


def _raw(data: bytes) -> Behaviour:
    return lambda exchange: exchange.send(data)


def _redirect(status: str, host: str = "") -> Behaviour:
    return lambda exchange: exchange.reply(
        b"", status, headers=f"Location: {host or exchange.server.url}/elsewhere\r\n"
    )


def _packed(exchange: Exchange) -> None:
    exchange.reply(gzip.compress(exchange.good), headers="Content-Encoding: gzip\r\n")


RETRIED: dict[str, Behaviour | None] = {
    "refused": None,
    "reset": _reset,
    "closed without a byte": lambda exchange: None,
    "silence": _silence,
    "slow headers": _slow_headers,
    "slow body": _slow_body,
    "stalled body": _stalled_body,
    "endless headers": _endless_headers,
    "endless 102": _informational,
    "promised terabyte": lambda exchange: (exchange.reply(b" ", length=1 << 40), exchange.hold())[0],
    "short body": lambda exchange: exchange.reply(exchange.good, length=len(exchange.good) + 9),
    "cut chunk": lambda exchange: exchange.chunked(b"ff\r\n{"),
    "bad chunk size": lambda exchange: exchange.chunked(b"zz\r\n{}\r\n0\r\n\r\n"),
    "no HTTP": _raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "two lengths": _raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "HTTP 408": _status("408 Request Timeout"),
    "HTTP 409": _status("409 Conflict"),
    "HTTP 429": _status("429 Too Many Requests"),
    "HTTP 429, Retry-After 0": _status("429 Too Many Requests", "Retry-After: 0\r\n"),
    "HTTP 429, Retry-After in words": _status("429 Too Many Requests", "Retry-After: soon\r\n"),
    "HTTP 429, Retry-After negative": _status("429 Too Many Requests", "Retry-After: -5\r\n"),
    "HTTP 429, Retry-After for ever": _status("429 Too Many Requests", "Retry-After: 99999999999999999999\r\n"),
    "HTTP 503, Retry-After in the past": _status("503 No", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\n"),
    "HTTP 503, Retry-After in the far future": _status("503 No", "Retry-After: Fri, 31 Dec 9999 23:59:59 GMT\r\n"),
    "HTTP 500": _status("500 Internal Server Error"),
    "HTTP 502, a page": _body(b"<html>Bad Gateway</html>", status="502 Bad Gateway"),
    "HTTP 503": _status("503 Service Unavailable"),
    "HTTP 504": _status("504 Gateway Timeout"),
    "HTTP 529": _status("529 Overloaded"),
}
"""Name -> what the server does; None: nobody listens. The same request may succeed next time."""

FINAL: dict[str, Behaviour] = {
    "endless body": _endless_body,
    "endless chunks": _endless_chunks,
    "endless error page": _endless_error,
    "gzip bomb": _bomb,
    "gzip that nobody asked for": _packed,
    "a page": _body(b"<!DOCTYPE html><html><body>It works!</body></html>"),
    "cut JSON": lambda exchange: exchange.reply(exchange.good[:-3]),
    "no body": _body(b""),
    "HTTP 204": _raw(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"),
    "null": _body(b"null"),
    "a number": _body(b"42"),
    "an empty object": _body(b"{}"),
    "an empty list": _body(b"[]"),
    "nothing in it": _body(b'{"choices": [], "result": [], "organic_results": null}'),
    "null content": _body(
        b'{"choices": [{"message": {"content": null}}], "result": [[{"document": {"contents": null}}]]}'
    ),
    "content of another type": _body(b'{"choices": [{"message": {"content": [1]}}], "result": [[7]]}'),
    "an error with HTTP 200": _body(b'{"error": "overloaded", "choices": null, "result": null}'),
    "deep nesting": _body(b"[" * 100_000),
    "no UTF-8": _body(b"\xff\xfe\x00\x81" * 100),
    "a byte order mark": lambda exchange: exchange.reply(b"\xef\xbb\xbf" + exchange.good),
    "HTTP 400": _status("400 Bad Request"),
    "HTTP 401": _status("401 Unauthorized"),
    "HTTP 402": _status("402 Payment Required"),
    "HTTP 403": _status("403 Forbidden"),
    "HTTP 404, wrong model": _body(b'{"error": {"message": "The model does not exist"}}', status="404 Not Found"),
    "HTTP 405": _status("405 Method Not Allowed"),
    "HTTP 413": _status("413 Payload Too Large"),
    "HTTP 422": _status("422 Unprocessable Entity"),
    "HTTP 451": _status("451 Unavailable For Legal Reasons"),
    "HTTP 301 to itself": _redirect("301 Moved Permanently"),
    "HTTP 307 to another host": _redirect("307 Temporary Redirect", "http://127.0.0.2:9"),
    "HTTP 308 to a file": _redirect("308 Permanent Redirect", "file:///etc"),
}
"""What no retry can mend."""

MODES: dict[str, Behaviour | None] = {**RETRIED, **FINAL}


def good_retrieval(body: bytes) -> bytes:
    """The right reply of a /retrieve server: one passage that names the answer, for each query."""
    queries = json.loads(body)["queries"]
    passage = {"document": {"id": "1", "contents": '"Emma"\nA novel by Jane Austen'}, "score": float("nan")}
    return json.dumps({"result": [[passage] for _ in queries]}).encode()


def good_chat(body: bytes) -> bytes:
    """The right reply of a simulator's server."""
    message = {"role": "assistant", "content": "Doc 1: Emma is a novel by Jane Austen"}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
