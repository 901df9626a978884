"""The page of simulated against real search is written from what runs left, and says what the numbers say."""

from __future__ import annotations

import json

import pytest
import torch

from bench import headline, sweep
from zs_fast.models.attention import PackedAttention
from zs_fast.models.load import load_model, save_model
from zs_fast.recipe_files import load_recipe

SIMULATORS = {headline.TUNED: "small", headline.LARGER: "larger"}


def arms(folder):
    return headline.variants({name: folder / place for name, place in SIMULATORS.items()})


def logits(model):
    ids = torch.arange(5, 60)[None]
    attention = PackedAttention(torch.tensor([0, ids.numel()], dtype=torch.int32))
    return model(input_ids=ids, use_cache=False, attention_state=attention).logits


def test_an_expanded_model_is_larger_and_computes_the_same(tmp_path):
    small = load_model(headline.BASE)
    save_model(headline.expanded(small, 2), tmp_path / "large")
    large = load_model(str(tmp_path / "large"))
    assert large.model.config.num_hidden_layers == 2 * small.model.config.num_hidden_layers
    with torch.no_grad():
        assert torch.equal(logits(small.model), logits(large.model))


def test_what_is_added_learns(tmp_path):
    large = headline.expanded(load_model(headline.BASE), 2).model.train()
    logits(large).logsumexp(-1).sum().backward()
    assert large.model.layers[1].self_attn.o_proj.weight.grad.abs().max() > 0


def test_the_arms_differ_in_the_search_of_training_alone(tmp_path):
    plain = load_recipe([sweep.RECIPE], {})
    for arm in arms(tmp_path):
        config = load_recipe([sweep.RECIPE], {key: [value] for key, value in arm.overrides.items()})
        assert config.model_copy(update={"simulator": plain.simulator}) == plain
        assert config.eval.search == ("bm25",)


def test_the_page_says_what_the_runs_did(tmp_path, monkeypatch):
    monkeypatch.setattr(headline, "_parameters", lambda folder: 1_000_000)
    final = {
        headline.PROMPTED: 0.3,
        headline.TUNED: 0.8,
        headline.LARGER: 0.81,
        headline.HELD: 0.8,
        headline.REAL: 0.79,
    }
    for run in sweep.planned(arms(tmp_path), tmp_path):
        run.folder.mkdir(parents=True)
        f1 = final[run.variant.name] + 0.01 * run.seed * (run.variant.name == headline.LARGER)
        after = {"f1": f1, "f1_low": f1 - 0.05, "f1_high": f1 + 0.05}
        summary = {"f1_bm25_after": f1, "seconds": 80.0, "evaluations": {"bm25": {"after": after}}}
        (run.folder / "summary.json").write_text(json.dumps(summary))
        (run.folder / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.1, "update/nonfinite_losses": 0.0}\n')
    for seed in sweep.SEEDS:
        (tmp_path / f"untrained_seed{seed}").mkdir()
        found = json.dumps({"results": {"bm25": {"f1": 0.25}}})
        (tmp_path / f"untrained_seed{seed}" / "evaluation.json").write_text(found)
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    quality = {mode: dict.fromkeys(headline.MEASURES, value) for mode in ("useful", "noisy", "real")}
    for place in ("small/quality_prompted", "small/quality_tuned", "larger_quality"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "quality.json").write_text(json.dumps({"quality": quality}))
    text = headline.page(headline.collect(tmp_path, arms(tmp_path)))
    assert "fine-tuned less prompted: +0.500, 95 % interval over seeds +0.500 to +0.500: fine-tuned is better." in text
    assert "larger fine-tuned less fine-tuned: +0.020" in text and "no difference shown" in text
    assert "| prompted | useful | 0.500 (0.400 to 0.600)" in text and "| real retriever | +0.540 | 80 |" in text


def test_every_arm_runs_in_a_folder_of_its_own(tmp_path):
    folders = [run.folder for run in sweep.planned(arms(tmp_path), tmp_path)]
    assert len(set(folders)) == len(folders) == 15
    assert not any(character in str(folder) for folder in folders for character in " ,")


@pytest.mark.parametrize("blocks", [1, 3])
def test_any_number_of_blocks(blocks):
    small = load_model(headline.BASE)
    large = headline.expanded(small, blocks)
    assert len(large.model.model.layers) == blocks * len(small.model.model.layers)
