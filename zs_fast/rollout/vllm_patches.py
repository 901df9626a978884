"""What is changed in vLLM from outside, each because there is no option for it.

- CPU: linear layers keep their weight as it is, where vLLM would repack it and leave an empty tensor behind.
- CPU: the rank of a sampled token, which nobody asks for, is not computed (17 s of compilation at first use).
- CPU: torch.set_num_threads works again afterwards; vLLM replaces it by a function that does nothing.
- CUDA: weights stay out of the pool that sleep mode discards, which also lets a second engine share the process.
- closing one engine leaves torch's process groups to the others.
- a request's end is decided by our stop strings, in place of vLLM's detokenizer.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Stopped = Callable[[Sequence[int]], bool]
"""Does the completion end with the last of these sampled ids?"""

BUILD_ENVIRONMENT: dict[str, str | None] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, whatever the shell says for servers
    "VLLM_CPU_KVCACHE_SPACE": None,  # would override the size that is asked for
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # max_model_len is one more than a context that fills all positions
}
"""Holds while an engine is built."""


@dataclass(slots=True)
class ProcessState:
    """What holds for the process, however many engines there are."""

    live: set[int] = field(default_factory=set)
    """Engines that were built and not closed, by the id of their core."""
    is_patched: bool = False


STATE = ProcessState()


@contextmanager
def quiet() -> Iterator[None]:
    """Python warnings inside are about vLLM's own code, and Triton's absence on a CPU is no news."""
    logger = logging.getLogger("torch._library.triton")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def patch_for_good() -> None:
    """Changes that hold for the rest of the process."""
    if STATE.is_patched:
        return
    import vllm.v1.engine.core as core
    import vllm.v1.sample.sampler as sampler
    from vllm.platforms import current_platform

    clean_up = core.cleanup_dist_env_and_memory
    groups_are_ours = torch.distributed.is_available() and torch.distributed.is_initialized()

    def clean_up_after_the_last(*args: Any, **kwargs: Any) -> None:
        if not STATE.live and not groups_are_ours:
            clean_up(*args, **kwargs)

    core.cleanup_dist_env_and_memory = clean_up_after_the_last
    if current_platform.is_cpu():
        sampler.batched_count_greater_than = _no_ranks
    STATE.is_patched = True


def _no_ranks(logprobs: Tensor, values: Tensor) -> Tensor:
    return torch.zeros(logprobs.shape[0], dtype=torch.int64, device=logprobs.device)


@contextmanager
def patched_while_building(on_cpu: bool) -> Iterator[None]:
    """Changes that one engine needs while it loads its model and allocates."""
    import vllm.model_executor.layers.utils as layer_utils
    from vllm.v1.worker.gpu_worker import Worker

    set_num_threads = torch.set_num_threads
    dispatch, pool = layer_utils.dispatch_cpu_unquantized_gemm, Worker._maybe_get_memory_pool_context
    environment = {name: os.environ.get(name) for name in BUILD_ENVIRONMENT}
    _set_environment(BUILD_ENVIRONMENT)

    def keep_weight(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear

    def pool_without_weights(worker: Any, tag: str) -> Any:
        return nullcontext() if tag == "weights" else pool(worker, tag)

    if on_cpu:
        layer_utils.dispatch_cpu_unquantized_gemm = keep_weight
    Worker._maybe_get_memory_pool_context = pool_without_weights
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        layer_utils.dispatch_cpu_unquantized_gemm = dispatch
        Worker._maybe_get_memory_pool_context = pool
        _set_environment(environment)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def stop_watch(stopped: Stopped) -> Any:
    """What vLLM takes for a detokenizer: it keeps the ids as they are, and says when the completion ends."""
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    class StopWatch(IncrementalDetokenizer):
        def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
            for place, token in enumerate(new_token_ids):
                self.token_ids.append(token)
                is_last = place == len(new_token_ids) - 1
                if not (stop_terminated and is_last) and stopped(self.token_ids):
                    return "stop string"
            return None

    return StopWatch()
