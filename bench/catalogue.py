"""Every case by name: its sizes on a CPU and on a GPU, its targets, the tests that must be green before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench import head_suite as head
from bench import token_suite as token
from bench.harness import Case, Target

Size = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """A case that can be asked for by name; it exists where it has a size for the device."""

    build: Callable[..., Case]
    tests: tuple[str, ...]
    """Patterns of test files."""
    quick: Size
    """A size that only shows that everything runs."""
    cpu: Size | None = None
    cuda: Size | None = None
    targets: dict[str, tuple[Target, ...]] = field(default_factory=dict)
    """By kind of device."""

    def size(self, kind: str) -> Size | None:
        """The full size on "cpu" or "cuda"."""
        return self.cpu if kind == "cpu" else self.cuda


HEAD_TESTS = ("test_linear_*.py", "test_token_logprobs*.py", "test_policy_loss*.py")
QUICK_HEAD = {"T": 64, "H": 32, "V": 1024}
QWEN, SMOLLM = {"H": 896, "V": 151_936}, {"H": 576, "V": 49_152}
"""The heads of Qwen2.5-0.5B and SmolLM2-135M."""

ON_CPU = {
    "fused_loss": (
        Target(head.OURS, "time", head.PRODUCTS, at_most=1.20),
        Target(head.OURS, "speed", head.NAIVE, at_least=1.1),
        Target(head.OURS, "speed", head.CHECKPOINTED, at_least=1.7),
        Target(head.OURS, "speed", head.LIGER, at_least=2.8),
        Target(head.OURS, "peak", head.NAIVE, at_most=0.35),
        Target(head.EXACT, "error:logprobs", at_most=2e-5),
    ),
    "fused_loss_small": (Target(head.OURS, "speed", head.NAIVE, at_least=1.3),),
    "fused_loss_masked": (
        Target(head.OURS, "speed", head.NAIVE, at_least=2.8),
        Target(head.OURS, "speed", head.LIGER, at_least=7.0),
    ),
    "fused_loss_long": (Target(head.OURS, "peak", head.NAIVE, at_most=0.12),),
    "token_loss": (Target("policy_loss", "speed", token.EAGER, at_least=7.0),),
    "gae": (
        Target("gae, whitened", "speed", "verl loop", at_least=40.0),
        Target("gae", "speed", "classic loop", at_least=15.0),
    ),
    "grpo": (Target("group_advantages", "speed", "verl loop", at_least=7.0),),
}
ON_GPU = {
    "fused_loss": (
        Target(head.OURS, "of_floor", at_least=0.70),
        Target(head.OURS, "speed", head.LIGER_SCALED, at_least=1.25),
        Target(head.OURS, "speed", head.TRL_CHUNKED, at_least=1.25),
    ),
    "row_logprobs": (Target("token_logprobs, no entropy", "of_floor", at_least=0.92),),
    "gae": (Target("gae", "of_floor", at_least=0.75), Target("gae", "launches", at_most=2)),
}


def _targets(cpu: str = "", cuda: str = "") -> dict[str, tuple[Target, ...]]:
    return {"cpu": ON_CPU.get(cpu, ()), "cuda": ON_GPU.get(cuda, ())}


def _on_gpu(T: int, H: int) -> Entry:
    size = {"T": T, "H": H, "V": 151_936}
    return Entry(head.fused_loss, HEAD_TESTS, QUICK_HEAD, cuda=size, targets=_targets(cuda="fused_loss"))


CASES: dict[str, Entry] = {
    "fused_loss": Entry(
        head.fused_loss,
        HEAD_TESTS,
        QUICK_HEAD,
        cpu={"T": 1024, **QWEN, "compile_naive": True},
        targets=_targets("fused_loss"),
    ),
    "fused_loss_small": Entry(
        head.fused_loss, HEAD_TESTS, QUICK_HEAD, cpu={"T": 1024, **SMOLLM}, targets=_targets("fused_loss_small")
    ),
    "fused_loss_masked": Entry(
        head.fused_loss_masked,
        HEAD_TESTS,
        QUICK_HEAD,
        cpu={"T": 1024, **QWEN},
        cuda={"T": 32_768, "H": 2048, "V": 151_936},
        targets=_targets("fused_loss_masked"),
    ),
    "fused_loss_long": Entry(
        head.fused_loss_long, HEAD_TESTS, QUICK_HEAD, cpu={"T": 4096, **QWEN}, targets=_targets("fused_loss_long")
    ),
    **{f"fused_loss_h{H}_m{T}": _on_gpu(T, H) for H in (2048, 3584) for T in (8192, 32_768)},
    "head_forward": Entry(
        head.head_forward, HEAD_TESTS, QUICK_HEAD, {"T": 1024, **QWEN}, {"T": 8192, "H": 2048, "V": 151_936}
    ),
    "head_kl": Entry(
        head.head_kl, ("test_linear_kl*.py",), QUICK_HEAD, {"T": 512, **SMOLLM}, {"T": 8192, "H": 2048, "V": 151_936}
    ),
    "row_logprobs": Entry(
        token.row_logprobs,
        ("test_token_logprobs*.py",),
        {"N": 16, "V": 1000},
        {"N": 256, "V": 151_936},
        {"N": 8192, "V": 151_936},
        _targets(cuda="row_logprobs"),
    ),
    "row_logprobs_backward": Entry(
        token.row_logprobs,
        ("test_token_logprobs*.py",),
        {"N": 16, "V": 1000, "backward": True},
        {"N": 256, "V": 151_936, "backward": True},
        {"N": 8192, "V": 151_936, "backward": True},
    ),
    "row_epilogue": Entry(token.row_epilogue, HEAD_TESTS, {"N": 16, "V": 1000}, cuda={"N": 8192, "V": 151_936}),
    "token_loss": Entry(
        token.token_loss,
        ("test_policy_loss*.py", "test_kl_estimates*.py"),
        {"N": 512},
        {"N": 256 * 2048, "compile_eager": True},
        {"N": 1 << 22, "compile_eager": True},
        _targets("token_loss"),
    ),
    "gae": Entry(
        token.masked_gae,
        ("test_gae*.py",),
        {"S": 16, "T": 64},
        {"S": 256, "T": 2048},
        {"S": 1024, "T": 4096, "loops": False},
        _targets("gae", "gae"),
    ),
    "grpo": Entry(
        token.grpo,
        ("test_group_advantages*.py",),
        {"S": 20, "T": 64},
        {"S": 320, "T": 2048},
        {"S": 1280, "T": 4096},
        _targets("grpo"),
    ),
    "kl": Entry(
        token.kl_per_token,
        ("test_kl_estimates*.py",),
        {"S": 8, "T": 64},
        {"S": 256, "T": 2048},
        {"S": 1024, "T": 4096},
    ),
    "whiten": Entry(
        token.whitening,
        ("test_reductions*.py",),
        {"S": 8, "T": 64},
        {"S": 256, "T": 2048},
        {"S": 1024, "T": 4096},
    ),
    **{
        f"row_products_{M}": Entry(
            token.row_products,
            ("test_decoder_rows.py",),
            {"M": M, "K": 80, "N": 300},
            {"M": M, "K": SMOLLM["H"], "N": SMOLLM["V"]},
        )
        for M in (1, 4, 8, 32)
    },
    "value_loss": Entry(token.values, ("test_value_loss*.py",), {"N": 512}, {"N": 256 * 2048}, {"N": 1 << 22}),
}
