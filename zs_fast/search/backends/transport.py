"""One HTTP request to a server that others run: bounded in time and size, and what went wrong said in one line.

Certificates are checked, redirects are not followed, compressed replies are refused (a small one may hold gigabytes),
and a key is hidden wherever a server repeats it.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from html import escape
from urllib.parse import quote, quote_plus, urlsplit

import httpx2

from zs_fast.errors import PreflightError

RETRIED_STATUSES = frozenset({408, 409, 429, *range(500, 600)})
BATCH_STATUSES = frozenset({400, 413, 422})
"""Answers to a batch that may be due to one of its queries."""
MAX_ERROR_BYTES = 1 << 16
CONNECT_TIMEOUT_S = 10.0
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
_SHORTEST_HIDDEN_KEY = 6
_LOGGERS = (
    "openai._base_client",
    *(f"httpx{version}" for version in ("", "2")),
    *(f"httpcore{version}.{part}" for version in ("", "2") for part in ("connection", "http11", "http2", "proxy")),
)
"""Who logs addresses and headers; a filter works on a logger's own records alone."""


class ReplyError(Exception):
    """One attempt failed. `retried` says whether another may help; `wait_s` is the server's Retry-After, or 0;
    `splits` says that a batch may be at fault as a whole, or by one of its queries."""

    def __init__(self, reason: str, *, retried: bool, wait_s: float = 0.0, splits: bool = False) -> None:
        super().__init__(reason)
        self.retried = retried
        self.wait_s = wait_s
        self.splits = splits


class Key:
    """A secret that shows itself to `reveal` alone: not to print, logs or tracebacks that show local variables."""

    __slots__ = ("_forms", "_value")

    def __init__(self, value: str) -> None:
        self._value = value
        in_addresses = {quote(value, safe=""), quote(value), quote_plus(value)}
        forms = {value, *in_addresses, json.dumps(value)[1:-1], escape(value)}
        long_enough = len(value) >= _SHORTEST_HIDDEN_KEY
        self._forms = tuple(sorted(forms, key=len, reverse=True)) if long_enough else ()

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Key(hidden)"

    def reveal(self) -> str:
        return self._value

    def hide_in(self, text: str) -> str:
        """The text without the key, in any form that URLs, JSON or HTML give it; one under six characters is left."""
        for form in self._forms:
            text = text.replace(form, "[key]")
        return text

    def hide_in_bytes(self, body: bytes) -> bytes:
        for form in self._forms:
            body = body.replace(form.encode("utf-8", "surrogatepass"), b"[key]")
        return body


