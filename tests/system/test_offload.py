"""What leaves the device between phases comes back as it was, is waited for where it is read, and is nobody else's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import zs_fast.offloading
from zs_fast.errors import ConfigError, MemoryBudgetError, PreflightError
from zs_fast.learn.optimizer import Optimizer, Schedule
from zs_fast.recipe_files import load_recipe
from zs_fast.system.memory import OPTIMIZER_AWAY, SIMULATOR_AWAY, Memory, Offload, Phase
from zs_fast.system.offload import CudaCopies, Movable, _check_main_memory
from zs_fast.train import train

STEP = (Phase.ROLLOUT, Phase.SCORE, Phase.UPDATE, Phase.SYNC)
GARBAGE = 0x7F  # bytes of it are a NaN in bfloat16 and 3e38 in float32


class BackgroundCopies:
    """Main memory in two roles. A copy that was started arrives when it is ordered or waited for; until then the device
    holds garbage where something is to arrive."""

    def __init__(self) -> None:
        self.under_way: list[tuple[Tensor, Tensor]] = []
        self.calls: list[str] = []
        self.num_buffers = 0

    def is_on_device(self, tensor: Tensor) -> bool:
        return True

    def host_buffer(self, num_bytes: int) -> Tensor:
        self.num_buffers += 1
        return torch.full((num_bytes,), GARBAGE, dtype=torch.uint8)

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.calls.append("start")
        for source, target in pairs:
            data = dict((id(late), source) for source, late in self.under_way).get(id(source), source).clone()
            target.fill_(GARBAGE)
            self.under_way.append((data, target))

    def order(self) -> None:
        self.calls.append("order")
        self._arrive()

    def wait(self) -> None:
        self.calls.append("wait")
        self._arrive()

    def _arrive(self) -> None:
        for data, target in self.under_way:
            if target.untyped_storage().nbytes():
                target.copy_(data)
        self.under_way = []


def movable(tensors, copies=None, **options) -> Movable:
    return Movable("some tensors", lambda: tensors, copies or BackgroundCopies(), smallest_bytes=0, **options)


def test_the_storage_goes_and_every_view_of_it_comes_back():
    whole = torch.randn(6, 4)
    parameter = nn.Parameter(whole[2:4])
    before = whole.clone()
    part = movable([parameter, whole[:1]])
    assert part.num_bytes == 96 and part.send() == 96 and part.send() == 0
    assert part.is_away and whole.untyped_storage().nbytes() == 0 and parameter.shape == (2, 4)
    assert part.fetch() == 96 and part.fetch() == 0
    assert not torch.equal(whole, before), "under way: nobody may read it yet"
    part.need()
    assert torch.equal(whole, before) and torch.equal(parameter, before[2:4])
    with torch.no_grad():
        parameter.add_(1)
    assert torch.equal(whole[2:4], before[2:4] + 1), "still one memory"


def test_what_is_needed_while_it_is_away_is_fetched():
    tensor = torch.randn(8)
    before, part = tensor.clone(), movable([tensor])
    part.send()
    part.need()
    assert torch.equal(tensor, before) and not part.is_away
    part.send()
    part.fetch()
    part.send()  # out again before anybody read it
    part.need()
    assert torch.equal(tensor, before)


def test_storages_that_others_read_never_move():
    shared, own = torch.randn(10), torch.randn(3)
    part = movable([shared[:5], own], kept=lambda: [shared[7:]])
    assert part.send() == own.nbytes
    assert shared.untyped_storage().nbytes() == 40 and own.untyped_storage().nbytes() == 0
    alone = movable([shared[:5]], kept=lambda: [shared[7:]])
    assert alone.send() == 0 and not alone.is_away


def test_constant_tensors_are_copied_out_once():
    copies, tensor = BackgroundCopies(), torch.randn(8)
    part = movable([tensor], copies, constant=True)
    for _ in range(3):
        part.send()
        part.need()
    assert copies.calls == ["start", *["start", "order"] * 3] and copies.num_buffers == 1
    again = movable([torch.randn(8)], copies)
    for _ in range(2):
        again.send()
        again.need()
    assert copies.num_buffers == 2


def test_small_tensors_and_those_elsewhere_stay():
    small, large = torch.zeros(10), torch.zeros(1 << 18)
    assert Movable("x", lambda: [small, large], BackgroundCopies()).send() == large.nbytes
    copies = BackgroundCopies()
    copies.is_on_device = lambda tensor: False  # type: ignore[method-assign]
    assert movable([small], copies).send() == 0 and copies.calls == []


def test_a_device_that_filled_up_meanwhile_is_an_error_with_advice(monkeypatch):
    tensor = torch.zeros(8)
    part = movable([tensor])
    part.send()

    class Full:
        def resize_(self, size):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(part, "_storages", [Full()])
    with pytest.raises(MemoryBudgetError, match=r"some tensors .* can't come back.*engine\.kv_cache_gib"):
        part.need()


def test_main_memory_that_is_too_small_is_an_error_with_the_numbers():
    with pytest.raises(MemoryBudgetError, match=r"needs 1048576\.00 GiB of main memory"):
        _check_main_memory(1 << 50)


def test_parts_are_away_in_their_phases_and_the_edges_say_so():
    copies = BackgroundCopies()
    state, weights = torch.randn(100), torch.randn(10)
    offloads = [
        Offload(movable([weights], copies, constant=True), SIMULATOR_AWAY),
        Offload(movable([state], copies), OPTIMIZER_AWAY),
    ]
    memory = Memory("cpu", offloads=offloads, copies=copies)
    seen = {}
    for phase in (*STEP, Phase.ROLLOUT):
        with memory.phase(phase):
            seen[phase] = (state.untyped_storage().nbytes(), weights.untyped_storage().nbytes())
    assert seen == {
        Phase.ROLLOUT: (0, 40),
        Phase.SCORE: (400, 0),
        Phase.UPDATE: (400, 0),
        Phase.SYNC: (0, 0),
    }
    edges = {key[5:]: value for key, value in memory.take().items() if key.startswith("edge/") and "seconds" not in key}
    assert edges == {
        "start_to_rollout/released_bytes": 400,
        "start_to_rollout/fetched_bytes": 0,
        "rollout_to_score/released_bytes": 40,
        "rollout_to_score/fetched_bytes": 400,
        "update_to_sync/released_bytes": 400,
        "update_to_sync/fetched_bytes": 0,
        "sync_to_rollout/released_bytes": 0,
        "sync_to_rollout/fetched_bytes": 40,
    }


def test_the_cache_is_mapped_when_what_left_has_really_gone():
    copies, order = BackgroundCopies(), []

    class Engine:
        def release_kv(self) -> int:
            order.append("release")
            return 8

        def acquire_kv(self) -> None:
            order.append(("acquire", copies.calls[-1], len(copies.under_way)))

    offloads = [Offload(movable([torch.zeros(4)], copies), OPTIMIZER_AWAY)]
    memory = Memory("cpu", engine=Engine(), offloads=offloads, copies=copies)
    for phase in (*STEP, Phase.ROLLOUT):
        with memory.phase(phase):
            pass
    assert order == ["release", ("acquire", "wait", 0)]


def optimizer_of(model: nn.Module, kind: str = "adamw") -> Optimizer:
    schedule = Schedule(peak=1e-2, warmup_steps=0, total_steps=10, final_fraction=1.0)
    return Optimizer(model, schedule, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0, kind=kind)


def trained(dtype: torch.dtype, *, moves: bool) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(3)
    model = nn.Linear(16, 8).to(dtype)
    optimizer = optimizer_of(model)
    copies = BackgroundCopies()
    state = movable([], copies, kept=model.parameters)
    state._tensors = optimizer.own_tensors
    memory = Memory("cpu", offloads=[Offload(state, OPTIMIZER_AWAY)] if moves else [], copies=copies)
    if moves:
        optimizer.before_use = state.need
    for _ in range(4):
        for phase in STEP:
            with memory.phase(phase):
                if phase is Phase.UPDATE:
                    for _ in range(2):
                        model(torch.randn(4, 16, dtype=dtype)).square().sum().backward()
                        optimizer.clip_gradients()
                        optimizer.step()
                elif phase is Phase.ROLLOUT and moves and optimizer.position:
                    assert state.is_away and all(t.untyped_storage().nbytes() == 0 for t in optimizer.own_tensors())
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_the_same_bit_for_bit(dtype):
    """Masters (of bfloat16 weights) and moments go and come; float32 weights are their own masters, and stay."""
    (model, optimizer), (expected, reference) = (trained(dtype, moves=moves) for moves in (True, False))
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    saved, wanted = optimizer.state_tensors(), reference.state_tensors()  # asked for while the state is away
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in saved)


def test_the_eight_bit_moments_are_found_by_their_names():
    from zs_fast.learn.adamw import AdamW8

    adamw, master = AdamW8.__new__(AdamW8), torch.zeros(2)
    state = {"step": 3, "state1": torch.zeros(2), "state2": torch.ones(2), "qmap1": torch.zeros(256)}
    adamw._adamw = type("Library", (), {"state": {master: state}})
    assert adamw.moments(master) == [state["state1"], state["state2"]] and adamw.moments(torch.zeros(2)) == []


def small_run(output, **overrides):
    small = {
        "output": output,
        "train.steps": 3,
        "train.questions_per_step": 2,
        "train.group_size": 2,
        "train.save_every": 1,
        "train.keep_checkpoints": 0,
        "eval.questions": 2,
        "eval.at_start": "true",
        "train.eval_every": 1,
        "engine.release_kv": "true",
        "algorithm.kl_coefficient": 0.001,
    }
    return load_recipe(["quickstart"], {key: [str(value)] for key, value in (small | overrides).items()})


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Runs move between main memory and main memory, in the background."""
    real, made = zs_fast.offloading.offloads, []

    def moved(config, engine, updater, device):
        for role in ("policy", "simulator"):  # tensors that a file is mapped to can't be resized
            model = engine.module(role)
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        made.append(real(config, engine, updater, device, copies=BackgroundCopies(), smallest_bytes=1024))
        return made[-1]

    monkeypatch.setattr(zs_fast.train, "offloads", moved)
    return made


