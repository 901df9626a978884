"""The packed update's benchmark: its trace, that all ways compute one gradient, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import ragged, results, train_step
from zs_fast.errors import ConfigError, PreflightError


@pytest.fixture(scope="module")
def workload():
    return train_step.make_workload("cpu", quick=True)


def test_the_committed_trace_is_what_its_script_draws():
    assert json.loads(ragged.PATH.read_text()) == ragged.as_json(ragged.draw())


def test_the_trace_is_as_ragged_as_it_says():
    flat = [one for group in ragged.read() for one in group]
    tokens = sum(one.prompt + one.completion for one in flat)
    assert len(flat) == 32 and max(max(turn) for one in flat for turn in one.turns) <= ragged.CAP
    assert 1.55 < ragged.padded_tokens(flat, 8) / tokens < 1.7
    assert {len(one.turns) - 1 for one in flat} <= set(range(ragged.MOST_SEARCHES + 1))
    assert 0.35 < sum(one.written for one in flat) / tokens < 0.45
    for seed in range(ragged.SEED):
        other = [one for group in ragged.draw(seed) for one in group]
        assert not 1.55 < ragged.padded_tokens(other, 8) / sum(one.prompt + one.completion for one in other) < 1.7


def test_dividing_lengths_keeps_the_spread():
    flat = [one.scaled(train_step.DIVISOR["cpu"]) for group in ragged.read() for one in group]
    tokens = sum(one.prompt + one.completion for one in flat)
    assert 1.55 < ragged.padded_tokens(flat, 8) / tokens < 1.7


def test_padded_rows_hold_the_trajectories(workload):
    """Each row, without its padding, is the trajectory, and its flags are the loss tokens."""
    packed = workload.batch.scored.packed
    rows, flags = [], []
    for micro in workload.padded:
        assert micro.ids.shape[0] == 8
        mask = micro.attention_mask.bool()
        written = torch.cat([torch.zeros_like(micro.inputs["prompt_ids"]), micro.inputs["tool_mask"]], 1)
        rows += [ids[seen] for ids, seen in zip(micro.ids, mask, strict=True)]
        flags += [one[seen] for one, seen in zip(written, mask, strict=True)]
    for number, (ids, flag) in enumerate(zip(rows, flags, strict=True)):
        start, stop = packed.cu_seqlens[number : number + 2]
        assert ids[:-1].tolist() == packed.inputs[start:stop].tolist()
        assert ids[1:].tolist() == packed.targets[start:stop].tolist()
        assert flag[1:].bool().tolist() == packed.loss_mask[start:stop].tolist()


def test_all_ways_compute_one_loss_and_one_gradient(workload):
    case = train_step.make_case(workload, "cpu")
    losses, distances = train_step.check_gradients(workload, case)
    assert max(distances.values()) < 1e-5 and len(set(losses)) >= 2
    assert all(loss == pytest.approx(losses[train_step.PADDED], rel=1e-4, abs=1e-6) for loss in losses.values())


def test_another_gradient_is_not_timed(workload):
    case = train_step.make_case(workload, "cpu")

    def wrong():
        loss = train_step.packed_step(workload)
        next(iter(workload.ours.parameters())).grad.mul_(1.001)
        return loss

    case.variants[train_step.PACKED] = wrong
    with pytest.raises(PreflightError, match=r"gradients of HF padded.* differ from those of zs_fast packed"):
        train_step.check_gradients(workload, case)


def test_quick_runs_and_writes_no_file(capsys):
    before = set(Path(results.RESULTS).rglob("*.json"))
    summary = train_step.main(["--quick", "--untested"])
    assert set(Path(results.RESULTS).rglob("*.json")) == before
    assert {timing["variant"] for timing in summary["timings"]} >= {train_step.PADDED, train_step.PACKED}
    assert "tokens per CPU second" in capsys.readouterr().out


def test_an_unknown_word_is_one_error():
    with pytest.raises(ConfigError, match="--bogus"):
        train_step.main(["--bogus"])
