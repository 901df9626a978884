"""The cases on logits, token log-probabilities, rewards and values, and on the products of a decode step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import zs_kernels
from bench.harness import Case, Results
from bench.peers import Variants, find
from zs_kernels import _cuda
from zs_kernels._policy_epilogue import _policy_epilogue_triton
from zs_kernels._policy_terms import PolicyLossSettings
from zs_kernels.decoder_rows import linear_rows

EXACT_ROWS = 64
EAGER, COMPILED = "eager", "torch.compile(eager)"


def row_logprobs(device: str, name: str, N: int, V: int, *, backward: bool = False) -> Case:
    """Log-probability and entropy of chosen tokens from bf16 logits."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(N, V, dtype=torch.bfloat16, generator=generator, device=device).mul_(3.0)
    logits.requires_grad_(backward)
    index = torch.randint(V, (N,), generator=generator, device=device)
    upstream, by_entropy = (torch.randn(N, generator=generator, device=device) for _ in range(2))

    def finish(logprobs: Tensor, entropy: Tensor, leaf: Tensor = logits) -> Results:
        results = {"logprobs": logprobs.detach(), "entropy": entropy.detach()}
        if backward:
            rows = leaf.shape[0]
            slopes = (upstream[:rows].to(logprobs.dtype), by_entropy[:rows].to(entropy.dtype))
            results["grad_logits"] = torch.autograd.grad((logprobs, entropy), leaf, slopes)[0]
        return results

    def eager(leaf: Tensor = logits, dtype: torch.dtype = torch.float32) -> Results:
        every = torch.log_softmax(leaf.to(dtype), -1)
        chosen = every.gather(1, index[: leaf.shape[0], None]).squeeze(1)
        return finish(chosen, -(every.exp() * every).sum(-1), leaf)

    def ours() -> Results:
        found = zs_kernels.token_logprobs(logits, index, entropy=True)
        assert found.entropy is not None
        return finish(found.logprobs, found.entropy)

    variants = Variants()
    variants.add(EAGER, eager)
    trl = find("trl.trainer.utils", "selective_log_softmax_and_entropy")
    if device != "cpu":  # the kernels alone: the trainer's module needs more packages
        trl = find("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")
    variants.add_peer("TRL log-prob and entropy", trl, lambda: finish(*trl(logits, index)))
    variants.add("token_logprobs", ours)
    if not backward:
        variants.add(
            "token_logprobs, no entropy", lambda: {"logprobs": zs_kernels.token_logprobs(logits, index).logprobs}
        )
    return Case(
        name=name,
        shape=f"{N}x{V} bfloat16",
        variants=variants.calls,
        device=device,
        exact=lambda: eager(logits.detach()[:EXACT_ROWS].double().requires_grad_(backward), torch.float64),
        bytes=(3.0 if backward else 1.0) * logits.nbytes,  # forward reads; backward reads again and writes
        absent=variants.absent,
    )


