"""`make faults`: the table of faults, row by row, into docs/faults.md. A second call goes on where the first stopped.

    python tests/faults/run.py                    every row in full
    python tests/faults/run.py --fast             every row at the size that CI runs
    python tests/faults/run.py F01 F20 --trials 1000

A row is a set of tests; its trials are what they report with `record_property("trials", n)`, else one a test. Results
lie in build/faults.json; a row that passed in full is not run again unless it is named. Of rows without a result there
the page keeps what it says.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"
HYPOTHESIS_EXAMPLES = 1000
"""Of each property, beside a row's own trials."""


class Row(NamedTuple):
    fault: str
    expected: str
    tests: tuple[str, ...]
    trials: int = 0
    """What ZS_FAULT_TRIALS is in a full run; 0: the tests count for themselves."""


CHECKPOINT = "tests/system/test_checkpoint.py"
FAULTS = "tests/system/test_checkpoint_faults.py"
STOPS = "tests/system/test_orderly_stop.py"
REMOTE = "tests/rollout/test_openai_engine.py"
UPDATE = "tests/learn/test_update.py"
RANKS = "tests/system/test_ranks.py"

ROWS = {
    "F01": Row(
        "kill -9 at any instant",
        "metrics, rollouts and weights of a run left alone; no damaged checkpoint; no finished search asked again",
        ("tests/faults/test_kill_at_any_instant.py", "tests/system/test_journal.py"),
        300,
    ),
    "F02": Row("crash at each file operation of a save", "the old or the new state", (f"{FAULTS} -k crash",)),
    "F03": Row(
        "power loss: unsynced writes and names dropped or torn",
        "every save that returned is found; no bad load",
        ("tests/system/test_power_loss.py",),
        2000,
    ),
    "F04": Row(
        "ENOSPC, EDQUOT, EIO, EROFS, short writes at each file operation",
        "told, the old state kept; the run goes on until its budget is spent",
        (f"{FAULTS} -k 'error or short or descriptor'", f"{STOPS} -k disk"),
    ),
    "F06": Row(
        "a run folder that can't be written, or a disk without room",
        "refused before the first rollout",
        ("tests/system/test_lock.py", "tests/system/test_disk_room.py"),
    ),
    "F07": Row(
        "bit flips, cuts, swapped, missing, stale files",
        "found before use, named, an older one taken",
        (f"{CHECKPOINT} -k 'flip or truncation or cut or swapped or damaged or usable'",),
    ),
    "F08": Row("pickles, header bombs", "never executed, little memory", (f"{CHECKPOINT} -k 'pickle or hostile'",)),
    "F09": Row(
        "another config, model, tokenizer, dtype or number of processes",
        "one error with key, saved and current value; or resharded",
        (
            "tests/system/test_other_runs_checkpoints.py",
            f"{CHECKPOINT} -k 'config or key or refused or absent'",
            f"{RANKS} -k 'goes_on or go_on'",
        ),
    ),
    "F10": Row(
        "two runs in one folder", "one winner; the other names host and pid", ("tests/system/test_lock.py -k wins",)
    ),
    "F11": Row(
        "resume at every step",
        "the same questions in the same order, the same bytes",
        (
            "tests/search/test_question_order.py",
            "tests/system/test_refill_run.py",
            "tests/system/test_metrics.py -k resume",
        ),
    ),
    "F12": Row(
        "SIGTERM, SIGINT, SIGHUP, SIGUSR1, twice",
        "saved, exit code 128 + number; a second one at once",
        (f"{STOPS} -k 'signal or exits'", "tests/system/test_interrupted_run.py"),
    ),
    "F13": Row(
        "retention with saves that fail", "a verified checkpoint always", (f"{CHECKPOINT} -k 'retention or saves'",)
    ),
    "F20": Row(
        "hostile simulator text",
        "no wrong mask, no spoofed reward, no added ids, one wrapper",
        ("tests/search/test_hostile_text.py -k 'documents or untrusted'", "tests/search/test_untrusted_text.py"),
        1_000_000,
    ),
    "F21": Row(
        "hostile policy text",
        "a meaning and a score in [0, 1], in linear time",
        ("tests/search/test_hostile_text.py -k policy", "tests/search/test_tag_parser.py"),
        1_000_000,
    ),
    "F22": Row(
        "tokens drift", "trained ids are sampled ids and observation ids", ("tests/search/test_token_drift.py",)
    ),
    "F23": Row(
        "silent truncation", "each cut is flagged", ("tests/search/test_episode.py -k 'limit or context or cut'",)
    ),
    "F24": Row(
        "zero variance, masked, empty, non-finite rewards",
        "finite and counted",
        (f"{UPDATE} -k 'dead or nothing or non_finite'", "tests/ops/test_group_advantages.py"),
    ),
    "F30": Row("malformed data sets", "one error: file, row, field", ("tests/search/test_malformed_data.py",)),
    "F41": Row(
        "all simulators dead in a step, back after a restart",
        "finished steps saved, one error; the same bytes after a resume, no reply asked for twice",
        ("tests/faults/test_dead_simulator.py", f"{RANKS} -k dead_simulator"),
    ),
    "F42": Row(
        "30 % of the simulator's requests fail, in six ways, over 200 steps",
        "every byte as without, no search lost",
        ("tests/faults/test_flapping_simulator.py -k sound",),
        200,
    ),
    "F43": Row(
        "1,000 requests wait for a server that comes back",
        "never more in flight than the cap; waits differ",
        ("tests/faults/test_flapping_simulator.py -k 'overrun or jitter'",),
        1000,
    ),
    "F46": Row(
        "exposure",
        "processes listen to loopback or nothing; no key is sent in the open",
        ("tests/cli/test_listeners.py", "tests/search/test_retriever_server.py", f"{REMOTE} -k 'key or machine'"),
    ),
    "F47": Row(
        "bad certificates, redirects, plain http",
        "refused before anything is sent; not followed; no key",
        ("tests/search/test_tls.py", f"{REMOTE} -k 'redirect or withheld'"),
    ),
    "F50": Row(
        "a rank is killed, stopped, raises or leaves, in each of six phases",
        "all are gone in time, a resume ends the same",
        ("tests/system/test_ranks_that_fail.py", f"{RANKS} -k 'killed_rank or fail_as_one'"),
    ),
    "F51": Row("out of memory in an update", "smaller micro batches on all ranks", ("tests/learn/test_micro_step.py",)),
    "F52": Row(
        "NaN and inf at nine places of a step, on any rank",
        "the update is left out; such weights are never published or saved; stop after K",
        ("tests/learn/test_nonfinite_sites.py", f"{UPDATE} -k non_finite", f"{STOPS} -k finite"),
    ),
    "F53": Row(
        "leaks over 3,000 steps",
        "at most 50 KiB a step; files and threads constant",
        ("tests/faults/test_leaks.py",),
        3000,
    ),
    "F54": Row(
        "an engine that hangs or dies",
        "ended at the deadline, stacks kept",
        (f"{STOPS} -k 'sign_of_life or engine_that'",),
    ),
    "F56": Row(
        "noise in the order of replies, hash seed, clock",
        "every byte as without",
        ("tests/faults/test_noise_around_a_run.py",),
        20,
    ),
    "F60": Row("bad kernel arguments", "a Python error", ("tests/ops/test_argument_contract.py",)),
    "F61": Row(
        "kernel logic",
        "right against float64",
        ("tests/ops/test_token_logprobs.py", "tests/ops/test_linear_logprobs.py"),
    ),
    "F63": Row(
        "out-of-vocabulary sampling",
        "no id beyond the tokenizer, though the logits prefer them",
        ("tests/rollout/test_padded_vocabulary.py",),
        1_000_000,
    ),
    "F70": Row("unsafe constructs", "none in the source", ("tests/test_architecture.py -k 'ban or banned'",)),
    "F71": Row(
        "dependencies",
        "each one that is installed is pinned to its version; bandit finds nothing of high weight",
        ("tests/cli/test_dependencies.py",),
    ),
}
NOT_BUILT = {
    "F62": "memory safety on a GPU",
}


