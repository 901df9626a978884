"""Two processes take the step that one takes: the same gradients, weights and numbers, whoever holds which group."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing

from zs_fast.config import AlgorithmConfig, CriticConfig, SftConfig, TrainConfig
from zs_fast.learn.algorithms import credit
from zs_fast.learn.critic import Critic
from zs_fast.learn.optimizer import Optimizer
from zs_fast.learn.pack import pack
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.sft import train_sft
from zs_fast.learn.sft_data import SftExample
from zs_fast.learn.sharding import assembled, shard_model
from zs_fast.learn.update import Updater
from zs_fast.models.load import LoadedModel
from zs_fast.ranks import balanced, own_share
from zs_fast.system.distributed import check_same_bits, rank
from zs_fast.testing import tiny_model
from zs_fast.types import Answer, Completion, FinishReason, Group, Question, Role, StopReason, Trajectory, Turn

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")


@dataclass(frozen=True)
class Case:
    algorithm: AlgorithmConfig
    trainable: tuple[bool, ...] = (True,) * 5
    """Of each group; one that is not has no loss token."""
    mini_batches: int = 1
    epochs: int = 1


CASES = {
    "grpo": Case(AlgorithmConfig(kl_coefficient=0.1, entropy_coefficient=0.01)),
    "a rank without loss tokens": Case(AlgorithmConfig(kl_coefficient=0.1), trainable=(True, False)),
    "a rank without groups": Case(AlgorithmConfig(name="reinforce", kl_coefficient=0.0), trainable=(True,)),
    "no loss token anywhere": Case(AlgorithmConfig(kl_coefficient=0.0), trainable=(False, False)),
    "ppo": Case(AlgorithmConfig(name="ppo", gae_lambda=0.95), mini_batches=2, epochs=2),
    "ppo, a rank without loss tokens": Case(AlgorithmConfig(name="ppo", gae_lambda=0.95), trainable=(False, True)),
    "reinforce++": Case(AlgorithmConfig(name="reinforce++", kl_coefficient=0.1), mini_batches=2),
    "reinforce++-baseline": Case(AlgorithmConfig(name="reinforce++-baseline")),
    "dr_grpo": Case(AlgorithmConfig(name="dr_grpo"), mini_batches=3),
    "gspo": Case(AlgorithmConfig(name="gspo"), mini_batches=2),
}


def ragged_groups(trainable: tuple[bool, ...]) -> list[Group]:
    """Groups of 2 to 5 trajectories of 1 to 40 tokens each, with one sampled part or two."""
    draws = random.Random(7)

    def turn(longest: int, observed: int) -> Turn:
        ids = tuple(draws.randrange(259) for _ in range(draws.randint(1, longest)))
        logprobs = tuple(-5.5 - draws.random() for _ in ids)
        completion = Completion(
            request_id=0, role=Role.POLICY, token_ids=ids, logprobs=logprobs, finish_reason=FinishReason.STOP
        )
        observation = tuple(draws.randrange(259) for _ in range(observed))
        return Turn(completion=completion, action=Answer("answer"), observation_ids=observation)

    groups = []
    for number, learns in enumerate(trainable):
        question = Question(id=f"q{number}", text="?", answers=("a",), source="test")
        trajectories = [
            Trajectory(
                question=question,
                sample=sample,
                prompt_ids=tuple(draws.randrange(259) for _ in range(draws.randint(2, 6))),
                turns=(turn(20, 9), turn(20, 0)) if draws.random() < 0.5 else (turn(3, 0),),
                stop_reason=StopReason.ANSWER,
                reward=draws.random(),
                trainable=learns,
            )
            for sample in range(draws.randint(2, 5))
        ]
        groups.append(Group(question=question, trajectories=tuple(trajectories)))
    return groups


def small(seed: int) -> LoadedModel:
    return tiny_model(seed=seed, hidden_size=16, layers=1, heads=2, kv_heads=1)


def reference() -> LoadedModel:
    """The policy with weights off by some percent, so that there is a KL to have."""
    frozen = small(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in frozen.model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    return frozen


def record(optimizer: Optimizer, name: str, gradients: dict[str, Tensor]) -> None:
    """Put every gradient that `optimizer` steps with into `gradients`."""
    step = optimizer.step

    def recorded() -> None:
        for parameter, holder in optimizer._holders.items():
            assert holder.grad is not None
            whole = assembled(holder.grad, optimizer._parameters[parameter])
            gradients[f"{name}.{optimizer.position}.{parameter}"] = whole.clone()
        step()

    optimizer.step = recorded  # type: ignore[method-assign]


def take_step(case: Case, *, in_pieces: bool = False) -> tuple[dict[str, Tensor], dict[str, float], Updater]:
    """(gradients of every optimizer step, metrics, updater) of this process's share of the case."""
    algorithm = case.algorithm
    policy, frozen = small(0), reference() if algorithm.kl_coefficient else None
    critic = Critic(small(0)) if algorithm.name == "ppo" else None
    if critic is not None:
        torch.nn.init.constant_(critic.value_head.weight, 0.1)
    if in_pieces:
        options = {"device": torch.device("cpu"), "compute_dtype": torch.float32}
        shard_model(policy.model, **options)
        if frozen is not None:
            shard_model(frozen.model.requires_grad_(False), train=False, **options)
        if critic is not None:
            shard_model(critic, **options)
    roles = Roles(policy=policy, reference=frozen, critic=critic, temperature=1.0)
    # Steps so small that Adam's first one, a sign, can't make a difference in rounding one between the weights.
    train = TrainConfig(
        mini_batches=case.mini_batches, epochs=case.epochs, learning_rate=1e-9, max_grad_norm=1e9, token_budget=64
    )
    updater = Updater(roles, train, algorithm, total_steps=1, longest=40, critic=CriticConfig(learning_rate=1e-9))
    gradients: dict[str, Tensor] = {}
    record(updater.optimizer, "policy", gradients)
    if updater.critic is not None:
        record(updater.critic.optimizer, "critic", gradients)
    groups = ragged_groups(case.trainable)
    own = own_share(groups, train.mini_batches)
    packed = pack(own.groups, token_budget=train.token_budget, places=own.places, num_places=len(groups))
    scored = score(packed, roles, old_logprobs=updater.needs_old_logprobs)
    stats = updater.update(credit(scored, algorithm, kl_coefficient=updater.kl_coefficient))
    if not in_pieces:
        check_same_bits(dict(policy.model.named_parameters()), "the policy")
    return gradients, dict(stats.values), updater


