"""Several adapters over one base in one vLLM engine; the trained one is the slot's own memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from zs_fast.errors import EngineError, PreflightError
from zs_fast.learn.optimizer import Optimizer, Schedule
from zs_fast.models.load import load_skeleton
from zs_fast.models.lora import adapter_off, adapter_tensors, attach_adapter, load_adapter
from zs_fast.rollout.shared_weights import trainer_logprobs
from zs_fast.system.weights import WeightPublisher, check_shared
from zs_fast.types import Role, Sampling

POLICY, SIMULATOR, CRITIC, REFERENCE = Role.POLICY, Role.SIMULATOR, Role.CRITIC, Role.REFERENCE


def fill(model, seed: int, spread: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            if name.endswith("lora_B.weight"):
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def adapted(small):
    def build(kind: str = "qwen2", rank: int = 8, *, seed: int = 0, **options):
        loaded = small(kind, **options)
        attach_adapter(loaded.model, rank, seed=seed)
        fill(loaded.model, seed)
        return loaded

    return build


def error(loaded, prompt_ids, done) -> float:
    return float((trainer_logprobs(loaded, prompt_ids, done.token_ids) - torch.tensor(done.logprobs)).abs().max())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_trained_adapter_is_the_slots_memory_and_a_step_is_sampled_next(kind, adapted, vllm_engine, sample, prompt):
    loaded = adapted(kind)
    engine = vllm_engine(loaded)
    slots = engine._served[0]._slots
    memory = {
        tensor.untyped_storage().data_ptr()
        for layer in slots._manager.modules.values()
        for tensor in (*layer.lora_a_stacked, *layer.lora_b_stacked)
    }
    for name, parameter in adapter_tensors(loaded.model).items():
        assert parameter.untyped_storage().data_ptr() in memory and parameter.is_contiguous(), name
        assert parameter.requires_grad and parameter.is_leaf, name
    publisher = WeightPublisher(engine, trained=loaded.model, served=partial(engine.served, POLICY))
    schedule = Schedule(peak=2e-2, warmup_steps=0, total_steps=9, final_fraction=1.0)
    optimizer = Optimizer(loaded.model, schedule, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
    ids = prompt(0, 60)
    for version in (1, 2):
        before = sample(engine, ids)
        assert error(loaded, ids, before) <= 1e-5
        torch.autograd.backward(-_loss(loaded, ids, before.token_ids))
        optimizer.step()
        assert error(loaded, ids, before) > 1e-2, "the step is large enough to show"
        publisher.publish(version)
        after = sample(engine, ids)
        assert error(loaded, ids, after) <= 1e-5


def _loss(loaded, prompt_ids, token_ids):
    with torch.enable_grad():
        return trainer_logprobs.__wrapped__(loaded, prompt_ids, token_ids).sum()


def test_adapters_and_the_base_in_one_batch_each_speak_by_their_own(adapted, vllm_engine, run, prompt):
    loaded = adapted()
    other, small_rank = adapted(seed=3), adapted(rank=1, seed=4)
    engine = vllm_engine(
        dict.fromkeys((POLICY, REFERENCE, CRITIC, SIMULATOR), loaded),
        adapters={CRITIC: adapter_tensors(other.model), SIMULATOR: adapter_tensors(small_rank.model)},
    )
    roles = (POLICY, CRITIC, REFERENCE, SIMULATOR)
    for row in range(3):
        for role in roles:
            engine.add(row, prompt(row, 30), Sampling(max_new_tokens=8, seed=row), role=role)
    engine.step()
    assert engine._served[0].core.num_unfinished == 12, "all run together"
    done = {(completion.role, completion.request_id): completion for completion in run(engine)}
    for row in range(3):
        ids = prompt(row, 30)
        assert error(loaded, ids, done[POLICY, row]) <= 1e-5
        assert error(other, ids, done[CRITIC, row]) <= 1e-5
        with adapter_off(loaded.model):
            assert error(loaded, ids, done[REFERENCE, row]) <= 1e-5
        assert error(loaded, ids, done[CRITIC, row]) > 1e-2
        assert error(loaded, ids, done[REFERENCE, row]) > 1e-2
    engine.add(0, prompt(7, 30), Sampling(max_new_tokens=8, temperature=0.0), role=SIMULATOR)
    (said,) = run(engine)
    greedy = trainer_logprobs(small_rank, prompt(7, 30), said.token_ids)
    for place in range(8):
        for token in (said.token_ids[place] + 1) % 256, (said.token_ids[place] + 100) % 256:
            tried = trainer_logprobs(small_rank, [*prompt(7, 30), *said.token_ids[:place]], [token])
            assert tried[0] < greedy[place] + 1e-5


def test_a_new_version_misses_the_policys_old_keys_and_no_others(adapted, vllm_engine, sample, prompt):
    loaded = adapted()
    engine = vllm_engine(dict.fromkeys((POLICY, REFERENCE), loaded), frozen=(REFERENCE,))
    ids = prompt(0, 100)
    for role in (POLICY, REFERENCE):
        sample(engine, ids, role)
    fill(loaded.model, 17)
    assert error(loaded, ids, sample(engine, ids)) > 1e-3, "without publish old keys are read: a detector"
    engine.publish(1)
    assert error(loaded, ids, sample(engine, ids)) <= 1e-5
    with adapter_off(loaded.model):
        assert error(loaded, ids, sample(engine, ids, REFERENCE)) <= 1e-5
    assert engine.stats()[REFERENCE].reused_tokens == 96


def test_publishing_in_the_middle_of_a_request_computes_its_context_anew(adapted, vllm_engine, run, prompt):
    loaded = adapted()
    engine = vllm_engine(dict.fromkeys((POLICY, REFERENCE), loaded))
    ids = prompt(0, 70)
    for role in (POLICY, REFERENCE):
        engine.add(0, ids, Sampling(max_new_tokens=12, seed=1), role=role)
    for _ in range(5):
        engine.step()
    fill(loaded.model, 17)
    engine.publish(1)
    done = {completion.role: completion for completion in run(engine)}
    wrong = (torch.tensor(done[POLICY].logprobs) - trainer_logprobs(loaded, ids, done[POLICY].token_ids)).abs()
    assert wrong[5:].max() < 1e-5 < wrong[:5].max()
    with adapter_off(loaded.model):
        assert error(loaded, ids, done[REFERENCE]) <= 1e-5


def test_narrow_adapters_are_written_back_from_float32_masters(adapted, vllm_engine):
    loaded = adapted(dtype="bfloat16")
    engine = vllm_engine(loaded)
    publisher = WeightPublisher(engine, trained=loaded.model, served=partial(engine.served, POLICY))
    schedule = Schedule(peak=1e-5, warmup_steps=0, total_steps=99, final_fraction=1.0)
    optimizer = Optimizer(loaded.model, schedule, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
    for number in range(40):
        for parameter in adapter_tensors(loaded.model).values():
            torch.autograd.backward(parameter.sum())
        optimizer.step()
        publisher.publish(number + 1)
    masters, served = optimizer.state_tensors(), engine.served(POLICY)
    for name in adapter_tensors(loaded.model):
        assert torch.equal(served[name], masters[f"master.{name}"].bfloat16()), name
    assert not any(name.startswith("master.") and "base_layer" in name for name in masters), "the base has no masters"


def test_the_base_is_read_by_vllm_and_the_adapter_is_ours(vllm_engine, sample):
    loaded = load_skeleton("quickstart:policy")
    attach_adapter(loaded.model, 8)
    fill(loaded.model, 1, spread=0.05)
    values = {name: tensor.detach().clone() for name, tensor in adapter_tensors(loaded.model).items()}
    engine = vllm_engine(dict.fromkeys((POLICY, SIMULATOR), loaded))
    check_shared(loaded.model, engine.served(POLICY))
    assert all(torch.equal(tensor, values[name]) for name, tensor in adapter_tensors(loaded.model).items())
    ids = list(range(5, 60))
    assert error(loaded, ids, sample(engine, ids)) <= 1e-5


def test_an_adapter_that_parts_from_its_slot_is_noticed(adapted, vllm_engine):
    loaded = adapted()
    engine = vllm_engine(loaded)
    publisher = WeightPublisher(engine, trained=loaded.model, served=partial(engine.served, POLICY))
    load_adapter(loaded.model, adapter_tensors(adapted(seed=5).model))  # in place
    publisher.publish(1)
    layer = loaded.model.model.layers[0].mlp.up_proj.lora_B
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(EngineError, match=r"up_proj\.lora_B\.weight lies in other memory"):
        publisher.publish(2)


def test_adapters_without_a_fitting_slot_are_refused(adapted, small, vllm_engine):
    with pytest.raises(PreflightError, match=r"rank is 5; vLLM has slots for ranks 1, 8, 16"):
        vllm_engine(adapted(rank=5))
    with pytest.raises(PreflightError, match=r"its slot holds \[8, 64\]"):
        loaded = adapted()
        vllm_engine(
            dict.fromkeys((POLICY, SIMULATOR), loaded), adapters={SIMULATOR: adapter_tensors(adapted(rank=16).model)}
        )