def token_loss(device: str, name: str, N: int, *, compile_eager: bool = False) -> Case:
    """PPO's clipped loss with dual clip, k3 and metrics, forward and backward."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(scale: float = 1.0) -> Tensor:
        return torch.randn(N, generator=generator, device=device) * scale

    old = -normal().abs()
    logprobs = (old + normal(0.15)).requires_grad_()
    ref, advantages = old + normal(0.3), normal()
    mask = torch.rand(N, generator=generator, device=device) < 0.5
    counted, weights = mask.float(), (1.0 / mask.sum()).expand(N)

    def torch_loss(leaf: Tensor) -> tuple[Tensor, ...]:
        """As verl writes it: bounded log ratio, dual clip, bounded k3, token mean, and the usual metrics."""

        def mean(values: Tensor) -> Tensor:
            return (values * counted).sum() / counted.sum()

        log_ratio = (leaf - old).clamp(-20.0, 20.0)
        ratio = log_ratio.exp()
        unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
        larger, bound = torch.maximum(unclipped, clipped), -3.0 * advantages
        policy = torch.where(advantages < 0, torch.minimum(larger, bound), larger)
        difference = (ref - leaf).clamp(-20.0, 20.0)
        kl = (difference.exp() - difference - 1.0).clamp(-10.0, 10.0)
        loss = mean(policy) + 0.001 * mean(kl)
        with torch.no_grad():
            cut = mean((clipped > unclipped).float())
            cut_lower = mean((larger > bound).float() * (advantages < 0).float())
            return loss, cut, cut_lower, mean(ratio), mean(-log_ratio), mean(kl), ratio.max()

    def finish(loss: Tensor, leaf: Tensor = logprobs) -> Results:
        return {"loss": loss.detach(), "grad": torch.autograd.grad(loss, leaf)[0]}

    def ours() -> Results:
        found = zs_kernels.policy_loss(
            logprobs, old, advantages, weights, dual_clip=3.0, mask=mask, ref_logprobs=ref, kl_coefficient=0.001,
            kl_clamp="verl",
        )  # fmt: skip
        return finish(found.loss)

    def exact() -> Results:
        leaf = logprobs.detach().double().requires_grad_()
        return finish(torch_loss(leaf)[0], leaf)

    variants = {EAGER: lambda: finish(torch_loss(logprobs)[0]), "policy_loss": ours}
    if compile_eager:
        quick_loss = torch.compile(torch_loss, dynamic=False)
        variants[COMPILED] = warmed(lambda: finish(quick_loss(logprobs)[0]))
    # read: log-probs, old, reference, advantages (4 B each), mask (1 B); written: the gradient
    return Case(name, f"{N} float32", variants, device, exact=exact, tolerance=1e-4, bytes=21.0 * N)


def row_epilogue(device: str, name: str, N: int, V: int) -> Case:
    """Logits to their own gradient under the clipped loss, as the fused head loss does it with each chunk."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(N, V, dtype=torch.bfloat16, generator=generator, device=device).mul_(3.0)
    index = torch.randint(V, (N,), generator=generator, device=device)
    old = torch.log_softmax(logits[:, :1].float(), -1).squeeze(1) - 12.0
    advantages = torch.randn(N, generator=generator, device=device)
    weights, out = torch.full((N,), 1.0 / N, device=device), torch.empty_like(logits)
    settings = PolicyLossSettings(entropy_coefficient=0.001)
    columns = (old, advantages, weights, None, None, None, settings)

    def triton() -> Results:
        found = _policy_epilogue_triton(logits, out, index, 1.0, None, None, *columns)
        return {"logprobs": found[0], "grad_logits": out}

    def cuda(blocks: int) -> Callable[[], Results]:
        def run() -> Results:
            found = _cuda.policy_rows(logits, out, index, 1.0, *columns, blocks=blocks)
            return {"logprobs": found[0], "grad_logits": out}

        return run

    def exact() -> Results:
        leaf = logits[:EXACT_ROWS].double().requires_grad_()
        every = torch.log_softmax(leaf, -1)
        chosen = every.gather(1, index[:EXACT_ROWS, None]).squeeze(1)
        ratio = torch.exp(chosen - old[:EXACT_ROWS])
        gain = torch.minimum(ratio * advantages[:EXACT_ROWS], ratio.clamp(0.8, 1.2) * advantages[:EXACT_ROWS])
        entropy = -(every.exp() * every).sum(-1)
        loss = -(gain + 0.001 * entropy).sum() / N
        return {"logprobs": chosen.detach(), "grad_logits": torch.autograd.grad(loss, leaf)[0]}

    variants: dict[str, Callable[[], Any]] = {
        "copy": lambda: {"copied": out.copy_(logits)},
        "Triton, one launch": triton,
    }
    if _cuda.cuda_status().available:
        variants |= {f"CUDA, {blocks} blocks a row": cuda(blocks) for blocks in (2, 4, 8)}
    return Case(name, f"{N}x{V} bfloat16", variants, device, exact=exact, bytes=2.0 * logits.nbytes)


def warmed(function: Callable[[], Any]) -> Callable[[], Any]:
    """Call once, so that what is compiled on the first call is not measured."""
    function()
    return function


