"""`zs-fast bench compare`: catches what became slower or larger, is silent within the spread, refuses unlike files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import compare, results
from zs_fast.cli import run
from zs_fast.errors import ConfigError, PreflightError

CPU_FOLDER = Path(results.__file__).with_name("results")
MIB = 2**20


def variant(name: str, *, cpu_ms: float, spread: float = 0.03, peak_bytes: int | None = 400 * MIB) -> dict[str, Any]:
    return {
        "case": "loss",
        "shape": "8x8",
        "variant": name,
        "wall_ms": 2 * cpu_ms,
        "cpu_ms": cpu_ms,
        "spread": spread,
        "peak_bytes": peak_bytes,
        "launches": 10,
    }


@pytest.fixture
def baseline() -> dict[str, Any]:
    environment = {
        "gpu": None,
        "cpu": "Some CPU",
        "machine": "x86_64",
        "usable_cpu_count": 2,
        "torch_threads": 1,
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "transformers": "5.19.0"},
    }
    timings = [variant("ours", cpu_ms=100.0), variant("torch", cpu_ms=300.0, spread=0.4)]
    return {"subject": "ops", "time": "2026-11-01", "environment": environment, "peers": {}, "timings": timings}


def held_against(baseline: dict[str, Any], folder: Path, *words: str, **changes: Any) -> tuple[int, dict[str, Any]]:
    """The exit code, and the JSON that compare prints, for the baseline with `changes` in its first variant."""
    new = copy.deepcopy(baseline)
    new["timings"][0] |= changes
    return compared(new, baseline, folder, *words)


def compared(new: dict[str, Any], baseline: dict[str, Any], folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    paths = [folder / "new.json", folder / "baseline.json"]
    for path, content in zip(paths, (new, baseline), strict=True):
        path.write_text(json.dumps(content))
    summary = compare.main([*map(str, paths), *words])
    return run(["bench", "compare", *map(str, paths), *words]), summary


def verdicts(summary: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(line["variant"], line["metric"]): str(line["verdict"]) for line in summary["lines"]}


def test_a_slowdown_of_a_fifth_is_a_regression(baseline, tmp_path, capsys):
    code, summary = held_against(baseline, tmp_path, cpu_ms=120.0)
    assert code == 1 and summary["regressions"] == 1
    assert verdicts(summary)["ours", "cpu_ms"] == "REGRESSION"
    shown = capsys.readouterr().out
    assert "REGRESSION" in shown and "1.200" in shown and "verdict: 1 regression\n" in shown
    assert "torch" not in shown, "what stayed the same is counted, not listed"


def test_a_fifth_more_memory_is_a_regression(baseline, tmp_path):
    code, summary = held_against(baseline, tmp_path, peak_bytes=480 * MIB)
    assert code == 1
    assert [key for key, found in verdicts(summary).items() if found != "same"] == [("ours", "peak_bytes")]


@pytest.mark.parametrize("kind", ["speed", "memory", "count"])
def test_tolerances_are_the_users_to_set(baseline, tmp_path, kind):
    changes = {"speed": {"cpu_ms": 110.0}, "memory": {"peak_bytes": 410 * MIB}, "count": {"launches": 12}}[kind]
    strict, lax = (
        held_against(baseline, tmp_path, f"--{kind}=0.02", **changes),
        held_against(baseline, tmp_path, f"--{kind}=0.25", **changes),
    )
    assert (strict[0], lax[0]) == (1, 0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"cpu_ms": 114.0}, {"cpu_ms": 88.0}, {"peak_bytes": 404 * MIB}],
    ids=["equal", "+14%", "-12%", "+1%"],
)
def test_silent_within_the_spread(baseline, tmp_path, capsys, changes):
    code, summary = held_against(baseline, tmp_path, **changes)
    assert code == 0 and set(verdicts(summary).values()) == {"same"}
    assert "6 of 6 figures are the same" in capsys.readouterr().out


def test_samples_too_far_apart_to_tell_are_no_regression_and_are_named(baseline, tmp_path, capsys):
    new = copy.deepcopy(baseline)
    new["timings"][1]["cpu_ms"] = 360.0
    code, summary = compared(new, baseline, tmp_path)
    assert code == 0 and verdicts(summary)["torch", "cpu_ms"] == "within the spread"
    assert "1 may be one" in capsys.readouterr().out
    new["timings"][1]["cpu_ms"] = 600.0
    assert compared(new, baseline, tmp_path)[0] == 1, "twice the time is more than this spread"


def test_a_small_rise_of_resident_memory_is_none(baseline, tmp_path):
    baseline["timings"][0]["peak_bytes"] = 2 * MIB
    assert held_against(baseline, tmp_path, peak_bytes=3 * MIB)[0] == 0
    assert held_against(baseline, tmp_path, peak_bytes=5 * MIB)[0] == 1


def test_on_a_gpu_the_devices_time_counts(baseline, tmp_path):
    baseline["environment"] |= {"gpu": "NVIDIA H100"}
    code, summary = held_against(baseline, tmp_path, cpu_ms=1e9, wall_ms=240.0)
    assert code == 1 and verdicts(summary)["ours", "wall_ms"] == "REGRESSION"
    assert summary["tolerances"]["memory"] == 0.01


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (("environment", "cpu", "Other CPU"), "device: other_cpu_2_cores, baseline some_cpu_2_cores"),
        (("environment", "torch_threads", 2), "torch_threads: 2, baseline 1"),
        (("environment", "packages", {"torch": "2.14.0", "transformers": "5.19.0"}), "torch: 2.14.0, baseline 2.13.0"),
        (("timings", 0, variant("ours", cpu_ms=1.0) | {"shape": "9x9"}), "loss / ours / cpu_ms: 9x9, baseline 8x8"),
    ],
    ids=["device", "threads", "version", "shape"],
)
def test_unlike_files_are_refused_with_what_differs(baseline, tmp_path, place, said):
    new = copy.deepcopy(baseline)
    new[place[0]][place[1]] = place[2]
    with pytest.raises(ConfigError, match="can't be compared") as refused:
        compared(new, baseline, tmp_path)
    assert said in str(refused.value)


def test_versions_may_be_crossed_on_request(baseline, tmp_path):
    new = copy.deepcopy(baseline)
    new["environment"]["packages"]["torch"] = "2.14.0"
    assert compared(new, baseline, tmp_path, "--any-version")[0] == 0


def test_what_was_not_measured_again_is_named(baseline, tmp_path, capsys):
    new = copy.deepcopy(baseline)
    del new["timings"][1]
    assert compared(new, baseline, tmp_path)[1]["not_measured"] == [["loss", "torch"]]
    assert "not measured: loss / torch" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(CPU_FOLDER.glob("*/[oprt]*.json")), ids=lambda path: path.name)
def test_every_committed_file_equals_itself(path):
    summary = compare.main([str(path), str(path)])
    assert summary["regressions"] == 0 and {str(line["verdict"]) for line in summary["lines"]} == {"same"}


def test_the_newest_committed_file_of_the_same_machine_is_the_baseline(tmp_path, capsys):
    committed = sorted(CPU_FOLDER.glob("*/train_step_*.json"))[-1]
    new = json.loads(committed.read_text())
    for one in new["timings"]:
        one["cpu_ms"] *= 1.2
    (tmp_path / "new.json").write_text(json.dumps(new))
    assert run(["bench", "compare", str(tmp_path / "new.json")]) == 1
    assert committed.name in capsys.readouterr().out


def test_without_a_baseline_the_error_says_how_to_name_one(baseline, tmp_path):
    (tmp_path / "new.json").write_text(json.dumps(baseline))
    with pytest.raises(PreflightError, match=r"No committed file in .*some_cpu_2_cores.*BASELINE\.json"):
        compare.main([str(tmp_path / "new.json")])


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is no result file"), ('{"subject": "ops"}', "is no result file"), (None, "can't read")],
)
def test_other_files_are_refused(tmp_path, text, said):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        compare.main([str(path), str(path)])


def test_results_of_other_kinds_and_parts_are_refused(baseline, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(baseline | {"subject": "algorithms"}))
    with pytest.raises(ConfigError, match="compare knows those of ops"):
        compare.main([str(path), str(path)])
    del baseline["timings"][0]["spread"]
    path.write_text(json.dumps(baseline))
    with pytest.raises(ConfigError, match="lacks a part"):
        compare.main([str(path), str(path)])
    with pytest.raises(ConfigError, match="usage: zs-fast bench compare"):
        compare.main([])
