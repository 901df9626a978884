"""A prefix that sequences share is computed once, and no number knows it: log-probabilities, values, every gradient."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch

from zs_fast.config import AlgorithmConfig, TrainConfig
from zs_fast.learn.algorithms import credit
from zs_fast.learn.batch import MicroBatch, PackedTokens
from zs_fast.learn.critic import Critic
from zs_fast.learn.pack import TokenSequence, pack, pack_tokens
from zs_fast.learn.policy import hidden_states, logprobs_at_loss_tokens, training_mode
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.models.attention import gather_rows
from zs_fast.models.lora import attach_adapter
from zs_fast.testing import tiny_model


def sequences(seed: int = 0) -> list[TokenSequence]:
    """Two questions under one instruction, answers that begin alike, one twice, one of another world, one empty."""
    draws = random.Random(seed)

    def ids(number: int) -> list[int]:
        return [draws.randrange(259) for _ in range(number)]

    instruction, turn = ids(17), ids(6)
    made = []
    for _ in range(2):
        prompt = instruction + ids(5)
        same = ids(4)
        for tail in (ids(9), same, turn + ids(7), turn + ids(3), same):
            made.append((prompt, tail))
    made += [(ids(8), ids(13)), (instruction, [])]
    return [TokenSequence(ids=p + t, is_loss=[False] * len(p) + [draws.random() < 0.7 for _ in t]) for p, t in made]


def packs(seed: int = 0) -> tuple[PackedTokens, PackedTokens]:
    return pack_tokens(sequences(seed)), pack_tokens(sequences(seed), share_prefixes=False)


def in_double(kind: str):
    return tiny_model(kind).model.double()


def assert_same(found, expected) -> None:
    """In norm: transformers' RMSNorm computes in float32 whatever the weights are, and no two ways round alike."""
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm()) <= 1e-6 * float(other.norm())


def micros(packed: PackedTokens, budget: int = 10_000) -> list[MicroBatch]:
    return list(packed.micro_batches(budget))


@pytest.mark.parametrize("budget", [10_000, 60, 40])
def test_computed_tokens_stand_for_all(budget):
    """Each computed token has the token's id and place, and what comes before it in its sequence is alike too."""
    packed, apart = packs()
    for micro in micros(packed, budget):
        if micro.shared is None:
            continue
        computed, rows = micro.shared.computed, micro.shared.rows
        assert len(rows) == micro.cu_seqlens[-1] and micro.num_tokens == len(computed) < len(rows)
        assert torch.equal(micro.inputs[computed][rows], micro.inputs)
        assert torch.equal(micro.positions[computed][rows], micro.positions)
        assert torch.equal(rows[computed], torch.arange(len(computed)))
        for begin, end in zip(micro.cu_seqlens[:-1], micro.cu_seqlens[1:], strict=True):
            for place in range(begin, end):
                other = int(computed[rows[place]])
                start = other - (place - begin)
                assert torch.equal(micro.inputs[start : other + 1], micro.inputs[begin : place + 1])
        for begin, end, bound in zip(
            micro.cu_seqlens[:-1], micro.cu_seqlens[1:], micro.shared.cu_seqlens[1:], strict=True
        ):
            assert begin <= int(computed[bound - 1]) == end - 1
    assert sum(micro.num_tokens for micro in micros(packed, budget)) < apart.num_tokens
    assert all(micro.shared is None for micro in micros(apart, budget))
    assert len(micros(packed, budget)) <= len(micros(apart, budget))


