"""Supervised fine-tuning on the same packed step: examples laid end to end, loss on masked-in tokens only.

The loss is minus the sum of the loss tokens' log-probabilities, over the number of loss tokens of the whole batch. What
is trained is what requires gradients: all weights, or an adapter on frozen ones.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zs_fast.config import RunConfig, SftConfig
from zs_fast.errors import ConfigError, DataError
from zs_fast.learn.batch import MicroBatch
from zs_fast.learn.micro_step import MicroSteps
from zs_fast.learn.optimizer import Optimizer, Schedule
from zs_fast.learn.pack import TokenSequence, pack_tokens
from zs_fast.learn.policy import logprobs_at_loss_tokens
from zs_fast.learn.sft_data import SftExample, encode_conversation, read_conversations
from zs_fast.models.load import DTYPES, LoadedModel, load_model, save_model, with_trained_weights
from zs_fast.system.distributed import all_reduce_sums, is_main, rank, world_size
from zs_fast.system.seeds import seed_for
from zs_fast.types import Role

ADVICE = "lower sft.max_tokens and set sft.skip_long = true, or train an adapter (model.lora_rank)"

Quality = Callable[[LoadedModel], Mapping[str, float]]
"""Judges the model as it is by whatever counts: `lambda model: {"valid_json_share": ...}`. Every rank calls it."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class SftValidation:
    """What the model is worth after `step` steps."""

    step: int
    """0: before the first."""
    loss: float | None
    """Mean negative log-likelihood per loss token of the validation examples, in nats; None where there are none."""
    quality: Mapping[str, float] = field(default_factory=dict)
    """What the caller's `quality` gave."""


def train_sft(
    model: LoadedModel,
    examples: Sequence[SftExample],
    config: SftConfig,
    *,
    seed: int,
    on_step: Callable[[SftStep], None] | None = None,
    validation: Sequence[SftExample] = (),
    quality: Quality | None = None,
    on_validation: Callable[[SftValidation], None] | None = None,
) -> list[float]:
    """The loss of each step. `model` is changed in place; the same arguments give the same losses on the same machine.

    Each epoch's order is drawn from (seed, epoch); a batch may straddle epochs, so no example is ever left out. With
    `on_validation`, the model is judged before the first step, every config.validate_every steps and after the last.
    Raises DataError when there is nothing to learn from, or an example is longer than config.max_tokens.
    """
    usable = _usable(examples, config)
    held_out = _usable(validation, config, "validation example") if validation else []

    def validate(step: int) -> None:
        if on_validation is not None:
            loss = validation_loss(model, held_out, token_budget=config.token_budget) if held_out else None
            on_validation(SftValidation(step=step, loss=loss, quality=quality(model) if quality else {}))

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
    micro_steps = MicroSteps(model.model, what="in fine-tuning", advice=ADVICE)
    losses = []
    validate(0)
    for step in range(1, config.steps + 1):
        batch = [usable[next(order)] for _ in range(config.batch_size)]
        stats = sft_step(model, optimizer, batch, step=step, token_budget=config.token_budget, micro_steps=micro_steps)
        losses.append(stats.loss)
        if on_step is not None:
            on_step(stats)
        if step == config.steps or (config.validate_every and step % config.validate_every == 0):
            validate(step)
    return losses


@torch.no_grad()
def validation_loss(model: LoadedModel, examples: Sequence[SftExample], *, token_budget: int) -> float:
    """Mean negative log-likelihood per loss token over all `examples`, in nats; each rank scores its share."""
    own = examples[rank() :: world_size()]
    packed = pack_tokens(TokenSequence(ids=example.input_ids, is_loss=example.loss_mask) for example in own)
    packed = packed.to(model.model.device)

    def score(micro: MicroBatch) -> dict[str, Tensor]:
        logprobs = logprobs_at_loss_tokens(model.model, micro, temperature=1.0).logprobs
        return {"loss": -logprobs.sum(dtype=torch.float64)}

    passes = MicroSteps(model.model, what="in validation", advice=ADVICE)
    found = passes.run(packed, 0, packed.num_sequences, token_budget=token_budget, step=score)
    sums = all_reduce_sums({"loss": float(found.get("loss", 0.0)), "tokens": packed.num_loss_tokens})
    return sums["loss"] / sums["tokens"]


def sft_step(
    model: LoadedModel,
    optimizer: Optimizer,
    batch: Sequence[SftExample],
    *,
    step: int,
    token_budget: int,
    micro_steps: MicroSteps,
) -> SftStep:
    """One optimizer step on `batch`, in micro batches of at most `token_budget` tokens; one host sync.

    Each rank takes every world_size-th example; the loss is the mean over the loss tokens of all. `micro_steps` keeps
    the smaller budget from step to step, once a micro batch did not fit into memory.
    """
    own = batch[rank() :: world_size()]
    packed = pack_tokens(TokenSequence(ids=example.input_ids, is_loss=example.loss_mask) for example in own)
    packed = packed.to(model.model.device)
    counts = all_reduce_sums({"tokens": packed.num_tokens, "loss_tokens": packed.num_loss_tokens})
    learning_rate = optimizer.learning_rate

    def forward_and_backward(micro: MicroBatch) -> dict[str, Tensor]:
        logprobs = logprobs_at_loss_tokens(model.model, micro, temperature=1.0).logprobs
        loss = -logprobs.sum() / counts["loss_tokens"]
        torch.autograd.backward(loss)
        return {"loss": loss.detach()}

    optimizer.place_gradients()
    found = micro_steps.run(
        packed,
        0,
        packed.num_sequences,
        token_budget=token_budget,
        step=forward_and_backward,
        drop_gradients=optimizer.drop_gradients,
    )
    total = found.get("loss", torch.zeros((), device=model.model.device))
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


