"""One call of each op's own Triton host function at full size: what `bench.ahead_of_time` compiles.

A call takes the number of tokens and makes its tensors on "cuda" (fake ones, see ahead_of_time). Each call stands for
one way a trainer uses the op; a kernel that no call reaches fails the ahead-of-time test.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zs_kernels
from zs_kernels import (
    _gae_triton,
    _group_advantages_triton,
    _linear_tiles,
    _policy_backends,
    _policy_epilogue,
    _reduction_kernels,
)
from zs_kernels import _sweeps as sweeps
from zs_kernels._policy_terms import PolicyLossSettings
from zs_kernels.group_advantages import MODES
from zs_kernels.kl_estimates import _kl_estimates_triton
from zs_kernels.linear_kl import _kl_gradient_triton, _kl_statistics_triton
from zs_kernels.loss_weights import _loss_weights_triton
from zs_kernels.value_loss import _value_terms_triton

Call = Callable[[int], Any]

PACKAGE = Path(zs_kernels.__file__).parent
V = 151_936
"""Vocabulary of Qwen2.5 and Qwen3."""
H = 2048


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor on the GPU that is or is not there."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def logits(rows: int, dtype: torch.dtype = torch.bfloat16, columns: int = V) -> Tensor:
    """[rows, columns]"""
    return made(rows, columns, dtype=dtype)


def tokens(rows: int) -> Tensor:
    """[rows] int64"""
    return made(rows, dtype=torch.int64)


def mask_of(rows: int) -> Tensor:
    """[rows] bool"""
    return made(rows, dtype=torch.bool)


def keep_sets(rows: int) -> tuple[Tensor, Tensor]:
    """(offsets, ids) of 50 tokens a row."""
    return tokens(rows + 1), tokens(50 * rows)


def statistics(rows: int, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    """One sweep over the logits."""
    more = {"inverse_temperature": 1.0, "entropy": True} | more
    return sweeps.sweep_statistics(logits(rows, dtype), tokens(rows), **more)


def gradient(rows: int, dtype: torch.dtype = torch.bfloat16, *, entropy: bool = True, **more: Any) -> None:
    """The backward sweep, out of place unless `out` says otherwise."""
    given = logits(rows, dtype)
    slope, entropies = (made(rows), made(rows)) if entropy else (None, None)
    more = {"inverse_temperature": 1.0, "out": logits(rows)} | more
    sweeps.sweep_gradient(given, tokens(rows), made(rows), slope, made(rows), entropies, **more)


def extras(rows: int) -> dict[str, Any]:
    """Everything that a row of logits can be transformed by."""
    return {"inverse_temperature": made(rows), "bias": made(V), "softcap": 30.0, "mask": mask_of(rows)}


def policy(rows: int, settings: PolicyLossSettings, *, more: bool = True, **options: Any) -> Any:
    """The per-token loss; more: with reference, entropy, importance weights and mask."""
    columns = [made(rows), made(rows), made(rows)] if more else [None, None, None]
    mask = mask_of(rows) if more else None
    terms = [made(rows) for _ in range(4)]
    return _policy_backends._policy_terms_triton(*terms, *columns, mask, settings, **options)


def epilogue(rows: int, settings: PolicyLossSettings, *, more: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The fused head loss's pass over a chunk of logits; more: with everything a token or a row can have."""
    given = logits(rows, dtype)
    out = given if dtype == torch.bfloat16 else logits(rows)
    inverse, bias, softcap = (made(rows), made(V), 30.0) if more else (1.0, None, None)
    columns = [made(rows) for _ in range(5)] if more else [made(rows), made(rows), made(rows), None, None]
    scale = made(1).squeeze(0) if more else None
    return _policy_epilogue._policy_epilogue_triton(
        given, out, tokens(rows), inverse, bias, softcap, *columns, scale, settings
    )


def full_kl(rows: int, *, more: bool = False) -> None:
    """Exact KL over the vocabulary, and the gradient over the policy's logits; more: biases, a temperature by row."""
    given, other = logits(rows), logits(rows)
    bias, ref_bias, inverse = (made(V), made(V), made(rows)) if more else (None, None, 1.0)
    statistics = _kl_statistics_triton(given, other, bias, ref_bias, inverse)
    _kl_gradient_triton(given, other, bias, ref_bias, inverse, statistics, made(rows), given)


