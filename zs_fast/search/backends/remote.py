"""A search backend over somebody's server: searches go out in batches from a thread of their own, `poll` never waits.

What leaves the process is the query: no question, no answer, no id. A search without a readable reply comes back as
failed, with the reason; nothing is made up for it.
"""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zs_fast.config import RetrieverConfig
from zs_fast.errors import EngineError, PreflightError
from zs_fast.search.backends.background_loop import BackgroundLoop
from zs_fast.search.backends.cache import SearchCache
from zs_fast.search.backends.retriever import Dialect, Documents, SearchR1, ZeroSearchWiki
from zs_fast.search.backends.serpapi import SerpApi
from zs_fast.search.backends.transport import (
    FIRST_WAIT_S,
    Key,
    ReplyError,
    Transport,
    check_address,
    excerpt,
    is_loopback,
    wait_s,
)
from zs_fast.search.reward import contains_answer
from zs_fast.search.untrusted import one_line
from zs_fast.system.seeds import seed_for, uniform
from zs_fast.types import Completion, SearchMode, SearchRequest, SearchResult

DIALECTS: Mapping[str, type[Dialect]] = {
    "search_r1": SearchR1,
    "zerosearch_wiki": ZeroSearchWiki,
    "serpapi": SerpApi,
}
"""`retriever.kind` -> how that server is spoken with."""
MAX_REPLY_BYTES = 1 << 20
"""Longest reply that is read, per query in the request."""
_PROBE = "ping"


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrieverStats:
    """Counts since the backend was made. A request may hold several queries."""

    requests: int = 0
    retries: int = 0
    failed_queries: int = 0
    cached_queries: int = 0


@dataclass(frozen=True, slots=True)
class _Answered:
    found: Mapping[str, Documents]
    error: str = ""
    """Why there are no documents for `failed`."""
    failed: Sequence[str] = ()


