"""Phases are timed, don't nest, and hand memory over where asked; weights and ranks say what is true."""

from __future__ import annotations

import mmap
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from zs_fast.errors import EngineError
from zs_fast.system import distributed
from zs_fast.system.environment import environment, write_environment
from zs_fast.system.memory import Memory, Phase, peak_rss_bytes, reset_peak_rss, return_freed_memory, wake_kv_cache
from zs_fast.system.weights import WeightPublisher


class FakeEngine:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def release_kv(self) -> int:
        self.calls.append("release")
        return 4096

    def acquire_kv(self) -> None:
        self.calls.append("acquire")

    def publish(self, version: int) -> None:
        self.calls.append(f"publish {version}")


def test_phases_add_up_until_taken() -> None:
    memory = Memory("cpu")
    for _ in range(2):
        with memory.phase(Phase.ROLLOUT):
            sum(range(200_000))
    with memory.phase(Phase.UPDATE):
        pass
    timings = memory.take()
    assert set(timings) == {
        f"{phase}/{what}" for phase in ("rollout", "update") for what in ("seconds", "cpu_seconds", "peak_rss_bytes")
    }
    assert timings["rollout/seconds"] > timings["update/seconds"] > 0
    assert timings["rollout/cpu_seconds"] > 0
    assert memory.take() == {}


def test_a_phase_that_raises_is_measured_and_ends() -> None:
    memory = Memory("cpu")
    with pytest.raises(KeyError), memory.phase(Phase.SCORE):
        raise KeyError("a bug")
    with memory.phase(Phase.SCORE):
        pass
    assert memory.take()["score/seconds"] > 0


def test_phases_do_not_nest() -> None:
    memory = Memory("cpu")
    inner = memory.phase(Phase.SYNC)
    with memory.phase(Phase.ROLLOUT), pytest.raises(AssertionError, match="sync starts inside phase rollout"), inner:
        pass


def test_the_peak_belongs_to_its_phase() -> None:
    if not reset_peak_rss():
        pytest.skip("this system can't reset its mark")
    memory = Memory("cpu")
    size = 64 * 2**20
    # Of the system, not of the allocator: in a heap with room for it nothing would rise, and nothing fall.
    with memory.phase(Phase.ROLLOUT), mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
    with memory.phase(Phase.UPDATE):
        pass
    timings = memory.take()
    assert timings["rollout/peak_rss_bytes"] - timings["update/peak_rss_bytes"] > size / 2
    assert peak_rss_bytes() > 2**20


def test_kv_is_handed_back_between_rollouts_only() -> None:
    engine = FakeEngine()
    memory = Memory("cpu", engine=engine)
    for phase in (Phase.ROLLOUT, Phase.SCORE, Phase.UPDATE, Phase.SYNC, Phase.ROLLOUT, Phase.ROLLOUT, Phase.UPDATE):
        with memory.phase(phase):
            pass
    assert engine.calls == ["release", "acquire", "release"]
    timings = memory.take()
    assert timings["kv_released_bytes"] == 8192
    edges = {name: value for name, value in timings.items() if name.startswith("edge/")}
    assert {name: value for name, value in edges.items() if name.endswith("bytes")} == {
        "edge/rollout_to_score/released_bytes": 4096,
        "edge/sync_to_rollout/released_bytes": 0,
        "edge/rollout_to_update/released_bytes": 4096,
    }
    seconds = {name for name in edges if name.endswith("seconds")}
    assert len(edges) == 6 and len(seconds) == 3 and all(0 <= edges[name] < 5 for name in seconds)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_that_was_freed_among_what_stays_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    blocks = [torch.ones(2**14) for _ in range(4000)]  # 64 KiB each: small enough to stay in the heap when freed
    blocks = blocks[::8]
    before = resident()
    if not return_freed_memory():
        pytest.skip("no glibc here")
    assert before - resident() > 100e6 and all(block[0] == 1 for block in blocks)


def test_only_the_key_value_cache_is_woken() -> None:
    class Allocator:
        woken: object = None

        def wake_up(self, tags: list[str] | None = None) -> None:
            self.woken = tags

    allocator = Allocator()
    wake_kv_cache(allocator)
    assert allocator.woken == ["kv_cache"]


def test_caches_are_emptied_in_one_file_only() -> None:
    package = Path(distributed.__file__).parents[1]
    users = [path.name for path in package.rglob("*.py") if "empty_cache(" in path.read_text(encoding="utf-8")]
    assert users == ["memory.py"]


def tensors_of(module: nn.Module) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: dict(module.named_parameters())


