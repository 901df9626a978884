"""gae against torchrl 0.14.1: its loop, and its vectorised form, which cuts its kernel at 1e-7 (so 1e-5 here).

torchrl has no observation mask: every token is an action, and the episode ends with the last one.
"""

from __future__ import annotations

import pytest
import torch

from zs_kernels import gae
from zs_kernels.testing import seeded

functional = pytest.importorskip(
    "torchrl.objectives.value.functional", reason="torchrl is not installed: scripts/peers.sh installs it"
)


@pytest.mark.parametrize("name", ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"])
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 0.9), (0.9, 0.01)])
@pytest.mark.parametrize("length", [1, 7, 130])
def test_gae(name, gamma, lam, length):
    rewards, values = seeded(3, length, 1, seed=1), seeded(3, length, 1, seed=2)
    done = torch.zeros(3, length, 1, dtype=torch.bool)
    done[:, -1] = True
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, 1)], dim=1)
    expected = getattr(functional, name)(gamma, lam, values, following, rewards, done, done)
    bounds = torch.arange(0, 3 * length + 1, length)
    everywhere = torch.ones(3 * length, dtype=torch.bool)
    found = gae(rewards.flatten(), values.flatten(), everywhere, bounds, gamma=gamma, lam=lam)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.flatten(), rtol=1e-5, atol=1e-5)
