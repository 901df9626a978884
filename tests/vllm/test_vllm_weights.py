"""One copy of the weights: the trainer's parameters are vLLM's memory, and every way to part them is noticed."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch

from zs_fast.errors import EngineError, PreflightError
from zs_fast.learn.optimizer import Optimizer, Schedule
from zs_fast.models.load import load_model, load_skeleton, save_model
from zs_fast.rollout import shared_weights
from zs_fast.system.weights import WeightPublisher
from zs_fast.types import Role

POLICY = Role.POLICY
SHAPES = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False, "padded_rows": 742}),  # 1001 rows, which vLLM rounds up to 1024
    ("qwen2", {"tie_word_embeddings": True, "kv_heads": 2}),
    ("qwen2", {"tie_word_embeddings": False}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": False}),
]


def optimizer_for(loaded, learning_rate: float) -> Optimizer:
    schedule = Schedule(peak=learning_rate, warmup_steps=0, total_steps=100, final_fraction=1.0)
    return Optimizer(loaded.model, schedule, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, max_grad_norm=1.0)


def step(loaded, optimizer: Optimizer, seed: int = 0) -> None:
    """One optimizer step on random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in loaded.model.parameters():
        torch.autograd.backward((parameter * torch.randn(parameter.shape, generator=generator)).sum().float())
    optimizer.step()


@pytest.mark.parametrize(("kind", "options"), SHAPES)
def test_every_parameter_is_a_view_of_vllms_memory(kind, options, small, vllm_engine):
    loaded = small(kind, **options)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    engine = vllm_engine(loaded)
    assert engine.module(POLICY) is loaded.model
    ranges = [
        (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().data_ptr() + tensor.untyped_storage().nbytes())
        for tensor in engine._served[0].core.module.parameters()
    ]
    for name, parameter in loaded.model.named_parameters():
        start, end = parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes
        assert any(low <= start and end <= high for low, high in ranges), name
        assert parameter.is_contiguous() and parameter.requires_grad and parameter.is_leaf, name
    attention = loaded.model.model.layers[0].self_attn
    fused = engine._served[0].core.module.get_submodule("model.layers.0.self_attn.qkv_proj").weight
    assert attention.q_proj.weight.data_ptr() == fused.data_ptr()
    assert attention.k_proj.weight.data_ptr() == fused.data_ptr() + attention.q_proj.weight.nbytes
    tied = loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert tied == options["tie_word_embeddings"]
    after = loaded.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("kind", "options"), SHAPES)
def test_an_optimizer_step_is_sampled_next_with_nothing_copied(
    kind, options, small, vllm_engine, sample, prompt, difference
):
    loaded = small(kind, **options)
    engine = vllm_engine(loaded)
    publisher = WeightPublisher(engine, trained=loaded.model, served=partial(engine.served, POLICY))
    optimizer = optimizer_for(loaded, 1e-2)
    for version in (1, 2):
        before = sample(engine, prompt(0, 60))
        assert difference(loaded, prompt(0, 60), before) <= 1e-5
        step(loaded, optimizer, version)
        assert difference(loaded, prompt(0, 60), before) > 1e-2, "the step is large enough to show"
        publisher.publish(version)
        after = sample(engine, prompt(0, 60))
        assert after.policy_version == version
        assert difference(loaded, prompt(0, 60), after) <= 1e-5


def test_float32_masters_are_written_back_in_place(small, vllm_engine, sample, prompt, difference):
    """Steps far below a bfloat16 weight's resolution add up in the masters and reach vLLM's tensors."""
    loaded = small("qwen2", dtype="bfloat16")
    engine = vllm_engine(loaded)
    publisher = WeightPublisher(engine, trained=loaded.model, served=partial(engine.served, POLICY))
    start = {name: parameter.detach().float() for name, parameter in loaded.model.named_parameters()}
    optimizer = optimizer_for(loaded, 1e-5)
    for number in range(60):
        step(loaded, optimizer, seed=7)
        publisher.publish(number + 1)
    masters = optimizer.state_tensors()
    served = engine.served(POLICY)
    moved = 0
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(served[name], masters[f"master.{name}"].bfloat16()), name
        assert 0 < (masters[f"master.{name}"] - start[name]).abs().max() < 2e-3, name
        moved += int((parameter.float() != start[name]).sum())
    assert moved > 1000
    assert difference(loaded, prompt(0, 60), sample(engine, prompt(0, 60))) < 0.1


