"""Exact KL(policy || reference) of each token over the whole vocabulary, straight from hidden states and output heads.

    z = (hidden @ weight.T + bias) / temperature,    r = (ref_hidden @ ref_weight.T + ref_bias) / temperature
    kl_n = sum_v p (log p - log q),    p = softmax(z_n), q = softmax(r_n)
    dlogits[n, v] = g_n p (log p - log q - kl_n) / temperature_n

g = upstream gradient. N = rows (tokens), H and G = hidden sizes of policy and reference, V = vocabulary. Statistics and
results in float32 (float64 for float64 inputs), in nats. Rows are worked off in chunks, whose two logits are all that
is held of size V; the backward pass computes them again, the policy's gradient over its logits. The gradient goes
to the policy's hidden states and head; the reference is frozen. A logit of -inf in the policy has probability 0 and
adds 0; one in the reference alone makes the row's KL infinite, and its gradient is then 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zs_kernels import _linear
from zs_kernels._check import require, require_mask, require_positive
from zs_kernels._device import backend_of
from zs_kernels._linear import Head, HeadGradients, Wanted, statistics_dtype
from zs_kernels._triton import tl, triton

OP = "linear_kl"
BLOCK = 4096
LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = 1.4426950408889634


def linear_kl_reference(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """What the op means: all logits at once, autograd for the rest. For finite logits."""
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    dtype = statistics_dtype(hidden.dtype)
    if mask is not None:
        hidden, ref_hidden = (torch.where(mask[:, None], states, 0.0) for states in (hidden, ref_hidden))
    logits, ref_logits = (hidden @ weight.T).to(dtype), (ref_hidden @ ref_weight.T).to(dtype)
    logits = logits if bias is None else logits + bias
    ref_logits = (ref_logits if ref_bias is None else ref_logits + ref_bias).detach()
    logp, logq = torch.log_softmax(logits / scale, dim=1), torch.log_softmax(ref_logits / scale, dim=1)
    kl = (logp.exp() * (logp - logq)).sum(dim=1)
    return kl if mask is None else torch.where(mask, kl, 0.0)


@triton.jit
def _kl_statistics_kernel(
    logits, ref_logits, bias, ref_bias, inverse, kls, tops, log_sums, ref_tops, ref_log_sums, columns, row_stride,
    ref_row_stride, scale,
    PER_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, one read of both rows, in base 2: kl, and of both rows the largest logit m and log2 of the
    sum of 2^((z - m) scale). Apart they are exact where a logsumexp far from 0 would round."""
    row = tl.program_id(0).to(tl.int64)
    if PER_ROW:
        scale = scale * tl.load(inverse + row).to(tl.float32)
    m = tl.full((), -float("inf"), tl.float32)
    ref_m = tl.full((), -float("inf"), tl.float32)
    s = tl.full((), 0.0, tl.float32)
    ref_s = tl.full((), 0.0, tl.float32)
    t = tl.full((), 0.0, tl.float32)
    for first in range(0, columns, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < columns
        z = tl.load(logits + row * row_stride + place, mask=inside, other=-float("inf")).to(tl.float32)
        r = tl.load(ref_logits + row * ref_row_stride + place, mask=inside, other=-float("inf")).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_REF_BIAS:
            r += tl.load(ref_bias + place, mask=inside, other=0.0).to(tl.float32)
        larger, ref_larger = tl.maximum(m, tl.max(z)), tl.maximum(ref_m, tl.max(r))
        top = tl.where(larger == -float("inf"), 0.0, larger)
        ref_top = tl.where(ref_larger == -float("inf"), 0.0, ref_larger)
        moved = tl.where(m == -float("inf"), 0.0, (m - top) * scale)
        ref_moved = tl.where(ref_m == -float("inf"), 0.0, (ref_m - ref_top) * scale)
        d, ref_d = (z - top) * scale, (r - ref_top) * scale
        e = tl.exp2(d)
        shrink = tl.exp2(moved)
        t = shrink * (t + s * (moved - ref_moved)) + tl.sum(tl.where(e > 0.0, e * (d - ref_d), 0.0))
        s = s * shrink + tl.sum(e)
        ref_s = ref_s * tl.exp2(ref_moved) + tl.sum(tl.exp2(ref_d))
        m, ref_m = larger, ref_larger
    alive = s != 0.0
    ref_alive = ref_s != 0.0
    log_s, ref_log_s = tl.log2(tl.where(alive, s, 1.0)), tl.log2(tl.where(ref_alive, ref_s, 1.0))
    kl = (t / tl.where(alive, s, 1.0) - (log_s - ref_log_s)) * LN2
    kl = tl.where(ref_alive, kl, float("inf"))
    kl = tl.where(kl < 0.0, 0.0, kl)  # rounding may leave it a hair below 0
    tl.store(kls + row, tl.where(alive, kl, 0.0))
    tl.store(tops + row, m)
    tl.store(log_sums + row, log_s)
    tl.store(ref_tops + row, ref_m)
    tl.store(ref_log_sums + row, ref_log_s)


@triton.jit
def _kl_gradient_kernel(
    logits, ref_logits, bias, ref_bias, inverse, kls, tops, log_sums, ref_tops, ref_log_sums, grads, out, columns,
    row_stride, ref_row_stride, out_row_stride, temperature_scale, scale,
    PER_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: out <- the gradient of the policy's logits; out may be the logits themselves."""
    row = tl.program_id(0).to(tl.int64)
    if PER_ROW:
        own = tl.load(inverse + row).to(tl.float32)
        scale = scale * own
        temperature_scale = temperature_scale * own
    kl, grad = tl.load(kls + row), tl.load(grads + row).to(tl.float32)
    top, log_s = tl.load(tops + row), tl.load(log_sums + row)
    ref_top, ref_log_s = tl.load(ref_tops + row), tl.load(ref_log_sums + row)
    # A row whose KL is infinite, or without a finite logit, has no gradient, whatever its columns would give.
    grad = tl.where(kl == float("inf"), 0.0, tl.where(top == -float("inf"), 0.0, grad))
    usable = grad != 0.0
    for first in range(0, columns, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < columns
        z = tl.load(logits + row * row_stride + place, mask=inside, other=-float("inf")).to(tl.float32)
        r = tl.load(ref_logits + row * ref_row_stride + place, mask=inside, other=-float("inf")).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_REF_BIAS:
            r += tl.load(ref_bias + place, mask=inside, other=0.0).to(tl.float32)
        logp = (z - top) * scale - log_s
        p = tl.exp2(logp)
        distance = (logp - ((r - ref_top) * scale - ref_log_s)) * LN2 - kl
        slope = tl.where(p > 0.0, grad * temperature_scale * p * distance, 0.0)
        slope = tl.where(usable, slope, 0.0)
        tl.store(out + row * out_row_stride + place, slope.to(out.dtype.element_ty), mask=inside)


def _launch_arguments(
    logits: Tensor, ref_logits: Tensor, bias: Tensor | None, ref_bias: Tensor | None, inverse: float | Tensor
) -> tuple[list[Tensor], float, dict[str, Any]]:
    per_row = isinstance(inverse, Tensor)
    columns_of_thread = 16 if bias is None and ref_bias is None else 8  # biases need registers, too
    block = max(128, min(BLOCK * columns_of_thread // 16, triton.next_power_of_2(logits.shape[1])))
    flags = {"PER_ROW": per_row, "HAS_BIAS": bias is not None, "HAS_REF_BIAS": ref_bias is not None, "BLOCK": block}
    tensors = [
        logits,
        ref_logits,
        logits if bias is None else bias.contiguous(),
        ref_logits if ref_bias is None else ref_bias.contiguous(),
        inverse.float().contiguous() if per_row else logits,
    ]
    return tensors, 1.0 if per_row else float(inverse), flags | {"num_warps": max(1, block // (32 * columns_of_thread))}


def _kl_statistics_triton(
    logits: Tensor, ref_logits: Tensor, bias: Tensor | None, ref_bias: Tensor | None, inverse: float | Tensor
) -> list[Tensor]:
    """kl, then of policy and of reference the largest logit m and log2 of the sum of 2^((z - m) scale): [M] float32."""
    tensors, scale, flags = _launch_arguments(logits, ref_logits, bias, ref_bias, inverse)
    rows, columns = logits.shape
    results = [torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(5)]
    if rows:
        strides = (logits.stride(0), ref_logits.stride(0))
        _kl_statistics_kernel[(rows,)](*tensors, *results, columns, *strides, scale * LOG2_E, **flags)
    return results


def _kl_gradient_triton(
    logits: Tensor,
    ref_logits: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    inverse: float | Tensor,
    statistics: Sequence[Tensor],
    grad: Tensor,
    out: Tensor,
) -> None:
    """out [M, V] <- the gradient of the policy's logits; statistics: what _kl_statistics_triton gave."""
    tensors, scale, flags = _launch_arguments(logits, ref_logits, bias, ref_bias, inverse)
    rows, columns = logits.shape
    if rows:
        strides = (logits.stride(0), ref_logits.stride(0), out.stride(0))
        given = [column.contiguous() for column in (*statistics, grad)]
        _kl_gradient_kernel[(rows,)](*tensors, *given, out, columns, *strides, scale, scale * LOG2_E, **flags)


def _log_softmax(logits: Tensor, bias: Tensor | None, inverse: float | Tensor) -> Tensor:
    """[M, V] in the statistics' type."""
    z = logits.to(statistics_dtype(logits.dtype), copy=True)
    if bias is not None:
        z += bias
    z *= inverse[:, None] if isinstance(inverse, Tensor) else inverse
    return torch.log_softmax(z, dim=1)


def _torch_terms(
    logits: Tensor, ref_logits: Tensor, bias: Tensor | None, ref_bias: Tensor | None, inverse: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(kl [M], probabilities, log p - log q [M, V]); where p is 0 the difference is 0."""
    difference = _log_softmax(logits, bias, inverse)
    p = difference.exp()
    difference -= _log_softmax(ref_logits, ref_bias, inverse)
    difference.masked_fill_(p == 0, 0.0)
    return (p * difference).sum(dim=1).clamp(min=0.0), p, difference


@torch.library.custom_op("zs_kernels::linear_kl", mutates_args=())
def _forward(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    mask_count: int,
    temperature: float,
    exact: bool,
    workspace_bytes: int,
) -> Tensor:
    """kl [N]. 0 stands for None in workspace_bytes, -1 in mask_count."""
    dtype = statistics_dtype(hidden.dtype)
    rows = _linear.compacted(OP, mask, mask_count)
    count = hidden.shape[0] if rows is None else rows.numel()
    found = torch.empty(count, dtype=dtype, device=hidden.device)

    def chunk(here: slice, states: Tensor, logits: Tensor, ref_logits: Tensor, inverse: float | Tensor) -> None:
        given = (logits, ref_logits, bias, ref_bias, inverse)
        if backend_of(logits) == "triton":
            found[here] = _kl_statistics_triton(*given)[0]
        else:
            found[here] = _torch_terms(*given)[0]

    heads = Head(weight, bias, exact=exact), Head(ref_weight, ref_bias, exact=exact)
    _each_chunk(chunk, heads, hidden, ref_hidden, rows, temperature, row_temperature, workspace_bytes)
    return _linear.spread(found, rows, hidden.shape[0])


@_forward.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden.dtype))


@torch.library.custom_op("zs_kernels::linear_kl_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    mask_count: int,
    temperature: float,
    exact: bool,
    workspace_bytes: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [N, H], weight [V, H], bias [V]; [0] for one that is not wanted."""
    rows = _linear.compacted(OP, mask, mask_count)
    heads = Head(weight, bias, exact=exact), Head(ref_weight, ref_bias, exact=exact)
    slopes = _linear.selected(grad, rows)
    count = slopes.numel()
    most = _linear.most_rows(_row_bytes(heads, hidden.device), workspace_bytes or None, hidden.device)
    gradients = HeadGradients(heads[0], hidden.new_empty(count, hidden.shape[1]), Wanted(*wanted), -(-count // most))

    def chunk(here: slice, states: Tensor, logits: Tensor, ref_logits: Tensor, inverse: float | Tensor) -> None:
        given = (logits, ref_logits, bias, ref_bias, inverse)
        out = logits if logits.dtype == weight.dtype else torch.empty_like(logits, dtype=weight.dtype)
        if backend_of(logits) == "triton":
            _kl_gradient_triton(*given, _kl_statistics_triton(*given), slopes[here], out)
        else:
            kl, p, difference = _torch_terms(*given)
            difference -= torch.where(kl.isfinite(), kl, 0.0)[:, None]
            scale = slopes[here] * inverse
            difference.mul_(p).mul_(torch.where(kl.isfinite(), scale, 0.0)[:, None])
            out.copy_(difference.masked_fill_(~kl.isfinite()[:, None], 0.0))
        gradients.add(out, states, here)

    _each_chunk(chunk, heads, hidden, ref_hidden, rows, temperature, row_temperature, workspace_bytes)
    by_hidden, by_weight, by_bias, *_ = gradients.results()
    return _linear.spread(by_hidden, rows, hidden.shape[0]) if wanted[0] else by_hidden, by_weight, by_bias


@_backward_op.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    like = (hidden, weight, weight if bias is None else bias)
    return tuple(torch.empty_like(x) if want else x.new_empty(0) for x, want in zip(like, rest[-1], strict=True))


def _row_bytes(heads: tuple[Head, Head], device: torch.device) -> int:
    """Of both rows of logits; on a CPU torch makes float32 copies of them and their exponential besides."""
    own = heads[0].row_bytes + heads[1].row_bytes
    return own + (16 * heads[0].vocabulary if device.type == "cpu" else 0)


def _each_chunk(
    work: Callable[[slice, Tensor, Tensor, Tensor, float | Tensor], None],
    heads: tuple[Head, Head],
    hidden: Tensor,
    ref_hidden: Tensor,
    rows: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    workspace_bytes: int,
) -> None:
    """Call `work` with (rows, hidden states, both logits, inverse temperature) of each chunk of the chosen rows."""
    device = hidden.device
    with _linear.without_autocast(device):
        states, ref_states = _linear.selected(hidden, rows), _linear.selected(ref_hidden, rows)
        inverse = _linear.inverse_temperature(temperature, row_temperature, rows)
        most = _linear.most_rows(_row_bytes(heads, device), workspace_bytes or None, device)
        chunks = list(_linear.slices(states.shape[0], most))
        size = chunks[0].stop if chunks else 0
        workspaces = [states.new_empty(size, head.vocabulary, dtype=head.logits_dtype) for head in heads]
        for here in chunks:
            logits, ref_logits = (space[: here.stop - here.start] for space in workspaces)
            heads[0].logits(states[here], logits)
            heads[1].logits(ref_states[here], ref_logits)
            work(here, states[here], logits, ref_logits, _linear.part_of(inverse, here))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.numbers = inputs[8:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[position] for position in (0, 2, 4)]
    by_hidden, by_weight, by_bias = _backward_op(grad, *ctx.saved_tensors, *ctx.numbers, wanted)
    found = [given if want else None for given, want in zip((by_hidden, by_weight, by_bias), wanted, strict=True)]
    return found[0], None, found[1], None, found[2], *[None] * 7


_forward.register_autograd(_backward, setup_context=_save)


def linear_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    mask_count: int | None = None,
    exact: bool = False,
    workspace_bytes: int | None = None,
) -> Tensor:
    """KL(policy || reference) of each token, [N], at least 0.

    hidden [N, H], weight [V, H], bias [V]: the policy's; ref_hidden [N, G], ref_weight [V, G], ref_bias [V]: the
    reference's, which get no gradient; the two heads may be one tensor. All floating point, a head of its hidden
    states' type. temperature: above 0, a number or [N]; that of both. mask: [N] bool; a False row costs nothing, gives
    0 and gets gradient 0 even where its hidden state is NaN. mask_count, exact: as for linear_logprobs.
    workspace_bytes: bound of one chunk's logits of both models, with their copies on a CPU; a chunk has at least one
    row. Gradients flow to hidden, weight and bias, once (no second derivative).
    Raises ValueError or TypeError that names the argument.
    """
    _linear.check_operands(OP, hidden, weight, bias)
    _linear.check_operands(OP, ref_hidden, ref_weight, None, names=("ref_hidden", "ref_weight"))
    rows, device = hidden.shape[0], hidden.device
    same = ref_hidden.shape[0] == rows and ref_hidden.device == device
    require(same, OP, "ref_hidden", "with the rows of 'hidden', on its device", ref_hidden)
    require(ref_weight.shape[0] == weight.shape[0], OP, "ref_weight", "over the vocabulary of 'weight'", ref_weight)
    if ref_bias is not None:
        _linear.require_plain(OP, "ref_bias", ref_bias)
        good = tuple(ref_bias.shape) == (weight.shape[0],) and ref_bias.device == device
        require(good and ref_bias.is_floating_point(), OP, "ref_bias", "[V], floating point, on that device", ref_bias)
    require_mask(OP, "mask", mask, (rows,), device)
    require_positive(OP, "temperature", temperature, (rows,))
    if workspace_bytes is not None:
        require_positive(OP, "workspace_bytes", workspace_bytes)
    by_row = isinstance(temperature, Tensor)
    return _forward(
        hidden,
        ref_hidden.detach(),
        weight,
        ref_weight.detach(),
        bias,
        None if ref_bias is None else ref_bias.detach(),
        temperature.detach() if by_row else None,
        mask,
        _linear.counted(OP, mask, mask_count),
        1.0 if by_row else float(temperature),
        exact and weight.dtype in (torch.float16, torch.bfloat16),
        int(workspace_bytes or 0),
    )
