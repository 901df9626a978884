"""Every form and option of policy_loss on every backend, against the formula in float64 under autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from zs_kernels import policy_loss
from zs_kernels._device import native_status, use_backend
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.kl_estimates import kl_estimates
from zs_kernels.policy_loss import METRICS, PolicyLossSettings, token_terms
from zs_kernels.testing import assert_no_worse_than_torch, poison_empty, seeded

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")),
]


def sequence_bounds(count: int) -> Tensor:
    """Sequences of uneven length, an empty one among them."""
    cuts = sorted({0, count // 5, count // 5 + 1, count // 2, count})
    return torch.tensor([*cuts[:2], *cuts[1:]], dtype=torch.int32)


def plain(columns: dict[str, Tensor], mask: Tensor | None, bounds: Tensor, options: dict) -> tuple[Tensor, dict]:
    """(per-token loss times weight, some metrics) from the formulas, differentiable; masked tokens are left out."""
    keep = torch.ones_like(columns["logprobs"], dtype=torch.bool) if mask is None else mask
    o = PolicyLossSettings()._asdict() | options
    total, metrics = torch.zeros((), dtype=columns["logprobs"].dtype), dict.fromkeys(METRICS, 0.0)
    for begin, end in itertools.pairwise(bounds.tolist()):
        piece = {name: value[begin:end][keep[begin:end]] for name, value in columns.items()}
        lp, a, w = piece["logprobs"], piece["advantages"], piece["weights"]
        log_ratio = lp - piece["old_logprobs"]
        if o["form"] == "gspo" and len(lp):
            log_ratio = lp - lp.detach() + log_ratio.mean().detach()
        log_ratio = log_ratio.clamp(o["min_log_ratio"], o["max_log_ratio"])
        ratio = log_ratio.exp()
        low, high = 1 - o["clip_low"], 1 + o["clip_high"]
        capped = ratio if o["ratio_cap"] is None else ratio.clamp(max=o["ratio_cap"])
        if o["form"] in ("ppo", "gspo"):
            loss = torch.maximum(-a * capped, -a * ratio.clamp(low, high))
            if o["dual_clip"] is not None:
                metrics["clipped_dual"] += int(((a < 0) & (loss > -o["dual_clip"] * a)).sum())
                loss = torch.where(a < 0, torch.minimum(loss, -o["dual_clip"] * a), loss)
            metrics["clipped_low"] += int(((ratio < low) & (a < 0)).sum())
            metrics["clipped_high"] += int(((ratio > high) & (a > 0)).sum())
        elif o["form"] == "cispo":
            loss = -ratio.clamp(low, high).detach() * a * lp
            metrics["clipped_low"] += int((ratio < low).sum())
            metrics["clipped_high"] += int((ratio > high).sum())
        elif o["form"] == "cispo_cap":
            loss = -capped.detach() * a * lp
        else:
            loss = -a * lp
        if "importance_weights" in piece:
            loss = loss * piece["importance_weights"]
        metrics["policy_sum"] += float((w * loss).sum().detach())
        if "ref_logprobs" in piece:
            kl = kl_estimates(lp, piece["ref_logprobs"], estimator=o["kl_estimator"], clamp=o["kl_clamp"])
            loss = loss + o["kl_coefficient"] * kl
            metrics["kl_sum"] += float(kl.sum().detach())
        if "entropy" in piece:
            loss = loss - o["entropy_coefficient"] * piece["entropy"]
            metrics["entropy_sum"] += float(piece["entropy"].sum().detach())
        total = total + (w * loss).sum()
        metrics["token_count"] += len(lp)
        metrics["ratio_sum"] += float(ratio.sum().detach())
        metrics["log_ratio_sum"] += float(log_ratio.sum().detach())
        metrics["capped"] += 0 if o["ratio_cap"] is None else int((ratio > o["ratio_cap"]).sum())
        metrics["ratio_max"] = max([metrics["ratio_max"], *ratio.tolist()])
    return total, metrics


def batch(count: int, *, scale: float = 0.5, extra: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Columns in float32 whose log ratios differ by `scale`; advantages and weights of both signs, some 0."""
    logprobs = -seeded(count, seed=1).abs() * 2
    columns = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + scale * seeded(count, seed=2),
        "advantages": seeded(count, seed=3) * (torch.arange(count) % 7 != 3),
        "weights": seeded(count, seed=4) / max(count, 1),
        "ref_logprobs": logprobs + scale * seeded(count, seed=5),
        "entropy": seeded(count, seed=6).abs(),
        "importance_weights": seeded(count, seed=7).abs(),
    }
    return {name: columns[name] for name in ("logprobs", "old_logprobs", "advantages", "weights", *extra)}


