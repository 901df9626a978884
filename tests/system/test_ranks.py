"""Several processes in one run: they play what one plays, write its files once, and fail as one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

from zs_fast import ranks
from zs_fast.config import RunConfig
from zs_fast.errors import EngineError, PreflightError, SimulatorError
from zs_fast.recipe_files import load_recipe
from zs_fast.system import distributed
from zs_fast.system.exchange import groups_from_json, groups_to_json
from zs_fast.train import train
from zs_fast.types import (
    Answer,
    Completion,
    FinishReason,
    Group,
    Invalid,
    Question,
    Role,
    Scores,
    Search,
    SearchMode,
    SearchRequest,
    SearchResult,
    StopReason,
    Trajectory,
    Turn,
)

SMALL = {
    "train.steps": "2",
    "train.questions_per_step": "3",
    "train.group_size": "2",
    "train.save_every": "1",
    "train.mini_batches": "2",
    "eval.questions": "3",
    "eval.at_start": "false",
    "eval.search": "bm25",
    "log.rollouts_per_step": "6",
}


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


ROOT = Path(ranks.__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def command(output: Path, *words: str) -> list[str]:
    flags = [word for key, value in SMALL.items() for word in (f"--{key}", value)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "zs_fast.cli"]
    return [*launch, "train", "quickstart", "--output", str(output), *flags, *words]


def torchrun(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(output, *words), capture_output=True, text=True, timeout=500, env=ENVIRONMENT, cwd=ROOT
    )


class DyingServer(BaseHTTPRequestHandler):
    """Answers a chat request with a document as long as `lives` says so."""

    lives = threading.Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "Doc 1: nothing to see here"}
        body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200 if self.lives.is_set() else 500)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def wait_for(condition: Callable[[], bool], agent: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and agent.poll() is None
        time.sleep(0.05)


def workers_of(agent: subprocess.Popen[str]) -> list[int]:
    """Process ids of what torchrun started, by rank."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def a_small_run(output: Path) -> RunConfig:
    return load_recipe(["quickstart"], {key: [value] for key, value in SMALL.items()} | {"output": [str(output)]})


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("runs") / "one"
    train(a_small_run(output))
    return output


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    output = tmp_path_factory.mktemp("runs") / "two"
    done = torchrun(output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1/2") == done.stdout.count("f1_bm25_after") == 1, done.stdout
    return output


def test_two_processes_play_the_same_and_learn_the_same(one: Path, two: Path) -> None:
    """Two questions here and one there; the first step's play is equal to the byte, all numbers are to rounding."""
    played = {run: [row for row in rows(run, "rollouts.jsonl") if row["step"] == 1] for run in (one, two)}
    assert played[one] == played[two] and len(played[one]) == 6
    assert len(rows(one)) == len(rows(two)) == 3
    for ours, theirs in zip(rows(one), rows(two), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)
    assert json.loads((two / "env.json").read_text())["processes"] == 2
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    assert summaries[0]["evaluations"] == summaries[1]["evaluations"]


def test_one_process_goes_on_from_what_two_have_saved(one: Path, two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_2")
    train(a_small_run(tmp_path / "run"), resume=True)
    assert rows(tmp_path / "run")[:1] == rows(two)[:1]
    for ours, theirs in zip(rows(one), rows(tmp_path / "run"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)


def test_a_run_goes_on_with_its_weights_in_pieces(two: Path, tmp_path: Path) -> None:
    """FSDP2 from the second step on, and its checkpoint is a plain one: the numbers and weights of the run without."""
    run = tmp_path / "run"
    shutil.copytree(two, run)
    shutil.rmtree(run / "checkpoints" / "step_2")
    done = torchrun(run, "--resume", "--train.sharding", "fsdp2")
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(rows(two), rows(run), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)
    for name in ("model/model.safetensors", "trainer.safetensors"):
        expected, found = (load_file(folder / "checkpoints" / "step_2" / name) for folder in (two, run))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.full
def test_a_bfloat16_run_in_pieces_goes_on_in_one_process(tmp_path: Path) -> None:
    run, words = tmp_path / "run", ["--train.sharding", "fsdp2", "--model.dtype", "bfloat16", "--algorithm.name", "ppo"]
    done = torchrun(run, *words)
    assert done.returncode == 0, done.stderr
    played = rows(run)
    shutil.rmtree(run / "checkpoints" / "step_2")
    overrides = {key: [value] for key, value in SMALL.items()} | {"output": [str(run)]}
    train(
        load_recipe(["quickstart"], overrides | {"model.dtype": ["bfloat16"], "algorithm.name": ["ppo"]}), resume=True
    )
    (first, second, _), (ours, theirs, _) = rows(run), played
    assert first == ours
    for key in ("reward/mean", "entropy", "critic/loss", "grad_norm"):
        assert second[key] == pytest.approx(theirs[key], rel=0.05), key


@pytest.mark.full
def test_two_processes_go_on_to_the_same_bytes(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_2")
    done = torchrun(tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "rollouts.jsonl", "checkpoints/step_2/model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.full
def test_what_stops_one_rank_is_said_once(two: Path) -> None:
    """The folder holds a run, which only the main process looks for."""
    done = torchrun(two)
    assert done.returncode != 0
    assert done.stderr.count("already holds a run") == 1
    assert "zs_fast/train.py" not in done.stderr, "a traceback of ours beside torchrun's own report"


@pytest.mark.full
def test_a_dead_simulator_is_said_once_after_the_finished_steps_are_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    server = ThreadingHTTPServer(("127.0.0.1", 0), DyingServer)
    DyingServer.lives.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = ["--train.save_every", "0", "--simulator.kind", "openai", "--simulator.max_retries", "0"]
    words += ["--train.steps", "9", "--simulator.url", f"http://127.0.0.1:{server.server_port}/v1"]
    with subprocess.Popen(
        command(run, *words), stdout=PIPE, stderr=PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
    ) as agent:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(rows(run)) > 0, agent)
        DyingServer.lives.clear()
        _, said = agent.communicate(timeout=100)
    server.shutdown()
    assert agent.returncode != 0
    assert said.count("searches failed, more than simulator.max_failed_share") == 1, said
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name == f"step_{rows(run)[-1]['step']}"


@pytest.mark.full
def test_a_killed_rank_takes_the_others_with_it(two: Path, tmp_path: Path) -> None:
    """SIGKILL of the second process in the second step: all are gone within seconds, and a resume ends the same."""
    run = tmp_path / "run"
    with subprocess.Popen(command(run), stdout=PIPE, stderr=PIPE, text=True, env=ENVIRONMENT, cwd=ROOT) as agent:
        wait_for(lambda: (run / "latest").exists(), agent)
        workers = workers_of(agent)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        killed = time.monotonic()
        agent.communicate(timeout=60)
        assert agent.returncode != 0 and time.monotonic() - killed < 10
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    done = torchrun(run, "--resume")
    assert done.returncode == 0, done.stderr
    assert (run / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


def _work(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    _speak_as_one(rank)
    _tell_and_sum(rank)
    distributed.barrier()
    if rank == 1:
        os._exit(9)
    with pytest.raises(EngineError, match=r"Rank 0 of 2 lost contact.*--resume"):
        distributed.gather("anyone?")
    os._exit(0)


def _speak_as_one(rank: int) -> None:
    with pytest.raises(SimulatorError, match=r"the server is gone$") as caught, distributed.together():
        if rank == 1:
            raise SimulatorError("the server is gone")
    assert caught.value.is_shared
    assert str(caught.value).startswith("rank 1: ") == (rank == 0)
    with distributed.together():
        pass


def _tell_and_sum(rank: int) -> None:
    assert distributed.from_main({"a": [rank, float("inf")]}) == {"a": [0, float("inf")]}
    assert distributed.largest({"a": rank, "b" if rank else "c": 5.0}) == {"a": 1, "c": 5.0, "b": 5.0}
    tensors = [torch.full((2, 3), rank + 1.0), torch.arange(4.0).view(2, 2).T, torch.ones(3, dtype=torch.float64)]
    distributed.sum_tensors(tensors)
    assert [t.flatten().tolist() for t in tensors] == [[3.0] * 6, [0.0, 4.0, 2.0, 6.0], [2.0] * 3]
    distributed.check_same_bits({"a": torch.ones(3)}, "weights")
    with pytest.raises(EngineError, match=r"weights: b has other bits on rank 1 than on rank 0 \(1 of 2"):
        distributed.check_same_bits({"a": torch.ones(3), "b": torch.tensor(float(rank)).bfloat16()}, "weights")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_ranks_fail_as_one_and_notice_one_that_died(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 9]


def test_a_launcher_that_says_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    expected = pytest.raises(PreflightError, match=r"WORLD_SIZE is 2.*RANK is not set.*torchrun")
    with expected, distributed.process_group("cpu", timeout_s=1.0):
        pass


def test_several_processes_take_the_engine_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe(["quickstart"], {"engine.kind": ["vllm"]})
    ranks.check_recipe(config)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(PreflightError, match=r"engine\.kind = 'vllm'.*torchrun started 2"):
        ranks.check_recipe(config)
    with pytest.raises(PreflightError, match=r"simulator\.process is 'child', but torchrun started 2"):
        ranks.check_recipe(load_recipe(["quickstart"], {"simulator.process": ["child"]}))


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("model.lora_rank", "4", "the base that each process holds"),
        ("train.optimizer", "adamw_8bit", "take 'adamw'"),
        ("seed", "0", "there is one"),
    ],
)
def test_what_pieces_can_t_do_is_said_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str, says: str
) -> None:
    config = load_recipe(["quickstart"], {"train.sharding": ["fsdp2"], key: [value]})
    monkeypatch.setattr(ranks, "world_size", lambda: 1 if key == "seed" else 2)
    with pytest.raises(PreflightError, match=rf"train\.sharding.*{says}"):
        ranks.check_sharding(config)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("mini_batches", [1, 3])
def test_shares_are_as_even_as_whole_groups_allow(num_ranks: int, mini_batches: int) -> None:
    weights = [(7919 * place) % 101 + 1 for place in range(24)]
    owners = ranks.balanced(weights, mini_batches, num_ranks)
    for part in range(mini_batches):
        places = range(part * 24 // mini_batches, (part + 1) * 24 // mini_batches)
        loads = [sum(weights[p] for p in places if owners[p] == number) for number in range(num_ranks)]
        assert max(loads) - min(loads) <= max(weights[p] for p in places)


def test_groups_come_back_from_json_equal() -> None:
    question = Question(id="s:1", text="wer\ud800?", answers=("a", "ä"), source="s")
    request = SearchRequest(step=1, question=question, sample=0, turn=0, query="q", noise_probability=0.1)
    result = SearchResult(request=request, documents=("d", "e\n"), mode=SearchMode.NOISY, error="x")
    completion = Completion(
        request_id=3,
        role=Role.POLICY,
        token_ids=(1, 2),
        logprobs=(-0.1, -1 / 3),
        finish_reason=FinishReason.LENGTH,
        policy_version=2,
    )
    turns = [
        Turn(completion=completion, action=Search("q"), observation="o", observation_ids=(4,), search=result),
        Turn(completion=completion, action=Answer("text")),
        Turn(completion=completion, action=Invalid("no_action")),
    ]
    trajectory = Trajectory(
        question=question,
        sample=1,
        prompt_ids=(9, 8),
        turns=tuple(turns),
        stop_reason=StopReason.SEARCH_FAILED,
        scores=Scores(f1=0.1, exact_match=0.0, cover_match=1.0),
        reward=float("-inf"),
        trainable=False,
    )
    groups = [Group(question=question, trajectories=(trajectory,)), Group(question=question, trajectories=())]
    travelled = json.loads(json.dumps(groups_to_json(groups)))
    assert groups_from_json(travelled) == groups
    assert isinstance(groups_from_json(travelled)[0].trajectories[0].turns[0].search.mode, SearchMode)  # type: ignore[union-attr]
