"""`zs-fast bench rollout --against generate`: new tokens per second of our embedded engine and of transformers.

Both write the same number of tokens from the same prompts with the same weights, in the same type, at temperature 1
over the whole vocabulary. transformers runs as one calls it: `model.generate` on a left-padded batch, with its dynamic
cache and scaled-dot-product attention. Our engine gives the log-probability of every token besides; there the peer
would need another forward. Prompts are of random ids, since what is written does not change the work; no token ends a
row early, in either way. Every round runs both ways on the same case, in shuffled order, on one thread.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from bench.harness import Target, Timing, judge_timings, spread_of
from bench.ops import ROOT, one_thread, refuse_red
from bench.results import summarise, table, verdict_lines, write_results
from bench.train_step import MODEL, with_own_attention
from zs_fast.errors import ConfigError
from zs_fast.models.load import LoadedModel, load_model
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.types import Role, Sampling

TESTS = ("tests/rollout/test_transformers_engine.py", "tests/rollout/test_sampler.py")
THEIRS, OURS = "transformers generate", "zs_fast engine"
ROUNDS, QUICK_ROUNDS = 3, 1
LEAST_SPEED = {8: 1.5, 32: 2.5}
"""By batch size: new tokens per CPU second over those of transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The rows of one case: tokens of each prompt, and tokens to write."""

    name: str
    dtype: str
    prompts: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def new_tokens(self) -> int:
        return sum(self.new)

    @property
    def shape(self) -> str:
        def span(lengths: Sequence[int]) -> str:
            return f"{min(lengths)}" if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)}"

        return f"{self.dtype}, batch {len(self.prompts)}, prompts of {span(self.prompts)}, {span(self.new)} new tokens"


def even(batch: int, dtype: str, *, prompt: int = 128, new: int = 128) -> Work:
    """Rows of one length."""
    return Work(name=f"{dtype} batch {batch}", dtype=dtype, prompts=(prompt,) * batch, new=(new,) * batch)


def ragged(batch: int, dtype: str, *, prompt: int = 128, new: int = 128) -> Work:
    """Rows as a game has them: prompts within a half of the mean, log-normal completions up to twice the mean."""
    draws = random.Random(0)
    prompts = tuple(draws.randint(prompt // 2, prompt + prompt // 2) for _ in range(batch))
    written = tuple(max(1, min(2 * new, int(new * 0.75 * draws.lognormvariate(0.0, 0.7)))) for _ in range(batch))
    return Work(name=f"{dtype} ragged {batch}", dtype=dtype, prompts=prompts, new=written)


def main(words: Sequence[str]) -> dict[str, Any]:
    """Run with the words of the command line. Raises ConfigError, PreflightError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"zs-fast bench rollout --against generate: {message}")

    parser = Parser(prog="zs-fast bench rollout --against generate", add_help=False)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="+", metavar="WORD")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--untested", action="store_true")
    given = parser.parse_args(list(words))
    if not given.untested:
        refuse_red(TESTS)
    return run(rounds=given.rounds, only=given.only, quick=given.quick)