BOTH = {"train.offload_optimizer_state": "true", "simulator.offload_weights": "true"}


def test_a_run_that_moves_both_leaves_the_same_bytes(as_on_a_gpu, no_pictures, tmp_path):
    """With evaluations and checkpoints between the phases, which need what is away."""
    for name, options in (("plain", {}), ("moved", BOTH)):
        train(small_run(tmp_path / name, **options))
    for file in ("metrics.jsonl", "rollouts.jsonl", "checkpoints/step_3/model/model.safetensors"):
        assert (tmp_path / "moved" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    rows = [json.loads(line) for line in (tmp_path / "moved" / "timings.jsonl").read_text().splitlines()]
    (*_, last) = [row for row in rows if "update/seconds" in row]
    assert last["edge/update_to_sync/released_bytes"] > 0 and last["edge/rollout_to_score/released_bytes"] > 0
    plain, moved = as_on_a_gpu
    assert plain.parts == () and [sorted(part.away) for part in moved.parts] == [
        ["score", "sync", "update"],
        ["rollout", "sync"],
    ]
    assert "MiB, in main memory while" in moved.choices[0] and "during the rollout" in moved.choices[1]


def test_a_resume_takes_what_is_away(as_on_a_gpu, no_pictures, tmp_path):
    train(small_run(tmp_path / "whole", **BOTH))
    train(small_run(tmp_path / "parts", **BOTH, **{"train.steps": 1}))
    ours, whole = (tmp_path / name / "checkpoints" / "step_1" for name in ("parts", "whole"))
    for file in whole.rglob("*.safetensors"):
        assert (ours / file.relative_to(whole)).read_bytes() == file.read_bytes(), file


def test_weights_that_the_policy_reads_too_stay(as_on_a_gpu, no_pictures, tmp_path):
    shared = {"simulator.kind": "policy", "simulator.path": "", "model.lora_rank": 4, "train.steps": 1}
    del as_on_a_gpu[:]
    train(small_run(tmp_path / "run", **BOTH, **shared | {"eval.data": ""}))
    (made,) = as_on_a_gpu
    assert made.choices[0].startswith("simulator.offload_weights moves nothing: no other weights than")


def test_where_nothing_is_to_be_gained_nothing_moves():
    def choices(**overrides):
        return zs_fast.offloading.offloads(small_run("unused", **overrides), None, None, torch.device("cpu"))

    assert choices() == zs_fast.offloading.Offloading()
    on_cpu = choices(**BOTH)
    assert on_cpu.parts == () and all("in main memory already" in line for line in on_cpu.choices)
    config = small_run("unused", **{"train.offload_optimizer_state": "true", "engine.release_kv": "false"})
    updater = SimpleNamespace(optimizer=optimizer_of(nn.Linear(8, 8)), critic=None)
    for smallest, because in ((64, "unless engine.release_kv is true"), (1 << 20, "small tensors only")):
        made = zs_fast.offloading.offloads(
            config, None, updater, torch.device("cpu"), copies=BackgroundCopies(), smallest_bytes=smallest
        )
        assert made.parts == () and because in made.choices[0]


def test_captured_addresses_and_settings_that_contradict_are_errors():
    vllm = small_run("unused", **{"engine.kind": "vllm", "simulator.offload_weights": "true"})
    with pytest.raises(PreflightError, match=r"engine\.enforce_eager = true"):
        zs_fast.offloading.offloads(vllm, None, None, torch.device("cuda"), copies=BackgroundCopies())
    with pytest.raises(ConfigError, match="adamw_offload"):
        small_run("unused", **BOTH, **{"train.optimizer": "adamw_offload"})
    with pytest.raises(ConfigError, match="no weights in this process"):
        small_run("unused", **BOTH, **{"simulator.kind": "bm25"})


class FakeCuda:
    """torch.cuda as far as the copies use it; its tensors are main memory's."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.status = 0

    def Stream(self, device):
        return self

    def current_stream(self, device):
        return type("Current", (), {"wait_stream": lambda _, other: self.calls.append("current waits for copies")})()

    def wait_stream(self, other):
        self.calls.append("copies wait for current")

    def synchronize(self):
        self.calls.append("host waits")

    def stream(self, stream):
        from contextlib import nullcontext

        return nullcontext()

    def cudart(self):
        return self

    def cudaHostRegister(self, address, num_bytes, flags):
        self.calls.append(("lock", address, num_bytes))
        return self.status

    def cudaHostUnregister(self, address):
        self.calls.append(("unlock", address))


def test_the_copies_of_cuda_ask_the_driver_for_what_they_need(monkeypatch):
    cuda = FakeCuda()
    for name in ("Stream", "current_stream", "stream", "cudart"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    copies = CudaCopies(torch.device("cuda"))
    buffer = copies.host_buffer(64)
    address = buffer.data_ptr()
    copies.start([(torch.arange(64, dtype=torch.uint8), buffer)])
    copies.order()
    copies.wait()
    assert buffer.tolist() == list(range(64)) and not copies.is_on_device(buffer)
    del buffer
    waits = ["copies wait for current", "current waits for copies", "host waits"]
    assert cuda.calls == [("lock", address, 64), *waits, ("unlock", address)]
    cuda.status = 2
    with pytest.raises(MemoryBudgetError, match=r"page-locked \(CUDA error 2\)"):
        copies.host_buffer(64)
