"""`zs-fast bench rollout`: one step's trajectories, scheduled in four ways on the same engine.

A committed trace gives the lengths; random models write that many tokens. What is compared is counted, so that a busy
machine has no part in it: engine steps (one token, or a prefill, for whoever can advance, policy and simulator alike)
and prompt tokens that went through a model. Wall and CPU time stand beside. With `--against generate`: how fast the
engine writes, against transformers (generate.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench import generate
from bench.ops import ROOT, one_thread
from bench.results import verdict_lines, write_results
from bench.rollout_trace import GROUP_SIZE, RUN_SEED, Trace, TraceEngine, load_trace
from bench.turns import REFERENCE_CALLS, TurnGame, computed_apart
from zs_fast.config import GameConfig, SamplingConfig, SimulatorConfig
from zs_fast.errors import ConfigError
from zs_fast.models.load import LoadedModel
from zs_fast.rollout.engine import EngineStats, LocalEngine
from zs_fast.rollout.play import Player, Refill
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.search.simulator import SimulatedSearch
from zs_fast.system.environment import environment
from zs_fast.testing import tiny_model
from zs_fast.types import Role

STEPS = 5
"""Consecutive steps of the mode with refill; those after the first are the steady state."""
GAME = GameConfig(max_turns=5, max_new_tokens=400, max_observation_tokens=400, max_context_tokens=4096)
SIMULATOR = SimulatorConfig(documents=1, max_new_tokens=400)
TARGETS = {"ours": 0.65, "ours, one-step refill": 0.50}
"""Most engine steps, as a share of the batch-synchronous ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One way to schedule, per step of the trace."""

    mode: str
    engine_steps: float
    policy_forwards: float
    simulator_forwards: float
    policy_prefill_tokens: float
    simulator_prefill_tokens: float
    decode_tokens: float
    """Both roles'; more than the trace's where updates cut completions."""
    prefilled_twice_per_turn: float
    """Policy prompt tokens beyond the fewest possible, over the trace's turns."""
    evictions: float
    wall_s: float
    cpu_s: float
    first_step: int
    """Engine steps of the first step, which has nothing to begin from."""


@dataclass(slots=True)
class _Stage:
    """An engine with fresh models, a search that asks it, and what was counted up to now."""

    trace: Trace
    engine: TraceEngine
    search: SimulatedSearch

    def counted(self) -> dict[str, float]:
        stats: dict[Role, EngineStats] = self.engine.engine.stats()
        policy, simulator = stats[Role.POLICY], stats[Role.SIMULATOR]
        return {
            "engine_steps": self.engine.num_steps,
            "policy_forwards": policy.steps,
            "simulator_forwards": simulator.steps,
            "policy_prefill_tokens": policy.prefill_tokens,
            "simulator_prefill_tokens": simulator.prefill_tokens,
            "decode_tokens": policy.decode_tokens + simulator.decode_tokens,
            "evictions": policy.evictions + simulator.evictions,
            "wall_s": time.perf_counter(),
            "cpu_s": time.process_time(),
        }