class RemoteSearch:
    """Search by the server of `retriever`, `documents` a query. See `RetrieverConfig` for every setting.

    Searches for the same query share one request while it is under way, and for ever with `retriever.cache`. A request
    that was sent is not given up by `cancel`: what it brings is kept for whoever asks next, or in the cache.
    Construction sends one probe, unless searches are paid for, and raises PreflightError if that fails.
    """

    def __init__(
        self, retriever: RetrieverConfig, *, documents: int, processes: int = 1, first_wait_s: float = FIRST_WAIT_S
    ) -> None:
        self._dialect = DIALECTS[retriever.kind]()
        self._url = retriever.url or self._dialect.default_url
        self._retriever = retriever
        self._documents = documents
        self._first_wait_s = first_wait_s
        self._batch_size = retriever.batch_size if self._dialect.takes_batches else 1
        self._calls: dict[str, list[SearchRequest]] = {}
        """By query: who waits for its documents. A query that was sent stays here until its reply."""
        self._unsent: list[str] = []
        self._results: list[SearchResult] = []
        self._replies: queue.SimpleQueue[_Answered] = queue.SimpleQueue()
        self._in_flight = self._num_requests = self._num_retries = self._num_failed = self._num_cached = 0
        host = check_address(self._url, name="retriever.url", key_name="retriever.api_key_env")
        key_env = retriever.api_key_env or self._dialect.default_key_env
        key = self._key(key_env, host)
        self._cache: SearchCache | None = None
        if retriever.cache:
            self._cache = SearchCache(retriever.cache, f"{retriever.kind} {self._url} {documents}")
        self._loop = BackgroundLoop("retriever")
        self._transport = self._loop.wait_for(self._connect(key, retriever.requests_per_second / processes, host))
        if self._dialect.has_free_probe:
            self._probe()

    def submit(self, request: SearchRequest) -> None:
        query = one_line(request.query)
        if not query:
            self._results.append(self._result(request, ()))  # nothing was asked, so nothing is found
        elif query in self._calls:
            self._calls[query].append(request)
        elif self._cache is not None and (known := self._cache.get(query)) is not None:
            self._num_cached += 1
            self._results.append(self._result(request, known))
        else:
            self._calls[query] = [request]
            self._unsent.append(query)

    def deliver(self, completion: Completion) -> None:
        raise AssertionError(f"a retriever asks no model, yet a completion of role {completion.role} came back")

    def cancel(self) -> None:
        """Forget who waits, and what was not sent yet."""
        for query in self._unsent:
            del self._calls[query]
        self._unsent, self._results = [], []
        for waiting in self._calls.values():
            waiting.clear()

    def recall(self, results: Sequence[SearchResult]) -> None:
        pass

    def poll(self) -> list[SearchResult]:
        """The searches finished since the last call; sends what waits, as far as `max_in_flight` allows.

        Raises SimulatorError when the cache can't be used, and EngineError when the thread broke.
        """
        if (fault := self._loop.fault) is not None:
            raise EngineError(f"The retriever's thread broke: {fault!r}") from fault
        while not self._replies.empty():
            self._take(self._replies.get_nowait())
        while self._unsent and self._in_flight < self._retriever.max_in_flight:
            batch, self._unsent = self._unsent[: self._batch_size], self._unsent[self._batch_size :]
            self._in_flight += 1
            self._loop.start(self._answer(batch))
        results, self._results = self._results, []
        return results

    def stats(self) -> RetrieverStats:
        return RetrieverStats(
            requests=self._num_requests,
            retries=self._num_retries,
            failed_queries=self._num_failed,
            cached_queries=self._num_cached,
        )

    def close(self) -> None:
        """Give up what is under way, and end the thread. What has been answered by then is kept in the cache."""
        if self._loop.is_closed:
            return
        self._loop.close(self._transport.close)
        if self._cache is not None:
            while not self._replies.empty():
                self._cache.put(self._replies.get_nowait().found)
            self._cache.close()

    def _key(self, name: str, host: str) -> Key:
        """The key in the environment variable `name`; empty without a name."""
        if not name:
            return Key("")
        key = Key(os.environ.get(name, "").strip())
        if not key:
            raise PreflightError(
                f"retriever.kind is {self._retriever.kind!r} and its key belongs into the environment variable {name} "
                "(retriever.api_key_env), which is not set. Set it: export " + name + "=..."
            )
        if not (key.reveal().isascii() and key.reveal().isprintable()):
            raise PreflightError(f"the key in {name} holds characters that no HTTP request can carry. Set it anew.")
        if self._url.startswith("http:") and not is_loopback(host):
            raise PreflightError(
                f"retriever.url is {self._url}, plain http to another machine: the key in {name} would be readable on "
                "the way. Use https, or leave retriever.api_key_env empty."
            )
        return key

    async def _connect(self, key: Key, rate: float, host: str) -> Transport:
        return Transport(
            self._url,
            key=key,
            key_parameter=self._dialect.key_parameter,
            timeout_s=self._retriever.timeout_s,
            rate=rate,
            loopback=is_loopback(host),
        )

    def _probe(self) -> None:
        try:
            self._loop.wait_for(self._ask([_PROBE]))
        except ReplyError as error:
            problem = str(error)
        else:
            return
        self.close()
        raise PreflightError(
            f"The retriever at {self._url} (retriever.kind = {self._retriever.kind!r}) does not answer: {problem}. "
            "Start it (`zs-fast retriever --corpus FILE` serves one), or set retriever.url and retriever.kind."
        )

    def _take(self, answered: _Answered) -> None:
        self._in_flight -= 1
        if self._cache is not None and answered.found:
            self._cache.put(answered.found)
        for query, documents in answered.found.items():
            self._results += [self._result(request, documents) for request in self._calls.pop(query)]
        for query in answered.failed:
            self._num_failed += 1
            self._results += [
                SearchResult(request=request, documents=(), mode=SearchMode.REAL, failed=True, error=answered.error)
                for request in self._calls.pop(query)
            ]

    async def _answer(self, queries: Sequence[str]) -> None:
        self._replies.put(await self._answers(queries))

    async def _answers(self, queries: Sequence[str]) -> _Answered:
        """All attempts for a batch. One that the server won't take as a whole is asked again in halves."""
        problem = ""
        for attempt in range(self._retriever.max_retries + 1):
            try:
                return _Answered(await self._ask(queries))
            except ReplyError as error:
                problem = f"{self._url}: {error} (attempt {attempt + 1})"
                if error.splits and len(queries) > 1:
                    return await self._in_halves(queries)
                if not error.retried or attempt == self._retriever.max_retries:
                    break
                self._num_retries += 1
                jitter = uniform(seed_for(0, question_id=queries[0], purpose="retriever wait"), attempt)
                await asyncio.sleep(wait_s(attempt, jitter, first_s=self._first_wait_s, asked_s=error.wait_s))
        return _Answered({}, problem, queries)

    async def _in_halves(self, queries: Sequence[str]) -> _Answered:
        middle = len(queries) // 2
        first, second = await asyncio.gather(self._answers(queries[:middle]), self._answers(queries[middle:]))
        return _Answered({**first.found, **second.found}, first.error or second.error, [*first.failed, *second.failed])

    async def _ask(self, queries: Sequence[str]) -> dict[str, Documents]:
        """One attempt: the documents of each query. Raises ReplyError for whatever goes wrong."""
        self._num_requests += 1
        call = self._dialect.call(queries, self._documents)
        reply = await self._transport.attempt(call, max_bytes=MAX_REPLY_BYTES * len(queries))
        try:
            found = self._dialect.documents(reply, len(queries))
        except ValueError as error:
            shown = excerpt(repr(reply)[:400].encode("utf-8", "replace"))
            raise ReplyError(f"the reply is not what was asked for: {error}: {shown}", retried=False) from error
        return {query: documents[: self._documents] for query, documents in zip(queries, found, strict=True)}

    def _result(self, request: SearchRequest, documents: Documents) -> SearchResult:
        return SearchResult(
            request=request,
            documents=documents,
            mode=SearchMode.REAL,
            contains_answer=contains_answer(documents, request.question.answers),
        )