def test_weights_that_vllm_reads_are_those_of_the_folder(vllm_engine, sample, difference):
    """The trainer's module has no weights of its own until then."""
    loaded = load_skeleton("quickstart:policy")
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    engine = vllm_engine(loaded)
    whole = load_model("quickstart:policy")
    ours, theirs = loaded.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for mine, other in zip(loaded.model.buffers(), whole.model.buffers(), strict=True):
        assert torch.equal(mine, other)
    assert difference(whole, list(range(5, 90)), sample(engine, list(range(5, 90)))) < 1e-5


def test_saving_and_loading_keep_the_memory_shared(small, vllm_engine, sample, prompt, difference, tmp_path):
    loaded, other = small("qwen2", tie_word_embeddings=False), small("qwen2", tie_word_embeddings=False, seed=8)
    engine = vllm_engine(loaded)
    publisher = WeightPublisher(engine, trained=loaded.model, served=partial(engine.served, POLICY))
    save_model(loaded, tmp_path / "saved")
    again = load_model(tmp_path / "saved").model.state_dict()
    state = loaded.model.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in again)
    size = sum(file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors"))
    assert size < 1.1 * sum(parameter.nbytes for parameter in loaded.model.parameters()), "each weight once"
    loaded.model.load_state_dict(other.model.state_dict())
    publisher.publish(1)
    assert difference(other, prompt(0, 60), sample(engine, prompt(0, 60))) < 1e-5


@pytest.mark.parametrize("part", ["cast", "replace", "data"])
def test_memory_that_parts_is_noticed_before_it_is_published(part, small, vllm_engine):
    loaded = small()
    engine = vllm_engine(loaded)
    publisher = WeightPublisher(engine, trained=loaded.model, served=partial(engine.served, POLICY))
    norm = loaded.model.model.layers[1].mlp.down_proj
    if part == "cast":
        loaded.model.to(torch.bfloat16)
    elif part == "replace":
        norm.weight = torch.nn.Parameter(norm.weight.detach().clone())
    else:
        norm.weight.data = norm.weight.data.clone()
    with pytest.raises(EngineError, match="lies in other memory"):
        publisher.publish(1)


def test_rows_read_in_another_order_are_noticed_before_the_first_rollout(small, vllm_engine, monkeypatch):
    def confused(module):
        tensors = correct(module)
        name = "model.layers.0.self_attn."
        tensors[f"{name}k_proj.weight"], tensors[f"{name}v_proj.weight"] = (
            tensors[f"{name}v_proj.weight"],
            tensors[f"{name}k_proj.weight"],
        )
        return tensors

    correct = shared_weights.served_tensors
    monkeypatch.setattr("zs_fast.rollout.vllm_model.served_tensors", confused)
    with pytest.raises(EngineError, match=r"log-probabilities differ from the trainer's by .* nats"):
        vllm_engine(small(layers=3))


def test_a_model_that_differs_in_a_tensor_is_refused(small, vllm_engine):
    loaded = small("qwen2")
    loaded.model.model.layers[0].mlp.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(PreflightError, match=r"only transformers has a tensor model\.layers\.0\.mlp\.extra"):
        vllm_engine(loaded, weights="shared")


MEMORY_SCRIPT = """
import gc, sys
import torch
from zs_fast.models.load import load_skeleton
from zs_fast.rollout import vllm_engine, vllm_model
from zs_fast.types import Role

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096

torch.set_num_threads(1)
readings = []
share = vllm_model.share
def measured(loaded, served):
    readings.append(resident())
    share(loaded, served)
    loaded.model.model.layers[0].mlp.down_proj.weight.sum()
    readings.append(resident())
vllm_model.share = measured
loaded = load_skeleton(sys.argv[1])
engine = vllm_engine.VllmEngine({Role.POLICY: loaded}, slots=2, max_context_tokens=128)
size = sum(parameter.nbytes for parameter in loaded.model.parameters())
before = resident()
copy = [parameter.detach().clone() for parameter in loaded.model.parameters()]
print(size, readings[1] - readings[0], resident() - before)
"""


def test_the_trainers_model_takes_no_memory_of_its_own(small, tmp_path):
    """Resident memory around sharing, in a process of its own; a second copy shows that the reading works."""
    save_model(small("llama", hidden_size=512, layers=8), tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "model")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    size, added, copied = map(int, done.stdout.split()[-3:])
    assert size > 80e6
    assert added < 0.05 * size < 0.9 * size < copied, (size, added, copied)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("from_folder", [False, True])
def test_copied_weights_are_those_of_the_last_publish(
    kind, from_folder, small, vllm_engine, sample, prompt, difference, tmp_path
):
    loaded = small(kind)
    if from_folder:
        save_model(loaded, tmp_path / "model")
        loaded = load_skeleton(tmp_path / "model")
    engine = vllm_engine(loaded, weights="copied")
    assert engine.copies(POLICY) and "copied at every publish" in engine.choices()[0]
    served = engine.served(POLICY)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, served[name]) and parameter.data_ptr() != served[name].data_ptr(), name
    publisher = WeightPublisher(
        engine, trained=loaded.model, served=partial(engine.served, POLICY), copy=partial(engine.copy_weights, POLICY)
    )
    optimizer = optimizer_for(loaded, 1e-2)
    before = sample(engine, prompt(0, 60))
    assert difference(loaded, prompt(0, 60), before) <= 1e-5
    step(loaded, optimizer)
    assert sample(engine, prompt(0, 60)).logprobs == before.logprobs, "not handed over yet"
    publisher.publish(1)
    assert publisher.copied_bytes == sum(parameter.nbytes for parameter in loaded.model.parameters())
    assert difference(loaded, prompt(0, 60), sample(engine, prompt(0, 60))) <= 1e-5, "new weights, and no old keys"


