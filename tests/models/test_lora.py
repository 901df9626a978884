"""Adapters: the numbers of merged weights, a base that stays as it was, files that peft reads and writes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from zs_fast.errors import PreflightError
from zs_fast.models.lora import (
    TARGETS,
    adapter_off,
    adapter_rank,
    adapter_targets,
    adapter_tensors,
    attach_adapter,
    load_adapter,
    read_adapter,
    write_adapter,
)
from zs_fast.rollout.shared_weights import trainer_logprobs
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.testing import tiny_model
from zs_fast.types import Role, Sampling

IDS = list(range(3, 43))


def scores(loaded) -> torch.Tensor:
    return trainer_logprobs(loaded, IDS[:10], IDS[10:])


def adapted(rank: int = 4, *, kind: str = "qwen2", spread: float = 0.3, **options):
    loaded = tiny_model(kind)
    attach_adapter(loaded.model, rank, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapter_tensors(loaded.model).items():
            if name.endswith("lora_B.weight"):
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return loaded


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_new_adapter_changes_nothing_and_a_trained_one_is_its_merged_weight(kind):
    base = tiny_model(kind)
    assert torch.equal(scores(adapted(kind=kind, spread=0.0)), scores(base))
    loaded = adapted(kind=kind)
    assert (scores(loaded) - scores(base)).abs().max() > 0.1
    merged = tiny_model(kind)
    tensors = adapter_tensors(loaded.model)
    with torch.no_grad():
        for name, weight in merged.model.named_parameters():
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_A.weight" in tensors:
                weight += tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
    torch.testing.assert_close(scores(loaded), scores(merged), atol=2e-5, rtol=0)


def test_only_the_adapter_is_trained_and_the_base_can_be_had_back():
    loaded, base = adapted(), tiny_model("qwen2")
    assert {name for name, p in loaded.model.named_parameters() if p.requires_grad} == set(
        adapter_tensors(loaded.model)
    )
    assert len(adapter_tensors(loaded.model)) == 2 * len(TARGETS) * 2
    assert (adapter_rank(loaded.model), set(adapter_targets(loaded.model))) == (4, set(TARGETS))
    assert adapter_rank(base.model) == 0 and adapter_targets(base.model) == ()
    before = scores(loaded)
    with adapter_off(loaded.model):
        assert torch.equal(scores(loaded), scores(base))
    assert torch.equal(scores(loaded), before)


def test_the_embedded_engine_samples_with_the_adapter_bit_for_bit_in_any_company():
    loaded = adapted()

    def logprobs(neighbours: int) -> tuple[float, ...]:
        engine = TransformersEngine({Role.POLICY: loaded}, slots=20, max_context_tokens=200)
        for row in range(neighbours + 1):
            engine.add(row, IDS[row:], Sampling(max_new_tokens=6, seed=1), role=Role.POLICY)
        done = {}
        while engine.num_unfinished:
            done |= {completion.request_id: completion for completion in engine.step()}
        expected = trainer_logprobs(loaded, IDS, done[0].token_ids)
        assert (torch.tensor(done[0].logprobs) - expected).abs().max() < 2e-5
        return done[0].logprobs

    assert logprobs(0) == logprobs(3) == logprobs(15)


def test_files_are_pefts_and_come_back_equal(tmp_path):
    loaded = adapted(targets=("q_proj", "down_proj"))
    write_adapter(loaded.model, tmp_path / "a", base="models/base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert config["target_modules"] == ["down_proj", "q_proj"] and config["base_model_name_or_path"] == "models/base"
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight" in keys and len(keys) == 8
    again = tiny_model("qwen2")
    attach_adapter(again.model, 4, targets=("q_proj", "down_proj"), seed=9)
    load_adapter(again.model, read_adapter(tmp_path / "a"))
    assert torch.equal(scores(again), scores(loaded))


@pytest.mark.parametrize(("alpha", "rslora", "factor"), [(8, False, 2.0), (8, True, 4.0), (2, False, 0.5)])
def test_the_scaling_of_an_adapter_of_others_is_folded_into_b(alpha, rslora, factor, tmp_path):
    loaded = adapted()
    write_adapter(loaded.model, tmp_path, base="")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": alpha, "use_rslora": rslora}))
    ours = adapter_tensors(loaded.model)
    for name, tensor in read_adapter(tmp_path).items():
        assert torch.equal(tensor, ours[name] * factor if name.endswith("lora_B.weight") else ours[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": None}, "can't be read"),
    ],
)
def test_adapters_that_are_more_than_a_and_b_are_refused(change, message, tmp_path):
    write_adapter(adapted().model, tmp_path, base="")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(PreflightError, match=message):
        read_adapter(tmp_path)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(PreflightError, match="no linear layer called c_attn"):
        attach_adapter(tiny_model().model, 4, targets=("q_proj", "c_attn"))
    loaded = adapted()
    with pytest.raises(PreflightError, match="rank 4 already"):
        attach_adapter(loaded.model, 4)
    with pytest.raises(PreflightError, match=r"lora_A\.weight does not fit"):
        load_adapter(loaded.model, adapter_tensors(adapted(8).model))
    write_adapter(loaded.model, tmp_path, base="")
    with pytest.raises(PreflightError, match="can't be read"):
        read_adapter(tmp_path / "nowhere")
    save_file({"base_model.model.x.lora_magnitude_vector": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PreflightError, match="lora_magnitude_vector"):
        read_adapter(tmp_path)