def tiles(rows: int, hidden_size: int, *, more: bool = False) -> Any:
    """The head's statistics without logits."""
    hidden, weight = made(rows, hidden_size, dtype=torch.bfloat16), made(V, hidden_size, dtype=torch.bfloat16)
    inverse, bias, softcap = (made(rows), made(V), 30.0) if more else (1.0, None, None)
    return _linear_tiles._tile_partials_triton(hidden, weight, tokens(rows), inverse, bias, softcap)


def advantages(
    rows: int, mode: str, *, length: int = 4096, sequences: int = 1024, more: bool = False, statistics: bool = True
) -> Any:
    """GAE of packed sequences; more: numbers of their own for each sequence."""
    columns = [made(sequences) for _ in range(3)] if more else [None, None, None]
    count = sequences * length
    return _gae_triton._gae_triton(
        made(count), made(count), mask_of(count), tokens(sequences + 1), *columns, 0.99, 0.95, mode, length,
        statistics=statistics,
    )  # fmt: skip


def whitened(count: int, *, merge: bool) -> None:
    """Advantages with mean 0 and variance 1."""
    moments = made(1024, 3) if merge else None
    _gae_triton._whiten_triton(
        made(count), mask_of(count), made(3, dtype=torch.float64), made(count), moments=moments, ddof=1, eps=1e-8,
        shift_mean=True,
    )  # fmt: skip


def groups(sequences: int, mode: str, *, per_token: bool = False, spread: bool = True) -> Any:
    """Group advantages; spread: over the tokens."""
    number = MODES.index(mode)
    count = 2048 * sequences
    bounds, mask = (tokens(sequences + 1), mask_of(count)) if spread else (None, None)
    return _group_advantages_triton._group_advantages_triton(
        made(count if per_token else sequences), tokens(sequences), sequences // 5, number, mask_of(sequences), 1e-6, 1,
        False, mask, bounds, count, per_token,
    )  # fmt: skip


def values(rows: int, *, clip: bool) -> Any:
    """The value loss."""
    old, bound, mask = (made(rows), 0.2, mask_of(rows)) if clip else (None, None, None)
    return _value_terms_triton(made(rows), old, made(rows), made(rows), mask, bound)


def kl(rows: int, estimator: str, clamp: str = "none") -> Any:
    """KL estimates of tokens with their derivatives."""
    return _kl_estimates_triton(made(rows), made(rows), mask_of(rows), estimator, clamp, True, True)


def moments(rows: int, columns: int) -> Any:
    """Masked sums of each row, or of everything."""
    return _reduction_kernels.masked_statistics_triton(made(rows, columns), made(rows, columns, dtype=torch.bool))


def masked_whitened(rows: int, columns: int, *, given: int = 0, shift: bool = True, fill: bool = True) -> Any:
    """Whitening of each row, or of everything; given: so many parts' statistics instead of its own."""
    mask = made(rows, columns, dtype=torch.bool)
    statistics = made(given, 4) if given else None
    return _reduction_kernels.masked_whiten_triton(
        made(rows, columns), mask, statistics, 1e-8, False, 1, shift, fill, 0.0, 0
    )


PPO = PolicyLossSettings(kl_coefficient=0.001, entropy_coefficient=0.01, dual_clip=3.0)
BARE = PolicyLossSettings()