def masked_gae(device: str, name: str, S: int, T: int, *, loops: bool = True) -> Case:
    """Advantages and returns with document spans masked; the loops work on padded rows of equal length."""
    generator = torch.Generator(device).manual_seed(0)
    rewards, values = (torch.randn(S, T, generator=generator, device=device) for _ in range(2))
    mask = (torch.arange(T, device=device) % 400 < 160).repeat(S, 1)
    cu_seqlens = torch.arange(0, S * T + 1, T, device=device)
    packed = (rewards.flatten(), values.flatten(), mask.flatten(), cu_seqlens)
    gamma, lam = 0.99, 0.95
    variants = Variants()
    verl = find("verl.trainer.ppo.core_algos", "compute_gae_advantage_return")

    def finish(returns: Tensor, whitened: Tensor | None = None) -> Results:
        results = {"returns": torch.where(mask, returns.view(S, T), 0.0)}
        if whitened is not None:
            results["whitened"] = torch.where(mask, whitened.view(S, T), 0.0)
        return results

    def verl_loop() -> Results:
        whitened, returns = verl(rewards, values, mask.float(), gamma, lam)
        return finish(returns, whitened)

    def ours(**options: Any) -> tuple[Tensor, Tensor]:
        return zs_kernels.gae(*packed, gamma=gamma, lam=lam, **options)

    def ours_whitened() -> Results:
        whitened, returns = ours(whiten=True)
        return finish(returns, whitened)

    if loops:
        variants.add_peer("verl loop", verl, verl_loop)
        variants.add("masked loop", lambda: finish(masked_loop(rewards, values, mask, gamma, lam)[1]))
        variants.add("classic loop", lambda: {"other returns": classic_loop(rewards, values, gamma, lam)[1]})
    variants.add("gae", lambda: {"returns": ours()[1].view(S, T)})
    variants.add("gae, whitened", ours_whitened)

    def exact() -> Results:
        on_cpu = [one.cpu() for one in packed]
        with zs_kernels.use_backend("reference"):
            advantages, returns = zs_kernels.gae(*on_cpu, gamma=gamma, lam=lam)
        taken = advantages[on_cpu[2]].double()
        whitened = torch.zeros(S * T, dtype=torch.float64)
        whitened[on_cpu[2]] = (taken - taken.mean()) / torch.sqrt(taken.var() + 1e-8)
        return {"returns": returns.view(S, T).double(), "whitened": whitened.view(S, T)}

    # rewards, values and mask in, advantages and returns out
    return Case(
        name, f"{S}x{T} float32", variants.calls, device, exact=exact, tolerance=1e-4, bytes=17.0 * S * T,
        absent=variants.absent,
    )  # fmt: skip


