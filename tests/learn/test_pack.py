from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zs_fast.learn.batch import PackedBatch
from zs_fast.learn.pack import TokenSequence, pack, pack_tokens
from zs_fast.types import Completion, FinishReason, Group, Question, Role, Search, StopReason, Trajectory, Turn

EXAMPLES = int(os.environ.get("ZS_HYPOTHESIS_EXAMPLES", "40"))


def test_the_documented_example(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    p, a, q, b, c = 1, 2, 3, 4, 5
    first = make_trajectory([p], [([a], [])], reward=0.5)
    second = make_trajectory([q], [([], [b]), ([c], [])], reward=1.0)
    packed = pack([make_group([first, second])], token_budget=100)
    assert packed.inputs.tolist() == [p, q, b]
    assert packed.targets.tolist() == [a, b, c]
    assert packed.positions.tolist() == [0, 0, 1]
    assert packed.sequence.tolist() == [0, 1, 1]
    assert packed.loss_mask.tolist() == [True, False, True]
    assert packed.loss_index.tolist() == [0, 2]
    assert (packed.cu_seqlens, packed.loss_offsets) == ((0, 1, 3), (0, 1, 2))
    assert packed.rewards.tolist() == [0.5, 1.0]
    assert packed.group_offsets == (0, 2) and packed.group.tolist() == [0, 0]


def test_every_sampled_token_is_trained_whatever_its_id(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    """0 stands for a padding id and 2 for an end-of-sequence id, in prompt, sampled text and documents."""
    trajectory = make_trajectory([0, 2, 7], [([2, 0, 0, 2], [0, 2]), ([0, 2], [])])
    packed = pack([make_group([trajectory])], token_budget=100)
    assert packed.targets[packed.loss_mask].tolist() == [2, 0, 0, 2, 0, 2]


def test_what_follows_the_last_sampled_token_takes_no_room(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    packed = pack([make_group([make_trajectory([1, 2], [([3], [4, 5, 6, 7])])])], token_budget=100)
    assert packed.inputs.tolist() == [1, 2] and packed.targets.tolist() == [2, 3]


def test_a_zero_length_response_has_no_tokens_but_counts(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    """Its reward stays its own: no other sequence's last token carries it."""
    silent = make_trajectory([1, 2], [([], [])], reward=9.0)
    spoken = make_trajectory([1, 2], [([3], [])], reward=1.0)
    packed = pack([make_group([silent, spoken, silent])], token_budget=100)
    assert packed.cu_seqlens == (0, 0, 2, 2) and packed.loss_offsets == (0, 0, 1, 1)
    assert packed.rewards.tolist() == [9.0, 1.0, 9.0]
    assert packed.sequence.tolist() == [1, 1]
    (micro,) = packed.micro_batches(100)
    assert micro.cu_seqlens == (0, 2)


def test_masked_trajectories_take_no_part(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    kept = make_trajectory([1], [([2], [])])
    failed = make_trajectory([1], [([3], [])], trainable=False, stop_reason=StopReason.SEARCH_FAILED)
    cut = make_trajectory([1], [([4], [])], stop_reason=StopReason.LENGTH_LIMIT)
    packed = pack([make_group([kept, failed, cut])], token_budget=9, mask=("length_limit",))
    assert packed.trainable.tolist() == [True, False, False]
    assert packed.targets.tolist() == [2]
    assert pack([make_group([kept, failed, cut])], token_budget=9).trainable.tolist() == [True, False, True]


def test_groups_are_told_apart_by_occurrence_not_by_id(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    groups = [make_group([make_trajectory([1], [([2], [])], question_id="0") for _ in range(2)]) for _ in range(3)]
    assert pack(groups, token_budget=9).group.tolist() == [0, 0, 1, 1, 2, 2]


def test_missing_sampler_logprobs_are_nan_at_loss_tokens_only(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    silent = make_trajectory([1, 2], [([3], [])], logprob=None)
    given_ = make_trajectory([1, 2], [([3], [])], logprob=-0.5)
    packed = pack([make_group([silent, given_])], token_budget=9)
    torch.testing.assert_close(packed.rollout_logprobs, torch.tensor([0.0, float("nan"), 0.0, -0.5]), equal_nan=True)


def test_empty_batches() -> None:
    packed = pack([], token_budget=9)
    assert (packed.num_tokens, packed.num_loss_tokens, packed.num_groups) == (0, 0, 0)
    assert list(packed.micro_batches(9)) == []


def test_wrong_sequences_are_named() -> None:
    with pytest.raises(ValueError, match="sequence 1 starts with a loss token"):
        pack_tokens([TokenSequence(ids=[1], is_loss=[False]), TokenSequence(ids=[1], is_loss=[True])])
    with pytest.raises(ValueError, match="sequence 0 has 2 token ids but 1 loss flags"):
        pack_tokens([TokenSequence(ids=[1, 2], is_loss=[False])])


ids = st.lists(st.integers(0, 5), max_size=6)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    turns = []
    for sampled, observed in draw(st.lists(st.tuples(ids, ids), max_size=4)):
        completion = Completion(
            request_id=0,
            role=Role.POLICY,
            token_ids=tuple(sampled),
            logprobs=tuple(-float(index) for index in sampled),
            finish_reason=FinishReason.STOP,
        )
        turns.append(Turn(completion=completion, action=Search("q"), observation_ids=tuple(observed)))
    return Trajectory(
        question=Question(id="q", text="?", answers=("a",), source="s"),
        sample=0,
        prompt_ids=tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))),
        turns=tuple(turns),
        stop_reason=StopReason.ANSWER,
        reward=draw(st.floats(0, 1)),
        trainable=draw(st.booleans()),
    )


def provenance(trajectory: Trajectory) -> list[tuple[int, str]]:
    """(id, who wrote it) of each token: an oracle that shares no code with the packing."""
    tokens = [(index, "prompt") for index in trajectory.prompt_ids]
    for turn in trajectory.turns:
        tokens.extend((index, "policy") for index in turn.completion.token_ids)
        tokens.extend((index, "game") for index in turn.observation_ids)
    return tokens


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.lists(trajectories(), min_size=1, max_size=4), max_size=4), st.integers(1, 40))
def test_against_an_oracle_of_who_wrote_each_token(played: list[list[Trajectory]], token_budget: int) -> None:
    groups = [Group(question=group[0].question, trajectories=tuple(group)) for group in played]
    packed = pack(groups, token_budget=token_budget)
    flat = [trajectory for group in played for trajectory in group]
    expected = []
    for number, trajectory in enumerate(flat):
        tokens = provenance(trajectory)
        begin, end = packed.cu_seqlens[number], packed.cu_seqlens[number + 1]
        for n in range(begin, end):
            assert packed.inputs[n] == tokens[n - begin][0]
            assert packed.targets[n] == tokens[n - begin + 1][0]
            assert packed.positions[n] == n - begin
            assert packed.sequence[n] == number
            written = tokens[n - begin + 1][1] == "policy" and trajectory.trainable
            assert bool(packed.loss_mask[n]) == written
            assert float(packed.rollout_logprobs[n]) == (-float(packed.targets[n]) if written else 0.0)
        sampled = sum(who == "policy" for _, who in tokens) * trajectory.trainable
        assert int(packed.loss_mask[begin:end].sum()) == sampled  # none is lost
        assert packed.loss_offsets[number + 1] - packed.loss_offsets[number] == sampled
        expected.append(trajectory.reward)
    assert packed.rewards.tolist() == expected
    check_micro_batches(packed, token_budget)


def check_micro_batches(packed: PackedBatch, token_budget: int) -> None:
    """Views cover every loss token once, in order, within the budget, and share the batch's memory."""
    covered: list[int] = []
    for micro in packed.micro_batches(token_budget):
        alone = len(micro.cu_seqlens) == 2
        assert micro.num_tokens <= token_budget or alone
        assert micro.inputs.data_ptr() == packed.inputs[micro.tokens].data_ptr()
        assert (micro.positions[list(micro.cu_seqlens[:-1])] == 0).all()
        covered += (micro.loss_index + micro.tokens.start).tolist()
        assert torch.equal(micro.at_loss_tokens(packed.targets), micro.loss_targets)
        assert packed.loss_index[micro.loss_tokens].tolist() == (micro.loss_index + micro.tokens.start).tolist()
    assert covered == packed.loss_index.tolist()


@pytest.mark.parametrize("budget, sizes", [(1, [3, 1, 2, 4]), (3, [3, 3, 4]), (4, [3, 3, 4]), (6, [6, 4]), (99, [10])])
def test_micro_batches_are_few_and_even_within_the_budget(budget: int, sizes: list[int]) -> None:
    """A sequence longer than the budget is a micro batch of its own."""
    packed = pack_tokens(
        (TokenSequence(ids=[0] * (n + 1), is_loss=[False] + [True] * n) for n in (3, 1, 2, 4)), share_prefixes=False
    )
    assert [micro.num_tokens for micro in packed.micro_batches(budget)] == sizes
    assert [micro.num_tokens for micro in packed.micro_batches(99, 1, 3)] == [3]


def test_documents_are_trained_on_only_when_asked(make_group, make_trajectory):
    trajectory = make_trajectory([1, 2], [([3, 4], [5, 6]), ([7], [])], logprob=-0.5)
    masked = pack([make_group([trajectory])], token_budget=16)
    assert masked.targets[masked.loss_mask].tolist() == [3, 4, 7]
    whole = pack([make_group([trajectory])], token_budget=16, mask_documents=False)
    assert whole.targets[whole.loss_mask].tolist() == [3, 4, 5, 6, 7]
    logprobs = whole.rollout_logprobs[whole.loss_index]
    assert logprobs.isnan().tolist() == [False, False, True, True, False], "nobody sampled a document"
    untrainable = make_trajectory([1, 2], [([3, 4], [5, 6]), ([7], [])], trainable=False)
    assert not pack([make_group([untrainable])], token_budget=16, mask_documents=False).loss_mask.any()