CALLS: dict[str, Call] = {
    "log-probs": lambda rows: statistics(rows, entropy=False),
    "log-probs, entropy": statistics,
    "log-probs, entropy, sum of squares, float32": lambda rows: statistics(rows, torch.float32, sum_squares=True),
    "log-probs of transformed logits": lambda rows: statistics(rows, **extras(rows)),
    "log-probs of few rows": lambda rows: statistics(rows // 128),
    "log-probs within keep sets": lambda rows: statistics(rows, keep=keep_sets(rows)),
    "gradient of log-probs": lambda rows: gradient(rows, entropy=False),
    "gradient with entropy": gradient,
    "gradient of float32 logits into bfloat16": lambda rows: gradient(rows, torch.float32),
    "gradient of transformed logits": lambda rows: gradient(rows, **extras(rows)),
    "gradient within keep sets": lambda rows: gradient(rows, keep=keep_sets(rows)),
    "vocabulary shard": lambda rows: sweeps.sweep_partials(logits(rows, columns=V // 4), tokens(rows), 1.0),
    "fused head loss, PPO": lambda rows: epilogue(rows, BARE, more=False),
    "fused head loss, exact": lambda rows: epilogue(rows, BARE, more=False, dtype=torch.float32),
    "fused head loss, everything": lambda rows: epilogue(rows, PPO, more=True),
    "fused head loss, CISPO": lambda rows: epilogue(rows, PolicyLossSettings(form="cispo"), more=False),
    "fused head loss, scaled": lambda rows: _policy_epilogue._scale_triton(made(V, 512), made(1)),
    "head tiles, hidden 2048": lambda rows: tiles(rows, 2048),
    "head tiles, hidden 896, transformed": lambda rows: tiles(rows, 896, more=True),
    "PPO, bare": lambda rows: policy(rows, BARE, more=False, write_loss=False),
    "PPO with everything": lambda rows: policy(rows, PPO),
    "CISPO": lambda rows: policy(rows, PolicyLossSettings(form="cispo")),
    "REINFORCE": lambda rows: policy(rows, PolicyLossSettings(form="reinforce"), more=False),
    "GSPO's ratios": lambda rows: _policy_backends._sequence_log_ratios_triton(
        made(rows), made(rows), mask_of(rows), tokens(65)
    ),
    "GSPO": lambda rows: policy(rows, PolicyLossSettings(form="gspo"), given_ratios=True),
    "value loss": lambda rows: values(rows, clip=False),
    "value loss, clipped": lambda rows: values(rows, clip=True),
    "k1": lambda rows: kl(rows, "k1"),
    "k3, straight through, clamped": lambda rows: kl(rows, "k3+", "verl"),
    "GAE, carried": lambda rows: advantages(rows, "carry"),
    "GAE, classic, numbers by sequence": lambda rows: advantages(rows, "classic", more=True, statistics=False),
    "GAE, few long sequences": lambda rows: advantages(rows, "carry", length=1 << 17, sequences=8),
    "GAE statistics": lambda rows: _gae_triton._statistics_triton(made(1024, 3)),
    "GAE whitened": lambda rows: whitened(1 << 22, merge=True),
    "GAE whitened with given statistics": lambda rows: whitened(1 << 22, merge=False),
    "masked moments of everything": lambda rows: moments(1, 512 * rows),
    "masked moments of rows": lambda rows: moments(rows, 2048),
    "whitening of everything": lambda rows: masked_whitened(1, 512 * rows),
    "whitening of rows, mean kept": lambda rows: masked_whitened(rows, 2048, shift=False, fill=False),
    "whitening with other ranks' moments": lambda rows: masked_whitened(1, 512 * rows, given=8),
    "head's KL": lambda rows: full_kl(rows),
    "head's KL, with biases and temperatures": lambda rows: full_kl(rows, more=True),
    "loss weights": lambda rows: _loss_weights_triton(mask_of(rows), tokens(65), "token-mean", None, None, 0.0, 1.0),
    "loss weights, given counts": lambda rows: _loss_weights_triton(
        mask_of(rows), tokens(65), "seq-mean-token-mean", made(1), made(1), 2048.0, 0.5
    ),
    "GRPO over tokens": lambda rows: groups(1280, "grpo"),
    "RLOO of trajectories": lambda rows: groups(1280, "rloo", spread=False),
    "REINFORCE++ from token rewards": lambda rows: groups(1280, "reinforce++", per_token=True),
}


def jit_functions() -> set[Any]:
    """Every @triton.jit function of the package."""
    from triton.runtime.jit import JITFunction

    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        if "triton.jit" in file.read_text(encoding="utf-8"):
            name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
            values = vars(importlib.import_module(name)).values()
            found |= {one for one in values if isinstance(one, JITFunction) and one.fn.__module__ == name}
    return found


def called_by(function: Any) -> set[Any]:
    """The @triton.jit functions that one of them names in its body."""
    from triton.runtime.jit import JITFunction

    names = function.fn.__code__.co_names
    return {value for name in names if isinstance(value := function.fn.__globals__.get(name), JITFunction)}


def never_reached(launched: Iterable[Any]) -> list[str]:
    """A line for each @triton.jit function of the package that is neither launched nor called by one that is."""
    reached: set[Any] = set()
    queue = list(launched)
    while queue:
        function = queue.pop()
        if function not in reached:
            reached.add(function)
            queue += called_by(function)
    return [
        f"{function.fn.__module__}.{function.fn.__name__}: no call of bench/kernel_calls.py reaches this kernel"
        for function in sorted(jit_functions() - reached, key=lambda f: (f.fn.__module__, f.fn.__name__))
    ]