def masked_loop(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """One step of the recurrence per time step for all rows, masked steps carried. [S, T] in and out."""
    next_value = last = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        candidate = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * last
        next_value = torch.where(here, values[:, t], next_value)
        last = torch.where(here, candidate, last)
        columns.append(torch.where(here, last, 0.0))
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, torch.where(mask, advantages + values, 0.0)


def classic_loop(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The loop of PPO trainers that know no masks: other numbers, the least work that a loop over time can do."""
    last = torch.zeros_like(rewards[:, 0])
    columns = []
    T = rewards.shape[1]
    for t in reversed(range(T)):
        next_value = values[:, t + 1] if t + 1 < T else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        last = delta + gamma * lam * last
        columns.append(last)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def grpo(device: str, name: str, S: int, T: int) -> Case:
    """GRPO advantages of S trajectories in groups of 5, spread over their tokens."""
    generator = torch.Generator(device).manual_seed(0)
    rewards = torch.zeros(S, T, device=device)
    rewards[:, -1] = torch.rand(S, generator=generator, device=device)
    mask = (torch.arange(T, device=device) % 400 < 160).repeat(S, 1)
    groups = torch.arange(S, device=device) // 5
    names = groups.cpu().numpy().astype(str)
    weights = mask.float()
    variants = Variants()
    verl = find("verl.trainer.ppo.core_algos", "compute_grpo_outcome_advantage")
    variants.add_peer("verl loop", verl, lambda: {"advantages": verl(rewards, weights, names)[0]})

    def in_torch(given: Tensor = rewards) -> Results:
        scores = given.sum(-1).view(-1, 5)
        normed = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)
        return {"advantages": normed.view(-1, 1) * mask.to(given.dtype)}

    def ours() -> Results:
        return {"advantages": zs_kernels.group_advantages(rewards, groups, S // 5, mask=mask).tokens}

    variants.add("torch, equal groups", in_torch)
    variants.add("group_advantages", ours)
    return Case(
        name, f"{S}x{T} float32", variants.calls, device, exact=lambda: in_torch(rewards.double()),
        tolerance=1e-4, bytes=9.0 * S * T, absent=variants.absent,
    )  # fmt: skip


def kl_per_token(device: str, name: str, S: int, T: int) -> Case:
    """k3 of masked tokens."""
    generator = torch.Generator(device).manual_seed(0)
    logprobs, ref = (-torch.randn(S, T, generator=generator, device=device).abs() for _ in range(2))
    mask = (torch.arange(T, device=device) % 400 < 160).repeat(S, 1)

    def eager(a: Tensor = logprobs, b: Tensor = ref) -> Results:
        return {"kl": torch.where(mask, torch.exp(b - a) - (b - a) - 1.0, 0.0)}

    variants: dict[str, Callable[[], Any]] = {
        EAGER: eager,
        "kl_estimates": lambda: {"kl": zs_kernels.kl_estimates(logprobs, ref, mask=mask)},
    }
    return Case(
        name, f"{S}x{T} float32", variants, device, exact=lambda: eager(logprobs.double(), ref.double()),
        tolerance=1e-4, bytes=13.0 * S * T,
    )  # fmt: skip


def whitening(device: str, name: str, S: int, T: int) -> Case:
    """Mean 0 and variance 1 over the unmasked tokens."""
    generator = torch.Generator(device).manual_seed(0)
    given = torch.randn(S, T, generator=generator, device=device)
    mask = (torch.arange(T, device=device) % 400 < 160).repeat(S, 1)

    def eager(values: Tensor = given) -> Results:
        m = mask.to(values.dtype)
        mean = (values * m).sum() / m.sum()
        variance = ((values - mean) ** 2 * m).sum() / (m.sum() - 1.0)
        return {"whitened": (values - mean) * torch.rsqrt(variance + 1e-8) * m}

    variants: dict[str, Callable[[], Any]] = {
        EAGER: eager,
        "masked_whiten": lambda: {"whitened": zs_kernels.masked_whiten(given, mask)},
    }
    # values and mask read twice, results written
    return Case(
        name, f"{S}x{T} float32", variants, device, exact=lambda: eager(given.double()), tolerance=1e-4,
        bytes=14.0 * S * T,
    )  # fmt: skip


def values(device: str, name: str, N: int) -> Case:
    """The clipped value loss, forward and backward."""
    generator = torch.Generator(device).manual_seed(0)
    old, returns = (torch.randn(N, generator=generator, device=device) for _ in range(2))
    new = (old + 0.3 * torch.randn(N, generator=generator, device=device)).requires_grad_()
    weights = torch.full((N,), 1.0 / N, device=device)

    def finish(loss: Tensor, leaf: Tensor = new) -> Results:
        return {"loss": loss.detach(), "grad": torch.autograd.grad(loss, leaf)[0]}

    def eager(leaf: Tensor = new) -> Results:
        clipped = old + (leaf - old).clamp(-0.2, 0.2)
        errors = torch.maximum((leaf - returns) ** 2, (clipped - returns) ** 2)
        return finish((0.5 * errors * weights).sum(), leaf)

    def ours() -> Results:
        return finish(zs_kernels.value_loss(new, old, returns, weights, clip_range=0.2).loss)

    variants = {EAGER: eager, "value_loss": ours}
    return Case(
        name, f"{N} float32", variants, device, exact=lambda: eager(new.detach().double().requires_grad_()),
        tolerance=1e-4, bytes=20.0 * N,
    )  # fmt: skip


def row_products(device: str, name: str, M: int, K: int, N: int) -> Case:
    """A decode step's product of M rows with weights that come from memory."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(rows, K, generator=generator, device=device) for rows in (M, N))
    variants: dict[str, Callable[[], Any]] = {
        "torch linear": lambda: {"product": torch.nn.functional.linear(x, weight)},
        "linear_rows": lambda: {"product": linear_rows(x, weight)},
    }
    return Case(
        name,
        f"{M}x{K} by {N}x{K} float32",
        variants,
        device,
        exact=lambda: {"product": x.double() @ weight.double().T},
        tolerance=1e-5,
        bytes=4.0 * (N * K + M * K + M * N),
    )
