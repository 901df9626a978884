"""A profiled step: the trace holds what happened, idle time adds up and has its cause, no bit of the run changes."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from zs_fast.errors import ConfigError
from zs_fast.recipe_files import load_recipe
from zs_fast.rollout.watch import Row, TrajectoryName, Wait
from zs_fast.step_profile import Forward, Request, StepProfile, Waiting, render
from zs_fast.system.memory import Phase
from zs_fast.system.trace_events import TraceEvents, common, merged, seconds, without
from zs_fast.train import train
from zs_fast.types import Role

pytestmark = pytest.mark.usefixtures("no_pictures")


def run_with(output: Path, profile_step: int) -> Path:
    """Two steps with two models in one engine, fewer slots than trajectories, and a reference that scores."""
    small = {
        "output": output,
        "train.steps": 2,
        "train.questions_per_step": 2,
        "train.group_size": 2,
        "train.mini_batches": 2,
        "game.max_turns": 3,
        "simulator.max_new_tokens": 80,
        "engine.slots": 3,
        "eval.data": "",
        "log.profile_step": profile_step,
    }
    train(load_recipe(["quickstart"], {key: [str(value)] for key, value in small.items()}))
    return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return run_with(folder / "plain", 0), run_with(folder / "profiled", 2)


@pytest.fixture(scope="module")
def trace(runs) -> dict:
    return json.loads((runs[1] / "profile_step_2.json").read_text())


def test_a_profile_changes_no_bit_of_the_run(runs):
    plain, profiled = runs
    for name in ("metrics.jsonl", "rollouts.jsonl", "checkpoints/step_2/model/model.safetensors"):
        assert (plain / name).read_bytes() == (profiled / name).read_bytes(), name
    assert not list(plain.glob("profile*")) and len(list(profiled.glob("profile*"))) == 1


def tracks(trace: dict) -> dict[tuple[str, str], list[dict]]:
    processes = {one["pid"]: one["args"]["name"] for one in trace["traceEvents"] if one["name"] == "process_name"}
    names = {
        (one["pid"], one["tid"]): one["args"]["name"] for one in trace["traceEvents"] if one["name"] == "thread_name"
    }
    found = defaultdict(list)
    for one in trace["traceEvents"]:
        if one["ph"] == "X":
            found[processes[one["pid"]], names[one["pid"], one["tid"]]].append(one)
    return dict(found)


def test_phases_roles_and_requests_are_tracks(trace, runs):
    found = tracks(trace)
    assert [one["name"] for one in found["step", "phases"]] == ["step 2", "rollout", "score", "update", "sync"]
    assert {one["name"] for one in found["policy", "micro batches"]} >= {"update"}
    assert {one["name"] for one in found["reference", "micro batches"]} == {"score"}
    assert found["policy", "forwards"] and found["simulator", "forwards"]
    trajectories = {track: spans for (process, track), spans in found.items() if process == "trajectories"}
    assert len(trajectories) == 4
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    names = [one["name"] for spans in trajectories.values() for one in spans]
    searches = sum(name.startswith("search") for name in names)
    assert searches == pytest.approx(4 * rows[-1]["trajectory/searches"])
    calls = [one for (process, _), spans in found.items() if process == "simulator" for one in spans]
    assert sum(one["name"].startswith("call") for one in calls) == searches
    assert all(one["name"] == "turn 1" for one in (spans[0] for spans in trajectories.values()))
    assert {"prefill", "decode", "queued"} <= set(names)


def test_spans_of_a_track_nest(trace):
    """Viewers drop or misplace those that overlap."""
    for track, spans in tracks(trace).items():
        open_until: list[float] = []
        for one in spans:
            start, end = one["ts"], one["ts"] + one["dur"]
            while open_until and open_until[-1] <= start + 1e-3:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-3, (track, one)
            open_until.append(end)


def test_each_request_goes_through_its_parts(trace):
    for (process, track), spans in tracks(trace).items():
        whole = [one for one in spans if one["name"].startswith(("turn", "call"))]
        parts = [one for one in spans if one["name"] in ("queued", "prefill", "decode")]
        if process in ("trajectories", "simulator") and track != "forwards":
            assert sum(one["dur"] for one in parts) == pytest.approx(sum(one["dur"] for one in whole), abs=1.0)
            assert all(one["args"]["tokens"] > 0 for one in whole)


def test_idle_time_adds_up(trace):
    rollout = trace["otherData"]["rollout"]
    length = trace["otherData"]["phase_seconds"]["rollout"]
    for one in rollout["roles"].values():
        assert one["seconds"] + sum(one["idle_seconds"].values()) == pytest.approx(length)
        assert one["decode_tokens"] > 0 and one["prefill_tokens"] > 0
    assert sum(rollout["trajectory_shares"].values()) == pytest.approx(1.0, abs=1e-3)
    assert 0.0 <= rollout["tail_seconds"] < length
    forwards = sum(one["seconds"] for one in rollout["roles"].values())
    assert forwards + rollout["outside_forwards_seconds"] == pytest.approx(length)


def invented() -> StepProfile:
    """A rollout of 10 s: the policy works 0..2 and 5..6, the simulator 2..5; one trajectory is over after 2 s."""
    quiet = SimpleNamespace(scoring_passes=dict, micro_steps=SimpleNamespace(watch=None), critic=None)
    profile = StepProfile(
        step=3,
        player=SimpleNamespace(watcher=None),
        engine=None,
        memory=SimpleNamespace(watch=None),
        roles=quiet,
        updater=quiet,
    )
    profile.phases = {Phase.ROLLOUT: (0.0, 10.0)}
    first = Request(Role.POLICY, 0, 5, 0.0, begun=0.0, prefilled=1.0, computed_s=2.0, finished=2.0, num_tokens=2)
    other = Request(Role.POLICY, 1, 5, 0.0, begun=0.5, prefilled=1.0, computed_s=1.5, finished=2.0, num_tokens=2)
    last = Request(Role.POLICY, 2, 9, 5.0, begun=5.0, prefilled=5.5, computed_s=1.0, finished=8.0, num_tokens=2)
    call = Request(Role.SIMULATOR, 0, 7, 2.0, begun=2.0, prefilled=3.0, computed_s=3.0, finished=5.0, num_tokens=3)
    profile.requests = [first, other, last, call]
    profile.forwards[Role.POLICY] = [
        Forward((0.0, 2.0), [Row(0, 5, False), Row(1, 5, False)]),
        Forward((5.0, 6.0), [Row(2, 4, False)]),
    ]
    profile.forwards[Role.SIMULATOR] = [Forward((2.0, 5.0), [Row(0, 7, False)])]
    profile.trajectories = {
        TrajectoryName(3, "a", 0): [
            Waiting(Wait.POLICY, 0, 0.0, first, 2.0),
            Waiting(Wait.SEARCH, 1, 2.0, None, 5.0),
            Waiting(Wait.POLICY, 1, 5.0, last, 8.0),
            Waiting(Wait.OTHERS, 2, 8.0),
        ],
        TrajectoryName(3, "a", 1): [Waiting(Wait.POLICY, 0, 0.0, other, 2.0), Waiting(Wait.OTHERS, 1, 2.0)],
    }
    return profile


def test_idle_time_has_its_cause():
    rollout = invented().summary()["rollout"]
    assert rollout["roles"]["policy"]["idle_seconds"] == {
        "the simulator computes": 0.0,
        "between forwards": 2.0,
        "no request: waits for the simulator": 3.0,
        "no request: nothing left to do": 2.0,
    }
    assert rollout["roles"]["simulator"]["idle_seconds"] == {
        "the policy computes": 0.0,
        "between forwards": 0.0,
        "no request: waits for the policy": 5.0,
        "no request: nothing left to do": 2.0,
    }
    assert rollout["outside_forwards_seconds"] == 4.0
    assert rollout["tail_seconds"] == 8.0, "one of two was over after 2 s"
    assert rollout["trajectory_shares"] == pytest.approx(
        {
            "over, waits for others": 10 / 20,
            "policy: in a forward": 4.5 / 20,
            "waits for documents": 3 / 20,
            "policy: between forwards": 2 / 20,
            "policy: queued for a slot": 0.5 / 20,
            "not begun": 0.0,
        }
    )
    text = render(invented().summary(), Path("p.json"))
    assert "waits for the simulator 3.00 s" in text and "over, waits for others 50%" in text


def test_moments():
    assert merged([(3, 4), (0, 1), (1, 2), (5, 5), (3.5, 6)]) == [(0, 2), (3, 6)]
    assert common([(0, 4), (6, 9)], [(3, 7)]) == [(3, 4), (6, 7)]
    assert without([(0, 10)], [(-1, 1), (4, 5), (9, 12)]) == [(1, 4), (5, 9)]
    assert without([], [(0, 1)]) == [] and without([(0, 2)], []) == [(0, 2)]
    assert seconds([(0, 2), (1, 3)]) == 3


def test_a_trace_names_its_tracks_and_keeps_their_order(tmp_path):
    events = TraceEvents(zero=10.0)
    events.span("b", "inner", "second", (12.0, 12.5), tokens=3)
    events.span("a", "outer", "first", (10.0, 13.0))
    events.counter("a", "waiting", 11.0, {"x": 2})
    events.write(tmp_path / "t.json", {"step": 1})
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["otherData"] == {"step": 1}
    assert [(one["name"], one["ts"]) for one in content["traceEvents"] if "ts" in one] == [
        ("first", 0.0),
        ("waiting", 1e6),
        ("second", 2e6),
    ]
    assert list(tracks(content)) == [("a", "outer"), ("b", "inner")]


def test_a_step_that_never_comes_is_a_config_error():
    with pytest.raises(ConfigError, match=r"log\.profile_step is 30, but the run has train\.steps = 20"):
        load_recipe(["quickstart"], {"log.profile_step": ["30"]})