def run(*, rounds: int = ROUNDS, only: Sequence[str] | None = None, quick: bool = False) -> dict[str, Any]:
    """Time both ways, print a table, write the JSON file, and return its content.

    only: parts of the names of the cases to run. quick: the quickstart's model and a few tokens, and no file.
    """
    if rounds < 1:
        raise ConfigError(f"zs-fast bench rollout --against generate --rounds {rounds}: at least 1")
    short: dict[str, int] = {"prompt": 8, "new": 4} if quick else {}
    works = [make(batch, dtype, **short) for dtype in ("float32", "bfloat16") for make, batch in _KINDS]
    works = [work for work in works if only is None or any(word in work.name for word in only)]
    if not works:
        raise ConfigError(f"zs-fast bench rollout --against generate --only {' '.join(only or ())}: no such case")
    timings: list[Timing] = []
    verdicts: list[dict[str, Any]] = []
    rates: dict[str, dict[str, float]] = {}
    with one_thread("cpu"):
        loaded: LoadedModel | None = None
        for work in works:
            if loaded is None or str(loaded.model.dtype) != f"torch.{work.dtype}":
                loaded = load_model("quickstart:policy" if quick else MODEL, dtype=work.dtype)
            found = measure(work, loaded, rounds=QUICK_ROUNDS if quick else rounds)
            timings += found
            rates[work.name] = {one.variant: work.new_tokens / one.cpu_ms * 1e3 for one in found}
            print(table(found), flush=True)
            print(
                "  "
                + ", ".join(f"{name} {rate:.1f} new tokens per CPU second" for name, rate in rates[work.name].items())
            )
            least = LEAST_SPEED[len(work.prompts)]
            if not quick:
                verdicts += judge_timings(work.name, [Target(OURS, "speed", over=THEIRS, at_least=least)], found, "cpu")
    print(verdict_lines(verdicts))
    summary = summarise("generate", timings, verdicts=verdicts)
    summary["workload"] = {"model": MODEL, "mode": "batch_invariant", "new_tokens_per_cpu_second": rates}
    if not quick:
        path = write_results(summary)
        print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return summary


_KINDS: tuple[tuple[Callable[..., Work], int], ...] = ((even, 8), (even, 32), (ragged, 32))


def measure(work: Work, loaded: LoadedModel, *, rounds: int) -> list[Timing]:
    """CPU time of both ways on one case: each once with few tokens to warm up, then `rounds` times."""
    draws = random.Random(1)
    vocabulary = len(loaded.tokenizer)
    prompts = [[draws.randrange(vocabulary) for _ in range(length)] for length in work.prompts]
    theirs = with_own_attention(loaded)
    ways: Mapping[str, Callable[[Sequence[int]], int]] = {
        THEIRS: lambda new: generate(theirs, prompts, new),
        OURS: lambda new: engine_writes(loaded, prompts, new),
    }
    for way in ways.values():
        way([2] * len(prompts))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(ways), len(ways)):
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            written = ways[name](work.new)
            samples[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            assert written == work.new_tokens, f"{name} wrote {written} of {work.new_tokens} tokens"
    times = {name: statistics.median(cpu for _, cpu in taken) for name, taken in samples.items()}
    return [
        Timing(
            case=work.name,
            shape=work.shape,
            variant=name,
            wall_ms=statistics.median(wall for wall, _ in taken) * 1e3,
            cpu_ms=times[name] * 1e3,
            spread=spread_of([cpu for _, cpu in taken]),
            speedup=times[THEIRS] / times[name],
            calls_per_sample=1,
            samples=rounds,
        )
        for name, taken in samples.items()
    ]


@torch.no_grad()
def generate(model: Any, prompts: Sequence[Sequence[int]], new: Sequence[int]) -> int:
    """transformers' way; the number of tokens that are wanted of what it wrote. The batch runs until its longest row
    is done."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max(new),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert out.shape[1] == longest + max(new)
    return sum(new)


def engine_writes(loaded: LoadedModel, prompts: Sequence[Sequence[int]], new: Sequence[int]) -> int:
    """Our way; the number of tokens written."""
    limit = max(map(len, prompts)) + max(new)
    engine = TransformersEngine({Role.POLICY: loaded}, slots=len(prompts), max_context_tokens=limit)
    engine.eos_ids(Role.POLICY).clear()  # as `eos_token_id=None` above
    for row, (ids, length) in enumerate(zip(prompts, new, strict=True)):
        engine.add(row, list(ids), Sampling(max_new_tokens=length, seed=row), role=Role.POLICY)
    written = 0
    while engine.num_unfinished:
        written += sum(len(completion.token_ids) for completion in engine.step())
    engine.close()
    return written
