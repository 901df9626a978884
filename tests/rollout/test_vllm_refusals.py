"""What vLLM can't take is an error that tells the way out. A stand-in for vLLM says no here, so that none is needed."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from zs_fast.errors import ConfigError, MemoryBudgetError, PreflightError
from zs_fast.recipe_files import load_recipe
from zs_fast.rollout import vllm_core, vllm_model
from zs_fast.rollout.shared_weights import served_tensors
from zs_fast.rollout.vllm_core import LORA_RANKS, CoreSettings, VllmCore
from zs_fast.testing import tiny_model


@pytest.fixture
def refusing(monkeypatch):
    """`refusing(error)`: build an engine with a vLLM that raises it."""

    def build(error: BaseException, **options: object) -> None:
        def refuse(_):
            raise error

        arguments, engine = ModuleType("vllm.engine.arg_utils"), ModuleType("vllm.v1.engine.llm_engine")
        arguments.EngineArgs = SimpleNamespace  # type: ignore[attr-defined]
        engine.LLMEngine = SimpleNamespace(from_engine_args=refuse)  # type: ignore[attr-defined]
        for module in (arguments, engine):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for name in ("require_vllm", "patch_for_good"):
            monkeypatch.setattr(vllm_core, name, lambda: None)
        monkeypatch.setattr(vllm_core, "patched_while_building", lambda on_cpu: nullcontext())
        monkeypatch.setattr(vllm_core, "cache_block_tokens", lambda: 16)
        values = {
            "folder": Path("somewhere"), "name": "their/model", "dtype": torch.bfloat16, "device": torch.device("cpu"),
            "max_context_tokens": 64, "max_num_seqs": 2, "vocab_size": 100, "kv_cache_bytes": 1 << 20,
        }  # fmt: skip
        VllmCore(CoreSettings(**values | options))

    return build


def test_a_model_that_vllm_does_not_know(refusing):
    report = "1 validation error for ModelConfig\n  Value error, Model architectures ['UnheardOf'] are not supported"
    with pytest.raises(PreflightError, match=r"'their/model': vLLM can't run it.*UnheardOf.*'transformers'") as caught:
        refusing(ValueError(report))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        ValueError("Free memory on device (1.2/79.1 GiB) on startup is less than desired GPU memory utilization"),
        ValueError("No available memory for the cache blocks."),
    ],
)
def test_a_card_that_is_too_full(refusing, error):
    with pytest.raises(MemoryBudgetError, match=r"too little memory\. Lower engine\.kv_cache_gib .*nvidia-smi"):
        refusing(error)


def test_a_cache_that_holds_not_one_sequence(refusing):
    with pytest.raises(PreflightError, match=r"Raise engine\.kv_cache_gib"):
        refusing(ValueError("To serve at least one request, 1.00 GiB KV cache is needed, which is larger than ..."))


@pytest.mark.parametrize("rank", [3, 513, 1024])
def test_a_rank_without_a_slot(refusing, rank):
    with pytest.raises(PreflightError, match=rf"rank is {rank}; .*512, .*Set model\.lora_rank to one of them"):
        refusing(AssertionError("not reached"), lora_rank=rank)
    with pytest.raises(PreflightError, match="reached"):
        refusing(ValueError("reached"), lora_rank=LORA_RANKS[-1])


def test_quantised_weights(monkeypatch):
    with pytest.raises(ConfigError, match=r"engine\.kind is 'vllm', which shares plain weights only"):
        load_recipe(["quickstart"], {"engine.kind": ["vllm"], "model.quantization": ["nf4"], "model.lora_rank": ["8"]})
    monkeypatch.setattr(vllm_model, "default_device", lambda: torch.device("cuda"))
    loaded = tiny_model()
    vllm_model._check_model(loaded, ["policy"], 64)
    loaded.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(PreflightError, match=r"quantised weights, .*engine\.kind = 'transformers'"):
        vllm_model._check_model(loaded, ["policy"], 64)


def test_tensor_parallel_weights_are_no_views():
    module = torch.nn.Module()
    module.down_proj = torch.nn.Linear(4, 4)
    served_tensors(module)
    module.down_proj.tp_size = 2  # type: ignore[assignment]
    with pytest.raises(PreflightError, match=r"over 2 GPUs \(tensor parallel\).*one GPU per process"):
        served_tensors(module)
