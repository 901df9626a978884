"""F46: what our processes listen to, read from the kernel's own tables: the loopback interface, or nothing."""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import zs_fast
from zs_fast.rollout.child_server import free_port

if not Path("/proc/net/tcp").exists():
    pytest.skip("reads the tables of Linux", allow_module_level=True)

ROOT = Path(zs_fast.__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
LISTENS = "0A"
RUN = {
    "train.steps": 40, "train.questions_per_step": 1, "train.group_size": 2, "train.save_every": 0,
    "simulator.kind": "bm25", "game.max_new_tokens": 16, "eval.data": "",
}  # fmt: skip


def descendants(pid: int) -> list[int]:
    found = [pid]
    for process in found:
        with suppress(OSError):
            for children in Path(f"/proc/{process}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def address(words: str) -> str:
    """`0100007F:1F90` of the kernel's table -> `127.0.0.1`."""
    digits = bytes.fromhex(words.partition(":")[0])
    whole = b"".join(digits[place : place + 4][::-1] for place in range(0, len(digits), 4))
    return str(ipaddress.ip_address(whole))


def listeners(pid: int) -> set[str]:
    """Addresses that one process listens to."""
    sockets = set()
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {address(row[1]) for row in rows if row[3] == LISTENS and row[9] in sockets}


def is_loopback(one: str) -> bool:
    found = ipaddress.ip_address(one)
    return found.is_loopback or bool(getattr(found, "ipv4_mapped", None) and found.ipv4_mapped.is_loopback)


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_listener_on_every_interface_would_be_seen():
    code = "import socket, sys; s = socket.create_server(('', 0)); print(flush=True, file=sys.stderr); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        assert not all(is_loopback(one) for one in listeners(process.pid)) and listeners(process.pid)
        process.kill()


def test_the_retriever_listens_to_loopback_alone():
    with started("zs_fast.cli", "retriever", "--corpus", "quickstart:world", "--port", "0") as process:
        assert process.stderr is not None
        assert "http://127.0.0.1:" in process.stderr.readline()
        assert [listeners(pid) for pid in descendants(process.pid)] == [{"127.0.0.1"}]


def flags(output: Path) -> list[str]:
    return [word for key, value in (RUN | {"output": output}).items() for word in (f"--{key}", str(value))]


@pytest.mark.full
def test_a_run_of_one_process_listens_to_nothing(tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    with started("zs_fast.cli", "train", "quickstart", *flags(tmp_path / "run")) as process:
        wait_for(lambda: log.exists() and log.stat().st_size > 0, process)
        assert [listeners(pid) for pid in descendants(process.pid)] == [set()]


@pytest.mark.full
def test_the_ranks_of_a_run_listen_to_loopback_alone(tmp_path):
    """torchrun's own process is another matter: torch decides where its store listens."""
    log = tmp_path / "run" / "metrics.jsonl"
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "zs_fast.cli"]
    words = ["train", "quickstart", *flags(tmp_path / "run"), "--train.questions_per_step", "2"]
    with started(*launch, *words) as process:
        wait_for(lambda: log.exists() and log.stat().st_size > 0, process)
        agent, *ranks = descendants(process.pid)
        found = [listeners(pid) for pid in ranks]
        print("torchrun itself:", listeners(agent), "ranks:", found)
        assert len(ranks) == 2 and any(found), "they did meet"
        assert all(is_loopback(one) for addresses in found for one in addresses)
