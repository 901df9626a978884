"""linear_policy_loss: the same loss and gradients as log-probabilities and policy_loss one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.ops.op_bodies import Made, Products
from zs_kernels._device import native_status, use_backend
from zs_kernels._triton import AVAILABLE, INTERPRETED
from zs_kernels.linear_logprobs import linear_logprobs_reference
from zs_kernels.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from zs_kernels.policy_loss import METRICS, PolicyLossSettings, policy_loss
from zs_kernels.testing import assert_no_worse_than_torch, poison_empty, seeded

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native_status().available, reason="not built")),
    pytest.param("triton", marks=pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="no interpreter")),
]
SETTINGS = {
    "clip": PolicyLossSettings(),
    "clip, dual, kl, entropy": PolicyLossSettings(
        clip_low=0.1, clip_high=0.3, dual_clip=3.0, kl_coefficient=0.05, entropy_coefficient=0.01
    ),
    "cispo": PolicyLossSettings(form="cispo", kl_coefficient=0.1, kl_estimator="k2"),
    "reinforce": PolicyLossSettings(form="reinforce", entropy_coefficient=0.1),
}
WIDE = {
    "clip": PolicyLossSettings(clip_low=0.9, clip_high=5.0),
    "kl, entropy": PolicyLossSettings(clip_low=0.9, clip_high=5.0, kl_coefficient=0.05, entropy_coefficient=0.01),
}
"""Bounds that no ratio reaches, on either side of which rounded logits could put it."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


