"""The policy loss straight from hidden states and the output head, its gradient computed on the way: three products.

    logprob_n, entropy_n    of index_n under softmax(head(hidden_n) / temperature_n)          (see linear_logprobs.py)
    loss    = sum_n weight_n policy(logprob_n, old_logprob_n, advantage_n, ...)               (see policy_loss.py)

N = rows (tokens), H = hidden size, V = vocabulary. For each chunk of rows: the logits are made (product 1), statistics
and loss derivatives of each token follow from one sweep, a second sweep writes the gradient over the logits, and that
goes into the hidden states (product 2) and the weight (product 3). The upstream gradient of a loss is one number, and
the backward pass has nothing left to do but to multiply by it. Compared with a loss computed from `linear_logprobs`
this saves computing the logits a second time, or keeping them; the mathematics is the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zs_kernels import _cuda, _linear
from zs_kernels._check import require, require_floating, require_index, require_integers, require_mask, require_positive
from zs_kernels._device import backend_of
from zs_kernels._linear import Head, HeadGradients, Lora, Wanted
from zs_kernels._linear_passes import pack_rows, rows_with_gradient
from zs_kernels._linear_shards import Shards, group_name
from zs_kernels._policy_epilogue import _policy_epilogue_triton, _scale_triton
from zs_kernels._policy_terms import N_METRICS, PolicyLossSettings, check_settings
from zs_kernels.policy_loss import token_terms
from zs_kernels.token_logprobs import Sweep, merge_partials, sweep_gradient, sweep_partials, sweep_statistics

OP = "linear_policy_loss"
DEFAULT_SETTINGS = PolicyLossSettings()
FEW_ROWS = 264
"""Below two rows for each of 132 multiprocessors, sweeps that share out a row's columns beat one program per row."""


class LinearPolicyLoss(NamedTuple):
    """The loss to minimise; the rest carries no gradient."""

    loss: Tensor
    """[] float32"""
    logprobs: Tensor
    """[N], 0 where masked"""
    entropy: Tensor
    """[N], 0 where masked"""
    metrics: Tensor
    """[N_METRICS] sums over unmasked tokens, in the order of policy_loss.METRICS"""


class _Tokens(NamedTuple):
    """What the loss knows of each (compacted) row."""

    index: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None

    def part(self, rows: slice | Tensor | None) -> _Tokens:
        """The given rows of each, dense."""
        if isinstance(rows, slice):
            return _Tokens(*(None if x is None else x[rows] for x in self))
        return _Tokens(*(None if x is None else _linear.selected(x, rows) for x in self))


@dataclass(frozen=True, slots=True)
class _Call:
    """What stays the same from chunk to chunk."""

    head: Head
    settings: PolicyLossSettings
    wanted: Wanted
    scale: Tensor | None
    """[] float32, multiplies all gradients: float16 would lose the small ones."""
    workspace_bytes: int
    shards: Shards | None
    largest_shard: int
    """Vocabulary rows of it: all processes work off the same chunks."""

    def statistics(self, logits: Tensor, index: Tensor, inverse: float | Tensor) -> Sweep:
        """Of a chunk, over all shards of the vocabulary."""
        options: dict[str, Any] = {"bias": self.head.bias, "softcap": self.head.softcap, "bias_first": True}
        if self.shards is None:
            return sweep_statistics(logits, index, inverse, entropy=True, **options)
        return merge_partials(self.shards.gather(sweep_partials(logits, index, inverse, **options)))


