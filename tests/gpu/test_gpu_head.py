"""The ops on an output head on a GPU, against float64 at the sizes of a 3B and a 7B model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zs_kernels import _cuda
from zs_kernels._policy_terms import PolicyLossSettings
from zs_kernels.linear_kl import linear_kl
from zs_kernels.linear_logprobs import linear_logprobs
from zs_kernels.linear_policy_loss import linear_policy_loss

V = 151_936
ROWS = 64
"""Tokens (and rows of the weight) that are computed in float64."""
SETTINGS = PolicyLossSettings(entropy_coefficient=0.001)


class Head:
    """hidden [T, H], weight [V, H] and the columns of the loss; ratios reach past the clips."""

    def __init__(self, T: int, H: int, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda")

        self.hidden = normal(T, H).to(dtype).requires_grad_()
        self.weight = normal(V, H).mul_(3.0 / H**0.5).to(dtype).requires_grad_()
        self.index = torch.randint(V, (T,), generator=generator, device="cuda")
        far = torch.rand(T, generator=generator, device="cuda") < 0.2
        self.noise = normal(T).sign() * torch.where(far, 0.5, 0.05)
        self.advantages = normal(T)
        self.weights = torch.full((T,), 1.0 / T, device="cuda")
        self.exact_logprobs, self.logsumexp, self.entropy = self.statistics()
        self.old = (self.exact_logprobs + self.noise).float()

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probs, logsumexp, entropy) of all tokens in float64."""
        weight, made = self.weight.double(), []
        for rows, ids in zip(self.hidden.double().split(256), self.index.split(256), strict=True):
            logits = rows @ weight.T
            logsumexp = torch.logsumexp(logits, 1)
            p = torch.exp(logits - logsumexp[:, None])
            chosen = logits.gather(1, ids[:, None]).squeeze(1)
            made.append((chosen - logsumexp, logsumexp, logsumexp - (p * logits).sum(1)))
        return tuple(torch.cat(parts) for parts in zip(*made, strict=True))  # type: ignore[return-value]

    @torch.no_grad()
    def exact_gradients(self, slope: Tensor, by_entropy: Tensor) -> tuple[Tensor, Tensor]:
        """(grad_hidden of the first tokens, grad_weight of the first rows) for upstream gradients [T]."""
        weight, hidden = self.weight.double(), self.hidden.double()

        def grad_logits(logits: Tensor, rows: slice, columns: Tensor) -> Tensor:
            log_p = logits - self.logsumexp[rows, None]
            one = (self.index[rows, None] == columns).double()
            g, h, entropy = (x[rows, None] for x in (slope, by_entropy, self.entropy))
            return g * (one - log_p.exp()) - h * log_p.exp() * (log_p + entropy)

        first, everything = slice(0, ROWS), slice(None)
        words = torch.arange(V, device="cuda")
        by_hidden = grad_logits(hidden[first] @ weight.T, first, words) @ weight
        by_weight = grad_logits(hidden @ weight[:ROWS].T, everything, words[:ROWS]).T @ hidden
        return by_hidden, by_weight

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Derivatives of the loss by log-prob and entropy in float64."""
        leaf = self.exact_logprobs.clone().requires_grad_()
        ratio = torch.exp(leaf - self.old.double())
        gain = torch.minimum(ratio * self.advantages, ratio.clamp(0.8, 1.2) * self.advantages)
        slope = torch.autograd.grad(-(gain * self.weights).sum(), leaf)[0]
        return slope, -SETTINGS.entropy_coefficient * self.weights.double()

    def loss(self, **options: object) -> object:
        return linear_policy_loss(
            self.hidden, self.weight, self.index, self.old, self.advantages, self.weights, settings=SETTINGS, **options
        )


def relative(found: Tensor, exact: Tensor) -> float:
    assert found.isfinite().all()
    return float(torch.linalg.vector_norm(found.detach().double() - exact) / torch.linalg.vector_norm(exact))


@pytest.fixture(scope="module")
def head() -> Head:
    return Head(4096, 2048)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("workspace_bytes", [None, 256 << 20], ids=["one chunk", "256 MiB"])
def test_fused_loss(head, exact, workspace_bytes):
    made = head.loss(exact=exact, workspace_bytes=workspace_bytes)
    error = float((made.logprobs.double() - head.exact_logprobs).abs().max())
    assert error < (1e-4 if exact else 0.15), f"log-prob off by {error}"
    by_hidden, by_weight = torch.autograd.grad(made.loss, (head.hidden, head.weight))
    wanted_hidden, wanted_weight = head.exact_gradients(*head.slopes())
    bound = 0.02 if exact else 0.05
    assert relative(by_hidden[:ROWS], wanted_hidden) < bound
    assert relative(by_weight[:ROWS], wanted_weight) < bound


def test_log_probs_then_any_loss(head):
    upstream = torch.randn(2, head.index.numel(), generator=torch.Generator("cuda").manual_seed(3), device="cuda")
    found = linear_logprobs(head.hidden, head.weight, head.index, entropy=True)
    grads = torch.autograd.grad((found.logprobs, found.entropy), (head.hidden, head.weight), tuple(upstream))
    wanted = head.exact_gradients(*upstream.double())
    for got, want in zip(grads, wanted, strict=True):
        assert relative(got[:ROWS], want) < 0.02


def test_only_the_tokens_that_carry_loss(head):
    T = head.index.numel()
    mask = torch.arange(T, device="cuda") % 25 < 9
    found = linear_logprobs(head.hidden, head.weight, head.index, mask=mask, mask_count=int(mask.sum()))
    every = linear_logprobs(head.hidden, head.weight, head.index)
    torch.testing.assert_close(found.logprobs[mask], every.logprobs[mask], rtol=0, atol=0.15)
    assert not found.logprobs[~mask].any()


def test_memory_stays_within_the_workspace(head):
    """One chunk of 256 MiB, both gradients, the weight's in float32, and a few columns: nothing of [T, V]."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = head.loss(workspace_bytes=256 << 20)
    torch.autograd.grad(made.loss, (head.hidden, head.weight))
    extra = torch.cuda.max_memory_allocated() - before
    most = (256 << 20) + 6 * head.weight.numel() + 8 * head.hidden.numel() + (64 << 20)
    assert extra <= most, f"{extra >> 20} MiB, {most >> 20} expected at most"


