"""16-bit products by way of float32 copies: the same numbers as torch's own products, never less exact."""

from __future__ import annotations

import pytest
import torch

from zs_kernels import PolicyLossSettings, _wide_products, linear_kl, linear_logprobs, linear_policy_loss

SLICE = _wide_products.SLICE_ROWS
SIZES = [
    (1, 7, 5),  # less than one slice
    (64, SLICE, 33),  # exactly one
    (65, SLICE + 1, 96),  # a last slice of one row
    (130, 2 * SLICE + 77, 17),  # several
]
HALF = [torch.bfloat16, torch.float16]


def matrices(rows: int, vocabulary: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, size, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, size, generator=generator) * 0.3).to(dtype)
    dlogits = (torch.randn(rows, vocabulary, generator=generator) * 0.01).to(dtype)
    return hidden, weight, dlogits


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows, vocabulary, size", SIZES)
def test_products_are_no_less_exact_than_torchs(rows, vocabulary, size, dtype):
    hidden, weight, dlogits = matrices(rows, vocabulary, size, dtype)
    logits = torch.full((rows, vocabulary), float("nan"), dtype=dtype)
    exact = torch.full((rows, vocabulary), float("nan"))
    grad_hidden = torch.full((rows, size), float("nan"), dtype=dtype)
    grad_weight = torch.full((vocabulary, size), float("nan"))
    _wide_products.multiply(hidden, weight, logits)
    _wide_products.multiply(hidden, weight, exact)
    _wide_products.multiply_gradient(
        dlogits, weight, hidden, grad_hidden=grad_hidden, add_to_weight=grad_weight.__setitem__
    )
    truth = hidden.double() @ weight.double().T
    # Both round once; sums in another order may round differently where a value lies between two.
    assert error(logits, truth) <= error(hidden @ weight.T, truth) * 1.02 + 1e-7
    assert error(exact, truth) < 1e-6
    truth = dlogits.double() @ weight.double()
    assert error(grad_hidden, truth) <= error(dlogits @ weight, truth) * 1.02 + 1e-7
    assert error(grad_weight, dlogits.double().T @ hidden.double()) < 1e-6


def test_only_what_is_asked_for_is_computed():
    hidden, weight, dlogits = matrices(64, 100, 8, torch.bfloat16)
    parts = []
    _wide_products.multiply_gradient(
        dlogits, weight, hidden, grad_hidden=None, add_to_weight=lambda part, product: parts.append(part)
    )
    assert parts == [slice(0, 100)]
    grad_hidden = torch.empty(64, 8, dtype=torch.bfloat16)
    _wide_products.multiply_gradient(dlogits, weight, hidden, grad_hidden=grad_hidden, add_to_weight=None)
    assert error(grad_hidden, dlogits.double() @ weight.double()) < 5e-3