class Case:
    """Operands of one loss, on or near the policy that sampled; the same numbers in any type."""

    def __init__(self, rows: int, size: int, vocabulary: int, *, spread: float = 3.0, seed: int = 0) -> None:
        self.hidden = seeded(rows, size, seed=seed)
        self.weight = seeded(vocabulary, size, seed=seed + 1, scale=spread / size**0.5)
        self.bias = seeded(vocabulary, seed=seed + 2)
        self.index = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
        scored = linear_logprobs_reference(self.hidden, self.weight, self.index, bias=self.bias).logprobs
        self.tokens: dict[str, Tensor] = {
            "old_logprobs": scored + seeded(rows, seed=seed + 3, scale=0.3),
            "advantages": seeded(rows, seed=seed + 4),
            "weights": seeded(rows, seed=seed + 5).abs() / max(rows, 1),
        }
        self.more = {
            "ref_logprobs": scored + seeded(rows, seed=seed + 6, scale=0.3),
            "importance_weights": seeded(rows, seed=seed + 7).abs(),
        }

    def leaves(self, dtype: torch.dtype, bias: bool) -> dict[str, Tensor]:
        wanted = {"hidden": self.hidden, "weight": self.weight} | ({"bias": self.bias} if bias else {})
        return {name: value.detach().to(dtype, copy=True).requires_grad_() for name, value in wanted.items()}

    def fused(
        self,
        dtype: torch.dtype,
        settings: PolicyLossSettings,
        *,
        bias: bool = True,
        upstream: float = 1.0,
        **options: Any,
    ) -> tuple[LinearPolicyLoss, dict[str, Tensor]]:
        leaves = self.leaves(dtype, bias)
        more = self.more if settings.kl_coefficient else {}
        result = linear_policy_loss(
            leaves["hidden"],
            leaves["weight"],
            self.index,
            *self.tokens.values(),
            bias=leaves.get("bias"),
            settings=settings,
            **more,
            **options,
        )
        (result.loss * upstream).backward()
        return result, {name: leaf.grad for name, leaf in leaves.items()}

    def unfused(
        self,
        dtype: torch.dtype,
        settings: PolicyLossSettings,
        *,
        bias: bool = True,
        upstream: float = 1.0,
        mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """Plain torch: all logits, autograd, then policy_loss; in the types that torch gives them."""
        leaves = self.leaves(dtype, bias)
        scored = linear_logprobs_reference(
            leaves["hidden"], leaves["weight"], self.index, bias=leaves.get("bias"), entropy=True, **options
        )
        wide = scored.logprobs.dtype
        tokens = [value.to(wide) for value in self.tokens.values()]
        more = {name: value.to(wide) for name, value in self.more.items()} if settings.kl_coefficient else {}
        result = policy_loss(scored.logprobs, *tokens, entropy=scored.entropy, mask=mask, **more, **settings._asdict())
        (result.loss * upstream).backward()
        return result, scored.logprobs.detach(), {name: leaf.grad for name, leaf in leaves.items()}


# one row; odd sizes with a chunk that is not full; a vocabulary beside a block of the kernel
@pytest.mark.parametrize("rows, size, vocabulary, chunk", [(1, 3, 7, 1), (17, 5, 33, 4), (9, 7, 129, 16)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(
    "options", [{}, {"temperature": "rows", "softcap": 5.0}], ids=["plain", "softcap, temperatures"]
)
def test_equals_log_probs_and_loss_one_after_the_other_in_float64(
    rows: int, size: int, vocabulary: int, chunk: int, settings: PolicyLossSettings, options: dict[str, Any]
) -> None:
    case = Case(rows, size, vocabulary)
    if "temperature" in options:
        options = options | {"temperature": seeded(rows, seed=9, dtype=torch.float64).abs() + 0.5}
    exact, logprobs, gradients = case.unfused(torch.float64, settings, upstream=-0.7, **options)
    ours, grads = case.fused(torch.float64, settings, upstream=-0.7, workspace_bytes=chunk * vocabulary * 8, **options)
    torch.testing.assert_close(ours.loss, exact.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.logprobs, logprobs, rtol=1e-9, atol=1e-10)
    for name, value in zip(METRICS, ours.metrics.unbind(), strict=True):
        torch.testing.assert_close(value, getattr(exact, name).to(value.dtype), rtol=1e-9, atol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows, size, vocabulary", [(3, 5, 127), (9, 19, 1025), (5, 16, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", WIDE.values(), ids=WIDE.keys())
@pytest.mark.parametrize("chunks", [1, 3])
def test_no_worse_than_torch_in_that_type(
    backend: str, rows: int, size: int, vocabulary: int, dtype: torch.dtype, settings: PolicyLossSettings, chunks: int
) -> None:
    spread = 6.0 if dtype == torch.float32 else 1.0  # large logits rounded to 16 bits leave it to luck who errs more
    case, rounded = (Case(rows, size, vocabulary, spread=spread) for _ in range(2))
    rounded.hidden, rounded.weight, rounded.bias = (x.to(dtype) for x in (case.hidden, case.weight, case.bias))
    exact, exact_logprobs, exact_grads = rounded.unfused(torch.float64, settings, upstream=0.3)
    torchs, torch_logprobs, torch_grads = case.unfused(dtype, settings, upstream=0.3)
    workspace = -(-rows // chunks) * vocabulary * dtype.itemsize
    with poison_empty():
        ours, grads = case.fused(dtype, settings, upstream=0.3, workspace_bytes=workspace)
    floor = {torch.float32: 6e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    assert ours.loss.dtype == ours.logprobs.dtype == torch.float32
    assert_no_worse_than_torch(ours.logprobs, torch_logprobs, exact_logprobs, floor=floor, name="logprobs")
    size_of_terms = float((case.tokens["weights"] * case.tokens["advantages"]).abs().sum())  # they may cancel
    error, torch_error = (abs(float(result.loss - exact.loss)) for result in (ours, torchs))
    assert error <= 1.1 * torch_error + 4 * floor * size_of_terms
    for name, gradient in exact_grads.items():
        assert grads[name].dtype == dtype
        assert_no_worse_than_torch(grads[name], torch_grads[name], gradient, floor=floor, name=name)


def test_masked_rows_cost_nothing_and_may_hold_anything(backend: str) -> None:
    case, settings = Case(11, 5, 130), SETTINGS["clip, dual, kl, entropy"]
    mask = torch.arange(11) % 3 != 1
    expected, logprobs, gradients = case.unfused(torch.float32, settings, mask=mask)
    nan = torch.where(mask, 0.0, torch.nan)
    case.hidden = case.hidden + nan[:, None]
    case.tokens = {name: value + nan for name, value in case.tokens.items()}
    case.more = {name: value + nan for name, value in case.more.items()}
    case.index = torch.where(mask, case.index, -100)
    for count in (None, 7):
        with poison_empty():
            ours, grads = case.fused(torch.float32, settings, mask=mask, mask_count=count, workspace_bytes=3 * 130 * 4)
        torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.logprobs, torch.where(mask, logprobs, 0.0), rtol=1e-5, atol=1e-5)
        assert (ours.entropy[~mask] == 0).all()
        torch.testing.assert_close(dict(zip(METRICS, ours.metrics.tolist(), strict=True))["token_count"], 7.0)
        assert (grads["hidden"][~mask] == 0).all()
        for name in ("weight", "bias"):
            torch.testing.assert_close(grads[name], gradients[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grads["hidden"][mask], gradients["hidden"][mask], rtol=1e-4, atol=1e-6)


def test_tokens_without_a_gradient_are_left_out_and_change_nothing(backend: str) -> None:
    case, settings = Case(24, 6, 65), SETTINGS["clip"]
    case.tokens["advantages"] = torch.where(torch.arange(24) % 4 == 2, case.tokens["advantages"], 0.0)
    expected, _, gradients = case.unfused(torch.float32, settings)
    ours, grads = case.fused(torch.float32, settings, workspace_bytes=9 * 65 * 4)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert ours.metrics[METRICS.index("token_count")] == 24
    for name, gradient in gradients.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows, mask", [(0, None), (4, torch.zeros(4, dtype=torch.bool))])
def test_nothing_to_score(backend: str, rows: int, mask: Tensor | None) -> None:
    ours, grads = Case(rows, 3, 5).fused(torch.bfloat16, SETTINGS["clip"], mask=mask)
    assert ours.loss == 0 and ours.logprobs.shape == (rows,) and (ours.metrics == 0).all()
    assert all((grad == 0).all() for grad in grads.values())


def test_without_old_log_probs_every_ratio_is_one(backend: str) -> None:
    case = Case(6, 5, 31)
    case.tokens["old_logprobs"] = None
    ours, grads = case.fused(torch.float32, SETTINGS["clip"])
    assert ours.metrics[METRICS.index("ratio_sum")] == 6
    case.tokens["old_logprobs"] = ours.logprobs
    _, again = case.fused(torch.float32, SETTINGS["clip"])
    for name, gradient in grads.items():
        assert torch.equal(gradient, again[name])


def test_exact_mode_puts_no_rounding_between_the_products_and_the_softmax(backend: str) -> None:
    case = Case(19, 24, 515, spread=8.0)
    case.hidden, case.weight, case.bias = (x.bfloat16() for x in (case.hidden, case.weight, case.bias))
    _, exact, exact_grads = case.unfused(torch.float64, SETTINGS["clip"])
    rounded, _ = case.fused(torch.bfloat16, SETTINGS["clip"])
    ours, grads = case.fused(torch.bfloat16, SETTINGS["clip"], exact=True, workspace_bytes=8 * 515 * 6)
    assert (ours.logprobs - exact).abs().max() <= 2e-5 < (rounded.logprobs - exact).abs().max()
    for name, gradient in exact_grads.items():
        assert grads[name].dtype == torch.bfloat16
        torch.testing.assert_close(grads[name].double(), gradient, rtol=0.02, atol=0.01 * float(gradient.abs().max()))


def test_a_frozen_head_costs_no_weight_gradient_and_no_grad_none_at_all() -> None:
    case, wide = Case(6, 5, 700), WIDE["clip"]
    case.tokens["old_logprobs"] = None
    leaves = case.leaves(torch.float32, False)
    weight = leaves["weight"].detach()
    with Products() as products:
        linear_policy_loss(leaves["hidden"], weight, case.index, *case.tokens.values(), settings=wide).loss.backward()
    assert products.count == 2 and leaves["hidden"].grad is not None
    with Products() as products, torch.no_grad():
        result = linear_policy_loss(leaves["hidden"], leaves["weight"], case.index, *case.tokens.values())
    assert products.count == 1 and not result.loss.requires_grad
    with Products() as products:
        case.fused(torch.float32, wide, bias=False)
    assert products.count == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_one_chunk_of_logits(dtype: torch.dtype) -> None:
    case, chunk = Case(64, 4, 1000), 8
    with Products() as products:
        case.fused(dtype, SETTINGS["clip, dual, kl, entropy"], workspace_bytes=chunk * 1000 * dtype.itemsize)
    assert products.largest <= chunk * 1000


def test_upstream_gradients_scale_and_a_second_backward_pass_is_refused() -> None:
    case = Case(5, 4, 17)
    _, once = case.fused(torch.bfloat16, SETTINGS["clip"])
    _, third = case.fused(torch.bfloat16, SETTINGS["clip"], upstream=1 / 3)
    for name, gradient in once.items():  # rounded twice, never three times
        torch.testing.assert_close(third[name].float(), gradient.float() / 3, rtol=2.0**-8, atol=0.0)
    leaves = case.leaves(torch.float32, False)
    loss = linear_policy_loss(leaves["hidden"], leaves["weight"], case.index, *case.tokens.values()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_policy_loss.*second backward"):
        loss.backward()


def test_gradients_are_handed_over_and_not_copied() -> None:
    case = Case(5, 4, 17)
    leaves = case.leaves(torch.float32, False)
    with Made(17 * 4) as made:
        loss = linear_policy_loss(leaves["hidden"], leaves["weight"], case.index, *case.tokens.values()).loss
    loss.backward()
    assert leaves["weight"].grad.untyped_storage().data_ptr() in made.places


def test_float16_gradients_do_not_underflow_before_the_loss_scale(backend: str) -> None:
    case = Case(8, 8, 300, spread=0.1)  # flat rows: probabilities of 1 / 300
    case.hidden, case.weight, case.bias = (x.half() for x in (case.hidden, case.weight, case.bias))
    case.tokens["weights"] = torch.full((8,), 1e-6)
    _, _, exact = case.unfused(torch.float64, SETTINGS["clip"], upstream=65536.0)
    _, grads = case.fused(torch.float16, SETTINGS["clip"], upstream=65536.0)
    for name, gradient in exact.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(grads[name].double(), gradient, rtol=0.0, atol=4e-3 * largest)


def test_tied_weights_get_one_summed_gradient(backend: str) -> None:
    case = Case(6, 4, 20)
    grads = []
    for function in (policy_loss, linear_policy_loss):
        weight = case.weight.clone().requires_grad_()
        hidden = weight[case.index] * 2.0
        if function is policy_loss:
            scored = linear_logprobs_reference(hidden, weight, case.index)
            loss = policy_loss(scored.logprobs, *case.tokens.values()).loss
        else:
            loss = linear_policy_loss(hidden, weight, case.index, *case.tokens.values()).loss
        loss.backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_an_adapter_on_the_head_gets_its_gradients(backend: str) -> None:
    case = Case(9, 6, 70)
    a, b = seeded(2, 6, seed=20), seeded(70, 2, seed=21)
    grads = []
    for fused in (False, True):
        leaves = [x.clone().requires_grad_() for x in (case.hidden, a, b)]
        if fused:
            lora = (leaves[1], leaves[2], 0.5)
            loss = linear_policy_loss(leaves[0], case.weight, case.index, *case.tokens.values(), lora=lora).loss
        else:
            scored = linear_logprobs_reference(leaves[0], case.weight + 0.5 * leaves[2] @ leaves[1], case.index)
            loss = policy_loss(scored.logprobs, *case.tokens.values()).loss
        loss.backward()
        grads.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_same_inputs_give_the_same_bits(backend: str) -> None:
    case = Case(20, 16, 301)
    (first, one), (second, other) = (
        case.fused(torch.bfloat16, SETTINGS["clip"], workspace_bytes=7 * 602) for _ in range(2)
    )
    assert torch.equal(first.loss, second.loss) and all(torch.equal(one[name], other[name]) for name in one)


def test_registered_op_passes_opcheck() -> None:
    case = Case(5, 4, 33)
    mask = torch.arange(5) != 2
    for dtype, settings in ((torch.float32, SETTINGS["clip"]), (torch.float16, SETTINGS["clip, dual, kl, entropy"])):
        leaves = case.leaves(dtype, True)
        ref, importance = case.more.values() if settings.kl_coefficient else (None, None)
        head = (leaves["bias"], None, None)
        numbers = (4, 1.0, 1.0, 0.0, False, 33 * 4, "", 0, 0, [True, True, True, False, False], False)
        arguments = (leaves["hidden"], leaves["weight"], case.index, *case.tokens.values(), *head)
        torch.library.opcheck(
            torch.ops.zs_kernels.linear_policy_loss.default,
            (*arguments, ref, importance, None, mask, *numbers, *settings),
        )
    torch.library.opcheck(torch.ops.zs_kernels.scale_.default, (torch.ones(3, 2), torch.tensor(0.5)))


def test_compiles_to_one_graph_that_serves_any_number_of_rows() -> None:
    settings = SETTINGS["clip, dual, kl, entropy"]

    def step(hidden: Tensor, weight: Tensor, index: Tensor, mask: Tensor, *tokens: Tensor) -> Tensor:
        old, advantages, weights, ref = tokens
        result = linear_policy_loss(
            hidden, weight, index, old, advantages, weights, ref_logprobs=ref, mask=mask, settings=settings
        )
        return result.loss * 0.5

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for rows in range(5, 25):
        case = Case(rows, 4, 33)
        tokens = (*case.tokens.values(), case.more["ref_logprobs"])
        mask = torch.arange(rows) % 4 != 1
        grads = []
        for function in (step, compiled):
            leaves = case.leaves(torch.float32, False)
            loss = function(leaves["hidden"], leaves["weight"], case.index, mask, *tokens)
            loss.backward()
            grads.append([loss.detach(), leaves["hidden"].grad, leaves["weight"].grad])
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        frames.append(counter.frame_count)
    assert set(frames) == {frames[0]}, "a number of rows had to be compiled anew"


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"hidden": torch.zeros(4)}, ValueError, ["linear_policy_loss", "'hidden'", "[N, H]", "[4]"]),
        ({"weight": torch.zeros(5, 4)}, ValueError, ["'weight'", "[V, 3]", "[5, 4]"]),
        ({"index": torch.tensor([0, 5])}, IndexError, ["'index'", "[0, 5)"]),
        ({"advantages": torch.zeros(3)}, ValueError, ["'advantages'", "[2]", "[3]"]),
        ({"old_logprobs": torch.zeros(2, 1)}, ValueError, ["'old_logprobs'", "[2]", "[2, 1]"]),
        ({"weights": [1.0, 1.0]}, TypeError, ["'weights'", "tensor", "list"]),
        ({"settings": PolicyLossSettings(form="gspo")}, ValueError, ["'form'", "ratio per token", "gspo"]),
        ({"settings": PolicyLossSettings(kl_coefficient=0.1)}, ValueError, ["'ref_logprobs'", "kl_coefficient"]),
        ({"mask": torch.ones(2, dtype=torch.bool), "mask_count": 1}, ValueError, ["'mask_count'", "2", "1"]),
        ({"mask_count": 1}, ValueError, ["'mask_count'", "None without a mask", "1"]),
        ({"workspace_bytes": 0}, ValueError, ["'workspace_bytes'", "above 0"]),
        ({"lora": (torch.zeros(1, 4), torch.zeros(5, 1), 1.0)}, ValueError, ["'lora A'", "[r, 3]", "[1, 4]"]),
        ({"vocabulary_start": 3}, ValueError, ["'vocabulary_start'", "process_group", "3"]),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    names = ("hidden", "weight", "index", "old_logprobs", "advantages", "weights")
    given = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "index": torch.tensor([0, 4])}
    given |= {name: torch.zeros(2) for name in names[3:]} | change
    with pytest.raises(error) as caught:
        linear_policy_loss(*[given.pop(name) for name in names], **given)
    for word in words:
        assert word in str(caught.value)
