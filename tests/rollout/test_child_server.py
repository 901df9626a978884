"""A simulator's server as a child: started, asked, missed when it dies, and gone with its owner however that ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from zs_fast.errors import ConfigError, PreflightError, SimulatorError
from zs_fast.models.load import load_model
from zs_fast.recipe_files import load_recipe
from zs_fast.rollout.child_server import ChildServer, vllm_command
from zs_fast.rollout.openai_engine import OpenAIEngine
from zs_fast.train import train
from zs_fast.types import Role, Sampling

SERVER = """
import http.server, json, os, subprocess, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer({})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (*_, message) = asked["messages"]
        text = "Doc 1: " + asked["model"] + " was asked " + str(len(message["content"][0]["text"])) + " characters"
        self.answer({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

port, folder = int(sys.argv[1]), sys.argv[2]
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(os.path.join(folder, "pids"), "w") as file:
    file.write(f"{os.getpid()} {worker.pid}")
print("the server speaks", flush=True)
if sys.argv[3:] == ["deaf"]: time.sleep(600)
if sys.argv[3:] == ["ends"]: sys.exit(3)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path) -> list[str]:
    """A server that has a worker process of its own, as vLLM's has."""
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    return [sys.executable, str(script), "{port}", str(tmp_path)]


def pids(folder: Path, timeout_s: float = 30.0) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (folder / "pids").exists() and (text := (folder / "pids").read_text()):
            return [int(word) for word in text.split()]
        time.sleep(0.05)
    raise AssertionError("the server never started")


def alive(pid: int) -> bool:
    """Runs, and is no zombie that nobody has asked for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(found: list[int], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while any(map(alive, found)):
        assert time.monotonic() < deadline, f"of {found} some are left"
        time.sleep(0.05)


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def test_it_is_asked_like_any_remote_server_and_leaves_nothing_behind(command, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = ChildServer(command, start_timeout_s=60)
    try:
        simulator = load_recipe(["quickstart"], {}).simulator
        engine = OpenAIEngine(
            simulator.model_copy(update={"url": server.url, "remote_model": "simulator"}), check=server.check
        )
        engine.add(7, list(b"hello"), Sampling(max_new_tokens=5), role=Role.SIMULATOR)
        done = []
        while not done:
            done = engine.step()
        engine.close()
        assert bytes(done[0].token_ids) == b"Doc 1: simulator was asked 5 characters"
        found = pids(tmp_path)
        assert len(found) == 2 and all(map(alive, found))
    finally:
        server.close()
    wait_until_gone(found)


def test_its_death_is_noticed_in_the_next_step(command, tmp_path):
    server = ChildServer(command, start_timeout_s=60)
    try:
        server.check()
        server_pid, worker_pid = pids(tmp_path)
        os.kill(server_pid, signal.SIGKILL)
        wait_until_gone([server_pid, worker_pid])
        server._watch.wait(30)
        with pytest.raises(SimulatorError, match=r"ended with status 137: it wrote \.\.\.the server speaks\. .*resume"):
            server.check()
    finally:
        server.close()


def test_a_server_that_ends_or_stays_silent_is_a_preflight_error(command, tmp_path):
    with pytest.raises(PreflightError, match=r"status 3 before it answered: it wrote \.\.\.the server speaks"):
        ChildServer([*command, "ends"], start_timeout_s=60)
    wait_until_gone(pids(tmp_path))
    (tmp_path / "pids").unlink()
    with pytest.raises(PreflightError, match=r"did not answer at .* in 4 s: .*simulator\.start_timeout_s"):
        ChildServer([*command, "deaf"], start_timeout_s=4)
    wait_until_gone(pids(tmp_path))
    with pytest.raises(PreflightError, match=r"ended with status 1 before it answered: .*no_such_program"):
        ChildServer(["no_such_program", "{port}"], start_timeout_s=60)


OWNER = """
import sys
from zs_fast.rollout.child_server import ChildServer
server = ChildServer(sys.argv[1:], start_timeout_s=60)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_orphan_is_left_when_the_owner_is_killed(command, tmp_path, how):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
        found = pids(tmp_path)
        assert all(map(alive, found))
        owner.send_signal(how)
        owner.wait(30)
        wait_until_gone(found)
    finally:
        owner.kill()
        owner.communicate()


def test_nor_when_the_watch_itself_is_killed(command, tmp_path):
    server = ChildServer(command, start_timeout_s=60)
    server_pid, worker_pid = pids(tmp_path)
    server._watch.kill()
    wait_until_gone([server_pid])
    server.close()
    os.kill(worker_pid, signal.SIGKILL)  # of a group that nobody is left to end


def test_a_run_searches_through_its_child(command, tmp_path):
    values = {
        "output": tmp_path / "run",
        "simulator.process": "child",
        "simulator.server_command": json.dumps(command),
        "train.steps": 1,
        "train.questions_per_step": 4,
        "train.group_size": 2,
        "eval.data": "",
    }
    config = load_recipe(["quickstart"], {key: [str(value)] for key, value in values.items()})
    config = config.model_copy(
        update={"simulator": config.simulator.model_copy(update={"server_command": tuple(command)})}
    )
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert any("simulator was asked" in json.dumps(row) for row in rows)
    wait_until_gone(pids(tmp_path))


def test_the_command_for_vllm_is_that_of_the_run():
    values = {"engine.slots": "12", "engine.kv_cache_gib": "0.5", "engine.enforce_eager": "true"}
    config = load_recipe(["quickstart"], {key: [value] for key, value in values.items()})
    words = vllm_command(config, torch.device("cpu"))
    pairs = dict(itertools.pairwise(words))
    assert "--gpu-memory-utilization" not in words
    assert "--gpu-memory-utilization" in vllm_command(config, torch.device("cuda"))
    assert pairs["--host"] == "127.0.0.1" and pairs["--port"] == "{port}" and pairs["--model"] == "{model}"
    assert pairs["--max-num-seqs"] == "12" and pairs["--kv-cache-memory-bytes"] == str(2**29)
    assert "--enforce-eager" in words and pairs["--served-model-name"] == "simulator"
    assert int(pairs["--max-model-len"]) == config.game.max_context_tokens + config.simulator.max_new_tokens


def test_its_cache_holds_every_slot_at_full_length():
    config = load_recipe(["quickstart"], {"engine.slots": ["3"]})
    words = vllm_command(config, torch.device("cpu"))
    given = int(dict(itertools.pairwise(words))["--kv-cache-memory-bytes"])
    model = load_model("quickstart:simulator").model.config
    head_dim = model.hidden_size // model.num_attention_heads
    per_token = 8 * model.num_hidden_layers * model.num_key_value_heads * head_dim
    tokens = config.game.max_context_tokens + config.simulator.max_new_tokens
    assert 0 <= given - 3 * tokens * per_token <= 4 * 128 * per_token


def test_only_a_model_of_its_own_has_a_process_of_its_own():
    with pytest.raises(ConfigError, match=r"simulator\.kind is 'policy'"):
        load_recipe(["quickstart"], {"simulator.kind": ["policy"], "simulator.process": ["child"]})
