"""verl's core functions on the ops of zs_kernels: one PPO update of a toy actor and critic, by verl's own names.

    pip install verl==0.9.1
    python examples/verl_core_functions.py

The same update runs twice, once with verl's functions and once inside `zs_kernels.compat.verl.patch()`, and every
number is printed side by side. In training, enter `patch()` in each of verl's worker processes.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext

import numpy as np
import torch
import verl.trainer.ppo.core_algos as core_algos
import verl.utils.torch_functional as verl_functional
from torch import Tensor
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import ActorConfig

from zs_kernels.compat import verl as ops_for_verl

RESPONSES, LENGTH, HIDDEN, VOCABULARY, GROUP = 8, 32, 64, 211, 4


def batch(seed: int) -> dict[str, Tensor]:
    """A made-up rollout: hidden states, tokens, rewards at the end, and a mask with documents in the middle."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.ones(RESPONSES, LENGTH, dtype=torch.int64)
    for row in range(RESPONSES):
        mask[row, 8 : 12 + row] = 0  # a retrieved document: not the policy's
        mask[row, LENGTH - 2 * row :] = 0  # padding
    rewards = torch.zeros(RESPONSES, LENGTH)
    last = LENGTH - 1 - mask.flip(1).argmax(dim=1)
    rewards[torch.arange(RESPONSES), last] = normal(RESPONSES).sign()
    return {
        "hidden": normal(RESPONSES, LENGTH, HIDDEN),
        "head": 0.2 * normal(VOCABULARY, HIDDEN),
        "labels": torch.randint(0, VOCABULARY, (RESPONSES, LENGTH), generator=generator),
        "mask": mask,
        "rewards": rewards,
        "values": 0.3 * normal(RESPONSES, LENGTH),
        "noise": 0.3 * normal(RESPONSES, LENGTH),
    }


def update(data: dict[str, Tensor], loss_mode: str) -> dict[str, float]:
    """One actor and critic update, as verl's workers compute it; the names are looked up in verl's modules."""
    mask = data["mask"]
    hidden, head = (data[name].clone().requires_grad_() for name in ("hidden", "head"))
    log_probs, entropy = FusedLinearForPPO()(hidden, head, data["labels"], temperature=0.9)
    old, reference = (log_probs.detach() + scale * data["noise"] for scale in (1.0, 2.0))

    estimate = core_algos.get_adv_estimator_fn("gae")
    advantages, returns = estimate(data["rewards"], data["values"], mask, 0.99, 0.95)
    group = np.array([f"question {i // GROUP}" for i in range(RESPONSES)])
    grouped, _ = core_algos.get_adv_estimator_fn("grpo")(data["rewards"], mask, group)

    config = ActorConfig(strategy="fsdp", rollout_n=GROUP, ppo_micro_batch_size_per_gpu=1, clip_ratio_high=0.28)
    policy = core_algos.get_policy_loss_fn(loss_mode)
    loss, metrics = policy(old, log_probs, advantages + grouped, mask, "token-mean", config)
    kl = core_algos.agg_loss(core_algos.kl_penalty(log_probs, reference, "low_var_kl"), mask, "token-mean")
    chaos = core_algos.agg_loss(entropy, mask, "token-mean")
    (loss + 0.01 * kl - 0.001 * chaos).backward()

    values = (data["values"] + data["noise"]).requires_grad_()
    critic, clipped = core_algos.compute_value_loss(values, returns, data["values"], mask, 0.1)
    critic.backward()
    return {
        "policy loss": loss.item(),
        "kl": kl.item(),
        "entropy": chaos.item(),
        "value loss": critic.item(),
        "value clip share": clipped.item(),
        "mean return": verl_functional.masked_mean(returns, mask).item(),
        "gradient of the head": head.grad.norm().item(),
        "gradient of the hidden states": hidden.grad.norm().item(),
        "gradient of the values": values.grad.norm().item(),
        **metrics,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss-mode", default="vanilla", choices=["vanilla", "gspo", "cispo", "gpg"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    arguments = parser.parse_args()
    data = batch(arguments.seed)
    results, calls = {}, {}
    for name, way in (("verl", nullcontext), ("zs_kernels", ops_for_verl.patch)):
        with way() as patched:
            results[name] = update(data, arguments.loss_mode)
        if patched is not None:
            calls = dict(patched.calls)
    if arguments.json:
        print(json.dumps({"results": results, "calls": calls}))
        return
    for key, theirs in results["verl"].items():
        ours = results["zs_kernels"][key]
        print(f"{key:32s} verl {theirs:+.8f}   zs_kernels {ours:+.8f}   difference {abs(ours - theirs):.1e}")
    print(f"calls of our ops: {calls}")


if __name__ == "__main__":
    main()
