"""F52: a value that is not finite, at any of nine places of a step, on any rank: no weight and no moment moves for it.

What would come of it all the same, in the optimizer's own state, is stopped before the engine samples with it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from tests.learn.test_two_ranks import ragged_groups, reference, small
from zs_fast.config import AlgorithmConfig, TrainConfig
from zs_fast.errors import NonFiniteError
from zs_fast.learn import update
from zs_fast.learn.algorithms import credit
from zs_fast.learn.batch import TrainBatch
from zs_fast.learn.pack import pack
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.ranks import own_share
from zs_fast.system.distributed import rank
from zs_fast.system.weights import check_finite

SKIPPED = ("reward", "advantage", "old log-prob", "ref log-prob", "loss", "gradient", "norm")
LATE = ("optimizer state", "weights")
GRPO = AlgorithmConfig(kl_coefficient=0.1)
NAN, INF = float("nan"), float("inf")


def make_updater() -> Updater:
    roles = Roles(policy=small(0), reference=reference(), temperature=1.0)
    return Updater(roles, TrainConfig(learning_rate=1e-2, mini_batches=1, epochs=1), GRPO, total_steps=9)


def make_batch(updater: Updater, reward: float | None = None) -> TrainBatch:
    """This rank's share; `reward` replaces that of its first trajectory."""
    groups = ragged_groups((True, True, True, True))
    share = own_share(groups, 1)
    own = list(share.groups)
    if reward is not None:
        first, *others = own[0].trajectories
        own[0] = replace(own[0], trajectories=(replace(first, reward=reward), *others))
    packed = pack(own, token_budget=10_000, places=share.places, num_places=len(groups))
    return credit(score(packed, updater.roles, old_logprobs=True), GRPO)


def spoilt(column: Tensor, batch: TrainBatch, value: float) -> Tensor:
    """The column with `value` at the first loss token."""
    column = column.clone()
    column[batch.scored.packed.loss_index[0]] = value
    return column


@contextmanager
def poison(site: str, value: float, updater: Updater) -> Iterator[TrainBatch]:
    """A batch, or an updater for it, that goes wrong at one place."""
    with pytest.MonkeyPatch.context() as patch:
        batch = make_batch(updater, value if site == "reward" else None)
        scored, model, handle = batch.scored, updater.roles.policy.model, None
        if site == "advantage":
            batch = replace(batch, advantages=spoilt(batch.advantages, batch, value))
        elif site == "old log-prob":
            batch = replace(batch, scored=replace(scored, old_logprobs=spoilt(scored.old_logprobs, batch, value)))
        elif site == "ref log-prob":
            batch = replace(batch, scored=replace(scored, ref_logprobs=spoilt(scored.ref_logprobs, batch, value)))
        elif site == "loss":
            real = update.micro_batch_loss

            def loss_times(*arguments: object, **named: object) -> object:
                loss, sums = real(*arguments, **named)
                return loss * value, sums

            patch.setattr(update, "micro_batch_loss", loss_times)
        elif site == "gradient":
            parameter = next(p for p in model.parameters() if p.dim() == 2)
            handle = parameter.register_hook(lambda grad: grad.clone().index_fill_(0, torch.tensor(3), value))
        elif site == "norm":
            patch.setattr(updater.optimizer, "clip_gradients", lambda: torch.tensor(value))
        elif site == "optimizer state":
            state = updater.state_tensors()
            next(tensor for tensor in state.values() if tensor.dim() == 2).view(-1)[5] = value
        elif site == "weights":
            with torch.no_grad():
                next(model.parameters()).view(-1)[5] = value
        yield batch
        if handle is not None:
            handle.remove()


def state(updater: Updater) -> list[Tensor]:
    """Weights and moments."""
    weights = [parameter.detach().clone() for parameter in updater.roles.policy.model.parameters()]
    return weights + [tensor.clone() for tensor in updater.state_tensors().values()]


def try_site(site: str, value: float, *, here: bool = True) -> str:
    """What is wrong with how a poisoned step ended; empty: nothing. `here`: on this rank it is poisoned."""
    updater = make_updater()
    updater.update(make_batch(updater))
    before = state(updater)
    with poison(site if here else "none", value, updater) as batch:
        if site in LATE:
            updater.update(batch)
            try:
                check_finite(updater.roles.policy.model, "the policy")
            except NonFiniteError:
                return ""
            return "weights that are not finite would be sampled with"
        values = updater.update(batch).values
    after = state(updater)
    unmoved = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    counted = values["update/nonfinite_losses"] + values["update/nonfinite_grad_norms"]
    if math.isinf(value) and not counted:
        # An infinite log-probability may be clipped to something that can be learnt from.
        finite = all(torch.isfinite(tensor).all() for tensor in after)
        return "" if finite and not unmoved else "a step was neither taken nor counted"
    if not unmoved:
        return "weights or moments moved"
    if counted < 1 or values["update/optimizer_steps"]:
        return f"the skipped step is not counted: {values}"
    updater.update(make_batch(updater))
    if all(torch.equal(a, b) for a, b in zip(before, state(updater), strict=True)):
        return "the next, sound step is not taken"
    return "" if all(torch.isfinite(tensor).all() for tensor in state(updater)) else "what comes next is not finite"


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("site", [*SKIPPED, *LATE])
def test_nothing_moves_for_a_value_that_is_not_finite(site: str, value: float) -> None:
    assert try_site(site, value) == ""


def _work(number: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    told = {}
    for site in SKIPPED:
        if site == "norm":
            continue  # computed from sums that all ranks have: never unlike
        for poisoned in (0, 1):
            told[f"{site} on rank {poisoned}"] = try_site(site, NAN, here=rank() == poisoned)
    for site in LATE:
        told[site] = try_site(site, NAN)
    Path(folder, f"told_{number}.json").write_text(json.dumps(told))
    distributed.destroy_process_group()


@pytest.mark.full
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")
def test_all_ranks_leave_the_same_step_out(tmp_path: Path, record_property) -> None:  # type: ignore[no-untyped-def]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(number, str(tmp_path))) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    for number in range(2):
        told = json.loads((tmp_path / f"told_{number}.json").read_text())
        assert len(told) == 14 and not any(told.values()), told
    record_property("trials", 14)
