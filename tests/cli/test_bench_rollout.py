"""The rollout benchmark: its committed trace, and that what it counts is what was played. Nothing is about time."""

from __future__ import annotations

import pytest

from bench import generate, rollout
from bench.rollout_trace import load_trace, make_trace
from zs_fast.errors import ConfigError


def test_the_committed_trace_is_the_one_that_its_seed_makes():
    trace = load_trace()
    assert trace == make_trace(trace.seed)
    assert len(trace.trajectories) == 64 and trace.num_turns == trace.num_searches + 64
    assert {len(lengths) // 2 for lengths in trace.trajectories} == {1, 2, 3, 4}
    lengths = sorted(length for lengths in trace.trajectories for length in lengths)
    assert lengths[-1] > 5 * lengths[len(lengths) // 2], "the tail is heavy"


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    return {result["mode"]: result for result in rollout.run_rollout(quick=True)["results"]}


def test_every_mode_writes_every_token_and_prefills_what_it_must(results):
    trace = rollout._shortened(load_trace())
    policy, simulator = trace.least_prefill
    for mode in ("batch-synchronous", "ours"):
        assert results[mode]["decode_tokens"] == sum(map(sum, trace.trajectories))
        assert (
            results[mode]["policy_prefill_tokens"] == policy and results[mode]["simulator_prefill_tokens"] == simulator
        )
        assert results[mode]["prefilled_twice_per_turn"] == 0
    assert results["reference pattern"]["policy_prefill_tokens"] > policy
    assert results["reference pattern"]["decode_tokens"] == sum(map(sum, trace.trajectories))
    refilled = results["ours, one-step refill"]
    assert refilled["policy_prefill_tokens"] > policy, "an update makes live contexts be computed again"
    assert refilled["first_step"] == results["ours"]["engine_steps"]


def test_fewer_steps_without_barriers_and_fewer_still_with_refill(results):
    steps = [
        results[mode]["engine_steps"]
        for mode in ("ours, one-step refill", "ours", "batch-synchronous", "reference pattern")
    ]
    assert steps == sorted(steps) and len(set(steps[:3])) == 3


def test_unknown_words_are_refused():
    with pytest.raises(ConfigError, match="bench rollout"):
        rollout.main(["--fast"])
    with pytest.raises(ConfigError, match="against generate"):
        rollout.main(["--against", "generate", "--fast"])
    with pytest.raises(ConfigError, match="no such case"):
        rollout.main(["--against", "generate", "--untested", "--only", "nothing"])


def test_both_ways_write_every_token_of_every_case():
    """The ways themselves assert how many; each has a rate in the end."""
    summary = rollout.main(["--against", "generate", "--quick", "--untested", "--only", "float32 batch 8", "ragged"])
    rates = summary["workload"]["new_tokens_per_cpu_second"]
    assert set(rates) == {"float32 batch 8", "float32 ragged 32", "bfloat16 ragged 32"}
    assert all(set(of_case) == {generate.THEIRS, generate.OURS} for of_case in rates.values())


def test_ragged_rows_have_the_even_ones_mean():
    work = generate.ragged(32, "float32")
    assert 0.8 < sum(work.prompts) / (32 * 128) < 1.2 and 0.8 < work.new_tokens / (32 * 128) < 1.2
    assert max(work.new) > 1.5 * work.new_tokens / 32, "some rows wait for the longest"
