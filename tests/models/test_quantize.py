"""A base in 4 bits: forward and backward of its own unpacked weights, under an adapter that alone is trained."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from zs_fast.config import EngineConfig, ModelConfig, RunConfig
from zs_fast.errors import PreflightError
from zs_fast.models.load import LoadedModel, load_model, on_same_base, save_model
from zs_fast.models.lora import adapter_tensors, attach_adapter
from zs_fast.models.quantize import is_quantized, packable, quantize_base
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.testing import tiny_model
from zs_fast.types import Role, Sampling

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)
CPU = torch.device("cpu")


def make(kind: str = "qwen2") -> LoadedModel:
    return tiny_model(kind, hidden_size=64, heads=4, kv_heads=2, layers=2)


def unpacked(model: nn.Module, like: LoadedModel) -> LoadedModel:
    """The plain model with the values that the packed weights stand for."""
    import bitsandbytes

    with torch.no_grad():
        for name, layer in packable(like.model).items():
            weight = model.get_submodule(name).weight
            layer.weight.copy_(bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))
    return like


def run(loaded: LoadedModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
    from zs_fast.models.attention import PackedAttention

    hidden = loaded.model.model(
        input_ids=torch.arange(3, 20)[None],
        position_ids=torch.arange(17)[None],
        use_cache=False,
        attention_state=PackedAttention([0, 5, 17]),
    ).last_hidden_state
    gradients = torch.autograd.grad(hidden.square().sum(), list(adapter_tensors(loaded.model).values()))
    return hidden.detach(), list(gradients)


def with_adapter(loaded: LoadedModel) -> LoadedModel:
    attach_adapter(loaded.model, 4, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in adapter_tensors(loaded.model).items():
            if "lora_B" in name:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return loaded


@needs_library
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_forward_and_adapter_gradients_are_those_of_the_unpacked_weights(kind):
    packed, plain = make(kind), make(kind)
    before = run(with_adapter(make(kind)))[0]
    quantize_base(packed.model, device=CPU)
    assert is_quantized(packed.model) and not is_quantized(plain.model)
    plain = unpacked(packed.model, plain)
    hidden, gradients = run(with_adapter(packed))
    expected, expected_gradients = run(with_adapter(plain))
    assert not torch.allclose(hidden, before, atol=1e-3), "4 bits are not the weights themselves"
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()) + 1e-7, rtol=1e-4)


@needs_library
def test_linear_layers_take_half_a_byte_a_weight_and_the_roles_share_them():
    loaded = make()
    linear = sum(layer.weight.numel() for layer in packable(loaded.model).values())
    quantize_base(loaded.model, device=CPU)
    packed = [p for p in loaded.model.parameters() if p.dtype == torch.uint8]
    assert sum(p.numel() for p in packed) == linear // 2
    attach_adapter(loaded.model, 2)
    reference = on_same_base(loaded)
    places = {p.data_ptr() for p in reference.model.parameters() if p.dtype == torch.uint8}
    assert places == {p.data_ptr() for p in packed}
    assert [n for n, p in loaded.model.named_parameters() if p.requires_grad] == list(adapter_tensors(loaded.model))


@needs_library
def test_a_peft_folders_base_is_packed_under_its_adapter(tmp_path):
    save_model(make(), tmp_path / "base")
    save_model(with_adapter(load_model(tmp_path / "base")), tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter")
    values = {name: tensor.clone() for name, tensor in adapter_tensors(loaded.model).items()}
    quantize_base(loaded.model, device=CPU)
    assert is_quantized(loaded.model)
    assert all(torch.equal(tensor, adapter_tensors(loaded.model)[name]) for name, tensor in values.items())


@needs_library
def test_the_engine_samples_from_a_packed_model_but_makes_no_promise_on_batches():
    loaded = make()
    quantize_base(loaded.model, device=CPU)
    with pytest.raises(PreflightError, match=r"engine\.batch_invariant"):
        TransformersEngine({Role.POLICY: loaded}, slots=2, max_context_tokens=64, batch_invariant=True)
    engine = TransformersEngine({Role.POLICY: loaded}, slots=2, max_context_tokens=64)
    engine.add(0, [5, 6, 7], Sampling(max_new_tokens=4, seed=1), role=Role.POLICY)
    completions = []
    while engine.num_unfinished:
        completions += engine.step()
    assert 1 <= len(completions[0].token_ids) <= 4


@needs_library
def test_a_short_run_learns_an_adapter_on_packed_weights(tmp_path):
    from zs_fast.recipe_files import load_recipe
    from zs_fast.train import train

    small = {
        "output": tmp_path / "run", "model.quantization": "nf4", "model.lora_rank": 4, "simulator.kind": "bm25",
        "train.steps": 1, "train.questions_per_step": 2, "train.group_size": 2, "eval.search": "bm25",
        "eval.questions": 2, "eval.at_start": "false",
    }  # fmt: skip
    summary = train(load_recipe(["quickstart"], {key: [str(value)] for key, value in small.items()}))
    assert summary["steps"] == 1
    assert (tmp_path / "run" / "checkpoints" / "step_1" / "model" / "adapter_model.safetensors").is_file()


def test_what_goes_with_no_packed_weights_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValidationError, match=r"engine\.kind"):
        RunConfig(model=ModelConfig(quantization="nf4", lora_rank=4), engine=EngineConfig(kind="vllm"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PreflightError, match="pip install bitsandbytes"):
        quantize_base(make().model, device=CPU)


@needs_library
def test_its_import_asks_no_hub_for_kernels():
    """With the package `kernels` it would fetch a compiled one at import; a stand-in says whether it was asked."""
    program = (
        "import sys, types\n"
        "hub = types.ModuleType('kernels')\n"
        "hub.get_kernel = lambda *a, **k: sys.exit('asked the hub')\n"
        "sys.modules['kernels'] = hub\n"
        "from zs_fast.models.quantize import bitsandbytes\n"
        "assert bitsandbytes('a', 'b').__name__ == 'bitsandbytes' and sys.modules['kernels'] is hub\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@needs_library
def test_all_weights_in_4_bits_cant_be_trained():
    from zs_fast.recipe_files import load_recipe
    from zs_fast.setup import load_policy

    config = load_recipe(["quickstart"], {"model.quantization": ["nf4"]})
    with pytest.raises(PreflightError, match=r"model\.lora_rank"):
        load_policy(config, CPU)