def test_weights_that_can_not_be_shared_are_copied_and_the_reason_is_told(
    small, vllm_engine, sample, prompt, difference, monkeypatch
):
    """As for a layout that nobody can view: the hand-over goes through vLLM's own loader."""

    def refuse(module):
        raise PreflightError("vLLM splits model.embed_tokens.weight over 2 GPUs (tensor parallel).")

    monkeypatch.setattr("zs_fast.rollout.vllm_model.served_tensors", refuse)
    with pytest.raises(PreflightError, match="tensor parallel"):
        vllm_engine(small(), weights="shared")
    loaded = small()
    engine = vllm_engine(loaded)
    assert engine.copies(POLICY)
    (weights, _) = engine.choices()
    assert "copied at every publish (vLLM splits" in weights and "\n" not in weights
    step(loaded, optimizer_for(loaded, 1e-2))
    assert engine.copy_weights(POLICY) == sum(parameter.nbytes for parameter in loaded.model.parameters())
    engine.publish(1)
    assert difference(loaded, prompt(0, 60), sample(engine, prompt(0, 60))) <= 1e-5


@pytest.mark.parametrize("viewable", [True, False])
def test_a_copy_that_was_discarded_with_the_cache_is_the_last_published_one_again(
    viewable, small, vllm_engine, sample, prompt, difference, monkeypatch
):
    """As in a step: discarded while the update runs, written by the publish, read by the next rollout."""

    def refuse(module):
        raise PreflightError("vLLM splits model.embed_tokens.weight over 2 GPUs (tensor parallel).")

    if not viewable:
        monkeypatch.setattr("zs_fast.rollout.vllm_model.served_tensors", refuse)
    loaded = small()
    engine = vllm_engine(loaded, weights="copied")
    assert "and the copies of weights" in engine.choices()[-1]
    size = sum(parameter.nbytes for parameter in loaded.model.parameters())
    before = sample(engine, prompt(0, 60))
    assert engine.release_kv() >= size, "the cache and vLLM's copy"
    assert sample(engine, prompt(0, 60)).logprobs == before.logprobs, "written again with nothing published"
    engine.release_kv()
    step(loaded, optimizer_for(loaded, 1e-2))
    assert engine.copy_weights(POLICY) == size
    engine.publish(1)
    engine.acquire_kv()
    assert difference(loaded, prompt(0, 60), sample(engine, prompt(0, 60))) <= 1e-5


def test_shared_weights_are_said_to_be_so(small, vllm_engine):
    engine = vllm_engine(small())
    assert not engine.copies(POLICY) and engine.copy_weights(POLICY) == 0
    assert "one copy, shared with the trainer" in engine.choices()[0]
