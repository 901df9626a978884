"""OpenRLHF's functions on the ops of zs_kernels, without OpenRLHF: a policy and a critic learn a toy task by its names.

    python examples/openrlhf_formulas.py

A table of logits per position is the policy and one number per position the critic; the reward is the share of even
tokens. Log-probs, entropy, KL in the reward, GAE, PPO's loss with dual clip and the clipped value loss are the
functions that `zs_kernels.compat.openrlhf.patch()` puts into OpenRLHF's actors.
"""

from __future__ import annotations

import argparse
import json

import torch

from zs_kernels.compat.openrlhf import (
    PolicyLoss,
    ValueLoss,
    compute_approx_kl,
    compute_entropy,
    get_advantages_and_returns,
    log_probs_from_logits,
    masked_mean,
)

LENGTH, VOCABULARY = 12, 32


def train(steps: int, samples: int, seed: int) -> list[dict[str, float]]:
    """Reward, KL from the start, entropy and losses of each step."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(LENGTH, VOCABULARY, requires_grad=True)
    values = torch.zeros(LENGTH, requires_grad=True)
    start = logits.detach().clone()
    optimizer = torch.optim.Adam([logits, values], lr=0.1)
    policy_loss, value_loss = PolicyLoss(clip_eps_high=0.28, dual_clip=3.0), ValueLoss(clip_eps=0.2)
    history = []
    for _ in range(steps):
        probabilities = logits.detach().softmax(-1)
        tokens = torch.multinomial(probabilities, samples, replacement=True, generator=generator).T
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (samples, 1), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).float()
        rows = logits.detach().expand(samples, -1, -1)
        old = log_probs_from_logits(rows, tokens)
        kl = compute_approx_kl(old, log_probs_from_logits(start.expand(samples, -1, -1), tokens), kl_estimator="k1")
        score = masked_mean((tokens % 2 == 0).float(), mask, dim=1)
        rewards = -0.01 * kl
        rewards[torch.arange(samples), lengths.squeeze(1) - 1] += score
        old_values = values.detach().expand(samples, -1)
        advantages, returns = get_advantages_and_returns(old_values, rewards, mask, 1.0, 0.95)
        advantages = advantages - masked_mean(advantages, mask)
        for _ in range(2):
            log_probs = log_probs_from_logits(logits.expand(samples, -1, -1), tokens)
            actor, clipped, *_ = policy_loss(log_probs, old, advantages, mask)
            critic = value_loss(values.expand(samples, -1), old_values, returns, mask)
            optimizer.zero_grad()
            (actor + critic).backward()
            optimizer.step()
        history.append(
            {
                "reward": score.mean().item(),
                "kl": masked_mean(kl, mask).item(),
                "entropy": compute_entropy(logits.detach()).mean().item(),
                "policy loss": actor.item(),
                "value loss": critic.item(),
                "clipped": clipped.item(),
            }
        )
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    arguments = parser.parse_args()
    history = train(arguments.steps, arguments.samples, arguments.seed)
    if arguments.json:
        print(json.dumps(history))
        return
    for step, entry in enumerate(history, 1):
        print(f"step {step:3d}: " + "  ".join(f"{key} {value:+.4f}" for key, value in entry.items()))


if __name__ == "__main__":
    main()