def loss_and_gradients(dtype: torch.dtype, op: str, **options) -> list[torch.Tensor]:
    rows, vocabulary, size = 200, SLICE + 130, 24
    hidden, weight, _ = matrices(rows, vocabulary, size, dtype)
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(0, vocabulary, (rows,), generator=generator)
    advantages = torch.randn(rows, generator=generator)
    mask = torch.rand(rows, generator=generator) < 0.7
    hidden.requires_grad_()
    weight.requires_grad_()
    weights = torch.full((rows,), 1.0 / rows)
    if op == "loss":
        settings = PolicyLossSettings(entropy_coefficient=0.01)
        result = linear_policy_loss(
            hidden, weight, index, None, advantages, weights, settings=settings, mask=mask, **options
        )
        loss, rest = result.loss, [result.logprobs, result.entropy]
    elif op == "logprobs":
        scored = linear_logprobs(hidden, weight, index, mask=mask, entropy=True, **options)
        assert scored.entropy is not None
        loss, rest = (scored.logprobs * advantages + 0.1 * scored.entropy).sum(), [scored.logprobs, scored.entropy]
    else:
        ref = (hidden.detach().float() * 1.1).to(dtype)
        kl = linear_kl(hidden, ref, weight, weight.detach(), mask=mask)
        loss, rest = (kl * advantages).sum(), [kl]
    return [*(x.detach() for x in rest), *torch.autograd.grad(loss, (hidden, weight))]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "op, options",
    [
        ("loss", {}),
        ("loss", {"exact": True}),
        ("loss", {"workspace_bytes": 100 * (SLICE + 130) * 2}),  # several chunks: the weight's gradient is added up
        ("logprobs", {}),
        ("logprobs", {"logits_bytes": 0, "workspace_bytes": 100 * (SLICE + 130) * 2}),
        ("kl", {}),
    ],
)
def test_the_ops_agree_with_and_without(monkeypatch, op, options, dtype):
    found = {}
    for prefers in (True, False):
        used = []
        multiply = _wide_products.multiply

        def counted(*args, used=used, multiply=multiply):
            used.append(args)
            multiply(*args)

        with monkeypatch.context() as patch:
            patch.setattr(_wide_products, "prefers_float32", lambda dtype, prefers=prefers: prefers)
            patch.setattr(_wide_products, "multiply", counted)
            found[prefers] = loss_and_gradients(dtype, op, **options)
        assert bool(used) is (prefers or "exact" in options)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3  # two roundings of logits by 2**-9 or 2**-12 of some 5
    for ours, theirs in zip(found[True], found[False], strict=True):
        assert error(ours, theirs.double()) < tolerance


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_by_the_hidden_states_alone(monkeypatch, seed):
    """A frozen head without entropy takes its own path in the forward pass."""
    grads = []
    hidden, weight, _ = matrices(100 + seed, 900, 16, torch.bfloat16)
    index = torch.arange(100 + seed)
    for prefers in (True, False):
        monkeypatch.setattr(_wide_products, "prefers_float32", lambda dtype, prefers=prefers: prefers)
        leaf = hidden.clone().requires_grad_()
        grads.append(torch.autograd.grad(linear_logprobs(leaf, weight, index).logprobs.sum(), leaf)[0])
    assert error(grads[0], grads[1].double()) < 1e-2


@pytest.mark.parametrize(
    "machine, facts, vendor, dtype, expected",
    [
        ("x86_64", {}, "GenuineIntel", torch.bfloat16, True),  # no 16-bit unit at all
        ("x86_64", {"_is_avx512_bf16_supported"}, "GenuineIntel", torch.bfloat16, True),
        ("x86_64", {"_is_avx512_bf16_supported"}, "AuthenticAMD", torch.bfloat16, False),
        ("x86_64", {"_is_avx512_bf16_supported", "_is_amx_tile_supported"}, "GenuineIntel", torch.bfloat16, False),
        ("x86_64", {"_is_amx_tile_supported"}, "GenuineIntel", torch.float16, True),
        ("x86_64", {"_is_amx_fp16_supported"}, "GenuineIntel", torch.float16, False),
        ("aarch64", {}, "", torch.bfloat16, False),
        ("arm64", {}, "", torch.float16, False),
    ],
)
def test_which_processors_prefer_float32(monkeypatch, tmp_path, machine, facts, vendor, dtype, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(_wide_products, "CPU_FACTS", cpuinfo)
    monkeypatch.setattr(_wide_products.platform, "machine", lambda: machine)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in facts, raising=False)
    assert _wide_products.prefers_float32.__wrapped__(dtype) is expected


def test_float32_few_rows_and_other_devices_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(_wide_products, "prefers_float32", lambda dtype: True)
    few = _wide_products.FEW_ROWS
    assert _wide_products.pay(torch.empty(few, 4, dtype=torch.bfloat16))
    assert not _wide_products.pay(torch.empty(few - 1, 4, dtype=torch.bfloat16))
    assert not _wide_products.pay(torch.empty(few, 4))
    assert not _wide_products.pay(torch.empty(few, 4, dtype=torch.bfloat16, device="meta"))