def test_a_shared_module_is_published_with_rising_versions() -> None:
    engine, model = FakeEngine(), nn.Linear(3, 2)
    publisher = WeightPublisher(engine, trained=model, served=tensors_of(model))
    publisher.publish(1)
    publisher.publish(5)
    assert engine.calls == ["publish 1", "publish 5"] and publisher.version == 5
    for stale in (5, 4):
        with pytest.raises(EngineError, match=f"version {stale} can't follow version 5"):
            publisher.publish(stale)
    assert engine.calls == ["publish 1", "publish 5"]


def test_a_copy_is_refused_at_the_start() -> None:
    model, copy = nn.Linear(3, 2), nn.Linear(3, 2)
    copy.load_state_dict(model.state_dict())
    with pytest.raises(EngineError, match="weight lies in other memory"):
        WeightPublisher(FakeEngine(), trained=model, served=tensors_of(copy))
    with pytest.raises(EngineError, match="bias"):
        WeightPublisher(FakeEngine(), trained=model, served=tensors_of(nn.Linear(3, 2, bias=False)))


def test_weights_that_part_later_are_caught_before_they_are_published() -> None:
    trained, served = nn.Linear(3, 2), nn.Linear(3, 2)
    served.weight, served.bias = trained.weight, trained.bias
    engine = FakeEngine()
    publisher = WeightPublisher(engine, trained=trained, served=tensors_of(served))
    publisher.publish(1)
    with torch.no_grad():
        trained.weight.add_(1)  # in place: still one memory
    publisher.publish(2)
    trained.weight = nn.Parameter(trained.weight.detach().clone())
    with pytest.raises(EngineError, match="weight lies in other memory"):
        publisher.publish(3)
    assert engine.calls == ["publish 1", "publish 2"]


def test_weights_of_its_own_are_written_before_the_version_is_announced() -> None:
    trained, held = nn.Linear(3, 2), nn.Linear(3, 2)
    engine = FakeEngine()

    def copy() -> int:
        engine.calls.append("copy")
        held.load_state_dict(trained.state_dict())
        return sum(parameter.nbytes for parameter in trained.parameters())

    publisher = WeightPublisher(engine, trained=trained, served=tensors_of(held), copy=copy)
    assert engine.calls == [] and publisher.copied_bytes == 0
    publisher.publish(1)
    assert engine.calls == ["copy", "publish 1"] and publisher.copied_bytes == 32
    assert torch.equal(trained.weight, held.weight)
    with pytest.raises(EngineError, match="can't follow"):
        publisher.publish(1)
    assert engine.calls == ["copy", "publish 1"]
    with torch.no_grad():
        trained.weight.add_(1)  # as a resume does, which reads the trainer's weights from a file
    publisher.announce(7)
    assert engine.calls[2:] == ["copy", "publish 7"] and torch.equal(trained.weight, held.weight)


def test_one_process_needs_no_torch_distributed() -> None:
    assert not distributed.is_initialised()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    assert distributed.all_reduce_sums({"b": 0.1, "a": 2}) == {"b": 0.1, "a": 2.0}
    assert list(distributed.all_reduce_sums({"b": 0.1, "a": 2})) == ["b", "a"]


def act_as_rank(rank: int, folder: Path) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=3)
    assert distributed.rank() == rank and distributed.world_size() == 3 and distributed.is_main() == (rank == 0)
    sums = distributed.all_reduce_sums({"big": [1e16, 1.0, -1e16][rank], "count": rank})
    assert sums == {"big": 1.0, "count": 3.0}, sums
    distributed.barrier()
    sums = distributed.all_reduce_sums({"a": 1.0} if rank else {"b": 2.0, "a": float("inf")})
    assert list(sums.items()) == [("b", 2.0), ("a", float("inf"))], sums
    torch.distributed.destroy_process_group()


def test_ranks_add_exactly_and_take_a_missing_name_as_zero(tmp_path: Path) -> None:
    ranks = []
    for rank in range(3):
        child = os.fork()
        if child == 0:
            try:
                act_as_rank(rank, tmp_path)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        ranks.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks] == [0, 0, 0]


def test_env_json_tells_versions_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary-7c1f")
    monkeypatch.setenv("WANDB_API_KEY", "canary-7c1f")
    path = write_environment(tmp_path, "cpu")
    text = path.read_text()
    assert "canary" not in text and str(Path.home()) not in text and os.uname().nodename not in text
    found = environment("cpu")
    assert found["packages"]["torch"] == torch.__version__  # type: ignore[index]
    assert found["cpu_count"] == os.cpu_count() and found["device"] == "cpu"
    assert [child.name for child in tmp_path.iterdir()] == ["env.json"]
