"""Supervised fine-tuning on the same packed step: examples laid end to end, loss on masked-in tokens only.

The loss is minus the sum of the loss tokens' log-probabilities, over the number of loss tokens of the whole batch.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zs_fast.config import RunConfig, SftConfig
from zs_fast.errors import ConfigError, DataError
from zs_fast.learn.optimizer import Optimizer, Schedule
from zs_fast.learn.pack import TokenSequence, pack_tokens
from zs_fast.learn.policy import logprobs_at_loss_tokens
from zs_fast.learn.sft_data import SftExample, encode_conversation, read_conversations
from zs_fast.models.load import DTYPES, LoadedModel, load_model, save_model
from zs_fast.system.distributed import all_reduce_sums, is_main, rank, world_size
from zs_fast.system.seeds import seed_for


@dataclass(frozen=True, kw_only=True, slots=True)
class SftStep:
    """What one optimizer step of fine-tuning did."""

    step: int
    """Counting from 1."""
    loss: float
    """Mean negative log-likelihood per loss token, in nats, before the step."""
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_loss_tokens: int
    skipped: bool
    """Loss or gradient was not finite; the weights were left alone."""


def train_sft(
    model: LoadedModel,
    examples: Sequence[SftExample],
    config: SftConfig,
    *,
    seed: int,
    on_step: Callable[[SftStep], None] | None = None,
) -> list[float]:
    """The loss of each step. `model` is changed in place; the same arguments give the same losses on the same machine.

    Each epoch's order is drawn from (seed, epoch); a batch may straddle epochs, so no example is ever left out.
    Raises DataError when there is nothing to learn from, or an example is longer than config.max_tokens.
    """
    usable = _usable(examples, config)
    order = _order(len(usable), seed)
    schedule = Schedule(
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=config.steps,
        final_fraction=config.final_learning_rate_fraction,
    )
    optimizer = Optimizer(
        model.model,
        schedule,
        betas=config.betas,
        eps=1e-8,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        kind=config.optimizer,
    )
    losses = []
    for step in range(1, config.steps + 1):
        batch = [usable[next(order)] for _ in range(config.batch_size)]
        stats = sft_step(model, optimizer, batch, step=step, token_budget=config.token_budget)
        losses.append(stats.loss)
        if on_step is not None:
            on_step(stats)
    return losses


def sft_step(
    model: LoadedModel, optimizer: Optimizer, batch: Sequence[SftExample], *, step: int, token_budget: int
) -> SftStep:
    """One optimizer step on `batch`, in micro batches of at most `token_budget` tokens; one host sync.

    Each rank takes every world_size-th example; the loss is the mean over the loss tokens of all.
    """
    own = batch[rank() :: world_size()]
    packed = pack_tokens(TokenSequence(ids=example.input_ids, is_loss=example.loss_mask) for example in own)
    packed = packed.to(model.model.device)
    counts = all_reduce_sums({"tokens": packed.num_tokens, "loss_tokens": packed.num_loss_tokens})
    learning_rate = optimizer.learning_rate
    total = torch.zeros((), device=model.model.device)
    for micro in packed.micro_batches(token_budget):
        logprobs = logprobs_at_loss_tokens(model.model, micro, temperature=1.0).logprobs
        loss = -logprobs.sum() / counts["loss_tokens"]
        torch.autograd.backward(loss)
        total += loss.detach()
    optimizer.sum_gradients()
    loss_here, grad_norm = torch.stack([total, optimizer.clip_gradients().to(total.device)]).tolist()
    loss_value = all_reduce_sums({"loss": loss_here})["loss"]
    skipped = not (math.isfinite(loss_value) and math.isfinite(grad_norm))
    if skipped:
        optimizer.skip()
    else:
        optimizer.step()
    return SftStep(
        step=step,
        loss=loss_value,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        num_tokens=int(counts["tokens"]),
        num_loss_tokens=int(counts["loss_tokens"]),
        skipped=skipped,
    )


def _usable(examples: Sequence[SftExample], config: SftConfig) -> list[SftExample]:
    usable = []
    for number, example in enumerate(examples, start=1):
        if not any(example.loss_mask):
            raise DataError(f"example {number} has no token to learn from: its loss mask is all False")
        if len(example.input_ids) <= config.max_tokens:
            usable.append(example)
        elif not config.skip_long:
            raise DataError(
                f"example {number} has {len(example.input_ids)} tokens, more than sft.max_tokens = "
                f"{config.max_tokens}. Raise sft.max_tokens, or set sft.skip_long = true to leave such examples out."
            )
    if not usable:
        raise DataError(
            f"none of {len(examples)} examples can be used: all are longer than sft.max_tokens = {config.max_tokens}"
            if examples
            else "there are no examples to learn from"
        )
    return usable


def _order(count: int, seed: int) -> Iterator[int]:
    """Example numbers without end: each epoch is a permutation drawn from (seed, epoch)."""
    epoch = 0
    while True:
        numbers = list(range(count))
        random.Random(seed_for(seed, step=epoch, purpose="sft_order")).shuffle(numbers)
        yield from numbers
        epoch += 1


def sft_command(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """`zs-fast sft`: fine-tune `model.path` on the examples in `data`; what it did, ready for JSON.

    Writes `<output>/model` (a Hugging Face folder) and `<output>/metrics.jsonl`, and prints a line every so often; of
    several processes, the main one does.
    """
    output = config.output if config.output is not None else Path("runs") / config.name
    folder = output / "model"
    if folder.exists():
        raise ConfigError(f"{folder} exists already. Choose another --output, or remove the folder.")
    if config.data.startswith("quickstart:"):
        raise DataError(f"data is {config.data!r}, which holds questions, not examples. Give --data FILE.jsonl.")
    conversations = read_conversations(config.data)
    model = load_model(config.model.path, dtype=DTYPES[config.model.dtype], device=device)
    examples = [
        encode_conversation(conversation, model.tokenizer, chat_template=config.model.chat_template)
        for conversation in conversations
    ]
    skipped = sum(len(example.input_ids) > config.sft.max_tokens for example in examples) if config.sft.skip_long else 0
    if skipped and is_main():
        print(f"left out {skipped} of {len(examples)} examples longer than sft.max_tokens = {config.sft.max_tokens}")
    output.mkdir(parents=True, exist_ok=True)
    every = max(1, config.sft.steps // 20)
    path = output / "metrics.jsonl" if is_main() else Path(os.devnull)
    with path.open("w", encoding="utf-8") as metrics:

        def on_step(step: SftStep) -> None:
            numbers = {name: value if math.isfinite(value) else None for name, value in asdict(step).items()}
            metrics.write(json.dumps(numbers) + "\n")
            if is_main() and (step.step % every == 0 or step.step in (1, config.sft.steps)):
                print(f"step {step.step}/{config.sft.steps}  loss {step.loss:.4f}", flush=True)

        try:
            losses = train_sft(model, examples, config.sft, seed=config.seed, on_step=on_step)
        except DataError as error:
            raise DataError(f"{config.data}: {error}") from error
    if is_main():
        save_model(model, folder)
    return {
        "model": str(folder),
        "examples": len(examples) - skipped,
        "skipped_examples": skipped,
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
