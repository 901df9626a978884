"""docs/bench.png is drawn from result files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import plots
from zs_fast.errors import ConfigError

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def step(time: str, *, trace: str | None) -> dict:
    phases = {name: {"seconds": 1.0} for name in ("rollout", "score", "update", "step")}
    return {
        "subject": "end_to_end",
        "time": time,
        "clock": "cpu_seconds",
        "models": {"policy": "quickstart:policy"},
        "workload": {"trajectories": 4},
        "ways": {"ours": phases, "trl": {name: {"seconds": 2.0} for name in phases}},
        "trace": trace,
    }


def test_committed_results_can_be_drawn():
    found = plots.read([path for path in RESULTS.iterdir() if path.is_dir()])
    png = plots.picture(found)
    assert png.startswith(b"\x89PNG") and png == plots.picture(found), "the same numbers, the same bytes"
    rows = plots.timings(found["ops"])
    for case, (ours, others) in plots.OPERATIONS.items():
        assert (case, ours) in rows and any((case, other) in rows for other in others), f"no row of {case} is drawn"


def test_the_newest_of_each_kind_is_taken(tmp_path):
    for number, (time, trace) in enumerate([("2026-02", None), ("2026-03", "t.json"), ("2026-01", None)]):
        (tmp_path / f"{number}.json").write_text(json.dumps(step(time, trace=trace)))
    found = plots.read([tmp_path])["end_to_end"]
    assert plots.newest(found, trace=False)["time"] == "2026-02"
    assert plots.newest(found, trace=True)["time"] == "2026-03"
    fewer = step("2026-04", trace="t.json")
    del fewer["ways"]["trl"]
    assert plots.newest([*found, fewer], trace=True)["time"] == "2026-03", "a run in more ways says more"
    assert plots.picture({"end_to_end": found, "ops": [], "scaling": []}).startswith(b"\x89PNG")


def test_other_numbers_give_another_picture():
    first = {"end_to_end": [step("1", trace=None)], "ops": [], "scaling": []}
    second = json.loads(json.dumps(first))
    second["end_to_end"][0]["ways"]["trl"]["update"]["seconds"] = 9.0
    assert plots.picture(first) != plots.picture(second)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no results in"):
        plots.main([str(tmp_path)])
