"""`zs-fast bench ops`: the operations against what one would write in plain torch, and against other packages.

An op is timed only if its own tests pass here and its variants agree with float64 on these very inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from bench.catalogue import CASES
from bench.harness import Case, Disagreement, judge, measure
from bench.results import summarise, table, verdict_lines, write_results
from bench.usage import ceilings
from zs_fast.errors import ConfigError, PreflightError
from zs_kernels._device import native_status

ROOT = Path(__file__).resolve().parent.parent
QUICK_ROUNDS, ROUNDS, LONG_ROUNDS = 3, 21, 3
"""Of --quick; of a full run; and of a full run's cases whose calls take seconds."""


def main(words: Sequence[str]) -> dict[str, Any]:
    """Run with the words of the command line. Raises ConfigError, PreflightError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"zs-fast bench ops: {message}")

    parser = Parser(prog="zs-fast bench ops", add_help=False)
    parser.add_argument("--only", action="extend", nargs="+", default=[])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--untested", action="store_true")
    given = parser.parse_args(list(words))
    return run_ops(only=given.only, rounds=given.rounds, quick=given.quick, run_tests_first=not given.untested)


def run_ops(
    *, only: Sequence[str] = (), rounds: int | None = None, quick: bool, run_tests_first: bool
) -> dict[str, Any]:
    """Time the cases (all, or those named by `only`), print tables, write the JSON file, and return its content.

    On a CPU everything runs on one thread. quick: few rounds and small shapes, to see that everything runs, and no
    file. Raises ConfigError for an unknown case, PreflightError for a red op or one whose results are wrong.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    names = _chosen(only, kind)
    if run_tests_first:
        refuse_red(sorted({path for name in names for path in _test_files(CASES[name].tests)}))
    device = "cuda:0" if kind == "cuda" else "cpu"
    timings, verdicts, absent = [], [], {}
    with one_thread(kind):
        best = ceilings(device, quick=quick)
        print(f"ceilings of this run: copy {best.bytes_per_s / 1e9:.4g} GB/s", end="")
        print("" if best.flop_per_s is None else f", bf16 matrix product {best.flop_per_s / 1e12:.4g} TFLOP/s")
        for name in names:
            case = build(name, device, quick=quick)
            gc.collect()
            gc.freeze()  # the peers' millions of objects need not be looked through before every call
            try:
                found = measure(case, rounds=rounds or _rounds(case, quick), ceilings=best)
            except Disagreement as error:
                raise PreflightError(f"bench: not timed, because results differ: {error}") from error
            finally:
                gc.unfreeze()
            timings += found
            verdicts += judge(case, found)
            absent |= case.absent
            print(f"\n{table(found, device)}", flush=True)
            if case.absent:
                print(f"  absent: {', '.join(case.absent)}")
            if case.targets:
                print(verdict_lines(judge(case, found)), flush=True)
            del case
            gc.collect()
        summary = summarise("ops", timings, device, verdicts=verdicts, ceilings=best, absent=absent)
    if not native_status().available and kind == "cpu":
        print(f"note: {native_status().reason}")
    for how in sorted(set(absent.values())):
        print(f"note: what is absent needs: {how}")
    if not quick:
        path = write_results(summary)
        print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return summary


def build(name: str, device: str, *, quick: bool) -> Case:
    """A case of the catalogue, on this device."""
    entry = CASES[name]
    kind = torch.device(device).type
    size = entry.quick if quick else entry.size(kind)
    assert size is not None
    case = entry.build(device, name, **size)
    return case if quick else dataclasses.replace(case, targets=entry.targets.get(kind, ()))


def _chosen(only: Sequence[str], kind: str) -> list[str]:
    here = [name for name, entry in CASES.items() if entry.size(kind) is not None]
    if unknown := [name for name in only if name not in here]:
        raise ConfigError(f"zs-fast bench ops --only {' '.join(unknown)}: the cases on {kind} are {', '.join(here)}")
    return [name for name in here if name in only] if only else here


def _rounds(case: Case, quick: bool) -> int:
    if quick:
        return QUICK_ROUNDS
    return case.rounds or (LONG_ROUNDS if case.flop and case.device == "cpu" else ROUNDS)


def _test_files(patterns: Sequence[str]) -> list[str]:
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "tests/ops").glob(pattern)]


@contextlib.contextmanager
def one_thread(kind: str) -> Iterator[None]:
    """On a CPU, one thread: the time of a process then is the work it does."""
    before = torch.get_num_threads()
    if kind == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refuse_red(paths: Sequence[str]) -> None:
    """Run the ops' tests first: a fast wrong op is no result."""
    together = ["-n", str(min(4, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") and len(paths) > 1 else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *together, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    if done.returncode != 0:
        tail = (done.stdout + done.stderr).strip().splitlines()
        raise PreflightError(
            f"bench: the tests of {' '.join(paths)} fail, so nothing is timed: {tail[-1] if tail else ''}"
        )