def fine_tune() -> list[float]:
    """Losses of a few steps on ragged examples, 3 a step."""
    draws = random.Random(3)
    examples = []
    for _ in range(7):
        ids = tuple(draws.randrange(259) for _ in range(draws.randint(3, 30)))
        examples.append(SftExample(input_ids=ids, loss_mask=(False, *(draws.random() < 0.6 for _ in ids[2:]), True)))
    config = SftConfig(steps=4, batch_size=3, learning_rate=1e-3, token_budget=40)
    return train_sft(small(1), examples, config, seed=0)


def work(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    assert rank() == number
    told: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, case in CASES.items():
        gradients, told[name], _ = take_step(case)
        tensors |= {f"{name}: {key}": gradient for key, gradient in gradients.items()}
        gradients, told[f"{name}, in pieces"], updater = take_step(case, in_pieces=True)
        tensors |= {f"{name}, in pieces: {key}": gradient for key, gradient in gradients.items()}
        state = updater.state_tensors()
        assert bool(state) == (number == 0 and any(case.trainable))
        tensors |= {f"{name}, state: {key}": tensor for key, tensor in state.items()}
    told["sft"] = fine_tune()
    save_file(tensors, Path(folder, f"{number}.safetensors"))
    Path(folder, f"{number}.json").write_text(json.dumps(told))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """(gradients, metrics by case) of each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
        multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [
        (load_file(folder / f"{number}.safetensors"), json.loads((folder / f"{number}.json").read_text()))
        for number in range(2)
    ]


@pytest.mark.parametrize("how", ["", ", in pieces"], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_gradients_and_numbers_of_one(two_ranks, name: str, how: str) -> None:  # type: ignore[no-untyped-def]
    """Each gradient to 1e-6 of its norm in float32, the same bits on both ranks; every metric to 1e-5."""
    expected, metrics, _ = take_step(CASES[name])
    first, second = (of_case(tensors, f"{name}{how}") for tensors, _ in two_ranks)
    assert first.keys() == second.keys() == expected.keys()
    assert bool(expected) == any(CASES[name].trainable)
    for key, gradient in expected.items():
        assert torch.equal(first[key], second[key]), key
        assert float((first[key] - gradient).norm()) <= 1e-6 * float(gradient.norm()), key
    for _, told in two_ranks:
        assert told[f"{name}{how}"] == pytest.approx(metrics, rel=1e-5, abs=1e-7)


def of_case(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}: "): t for key, t in tensors.items() if key.startswith(f"{name}: ")}


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_the_main_rank_saves_whole_tensors_of_what_lies_in_pieces(two_ranks, name: str) -> None:  # type: ignore[no-untyped-def]
    """The optimizer's state, and a critic's weights: those of one process, by the same names."""
    expected = take_step(CASES[name])[2].state_tensors()
    (tensors, _), (others, _) = two_ranks
    saved = of_case(tensors, f"{name}, state")
    assert saved.keys() == expected.keys() and not of_case(others, f"{name}, state")
    for key, tensor in expected.items():
        torch.testing.assert_close(saved[key], tensor, rtol=1e-4, atol=1e-9, msg=key)


def test_the_cases_hold_what_they_are_named_after() -> None:
    def loss_tokens(case: Case, owners: list[int]) -> list[int]:
        groups = ragged_groups(case.trainable)
        owned = [[group for group, owner in zip(groups, owners, strict=True) if owner == number] for number in (0, 1)]
        return [pack(own, token_budget=64).num_loss_tokens for own in owned]

    assert 0 in loss_tokens(CASES["a rank without loss tokens"], balanced([50, 1], 1, 2))
    assert loss_tokens(CASES["a rank without groups"], balanced([50], 1, 2))[1] == 0


def test_fine_tuning_on_two_ranks_has_the_losses_of_one(two_ranks) -> None:  # type: ignore[no-untyped-def]
    for _, told in two_ranks:
        assert told["sft"] == pytest.approx(fine_tune(), rel=1e-5)