ALL = ("ref_logprobs", "entropy", "importance_weights")
CASES: dict[str, tuple[dict, tuple[str, ...]]] = {
    "ppo": ({}, ()),
    "ppo-asymmetric-dual-cap": ({"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 1.6, "ratio_cap": 1.4}, ()),
    "ppo-cap-inside-clip": ({"clip_high": 0.5, "ratio_cap": 1.1}, ()),
    "ppo-tight-log-ratio": ({"min_log_ratio": -0.3, "max_log_ratio": 0.2, "clip_low": 0.5, "clip_high": 0.5}, ()),
    "ppo-all": ({"dual_clip": 3.0, "kl_coefficient": 0.3, "kl_clamp": "verl", "entropy_coefficient": 0.2}, ALL),
    "gspo": ({"form": "gspo", "clip_low": 0.05, "clip_high": 0.03, "max_log_ratio": 10.0}, ()),
    "gspo-all": ({"form": "gspo", "clip_low": 0.1, "kl_coefficient": 0.3, "entropy_coefficient": 0.2}, ALL),
    "cispo": ({"form": "cispo", "clip_low": 0.3, "clip_high": 0.2}, ()),
    "cispo-cap": ({"form": "cispo_cap", "ratio_cap": 1.3, "kl_coefficient": 0.1}, ALL),
    "reinforce": ({"form": "reinforce", "entropy_coefficient": 0.1}, ALL),
    **{
        f"kl-{name}": ({"kl_coefficient": 0.7, "kl_estimator": name, "kl_clamp": "nemo"}, ("ref_logprobs",))
        for name in ("k1", "k2", "k3", "abs", "k1+", "k3+")
    },
}


def run(columns: dict[str, Tensor], options: dict, mask: Tensor | None, bounds: Tensor) -> tuple:  # type: ignore[type-arg]
    """(result, gradient by logprobs, gradient by entropy or None) for an upstream gradient of -1.7."""
    columns = {name: value.clone().requires_grad_() for name, value in columns.items()}
    sequences = {"cu_seqlens": bounds} if options.get("form") == "gspo" else {}
    result = policy_loss(**columns, **options, mask=mask, **sequences)
    (-1.7 * result.loss).backward()
    for name, value in columns.items():
        assert name in ("logprobs", "entropy") or value.grad is None, name
    entropy = columns.get("entropy")
    return result, columns["logprobs"].grad, None if entropy is None else entropy.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 257])
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_metrics(case: str, count: int, masked: bool, backend: str) -> None:
    options, extra = CASES[case]
    columns, bounds = batch(count, extra=extra), sequence_bounds(count)
    mask = torch.arange(count) % 3 != 1 if masked else None
    exact_columns = {name: value.double().requires_grad_() for name, value in columns.items()}
    loss, metrics = plain(exact_columns, mask, bounds, options)
    (-1.7 * loss).backward()
    torch_columns = {name: value.clone().requires_grad_() for name, value in columns.items()}
    torch_loss, _ = plain(torch_columns, mask, bounds, options)
    (-1.7 * torch_loss).backward()
    if masked:
        columns = {name: torch.where(mask, value, float("nan")) for name, value in columns.items()}
    with use_backend(backend), poison_empty():
        result, by_logprobs, by_entropy = run(columns, options, mask, bounds)
    assert_no_worse_than_torch(result.loss, torch_loss, loss, floor=1e-6, name="loss")
    grads = [("logprobs", by_logprobs)] + ([("entropy", by_entropy)] if options.get("entropy_coefficient") else [])
    for name, found in grads:
        assert_no_worse_than_torch(
            found, torch_columns[name].grad, exact_columns[name].grad, floor=1e-6, name=f"gradient by {name}"
        )
        if mask is not None:
            assert (found[~mask] == 0).all()
    for name, expected in metrics.items():
        if name not in ("clamped_count", "kl_clamped_count"):
            assert float(getattr(result, name)) == pytest.approx(expected, rel=2e-6, abs=2e-6), name