def main(words: Sequence[str]) -> dict[str, Any]:
    """Run with the words of the command line. Raises ConfigError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"zs-fast bench rollout: {message}")

    parser = Parser(prog="zs-fast bench rollout", add_help=False)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--against", choices=("generate",))
    given, others = parser.parse_known_args(list(words))
    if given.against == "generate":
        return generate.main([word for word in words if word not in ("--against", "generate")])
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return run_rollout(kind=given.engine, slots=given.slots, quick=given.quick)


def run_rollout(*, kind: str = "transformers", slots: int | None = None, quick: bool = False) -> dict[str, Any]:
    """Play the trace in every mode, print the table, write the JSON file, and return its content.

    slots: sequences decoded at once, per model (vLLM's max_num_seqs); as many as trajectories by default. quick: a few
    short trajectories and no file.
    """
    trace = _shortened(load_trace()) if quick else load_trace()
    slots = slots or len(trace.trajectories)
    steps = 3 if quick else STEPS
    build = partial(_stage, trace, kind=kind, slots=slots, steps=steps)
    modes: dict[str, Callable[[_Stage], Result]] = {
        "batch-synchronous": partial(_in_turns, calls=None, keep_prefix=True),
        "reference pattern": partial(_in_turns, calls=REFERENCE_CALLS, keep_prefix=False),
        "ours": partial(_played, steps=1, refill=0),
        "ours, one-step refill": partial(_played, steps=steps, refill=1),
    }
    print(_heading(trace, kind, slots, steps))
    results = []
    with one_thread("cpu"):
        for mode, run in modes.items():
            stage = build()
            results.append(replace(run(stage), mode=mode))
            stage.engine.engine.close()
            print(_row(results[-1], results[0]), flush=True)
        verdicts = _judge(results, kind)
        summary = {
            "subject": "rollout",
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "environment": environment("cpu"),
            "engine": kind,
            "slots_per_model": slots,
            "trace": asdict(trace) | {"least_prefill_tokens": trace.least_prefill},
            "results": [asdict(result) for result in results],
            "targets": verdicts,
        }
    print(verdict_lines(verdicts))
    if not quick:
        path = write_results(summary)
        print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return summary


def _in_turns(stage: _Stage, *, calls: int | None, keep_prefix: bool) -> Result:
    """One step with a barrier after every turn (turns.py)."""
    before = stage.counted()
    game = TurnGame(
        stage.engine,  # type: ignore[arg-type]  # forwards what a game uses
        stage.search,
        stage.engine.policy_codec,  # type: ignore[arg-type]  # a codec of the trace's lengths
        stage.trace.questions,
        game=GAME,
        sampling=SamplingConfig(),
        group_size=GROUP_SIZE,
        run_seed=RUN_SEED,
        step=1,
        calls=calls,
        keep_prefix=keep_prefix,
    )
    with nullcontext() if keep_prefix else computed_apart(stage.engine):
        while game.live:
            game.act()
            game.search()
    return _result(stage, before, stage.counted(), steps=1)


def _played(stage: _Stage, *, steps: int, refill: int) -> Result:
    """Consecutive steps of our player. With `refill`, as many further steps' questions may begin early; after each
    step new weights are announced, which cuts what is under way."""
    player = Player(
        stage.engine,  # type: ignore[arg-type]  # forwards what a player uses
        stage.search,
        stage.engine.policy_codec,  # type: ignore[arg-type]
        game=GAME,
        sampling=SamplingConfig(),
        group_size=GROUP_SIZE,
        run_seed=RUN_SEED,
        max_failed_share=0.0,
    )
    questions = stage.trace.questions

    def begin_ahead(step: int) -> bool:
        ahead, place = divmod(player.num_groups, len(questions))
        if ahead > refill or step + ahead > steps + refill:
            return False
        player.submit(questions[place], step=step + ahead, noise_probability=0.0)
        return True

    counts = [stage.counted()]
    for step in range(1, steps + 1):
        for question in questions[player.num_groups :]:
            player.submit(question, step=step, noise_probability=0.0)
        full = Refill(partial(begin_ahead, step), len(stage.trace.trajectories)) if refill else None
        player.collect(len(questions), refill=full)
        player.pause()
        stage.engine.publish(step)
        counts.append(stage.counted())
    first = int(counts[1]["engine_steps"] - counts[0]["engine_steps"])
    steady = counts[1:] if steps > 1 else counts
    return replace(_result(stage, steady[0], steady[-1], steps=len(steady) - 1), first_step=first)


def _result(stage: _Stage, before: dict[str, float], after: dict[str, float], *, steps: int) -> Result:
    values = {name: (after[name] - before[name]) / steps for name in before}
    twice = (values["policy_prefill_tokens"] - stage.trace.least_prefill[0]) / stage.trace.num_turns
    return Result(mode="", prefilled_twice_per_turn=twice, first_step=int(values["engine_steps"]), **values)


def _stage(trace: Trace, *, kind: str, slots: int, steps: int) -> _Stage:
    loaded = {Role.POLICY: _model(0), Role.SIMULATOR: _model(1)}
    engine: LocalEngine
    if kind == "vllm":
        from zs_fast.rollout.vllm_engine import VllmEngine

        engine = VllmEngine(loaded, slots=slots, max_context_tokens=4096, frozen=(Role.SIMULATOR,))
    else:
        engine = TransformersEngine(loaded, slots=slots, max_context_tokens=4096)
    traced = TraceEngine(engine, trace, steps=steps + 1)
    search = SimulatedSearch(traced, traced.simulator_codec, SIMULATOR, run_seed=RUN_SEED)
    return _Stage(trace, traced, search)


def _model(seed: int) -> LoadedModel:
    """Tiny, random, with a tokenizer of bytes alone: there is no token that ends a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tiny_model(
        "qwen2", seed=seed, heads=2, kv_heads=1, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    )


def _shortened(trace: Trace) -> Trace:
    short = tuple(tuple(max(8, length // 8) for length in lengths) for lengths in trace.trajectories[: 4 * GROUP_SIZE])
    return replace(trace, trajectories=short)


def _judge(results: Sequence[Result], kind: str) -> list[dict[str, Any]]:
    found = {result.mode: result for result in results}
    verdicts = []
    for mode, most in TARGETS.items():
        ratio = found[mode].engine_steps / found["batch-synchronous"].engine_steps
        target = f"{mode}: engine steps at most {most:g}x of batch-synchronous"
        verdicts.append({"case": "rollout", "target": target, "measured": ratio, "met": ratio <= most})
    block = 1
    if kind == "vllm":
        from zs_fast.rollout.vllm_core import cache_block_tokens

        block = cache_block_tokens()
    twice = found["ours"].prefilled_twice_per_turn
    target = f"ours: tokens prefilled twice, at most one cache block ({block}) per turn"
    verdicts.append({"case": "rollout", "target": target, "measured": twice, "met": twice <= block})
    return verdicts


def _heading(trace: Trace, kind: str, slots: int, steps: int) -> str:
    policy, simulator = trace.least_prefill
    return (
        f"{len(trace.trajectories)} trajectories, {trace.num_turns} turns, {trace.num_searches} searches, "
        f"{sum(map(sum, trace.trajectories))} tokens to write; least prefill {policy} + {simulator}\n"
        f"engine {kind}, max_num_seqs {slots} per model; refill: mean of steps 2 to {steps}\n"
        f"{'mode':<24} {'steps':>7} {'ratio':>6} {'forwards':>15} {'prefill':>17} {'decoded':>8} {'twice':>7} "
        f"{'wall s':>7} {'CPU s':>7}"
    )


def _row(result: Result, base: Result) -> str:
    forwards = f"{result.policy_forwards:.0f} + {result.simulator_forwards:.0f}"
    prefill = f"{result.policy_prefill_tokens:.0f} + {result.simulator_prefill_tokens:.0f}"
    return (
        f"{result.mode:<24} {result.engine_steps:>7.0f} {result.engine_steps / base.engine_steps:>6.2f} "
        f"{forwards:>15} {prefill:>17} {result.decode_tokens:>8.0f} {result.prefilled_twice_per_turn:>7.1f} "
        f"{result.wall_s:>7.1f} {result.cpu_s:>7.1f}"
    )
