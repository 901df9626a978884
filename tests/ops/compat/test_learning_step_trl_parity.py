"""The learning step's credit and losses against the code inside TRL 1.16's trainers, which is run as it stands."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tests.ops.compat.test_learning_step_terms_parity import LONGEST, Case
from tests.ops.compat.test_trl_grpo_parity import Accelerator, their_advantages, trainer  # noqa: F401
from zs_fast.config import AlgorithmConfig
from zs_fast.learn.algorithms import credit
from zs_fast.learn.batch import ScoredBatch
from zs_fast.learn.pack import pack
from zs_fast.types import (
    Answer,
    Completion,
    FinishReason,
    Group,
    Question,
    Role,
    StopReason,
    Trajectory,
    Turn,
)

NAN = float("nan")


def stub(case: Case, rows: torch.Tensor, **settings):
    """What `_compute_loss` reads of its trainer, with our log-probabilities in place of a model's."""
    values = {
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "loss_type": "dapo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "entropy_coef": 0.0,
        "max_completion_length": LONGEST,
    } | settings
    return SimpleNamespace(
        **values,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (rows, torch.zeros_like(rows), None),
    )


def inputs(case: Case, batch) -> dict[str, torch.Tensor]:
    """TRL has the documents in its completions too, and masks them as what tools returned."""
    mask = case.rectangle.mask.long()
    empty = torch.zeros(len(mask), 0, dtype=torch.long)
    return {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": mask,
        "completion_mask": torch.ones_like(mask),
        "tool_mask": mask,
        "advantages": batch.sequence_advantages,
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": case.rectangle.of(case.scored.old_logprobs),
        "ref_per_token_logps": case.rectangle.of(case.scored.ref_logprobs),
    }


LOSSES = {
    # TRL's loss: (TRL's settings, ours)
    "grpo": ({"loss_type": "grpo"}, {"aggregation": "seq-mean-token-mean"}),
    "bnpo": ({"loss_type": "bnpo"}, {"aggregation": "token-mean"}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"name": "dapo"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"name": "dr_grpo"}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        {"name": "gspo"},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, {"name": "cispo"}),
}


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_and_their_gradients_are_trls(trl_grpo, name, beta):
    settings, options = LOSSES[name]
    case = Case()
    loss, gradient, batch = case.ours(AlgorithmConfig(**{"name": "grpo"} | options | {"kl_coefficient": beta}))
    rows = case.rectangle.of(case.column(case.logprobs))
    expected = trl_grpo.GRPOTrainer._compute_loss(stub(case, rows, beta=beta, **settings), None, inputs(case, batch))
    found = case.gradient(expected)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=3e-5, abs=2e-6)
    assert float((gradient - found).norm()) <= 3e-5 * float(found.norm()) > 0


def test_rloos_gradient_on_policy_is_trls(trl_grpo):
    """TRL's RLOO has one ratio per trajectory, the product of its tokens'. While it is 1 its gradient is that of the
    tokens' sum; afterwards the two differ, and ours clips token by token."""
    from trl import RLOOTrainer

    case = Case()
    case.scored = ScoredBatch(packed=case.packed, old_logprobs=None, ref_logprobs=None)
    config = AlgorithmConfig(name="rloo", kl_coefficient=0.0, aggregation="seq-mean-token-sum")
    _, gradient, batch = case.ours(config)
    rows, mask = case.rectangle.of(case.column(case.logprobs)), case.rectangle.mask.long()
    empty = torch.zeros(len(mask), 0, dtype=torch.long)
    given = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": batch.sequence_advantages,
        "old_logps": (rows.detach() * mask).sum(1),
    }
    expected = RLOOTrainer._compute_loss(stub(case, rows), None, given)
    found = case.gradient(expected)
    assert float((gradient - found).norm()) <= 3e-5 * float(found.norm()) > 0


REWARDS = (0.9, 0.1, 0.4, 0.4, NAN, 0.25, 1.0, 0.75, 0.5, 0.5, 0.5, 0.5)
"""Three groups of four; NaN: could not be scored, as ours whose search failed"""


def ours(name: str) -> torch.Tensor:
    groups = []
    for number in range(3):
        question = Question(id=f"q{number}", text="?", answers=("a",), source="test")
        members = []
        for sample, reward in enumerate(REWARDS[4 * number : 4 * number + 4]):
            completion = Completion(
                request_id=0, role=Role.POLICY, token_ids=(5,), logprobs=(-1.0,), finish_reason=FinishReason.STOP
            )
            members.append(
                Trajectory(
                    question=question,
                    sample=sample,
                    prompt_ids=(1,),
                    turns=(Turn(completion=completion, action=Answer("a"), observation_ids=()),),
                    stop_reason=StopReason.ANSWER,
                    reward=0.0 if reward != reward else reward,
                    trainable=reward == reward,
                )
            )
        groups.append(Group(question=question, trajectories=tuple(members)))
    packed = pack(groups, token_budget=99)
    config = AlgorithmConfig(name=name, kl_coefficient=0.0, advantage_eps=1e-4)
    return credit(ScoredBatch(packed=packed, old_logprobs=None, ref_logprobs=None), config).sequence_advantages


@pytest.mark.parametrize(
    "name, kind, settings",
    [
        ("grpo", "grpo", {"scale_rewards": "group"}),
        ("dr_grpo", "grpo", {"scale_rewards": "none"}),
        ("rloo", "rloo", {}),
    ],
)
def test_advantages_are_trls(trainer, name, kind, settings):  # noqa: F811
    rewards = torch.tensor([[reward, NAN] for reward in REWARDS])
    theirs = their_advantages(trainer, kind, rewards, **settings)
    torch.testing.assert_close(ours(name), theirs, rtol=1e-5, atol=1e-6)
    assert theirs.abs().max() > 0.2 and theirs[4] == 0.0
