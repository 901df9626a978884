"""Log-probabilities from logits on a GPU: against float64 at full size, beyond 2^31 elements, batch by batch alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zs_kernels import token_logprobs
from zs_kernels.testing import assert_no_worse_than_torch

V = 151_936
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def logits_of(rows: int, columns: int, dtype: torch.dtype, *, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device="cuda").mul_(scale).to(dtype)


def in_torch(logits: Tensor, index: Tensor, upstream: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(log-probs, entropy, gradient) of a few rows, computed in `dtype`."""
    leaf = logits.detach().to(dtype).requires_grad_()
    every = torch.log_softmax(leaf, -1)
    logprobs = every.gather(1, index[:, None]).squeeze(1)
    entropy = -(every.exp() * every).sum(-1)
    gradient = torch.autograd.grad((logprobs, entropy), leaf, tuple(one.to(dtype) for one in upstream))[0]
    return logprobs.detach(), entropy.detach(), gradient


def check(logits: Tensor, sample: Tensor) -> None:
    """Forward and backward of all rows; the rows `sample` against float64 and torch's own error in float32."""
    generator = torch.Generator("cuda").manual_seed(1)
    rows, columns = logits.shape
    index = torch.randint(columns, (rows,), generator=generator, device="cuda")
    upstream = tuple(torch.randn(rows, generator=generator, device="cuda") for _ in range(2))
    leaf = logits.detach().requires_grad_()
    found = token_logprobs(leaf, index, entropy=True)
    gradient = torch.autograd.grad((found.logprobs, found.entropy), leaf, upstream)[0]
    given = (logits[sample], index[sample], tuple(one[sample] for one in upstream))
    exact, plain = in_torch(*given, torch.float64), in_torch(*given, torch.float32)
    mine = (found.logprobs[sample], found.entropy[sample], gradient[sample])
    for name, ours, theirs, truth in zip(("logprobs", "entropy", "gradient"), mine, plain, exact, strict=True):
        rounded = theirs.to(logits.dtype) if name == "gradient" else theirs
        assert_no_worse_than_torch(ours, rounded, truth, floor=FLOOR[logits.dtype], name=name)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [V, 32_001, 8191, 8192, 8193, 7])
def test_against_float64(dtype, columns):
    logits = logits_of(2048, columns, dtype)
    check(logits, torch.arange(0, 2048, 61, device="cuda"))


@pytest.mark.parametrize("scale", [0.01, 8.0])
def test_flat_and_peaky_rows(scale):
    check(logits_of(512, V, torch.bfloat16, scale=scale), torch.arange(0, 512, 31, device="cuda"))


def test_few_rows_that_share_the_gpu():
    check(logits_of(3, V, torch.bfloat16), torch.arange(3, device="cuda"))


def test_rows_of_a_wider_tensor():
    wide = logits_of(1024, V + 64, torch.bfloat16)
    check(wide[:, 32:-32], torch.arange(0, 1024, 61, device="cuda"))


def test_more_than_2_to_the_31_elements():
    """Rows past 14,134 lie beyond what 32 bits can address."""
    logits = logits_of(16_384, V, torch.bfloat16)
    check(logits, torch.tensor([0, 14_133, 14_134, 14_135, 16_383], device="cuda"))


def test_transformed_and_masked_logits_are_those_of_the_reference():
    from zs_kernels._device import use_backend

    rows = 256
    logits = logits_of(rows, V, torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(2)
    index = torch.randint(V, (rows,), generator=generator, device="cuda")
    options = {
        "temperature": torch.rand(rows, generator=generator, device="cuda") + 0.5,
        "bias": torch.randn(V, generator=generator, device="cuda"),
        "softcap": 20.0,
        "mask": torch.rand(rows, generator=generator, device="cuda") < 0.7,
        "entropy": True,
        "sum_squares": True,
    }
    logits[~options["mask"]] = torch.nan
    found = token_logprobs(logits, index, **options)
    with use_backend("reference"):
        wanted = token_logprobs(logits, index, **options)
    for name in ("logprobs", "entropy", "logsumexp", "sum_squares"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=2e-5, atol=2e-5)


def test_a_row_alone_is_the_row_in_a_batch_bit_for_bit():
    logits = logits_of(4096, V, torch.bfloat16)
    index = torch.randint(V, (4096,), device="cuda")
    together = token_logprobs(logits, index, entropy=True)
    for rows in (slice(0, 1), slice(17, 18), slice(100, 400), slice(4095, 4096)):
        alone = token_logprobs(logits[rows], index[rows], entropy=True)
        assert torch.equal(alone.logprobs, together.logprobs[rows]), f"rows {rows}: {alone.logprobs[:3]}"
        assert torch.equal(alone.entropy, together.entropy[rows])


def test_two_runs_give_the_same_bits():
    logits = logits_of(1024, V, torch.bfloat16).requires_grad_()
    index = torch.randint(V, (1024,), device="cuda")

    def run() -> tuple[Tensor, Tensor]:
        found = token_logprobs(logits, index, entropy=True)
        return found.logprobs, torch.autograd.grad(found.logprobs.sum() + found.entropy.sum(), logits)[0]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
