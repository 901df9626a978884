"""Generalised advantage estimation over packed sequences, with what stands between the policy's tokens transparent.

    delta[n]     = rewards[n] + gamma * values[next(n)] - values[n]
    advantage[n] = delta[n] + gamma * lam * advantage[next(n)]
    returns[n]   = advantage[n] + values[n]

N = packed tokens, S = sequences. Past the last token of a sequence the value is `bootstrap` (0 unless given: the
episode ended; a cut-off one has the value of its last state) and the advantage 0. What a masked token (a retrieved
document, the prompt, padding) does is the `mode`, called by what it does or by who does it:

    carry        transparent: next(n) is the next unmasked token               verl, nemo_rl       (the default)
    zero         a step whose reward and value are 0                           openrlhf
    classic      a step like any other, only its results are left out          trl (its PPO loop)
    all_actions  nothing is masked: documents are the policy's actions         zerosearch

Results are 0 at masked tokens, whose rewards and values are not read in modes carry and zero: NaN may stand there.
Whitening takes the mean off the advantages and divides by sqrt(variance + eps), both over all unmasked tokens; its
statistics (count, mean, sum of squared distances from the mean) come with the advantages.

Backends: the reference and C++ sum in float64 from the last token to the first, with equal results; C++ runs eight
sequences at a time. Triton scans blocks of tokens in float32 (_gae_triton.py): its error against float64 is a few
roundings of the largest value or return, and grows with the logarithm of the length where a float32 loop's grows with
the length. One launch, a second one for whitening.
Source: arXiv:1506.02438, equations 11 and 16.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_integers, require_mask, require_number, require_tensor
from zs_kernels._device import backend_of
from zs_kernels._gae_triton import MERGED_AT_ONCE, _gae_triton, _statistics_triton, _whiten_triton

MODES = ("carry", "zero", "classic")
"""In the order that the kernels count; all_actions is classic without a mask."""
MODE_OF = {mode: mode for mode in (*MODES, "all_actions")} | {
    "verl": "carry",
    "nemo_rl": "carry",
    "openrlhf": "zero",
    "trl": "classic",
    "zerosearch": "all_actions",
}


class GaeWithStatistics(NamedTuple):
    advantages: Tensor
    """[N] or [B, T] float32"""
    returns: Tensor
    """[N] or [B, T] float32"""
    statistics: Tensor
    """[3] float64: how many unmasked advantages, their mean, the sum of their squared distances from it; before any
    whitening. Those of several ranks merge with merge_statistics."""


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    bootstrap: Tensor | None = None,
    mode: str = "carry",
) -> tuple[Tensor, Tensor]:
    """What the op means, one step at a time for all sequences; float64. Every faster path answers to it."""
    mode = MODE_OF[mode]
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    N = rewards.numel()
    counts = torch.ones(N, dtype=torch.bool, device=rewards.device) if mask is None or mode == "all_actions" else mask
    next_value = torch.zeros(begin.shape, dtype=torch.float64, device=rewards.device)
    if bootstrap is not None:
        next_value = bootstrap.double()
    gamma, lam = (given.double() if isinstance(given, Tensor) else given for given in (gamma, lam))
    advantage = torch.zeros_like(next_value)
    advantages, returns = rewards.new_zeros(2, N + 1, dtype=torch.float64)  # the last slot takes what is left out
    for step in range(int((end - begin).max()) if N else 0):
        here = end - 1 - step >= begin
        n = torch.where(here, end - 1 - step, 0)
        counted = counts[n] & here
        reward, value = rewards[n].double(), values[n].double()
        if mode in ("carry", "zero"):
            reward, value = torch.where(counted, reward, 0.0), torch.where(counted, value, 0.0)
        stepped = counted if mode == "carry" else here
        delta = reward + gamma * next_value - value
        advantage = torch.where(stepped, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(stepped, value, next_value)
        slot = torch.where(counted, n, N)
        advantages[slot], returns[slot] = advantage, advantage + value
    return advantages[:N], returns[:N]


def statistics_reference(advantages: Tensor, mask: Tensor | None) -> Tensor:
    """[3] float64: count, mean and sum of squared distances from it, over the unmasked numbers."""
    numbers = advantages.double()
    counted = torch.ones_like(numbers, dtype=torch.bool) if mask is None else mask
    count = counted.sum(dtype=torch.float64)
    mean = torch.where(counted, numbers, 0.0).sum() / count.clamp(min=1.0)
    return torch.stack([count, mean, torch.where(counted, numbers - mean, 0.0).square().sum()])


def whiten_reference(
    advantages: Tensor, mask: Tensor | None, statistics: Tensor, *, ddof: int, eps: float, shift_mean: bool
) -> Tensor:
    """float64: (advantage - mean) / sqrt(variance + eps), the mean put back unless `shift_mean`; 0 where masked."""
    count, mean, squares = statistics.double().unbind()
    whitened = (advantages.double() - mean) * (squares / (count - ddof).clamp(min=1.0) + eps).rsqrt()
    whitened = whitened if shift_mean else whitened + mean
    return whitened if mask is None else torch.where(mask, whitened, 0.0)


def check_bounds(op: str, cu_seqlens: Tensor, N: int, max_seqlen: int = 0) -> None:
    """Read the bounds, on the CPU or in checked mode: the loops rely on them."""
    if cu_seqlens.device.type != "cpu" and os.environ.get("ZS_KERNELS_CHECKED") != "1":
        return
    lengths = cu_seqlens.diff()
    good = int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == N and bool((lengths >= 0).all())
    require(good, op, "cu_seqlens", f"bounds that rise from 0 to {N}", cu_seqlens.tolist() if not good else None)
    if max_seqlen and lengths.numel():
        longest = int(lengths.max())
        require(longest <= max_seqlen, op, "max_seqlen", f"at least the longest sequence, {longest}", max_seqlen)


@torch.library.custom_op("zs_kernels::gae", mutates_args=())
def _gae_op(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    gammas: Tensor | None,
    lams: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    mode: str,
    max_seqlen: int,
    statistics: bool,
    whiten: bool,
    ddof: int,
    eps: float,
    shift_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """advantages, returns [N] float32, statistics [3] float64 ([0] when neither they nor whitening are asked for)."""
    check_bounds("gae", cu_seqlens, rewards.numel(), max_seqlen)
    backend = backend_of(rewards, values, mask, cu_seqlens, gammas, lams, bootstrap)
    moments_too = statistics or whiten
    found = rewards.new_empty(0, dtype=torch.float64)
    if backend == "triton":
        advantages, returns, moments = _gae_triton(
            rewards, values, mask, cu_seqlens, gammas, lams, bootstrap, gamma, lam, mode, max_seqlen,
            statistics=moments_too,
        )  # fmt: skip
        merging = whiten and moments.shape[0] <= MERGED_AT_ONCE
        if moments_too:
            found = found.new_empty(3) if merging else _statistics_triton(moments)
        if whiten:
            _whiten_triton(
                advantages, mask, found, advantages, moments=moments if merging else None, ddof=ddof, eps=eps,
                shift_mean=shift_mean,
            )  # fmt: skip
        return advantages, returns, found
    if backend == "native":
        floats = [None if given is None else given.float() for given in (gammas, lams, bootstrap)]
        advantages, returns, found = torch.ops.zs_native.gae(
            rewards.float(),
            values.float(),
            mask,
            cu_seqlens.long(),
            gamma,
            lam,
            *floats,
            MODES.index(mode),
            moments_too,
        )
        if whiten:
            torch.ops.zs_native.whiten_advantages(advantages, mask, found, ddof, eps, shift_mean, advantages)
        return advantages, returns, found
    gamma_given, lam_given = gamma if gammas is None else gammas, lam if lams is None else lams
    exact = gae_reference(
        rewards, values, mask, cu_seqlens, gamma=gamma_given, lam=lam_given, bootstrap=bootstrap, mode=mode
    )
    advantages, returns = (given.float() for given in exact)
    if moments_too:
        found = statistics_reference(advantages, mask)
    if whiten:
        advantages = whiten_reference(advantages, mask, found, ddof=ddof, eps=eps, shift_mean=shift_mean).float()
    return advantages, returns, found


@_gae_op.register_fake
def _(rewards, values, mask, cu_seqlens, gammas, lams, bootstrap, gamma, lam, mode, max_seqlen, statistics, whiten, ddof, eps, shift_mean):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    made = torch.empty_like(rewards, dtype=torch.float32, memory_format=torch.contiguous_format)
    return made, torch.empty_like(made), rewards.new_empty(3 if statistics or whiten else 0, dtype=torch.float64)


@torch.library.custom_op("zs_kernels::whiten_advantages", mutates_args=())
def _whiten_op(
    advantages: Tensor, mask: Tensor | None, statistics: Tensor, ddof: int, eps: float, shift_mean: bool
) -> Tensor:
    """[N] float32."""
    backend = backend_of(advantages, mask)
    if backend == "reference":
        exact = whiten_reference(advantages, mask, statistics, ddof=ddof, eps=eps, shift_mean=shift_mean)
        return exact.float()
    out = torch.empty(advantages.shape, dtype=torch.float32, device=advantages.device)
    if backend == "triton":
        _whiten_triton(advantages, mask, statistics, out, moments=None, ddof=ddof, eps=eps, shift_mean=shift_mean)
    else:
        given = advantages.float().contiguous()
        torch.ops.zs_native.whiten_advantages(given, mask, statistics.contiguous(), ddof, eps, shift_mean, out)
    return out


@_whiten_op.register_fake
def _(advantages, mask, statistics, ddof, eps, shift_mean):  # type: ignore[no-untyped-def]
    return torch.empty_like(advantages, dtype=torch.float32, memory_format=torch.contiguous_format)


def _run(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None,
    mode: str,
    max_seqlen: int,
    statistics: bool,
    whiten: bool,
    ddof: int,
    eps: float,
    shift_mean: bool,
) -> GaeWithStatistics:
    """Check, flatten padded rows, call the operator."""
    require_floating("gae", "rewards", rewards)
    if cu_seqlens is None:
        require(rewards.dim() == 2, "gae", "rewards", "of shape [B, T] when there is no cu_seqlens", rewards)
    else:
        require(rewards.dim() == 1, "gae", "rewards", "packed, of shape [N]", rewards)
    require_floating("gae", "values", values, shape=tuple(rewards.shape))
    require(values.device == rewards.device, "gae", "values", "on the device of rewards", values)
    require_mask("gae", "mask", mask, tuple(rewards.shape), rewards.device)
    require(mode in MODE_OF, "gae", "mode", f"one of {', '.join(MODE_OF)}", mode)
    require_number("gae", "ddof", ddof, low=0, high=1, integer=True)
    require_number("gae", "eps", eps, low=0.0)
    require_number("gae", "max_seqlen", max_seqlen, low=0, integer=True)
    if cu_seqlens is None:
        B, max_seqlen = rewards.shape
        bounds = row_bounds(B, max_seqlen, rewards.device)
    else:
        bounds = cu_seqlens
        B = number_of_sequences("gae", bounds, rewards.device)
    per_sequence = {"gamma": gamma, "lam": lam, "bootstrap": bootstrap}
    tensors = {name: given for name, given in per_sequence.items() if isinstance(given, Tensor)}
    for name, given in tensors.items():
        require_floating("gae", name, given, shape=(B,))
        require(given.device == rewards.device, "gae", name, "on the device of rewards", given)
    for name in ("gamma", "lam"):
        number = per_sequence[name]
        if name not in tensors:
            require_number("gae", name, number, low=0.0, high=1.0)
    mode = MODE_OF[mode]
    advantages, returns, found = torch.ops.zs_kernels.gae(
        rewards.detach().flatten(),
        values.detach().flatten(),
        None if mask is None or mode == "all_actions" else mask.flatten(),
        bounds,
        *(tensors[name].detach() if name in tensors else None for name in ("gamma", "lam", "bootstrap")),
        1.0 if "gamma" in tensors else float(gamma),
        1.0 if "lam" in tensors else float(lam),
        "classic" if mode == "all_actions" else mode,
        max_seqlen,
        statistics,
        whiten,
        ddof,
        eps,
        shift_mean,
    )
    if cu_seqlens is None:
        advantages, returns = advantages.view(rewards.shape), returns.view(rewards.shape)
    return GaeWithStatistics(advantages, returns, found)


def row_bounds(B: int, T: int, device: torch.device) -> Tensor:
    """[B + 1] bounds of B rows of T tokens laid end to end, made by one launch."""
    if T == 0:
        return torch.zeros(B + 1, dtype=torch.int64, device=device)
    return torch.arange(0, B * T + 1, T, device=device)


def number_of_sequences(op: str, cu_seqlens: Tensor, device: torch.device) -> int:
    """S of a [S + 1] bounds tensor, after a look at its type."""
    require_tensor(op, "cu_seqlens", cu_seqlens)
    require_integers(op, "cu_seqlens", cu_seqlens, (cu_seqlens.numel(),), device=device)
    require(cu_seqlens.numel() > 0, op, "cu_seqlens", "of shape [S + 1]", cu_seqlens)
    return cu_seqlens.numel() - 1


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    bootstrap: Tensor | None = None,
    mode: str = "carry",
    whiten: bool = False,
    ddof: int = 1,
    eps: float = 1e-8,
    shift_mean: bool = True,
    max_seqlen: int = 0,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), float32, without gradient.

    Packed: rewards, values [N] floating point; mask [N] bool, True on the tokens the policy wrote (None: all);
    cu_seqlens [S + 1] int64 or int32, bounds of the sequences, from 0 to N. Padded: all three [B, T] and no cu_seqlens.
    gamma, lam: numbers in [0, 1] or [S] (an adaptive lambda). bootstrap: [S], the value after each sequence's last
    token. An episode that ends inside a sequence is a sequence of its own.
    mode: see the top of this file. whiten: the advantages only; returns stay as they are. ddof, eps, shift_mean: of
    the whitening; verl's are 1, 1e-8 and True, TRL's PPO 0, 1e-8, True. One unmasked token whitens to 0.
    max_seqlen: the greatest length, where the caller knows it: lets few long sequences share a GPU.
    Raises ValueError or TypeError naming the argument; the bounds are read on the CPU, or with ZS_KERNELS_CHECKED=1.
    """
    found = _run(
        rewards, values, mask, cu_seqlens, gamma, lam, bootstrap, mode, max_seqlen, False, whiten, ddof, eps, shift_mean
    )
    return found.advantages, found.returns


