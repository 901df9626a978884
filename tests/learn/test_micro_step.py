"""A micro batch that runs out of memory leaves no trace but smaller micro batches."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from zs_fast.config import AlgorithmConfig, CriticConfig, TrainConfig
from zs_fast.errors import MemoryBudgetError
from zs_fast.host import shared_prefixes
from zs_fast.learn import micro_step
from zs_fast.learn.algorithms import credit
from zs_fast.learn.critic import Critic
from zs_fast.learn.micro_step import MicroSteps
from zs_fast.learn.pack import pack
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.testing import tiny_model

GRPO = AlgorithmConfig(kl_coefficient=0.0)


def small(dtype="float32"):
    return tiny_model(seed=0, hidden_size=16, layers=3, heads=2, kv_heads=1, dtype=dtype)


class Card:
    """Memory for `holds` tokens: a trunk that is given more runs out, on the way forward or in the middle of the
    backward pass, when the gradients of the upper layers are there and those of the lower are not."""

    def __init__(self, trunk, holds, where, error=None):
        self.holds, self.where, self.given, self.raised = holds, where, [], 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore lines")
        trunk.register_forward_pre_hook(self._forward, with_kwargs=True)
        trunk.layers[1].register_full_backward_pre_hook(self._backward)

    def _run_out(self):
        self.raised += 1
        raise self.error

    def _forward(self, module, arguments, options):
        self.tokens = options["input_ids"].shape[1]
        self.given.append(self.tokens)
        if self.where == "forward" and self.tokens > self.holds:
            self._run_out()

    def _backward(self, module, gradients):
        if self.where == "backward" and self.tokens > self.holds:
            self._run_out()


def update(groups, *, holds=None, where="forward", token_budget=10_000, dtype="float32", steps=1, error=None):
    """(gradients of the last step before AdamW takes them, its stats, the updater, the card) of `steps` updates."""
    policy = small(dtype)
    roles = Roles(policy=policy, reference=None, temperature=1.0)
    train = TrainConfig(learning_rate=1e-4, max_grad_norm=1e9)
    updater = Updater(roles, train, GRPO, total_steps=4)
    card = Card(policy.model.model, holds, where, error) if holds else None
    seen = {}
    step = updater.optimizer.step

    def watched():
        seen.update({name: master.grad.clone() for name, master in updater.optimizer._masters.items()})
        step()

    updater.optimizer.step = watched
    stats = [
        updater.update(credit(score(pack(groups, token_budget=token_budget), roles), GRPO)).values for _ in range(steps)
    ]
    return seen, stats[-1], updater, card


def assert_same_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert float((one - expected[name]).norm()) <= tolerance * float(expected[name].norm()), name


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("token_budget", [10_000, 150])
def test_gradients_and_metrics_are_those_of_a_run_that_fits(make_groups, where, token_budget):
    groups = make_groups(3, 4)
    expected, stats, _, _ = update(groups)
    found, split_stats, updater, card = update(groups, holds=80, where=where, token_budget=token_budget)
    assert card.raised == updater.timings()["update/oom_splits"] > 0
    assert max(card.given) > 80 >= max(card.given[-3:])
    assert_same_gradients(found, expected, 1e-6)
    assert split_stats.keys() == stats.keys()
    for name, value in split_stats.items():
        assert value == pytest.approx(stats[name], rel=1e-5, abs=1e-7), name


def test_it_is_the_run_with_the_smaller_budget_bit_for_bit(make_groups):
    groups = make_groups(3, 4)
    found, stats, updater, _ = update(groups, holds=80, where="backward")
    expected, expected_stats, _, _ = update(groups, token_budget=updater.micro_steps.token_budget)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert stats == expected_stats


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_masters_of_narrow_weights_too(make_groups, where):
    """A bfloat16 gradient moves to its master as soon as it is there: what moved must go as well."""
    groups = make_groups(3, 4)
    found, _, updater, card = update(groups, holds=80, where=where, dtype="bfloat16")
    expected, _, _, _ = update(groups, token_budget=updater.micro_steps.token_budget, dtype="bfloat16")
    assert card.raised and all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(parameter.grad is None for parameter in updater.roles.policy.model.parameters())


def test_an_accumulation_hook_that_runs_out_leaves_no_gradient(make_groups):
    """It dies after the parameter's own gradient is there and before the master has it."""
    groups = make_groups(2, 3)
    expected, _, _, _ = update(groups, token_budget=60, dtype="bfloat16")
    policy = small("bfloat16")
    roles = Roles(policy=policy, reference=None, temperature=1.0)
    left = [1]

    def runs_out_once(parameter):
        if left and left.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")

    policy.model.model.layers[1].mlp.up_proj.weight.register_post_accumulate_grad_hook(runs_out_once)
    updater = Updater(roles, TrainConfig(learning_rate=1e-4, max_grad_norm=1e9), GRPO, total_steps=4)
    seen = {}
    step = updater.optimizer.step

    def watched():
        seen.update({name: master.grad.clone() for name, master in updater.optimizer._masters.items()})
        step()

    updater.optimizer.step = watched
    updater.update(credit(score(pack(groups, token_budget=10_000), roles), GRPO))
    again, _, _, _ = update(groups, token_budget=updater.micro_steps.token_budget, dtype="bfloat16")
    assert not left and all(torch.equal(seen[name], again[name]) for name in again)
    assert_same_gradients(seen, expected, 2e-2)


