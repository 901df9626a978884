"""A remote OpenAI-compatible server as an engine for the simulator: prompts and completions are UTF-8 bytes.

Requests go out the moment they are added, from a background thread with its own asyncio loop; `step` never waits.
Nothing is made up: a request that can't be answered comes back as FAILED, with the reason.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import queue
import threading
from collections.abc import Collection, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from zs_fast.config import SimulatorConfig
from zs_fast.errors import EngineError, PreflightError
from zs_fast.search.codec import ByteCodec
from zs_fast.system.seeds import uniform
from zs_fast.types import Completion, FinishReason, Role, Sampling

RETRIED_STATUSES = frozenset({408, 409, 429, *range(500, 600)})
MAX_REPLY_BYTES = 1 << 20
"""Longest reply that is read, and 1/16 of it of an error page."""
CONNECT_TIMEOUT_S = 10.0
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteStats:
    """Counts since the engine was made."""

    requests: int = 0
    retries: int = 0
    failures: int = 0


class _ReplyError(Exception):
    """One attempt failed. `retried` says whether another may help; `wait_s` is the server's Retry-After, or 0."""

    def __init__(self, reason: str, *, retried: bool, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retried = retried
        self.wait_s = wait_s


class OpenAIEngine:
    """Engine for role SIMULATOR over `simulator.url`; see `SimulatorConfig` for every setting.

    Ids are those of ByteCodec, and log-probabilities are empty. What is sent is ZeroSearch's request: an empty system
    message, the prompt as one text part, temperature and max_tokens; a Sampling's seed has no place in it, so a
    remote simulator's texts are not reproducible. Construction asks the server for one token and raises
    PreflightError if that fails. Waits double from `first_wait_s`, with jitter, up to 30 s or the server's Retry-After.
    """

    def __init__(self, simulator: SimulatorConfig, *, first_wait_s: float = FIRST_WAIT_S) -> None:
        self._simulator = simulator
        self._first_wait_s = first_wait_s
        self._codec = ByteCodec()
        self._version = 0
        self._unfinished: dict[tuple[Role, int], tuple[int, Future[None]]] = {}
        """By request: its number, unlike its id never used again, and what is under way for it."""
        self._finished: queue.SimpleQueue[tuple[int, Completion]] = queue.SimpleQueue()
        self._fault: BaseException | None = None
        self._num_retries = self._num_requests = self._num_failures = 0
        url = urlsplit(simulator.url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise PreflightError(
                f"simulator.url is {simulator.url!r}; it must look like http://127.0.0.1:6001/v1 or https://host/v1."
            )
        if url.username or url.password:
            raise PreflightError(
                f"simulator.url holds a name or password before {url.hostname}; it would stand in config.toml and "
                "logs. Leave it out, and put the key into the environment variable that simulator.api_key_env names."
            )
        loopback = _is_loopback(url.hostname)
        key = os.environ.get(simulator.api_key_env, "")
        self._withheld = bool(key) and url.scheme == "http" and not loopback
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()
        self._client, self._in_flight = self._wait_for(self._connect("" if self._withheld else key, loopback))
        try:
            self._check_health()
        except PreflightError:
            self.close()
            raise

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, *, role: Role, cache_salt: str | None = None
    ) -> None:
        if role is not Role.SIMULATOR:
            raise EngineError(f"A remote server can't serve the {role}: it takes and gives text, not sampled tokens.")
        if self._thread is None or not prompt_ids:
            raise EngineError(f"Request {request_id}: the engine is closed." if prompt_ids else "The prompt is empty.")
        if (role, request_id) in self._unfinished:
            raise EngineError(f"Request {request_id} of {role} was added twice before it finished.")
        self._num_requests += 1
        prompt = self._codec.decode(prompt_ids)
        number = self._num_requests
        answer = self._answer(number, request_id, prompt, sampling, role, self._version)
        future = asyncio.run_coroutine_threadsafe(answer, self._loop)
        future.add_done_callback(self._note_fault)
        self._unfinished[role, request_id] = number, future

    def step(self) -> list[Completion]:
        if self._fault is not None:
            raise EngineError(f"The remote engine broke: {self._fault!r}") from self._fault
        completions = []
        while not self._finished.empty():
            number, completion = self._finished.get_nowait()
            key = completion.role, completion.request_id
            if key in self._unfinished and self._unfinished[key][0] == number:
                del self._unfinished[key]
                completions.append(completion)
        return completions

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def end(self, role: Role, cache_salt: str) -> None:
        """Nothing is kept between requests."""

    def abort(self, role: Role, request_ids: Collection[int]) -> None:
        for request_id in request_ids:
            if (role, request_id) in self._unfinished:
                _, future = self._unfinished.pop((role, request_id))
                future.cancel()

    def publish(self, version: int) -> None:
        """The server's weights are not ours; completions still say which policy asked."""
        self._version = version

    def release_kv(self) -> int:
        return 0

    def acquire_kv(self) -> None:
        """No memory of ours is held."""

    def stats(self) -> RemoteStats:
        return RemoteStats(requests=self._num_requests, retries=self._num_retries, failures=self._num_failures)

    def close(self) -> None:
        """Give up what is under way, and end the thread."""
        if self._thread is None:
            return
        self._wait_for(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._thread = None  # type: ignore[assignment]

    def _note_fault(self, future: Future[None]) -> None:
        """An answer that ended without a completion would be waited for until the end of days."""
        if not future.cancelled() and future.exception() is not None:
            self._fault = future.exception()

    def _wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _connect(self, key: str, loopback: bool) -> tuple[openai.AsyncOpenAI, asyncio.Semaphore]:
        http_client = openai.DefaultAsyncHttpxClient(
            follow_redirects=False,
            # A proxy from the environment must not see what is meant for this machine.
            trust_env=not loopback,
            event_hooks={"response": [_refuse_errors]},
        )
        client = openai.AsyncOpenAI(
            base_url=self._simulator.url,
            api_key=key or "none",
            admin_api_key="",
            organization="",
            project="",
            webhook_secret="",
            max_retries=0,
            timeout=openai.Timeout(
                self._simulator.timeout_s, connect=min(CONNECT_TIMEOUT_S, self._simulator.timeout_s)
            ),
            http_client=http_client,
            default_headers={
                "Accept-Encoding": "identity",
                "OpenAI-Organization": openai.Omit(),
                "OpenAI-Project": openai.Omit(),
            },
        )
        return client, asyncio.Semaphore(self._simulator.max_in_flight)

    async def _disconnect(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def _check_health(self) -> None:
        try:
            self._wait_for(self._ask("ping", Sampling(max_new_tokens=1, temperature=0.0), must_speak=False))
        except _ReplyError as error:
            hint = (
                f" The key in {self._simulator.api_key_env} was not sent, since {self._simulator.url} is plain http to "
                "another machine; use https."
                if self._withheld
                else ""
            )
            raise PreflightError(
                f"The simulator's server at {self._simulator.url} (model {self._simulator.remote_model!r}) does not "
                f"answer: {error}.{hint} Start it, set simulator.url and simulator.remote_model, or take "
                "simulator.kind = 'model'."
            ) from error

    async def _answer(
        self, number: int, request_id: int, prompt: str, sampling: Sampling, role: Role, version: int
    ) -> None:
        text, reason, problem = "", FinishReason.FAILED, ""
        async with self._in_flight:
            for attempt in range(self._simulator.max_retries + 1):
                try:
                    text, reason = await self._ask(prompt, sampling, must_speak=True)
                    break
                except _ReplyError as error:
                    problem = f"{self._simulator.url}: {error} (attempt {attempt + 1})"
                    if not error.retried or attempt == self._simulator.max_retries:
                        self._num_failures += 1
                        break
                    self._num_retries += 1
                    jitter = 0.5 + uniform(sampling.seed, attempt)
                    wait_s = max(error.wait_s, self._first_wait_s * 2.0**attempt * jitter)
                    await asyncio.sleep(min(wait_s, LONGEST_WAIT_S))
        completion = Completion(
            request_id=request_id,
            role=role,
            token_ids=tuple(self._codec.encode_untrusted(text)),
            logprobs=(),
            finish_reason=reason,
            policy_version=version,
            error=problem if reason is FinishReason.FAILED else "",
        )
        self._finished.put((number, completion))

    async def _ask(self, prompt: str, sampling: Sampling, *, must_speak: bool) -> tuple[str, FinishReason]:
        """One attempt: the reply's text and why it ended. Raises _ReplyError for whatever goes wrong."""
        options: dict[str, Any] = {"top_p": sampling.top_p} if sampling.top_p < 1.0 else {}
        if sampling.stop:
            options["stop"] = list(sampling.stop)
        try:
            async with (
                asyncio.timeout(self._simulator.timeout_s),
                self._client.chat.completions.with_streaming_response.create(
                    model=self._simulator.remote_model,
                    messages=[
                        {"role": "system", "content": ""},
                        {"role": "user", "content": [{"type": "text", "text": prompt}]},
                    ],
                    temperature=sampling.temperature,
                    max_tokens=sampling.max_new_tokens,
                    **options,
                ) as response,
            ):
                body = await _read(response.iter_bytes(), MAX_REPLY_BYTES)
        except TimeoutError:
            raise _ReplyError(f"no whole reply in {self._simulator.timeout_s:g} s", retried=True) from None
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, _ReplyError):
                raise error.__cause__ from None
            raise _ReplyError(f"{type(error).__name__}: {error.__cause__ or error}", retried=True) from error
        except openai.OpenAIError as error:
            raise _ReplyError(f"{type(error).__name__}: {error}", retried=False) from error
        return _parse(body, must_speak=must_speak)


async def _refuse_errors(response: Any) -> None:
    """Raise _ReplyError for any answer that is not a success, having read only the start of its body."""
    status = response.status_code
    if status < 300:
        return
    if status < 400:
        raise _ReplyError(
            f"HTTP {status}, a redirect to {response.headers.get('location', '?')!r}, which is not followed",
            retried=False,
        )
    body = b""
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_REPLY_BYTES // 16:
            break
    excerpt = " ".join(body.decode("utf-8", "replace").split())[:200]
    after = response.headers.get("retry-after", "")
    raise _ReplyError(
        f"HTTP {status}: {excerpt}",
        retried=status in RETRIED_STATUSES,
        wait_s=float(after) if after.isdecimal() else 0.0,
    )


async def _read(chunks: Any, limit: int) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limit:
            raise _ReplyError(f"the reply is longer than {limit} bytes", retried=False)
    return bytes(body)


def _parse(body: bytes, *, must_speak: bool) -> tuple[str, FinishReason]:
    excerpt = " ".join(body[:200].decode("utf-8", "replace").split())
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"]
        reason = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _ReplyError(
            f"the reply is no chat completion ({type(error).__name__}: {error}): {excerpt}", retried=False
        ) from error
    if not isinstance(text, str):
        if must_speak or text is not None:
            raise _ReplyError(f"the reply has no text (content is {type(text).__name__}): {excerpt}", retried=False)
        text = ""
    return text, FinishReason.LENGTH if reason == "length" else FinishReason.STOP


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
