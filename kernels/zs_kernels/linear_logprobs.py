"""Token log-probabilities straight from hidden states and the output head, without a [tokens, vocabulary] tensor.

    logits  = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature      (bias, softcap only when given)
    logprob = logits[n, index_n] - logsumexp_n,    entropy = logsumexp - sum_v p logits

    dlogits[n, v] = g_n (1[v = index_n] - p[n, v]) - h_n p[n, v] (log p[n, v] + entropy_n)

g, h = upstream gradients of log-prob and entropy. N = rows (tokens), H = hidden size, V = vocabulary; statistics and
results in float32 (float64 for float64 inputs), in nats.

Masked rows are left out before the head. The others are worked off in chunks: one matrix product into a workspace, one
sweep over its rows. The backward pass has one product for the gradient of the hidden states and one for the weight's;
before them it either computes each chunk's logits again (four products in all) or takes those that the forward pass
kept (three). With a frozen head and no entropy the forward pass multiplies each log-probability's gradient into the
hidden state's, [N, H], and the backward pass scales it (two). Where the vocabulary lies in shards, the processes gather
the five numbers per row that a softmax is made of, and add up their parts of the hidden states' gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from zs_kernels import _linear, _linear_liger
from zs_kernels._check import require, require_index, require_integers, require_mask, require_positive
from zs_kernels._device import backend_of
from zs_kernels._linear import Head, Lora, Wanted
from zs_kernels._linear_passes import backward_gradients, forward_statistics, pack_rows, rows_with_gradient
from zs_kernels._linear_shards import Shards, group_name, whole_vocabulary
from zs_kernels._linear_tiles import tile_statistics
from zs_kernels._triton import AVAILABLE as TRITON
from zs_kernels.token_logprobs import TokenLogprobs, token_logprobs

OP = "linear_logprobs"
HeadBackend = Literal["auto", "gemm", "triton", "liger"]
FEW_ROWS = 256
"""Where the workspace holds fewer rows, a GPU's matrix products lose more than the fused Triton forward pass does."""
INVARIANT_ROWS = {"cpu": 256, "cuda": 4096}
"""Rows of every chunk in batch-invariant mode, where the workspace allows."""


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: bool = False,
) -> TokenLogprobs:
    """What the op means: all logits at once, autograd for the rest. Every faster path answers to it."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return token_logprobs(logits, index, temperature=temperature, mask=mask, entropy=entropy, softcap=softcap)


def _kept_rows(rows: int, head: Head, mask: Tensor | None, mask_count: int, kept_bytes: int) -> int:
    """Rows whose logits the forward pass keeps: all, where their number is known and the budget holds them, or none."""
    known = rows if mask is None else mask_count
    return known if known > 0 and known * head.row_bytes <= kept_bytes else 0


def _invariant_rows(most: int, device: torch.device) -> int:
    """Rows of every chunk: the largest power of two that both the workspace and INVARIANT_ROWS allow."""
    return min(1 << (most.bit_length() - 1), INVARIANT_ROWS["cpu" if device.type == "cpu" else "cuda"])


@torch.library.custom_op("zs_kernels::linear_logprobs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    mask_count: int,
    lora_scale: float,
    temperature: float,
    softcap: float,
    entropy: bool,
    sum_squares: bool,
    exact: bool,
    tiles: bool,
    batch_invariant: bool,
    unit: bool,
    workspace_bytes: int,
    kept_bytes: int,
    group: str,
    vocabulary_start: int,
    handed_over: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs [N], logsumexp [N], entropy, sum_squares, kept logits [M, V], unit gradient [N, H]), [0] if not wanted.

    0 stands for None in softcap and workspace_bytes, '' in group, -1 in mask_count. handed_over: the caller forgets the
    kept logits, so that the backward pass may overwrite them.
    """
    total, device = hidden.shape[0], hidden.device
    head = Head(weight, bias, softcap or None, exact or tiles, lora_a, lora_b, lora_scale)
    kept_rows = _kept_rows(total, head, mask, mask_count, kept_bytes)
    limit = whole_vocabulary(OP, group, vocabulary_start, weight, total)
    require_index(OP, "index", index, (total,), limit, device=device, mask=mask)
    with _linear.without_autocast(device):
        rows = _linear.compacted(OP, mask, mask_count)
        states, targets = _linear.selected(hidden, rows), _linear.selected(index, rows)
        inverse = _linear.inverse_temperature(temperature, row_temperature, rows)
        kept = hidden.new_empty(kept_rows, head.vocabulary, dtype=head.logits_dtype)
        units = torch.empty_like(states) if unit and not kept_rows else None
        if tiles and backend_of(hidden, weight) == "triton":
            sweep = tile_statistics(states, weight, targets, inverse, bias=bias, softcap=softcap or None)
        else:
            plan = (head.row_bytes, workspace_bytes or None, device)
            fixed = _invariant_rows(_linear.most_rows(*plan), device) if batch_invariant else 0
            count = states.shape[0]
            sweep = forward_statistics(
                head,
                states,
                targets - vocabulary_start if group else targets,
                inverse,
                entropy=entropy,
                sum_squares=sum_squares,
                chunks=list(_linear.slices(count, fixed)) if fixed else _linear.planned_chunks(count, *plan),
                fixed_rows=fixed,
                kept=kept,
                unit=units,
                shards=Shards(group) if group else None,
            )
        return (
            _linear.spread(sweep.logprobs, rows, total),
            _linear.spread(sweep.logsumexp, rows, total),
            _linear.spread(sweep.entropy, rows, total) if entropy else sweep.entropy.new_empty(0),
            _linear.spread(sweep.sum_squares, rows, total) if sum_squares else sweep.sum_squares.new_empty(0),
            kept,
            hidden.new_empty(0) if units is None else _linear.spread(units, rows, total),
        )


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    mask_count: int,
    lora_scale: float,
    temperature: float,
    softcap: float,
    entropy: bool,
    sum_squares: bool,
    exact: bool,
    tiles: bool,
    batch_invariant: bool,
    unit: bool,
    workspace_bytes: int,
    kept_bytes: int,
    group: str,
    vocabulary_start: int,
    handed_over: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, head = hidden.shape[0], Head(weight, exact=exact)
    kept = _kept_rows(rows, head, mask, mask_count, kept_bytes)
    dtype = _linear.statistics_dtype(hidden.dtype)
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows if entropy else 0, dtype=dtype),
        hidden.new_empty(rows if sum_squares else 0, dtype=dtype),
        hidden.new_empty(kept, weight.shape[0], dtype=head.logits_dtype),
        hidden.new_empty(hidden.shape if unit and not kept else (0,)),
    )