def test_the_smaller_budget_stays(make_groups):
    groups = make_groups(3, 4)
    _, _, updater, card = update(groups, holds=80, where="backward", steps=3)
    assert card.raised == updater.micro_steps.splits <= 3
    assert sum(tokens > 80 for tokens in card.given) == card.raised


def test_a_budget_that_fits_is_left_alone(make_groups):
    _, stats, updater, _ = update(make_groups(2, 3), holds=10_000)
    assert updater.timings() == {"update/oom_splits": 0.0, "score/oom_splits": 0.0}
    assert updater.micro_steps.token_budget is None
    assert not any("oom" in name for name in stats), "a fact of the machine has no place among resumable metrics"


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_single_trajectory_that_does_not_fit_is_one_clear_error(make_groups, where):
    with pytest.raises(MemoryBudgetError) as error:
        update(make_groups(2, 3), holds=5, where=where)
    for word in ("token budget", "game.max_context_tokens", "tokens does not fit", "Tried to allocate 20.00 MiB"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_other_errors_pass_through(make_groups):
    with pytest.raises(RuntimeError, match="illegal memory access"):
        update(make_groups(2, 3), holds=20, error=RuntimeError("CUDA error: an illegal memory access"))


def test_cublas_without_a_workspace_is_out_of_memory_too(make_groups):
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    _, _, updater, card = update(make_groups(3, 4), holds=80, error=error)
    assert card.raised == updater.micro_steps.splits > 0


def test_activations_of_the_failed_pass_are_gone(make_groups):
    """Else the smaller micro batches would meet the same full memory."""
    packed = pack(make_groups(2, 3), token_budget=10_000)
    held, alive = [], []

    def step(micro):
        alive.append(sum(one() is not None for one in held))
        activation = torch.zeros(micro.num_tokens)
        held.append(weakref.ref(activation))
        if micro.num_tokens > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"loss": torch.zeros(())}

    gc.disable()
    try:
        MicroSteps().run(packed, 0, packed.num_sequences, token_budget=10_000, step=step, drop_gradients=lambda: None)
    finally:
        gc.enable()
    assert len(alive) > 2 and not any(alive)


