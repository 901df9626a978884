"""The policy loss of one token, written once for torch and once for Triton (csrc/include/zs_policy_loss.h: for C++).

    l       = log ratio, bounded to [min_log_ratio, max_log_ratio];   ratio = exp(l)
    ppo     policy = max(-min(ratio, ratio_cap) A, -clip(ratio, 1 - clip_low, 1 + clip_high) A)
            and, with dual_clip, at most -dual_clip A where A < 0
    gspo    the same with the log ratio averaged over the token's sequence; the derivative is that of this token alone
    cispo      policy = -stop(clip(ratio, 1 - clip_low, 1 + clip_high)) A logprob
    cispo_cap  policy = -stop(min(ratio, ratio_cap)) A logprob
    reinforce  policy = -A logprob
    loss    = weight * (importance * policy + kl_coefficient * kl - entropy_coefficient * entropy)

A is the advantage, stop() holds back the gradient. The derivatives by logprob and entropy come with the values: at a
point where two branches meet (a ratio exactly on a bound) it is that of the unclipped branch.
Sources: arXiv:1707.06347 (clip), 1912.09729 (dual clip), 2503.14476 (separate bounds), 2505.07291 (ratio cap),
2507.18071 (GSPO), 2506.13585 (CISPO); kl_estimates.py has the KL estimators.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import require, require_number, require_positive
from zs_kernels._triton import tl, triton
from zs_kernels.kl_estimates import ESTIMATORS, clamp_bounds, kl_code, kl_parts_kernel, kl_parts_reference

FORMS = ("ppo", "gspo", "cispo", "cispo_cap", "reinforce")

METRICS = (
    "token_count",
    "ratio_sum",
    "log_ratio_sum",
    "clipped_low",
    "clipped_high",
    "clipped_dual",
    "capped",
    "clamped_count",
    "kl_sum",
    "kl_clamped_count",
    "entropy_sum",
    "policy_sum",
    "ratio_max",
)
"""Sums over counted (unmasked) tokens in the order of the metric vector; the last is a maximum (0 without tokens).

clipped_low, clipped_high: ratio below / above the band where the clip is what counts (ppo, gspo: A < 0 / A > 0; cispo:
any A). clipped_dual: cut by dual_clip. capped: ratio above ratio_cap. clamped_count: log ratio outside its bounds.
kl_sum, kl_clamped_count: KL estimates (unweighted) and how many a clamp changed. policy_sum: weight * importance *
policy, the loss without KL and entropy.
"""
N_METRICS = len(METRICS)


class PolicyLossSettings(NamedTuple):
    """What the loss is, in plain numbers. Module docstring: the formulas."""

    form: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio_cap: float | None = None
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    kl_clamp: str = "none"
    entropy_coefficient: float = 0.0
    min_log_ratio: float = -20.0
    max_log_ratio: float = 20.0


def check_settings(op: str, settings: PolicyLossSettings, *, has_ref: bool, has_entropy: bool) -> None:
    """Raise ValueError for settings that mean nothing, or that need a tensor which was not given."""
    s = settings
    require(s.form in FORMS, op, "form", f"one of {', '.join(FORMS)}", s.form)
    for name in ("clip_low", "clip_high", "kl_coefficient", "entropy_coefficient"):
        require_number(op, name, getattr(s, name), low=0.0 if name.startswith("clip") else -math.inf)
    clips = s.form in ("ppo", "gspo")
    if s.dual_clip is not None:
        require(clips, op, "dual_clip", "None for this form", s.dual_clip)
        require_number(op, "dual_clip", s.dual_clip)
        require(s.dual_clip > 1.0, op, "dual_clip", "above 1", s.dual_clip)
    if s.ratio_cap is not None:
        require(clips or s.form == "cispo_cap", op, "ratio_cap", "None for this form", s.ratio_cap)
        require_positive(op, "ratio_cap", s.ratio_cap)
    require(s.form != "cispo_cap" or s.ratio_cap is not None, op, "ratio_cap", "a number (form cispo_cap)", s.ratio_cap)
    require(s.min_log_ratio < s.max_log_ratio, op, "min_log_ratio", "below max_log_ratio", s.min_log_ratio)
    require(s.kl_estimator in ESTIMATORS, op, "kl_estimator", f"one of {', '.join(ESTIMATORS)}", s.kl_estimator)
    clamp_bounds(op, s.kl_clamp, s.kl_estimator, argument="kl_clamp")
    require(s.kl_coefficient == 0.0 or has_ref, op, "ref_logprobs", "given where kl_coefficient is not 0", None)
    require(s.entropy_coefficient == 0.0 or has_entropy, op, "entropy", "given with entropy_coefficient", None)


class TokenTerms(NamedTuple):
    """loss [N] times weight, its derivatives by log-probability [N] and entropy ([N], or [0] with coefficient 0), and
    the metric sums [N_METRICS] in the order of METRICS; float32 (float64 for float64 log-probabilities)."""

    loss: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor
    metrics: Tensor


def _policy_reference(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, s: PolicyLossSettings
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(policy, its derivative by logprob, metrics per token)."""
    bounded = log_ratio.clamp(s.min_log_ratio, s.max_log_ratio)
    ratio = bounded.exp()
    low, high = ratio < 1.0 - s.clip_low, ratio > 1.0 + s.clip_high
    capped = torch.zeros_like(low) if s.ratio_cap is None else ratio > s.ratio_cap
    none = torch.zeros_like(low)
    clamped = (log_ratio < s.min_log_ratio) | (log_ratio > s.max_log_ratio)
    metrics = {"ratio_sum": ratio, "log_ratio_sum": bounded, "clamped_count": clamped, "capped": capped}
    if s.form == "reinforce":
        metrics |= {"clipped_low": none, "clipped_high": none, "clipped_dual": none}
        return -advantages * logprobs, -advantages, metrics
    cut = ratio if s.ratio_cap is None else ratio.clamp(max=s.ratio_cap)
    clipped = ratio.clamp(1.0 - s.clip_low, 1.0 + s.clip_high)
    if s.form in ("cispo", "cispo_cap"):
        metrics |= {"clipped_low": low, "clipped_high": high} if s.form == "cispo" else {}
        used = -(clipped if s.form == "cispo" else cut) * advantages
        return used * logprobs, used, {"clipped_low": none, "clipped_high": none, "clipped_dual": none} | metrics
    # max(-a A, -b A) = -A (the larger of a, b where A < 0, else the smaller): one product, the same bits.
    negative = advantages < 0
    used = torch.where(negative, torch.maximum(cut, clipped), torch.minimum(cut, clipped))
    beyond = none
    if s.dual_clip is not None:
        beyond = negative & (used > s.dual_clip)
        used = torch.where(beyond, s.dual_clip, used)
    metrics |= {"clipped_low": low & negative, "clipped_high": high & (advantages > 0), "clipped_dual": beyond}
    policy = -advantages * used
    moved = (used < ratio) | (used > ratio) | clamped  # all False for NaN, which must come through
    return policy, torch.where(moved, 0.0, policy), metrics


