"""The ops against Liger 0.8.5: its cross-entropies and GRPO losses, under Triton's interpreter on the CPU.

Liger gives negative log-likelihoods where the ops give log-probabilities. Its chunked GRPO loss returns no per-token
values, so loss and gradients are compared; its softcap does not run under the interpreter. Tolerances: 1e-5 relative in
float32 (sums over the vocabulary and over tokens run in another order).
"""

from __future__ import annotations

import pytest
import torch

from zs_kernels import linear_logprobs, token_logprobs
from zs_kernels.compat import trl
from zs_kernels.testing import seeded

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: scripts/peers.sh installs it")

N, H, V = 7, 16, 37
B, T = 3, 5
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
"""Not luspo: Liger weighs a token by the length of its sequence and takes the mean over all B * T slots."""


def ids(*shape, seed=0):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1e-3, float(expected.detach().abs().max())))


def test_cross_entropy_from_logits():
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    targets = ids(N)
    targets[2] = -100
    ours, theirs = (seeded(N, V, seed=1, scale=3.0).requires_grad_() for _ in range(2))
    found = -token_logprobs(ours, targets, mask=targets >= 0).logprobs
    copy = theirs * 1  # Liger writes the gradient over its logits
    expected = LigerCrossEntropyFunction.apply(copy, targets, None, -100, 0.0, 0.0, "sum", None)[0]
    close(found.sum(), expected)
    close(*(torch.autograd.grad(x, leaf)[0] for x, leaf in ((found.sum(), ours), (expected, theirs))))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_cross_entropy_from_hidden_states(with_bias):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    targets = ids(N)
    targets[4] = -100
    results = []
    for function in ("ours", "theirs"):
        leaves = [seeded(N, H, seed=1), seeded(V, H, seed=2, scale=0.7), *([seeded(V, seed=3)] if with_bias else [])]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        hidden, weight, *bias = leaves
        bias = bias[0] if bias else None
        if function == "ours":
            found = linear_logprobs(hidden, weight, targets, bias=bias, mask=targets >= 0)
            loss = -found.logprobs.sum() / (N - 1)
        else:
            options = (bias, None, -100, 0.0, 0.0, "mean", None)
            loss = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *options)[0]
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for found, expected in zip(*results, strict=True):
        close(found, expected)


def grpo_case():
    old = -seeded(B, T, seed=5).abs() - 3.0
    return {"old": old, "ref": old + 0.3 * seeded(B, T, seed=6), "advantages": seeded(B, seed=7), "tokens": ids(B, T)}


def our_grpo(logprobs, case, loss_type, beta, level, high):
    return trl.grpo_loss(
        logprobs,
        case["old"],
        case["advantages"],
        MASK,
        loss_type=loss_type,
        epsilon_high=high,
        beta=beta,
        ref_per_token_logps=case["ref"],
        importance_sampling_level=level,
        max_completion_length=T + 2,
        num_items_in_batch=int(MASK.sum()),
    ).loss


@pytest.mark.parametrize(
    ("loss_type", "level"),
    [*((name, "token") for name in LOSS_TYPES), *((name, "sequence") for name in LOSS_TYPES[:4])],
)
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_chunked_grpo_loss(loss_type, beta, level):
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    case, high = grpo_case(), 2.0 if loss_type == "cispo" else 0.28
    module = LigerFusedLinearGRPOLoss(
        beta=beta, compiled=False, use_ref_model=beta != 0.0, epsilon_high=high, loss_type=loss_type, temperature=0.8,
        max_completion_length=T + 2, importance_sampling_level=level,
    )  # fmt: skip
    results = []
    for who in ("ours", "theirs"):
        hidden, weight = seeded(B, T, H, seed=1).requires_grad_(), seeded(V, H, seed=2, scale=0.5).requires_grad_()
        if who == "ours":
            arguments = (hidden.flatten(0, 1), weight, case["tokens"].flatten())
            logprobs = linear_logprobs(*arguments, temperature=0.8, mask=MASK.flatten() > 0).logprobs
            loss = our_grpo(logprobs.view(B, T), case, loss_type, beta, level, high)
        else:
            given = {"ref_per_token_logps": case["ref"], "old_per_token_logps": case["old"]}
            loss = module(hidden, weight, case["tokens"], MASK, case["advantages"], **given)[0]
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert abs(results[1][0].item()) > 1e-3
    for found, expected in zip(*results, strict=True):
        close(found, expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "cispo"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_triton_grpo_loss(loss_type, beta):
    """Its kernel takes logits [B, T + 1, V], and wants them contiguous."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    case, high = grpo_case(), 2.0 if loss_type == "cispo" else 0.28
    results = []
    for who in ("ours", "theirs"):
        logits = seeded(B, T + 1, V, seed=1, scale=2.0).requires_grad_()
        if who == "ours":
            logprobs = trl.selective_log_softmax(logits[:, :-1], case["tokens"], 0.8, MASK)
            loss = our_grpo(logprobs, case, loss_type, beta, "token", high)
        else:
            loss = triton_grpo_loss(
                logits, case["old"], case["ref"], case["tokens"], case["advantages"], MASK, 0.8, beta, 0.2, high,
                inplace=False, loss_type=loss_type, reduce=True, max_completion_length=T + 2,
            )[0]  # fmt: skip
        results.append((loss, torch.autograd.grad(loss, logits)[0]))
    assert abs(results[1][0].item()) > 1e-3
    for found, expected in zip(*results, strict=True):
        close(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's scaled cross-entropy is a kernel for sm_90 alone")
def test_scaled_cross_entropy_with_entropy():
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Liger's scaled cross-entropy is a kernel for sm_90 alone")
    hidden = seeded(256, 512, seed=1).bfloat16().cuda()
    weight = seeded(1024, 512, seed=2, scale=0.1).bfloat16().cuda()
    targets = torch.randint(0, 1024, (256,)).cuda()
    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, 0.8, -100, 1, True)
    found = linear_logprobs(hidden, weight, targets, temperature=0.8, entropy=True, exact=True)
    torch.testing.assert_close(found.logprobs, -nll.float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.entropy, entropy.float(), rtol=1e-2, atol=1e-2)