def _chunk_gradient(
    call: _Call, logits: Tensor, dlogits: Tensor, inverse: float | Tensor, tokens: _Tokens
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log-probabilities, entropies [M], rows that dlogits is for) of a chunk; dlogits <- its gradient.

    The rows are None for all, or the indices of those with a gradient, whose rows are then the first ones of dlogits.
    """
    head, settings = call.head, call.settings
    index, old, advantages, weights, ref, importance = tokens
    enough = logits.shape[0] >= FEW_ROWS or not logits.is_cuda
    if backend_of(logits) == "triton" and call.shards is None and enough:
        columns = (old, advantages, weights, ref, importance, call.scale, settings)
        if _cuda.takes(logits, dlogits, head.bias, head.softcap):
            logprobs, _, entropies = _cuda.policy_rows(logits, dlogits, index, inverse, *columns)
        else:
            given = (index, inverse, head.bias, head.softcap, *columns)
            logprobs, _, entropies = _policy_epilogue_triton(logits, dlogits, *given)
        return logprobs, entropies, None
    sweep = call.statistics(logits, index, inverse)
    logprobs, entropies = sweep.logprobs, sweep.entropy
    has_entropy = settings.entropy_coefficient != 0.0
    terms = token_terms(
        logprobs,
        logprobs if old is None else old,
        advantages,
        weights if call.scale is None else weights * call.scale,
        entropies if has_entropy else None,
        ref,
        importance,
        settings=settings,
    )
    grads = (terms.grad_logprobs, terms.grad_entropy) if has_entropy else (terms.grad_logprobs,)
    live = rows_with_gradient(*grads)
    if live is not None:
        pack_rows(logits, live)
        logits, dlogits = logits[: live.numel()], dlogits[: live.numel()]

    def kept(column: Any) -> Any:
        return column[live] if live is not None and isinstance(column, Tensor) else column

    sweep_gradient(
        logits,
        kept(index),
        kept(terms.grad_logprobs),
        kept(terms.grad_entropy) if has_entropy else None,
        kept(sweep.logsumexp),
        kept(entropies) if has_entropy else None,
        kept(inverse),
        bias=head.bias,
        softcap=head.softcap,
        bias_first=True,
        out=dlogits,
    )
    return logprobs, entropies, live


def _all_chunks(
    call: _Call, hidden: Tensor, inverse: float | Tensor, tokens: _Tokens
) -> tuple[Tensor, Tensor, HeadGradients]:
    """(log-probabilities [M], entropies [M], gradients) of all rows."""
    head, rows = call.head, hidden.shape[0]
    row_bytes = head.row_bytes // head.vocabulary * call.largest_shard
    chunks = _linear.planned_chunks(rows, row_bytes, call.workspace_bytes or None, hidden.device)
    height = max((here.stop - here.start for here in chunks), default=0)
    gradients = HeadGradients(head, hidden, call.wanted, len(chunks))
    dtype = _linear.statistics_dtype(hidden.dtype)
    logprobs = torch.empty(rows, dtype=dtype, device=hidden.device)
    entropies = torch.empty_like(logprobs)
    workspace = hidden.new_empty(height, head.vocabulary, dtype=head.logits_dtype)
    apart = head.logits_dtype != hidden.dtype and call.wanted.any()
    own = hidden.new_empty(height if apart else 0, head.vocabulary)
    for here in chunks:
        states, logits = hidden[here], workspace[: here.stop - here.start]
        scales = _linear.part_of(inverse, here)
        head.logits(states, logits)
        if not call.wanted.any():
            sweep = call.statistics(logits, tokens.index[here], scales)
            logprobs[here], entropies[here] = sweep.logprobs, sweep.entropy
            continue
        dlogits = own[: here.stop - here.start] if apart else logits
        logprobs[here], entropies[here], live = _chunk_gradient(call, logits, dlogits, scales, tokens.part(here))
        if live is None:
            gradients.add(dlogits, states, here)
        else:
            gradients.add(dlogits[: live.numel()], states[live], live + here.start)
    if call.shards is not None:
        gradients.sum_over(call.shards)
    return logprobs, entropies, gradients


def _gradient_scale(hidden: Tensor, advantages: Tensor, weights: Tensor) -> Tensor | None:
    """[] float32: brings a token's gradient near 1 for float16; None for other types, whose range is wide enough."""
    if hidden.dtype != torch.float16 or hidden.shape[0] == 0:
        return None
    largest = (weights.float().abs() * (advantages.float().abs() + 1.0)).amax()
    return torch.where(largest > 0.0, largest, 1.0).reciprocal()