class HideKey(logging.Filter):
    """Takes a key out of what HTTP libraries log: whole addresses, where some servers want it, and headers."""

    def __init__(self, key: Key) -> None:
        super().__init__()
        self._key = key

    def install(self) -> HideKey:
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self)
        return self

    def remove(self) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        hidden = self._key.hide_in(message)
        if hidden != message:
            record.msg, record.args = hidden, ()
        return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A request without its address and key."""

    method: str
    json: object | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)


def check_address(url: str, *, name: str, key_name: str) -> str:
    """The host of an http(s) address. Raises PreflightError for another one, or one that holds a key or password."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (reading it is what checks it)
    except ValueError as error:
        raise PreflightError(f"{name} is no address ({error}). It must look like http://127.0.0.1:8000.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PreflightError(f"{name} is {url!r}; it must look like http://127.0.0.1:8000 or https://host.")
    if parts.username or parts.password:
        raise PreflightError(
            f"{name} holds a name or password before {parts.hostname}; it would stand in config.toml and logs. Leave "
            f"it out, and put the key into the environment variable that {key_name} names."
        )
    if parts.query or parts.fragment:
        raise PreflightError(
            f"{name} holds more than an address after {parts.hostname}{parts.path} (a query or a fragment). Leave that "
            f"out; a key belongs into the environment variable that {key_name} names."
        )
    return parts.hostname


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def retry_after_s(value: str) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 for the past and for what is neither."""
    value = value.strip()
    if value.isascii() and value.isdecimal():
        return float(value[:12])
    try:
        until = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
    return max(0.0, until.timestamp() - time.time()) if until.tzinfo else 0.0


def wait_s(attempt: int, jitter: float, *, first_s: float, asked_s: float) -> float:
    """Before the attempt after number `attempt`: doubling from `first_s`, times 0.5 to 1.5, or what the server asked
    for where that is more; never over LONGEST_WAIT_S."""
    return min(max(asked_s, first_s * 2.0**attempt * (0.5 + jitter)), LONGEST_WAIT_S)


class Pace:
    """Lets one through every 1/rate seconds; at rate 0 all at once."""

    def __init__(self, rate: float) -> None:
        self._interval = 1.0 / rate if rate > 0 else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        if self._interval:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._interval
            await asyncio.sleep(start - now)


class Transport:
    """Requests to one address. Used inside one asyncio loop; the key goes into `key_parameter` of the query string, or
    where that is empty into an Authorization header."""

    def __init__(
        self, url: str, *, key: Key, key_parameter: str, timeout_s: float, rate: float, loopback: bool
    ) -> None:
        self.url = url
        self._key = key
        self._key_parameter = key_parameter
        self._timeout_s = timeout_s
        self._pace = Pace(rate)
        self._client = httpx2.AsyncClient(
            follow_redirects=False,
            # A proxy from the environment must not see what is meant for this machine.
            trust_env=not loopback,
            timeout=httpx2.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s), pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        )
        self._filter = HideKey(key).install()

    async def close(self) -> None:
        self._filter.remove()
        await self._client.aclose()

    async def attempt(self, call: Call, *, max_bytes: int) -> object:
        """The JSON of one reply, at most `max_bytes` long. Raises ReplyError for whatever goes wrong."""
        await self._pace.wait()
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._send(call, max_bytes)
        except TimeoutError:
            problem = ReplyError(f"no whole reply in {self._timeout_s:g} s", retried=True)
        except httpx2.TimeoutException as error:
            problem = ReplyError(f"{type(error).__name__} within {self._timeout_s:g} s", retried=True)
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.InvalidURL) as error:
            problem = ReplyError(f"{type(error).__name__}: {self._key.hide_in(str(error))}", retried=False)
        except (httpx2.HTTPError, OSError) as error:
            problem = ReplyError(f"{type(error).__name__}: {self._key.hide_in(str(error))}", retried=True)
        else:
            return parse_json(self._key.hide_in_bytes(body))
        raise problem  # outside the except clause: the library's error would bring the whole address along

    async def _send(self, call: Call, max_bytes: int) -> bytes:
        parameters, headers = dict(call.parameters), {}
        if self._key and self._key_parameter:
            parameters[self._key_parameter] = self._key.reveal()
        elif self._key:
            headers["Authorization"] = f"Bearer {self._key.reveal()}"
        async with self._client.stream(
            call.method, self.url, json=call.json, params=parameters or None, headers=headers
        ) as response:
            await refuse_errors(response, self._key)
            return await read(response.aiter_raw(), max_bytes)


async def refuse_errors(response: httpx2.Response, key: Key | None = None) -> None:
    """Raise ReplyError for any answer that is no plain success, having read only the start of its body."""
    status = response.status_code
    key = key or Key("")
    if status < 300:
        encoding = response.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise ReplyError(f"the reply is compressed ({encoding[:40]!r}), which was not asked for", retried=False)
        return
    if status < 400:
        where = key.hide_in(response.headers.get("location", "?"))[:200]
        raise ReplyError(f"HTTP {status}, a redirect to {where!r}, which is not followed", retried=False)
    body = b""
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    raise ReplyError(
        f"HTTP {status}: {key.hide_in(excerpt(body))}",
        retried=status in RETRIED_STATUSES,
        wait_s=retry_after_s(response.headers.get("retry-after", "")),
        splits=status in BATCH_STATUSES,
    )


async def read(chunks: AsyncIterator[bytes], limit: int) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limit:
            raise ReplyError(f"the reply is longer than {limit} bytes", retried=False, splits=True)
    return bytes(body)


def parse_json(body: bytes) -> object:
    try:
        reply: object = json.loads(body.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise ReplyError(
            f"the reply is no JSON ({type(error).__name__}: {str(error)[:120]}): {excerpt(body)}", retried=False
        ) from error
    return reply


def excerpt(body: bytes) -> str:
    """The start of a body as one line."""
    return " ".join(body[:4096].decode("utf-8", "replace").split())[:200]
