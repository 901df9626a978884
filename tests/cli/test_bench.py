"""The timing protocol, its targets, and the benchmark's refusals. No assertion is about how fast anything is."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from bench import catalogue, harness, ops, peers, results, small_calls, usage
from zs_fast.errors import ConfigError, PreflightError


@pytest.fixture
def no_warm_up(monkeypatch):
    monkeypatch.setattr(harness, "WARM_UP_S", 0.0)
    monkeypatch.setattr(harness, "MIN_SAMPLE_S", 0.0)


def timing(variant: str, **given: object) -> harness.Timing:
    values: dict[str, object] = {"case": "c", "shape": "1", "variant": variant, "wall_ms": 1.0, "cpu_ms": 1.0}
    values |= {"spread": 0.1, "speedup": 1.0, "calls_per_sample": 1, "samples": 5}
    return harness.Timing(**(values | given))


def test_measure_interleaves_and_reports_every_variant(no_warm_up):
    called = []
    case = harness.Case("c", "1", {"a": lambda: called.append("a"), "b": lambda: called.append("b")})
    timings = harness.measure(case, rounds=8)
    assert [timing.variant for timing in timings] == ["a", "b"]
    assert timings[0].speedup == 1.0
    rounds = called[-16:]
    assert all({rounds[i], rounds[i + 1]} == {"a", "b"} for i in range(0, 16, 2))
    assert rounds != ["a", "b"] * 8, "the order within a round is shuffled"


def test_a_slow_call_is_made_once_to_warm_up_and_once_a_round(monkeypatch):
    monkeypatch.setattr(harness, "SLOW_S", 0.001)
    called = []

    def slow() -> None:
        end = time.perf_counter() + 0.003
        while time.perf_counter() < end:
            pass
        called.append(1)

    (found,) = harness.measure(harness.Case("c", "1", {"slow": slow}), rounds=3)
    assert len(called) == 4 and found.peak_bytes is not None


@pytest.mark.parametrize("wrong", [0.2, math.nan])
def test_a_variant_that_computes_something_else_is_not_timed(no_warm_up, wrong):
    right = torch.ones(4, dtype=torch.float64)
    variants = {"right": lambda: {"x": torch.ones(4)}, "wrong": lambda: {"x": torch.ones(4) + wrong}}
    case = harness.Case("c", "1", variants, exact=lambda: {"x": right}, tolerance=0.1)
    with pytest.raises(harness.Disagreement, match="wrong has another x"):
        harness.measure(case, rounds=1)


def test_errors_are_against_the_rows_that_are_known_exactly(no_warm_up):
    exact = {"x": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    case = harness.Case(
        "c", "1", {"a": lambda: {"x": torch.tensor([3.0, 4.5, 99.0])}}, exact=lambda: exact, tolerance=1
    )
    (found,) = harness.measure(case, rounds=2)
    assert found.errors == {"x": {"max": 0.5, "relative": pytest.approx(0.1)}}


def test_operator_calls_that_compute_are_counted():
    x = torch.randn(8, 8)

    def work() -> None:
        (x @ x).T.contiguous().view(-1).relu_().sum()

    with usage.count_launches("cpu") as counted:
        work()
    assert counted.number == 4  # the product, the copy that contiguous makes, relu, the sum


def test_peak_memory_is_what_a_call_takes_on_top():
    held = torch.ones(4 << 20)

    def work() -> torch.Tensor:
        return (held + 1.0) * 2.0  # two arrays of 16 MB at once

    work()
    with usage.peak_memory("cpu") as peak:
        made = work()
    if peak.bytes is None:
        pytest.skip("this kernel keeps no high-water mark that can be reset")
    assert 30 << 20 < peak.bytes < 40 << 20 and made.numel() == held.numel()


@pytest.mark.parametrize(
    ("target", "measured", "met"),
    [
        (harness.Target("ours", "speed", "theirs", at_least=4.0), 4.0, True),
        (harness.Target("ours", "speed", "theirs", at_least=4.1), 4.0, False),
        (harness.Target("ours", "time", "theirs", at_most=0.3), 0.25, True),
        (harness.Target("ours", "peak", "theirs", at_most=0.4), 0.5, False),
        (harness.Target("ours", "of_floor", at_least=0.7), 0.8, True),
        (harness.Target("ours", "launches", at_most=2), 2, True),
        (harness.Target("ours", "error:x", at_most=1e-5), 1e-6, True),
        (harness.Target("ours", "error:y", at_most=1e-5), None, None),
        (harness.Target("ours", "speed", "absent", at_least=2.0), None, None),
    ],
    ids=lambda value: value.text if isinstance(value, harness.Target) else None,
)
def test_targets_are_judged(target, measured, met):
    ours = timing("ours", cpu_ms=1.0, peak_bytes=50, of_floor=0.8, launches=2, errors={"x": {"max": 1e-6}})
    theirs = timing("theirs", cpu_ms=4.0, peak_bytes=100)
    (verdict,) = harness.judge(harness.Case("c", "1", {}, targets=(target,)), [ours, theirs])
    assert (verdict["measured"], verdict["met"]) == (measured, met)
    assert {True: "met", False: "MISSED", None: "not measured"}[met] in results.verdict_lines([verdict])


def test_targets_speak_of_variants_that_their_cases_have():
    for name, entry in catalogue.CASES.items():
        if entry.cpu is None or ("T" in entry.cpu and entry.cpu["T"] > 4000):
            continue
        case = ops.build(name, "cpu", quick=True)
        known = {*case.variants, *case.absent, catalogue.head.COMPILED}
        for target in entry.targets.get("cpu", ()):
            assert {target.variant, target.over or target.variant} <= known, f"{name}: {target.text}"


def test_every_case_names_tests_that_are_there():
    for name, entry in catalogue.CASES.items():
        assert ops._test_files(entry.tests), f"{name}: no test of {entry.tests}"


def test_a_result_file_says_what_it_ran_on(tmp_path):
    path = results.write_results(results.summarise("ops", [timing("a")]), tmp_path)
    content = json.loads(path.read_text())
    assert content["timings"][0]["variant"] == "a" and "a" in results.table([timing("a")])
    assert {"git_commit", "packages", "torch_threads", "cpu"} <= set(content["environment"])
    assert path.parent.name == results.device_slug(content["environment"])


def test_a_red_op_is_not_timed(tmp_path):
    red = tmp_path / "test_red_example.py"
    red.write_text("def test_red():\n    assert False\n")
    with pytest.raises(PreflightError, match="nothing is timed"):
        ops.refuse_red([str(red)])


def test_an_unknown_case_is_a_clear_error():
    with pytest.raises(ConfigError, match=r"gaee.*the cases on cpu are fused_loss"):
        ops.main(["--only", "gaee"])
    with pytest.raises(ConfigError, match="--quik"):
        ops.main(["--quik"])


def test_a_missing_peer_is_a_row_less():
    variants = peers.Variants()
    variants.add_peer("nobody", peers.find("no_such_package", "thing"), lambda: None)
    variants.add_peer("torch", peers.find("torch", "add"), lambda: None)
    assert list(variants.calls) == ["torch"] and variants.absent == {"nobody": peers.INSTALL}


@pytest.mark.parametrize("suite", ["head", "token"])
def test_quick_runs_every_case(no_warm_up, capsys, suite):
    """Each case also checks that its variants agree with float64 before it is timed."""
    names = [
        name
        for name, entry in catalogue.CASES.items()
        if entry.cpu is not None and (entry.build.__module__ == "bench.head_suite") == (suite == "head")
    ]
    before = set(Path(results.RESULTS).rglob("*.json"))
    summary = ops.run_ops(only=names, quick=True, run_tests_first=False)
    assert {timing["case"] for timing in summary["timings"]} == set(names)
    assert set(Path(results.RESULTS).rglob("*.json")) == before
    assert "speedup" in capsys.readouterr().out


def test_every_small_call_runs():
    """They are what a GPU's memory checker is given."""
    for rows in small_calls.LENGTHS:
        for name, call in small_calls.small_calls("cpu", rows).items():
            assert call() is not None, name