def policy_terms_reference(
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    mask: Tensor | None,
    settings: PolicyLossSettings,
) -> TokenTerms:
    """The formulas in torch, derivatives included. A masked slot may hold anything: it is selected away first."""
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32

    def read(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        values = values.detach().to(dtype)
        return values if mask is None else torch.where(mask, values, 0.0)

    logprobs, log_ratio, advantages, weights = (read(x) for x in (logprobs, log_ratio, advantages, weights))
    entropy, ref_logprobs, importance_weights = read(entropy), read(ref_logprobs), read(importance_weights)
    counted = torch.ones_like(logprobs) if mask is None else mask.to(dtype)
    policy, slope, metrics = _policy_reference(logprobs, log_ratio, advantages, settings)
    if importance_weights is not None:
        policy, slope = policy * importance_weights, slope * importance_weights
    metrics |= {"token_count": counted, "policy_sum": weights * policy}
    total, s = policy, settings
    if ref_logprobs is not None:
        kl, kl_slope, kl_clamped = kl_parts_reference(ref_logprobs - logprobs, s.kl_estimator, s.kl_clamp)
        metrics |= {"kl_sum": kl, "kl_clamped_count": kl_clamped}
        if s.kl_coefficient != 0.0:
            total, slope = total + s.kl_coefficient * kl, slope + s.kl_coefficient * kl_slope
    grad_entropy = logprobs.new_zeros(0)
    if entropy is not None:
        metrics["entropy_sum"] = entropy
        if s.entropy_coefficient != 0.0:
            total, grad_entropy = total - s.entropy_coefficient * entropy, -s.entropy_coefficient * weights
    zero = logprobs.new_zeros(())
    sums = [(metrics[name].to(dtype) * counted).sum() if name in metrics else zero for name in METRICS[:-1]]
    largest = torch.cat([zero.reshape(1), (metrics["ratio_sum"] * counted).flatten()]).amax()
    return TokenTerms(weights * total, weights * slope, grad_entropy, torch.stack([*sums, largest]))


def policy_terms_arguments(
    settings: PolicyLossSettings, *, has_ref: bool, has_entropy: bool, has_importance: bool
) -> dict[str, Any]:
    """Keyword arguments of `policy_terms_kernel` that follow from the settings; the same for kernels that call it."""
    s = settings
    bound, output_bound = clamp_bounds("policy_loss", s.kl_clamp, s.kl_estimator)
    return {
        "ratio_low": 1.0 - s.clip_low,
        "ratio_high": 1.0 + s.clip_high,
        "dual_clip": 0.0 if s.dual_clip is None else float(s.dual_clip),
        "ratio_cap": 0.0 if s.ratio_cap is None else float(s.ratio_cap),
        "min_log_ratio": float(s.min_log_ratio),
        "max_log_ratio": float(s.max_log_ratio),
        "kl_coefficient": float(s.kl_coefficient),
        "kl_bound": math.inf if bound is None else bound,
        "kl_output_bound": math.inf if output_bound is None else output_bound,
        "entropy_coefficient": float(s.entropy_coefficient),
        "FORM": FORMS.index(s.form),
        "DUAL_CLIP": s.dual_clip is not None,
        "RATIO_CAP": s.ratio_cap is not None,
        "KL": kl_code(s.kl_estimator) if has_ref else 0,
        "STRAIGHT_THROUGH": s.kl_estimator.endswith("+"),
        "ENTROPY": has_entropy,
        "IMPORTANCE": has_importance,
    }


@triton.jit
def policy_terms_kernel(
    logprob, log_ratio, advantage, weight, importance, ref_logprob, entropy, counted,
    ratio_low, ratio_high, dual_clip, ratio_cap, min_log_ratio, max_log_ratio,
    kl_coefficient, kl_bound, kl_output_bound, entropy_coefficient,
    FORM: tl.constexpr, DUAL_CLIP: tl.constexpr, RATIO_CAP: tl.constexpr, KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, ENTROPY: tl.constexpr, IMPORTANCE: tl.constexpr,
):  # fmt: skip
    """The formulas for one block of tokens, or one token as scalars. Called from other kernels.

    logprob .. entropy: float32; log_ratio is logprob - old_logprob (gspo: the sequence's). counted: bool, False for a
    masked slot or one past the end, which may hold anything. Arguments that the constants rule out (importance without
    IMPORTANCE, ref_logprob with KL 0, entropy without ENTROPY) are not read: pass any number. All arguments from
    ratio_low on come from `policy_terms_arguments`.
    Returns (loss, d loss / d logprob, d loss / d entropy, metrics...): weight is in the first three; the metrics follow
    the order of METRICS, float32, 0 where not counted.
    """
    logprob = tl.where(counted, logprob, 0.0)
    log_ratio = tl.where(counted, log_ratio, 0.0)
    advantage = tl.where(counted, advantage, 0.0)
    weight = tl.where(counted, weight, 0.0)
    one = tl.where(counted, 1.0, 0.0)
    clamped = (log_ratio < min_log_ratio) | (log_ratio > max_log_ratio)
    bounded = tl.where(log_ratio < min_log_ratio, min_log_ratio, log_ratio)  # keeps NaN
    bounded = tl.where(log_ratio > max_log_ratio, max_log_ratio, bounded)
    ratio = tl.exp(bounded)
    below, above = ratio < ratio_low, ratio > ratio_high
    clipped = tl.where(below, ratio_low, tl.where(above, ratio_high, ratio))
    cut = ratio
    capped = 0.0 * one
    if RATIO_CAP:
        over = ratio > ratio_cap
        cut = tl.where(over, ratio_cap, ratio)
        capped = tl.where(over, one, 0.0)
    low, high, dual = 0.0 * one, 0.0 * one, 0.0 * one
    if FORM <= 1:  # ppo, gspo
        negative = advantage < 0.0
        smaller, larger = tl.where(clipped < cut, clipped, cut), tl.where(clipped > cut, clipped, cut)
        used = tl.where(negative, larger, smaller)
        if DUAL_CLIP:
            beyond = negative & (used > dual_clip)
            used = tl.where(beyond, dual_clip, used)
            dual = tl.where(beyond, one, 0.0)
        policy = -advantage * used
        slope = tl.where((used < ratio) | (used > ratio) | clamped, 0.0, policy)
        low = tl.where(below & negative, one, 0.0)
        high = tl.where(above & (advantage > 0.0), one, 0.0)
    elif FORM == 2:  # cispo
        slope = -clipped * advantage
        policy = slope * logprob
        low, high = tl.where(below, one, 0.0), tl.where(above, one, 0.0)
    elif FORM == 3:  # cispo_cap
        slope = -cut * advantage
        policy = slope * logprob
    else:  # reinforce
        slope = -advantage
        policy = slope * logprob
    if IMPORTANCE:
        importance = tl.where(counted, importance, 0.0)
        policy *= importance
        slope *= importance
    total = policy
    kl, kl_clamped = 0.0 * one, 0.0 * one
    if KL > 0:
        difference = tl.where(counted, ref_logprob - logprob, 0.0)
        kl, kl_slope, changed = kl_parts_kernel(difference, kl_bound, kl_output_bound, KL, STRAIGHT_THROUGH)
        kl_clamped = tl.where(changed, one, 0.0)
        used_kl = kl_coefficient != 0.0  # 0 * infinity must not reach the loss
        total = tl.where(used_kl, total + kl_coefficient * kl, total)
        slope = tl.where(used_kl, slope + kl_coefficient * kl_slope, slope)
    chaos = 0.0 * one
    if ENTROPY:
        chaos = tl.where(counted, entropy, 0.0)
        total = tl.where(entropy_coefficient != 0.0, total - entropy_coefficient * chaos, total)
    return (
        weight * total, weight * slope, -entropy_coefficient * weight,
        one, ratio * one, bounded * one, low, high, dual, capped, tl.where(clamped, one, 0.0),
        kl, kl_clamped, chaos, weight * policy, ratio * one,
    )  # fmt: skip
