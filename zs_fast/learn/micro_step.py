"""Passes over a batch, with gradients or for scores alone, that fit into memory whatever the token budget promised.

A micro batch that runs out of memory may have left the gradients of some weights behind and not those of others. So the
gradients are dropped and the mini batch starts over with micro batches of half the size: the result is exactly that of
a run which had the smaller token budget from the start, no second copy of the gradients is ever held, and the smaller
budget stays, so that a run pays a few times at most.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from zs_fast.errors import MemoryBudgetError
from zs_fast.learn.batch import MicroBatch, PackedTokens
from zs_fast.learn.sharding import is_sharded, passes
from zs_fast.system.distributed import largest, world_size

CUBLAS_FAILURE = "CUBLAS_STATUS_ALLOC_FAILED"
"""What cuBLAS says, in a plain RuntimeError, where its workspace no longer fits."""


UPDATE_ADVICE = (
    "lower game.max_context_tokens, set train.gradient_checkpointing = true, free memory (engine.release_kv = true), "
    "or train an adapter (model.lora_rank)"
)


class MicroSteps:
    """Cuts batches to what fits; one object per model and kind of pass, for the whole run.

    `what` and `advice`: the pass, and what helps where a single trajectory is too long for it, in words.

    A model in pieces (learn/sharding.py) is an exception: all ranks make its passes together, so one that runs out of
    memory in the middle of a pass can't start over by itself.
    """

    def __init__(
        self, model: nn.Module | None = None, *, what: str = "in the update", advice: str = UPDATE_ADVICE
    ) -> None:
        self._model, self._what, self._advice = model, what, advice
        self.splits = 0
        """Micro batches that ran out of memory so far, on this rank. A fact of the machine, not of config and seed."""
        self.token_budget: int | None = None
        """Most tokens in one micro batch, once one did not fit; None while the batch's own budget does."""
        self.watch: Callable[[MicroBatch], AbstractContextManager[None]] | None = None
        """What a profile enters around each pass."""

    def run(
        self,
        packed: PackedTokens,
        first: int,
        last: int,
        *,
        token_budget: int,
        step: Callable[[MicroBatch], Mapping[str, Tensor]],
        drop_gradients: Callable[[], None] | None = None,
    ) -> dict[str, Tensor]:
        """The sums of what `step` returns, over the micro batches of sequences first .. last - 1; no host sync.

        `step` runs the pass on a micro batch of at most `token_budget` tokens; `drop_gradients` undoes what it added to
        gradients since the mini batch began. A step without gradients may run again on what it had done already.
        Raises MemoryBudgetError when a single sequence does not fit, or a pass of a model in pieces.
        """
        self._agree()
        while True:
            failed = self._attempt(packed, first, last, token_budget, step)
            if not isinstance(failed, _Failed):
                return failed
            if drop_gradients is not None:
                drop_gradients()
            gc.collect()  # an error's traceback and its frames hold the activations, in a cycle
            self.splits += 1
            if failed.num_sequences == 1:
                raise MemoryBudgetError(
                    f"A single sequence of {failed.num_tokens} tokens does not fit into memory {self._what} "
                    f"({failed.said}). A smaller token budget does not help, a sequence is never cut: {self._advice}."
                )
            self.token_budget = (failed.num_tokens + 1) // 2

    def _attempt(
        self,
        packed: PackedTokens,
        first: int,
        last: int,
        token_budget: int,
        step: Callable[[MicroBatch], Mapping[str, Tensor]],
    ) -> dict[str, Tensor] | _Failed:
        sums: dict[str, Tensor] = {}
        budget = token_budget if self.token_budget is None else min(self.token_budget, token_budget)
        for micro in passes(self._model, packed.micro_batches(budget, first, last), packed.inputs.device):
            try:
                with nullcontext() if self.watch is None else self.watch(micro):
                    found = step(micro)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and CUBLAS_FAILURE not in str(error):
                    raise
                if is_sharded(self._model):
                    raise MemoryBudgetError(
                        f"A micro batch of {micro.num_tokens} tokens does not fit into memory {self._what}, and with "
                        "train.sharding = 'fsdp2' no rank can split one by itself. Lower train.token_budget (now "
                        f"{token_budget}), or set train.gradient_checkpointing = true."
                    ) from error
                return _Failed(micro, str(error))
            for name, value in found.items():
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def _agree(self) -> None:
        """All ranks take the smallest budget of any. Between mini batches alone: within one, no rank waits for another,
        since gradients are summed at its end."""
        if world_size() > 1:
            without_limit = float(2**62)
            mine = without_limit if self.token_budget is None else float(self.token_budget)
            smallest = -largest({"token_budget": -mine})["token_budget"]
            self.token_budget = None if smallest == without_limit else int(smallest)


class _Failed:
    """What is kept of a micro batch that did not fit: no tensors, and no traceback."""

    def __init__(self, micro: MicroBatch, said: str) -> None:
        self.num_tokens = micro.num_tokens
        self.num_sequences = len(micro.cu_seqlens) - 1
        self.said = (said.strip().splitlines() or ["out of memory"])[0][:200]
