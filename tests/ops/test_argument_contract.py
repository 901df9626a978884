"""Wrong arguments: one Python error each that names op, argument, what was expected and what came. No kernel runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import zs_kernels
from zs_kernels import PolicyLossSettings

N, H, V, S = 6, 8, 11, 3
BOUNDS = torch.tensor([0, 2, 3, 6])


def numbers(*shape: int) -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape)


def index(*shape: int, limit: int = V) -> torch.Tensor:
    return (torch.arange(math.prod(shape)) % limit).reshape(shape)


MASK = torch.tensor([True, False, True, True, True, True])

GOOD: dict[str, dict[str, Any]] = {
    "token_logprobs": {
        "logits": numbers(N, V), "index": index(N), "temperature": 0.7, "mask": MASK, "softcap": 3.0,
        "bias": numbers(V), "top_k": 2,
    },
    "linear_logprobs": {
        "hidden": numbers(N, H), "weight": numbers(V, H), "index": index(N), "temperature": 0.7, "mask": MASK,
        "softcap": 3.0, "bias": numbers(V), "workspace_bytes": 4096, "mask_count": 5,
    },
    "linear_policy_loss": {
        "hidden": numbers(N, H), "weight": numbers(V, H), "index": index(N), "old_logprobs": numbers(N),
        "advantages": numbers(N), "weights": numbers(N), "settings": PolicyLossSettings(), "ref_logprobs": numbers(N),
        "importance_weights": numbers(N), "temperature": 0.7, "mask": MASK, "softcap": 3.0, "bias": numbers(V),
        "workspace_bytes": 4096, "mask_count": 5,
    },
    "linear_kl": {
        "hidden": numbers(N, H), "ref_hidden": numbers(N, 4), "weight": numbers(V, H), "ref_weight": numbers(V, 4),
        "temperature": 0.7, "mask": MASK, "workspace_bytes": 4096,
    },
    "policy_loss": {
        "logprobs": numbers(N), "old_logprobs": numbers(N), "advantages": numbers(N), "weights": numbers(N),
        "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "mask": MASK, "form": "gspo", "ratio_cap": 4.0,
        "importance_weights": numbers(N), "ref_logprobs": numbers(N), "kl_estimator": "k3", "kl_clamp": "none",
        "entropy": numbers(N), "cu_seqlens": BOUNDS,
    },
    "value_loss": {
        "values": numbers(N), "old_values": numbers(N), "returns": numbers(N), "weights": numbers(N),
        "clip_range": 0.5, "mask": MASK,
    },
    "gae": {
        "rewards": numbers(N), "values": numbers(N), "mask": MASK, "cu_seqlens": BOUNDS, "gamma": 0.9, "lam": 0.9,
        "mode": "carry",
    },
    "group_advantages": {
        "rewards": numbers(S), "groups": index(S, limit=2), "num_groups": 2, "mode": "grpo",
        "valid": torch.ones(S, dtype=torch.bool), "eps": 1e-6, "ddof": 1,
    },
    "kl_estimates": {
        "logprobs": numbers(N), "ref_logprobs": numbers(N), "estimator": "k3", "clamp": "none", "mask": MASK,
    },
    "masked_mean": {"values": numbers(N), "mask": MASK, "denominator": 3.0},
    "masked_var": {"values": numbers(N), "mask": MASK, "ddof": 1},
    "masked_whiten": {"values": numbers(N), "mask": MASK, "ddof": 1},
}  # fmt: skip

OPTIONAL = {
    "mask", "softcap", "bias", "workspace_bytes", "mask_count", "ref_logprobs", "importance_weights", "dual_clip",
    "ratio_cap", "entropy", "old_values", "clip_range", "valid", "old_logprobs", "eps", "denominator", "ddof",
}  # fmt: skip
NAMES = {"form", "kl_estimator", "kl_clamp", "mode", "estimator", "clamp"}
LIMITS = {"index": V, "groups": 2}
SHAPES_THAT_DECIDE = {"logits", "hidden", "ref_hidden", "logprobs", "values", "rewards", "weight", "ref_weight"}
"""Arguments whose own shape is the measure of others: a wrong size there is another argument's mistake."""


