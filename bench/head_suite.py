"""The cases on an output head."""

from __future__ import annotations

import torch

import zs_kernels
from bench import head_cases as ways
from bench.harness import Case, Results
from bench.peers import Variants, find
from zs_kernels import _cuda, _linear_liger, _wide_products

OURS, EXACT = "linear_policy_loss", "linear_policy_loss exact"
NAIVE, CHECKPOINTED, LIGER = "naive fp32", "checkpointed chunks", "Liger fused linear GRPO"
LIGER_SCALED, TRL_CHUNKED, COMPILED = "Liger fused scaled CE", "TRL chunked log-prob", "torch.compile(naive)"
PRODUCTS, WIDE_PRODUCTS, KEPT = "three GEMMs", "three GEMMs by float32", "naive fp32, kept tokens"
SMALL_WORKSPACE = "linear_policy_loss 256 MiB"


def add_products(head: ways.Head, variants: Variants, device: str) -> None:
    """What the floor is made of: the bare products, also by way of float32 copies where a processor prefers those."""
    variants.add(PRODUCTS, ways.three_products(head))
    if device == "cpu" and _wide_products.prefers_float32(head.weight.dtype):
        variants.add(WIDE_PRODUCTS, ways.three_wide_products(head))


def peers_of_fused(head: ways.Head, variants: Variants, device: str) -> None:
    """Other people's ways to the same loss and gradients."""
    grpo = find("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    variants.add_peer(LIGER, grpo, lambda: ways.liger_grpo(head, grpo)())
    chunked = find("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    variants.add_peer(TRL_CHUNKED, chunked, ways.with_torch_loss(head, ways.trl_chunked(chunked)))
    if device != "cpu":
        # On Hopper the function is a kernel that needs nvidia-cutlass-dsl; elsewhere it is chunks of torch.
        hopper = torch.cuda.get_device_capability() == (9, 0)
        place = _linear_liger.MODULE if hopper else "liger_kernel.ops.fused_linear_scaled_cross_entropy"
        scaled = find(place, _linear_liger.FUNCTION if hopper else "LigerFusedLinearScaledCrossEntropyFunction")
        variants.add_peer(LIGER_SCALED, scaled, ways.with_torch_loss(head, ways.liger_scaled(scaled)))
        return
    selective = find("trl.trainer.utils", "selective_log_softmax")
    variants.add_peer(
        "TRL selective_log_softmax",
        selective,
        ways.with_torch_loss(head, lambda hidden, weight, index: selective(hidden @ weight.T, index)),
    )


def fused_loss(
    device: str,
    name: str,
    T: int,
    H: int,
    V: int,
    *,
    compile_naive: bool = False,
    rounds: int | None = None,
) -> Case:
    """Log-prob and clipped policy loss, forward and backward, every token with loss."""
    head = ways.make_head(device, T, H, V)
    variants = Variants()
    add_products(head, variants, device)
    variants.add(NAIVE, ways.with_torch_loss(head, ways.naive))
    variants.add("naive bf16", ways.with_torch_loss(head, ways.naive_bf16))
    variants.add(CHECKPOINTED, ways.with_torch_loss(head, ways.checkpointed))
    if compile_naive:
        variants.add(COMPILED, ways.compiled(head))
    peers_of_fused(head, variants, device)
    variants.add(OURS, ways.ours(head))
    variants.add(EXACT, ways.ours(head, exact=True))
    variants.add(SMALL_WORKSPACE, ways.ours(head, workspace_bytes=256 << 20))
    variants.add("linear_logprobs + policy_loss", ways.ours_in_two_steps(head))
    if device != "cpu" and _cuda.cuda_status().available:
        variants.add("linear_policy_loss CUDA rows", ways.ours(head, cuda=True))
    return _case(device, name, head, variants, 6.0 * T * H * V, rounds)


def fused_loss_masked(device: str, name: str, T: int, H: int, V: int) -> Case:
    """The same with loss on 36 % of the tokens, as where prompts and documents are masked."""
    head = ways.make_head(device, T, H, V, masked=True)
    variants = Variants()
    add_products(head, variants, device)
    variants.add(NAIVE, ways.with_torch_loss(head, ways.naive))
    variants.add(KEPT, ways.with_torch_loss(head, ways.naive, rows=head.mask.nonzero().squeeze(1)))
    grpo = find("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    variants.add_peer(LIGER, grpo, lambda: ways.liger_grpo(head, grpo)())
    variants.add(OURS, ways.ours(head))
    variants.add(EXACT, ways.ours(head, exact=True))
    return _case(device, name, head, variants, 6.0 * int(head.mask.sum()) * H * V, None)


def fused_loss_long(device: str, name: str, T: int, H: int, V: int) -> Case:
    """Many tokens: what grows with them and what does not."""
    head = ways.make_head(device, T, H, V)
    variants = Variants()
    add_products(head, variants, device)
    variants.add(NAIVE, ways.with_torch_loss(head, ways.naive))
    variants.add(CHECKPOINTED, ways.with_torch_loss(head, ways.checkpointed))
    variants.add(OURS, ways.ours(head))
    return _case(device, name, head, variants, 6.0 * T * H * V, 1)


def _case(
    device: str,
    name: str,
    head: ways.Head,
    variants: Variants,
    flop: float,
    rounds: int | None,
) -> Case:
    return Case(
        name=name,
        shape=head.shape,
        variants=variants.calls,
        device=device,
        exact=lambda: ways.exact_results(head),
        flop=flop,
        floors=(PRODUCTS, WIDE_PRODUCTS) if device == "cpu" else (),
        absent=variants.absent,
        rounds=rounds,
    )


def head_forward(device: str, name: str, T: int, H: int, V: int) -> Case:
    """Log-probabilities alone, without gradients: the pass under the old or the reference policy."""
    head = ways.make_head(device, T, H, V)
    hidden, weight, index = head.hidden.detach(), head.weight.detach(), head.index
    variants = Variants()
    variants.add("one GEMM", lambda: {"logits": hidden @ weight.T})
    variants.add(NAIVE, lambda: {"logprobs": ways.naive(hidden, weight, index)})
    chunked = find("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    variants.add_peer(TRL_CHUNKED, chunked, lambda: {"logprobs": ways.trl_chunked(chunked)(hidden, weight, index)})
    variants.add("linear_logprobs", lambda: {"logprobs": zs_kernels.linear_logprobs(hidden, weight, index).logprobs})
    variants.add(
        "linear_logprobs exact",
        lambda: {"logprobs": zs_kernels.linear_logprobs(hidden, weight, index, exact=True).logprobs},
    )
    return Case(
        name=name,
        shape=head.shape,
        variants=variants.calls,
        device=device,
        exact=lambda: {"logprobs": ways.exact_results(head)["logprobs"]},
        flop=2.0 * T * H * V,
        floors=("one GEMM",) if device == "cpu" else (),
        absent=variants.absent,
    )


def head_kl(device: str, name: str, T: int, H: int, V: int) -> Case:
    """KL over the whole vocabulary between two heads, forward and backward."""
    head = ways.make_head(device, T, H, V)
    hidden, weight = head.hidden, head.weight
    generator = torch.Generator(device).manual_seed(1)
    noise = torch.randn(hidden.shape, generator=generator, device=device) * 0.2
    ref_hidden, ref_weight = (hidden.detach() + noise).to(hidden.dtype), weight.detach()

    def finish(kl: torch.Tensor) -> Results:
        return ways.gradients(head, (kl * head.token_weights).sum(), kl=kl)

    def naive() -> Results:
        ours = torch.log_softmax((hidden @ weight.T).float(), -1)
        theirs = torch.log_softmax((ref_hidden @ ref_weight.T).float(), -1)
        return finish((ours.exp() * (ours - theirs)).sum(-1))

    def products() -> None:
        logits = hidden.detach() @ ref_weight.T
        ref_hidden @ ref_weight.T
        logits @ ref_weight
        logits.T @ hidden.detach()

    def exact() -> Results:
        rows = slice(0, ways.EXACT_ROWS)
        head_64 = weight.detach().double()
        leaf = hidden.detach()[rows].double().requires_grad_()
        ours = torch.log_softmax(leaf @ head_64.T, -1)
        theirs = torch.log_softmax(ref_hidden[rows].double() @ head_64.T, -1)
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        grad = torch.autograd.grad((kl * head.token_weights[rows]).sum(), leaf)[0]
        return {"kl": kl.detach(), "grad_hidden": grad}

    variants = {
        "four GEMMs": products,
        NAIVE: naive,
        "linear_kl": lambda: finish(zs_kernels.linear_kl(hidden, ref_hidden, weight, ref_weight)),
    }
    return Case(
        name=name,
        shape=head.shape,
        variants=variants,
        device=device,
        exact=exact,
        flop=8.0 * T * H * V,
        floors=("four GEMMs",) if device == "cpu" else (),
    )
