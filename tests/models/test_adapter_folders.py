"""Peft folders as models: `model.path` of a run, a checkpoint to go on from, what the peft package reads and writes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zs_fast.errors import PreflightError
from zs_fast.models.load import LoadedModel, load_model, load_skeleton, on_same_base, save_model, whole_model
from zs_fast.models.lora import LoraLinear, adapter_rank, adapter_tensors, attach_adapter, read_adapter, same_base
from zs_fast.rollout.shared_weights import trainer_logprobs
from zs_fast.testing import tiny_model

IDS = list(range(3, 43))
KINDS = ("llama", "qwen2", "qwen3")


def scores(loaded: LoadedModel) -> torch.Tensor:
    return trainer_logprobs(loaded, IDS[:10], IDS[10:])


def fill(loaded: LoadedModel, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_tensors(loaded.model).items():
            if name.endswith("lora_B.weight"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    save_model(tiny_model("qwen2"), folder)
    return folder


def adapted(base: Path, rank: int = 4) -> LoadedModel:
    loaded = load_model(base)
    attach_adapter(loaded.model, rank, seed=1)
    fill(loaded)
    return replace(loaded, base_name=loaded.name)


@pytest.mark.parametrize("kind", KINDS)
def test_another_tree_holds_the_very_same_parameters_and_is_the_plain_base(kind: str) -> None:
    plain, loaded = tiny_model(kind), tiny_model(kind)
    attach_adapter(loaded.model, 4)
    fill(loaded)
    tree = same_base(loaded.model)
    ours = {name.replace(".base_layer", ""): tensor for name, tensor in loaded.model.named_parameters()}
    theirs = dict(tree.named_parameters())
    assert theirs.keys() == dict(plain.model.named_parameters()).keys()
    assert all(parameter is ours[name] for name, parameter in theirs.items())
    assert not any(isinstance(module, LoraLinear) for module in tree.modules())
    assert not {id(m) for m in tree.modules()} & {id(m) for m in loaded.model.modules()}, "modules are its own"
    assert tree.lm_head.weight is tree.model.embed_tokens.weight, "tied as before"
    base = replace(loaded, model=tree)
    assert torch.equal(scores(base), scores(plain)) and not torch.equal(scores(loaded), scores(plain))
    with torch.no_grad():
        ours["model.layers.0.mlp.up_proj.weight"].mul_(2)
    assert not torch.equal(scores(base), scores(plain)), "what is done to the base shows in every tree"


def test_a_checkpoint_of_an_adapter_is_a_model_path(base: Path, tmp_path: Path) -> None:
    loaded = adapted(base)
    save_model(loaded, tmp_path / "saved")
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "model.safetensors" not in files and "config.json" not in files, "not the base's weights"
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    again = load_model(tmp_path / "saved")
    assert torch.equal(scores(again), scores(loaded))
    save_model(again, tmp_path / "twice")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    skeleton = load_skeleton(tmp_path / "saved")
    assert all(p.is_meta != (".lora_" in name) for name, p in skeleton.model.named_parameters())


def test_an_adapter_on_some_layers_stays_on_those(base: Path, tmp_path: Path) -> None:
    loaded = load_model(base)
    layer = loaded.model.model.layers[1].mlp
    attach_adapter(layer, 4, targets=("up_proj",))
    fill(loaded)
    save_model(loaded, tmp_path / "some")
    config = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj"]
    again = load_model(tmp_path / "some")
    assert adapter_tensors(again.model).keys() == adapter_tensors(loaded.model).keys()
    assert torch.equal(scores(again), scores(loaded))


def test_the_folder_of_an_adapter_leads_to_its_base(base: Path, tmp_path: Path) -> None:
    save_model(adapted(base), tmp_path / "saved")
    assert whole_model(str(tmp_path / "saved")) == str(base) and whole_model(str(base)) == str(base)
    assert whole_model("quickstart:policy") == "quickstart:policy"
    trained = load_model(tmp_path / "saved")
    frozen = on_same_base(trained, str(tmp_path / "saved"))
    assert torch.equal(scores(frozen), scores(trained))
    fill(trained, 8)
    assert not torch.equal(scores(frozen), scores(trained)), "the reference keeps the adapter that the run began with"


def test_what_can_not_be_loaded_or_trained_on_is_named(base: Path, tmp_path: Path) -> None:
    save_model(adapted(base), tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_config.json"

    def renamed(name: str | None) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))

    renamed("no/such/model")
    with pytest.raises(PreflightError, match=r"belongs to the model 'no/such/model': .*no such folder"):
        load_model(tmp_path / "saved")
    renamed(None)
    with pytest.raises(PreflightError, match="names no base_model_name_or_path"):
        load_model(tmp_path / "saved")
    renamed(str(tmp_path / "saved"))
    with pytest.raises(PreflightError, match="is an adapter itself"):
        load_model(tmp_path / "saved")
    other = tmp_path / "other"
    save_model(tiny_model("qwen2", hidden_size=32), other)
    renamed(str(other))
    with pytest.raises(PreflightError, match=r"lora_A\.weight does not fit"):
        load_model(tmp_path / "saved")
    file.write_text("{")
    with pytest.raises(PreflightError, match="can't be read"):
        load_model(tmp_path / "saved")


def test_a_layer_that_the_model_has_not_is_named(base: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    save_model(tiny_model("qwen2", layers=3), deep)
    save_model(adapted(deep), tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(deep), str(base)))
    with pytest.raises(PreflightError, match=r"layers\.2\.mlp\.down_proj, a linear layer that the model does not have"):
        load_model(tmp_path / "saved")


def test_an_adapter_can_go_on_layers_with_packed_weights() -> None:
    """A layer of 4-bit weights is any module that says its sizes and the type it computes in."""

    class Packed(torch.nn.Module):
        in_features, out_features, compute_dtype = 8, 6, torch.bfloat16

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs[..., :6]

    model = torch.nn.ModuleDict({"q_proj": Packed()})
    attach_adapter(model, 2, targets=("q_proj",))
    layer = model["q_proj"]
    assert isinstance(layer, LoraLinear) and layer.lora_A.weight.dtype == torch.bfloat16
    inputs = torch.ones(3, 8, dtype=torch.bfloat16)
    torch.nn.init.ones_(layer.lora_B.weight)
    assert torch.equal(layer(inputs), inputs[..., :6] + layer.lora_A(inputs).sum(-1, keepdim=True))
    assert same_base(model)["q_proj"].weight is layer.base_layer.weight


needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="the peft package is not installed; our files are checked without"
)


@needs_peft
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_our_folder_and_we_read_pefts(kind: str, tmp_path: Path) -> None:
    """Our adapter by peft, and peft's (alpha = 2 r) by us: every tensor bit for bit, B times alpha / r."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    save_model(tiny_model(kind), base)
    loaded = adapted(base)
    save_model(loaded, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
    held = {name.replace(".default", ""): tensor for name, tensor in theirs.named_parameters() if ".lora_" in name}
    assert held.keys() == {f"base_model.model.{name}" for name in adapter_tensors(loaded.model)}
    for name, tensor in adapter_tensors(loaded.model).items():
        assert torch.equal(held[f"base_model.model.{name}"], tensor)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        logits = theirs(input_ids=ids).logits[0, 9:-1, : len(loaded.tokenizer)]
    expected = torch.log_softmax(logits, -1).gather(-1, ids[0, 10:, None])[:, 0]
    torch.testing.assert_close(scores(loaded), expected, atol=2e-5, rtol=0)

    plain = AutoModelForCausalLM.from_pretrained(base)
    made = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    made.save_pretrained(tmp_path / "theirs")
    written = {name.replace(".default", ""): tensor for name, tensor in made.named_parameters() if ".lora_" in name}
    for name, tensor in read_adapter(tmp_path / "theirs").items():
        factor = 2.0 if "lora_B" in name else 1.0
        assert torch.equal(tensor, written[f"base_model.model.{name}"] * factor)
    ours = load_model(tmp_path / "theirs")
    assert adapter_rank(ours.model) == 4 and ours.base == str(base)
    with torch.no_grad():
        logits = made.eval()(input_ids=ids).logits[0, 9:-1, : len(ours.tokenizer)]
    expected = torch.log_softmax(logits, -1).gather(-1, ids[0, 10:, None])[:, 0]
    torch.testing.assert_close(scores(ours), expected, atol=2e-5, rtol=0)