@pytest.mark.parametrize("share", [False, True])
def test_every_sequence_is_in_exactly_one_micro_batch_of_the_pass_that_counts(make_groups, share):
    packed = pack(make_groups(3, 4), token_budget=10_000)
    if share:  # the prompts are shorter than what is shared by itself
        packed = replace(packed, prefixes=tuple(every_prefix(packed)))
    since = []

    def step(micro):
        if micro.num_tokens > 70:
            raise torch.OutOfMemoryError("out")
        assert share or micro.shared is None
        since.append((micro.tokens.start, micro.tokens.stop))
        return {"tokens": torch.tensor(float(micro.cu_seqlens[-1]))}

    steps = MicroSteps()
    sums = steps.run(packed, 0, packed.num_sequences, token_budget=10_000, step=step, drop_gradients=since.clear)
    assert since[0][0] == 0 and since[-1][1] == packed.num_tokens
    assert all(a[1] == b[0] for a, b in pairwise(since)) and float(sums["tokens"]) == packed.num_tokens
    assert steps.splits <= math.ceil(math.log2(packed.num_tokens / 70)) + 1
    assert not share or any(micro.shared for micro in packed.micro_batches(steps.token_budget))


def every_prefix(packed):
    return shared_prefixes([packed.inputs[a:b].tolist() for a, b in pairwise(packed.cu_seqlens)], least=1)


def test_ranks_take_the_smallest_budget_of_any(make_groups, monkeypatch):
    packed = pack(make_groups(3, 4), token_budget=10_000)
    monkeypatch.setattr(micro_step, "world_size", lambda: 2)
    others = {"token_budget": -50.0}
    monkeypatch.setattr(micro_step, "largest", lambda mine: {n: max(v, others[n]) for n, v in mine.items()})
    given = []

    def step(micro):
        given.append(micro.num_tokens)
        return {}

    steps = MicroSteps()
    steps.run(packed, 0, packed.num_sequences, token_budget=10_000, step=step, drop_gradients=lambda: None)
    assert steps.token_budget == 50 and max(given) <= 50 and steps.splits == 0
    others["token_budget"] = -(2.0**62)
    fresh = MicroSteps()
    fresh.run(packed, 0, packed.num_sequences, token_budget=10_000, step=step, drop_gradients=lambda: None)
    assert fresh.token_budget is None


def test_the_critic_s_update_too(make_groups):
    algorithm = AlgorithmConfig(name="ppo", kl_coefficient=0.0)
    groups = make_groups(3, 4)
    values, splits = [], []
    for holds in (None, 80):
        roles = Roles(policy=small(), reference=None, critic=Critic(small()), temperature=1.0)
        updater = Updater(roles, TrainConfig(), algorithm, total_steps=2, critic=CriticConfig())
        batch = credit(score(pack(groups, token_budget=10_000), roles), algorithm)
        if holds:
            Card(roles.critic.trunk, holds, "backward")
        values.append(updater.update(batch).values)
        splits.append(updater.timings()["update/oom_splits"])
    assert splits[0] == 0 < splits[1]
    assert values[1] == pytest.approx(values[0], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("role", ["reference", "critic"])
def test_scoring_goes_on_in_smaller_micro_batches(make_groups, role):
    packed = pack(make_groups(3, 4), token_budget=10_000)

    def roles():
        return Roles(policy=small(), reference=small(), critic=Critic(small()), temperature=1.0)

    def scored(given):
        return given.values(packed) if role == "critic" else given.logprobs(role, packed)

    ample, tight = roles(), roles()
    for given in (ample, tight):
        torch.nn.init.normal_(given.critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    trunk = tight.critic.trunk if role == "critic" else tight.reference.model.model
    card = Card(trunk, 70, "forward")
    torch.testing.assert_close(scored(tight), scored(ample), rtol=1e-5, atol=1e-5)
    assert card.raised == tight.oom_splits > 0 and ample.oom_splits == 0
    raised = card.raised
    scored(tight)
    assert card.raised == raised, "the smaller budget stays"


def test_a_trajectory_too_long_to_be_scored_is_one_clear_error(make_groups):
    roles = Roles(policy=small(), reference=small(), temperature=1.0)
    Card(roles.reference.model.model, 5, "forward")
    with pytest.raises(MemoryBudgetError, match=r"when the reference scores it .*game\.max_context_tokens"):
        roles.logprobs("reference", pack(make_groups(2, 3), token_budget=10_000))