def test_kl_over_the_whole_vocabulary():
    head = Head(512, 1024)
    noise = torch.randn(head.hidden.shape, generator=torch.Generator("cuda").manual_seed(4), device="cuda") * 0.2
    other = (head.hidden.detach() + noise).bfloat16()
    kl = linear_kl(head.hidden, other, head.weight, head.weight.detach())
    weight = head.weight.detach().double()
    leaf = head.hidden.detach()[:ROWS].double().requires_grad_()
    p, q = torch.log_softmax(leaf @ weight.T, -1), torch.log_softmax(other[:ROWS].double() @ weight.T, -1)
    wanted = (p.exp() * (p - q)).sum(-1)
    assert relative(kl[:ROWS], wanted.detach()) < 0.02
    by_hidden = torch.autograd.grad(kl.sum(), head.hidden)[0]
    assert relative(by_hidden[:ROWS], torch.autograd.grad(wanted.sum(), leaf)[0]) < 0.05


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_the_cuda_rows_are_the_triton_rows(head, blocks):
    if not _cuda.cuda_status().available:
        pytest.skip(_cuda.cuda_status().reason)
    from zs_kernels._policy_epilogue import _policy_epilogue_triton

    logits = (head.hidden.detach() @ head.weight.detach().T)[:2048]
    columns = (head.old[:2048], head.advantages[:2048], head.weights[:2048], None, None, None, SETTINGS)
    index, one, two = head.index[:2048], torch.empty_like(logits), torch.full_like(logits, torch.nan)
    wanted = _policy_epilogue_triton(logits, one, index, 1.0, None, None, *columns)
    found = _cuda.policy_rows(logits, two, index, 1.0, *columns, blocks=blocks)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert relative(two, one.double()) < 1e-2
    in_place = logits.clone()
    _cuda.policy_rows(in_place, in_place, index, 1.0, *columns, blocks=blocks)
    assert torch.equal(in_place, two)


def test_fused_loss_with_cuda_rows(head):
    if not _cuda.cuda_status().available:
        pytest.skip(_cuda.cuda_status().reason)
    with _cuda.use_cuda(True):
        made = head.loss()
    by_hidden = torch.autograd.grad(made.loss, head.hidden)[0]
    assert relative(by_hidden[:ROWS], head.exact_gradients(*head.slopes())[0]) < 0.05
