"""linear_logprobs against Cut Cross-Entropy 25.1.1, whose torch implementation runs on a CPU (its Triton one does not
run under the interpreter). Compiling it takes 12 s, so it runs uncompiled: the same formula."""

from __future__ import annotations

import pytest
import torch

from zs_kernels import linear_logprobs
from zs_kernels.testing import seeded

cut_cross_entropy = pytest.importorskip(
    "cut_cross_entropy", reason="cut-cross-entropy is not installed: scripts/peers.sh installs it"
)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("ignored", [False, True], ids=["all", "some ignored"])
def test_linear_cross_entropy(softcap, ignored):
    targets = torch.randint(0, 37, (9,), generator=torch.Generator().manual_seed(1))
    if ignored:
        targets[[0, 4]] = -100
    upstream = seeded(9, seed=3)
    results = []
    for who in ("ours", "theirs"):
        hidden, weight = seeded(9, 16, seed=1).requires_grad_(), seeded(37, 16, seed=2, scale=0.7).requires_grad_()
        if who == "ours":
            loss = -linear_logprobs(hidden, weight, targets, softcap=softcap, mask=targets >= 0).logprobs
        else:
            with torch.compiler.set_stance("force_eager"):
                loss = cut_cross_entropy.linear_cross_entropy(
                    hidden, weight, targets, softcap=softcap, reduction="none", impl="torch_compile"
                )
        results.append((loss, *torch.autograd.grad((loss * upstream).sum(), (hidden, weight))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_mean_over_the_tokens_that_count():
    hidden, weight = seeded(5, 8, seed=1), seeded(11, 8, seed=2)
    targets = torch.tensor([3, -100, 10, 0, -100])
    with torch.compiler.set_stance("force_eager"):
        expected = cut_cross_entropy.linear_cross_entropy(hidden, weight, targets, impl="torch_compile")
    found = -linear_logprobs(hidden, weight, targets, mask=targets >= 0).logprobs.sum() / 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