GOOD_AFTER_ALL = {
    ("group_advantages", "num_groups", "too_many"),  # groups without members
    ("gae", "cu_seqlens", "none"),  # padded rows; then it is the rewards that have the wrong shape
}


def wrong_tensors(op: str, name: str, good: torch.Tensor) -> Iterator[tuple[str, Any]]:
    yield "text", "x"
    yield "list", [1.0]
    yield "complex", good.to(torch.complex64)
    if name not in SHAPES_THAT_DECIDE:
        yield "longer", torch.cat([good, good[:1]])
        yield "no_rank", good.flatten()[0]
        if not (op == "token_logprobs" and name == "index"):  # [N, K] is a good index there
            yield "rank", good[:, None]
        yield "elsewhere", good.to("meta")
    elif good.dim() == 2:
        yield "flat", good[0]
        yield "rank", good[None]
    if good.dtype == torch.bool:
        yield "uint8", good.to(torch.uint8)
        yield "float", good.float()
    elif good.is_floating_point():
        yield "int64", good.long()
        yield "bool", good > 0
    else:
        yield "float", good.float()
        yield "int16", good.to(torch.int16)
        yield "bool", good > 0
        if name in LIMITS:
            for wrong in (-1, LIMITS[name], 2**40, -(2**62)):
                yield f"value{wrong}", torch.full_like(good, wrong)
        else:
            yield "falls", good.flip(0)
            yield "below", good - 1


def wrong_numbers(name: str, good: float) -> Iterator[tuple[str, Any]]:
    yield "text", "x"
    if name in ("top_k", "mask_count", "num_groups", "ddof"):
        yield "negative", -1
        yield "too_many", 10**6
        return
    yield "negative", -1.0
    yield "nan", math.nan
    if name not in ("clip_low", "clip_high", "gamma", "lam"):
        yield "zero", 0
    if name in ("gamma", "lam"):
        yield "above", 1.5
    if name == "dual_clip":
        yield "one", 1.0


def cases() -> Iterator[Any]:
    for op, good in GOOD.items():
        for name, value in good.items():
            if isinstance(value, torch.Tensor):
                wrong = list(wrong_tensors(op, name, value))
            elif name in NAMES:
                wrong = [("nonsense", "nonsense"), ("number", 3)]
            elif isinstance(value, PolicyLossSettings):
                wrong = [(f"{k}", value._replace(**{k: v})) for k, v in {"form": "x", "kl_estimator": "x"}.items()]
            else:
                wrong = list(wrong_numbers(name, value))
            if name not in OPTIONAL and not isinstance(value, PolicyLossSettings):
                wrong.append(("none", None))
            for label, bad in wrong:
                if (op, name, label) in GOOD_AFTER_ALL:
                    continue
                yield pytest.param(op, name, bad, id=f"{op}-{name}-{label}")


CASES = list(cases())


def call(op: str, **changed: Any) -> Any:
    function: Callable[..., Any] = getattr(zs_kernels, op)
    arguments = GOOD[op] | changed
    if op == "gae":
        arguments.setdefault("cu_seqlens", BOUNDS)
    return function(**arguments)


@pytest.mark.parametrize("op", GOOD)
def test_the_good_arguments_are_good(op):
    call(op)


@pytest.mark.parametrize("op, name, bad", CASES)
def test_a_wrong_argument_is_named(op, name, bad):
    wanted = re.escape(op) + r": argument '\w+' must .*, got "
    with pytest.raises((ValueError, TypeError, IndexError), match=wanted) as caught:
        call(op, **{name: bad})
    said = re.search(r"argument '(\w+)'", str(caught.value))[1]
    assert said == name or name == "settings", caught.value


def test_there_are_three_hundred_of_them_and_no_kernel_runs():
    assert len(CASES) >= 300
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for case in CASES:
            op, name, bad = case.values
            with pytest.raises((ValueError, TypeError, IndexError)):
                call(op, **{name: bad})
    assert not [event.key for event in seen.key_averages() if "zs_native" in event.key]