def run_row(name: str, *, fast: bool, trials: int, seed: int) -> dict[str, Any]:
    row, started = ROWS[name], time.monotonic()
    environment = os.environ | {"ZS_FAULT_SEED": str(seed), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    if not fast and (trials or row.trials):
        count = str(trials or row.trials)
        environment |= {"ZS_FAULT_TRIALS": count, "ZS_HYPOTHESIS_EXAMPLES": str(min(int(count), HYPOTHESIS_EXAMPLES))}
    counts = {"tests": 0, "trials": 0, "failures": 0, "skipped": 0}
    for words in row.tests:
        path, _, choice = words.partition(" -k ")
        with tempfile.NamedTemporaryFile(suffix=".xml") as report:
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                path,
                f"--junit-xml={report.name}",
                "-o",
                "junit_family=xunit1",
            ]
            command += ["-k", choice.strip("'")] if choice else []
            command += [] if fast else ["-m", "full or not full"]
            subprocess.run(command, cwd=ROOT, env=environment, check=False)
            _add(counts, Path(report.name).read_text(encoding="utf-8"))
    size = "as in CI" if fast else "full" if not trials or trials >= row.trials else f"{trials} of {row.trials}"
    seconds = round(time.monotonic() - started, 1)
    return counts | {"seed": seed, "seconds": seconds, "size": size}