@torch.library.custom_op("zs_kernels::linear_policy_loss", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    mask_count: int,
    lora_scale: float,
    temperature: float,
    softcap: float,
    exact: bool,
    workspace_bytes: int,
    group: str,
    vocabulary_start: int,
    largest_shard: int,
    wanted: Sequence[bool],
    handed_over: bool,
    form: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_cap: float | None,
    kl_coefficient: float,
    kl_estimator: str,
    kl_clamp: str,
    entropy_coefficient: float,
    min_log_ratio: float,
    max_log_ratio: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], logprobs [N], entropy [N], metrics, gradients of hidden, weight, bias, lora_a, lora_b times `scale`,
    1 / scale [] or [0] for 1); a gradient that is not wanted is [0].

    handed_over: the caller forgets the gradients, so that the backward pass may change and pass on these very tensors.
    """
    settings = PolicyLossSettings(
        form, clip_low, clip_high, dual_clip, ratio_cap, kl_coefficient, kl_estimator, kl_clamp, entropy_coefficient,
        min_log_ratio, max_log_ratio,
    )  # fmt: skip
    total = hidden.shape[0]
    head = Head(weight, bias, softcap or None, exact, lora_a, lora_b, lora_scale)
    shards = Shards(group) if group else None
    limit, largest = weight.shape[0], weight.shape[0]
    if shards is not None and hidden.is_cuda and largest_shard:
        limit, largest = 1 << 62, largest_shard
    elif shards is not None:
        limit, largest = shards.layout(OP, vocabulary_start, largest, total, hidden.device)
    require_index(OP, "index", index, (total,), limit, device=hidden.device, mask=mask)
    with _linear.without_autocast(hidden.device):
        rows = _linear.compacted(OP, mask, mask_count)
        targets = index - vocabulary_start if group else index
        all_tokens = _Tokens(targets, old_logprobs, advantages, weights, ref_logprobs, importance_weights)
        tokens = all_tokens.part(rows)
        states = _linear.selected(hidden, rows)
        scale = _gradient_scale(states, tokens.advantages, tokens.weights)
        call = _Call(head, settings, Wanted(*wanted), scale, workspace_bytes, shards, largest)
        inverse = _linear.inverse_temperature(temperature, row_temperature, rows)
        logprobs, entropies, gradients = _all_chunks(call, states, inverse, tokens)
        _, old, *others, ref, importance = tokens
        old = logprobs if old is None else old
        terms = token_terms(logprobs, old, *others, entropies, ref, importance, settings=settings)
        grad_hidden, *grads = gradients.results()
        return (
            terms.loss.sum(),
            _linear.spread(logprobs, rows, total),
            _linear.spread(entropies, rows, total),
            terms.metrics,
            _linear.spread(grad_hidden, rows, total) if wanted[0] else grad_hidden,
            *grads,
            hidden.new_empty(0, dtype=torch.float32) if scale is None else scale.reciprocal(),
        )


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    rows, wanted = hidden.shape[0], rest[13]
    dtype = _linear.statistics_dtype(hidden.dtype)
    scaled = hidden.dtype == torch.float16 and rows > 0
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(N_METRICS, dtype=dtype),
        *_linear.empty_gradients((hidden, weight, bias, lora_a, lora_b), wanted),
        hidden.new_empty(() if scaled else 0, dtype=torch.float32),
    )


@torch.library.custom_op("zs_kernels::scale_", mutates_args={"values"})
def _scale(values: Tensor, factor: Tensor) -> None:
    """values *= factor [], in place; costs nothing where it is 1, and never makes the host wait for a GPU."""
    if values.device.type == "cpu":
        if (number := factor.item()) != 1.0:
            values.mul_(number)
    elif backend_of(values) == "triton" and values.is_contiguous():
        _scale_triton(values, factor)
    else:
        for part in _linear.slices(values.shape[0], _linear.GRADIENT_SLICE_ROWS):
            values[part] = (values[part] * factor.reshape(1)).to(values.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.gradients = output[4:]
    ctx.wanted, ctx.handed_over = inputs[22], inputs[23]


def _scaled(gradient: Tensor, factor: Tensor, handed_over: bool) -> Tensor:
    """In place where it may be; not in a graph that is being traced, whose forward pass must not see its backward."""
    if not handed_over or type(gradient) is not Tensor:
        return (gradient * factor.reshape(1)).to(gradient.dtype)
    _scale(gradient, factor)
    return gradient


def _run_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if ctx.gradients is None:
        raise RuntimeError(
            "linear_policy_loss: a second backward pass through the same loss: the first one has handed over the "
            "gradients, which were computed with the loss; compute the loss again"
        )
    *gradients, unscale = ctx.gradients
    ctx.gradients = None
    if grad_loss is None:
        return (None,) * 35
    factor = grad_loss.to(torch.float32) * unscale if unscale.dim() == 0 else grad_loss
    hidden, weight, bias, lora_a, lora_b = (
        _scaled(gradient, factor, ctx.handed_over) if wish else None
        for gradient, wish in zip(gradients, ctx.wanted, strict=True)
    )
    return hidden, weight, None, None, None, None, bias, lora_a, lora_b, *[None] * 26


_forward.register_autograd(_run_backward, setup_context=_setup_context)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    settings: PolicyLossSettings = DEFAULT_SETTINGS,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    mask_count: int | None = None,
    exact: bool = False,
    workspace_bytes: int | None = None,
    lora: Lora | None = None,
    process_group: object = None,
    vocabulary_start: int = 0,
    largest_shard: int | None = None,
) -> LinearPolicyLoss:
    """Loss of tokens [N] with its gradient by hidden, weight, bias and lora; statistics and metrics without.

    hidden, weight, index, bias, temperature, softcap, mask, mask_count, exact, workspace_bytes, lora, process_group,
    vocabulary_start: as for linear_logprobs. old_logprobs: [N], or None for the log-probabilities themselves (the first
    update on what this policy sampled: all ratios are 1). advantages, weights [N], ref_logprobs, importance_weights
    [N]: as for policy_loss, as are the fields of `settings`; its form gspo needs whole sequences and is refused (take
    linear_logprobs and policy_loss). largest_shard: with process_group, the most vocabulary rows that a process holds,
    where the caller knows it: without it a GPU's host waits for the processes to agree on their chunks.
    Where no gradient is wanted none is computed. The gradients are made for an upstream gradient of 1 and multiplied by
    another one in place, so one backward pass can go through a loss, and no second derivative.
    Raises ValueError, TypeError or IndexError that names the argument.
    """
    hidden, weight, bias, lora = _linear.autocast_operands(hidden, weight, bias, lora)
    _linear.check_operands(OP, hidden, weight, bias)
    _linear.check_lora(OP, lora, hidden, weight)
    rows, device = hidden.shape[0], hidden.device
    columns = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "importance_weights": importance_weights}
    given = {name: value for name, value in columns.items() if value is not None}
    for name, value in ({"advantages": advantages, "weights": weights} | given).items():
        require_floating(OP, name, value, shape=(rows,))
        require(value.device == device, OP, name, "on the device of 'hidden'", value)
    require_mask(OP, "mask", mask, (rows,), device)
    require(settings.form != "gspo", OP, "form", "one with a ratio per token", settings.form)
    check_settings(OP, settings, has_ref=ref_logprobs is not None, has_entropy=True)
    group = group_name(OP, process_group)
    require(bool(group) or vocabulary_start == 0, OP, "vocabulary_start", "0 without process_group", vocabulary_start)
    require_integers(OP, "index", index, (rows,), device=device)
    require_positive(OP, "temperature", temperature, (rows,))
    for name, number in (("softcap", softcap), ("workspace_bytes", workspace_bytes)):
        if number is not None:
            require_positive(OP, name, number)
    if largest_shard is not None:
        require(
            bool(group) and largest_shard >= weight.shape[0],
            OP,
            "largest_shard",
            "None or a shard's size",
            largest_shard,
        )
    mask_count = _linear.counted(OP, mask, mask_count)
    a, b, scale = (None, None, 1.0) if lora is None else lora
    by_row = isinstance(temperature, Tensor)
    loss, logprobs, entropy, metrics, *_ = _forward(
        hidden,
        weight,
        index.long(),
        *[None if x is None else x.detach() for x in (old_logprobs, advantages, weights)],
        bias,
        a,
        b,
        *[None if x is None else x.detach() for x in (ref_logprobs, importance_weights)],
        temperature.detach() if by_row else None,
        mask,
        mask_count,
        float(scale),
        1.0 if by_row else float(temperature),
        float(softcap or 0.0),
        exact and weight.dtype in (torch.float16, torch.bfloat16),
        int(workspace_bytes or 0),
        group,
        vocabulary_start,
        int(largest_shard or 0),
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias, a, b)],
        True,
        *settings,
    )
    return LinearPolicyLoss(loss, logprobs, entropy, metrics)