def test_all_of_a_batch_is_computed_once():
    packed, apart = packs()
    (micro,) = micros(packed)
    rows = [tuple(packed.inputs[a:b].tolist()) for a, b in zip(packed.cu_seqlens, packed.cu_seqlens[1:], strict=False)]
    distinct = {row[: end + 1] for row in rows for end in range(len(row))}
    repeated = sum(any(other[: len(row)] == row for other in rows[:number]) for number, row in enumerate(rows) if row)
    assert repeated >= 1 and micro.num_tokens == len(distinct) + repeated
    assert micro.num_tokens < 0.6 * apart.num_tokens


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("budget", [10_000, 60])
def test_log_probabilities_and_gradients_are_those_of_sequences_apart(kind, checkpointing, budget):
    model = in_double(kind)
    results = []
    for packed in packs():
        model.zero_grad()
        weights = torch.randn(packed.num_loss_tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = []
        with training_mode(model, gradient_checkpointing=checkpointing):
            for micro in micros(packed, budget):
                # Not through the fused op, whose accumulation is float32.
                logits = model.get_output_embeddings()(hidden_states(model, micro, micro.loss_index))
                logprobs = torch.log_softmax(logits, -1).gather(1, micro.loss_targets[:, None])[:, 0]
                (logprobs * weights[micro.loss_tokens]).sum().backward()
                found.append(logprobs.detach())
        results.append([torch.cat(found), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(tensor.abs().max() > 0 for tensor in results[0])
    assert_same(*results)


def test_an_adapters_gradients_are_those_of_sequences_apart():
    loaded = tiny_model("qwen2")
    attach_adapter(loaded.model, 4)
    model = loaded.model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.02)
    results = []
    for packed in packs():
        model.zero_grad()
        (micro,) = micros(packed)
        hidden_states(model, micro, micro.loss_index).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert results[0]
    assert_same(*results)


@pytest.mark.parametrize("whole_response", [False, True])
def test_values_are_those_of_sequences_apart(whole_response):
    critic = Critic(tiny_model(seed=3))
    torch.nn.init.normal_(critic.value_head.weight)
    results = []
    for packed in packs():
        (micro,) = micros(packed)
        with torch.no_grad():
            results.append(critic.values(micro, micro.response_index() if whole_response else None))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_padded_prompt_of_another_sequence_changes_nothing():
    """Only sequences with the very same tokens from the start share; equal tokens at another place do not."""
    ids = list(range(7, 47))
    moved = [5, *ids]
    packed = pack_tokens(
        [TokenSequence(ids=one, is_loss=[False] * 4 + [True] * (len(one) - 4)) for one in (ids, moved)]
    )
    (micro,) = micros(packed)
    assert micro.shared is None and packed.prefixes == ([], [])


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_an_update_is_that_of_sequences_apart(make_groups, name):
    """Scores, loss, metrics and weights after the steps, with every term on: two passes over two mini batches."""
    groups = [
        replace(
            group, trajectories=tuple(replace(t, prompt_ids=(*range(20), *t.prompt_ids)) for t in group.trajectories)
        )
        for group in make_groups(4, 3)
    ]
    algorithm = AlgorithmConfig(name=name, kl_coefficient=0.1, entropy_coefficient=0.01)
    train = TrainConfig(steps=1, learning_rate=1e-3, mini_batches=2, epochs=2)
    found = []
    for share in (True, False):
        policy = tiny_model(seed=0)
        roles = Roles(
            policy=policy,
            reference=tiny_model(seed=1),
            critic=Critic(tiny_model(seed=2)) if name == "ppo" else None,
            temperature=1.0,
        )
        packed = pack(groups, token_budget=10_000, share_prefixes=share)
        assert all((micro.shared is not None) == share for micro in micros(packed))
        updater = Updater(roles, train, algorithm, total_steps=1)
        batch = credit(score(packed, roles, **updater.needs), algorithm, kl_coefficient=0.1)
        stats = updater.update(batch)
        found.append((stats.values, copy.deepcopy(policy.model.state_dict())))
    (shared, weights), (apart, others) = found
    assert shared.keys() == apart.keys()
    for metric, value in apart.items():
        assert shared[metric] == pytest.approx(value, rel=1e-4, abs=1e-6), metric
    for key, tensor in others.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=3e-4)  # Adam's first step is a sign


def test_sequences_of_a_view_share_with_those_of_the_view_alone():
    packed, _ = packs()
    number = packed.num_sequences
    for first in range(number):
        micro = packed.view(first, number)
        if micro.shared is not None:
            assert int(micro.shared.rows.max()) == micro.num_tokens - 1
            assert torch.equal(micro.inputs[micro.shared.computed][micro.shared.rows], micro.inputs)
    model = tiny_model().model
    whole = replace(packed.view(5, number), shared=None)
    with torch.no_grad():
        results = [
            logprobs_at_loss_tokens(model, one, temperature=1.0).logprobs for one in (packed.view(5, number), whole)
        ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_long_sequences_attend_in_blocks(kind):
    """Several blocks of queries, the last one not full, after prefixes shorter and longer than a block."""
    draws = random.Random(1)
    start = [draws.randrange(259) for _ in range(300)]
    tails = [(300, 700), (100, 530), (300, 0), (20, 256), (300, 257)]
    made = [start[:held] + [draws.randrange(259) for _ in range(own)] for held, own in tails]
    flags = [[False] * (len(ids) - 3) + [True] * 3 for ids in made]
    model = in_double(kind)
    results = []
    for share in (True, False):
        (micro,) = micros(pack_tokens(map(sequence, made, flags), share_prefixes=share))
        assert (micro.shared is not None) == share
        model.zero_grad()
        hidden = hidden_states(model, micro, micro.loss_index)
        hidden.square().sum().backward()
        # The embedding's own rows apart: no two ways add the thousands of a token's gradients alike.
        results.append([hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert_same(*results)


def sequence(ids: list[int], flags: list[bool]) -> TokenSequence:
    return TokenSequence(ids=ids, is_loss=flags)


def test_gradients_of_shared_rows_are_summed_in_float32():
    """256 sequences hand a row gradients of one sign: summed in bfloat16 they would stop growing."""
    table = torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(table, torch.tensor([1] * 1000 + [2])).sum().backward()
    assert table.grad.tolist() == [[0.0] * 4, [1000.0] * 4, [1.0] * 4]
    wide = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, torch.tensor([2, 0, 2, 2])), wide)


def test_bfloat16_gradients_are_as_near_as_those_of_sequences_apart():
    exact = [p.grad for p in trained(torch.float64, share=False)]
    errors = []
    for share in (True, False):
        found = [p.grad.double() for p in trained(torch.bfloat16, share=share)]
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)))
    assert errors[0] <= 1.5 * errors[1] <= 0.2


def trained(dtype: torch.dtype, *, share: bool) -> list[torch.nn.Parameter]:
    model = tiny_model("qwen2").model.to(dtype)
    (micro,) = micros(pack_tokens(sequences(), share_prefixes=share))
    logits = model.get_output_embeddings()(hidden_states(model, micro, micro.loss_index))
    torch.log_softmax(logits, -1).gather(1, micro.loss_targets[:, None]).sum().backward()
    return list(model.parameters())
