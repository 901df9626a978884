"""A corpus behind Search-R1's /retrieve protocol, for whoever trains or evaluates on this machine.

    POST /retrieve {"queries": ["..."], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"id": "7", "contents": "\\"Title\\"\\nText"}, "score": 4.2}, ...]]}

Without `return_scores` an item is the document itself; without `topk` the server's own number is given. What is wrong
with a request is said in `{"detail": "..."}`, with a status of 400 or more. Listens on 127.0.0.1 alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from zs_fast.search.backends.bm25 import Bm25Index
from zs_fast.search.backends.passages import Passage
from zs_fast.search.backends.transport import is_loopback
from zs_fast.search.untrusted import one_line

MAX_REQUEST_BYTES = 8 << 20
MAX_QUERIES = 4096
MAX_QUERY_CHARACTERS = 10_000
MAX_DOCUMENTS = 100
IDLE_TIMEOUT_S = 60.0
"""A connection that sends nothing for so long is closed."""


class RequestError(Exception):
    """A request that gets an error instead of documents."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class RetrieverServer(ThreadingHTTPServer):
    """Serves `passages` by their `index` until `shutdown`; `with` closes the port. Port 0 takes a free one."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, passages: Sequence[Passage], index: Bm25Index, *, port: int, documents: int) -> None:
        self._passages = passages
        self._index = index
        self._documents = documents
        self._searching = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/retrieve"

    def retrieve(self, body: bytes) -> dict[str, object]:
        """The reply to the body of a request. Raises RequestError."""
        queries, k, with_scores = read_request(body, self._documents)
        with self._searching:  # one search at a time uses a core well; more would only share it
            found = self._index.search([one_line(query) for query in queries], k)
        return {"result": [[self._item(*place, with_scores) for place in ranked] for ranked in found]}

    def _item(self, position: int, score: float, with_score: bool) -> dict[str, object]:
        passage = self._passages[position]
        document: dict[str, object] = {"id": passage.id, "contents": passage.contents}
        return {"document": document, "score": score} if with_score else document

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle of things is no news."""


def read_request(body: bytes, documents: int) -> tuple[list[str], int, bool]:
    """(queries, documents per query, with scores) of a request's body. Raises RequestError naming field and limit."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {str(error)[:200]}") from error
    if not isinstance(request, dict) or "queries" not in request:
        raise RequestError(422, 'the body must be an object with "queries", a list of texts')
    queries, k, with_scores = request["queries"], request.get("topk"), request.get("return_scores", False)
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise RequestError(422, '"queries" must be a list of texts')
    if len(queries) > MAX_QUERIES:
        raise RequestError(413, f'"queries" holds {len(queries)} texts, at most {MAX_QUERIES} are taken')
    if any(len(query) > MAX_QUERY_CHARACTERS for query in queries):
        raise RequestError(413, f'a text in "queries" is longer than {MAX_QUERY_CHARACTERS} characters')
    k = documents if k is None else k
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MAX_DOCUMENTS:
        raise RequestError(422, f'"topk" must be a whole number from 1 to {MAX_DOCUMENTS}, or null')
    if not isinstance(with_scores, bool):
        raise RequestError(422, '"return_scores" must be true or false')
    return queries, k, with_scores


class _Handler(BaseHTTPRequestHandler):
    """One connection: keep-alive, with a limit on what is read and on how long is waited for it."""

    server: RetrieverServer
    protocol_version = "HTTP/1.1"
    server_version = "zs-fast"
    sys_version = ""
    timeout = IDLE_TIMEOUT_S
    wbufsize = 1 << 16  # status, headers and body leave in one piece
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        try:
            self._check_host()
            body = self._read_body()
            if urlsplit(self.path).path.rstrip("/") != "/retrieve":
                raise RequestError(404, "only POST /retrieve and GET /health are served")
            reply = self.server.retrieve(body)
        except RequestError as error:
            self._send(error.status, {"detail": str(error)})
        else:
            self._send(200, reply)

    def do_GET(self) -> None:
        try:
            self._check_host()
            if urlsplit(self.path).path.rstrip("/") != "/health":
                raise RequestError(405, "only POST /retrieve and GET /health are served")
        except RequestError as error:
            self._send(error.status, {"detail": str(error)})
        else:
            self._send(200, {"status": "ok"})

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged: a run makes thousands."""

    def _check_host(self) -> None:
        """Refuse a page in a browser that got here by a name of its own (DNS rebinding)."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '127.0.0.1')}").hostname or ""
        except ValueError:
            host = ""
        if not is_loopback(host):
            self.close_connection = True
            raise RequestError(403, "this server answers requests to 127.0.0.1 and localhost alone")

    def _read_body(self) -> bytes:
        """The whole body. After a refusal the connection closes: what was not read would be taken for a request."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdecimal()):
            self.close_connection = True
            raise RequestError(411, "the request must say its Content-Length")
        if len(length) > 18 or int(length) > MAX_REQUEST_BYTES:
            self.close_connection = True
            raise RequestError(413, f"the body is longer than {MAX_REQUEST_BYTES} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            raise RequestError(400, "the body ended before its Content-Length")
        return body

    def _send(self, status: int, reply: object) -> None:
        body = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
