"""The whole-step benchmark: all ways take the same step, the others with their extra work. Not how fast."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench import compare, end_to_end, peers, step_trace, trl_peer, whole_step
from bench.turns import REFERENCE_CALLS, TurnGame
from zs_fast.config import GameConfig, SamplingConfig
from zs_fast.errors import ConfigError, PreflightError
from zs_fast.recipe_files import load_recipe
from zs_fast.search.codec import Codec
from zs_fast.system.hardware import Hardware
from zs_fast.system.plan import PlanPhase
from zs_fast.system.plan_times import Workload, phase_floors
from zs_fast.system.shapes import shape_of
from zs_fast.testing import ScriptedEngine, ScriptedSearch, byte_tokenizer
from zs_fast.types import Question, Role, SearchRequest

has_trl = pytest.mark.skipif(peers.find("trl", "GRPOTrainer") is None, reason=f"TRL is absent: {peers.INSTALL}")


@pytest.fixture(scope="module")
def summary() -> dict:
    return end_to_end.run(quick=True)


def test_all_ways_play_the_same_trajectories(summary):
    assert summary["same_trajectories"] and summary["rounds"] == 1
    ours = summary["grad_norms"][whole_step.OURS]
    assert ours > 0 and all(norm == pytest.approx(ours, rel=0.01) for norm in summary["grad_norms"].values())
    assert summary["workload"]["trajectories"] == 4 and summary["workload"]["searches"] > 0
    counts = {way: one["counts"] for way, one in summary["ways"].items()}
    for role in ("policy", "simulator"):
        written = {one[f"{role}/decode_tokens"] for one in counts.values()}
        assert len(written) == 1, f"the {role} wrote {written} tokens"


def test_the_reference_computes_contexts_again_and_scores_more_often(summary):
    ours, reference = (summary["ways"][way] for way in (end_to_end.OURS, end_to_end.REFERENCE))
    assert reference["counts"]["policy/reused_tokens"] == 0 < ours["counts"]["policy/reused_tokens"]
    assert reference["counts"]["policy/prefill_tokens"] > 1.5 * ours["counts"]["policy/prefill_tokens"]
    assert reference["counts"]["score/tokens"] > 2.5 * ours["counts"]["score/tokens"], (
        "by turn, and once more at the end"
    )


def test_all_ways_take_the_same_step_of_an_adapter():
    found = end_to_end.run(quick=True, lora_rank=2)
    ours = found["grad_norms"][whole_step.OURS]
    assert found["same_trajectories"] and ours > 0 and found["overrides"]["model.lora_rank"] == ["2"]
    assert set(found["absent"]) == ({"trl", "trl_generate"} if peers.find("trl", "GRPOTrainer") is None else set())


CODEC = Codec(byte_tokenizer(), chat_template=True)


class Searches(ScriptedSearch):
    """Notes how many searches were under way at once, and how many policy requests then."""

    engine: ScriptedEngine
    most = 0

    def submit(self, request: SearchRequest) -> None:
        super().submit(request)
        self.most = max(self.most, len(self._waiting))
        assert self.engine.num_unfinished == 0, "a barrier: nobody writes while searches are answered"


def searches_then_answers(ids: list[int]) -> str:
    has_documents = "<information>Doc 1" in CODEC.decode(ids)
    return "<answer>x</answer>" if has_documents else "<search>q</search>"


def test_a_game_in_turns_has_a_barrier_ten_calls_and_no_prefix():
    engine = ScriptedEngine({Role.POLICY: searches_then_answers}, CODEC, steps_needed=lambda number: number + 1)
    search = Searches(lambda request: [f"about {request.question.id}"], polls_needed=lambda number: number % 5 + 1)
    search.engine = engine
    asked = [Question(id=f"q{number}", text=f"what is {number}?", answers=("x",), source="s") for number in range(7)]
    game = TurnGame(
        engine, search, CODEC, asked, game=GameConfig(), sampling=SamplingConfig(), group_size=2, run_seed=0, step=1
    )
    rounds = 0
    while game.live:
        game.act()
        assert [len(group.trajectories) for group in game.so_far()] == [2] * 7
        game.search()
        rounds += 1
    assert rounds == 2 and search.most == REFERENCE_CALLS == 10
    assert {salt for *_, salt in engine.requests} == {None}, "a context under no name is computed again"
    for group, question in zip(game.groups(), asked, strict=True):
        assert group.question == question and [one.sample for one in group.trajectories] == [0, 1]
        assert all(one.turns[0].search.documents == (f"about {question.id}",) for one in group.trajectories)
        assert all(one.reward == 1.0 for one in group.trajectories)


def test_phases_make_up_the_step(summary):
    for way in summary["ways"].values():
        phases = [way[name] for name in ("rollout", "score", "update")]
        assert way["step"]["seconds"] == pytest.approx(sum(one["seconds"] for one in phases), rel=0.05)
        assert all(0.0 < one["model_flop_utilisation"] < one["of_floor"] * 1.001 < 1.0 for one in phases)
        assert all(one["tokens_per_second"] > 0 and one["peak_rss_bytes"] > 0 for one in phases)
    for target, over in zip(summary["targets"], (end_to_end.REFERENCE, end_to_end.TRL), strict=True):
        if over in summary["ways"]:
            seconds = [summary["ways"][way]["step"]["seconds"] for way in (over, end_to_end.OURS)]
            assert target["measured"] == pytest.approx(seconds[0] / seconds[1])
        else:
            assert target["measured"] is None and "not installed" in summary["absent"][over]


@has_trl
def test_trl_computes_contexts_again_and_pads(summary):
    ours, trl = (summary["ways"][way]["counts"] for way in (whole_step.OURS, whole_step.TRL))
    assert trl["policy/decode_tokens"] == ours["policy/decode_tokens"]
    assert trl["policy/prefill_tokens"] > ours["policy/prefill_tokens"]
    assert trl["score/tokens"] > ours["score/tokens"]
    generated = summary["ways"][whole_step.TRL_GENERATE]["counts"]
    assert generated["simulator/decode_tokens"] == ours["simulator/decode_tokens"]


@has_trl
@pytest.mark.full
@pytest.mark.parametrize("name", ["whole_step_16", "heavy_tailed_64"])
def test_a_step_at_forced_lengths(name):
    assert step_trace.read() == step_trace.make(), "python -m bench.step_trace writes it"
    trace = step_trace.read(name, questions=1)
    found = end_to_end.run(quick=True, trace=trace, cold=True)
    assert found["same_trajectories"] and set(found["ways"]) == {"ours", "reference_pattern", "trl", "trl_generate"}
    played = trace.trajectories
    for way in found["ways"].values():
        assert way["counts"]["policy/decode_tokens"] == sum(sum(lengths[::2]) for lengths in played)
        assert way["counts"]["simulator/decode_tokens"] == sum(sum(lengths[1::2]) for lengths in played)
    assert found["workload"]["documents"] == sum(sum(lengths[1::2]) for lengths in played) / len(played)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--trace", "whole"], r"no trace 'whole' in .*; there are heavy_tailed_64, whole_step_16"),
        (["--trace", "whole_step_16", "--questions", "5"], "--questions 5: trace whole_step_16 has 4"),
        (["--questions", "1"], "give --trace with it"),
    ],
)
def test_a_trace_that_is_not_there(words, says):
    with pytest.raises(ConfigError, match=says):
        end_to_end.main(words)


def test_another_gradient_is_not_timed():
    stage = whole_step.build(load_recipe(["quickstart"], {**end_to_end.PLAIN, **end_to_end.QUICK}))

    def other(*given):
        played = whole_step.our_step(*given)
        return replace(played, grad_norm=played.grad_norm * 1.02)

    try:
        with pytest.raises(PreflightError, match="norms of the gradients differ"):
            whole_step.take_steps(stage, {whole_step.OURS: whole_step.our_step, "other": other}, rounds=1)
    finally:
        stage.arena.close()


def test_what_trl_cannot_take_is_said(monkeypatch):
    config = load_recipe(["quickstart"], {**end_to_end.PLAIN, **end_to_end.QUICK, "algorithm.name": ["rloo"]})
    monkeypatch.setattr(peers, "find", lambda module, name: object())
    assert "GRPO" in trl_peer.why_not(SimpleNamespace(config=config))
    monkeypatch.setattr(peers, "find", lambda module, name: None)
    assert peers.INSTALL in trl_peer.why_not(SimpleNamespace(config=config))


def test_compare_reads_it(summary, tmp_path):
    slower = json.loads(json.dumps(summary))
    slower["ways"]["ours"]["step"]["seconds"] *= 1.2
    for name, content in (("base", summary), ("new", slower)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert compare.main([str(tmp_path / "base.json")] * 2)["regressions"] == 0
    found = compare.main([str(tmp_path / "new.json"), str(tmp_path / "base.json")])
    worse = [(line["variant"], line["metric"]) for line in found["lines"] if line["verdict"] == "REGRESSION"]
    assert worse == [("ours step", "cpu_seconds")]


def test_floors_are_those_of_the_work():
    config = load_recipe(["quickstart"], {})
    work = Workload(
        trajectories=8,
        searches=1.0,
        prompt=100,
        written=50,
        documents=100,
        context=250,
        computed=200,
        asked=80,
        answered=90,
    )
    here = Hardware("measured", 0, 1e10, 1e11, is_cuda=False)
    floors = phase_floors(config, here, work)
    assert floors[PlanPhase.UPDATE] == pytest.approx(3 * floors[PlanPhase.SCORE]), "backward is two more forwards"
    # Two roles on one base: its weights are read for the steps of the longer one alone.
    on_one_base = load_recipe(["quickstart"], {"simulator.kind": ["policy"], "model.lora_rank": ["4"]})
    apart = load_recipe(["quickstart"], {"simulator.kind": ["policy"]})
    slow = Hardware("measured", 0, 1e6, 1e11, is_cuda=False)
    shared, own = (phase_floors(one, slow, work)[PlanPhase.ROLLOUT] for one in (on_one_base, apart))
    shape = shape_of(config.model.path)
    of_a_step = 4 * (shape.linear_parameters + shape.head_parameters) / 1e6
    assert own - shared == pytest.approx(50 * of_a_step), "the policy writes 50 tokens of each, the simulator 90"
    lora = {"simulator.kind": ["policy"], "model.lora_rank": ["4"]}
    for change in ({"engine.batch_invariant": ["false"]}, {"model.quantization": ["nf4"]}):
        assert phase_floors(load_recipe(["quickstart"], lora | change), slow, work)[PlanPhase.ROLLOUT] >= own
    on_gpu = replace(slow, is_cuda=True)
    rollouts = [phase_floors(one, on_gpu, work)[PlanPhase.ROLLOUT] for one in (on_one_base, apart)]
    assert rollouts[0] == rollouts[1], "the embedded engine on a GPU has a forward for each role"
    twice = phase_floors(config, Hardware("measured", 0, 2e10, 2e11, is_cuda=False), work)
    for phase, seconds in floors.items():
        assert twice[phase] == pytest.approx(seconds / 2)


def test_recipes_that_one_process_cannot_play_are_refused():
    with pytest.raises(ConfigError, match=r"simulator\.kind = 'openai'"):
        whole_step.build(load_recipe(["quickstart"], {"simulator.kind": ["openai"], "simulator.url": ["http://x/v1"]}))
    with pytest.raises(ConfigError, match="bench end_to_end"):
        end_to_end.main(["--fast"])
    with pytest.raises(ConfigError, match="at least 1"):
        end_to_end.main(["--rounds", "0"])
