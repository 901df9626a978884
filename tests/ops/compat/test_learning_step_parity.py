"""The learning step's credit and losses against verl 0.9.1's own functions, on ragged trajectories with documents.

Ours are packed; verl's get the same numbers in padded rectangles. Advantages: 1e-5 (verl sums in float32, we in
float64).
docs/recipes.md has the table of what differs.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zs_fast.config import AlgorithmConfig
from zs_fast.learn.algorithms import credit
from zs_fast.learn.batch import ScoredBatch
from zs_fast.learn.losses import MiniBatchSize, micro_batch_loss
from zs_fast.learn.pack import pack
from zs_fast.learn.policy import logprobs_at_loss_tokens
from zs_fast.testing import tiny_model
from zs_fast.types import Answer, Completion, FinishReason, Group, Question, Role, Search, StopReason, Trajectory, Turn

VOCABULARY = 300


def trajectory(generator: torch.Generator, question: Question, sample: int, *, documents: bool) -> Trajectory:
    def ids(low: int, high: int) -> tuple[int, ...]:
        count = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(0, 200, (count,), generator=generator).tolist())

    turns = []
    for number in range(int(torch.randint(1, 4, (), generator=generator)) if documents else 1):
        sampled = ids(1, 6)
        completion = Completion(
            request_id=number,
            role=Role.POLICY,
            token_ids=sampled,
            logprobs=(-1.0,) * len(sampled),
            finish_reason=FinishReason.STOP,
        )
        observed = ids(1, 5) if documents else ()
        turns.append(
            Turn(completion=completion, action=Search("q") if observed else Answer("a"), observation_ids=observed)
        )
    turns[-1] = Turn(completion=turns[-1].completion, action=Answer("a"))
    return Trajectory(
        question=question,
        sample=sample,
        prompt_ids=ids(1, 5),
        turns=tuple(turns),
        stop_reason=StopReason.ANSWER,
        reward=float(torch.rand((), generator=generator)),
    )


def played(seed: int, *, groups: int = 4, size: int = 3, documents: bool = True) -> list[Group]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(groups):
        question = Question(id=f"q{number}", text="?", answers=("a",), source="test")
        members = (trajectory(generator, question, sample, documents=documents) for sample in range(size))
        found.append(Group(question=question, trajectories=tuple(members)))
    return found


class Rectangle:
    """The packed response tokens as verl lays them out: [S, longest], a row from its first written token on."""

    def __init__(self, packed) -> None:
        self.packed = packed
        response = packed.response_mask()
        rows = [
            response[a:b].nonzero().squeeze(1) + a
            for a, b in zip(packed.cu_seqlens, packed.cu_seqlens[1:], strict=False)
        ]
        self.width = max(len(row) for row in rows)
        self.rows = rows
        self.mask = self.of(packed.loss_mask.float())

    def of(self, column: torch.Tensor) -> torch.Tensor:
        padded = torch.zeros(len(self.rows), self.width, dtype=column.dtype)
        for number, row in enumerate(self.rows):
            padded[number, : len(row)] = column[row]
        return padded

    def at_loss_tokens(self, padded: torch.Tensor) -> torch.Tensor:
        return torch.cat([padded[n, : len(row)][self.packed.loss_mask[row]] for n, row in enumerate(self.rows)])

    def rewards(self) -> torch.Tensor:
        rewards = torch.zeros(self.mask.shape)
        for number, row in enumerate(self.rows):
            rewards[number, len(row) - 1] = self.packed.rewards[number]
        return rewards

    def index(self) -> np.ndarray:
        return np.array([str(number) for number in self.packed.group.tolist()], dtype=object)


def ours(packed, name: str, *, values: torch.Tensor | None = None, **options) -> torch.Tensor:
    scored = ScoredBatch(packed=packed, old_logprobs=None, ref_logprobs=None, old_values=values)
    batch = credit(scored, AlgorithmConfig(name=name, kl_coefficient=0.0, **options))
    return batch.advantages[packed.loss_index]


THEIRS = {
    "grpo": lambda core, r: core.compute_grpo_outcome_advantage(r.rewards(), r.mask, r.index()),
    "dr_grpo": lambda core, r: core.compute_grpo_outcome_advantage(
        r.rewards(), r.mask, r.index(), norm_adv_by_std_in_grpo=False
    ),
    "rloo": lambda core, r: core.compute_rloo_outcome_advantage(r.rewards(), r.mask, r.index()),
    "reinforce++-baseline": lambda core, r: core.compute_reinforce_plus_plus_baseline_outcome_advantage(
        r.rewards(), r.mask, r.index()
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(THEIRS))
def test_advantages_against_a_group_are_verls(verl, name, seed):
    packed = pack(played(seed), token_budget=10_000)
    rectangle = Rectangle(packed)
    theirs = rectangle.at_loss_tokens(THEIRS[name](verl.core, rectangle)[0])
    torch.testing.assert_close(ours(packed, name), theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_group_of_one_teaches_nothing_here_and_its_reward_in_verl(verl, name):
    packed = pack(played(4, groups=3, size=1), token_budget=10_000)
    rectangle = Rectangle(packed)
    theirs = rectangle.at_loss_tokens(THEIRS[name](verl.core, rectangle)[0])
    rewards = packed.rewards[packed.sequence][packed.loss_index].float()
    torch.testing.assert_close(theirs, rewards, rtol=1e-5, atol=1e-6)
    assert not ours(packed, name).any()


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8)])
def test_ppo_is_verls_gae_through_the_masked_documents(verl, gamma, lam):
    packed = pack(played(5), token_budget=10_000)
    rectangle = Rectangle(packed)
    values = torch.randn(packed.num_tokens, generator=torch.Generator().manual_seed(1))
    expected, _ = verl.core.compute_gae_advantage_return(
        rectangle.rewards(), rectangle.of(values), rectangle.mask, torch.tensor(gamma), torch.tensor(lam)
    )
    found = ours(packed, "ppo", values=values, gamma=gamma, gae_lambda=lam)
    torch.testing.assert_close(found, rectangle.at_loss_tokens(expected), rtol=1e-4, atol=1e-5)


def reinforce_pp(verl, rectangle) -> torch.Tensor:
    found, _ = verl.core.compute_reinforce_plus_plus_outcome_advantage(
        rectangle.rewards(), rectangle.mask, config=SimpleNamespace(gamma=1.0)
    )
    return rectangle.at_loss_tokens(found)


@pytest.mark.parametrize("documents", [False, True])
def test_reinforce_plus_plus_is_verls(verl, documents):
    packed = pack(played(2, documents=documents), token_budget=10_000)
    torch.testing.assert_close(ours(packed, "reinforce++"), reinforce_pp(verl, Rectangle(packed)), rtol=1e-5, atol=2e-6)


LOSSES = {
    # name: (verl's function, our settings, its settings)
    "ppo": (
        "compute_policy_loss_vanilla",
        {"name": "grpo", "dual_clip": 3.0, "clip_high": 0.28},
        {"clip_ratio_c": 3.0},
    ),
    "dapo": ("compute_policy_loss_vanilla", {"name": "dapo", "dual_clip": 10.0}, {"clip_ratio_c": 10.0}),
    "gspo": ("compute_policy_loss_gspo", {"name": "gspo"}, {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
    "cispo": ("compute_policy_loss_cispo", {"name": "cispo"}, {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_and_their_gradients_are_verls(verl, name):
    function, options, theirs = LOSSES[name]
    config = AlgorithmConfig(kl_coefficient=0.0, **options)
    packed = pack(played(7), token_budget=10_000)
    rectangle = Rectangle(packed)
    model = tiny_model("llama").model
    (micro,) = packed.micro_batches(10_000)
    logprobs = logprobs_at_loss_tokens(model, micro, temperature=1.0).logprobs
    noise = 0.3 * torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0))
    old = torch.zeros(packed.num_tokens).index_copy(0, packed.loss_index, logprobs.detach() + noise)
    batch = credit(ScoredBatch(packed=packed, old_logprobs=old, ref_logprobs=None), config)
    size = MiniBatchSize(loss_tokens=packed.num_loss_tokens, sequences=packed.num_sequences, longest=99)
    loss, _ = micro_batch_loss(model, micro, batch, config, size, temperature=1.0)
    gradient = torch.autograd.grad(loss, tuple(model.parameters()))

    column = torch.zeros(packed.num_tokens).index_copy(0, packed.loss_index, logprobs)
    settings = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio": 0.2} | theirs
    actor = verl.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)
    mode = "seq-mean-token-mean" if name == "gspo" else "token-mean"
    expected, _ = getattr(verl.core, function)(
        rectangle.of(old), rectangle.of(column), rectangle.of(batch.advantages), rectangle.mask, mode, actor
    )
    expected_gradient = torch.autograd.grad(expected, tuple(model.parameters()))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-5, abs=2e-6)
    ours_flat, theirs_flat = (torch.cat([g.flatten() for g in grads]) for grads in (gradient, expected_gradient))
    assert float(theirs_flat.norm()) > 0
    assert float((ours_flat - theirs_flat).norm()) <= 2e-5 * float(theirs_flat.norm())
