"""Every form and option of policy_loss on every backend, against the formula in float64 under autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from zs_kernels import policy_loss
from zs_kernels._device import native_status, use_backend
from zs_kernels._policy_backends import _policy_terms_triton
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
    """(loss, metrics and the loss's "size") from the formulas, differentiable; masked tokens are left out."""
    keep = torch.ones_like(columns["logprobs"], dtype=torch.bool) if mask is None else mask
    o = PolicyLossSettings()._asdict() | options
    total, metrics = torch.zeros((), dtype=columns["logprobs"].dtype), dict.fromkeys((*METRICS, "size"), 0.0)
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
        metrics["size"] += float((w * loss).abs().sum().detach())
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
    # Terms of both signs cancel: rounding is a share of the terms' size, not of what is left.
    loss, torch_loss = loss.detach(), torch_loss.detach()
    allowed = 1.1 * abs(float(torch_loss - loss)) + 2e-7 * metrics.pop("size")
    assert abs(float(result.loss.detach() - loss)) <= allowed
    grads = [("logprobs", by_logprobs)] + ([("entropy", by_entropy)] if options.get("entropy_coefficient") else [])
    for name, found in grads:
        assert_no_worse_than_torch(
            found, torch_columns[name].grad, exact_columns[name].grad, floor=1e-6, name=f"gradient by {name}"
        )
        if mask is not None:
            assert (found[~mask] == 0).all()
    for name, expected in metrics.items():
        if name not in ("clamped_count", "kl_clamped_count"):
            assert float(getattr(result, name).detach()) == pytest.approx(expected, rel=2e-6, abs=2e-6), name


def op_arguments(count: int, **options) -> tuple:  # type: ignore[no-untyped-def, type-arg]
    columns = batch(count, extra=ALL)
    columns["logprobs"].requires_grad_()
    columns["entropy"].requires_grad_()
    order = (*("logprobs", "old_logprobs", "advantages", "weights"), *("entropy", "ref_logprobs", "importance_weights"))
    settings = PolicyLossSettings(kl_coefficient=0.1, entropy_coefficient=0.2)._replace(**options)
    mask = torch.arange(count) % 3 != 0
    bounds = sequence_bounds(count) if settings.form == "gspo" else None
    return *(columns[name] for name in order), mask, bounds, *settings


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["ppo", "gspo"])
def test_opcheck(form: str, backend: str) -> None:
    with use_backend(backend):
        torch.library.opcheck(torch.ops.zs_kernels.policy_loss.default, op_arguments(37, form=form))
        bare = [*op_arguments(5)[:4], *[None] * 5, *PolicyLossSettings()]
        torch.library.opcheck(torch.ops.zs_kernels.policy_loss.default, tuple(bare))


