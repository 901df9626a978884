"""The timing protocol and the benchmark's refusals. No assertion is about how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import harness, ops
from zs_fast.errors import PreflightError


def test_measure_interleaves_and_reports_every_variant(monkeypatch):
    monkeypatch.setattr(harness, "WARM_UP_S", 0.0)
    monkeypatch.setattr(harness, "MIN_SAMPLE_S", 0.0)
    called = []
    case = harness.Case("c", "[1]", {"a": lambda: called.append("a"), "b": lambda: called.append("b")})
    timings = harness.measure(case, rounds=8)
    assert [timing.variant for timing in timings] == ["a", "b"]
    assert timings[0].speedup == 1.0
    rounds = called[2:]  # one warm-up call each
    assert all({rounds[i], rounds[i + 1]} == {"a", "b"} for i in range(0, 16, 2))
    assert rounds != ["a", "b"] * 8, "the order within a round is shuffled"


def test_a_result_file_says_what_it_ran_on(tmp_path):
    timing = harness.Timing("c", "[1]", "a", 1.0, 1.0, 0.1, 1.0, 1, 5)
    path = harness.write_results(harness.summarise("ops", [timing]), tmp_path)
    content = json.loads(path.read_text())
    assert content["timings"][0]["variant"] == "a" and "a" in harness.table([timing])
    assert {"git_commit", "packages", "torch_threads", "cpu"} <= set(content["environment"])
    assert path.parent.name == harness.device_slug(content["environment"])


def test_a_red_op_is_not_timed(tmp_path):
    red = tmp_path / "test_red_example.py"
    red.write_text("def test_red():\n    assert False\n")
    with pytest.raises(PreflightError, match="nothing is timed"):
        ops.refuse_red([str(red)])


def test_quick_runs_every_case(capsys):
    """Each case also checks that its variants agree before it is timed."""
    before = set(Path(harness.RESULTS).rglob("*.json"))
    summary = ops.run_ops(quick=True, run_tests_first=False)
    assert {timing["case"] for timing in summary["timings"]} == {"masked gae", "logprobs fwd", "logprobs fwd+bwd"}
    assert set(Path(harness.RESULTS).rglob("*.json")) == before
    assert "speedup" in capsys.readouterr().out