def _gradients(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    kept: Tensor,
    unit: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
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
    wanted: Sequence[bool],
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias, lora_a, lora_b, [0] for one not wanted. overwrite: the kept logits."""
    total, device = hidden.shape[0], hidden.device
    head = Head(weight, bias, softcap or None, exact, lora_a, lora_b, lora_scale)
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(logsumexp)
    with _linear.without_autocast(device):
        if unit.numel():
            scale = grad_logprobs if mask is None else torch.where(mask, grad_logprobs, 0.0)
            nothing = (hidden.new_empty(0) for _ in range(4))
            return ((unit * scale[:, None]).to(hidden.dtype), *nothing)
        rows = _linear.compacted(OP, mask, mask_count)
        slots = [_linear.selected(grad_logprobs, rows)]
        if grad_entropy is not None:
            slots.append(_linear.selected(grad_entropy, rows))
        live = rows_with_gradient(*slots) if overwrite or kept.numel() == 0 else None
        if live is not None:
            if kept.numel():
                pack_rows(kept, live)
            rows = live if rows is None else rows[live]
        states, targets = _linear.selected(hidden, rows), _linear.selected(index, rows)
        gradients = backward_gradients(
            head,
            states,
            targets - vocabulary_start if group else targets,
            _linear.inverse_temperature(temperature, row_temperature, rows),
            _linear.selected(grad_logprobs, rows),
            None if grad_entropy is None else _linear.selected(grad_entropy, rows),
            _linear.selected(logsumexp, rows),
            None if grad_entropy is None else _linear.selected(entropy, rows),
            Wanted(*wanted),
            chunks=_linear.planned_chunks(states.shape[0], head.row_bytes, workspace_bytes or None, device),
            kept=kept,
            overwrite=overwrite,
            shards=Shards(group) if group else None,
        )
        grad_hidden, *others = gradients.results()
        return (_linear.spread(grad_hidden, rows, total) if wanted[0] else grad_hidden, *others)


def _fake_gradients(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    kept: Tensor,
    unit: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
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
    wanted: Sequence[bool],
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _linear.empty_gradients((hidden, weight, bias, lora_a, lora_b), wanted)


_backward = torch.library.custom_op("zs_kernels::linear_logprobs_backward", _gradients, mutates_args=())
_backward_ = torch.library.custom_op("zs_kernels::linear_logprobs_backward_", _gradients, mutates_args={"kept"})
for _op in (_backward, _backward_):
    _op.register_fake(_fake_gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, index, bias, lora_a, lora_b, row_temperature, mask, *numbers = inputs
    _, logsumexp, entropy, sum_squares, kept, unit = output
    ctx.mark_non_differentiable(logsumexp, sum_squares, kept, unit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logsumexp, entropy, unit, hidden, weight, index, bias, lora_a, lora_b, row_temperature, mask)
    ctx.kept = kept
    ctx.numbers = numbers


def _run_backward(
    ctx: Any, grad_logprobs: Tensor | None, _lse: None, grad_entropy: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    logsumexp, entropy, unit, *operands = ctx.saved_tensors
    *numbers, handed_over = ctx.numbers
    mask_count, lora_scale, temperature, softcap, given, _, exact, tiles, _, _, workspace, _, group, start = numbers
    grad_entropy = grad_entropy if given else None  # there is none of an entropy of shape [0]
    wanted = [ctx.needs_input_grad[place] for place in (0, 1, 3, 4, 5)]
    kept = operands[0].new_empty(0) if ctx.kept is None else ctx.kept
    # A graph that is being traced must not see its backward pass change what its forward pass has made.
    overwrite = handed_over and type(kept) is Tensor
    if overwrite:
        ctx.kept = None  # another backward pass computes the logits again
    if grad_logprobs is None and grad_entropy is None:
        grad_logprobs = torch.zeros_like(logsumexp)
    gradients = (_backward_ if overwrite else _backward)(
        grad_logprobs,
        grad_entropy,
        kept,
        unit,
        logsumexp,
        entropy,
        *operands,
        mask_count,
        lora_scale,
        temperature,
        softcap,
        exact or tiles,
        workspace,
        group,
        start,
        wanted,
        overwrite,
    )
    hidden, weight, bias, lora_a, lora_b = (g if w else None for g, w in zip(gradients, wanted, strict=True))
    return hidden, weight, None, bias, lora_a, lora_b, *[None] * 17


_forward.register_autograd(_run_backward, setup_context=_setup_context)


def _chosen_backend(
    op: str, wanted: str, hidden: Tensor, weight: Tensor, plain: bool, tileable: bool, most: int
) -> HeadBackend:
    """The backend for 'auto'; raise where a named one cannot do what is asked."""
    require(wanted in get_args(HeadBackend), op, "head_backend", f"one of {', '.join(get_args(HeadBackend))}", wanted)
    if wanted == "liger":
        reason = _linear_liger.obstacle(hidden, weight, plain)
        require(not reason, op, "head_backend", f"another than 'liger' ({reason})", wanted)
    if wanted == "triton":
        reason = "another than 'triton', which takes no lora, process_group or batch_invariant"
        require(tileable, op, "head_backend", reason, wanted)
        if not torch.compiler.is_compiling():
            kernels = backend_of(hidden, weight) == "triton"
            require(kernels, op, "head_backend", "another than 'triton', which needs a GPU", wanted)
    if wanted == "auto":
        return "triton" if hidden.is_cuda and TRITON and tileable and most < FEW_ROWS else "gemm"
    return wanted  # type: ignore[return-value]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    mask_count: int | None = None,
    entropy: bool = False,
    sum_squares: bool = False,
    exact: bool = False,
    workspace_bytes: int | None = None,
    logits_bytes: int | None = None,
    lora: Lora | None = None,
    process_group: object = None,
    vocabulary_start: int = 0,
    batch_invariant: bool = False,
    head_backend: HeadBackend = "auto",
) -> TokenLogprobs:
    """`logprobs`, `logsumexp` [N] (`entropy`, `sum_squares` [N] when asked) under softmax(head(hidden) / temperature).

    hidden: [N, H] floating point. weight: [V, H], bias: [V], of the same type. index: [N] int64/int32 in [0, V),
    ignored where masked. temperature: above 0, a number or [N].
    mask: [N] bool; a False row costs nothing, gives 0 and gets gradient 0 even where its hidden state is NaN.
    mask_count: the number of True entries, where the caller knows it: without it a GPU's host waits for the number.
    exact: keep the products' float32 sums into the softmax for bfloat16 or float16 inputs. On CUDA the product gives
    them; elsewhere the head is copied to float32 by slices. Gradients of logits are in the inputs' type.
    workspace_bytes: bound of one chunk's logits (and of their gradient where it has another type, so 6 bytes an element
    in exact mode); a chunk has at least one row. Default: 320 MiB on a CPU, 2.5 GiB on a GPU. Where the C++ ops are
    not built, plain torch makes float32 copies of a chunk besides.
    logits_bytes: keep the logits for the backward pass when all of them fit into this (default: into the workspace,
    so that no more memory is held at any time; 0: never).
    lora: (A [r, H], B [V, r], scale), an adapter that adds scale * B A to the head's weight.
    process_group: the processes that hold the vocabulary's shards: weight, bias and lora B are this process's part,
    which begins at vocabulary_start, hidden and index are the same everywhere, and so must be what is done with the
    results. On a CPU each call checks that the shards cover the vocabulary.
    batch_invariant: a row's results have the same bits whatever rows come with it: chunks of one fixed size, the last
    filled up (so few rows cost as many as a chunk's; gradients keep no such promise).
    head_backend: gemm: matrix products of the vendor's library; triton: a fused forward pass with exact sums, no
    workspace, on GPUs (the backward pass as in exact mode); liger: Liger's kernel for compute capability 9.0, its
    accuracy and limits; auto: gemm, or triton on a GPU whose workspace holds fewer than 256 rows.
    Gradients flow from logprobs and entropy to hidden, weight, bias and lora, once (no second derivative). Under
    autocast, hidden, weight, bias and lora are cast as a linear layer's are.
    Raises ValueError, TypeError or IndexError that names the argument.
    """
    hidden, weight, bias, lora = _linear.autocast_operands(hidden, weight, bias, lora)
    _linear.check_operands(OP, hidden, weight, bias)
    _linear.check_lora(OP, lora, hidden, weight)
    rows = hidden.shape[0]
    require_mask(OP, "mask", mask, (rows,), hidden.device)
    group = group_name(OP, process_group)
    require(bool(group) or vocabulary_start == 0, OP, "vocabulary_start", "0 without process_group", vocabulary_start)
    require_integers(OP, "index", index, (rows,), device=hidden.device)
    require_positive(OP, "temperature", temperature, (rows,))
    for name, value in (("softcap", softcap), ("workspace_bytes", workspace_bytes)):
        if value is not None:
            require_positive(OP, name, value)
    require(logits_bytes is None or logits_bytes >= 0, OP, "logits_bytes", "None or at least 0", logits_bytes)
    mask_count = _linear.counted(OP, mask, mask_count)

    a, b, scale = (None, None, 1.0) if lora is None else lora
    exact = exact and weight.dtype in (torch.float16, torch.bfloat16)
    by_row = isinstance(temperature, Tensor)
    most = _linear.most_rows(Head(weight, exact=exact).row_bytes, workspace_bytes, hidden.device)
    simple = not (group or lora is not None or batch_invariant)
    plain = simple and not (bias is not None or softcap or exact or by_row or sum_squares)
    backend = _chosen_backend(OP, head_backend, hidden, weight, plain, simple, most)
    if backend == "liger":
        return _by_liger(hidden, weight, index, temperature, mask, mask_count, entropy)
    trained = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias, a, b)]
    can_keep = any(trained) and backend == "gemm" and not batch_invariant
    if logits_bytes is None:
        logits_bytes = workspace_bytes or _linear.DEFAULT_WORKSPACE_BYTES[_linear.kind_of(hidden.device)]
    logprobs, logsumexp, entropies, squares, _, _ = _forward(
        hidden,
        weight,
        index.long(),
        bias,
        a,
        b,
        temperature.detach() if by_row else None,
        mask,
        mask_count,
        float(scale),
        1.0 if by_row else float(temperature),
        float(softcap or 0.0),
        entropy,
        sum_squares,
        exact,
        backend == "triton",
        batch_invariant,
        Wanted(*trained).only_hidden() and simple and backend == "gemm" and not entropy,
        int(workspace_bytes or 0),
        int(logits_bytes) if can_keep else 0,
        group,
        vocabulary_start,
        True,
    )
    return TokenLogprobs(
        logprobs=logprobs,
        entropy=entropies if entropy else None,
        logsumexp=logsumexp,
        sum_squares=squares if sum_squares else None,
    )


def _by_liger(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    temperature: float,
    mask: Tensor | None,
    mask_count: int,
    entropy: bool,
) -> TokenLogprobs:
    rows = _linear.compacted(OP, mask, mask_count)
    states, targets = _linear.selected(hidden, rows), _linear.selected(index.long(), rows)
    logprobs, entropies = _linear_liger.logprobs_and_entropy(states, weight, targets, temperature, entropy)
    if rows is not None:
        total = hidden.shape[0]
        logprobs = logprobs.new_zeros(total).index_put((rows,), logprobs)
        if entropies is not None:
            entropies = entropies.new_zeros(total).index_put((rows,), entropies)
    return TokenLogprobs(logprobs=logprobs, entropy=entropies)
