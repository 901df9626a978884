"""A remote OpenAI-compatible server as an engine for the simulator: prompts and completions are UTF-8 bytes.

Requests go out the moment they are added, from a background thread with its own asyncio loop; `step` never waits.
Nothing is made up: a request that can't be answered comes back as FAILED, with the reason.
"""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2
import openai

from zs_fast.config import SimulatorConfig
from zs_fast.errors import EngineError, PreflightError
from zs_fast.search.backends.background_loop import BackgroundLoop
from zs_fast.search.backends.transport import (
    CONNECT_TIMEOUT_S,
    FIRST_WAIT_S,
    HideKey,
    Key,
    ReplyError,
    check_address,
    excerpt,
    is_loopback,
    parse_json,
    read,
    refuse_errors,
    wait_s,
)
from zs_fast.search.codec import ByteCodec
from zs_fast.system.seeds import uniform
from zs_fast.types import Completion, FinishReason, Role, Sampling

MAX_REPLY_BYTES = 1 << 20
"""Longest reply that is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteStats:
    """Counts since the engine was made."""

    requests: int = 0
    retries: int = 0
    failures: int = 0


class OpenAIEngine:
    """Engine for role SIMULATOR over `simulator.url`; see `SimulatorConfig` for every setting.

    Ids are those of ByteCodec, and log-probabilities are empty. What is sent is ZeroSearch's request: an empty system
    message, the prompt as one text part, temperature and max_tokens; a Sampling's seed has no place in it, so a
    remote simulator's texts are not reproducible. Construction asks the server for one token and raises
    PreflightError if that fails. Waits double from `first_wait_s`, with jitter, up to 30 s or the server's Retry-After.
    `check` is asked in every step, and raises when there is no use in waiting: the server is known to be gone.
    """

    def __init__(
        self,
        simulator: SimulatorConfig,
        *,
        first_wait_s: float = FIRST_WAIT_S,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._simulator = simulator
        self._check = check
        self._first_wait_s = first_wait_s
        self._codec = ByteCodec()
        self._version = 0
        self._unfinished: dict[tuple[Role, int], tuple[int, Future[None]]] = {}
        """By request: its number, unlike its id never used again, and what is under way for it."""
        self._finished: queue.SimpleQueue[tuple[int, Completion]] = queue.SimpleQueue()
        self._num_retries = self._num_requests = self._num_failures = 0
        host = check_address(simulator.url, name="simulator.url", key_name="simulator.api_key_env")
        loopback = is_loopback(host)
        self._key = Key(os.environ.get(simulator.api_key_env, ""))
        self._withheld = bool(self._key) and simulator.url.lower().startswith("http:") and not loopback
        self._filter = HideKey(self._key).install()
        self._loop = BackgroundLoop("openai-engine")
        self._client, self._in_flight = self._loop.wait_for(self._connect(loopback))
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
        if self._loop.is_closed or not prompt_ids:
            raise EngineError(f"Request {request_id}: the engine is closed." if prompt_ids else "The prompt is empty.")
        if (role, request_id) in self._unfinished:
            raise EngineError(f"Request {request_id} of {role} was added twice before it finished.")
        self._num_requests += 1
        prompt = self._codec.decode(prompt_ids)
        number = self._num_requests
        answer = self._answer(number, request_id, prompt, sampling, role, self._version)
        self._unfinished[role, request_id] = number, self._loop.start(answer)

    def step(self) -> list[Completion]:
        if (fault := self._loop.fault) is not None:
            raise EngineError(f"The remote engine broke: {fault!r}") from fault
        if self._check is not None:
            self._check()
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
        self._loop.close(self._disconnect)

    async def _connect(self, loopback: bool) -> tuple[openai.AsyncOpenAI, asyncio.Semaphore]:
        http_client = openai.DefaultAsyncHttpxClient(
            follow_redirects=False,
            # A proxy from the environment must not see what is meant for this machine.
            trust_env=not loopback,
            event_hooks={"response": [partial(refuse_errors, key=self._key)]},
        )
        client = openai.AsyncOpenAI(
            base_url=self._simulator.url,
            api_key="none" if self._withheld or not self._key else self._key.reveal(),
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
        await self._client.close()
        self._filter.remove()

    def _check_health(self) -> None:
        try:
            self._loop.wait_for(self._ask("ping", Sampling(max_new_tokens=1, temperature=0.0), must_speak=False))
        except ReplyError as error:
            problem = str(error)
        else:
            return
        hint = (
            f" The key in {self._simulator.api_key_env} was not sent, since {self._simulator.url} is plain http to "
            "another machine; use https."
            if self._withheld
            else ""
        )
        # Outside the except clause: the libraries' frames hold the whole request, the key included.
        raise PreflightError(
            f"The simulator's server at {self._simulator.url} (model {self._simulator.remote_model!r}) does not "
            f"answer: {problem}.{hint} Start it, set simulator.url and simulator.remote_model, or take "
            "simulator.kind = 'model'."
        )

    async def _answer(
        self, number: int, request_id: int, prompt: str, sampling: Sampling, role: Role, version: int
    ) -> None:
        text, reason, problem = "", FinishReason.FAILED, ""
        async with self._in_flight:
            for attempt in range(self._simulator.max_retries + 1):
                try:
                    text, reason = await self._ask(prompt, sampling, must_speak=True)
                    break
                except ReplyError as error:
                    problem = f"{self._simulator.url}: {error} (attempt {attempt + 1})"
                    if not error.retried or attempt == self._simulator.max_retries:
                        self._num_failures += 1
                        break
                    self._num_retries += 1
                    jitter = uniform(sampling.seed, attempt)
                    await asyncio.sleep(wait_s(attempt, jitter, first_s=self._first_wait_s, asked_s=error.wait_s))
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
        """One attempt: the reply's text and why it ended. Raises ReplyError for whatever goes wrong."""
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
                body = await read(response.iter_bytes(), MAX_REPLY_BYTES)
        except TimeoutError:
            raise ReplyError(f"no whole reply in {self._simulator.timeout_s:g} s", retried=True) from None
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, ReplyError):
                raise error.__cause__ from None
            problem = self._key.hide_in(str(error.__cause__ or error))
            raise ReplyError(f"{type(error).__name__}: {problem}", retried=True) from error
        except (httpx2.HTTPError, OSError) as error:  # a connection that breaks while the body is read
            raise ReplyError(f"{type(error).__name__}: {self._key.hide_in(str(error))}", retried=True) from error
        except openai.OpenAIError as error:
            raise ReplyError(f"{type(error).__name__}: {self._key.hide_in(str(error))}", retried=False) from error
        return _parse(self._key.hide_in_bytes(body), must_speak=must_speak)


def _parse(body: bytes, *, must_speak: bool) -> tuple[str, FinishReason]:
    reply: Any = parse_json(body)
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ReplyError(
            f"the reply is no chat completion ({type(error).__name__}: {error}): {excerpt(body)}", retried=False
        ) from error
    if not isinstance(text, str):
        if must_speak or text is not None:
            raise ReplyError(
                f"the reply has no text (content is {type(text).__name__}): {excerpt(body)}", retried=False
            )
        text = ""
    return text, FinishReason.LENGTH if reason == "length" else FinishReason.STOP