def gae_with_statistics(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    bootstrap: Tensor | None = None,
    mode: str = "carry",
    max_seqlen: int = 0,
) -> GaeWithStatistics:
    """`gae` and what whitening needs, for ranks that whiten over all their tokens together:

    local = gae_with_statistics(...)
    statistics = merge_statistics(all_gather(local.statistics))        # [R, 3] -> [3]
    advantages = whiten_advantages(local.advantages, mask, statistics)
    """
    return _run(rewards, values, mask, cu_seqlens, gamma, lam, bootstrap, mode, max_seqlen, True, False, 1, 1e-8, True)


def whiten_advantages(
    advantages: Tensor,
    mask: Tensor | None,
    statistics: Tensor,
    *,
    ddof: int = 1,
    eps: float = 1e-8,
    shift_mean: bool = True,
) -> Tensor:
    """(advantages - mean) / sqrt(variance + eps) in float32, 0 where masked, the mean added again unless `shift_mean`.

    advantages: floating point, any shape; mask: bool of that shape or None; statistics: [3] float64 (count, mean, sum
    of squared distances from it). variance: that sum over max(count - ddof, 1).
    """
    op = "whiten_advantages"
    require_floating(op, "advantages", advantages)
    require_mask(op, "mask", mask, tuple(advantages.shape), advantages.device)
    require_floating(op, "statistics", statistics, shape=(3,))
    good = statistics.dtype == torch.float64 and statistics.device == advantages.device
    require(good, op, "statistics", "float64, on the device of advantages", statistics)
    require_number(op, "ddof", ddof, low=0, high=1, integer=True)
    require_number(op, "eps", eps, low=0.0)
    flat_mask = None if mask is None else mask.flatten()
    whitened = torch.ops.zs_kernels.whiten_advantages(
        advantages.detach().flatten(), flat_mask, statistics, ddof, eps, shift_mean
    )
    return whitened.view(advantages.shape)
