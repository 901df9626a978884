"""The scaling benchmark: what it plays has the sizes it says, and its fits are right. Not how fast."""

from __future__ import annotations

import json

import pytest

from bench import compare, scaling
from zs_fast.errors import ConfigError
from zs_fast.system.plan import plan_memory


def point(trajectories: int, length: int, seconds: float, *, planned: int = 100, work: float = 1.0) -> scaling.Point:
    phases = {phase: seconds for phase in ("rollout", "score", "update", "step")}
    return scaling.Point(
        trajectories=trajectories,
        length=length,
        cpu_seconds=phases,
        measured_bytes=100,
        planned_bytes=planned,
        needed_flop=float(trajectories * length) ** work,
    )


def test_a_point_runs_and_has_the_work_it_says():
    found = scaling.measured(1, 1, rounds=1)
    assert (found.trajectories, found.length) == (scaling.TRAJECTORIES, 184)
    assert found.cpu_seconds["step"] == pytest.approx(sum(found.cpu_seconds.values()) / 2, rel=0.1)
    assert min(found.cpu_seconds.values()) > 0 and found.measured_bytes > 2**20 and found.planned_bytes > 2**20


@pytest.mark.parametrize("times, longer", scaling.POINTS)
def test_lengths_grow_together(times, longer):
    lengths, trace, config = (
        scaling.lengths_of(longer),
        scaling.trace_of(times, longer),
        scaling.config_of(times, longer),
    )
    assert trace.prompt_tokens + sum(trace.trajectories[0]) == lengths.trajectory <= config.game.max_context_tokens
    assert len(trace.trajectories) == config.train.questions_per_step * config.train.group_size == 16 * times
    assert plan_memory(config, lengths=lengths).peak_bytes > 0


def test_fits_and_verdicts():
    points = [point(n, 100, 1.0 + 2.0 * n) for n in (1, 2, 4, 8)] + [point(1, 400, 3.0 * 4**1.5, planned=130)]
    summary = scaling.summarise(points)
    line = summary["fits"]["trajectories, step"]
    assert line["fixed_seconds"] == pytest.approx(1.0) and line["seconds_per_token"] == pytest.approx(0.02)
    assert line["farthest"] == pytest.approx(0.0, abs=1e-9) and line["exponent"] < 1
    assert summary["fits"]["length, step"]["exponent"] == pytest.approx(1.5)
    assert summary["fits"]["length, step"]["needed_exponent"] == pytest.approx(1.0)
    met = [target["met"] for target in summary["targets"]]
    assert met == [True, False, True, True, True, True, False]


def test_time_may_grow_as_the_needed_operations_do():
    first, grown = point(1, 100, 1.0, work=1.4), point(1, 400, 4.0**1.45, work=1.4)
    (target, *_) = scaling.summarise([first, grown])["targets"]
    assert target["met"] and target["measured"] == pytest.approx(1.45)
    one, two, long = (scaling.needed_flop(*place) for place in ((1, 1), (2, 1), (1, 4)))
    assert two == pytest.approx(2 * one) and 4 * one < long < 16 * one, "attention is quadratic"


def test_compare_reads_it(tmp_path):
    points = [point(n, 100, float(n)) for n in (1, 2)]
    summary = scaling.summarise(points) | {"time": "2026-01-01T00:00:00Z"}
    slower = json.loads(json.dumps(summary))
    slower["points"][1]["cpu_seconds"]["update"] *= 1.3
    for name, content in (("base", summary), ("new", slower)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = compare.main([str(tmp_path / "new.json"), str(tmp_path / "base.json")])
    worse = [(line["variant"], line["metric"]) for line in found["lines"] if line["verdict"] == "REGRESSION"]
    assert worse == [("2 trajectories of 100 tokens", "update_cpu_seconds")]


def test_unknown_words_are_refused():
    with pytest.raises(ConfigError, match="bench scaling"):
        scaling.main(["--fast"])
