"""A distinct simulator in a process of its own: an OpenAI-compatible server on loopback that ends with the run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence

import torch

from zs_fast.config import RunConfig
from zs_fast.errors import PreflightError, SimulatorError
from zs_fast.models.load import resolve_path
from zs_fast.rollout import child_watch

MODEL_NAME = "simulator"
"""By which the server knows its model."""
VLLM_SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""`vllm serve`, by the module behind it: the command itself asks for a package called vllm, and the CPU build's name is
another."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # this process has it at 0, for an engine inside
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
BLOCK_TOKENS = 128
"""Of a cache block, at most: 16 on a GPU."""
POLL_S = 0.2
TELLING_BYTES = 600
"""Of the end of a server's log, in an error."""


class ChildServer:
    """A server started by this process, and ended with it however it ends.

    `command` may hold `{port}`, which is replaced by a free one of 127.0.0.1. Construction returns once `/health`
    answers 200; it raises PreflightError, with the end of what the server wrote, if that does not happen in time.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        start_timeout_s: float,
        environment: Mapping[str, str] | None = None,
        health_path: str = "/health",
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.command = [word.replace("{port}", str(self.port)) for word in command]
        self._log = tempfile.TemporaryFile(prefix="zs_fast_")  # noqa: SIM115 - closed in `close`
        self._watch = subprocess.Popen(
            [sys.executable, "-I", child_watch.__file__, *self.command],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
            start_new_session=True,
        )
        try:
            self._wait_until_healthy(f"http://127.0.0.1:{self.port}{health_path}", start_timeout_s)
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raise SimulatorError if the server has ended."""
        status = self._watch.poll()
        if status is not None:
            raise SimulatorError(
                f"The simulator's process ended with status {status}: {self._last_words()} Start the run again with "
                "--resume; with simulator.process = 'inside' it runs in the run's own process."
            )

    def close(self) -> None:
        """End the server and all its children, and wait for that."""
        assert self._watch.stdin is not None
        self._watch.stdin.close()
        try:
            self._watch.wait(child_watch.GRACE_S + 5.0)
        except subprocess.TimeoutExpired:
            self._watch.kill()  # the server dies with it
            self._watch.wait()
        self._log.close()

    def _wait_until_healthy(self, url: str, start_timeout_s: float) -> None:
        deadline = time.monotonic() + start_timeout_s
        # A proxy from the environment has no business between two processes of this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < deadline:
            if (status := self._watch.poll()) is not None:
                raise PreflightError(
                    f"The simulator's server ended with status {status} before it answered: {self._last_words()} Its "
                    f"command: {' '.join(self.command)}. Set simulator.server_command, or simulator.process = 'inside'."
                )
            try:
                with opener.open(url, timeout=2.0) as reply:
                    if reply.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_S)
        raise PreflightError(
            f"The simulator's server did not answer at {url} in {start_timeout_s:g} s: {self._last_words()} Raise "
            f"simulator.start_timeout_s, or look at its command: {' '.join(self.command)}."
        )

    def _last_words(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - TELLING_BYTES))
        text = " ".join(self._log.read().decode("utf-8", "replace").split())
        return f"it wrote ...{text}." if text else "it wrote nothing."


def start_simulator(config: RunConfig, device: torch.device) -> ChildServer:
    """The server of a simulator of kind `model`: `simulator.server_command`, or vLLM's for that device."""
    simulator = config.simulator
    command: Sequence[str] = simulator.server_command or vllm_command(config, device)
    if any("{model}" in word for word in command):
        folder = str(resolve_path(simulator.path))
        command = [word.replace("{model}", folder) for word in command]
    return ChildServer(command, start_timeout_s=simulator.start_timeout_s, environment=ENVIRONMENT)


def vllm_command(config: RunConfig, device: torch.device) -> list[str]:
    """vLLM's server for the simulator's model, as long contexts as the run needs, with `engine`'s settings."""
    options: dict[str, object] = {
        "model": "{model}",
        "served-model-name": MODEL_NAME,
        "host": "127.0.0.1",
        "port": "{port}",
        "dtype": config.model.dtype,
        "max-model-len": _longest(config),
        "max-num-seqs": config.engine.slots,
        "kv-cache-memory-bytes": int(config.engine.kv_cache_gib * 2**30) or _kv_bytes(config),
    }
    if device.type == "cuda":
        # By default a server takes nearly the whole card; with the cache's size given, this is but a check of what is
        # free.
        options["gpu-memory-utilization"] = 0.05
    flags = ["--enforce-eager"] if config.engine.enforce_eager else []
    return [*VLLM_SERVER, *flags, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def _longest(config: RunConfig) -> int:
    return config.game.max_context_tokens + config.simulator.max_new_tokens


def _kv_bytes(config: RunConfig) -> int:
    """Of `engine.slots` sequences of full length, each in whole blocks, and of one block more."""
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(resolve_path(config.simulator.path), local_files_only=True)
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    itemsize = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_dim * itemsize
    return int((config.engine.slots * -(-_longest(config) // BLOCK_TOKENS) + 1) * BLOCK_TOKENS * per_token)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