def test_one_compilation_serves_every_length() -> None:
    counted = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counted, dynamic=True)
    def loss_of(logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, ref: Tensor, mask: Tensor) -> tuple:  # type: ignore[type-arg]
        result = policy_loss(
            logprobs, old, advantages, weights, mask=mask, dual_clip=3.0, ref_logprobs=ref, kl_coefficient=0.1
        )
        return result.loss, result.kl_sum

    compiled = set()
    for count in range(10, 30):
        columns = batch(count, extra=("ref_logprobs",))
        mask = torch.arange(count) % 4 != 0
        columns["logprobs"].requires_grad_()
        loss, kl = loss_of(*columns.values(), mask)
        loss.backward()
        eager = columns["logprobs"].detach().clone().requires_grad_()
        expected = policy_loss(
            eager, *list(columns.values())[1:4], mask=mask, dual_clip=3.0,
            ref_logprobs=columns["ref_logprobs"], kl_coefficient=0.1,
        )  # fmt: skip
        expected.loss.backward()
        assert torch.equal(loss, expected.loss) and torch.equal(kl, expected.kl_sum)
        assert torch.equal(columns["logprobs"].grad, eager.grad)
        compiled.add(counted.frame_count)
    assert len(compiled) == 1, "a later length was compiled again"


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_terms_are_the_loss_token_by_token(backend: str) -> None:
    columns, mask = batch(77, extra=ALL), torch.arange(77) % 5 != 0
    settings = PolicyLossSettings(dual_clip=2.0, kl_coefficient=0.3, entropy_coefficient=0.1)
    poisoned = {name: torch.where(mask, value, float("inf")) for name, value in columns.items()}
    with use_backend(backend), poison_empty():
        terms = token_terms(**poisoned, mask=mask, settings=settings)
        whole, by_logprobs, by_entropy = run(poisoned, settings._asdict(), mask, sequence_bounds(77))
    assert [tuple(part.shape) for part in terms] == [(77,), (77,), (77,), (len(METRICS),)]
    assert float(terms.loss.sum()) == pytest.approx(float(whole.loss.detach()), rel=1e-6)
    torch.testing.assert_close(-1.7 * terms.grad_logprobs, by_logprobs)
    torch.testing.assert_close(-1.7 * terms.grad_entropy, by_entropy)
    assert (terms.loss[~mask] == 0).all() and (terms.grad_logprobs[~mask] == 0).all()
    assert dict(zip(METRICS, terms.metrics.tolist(), strict=True)) == {
        name: float(getattr(whole, name)) for name in METRICS
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["ppo", "gspo", "cispo", "reinforce"])
@pytest.mark.parametrize("count", [0, 3])
def test_no_counted_token_gives_zero(count: int, form: str, backend: str) -> None:
    nan = torch.full((count,), float("nan"))
    logprobs = nan.clone().requires_grad_()
    bounds = {"cu_seqlens": torch.tensor([0, count])} if form == "gspo" else {}
    with use_backend(backend), poison_empty():
        result = policy_loss(
            logprobs, nan, nan, nan, mask=torch.zeros(count, dtype=torch.bool), form=form, ref_logprobs=nan,
            kl_coefficient=1.0, **bounds,
        )  # fmt: skip
        result.loss.backward()
    assert [float(part.detach()) for part in result] == [0.0] * len(result)
    assert logprobs.grad.tolist() == [0.0] * count


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unmasked_nan_is_not_hidden(backend: str) -> None:
    columns = batch(40, extra=("ref_logprobs",))
    columns["old_logprobs"][3] = float("nan")
    with use_backend(backend):
        result, by_logprobs, _ = run(columns, {"dual_clip": 3.0, "kl_coefficient": 0.1}, None, sequence_bounds(40))
    assert result.loss.isnan() and by_logprobs.isnan().tolist() == [n == 3 for n in range(40)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_kl_without_a_coefficient_stays_out_of_the_loss(backend: str) -> None:
    columns = batch(20, extra=("ref_logprobs",))
    columns["ref_logprobs"][5] = 200.0  # exp(200) is infinite in float32
    with use_backend(backend):
        result, by_logprobs, _ = run(columns, {}, None, sequence_bounds(20))
    assert result.loss.isfinite() and by_logprobs.isfinite().all() and float(result.kl_sum) == math.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamped_tokens_are_counted(backend: str) -> None:
    old = torch.tensor([0.0, 25.0, -25.0, 19.0, 0.0])
    ref = torch.tensor([0.0, 25.0, 0.0, 5.0, -25.0])  # k3: 0, bound, 0, above 10, bound
    zeros, ones = torch.zeros(5), torch.ones(5)
    mask = torch.tensor([True, True, True, True, False])
    with use_backend(backend):
        result = policy_loss(zeros, old, ones, ones, ref_logprobs=ref, kl_coefficient=1.0, kl_clamp="verl", mask=mask)
    assert float(result.clamped_count) == 2 and float(result.kl_clamped_count) == 2
    assert float(result.ratio_max) == pytest.approx(math.exp(20.0))
    assert float(result.kl_sum) == pytest.approx(20.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_read_as_they_are_and_computed_in_float32(dtype: torch.dtype, backend: str) -> None:
    narrow = {name: value.to(dtype) for name, value in batch(70, extra=ALL).items()}
    options = {"kl_coefficient": 0.2, "entropy_coefficient": 0.1}
    with use_backend(backend):
        found, by_logprobs, by_entropy = run(narrow, options, None, sequence_bounds(70))
    wide = {name: value.float() for name, value in narrow.items()}
    with use_backend("reference"):
        expected, slopes, entropy_slopes = run(wide, options, None, sequence_bounds(70))
    assert float(found.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    assert by_logprobs.dtype == by_entropy.dtype == dtype
    torch.testing.assert_close(by_logprobs, slopes.to(dtype), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(by_entropy, entropy_slopes.to(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_columns_and_expanded_numbers(backend: str) -> None:
    columns = batch(60)
    strided = {name: torch.stack([value, value * 0 + 9], 1)[:, 0].reshape(5, 12) for name, value in columns.items()}
    strided["old_logprobs"] = strided["old_logprobs"].t().contiguous().t()
    strided["weights"] = torch.tensor(0.25).expand(5, 12)
    strided["advantages"] = torch.tensor(-1.5).expand(5, 12)
    dense = {name: value.contiguous().flatten() for name, value in strided.items()}
    with use_backend(backend):
        found, by_logprobs, _ = run(strided, {}, None, sequence_bounds(60))
        expected, slopes, _ = run(dense, {}, None, sequence_bounds(60))
    assert torch.equal(found.loss, expected.loss) and torch.equal(by_logprobs.flatten(), slopes)


@pytest.mark.skipif(not native_status().available, reason="not built")
def test_blocks_and_threads_do_not_change_a_bit() -> None:
    columns = batch(5000, extra=ALL)
    threads, found = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        with use_backend("native"):
            found.append(token_terms(**columns, settings=PolicyLossSettings(kl_coefficient=0.1)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


HAND = [
    # log ratio ln 2 everywhere, advantage 3, weight 1/2, logprob -1: (form and options, loss, derivative)
    ({"form": "ppo"}, -1.8, 0.0),
    ({"form": "ppo", "clip_high": 2.0}, -3.0, -3.0),
    ({"form": "ppo", "clip_high": 2.0, "ratio_cap": 1.5}, -2.25, 0.0),
    ({"form": "cispo"}, 1.8, -1.8),
    ({"form": "cispo_cap", "ratio_cap": 5.0}, 3.0, -3.0),
    ({"form": "cispo_cap", "ratio_cap": 1.5}, 2.25, -2.25),
    ({"form": "reinforce"}, 1.5, -1.5),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(len(HAND)))
def test_absolute_values(number: int, backend: str) -> None:
    options, loss, slope = HAND[number]
    logprobs = torch.tensor([-1.0], requires_grad=True)
    old = torch.tensor([-1.0 - math.log(2.0)])
    with use_backend(backend):
        result = policy_loss(logprobs, old, torch.tensor([3.0]), torch.tensor([0.5]), **options)
        result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(loss, rel=1e-6)
    assert float(logprobs.grad) == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gspo_ratio_is_the_geometric_mean_of_the_sequence(backend: str) -> None:
    log_ratios = torch.tensor([0.1, 9.0, 0.3, 0.0, -0.2])  # the second token is masked
    old = torch.full((5,), -2.0)
    logprobs = (old + log_ratios).requires_grad_()
    mask = torch.tensor([True, False, True, True, True])
    with use_backend(backend):
        result = policy_loss(
            logprobs, old, torch.ones(5), torch.ones(5), form="gspo", clip_high=0.21, clip_low=0.5, mask=mask,
            cu_seqlens=torch.tensor([0, 3, 5]),
        )  # fmt: skip
        result.loss.backward()
    # Means 0.2 (clipped: exp 0.2 = 1.2214 > 1.21) and -0.1.
    assert float(result.loss.detach()) == pytest.approx(-(2 * 1.21 + 2 * math.exp(-0.1)), rel=1e-6)
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 0.0, -math.exp(-0.1), -math.exp(-0.1)], rel=1e-6)
    assert float(result.clipped_high) == 2


@pytest.mark.parametrize(
    "options, word",
    [
        ({"form": "trpo"}, "'form'"),
        ({"form": "gspo"}, "'cu_seqlens'"),
        ({"form": "gspo", "cu_seqlens": torch.tensor([0, 2])}, "rise from 0 to 3"),
        ({"form": "gspo", "cu_seqlens": torch.tensor([0, 2, 1, 3])}, "rise from 0 to 3"),
        ({"form": "gspo", "cu_seqlens": torch.tensor([0.0, 3.0])}, "'cu_seqlens'"),
        ({"form": "cispo_cap"}, "'ratio_cap'"),
        ({"form": "cispo", "ratio_cap": 2.0}, "'ratio_cap'"),
        ({"form": "reinforce", "dual_clip": 3.0}, "'dual_clip'"),
        ({"ratio_cap": 0.0}, "'ratio_cap'"),
        ({"kl_coefficient": 0.1}, "'ref_logprobs'"),
        ({"entropy_coefficient": 0.1}, "'entropy'"),
        ({"kl_estimator": "k9"}, "'kl_estimator'"),
        ({"kl_clamp": "nobody"}, "'kl_clamp'"),
        ({"min_log_ratio": 1.0, "max_log_ratio": 0.0}, "'min_log_ratio'"),
        ({"importance_weights": torch.zeros(4)}, "'importance_weights'"),
        ({"entropy": torch.zeros(3, dtype=torch.int64)}, "'entropy'"),
        ({"mask": torch.zeros(3)}, "'mask'"),
    ],
)
def test_wrong_arguments_are_named(options: dict, word: str) -> None:
    three = torch.zeros(3)
    with pytest.raises(ValueError, match=word):
        policy_loss(three, three, three, three, **options)


def test_token_terms_want_a_ratio_per_token() -> None:
    three = torch.zeros(3)
    with pytest.raises(ValueError, match="'form'"):
        token_terms(three, three, three, three, settings=PolicyLossSettings(form="gspo"))


@pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")
@pytest.mark.parametrize("count", [15, 16, 17, 16 * 7 + 1])
def test_block_edges_and_programs_of_several_blocks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zs_kernels._policy_backends.MAX_PROGRAMS", 3)
    columns, mask = batch(count, extra=ALL), torch.arange(count) % 5 != 1
    settings = PolicyLossSettings(dual_clip=1.5, kl_coefficient=0.3, entropy_coefficient=0.1)
    order = ("logprobs", "old_logprobs", "advantages", "weights", "entropy", "ref_logprobs", "importance_weights")
    given = [columns[name] for name in order]
    *found, totals = _policy_terms_triton(*given, mask, settings, block=16)
    with use_backend("reference"):
        expected = token_terms(*given, mask, settings=settings)
    for mine, theirs in zip(found, expected, strict=False):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(totals, torch.cat([expected.loss.sum()[None], expected.metrics]), rtol=1e-5, atol=1e-6)
