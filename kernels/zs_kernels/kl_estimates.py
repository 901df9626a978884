"""Per-token estimates of KL(policy || reference) from the log-probabilities of sampled tokens.

    d  = ref_logprob - logprob
    k1 = -d,    k2 = d^2 / 2,    k3 = exp(d) - 1 - d  (>= 0)

N = tokens, in nats. A trailing `+` (straight-through: `k1+`, `k3+`) keeps the value but has the gradient of k2, which
is that of the reverse KL when the tokens were sampled from the policy. Source: http://joschu.net/blog/kl-approx.html;
gradients of the estimators: arXiv:2510.01555.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_mask

ESTIMATORS = ("k1", "k2", "k3", "k1+", "k3+")

CLAMPS: dict[str, tuple[float | None, float | None]] = {
    "none": (None, None),
    "verl": (20.0, 10.0),
    "zerosearch": (None, 10.0),
    "openrlhf": (None, 10.0),
}
"""Name -> (bound on |d| before the formula, bound on |estimate| after it). A clamped token has gradient 0."""


def _estimate(d: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d * d
    return torch.expm1(d) - d


def kl_estimates(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = "k3",
    clamp: str = "none",
    mask: Tensor | None = None,
) -> Tensor:
    """KL estimate of each token, of the shape of `logprobs`, float32 (float64 for float64 inputs).

    Gradients flow to `logprobs` and `ref_logprobs`. estimator: one of ESTIMATORS. clamp: one of CLAMPS.
    mask: bool; a False token gives 0 and gradient 0 whatever it holds, NaN included.
    Adding coefficient * estimate to a loss that is minimised pulls the policy towards the reference.
    """
    op = "kl_estimates"
    require_floating(op, "logprobs", logprobs)
    require_floating(op, "ref_logprobs", ref_logprobs, shape=tuple(logprobs.shape))
    require(estimator in ESTIMATORS, op, "estimator", f"one of {', '.join(ESTIMATORS)}", estimator)
    require(clamp in CLAMPS, op, "clamp", f"one of {', '.join(CLAMPS)}", clamp)
    require_mask(op, "mask", mask, tuple(logprobs.shape), logprobs.device)
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    d = ref_logprobs.to(dtype) - logprobs.to(dtype)
    if mask is not None:
        d = torch.where(mask, d, 0.0)
    bound, output_bound = CLAMPS[clamp]
    if bound is not None:
        d = d.clamp(-bound, bound)
    value = _estimate(d, estimator.removesuffix("+"))
    if output_bound is not None:
        value = value.clamp(-output_bound, output_bound)
    if estimator.endswith("+"):
        k2 = _estimate(d, "k2")
        value = k2 + (value - k2).detach()
    return value