def _usable(examples: Sequence[SftExample], config: SftConfig, what: str = "example") -> list[SftExample]:
    usable = []
    for number, example in enumerate(examples, start=1):
        if not any(example.loss_mask):
            raise DataError(f"{what} {number} has no token to learn from: its loss mask is all False")
        if len(example.input_ids) <= config.max_tokens:
            usable.append(example)
        elif not config.skip_long:
            raise DataError(
                f"{what} {number} has {len(example.input_ids)} tokens, more than sft.max_tokens = "
                f"{config.max_tokens}. Raise sft.max_tokens, or set sft.skip_long = true to leave such examples out."
            )
    if not usable:
        raise DataError(
            f"none of {len(examples)} {what}s can be used: all are longer than sft.max_tokens = {config.max_tokens}"
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


def sft_command(config: RunConfig, device: torch.device, *, quality: Quality | None = None) -> dict[str, Any]:
    """`zs-fast sft`: fine-tune `model.path` on the examples in `data`; what it did, ready for JSON.

    Writes `<output>/model` (a Hugging Face folder, or with model.lora_rank a peft folder) and `<output>/metrics.jsonl`,
    and prints a line every so often; of several processes, the main one does.
    """
    output = config.output if config.output is not None else Path("runs") / config.name
    folder = output / "model"
    if folder.exists():
        raise ConfigError(f"{folder} exists already. Choose another --output, or remove the folder.")
    if config.data.startswith("quickstart:"):
        raise DataError(f"data is {config.data!r}, which holds questions, not examples. Give --data FILE.jsonl.")
    model, examples, validation = _model_and_examples(config, device)
    skipped = sum(len(example.input_ids) > config.sft.max_tokens for example in examples) if config.sft.skip_long else 0
    settings = _with_steps(config.sft, len(examples) - skipped)
    if skipped and is_main():
        print(f"left out {skipped} of {len(examples)} examples longer than sft.max_tokens = {config.sft.max_tokens}")
    output.mkdir(parents=True, exist_ok=True)
    every = max(1, settings.steps // 20)
    path = output / "metrics.jsonl" if is_main() else Path(os.devnull)
    seen: list[SftValidation] = []
    with path.open("w", encoding="utf-8") as metrics:

        def on_step(step: SftStep) -> None:
            metrics.write(_row(asdict(step)))
            if is_main() and (step.step % every == 0 or step.step in (1, settings.steps)):
                print(f"step {step.step}/{settings.steps}  loss {step.loss:.4f}", flush=True)

        def on_validation(found: SftValidation) -> None:
            seen.append(found)
            numbers = {} if found.loss is None else {"validation/loss": found.loss}
            numbers |= {f"quality/{name}": float(value) for name, value in found.quality.items()}
            metrics.write(_row({"step": found.step} | numbers))
            if is_main():
                shown = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
                print(f"after step {found.step}: {shown}", flush=True)

        try:
            losses = train_sft(
                model,
                examples,
                settings,
                seed=config.seed,
                on_step=on_step,
                validation=validation,
                quality=quality,
                on_validation=on_validation if validation or quality else None,
            )
        except DataError as error:
            raise DataError(f"{config.data}: {error}") from error
    if is_main():
        save_model(model, folder)
    results = {"validation_loss_before": seen[0].loss, "validation_loss_after": seen[-1].loss} if validation else {}
    return {
        "model": str(folder),
        "examples": len(examples) - skipped,
        "skipped_examples": skipped,
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    } | results


def _with_steps(config: SftConfig, num_examples: int) -> SftConfig:
    """With `epochs`, as many steps as they take; the last one may reach into the next epoch."""
    if not config.epochs:
        return config
    return config.model_copy(update={"steps": max(1, math.ceil(config.epochs * num_examples / config.batch_size))})


def _row(numbers: Mapping[str, float]) -> str:
    """A line of metrics.jsonl; JSON has no word for a number that is not finite, so that becomes null."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in numbers.items()}) + "\n"


def _model_and_examples(
    config: RunConfig, device: torch.device
) -> tuple[LoadedModel, list[SftExample], list[SftExample]]:
    """(what is trained, the examples to train on, those to validate with)."""
    conversations = read_conversations(config.data)
    held_out = read_conversations(config.sft.validation_data) if config.sft.validation_data else []
    if config.sft.validation_fraction:
        conversations, held_out = _split(conversations, config.sft.validation_fraction, config.seed)
    loaded = load_model(config.model.path, dtype=DTYPES[config.model.dtype], device=device)
    model = with_trained_weights(loaded, config.model, seed=seed_for(config.seed, role=Role.POLICY, purpose="adapter"))
    training, validation = (
        [
            encode_conversation(conversation, model.tokenizer, chat_template=config.model.chat_template)
            for conversation in part
        ]
        for part in (conversations, held_out)
    )
    return model, training, validation


def _split(rows: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(kept, held out): at least one row each, drawn from the seed, both in the order of the file."""
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        raise DataError(f"sft.validation_fraction = {fraction} holds back all of {len(rows)} examples. Lower it.")
    chosen = set(random.Random(seed_for(seed, purpose="sft_validation")).sample(range(len(rows)), count))
    return [r for n, r in enumerate(rows) if n not in chosen], [r for n, r in enumerate(rows) if n in chosen]