def _add(counts: dict[str, int], report: str) -> None:
    if not report:
        counts["failures"] += 1
        return
    for case in ElementTree.fromstring(report).iter("testcase"):
        if case.find("skipped") is not None:
            counts["skipped"] += 1
            continue
        counts["tests"] += 1
        counts["failures"] += case.find("failure") is not None or case.find("error") is not None
        given = [int(p.attrib["value"]) for p in case.iter("property") if p.attrib["name"] == "trials"]
        counts["trials"] += sum(given) if given else 1


def published() -> dict[str, list[str]]:
    """Row -> the cells of its result, as the page has them."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| F")]
    return {name: told for name, _, _, *told in cells}


def write_page(results: dict[str, dict[str, Any]]) -> None:
    before = published()
    lines = [
        "# Faults",
        "",
        "Written by `make faults` (tests/faults/run.py). A trial is one fault that was let happen where a test counts",
        "them, else one test; property-based tests count as one, however many texts they try. The size is `full`, or",
        "how many of a full run's trials were asked for.",
        "",
        "| row | fault | what must hold | tests | trials | failures | seed | seconds | size |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        result, cells = results.get(name), before.get(name, ["", "", "", "", "", "not run yet"])
        if result is not None:
            cells = [str(result[key]) for key in ("tests", "trials", "failures", "seed", "seconds", "size")]
        lines.append(f"| {name} | {row.fault} | {row.expected} | {' | '.join(cells)} |")
    lines += ["", "Not built yet:", "", *(f"- {name}: {what}" for name, what in NOT_BUILT.items()), ""]
    PAGE.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="rows to run again; none: all that were not run")
    parser.add_argument("--fast", action="store_true", help="the size that CI runs")
    parser.add_argument("--trials", type=int, default=0, help="in place of a row's own number")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if unknown := [name for name in given.rows if name not in ROWS]:
        parser.error(f"unknown rows {unknown}; there are {', '.join(ROWS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    for name in given.rows or ROWS:
        known = results.get(name)
        if not given.rows and known and not known["failures"] and (known["size"] == "full" or given.fast):
            continue
        print(f"{name}: {ROWS[name].fault}", flush=True)
        results[name] = run_row(name, fast=given.fast, trials=given.trials, seed=given.seed)
        RESULTS.write_text(json.dumps(results, indent=1))
        write_page(results)
    write_page(results)
    failed = [name for name, result in results.items() if result["failures"]]
    sys.exit(f"failures in {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
