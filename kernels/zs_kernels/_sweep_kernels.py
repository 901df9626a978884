"""Triton kernels of the row sweeps, and the device functions they are made of.

Everything runs in float32 and in base 2: scale = log2(e) / temperature is folded into one multiply-add, and the running
sums are kept relative to the running maximum m of z, the logit before the temperature:

    d = (z - m) scale      s = sum 2^d      t = sum 2^d d      q = sum 4^d
    logsumexp = (m scale + log2 s) ln 2,  entropy = (log2 s - t / s) ln 2,  sum of squares = q / s^2

A block or row without a finite logit has m = -inf, s = 0. Blocks are merged one after the other, in the order of the
columns, whether one program sweeps the row or many share it: a row's result does not depend on the rows beside it.

For kernels elsewhere (a loss computed in the head's epilogue, say): `transformed_logits`, `block_statistics`,
`merge_statistics`, `row_statistics`, `finish_statistics`, `block_gradient` are the parts; each says what it takes.
"""

from __future__ import annotations

from zs_kernels._triton import tl, triton


@triton.jit
def transformed_logits(raw, bias, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BIAS_FIRST: tl.constexpr):
    """(z, dz/draw) of float32 logits: softcap * tanh(raw / softcap) + bias, or the bias first; -inf stays -inf."""
    z = raw
    slope = tl.zeros_like(raw) + 1.0
    if HAS_BIAS and BIAS_FIRST:
        z = z + bias
    if HAS_SOFTCAP:
        ratio = z / softcap
        small = tl.exp2(tl.abs(ratio) * -2.8853900817779268)  # exp(-2 |ratio|): never overflows
        tanh = (1.0 - small) / (1.0 + small)
        tanh = tl.where(ratio < 0.0, -tanh, tanh)
        slope = 1.0 - tanh * tanh
        z = tl.where(z == -float("inf"), z, softcap * tanh)
    if HAS_BIAS and not BIAS_FIRST:
        z = z + bias
    return z, slope


@triton.jit
def block_statistics(z, scale):
    """(m, s, t, q) of one block of z, float32; columns that do not count hold -inf. scale = log2(e) / temperature."""
    m = tl.max(z)
    shift = tl.where(m == -float("inf"), 0.0, m) * scale
    d = z * scale - shift
    e = tl.exp2(d)
    weighted = e * tl.maximum(d, -16384.0)  # 2^d is 0 there: 0 * finite instead of 0 * -inf
    return m, tl.sum(e), tl.sum(weighted), tl.sum(e * e)


@triton.jit
def merge_statistics(m, s, t, q, block_m, block_s, block_t, block_q, scale):
    """The statistics of two disjoint sets of columns together; either may have no finite logit."""
    merged = tl.maximum(m, block_m)
    top = tl.where(merged == -float("inf"), 0.0, merged)
    d = tl.where(m == -float("inf"), 0.0, (m - top) * scale)
    block_d = tl.where(block_m == -float("inf"), 0.0, (block_m - top) * scale)
    a, b = tl.exp2(d), tl.exp2(block_d)
    t = a * (t + d * s) + b * (block_t + block_d * block_s)
    return merged, a * s + b * block_s, t, a * a * q + b * b * block_q


@triton.jit
def row_statistics(
    row_logits,
    ids,
    begin,
    end,
    bias,
    scale,
    softcap,
    HAS_KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(m, s, t, q) of the columns [begin, end) of one row, or with HAS_KEEP of the columns ids[begin:end]."""
    m = tl.full((), -float("inf"), tl.float32)
    s = tl.full((), 0.0, tl.float32)
    t = tl.full((), 0.0, tl.float32)
    q = tl.full((), 0.0, tl.float32)
    for first in range(begin, end, BLOCK):
        _, _, raw, offset = load_block(row_logits, ids, first, end, bias, HAS_KEEP, HAS_BIAS, BLOCK)
        z, _ = transformed_logits(raw, offset, softcap, HAS_BIAS, HAS_SOFTCAP, BIAS_FIRST)
        block_m, block_s, block_t, block_q = block_statistics(z, scale)
        m, s, t, q = merge_statistics(m, s, t, q, block_m, block_s, block_t, block_q, scale)
    return m, s, t, q


@triton.jit
def load_block(row_logits, ids, first, end, bias, HAS_KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """(columns, which of them count, logits, bias) of a block, float32; past the end the logit is -inf, the bias 0."""
    place = first + tl.arange(0, BLOCK)
    inside = place < end
    columns = place
    if HAS_KEEP:
        columns = tl.load(ids + place, mask=inside, other=0)
    raw = tl.load(row_logits + columns, mask=inside, other=-float("inf")).to(tl.float32)
    offset = tl.zeros_like(raw)
    if HAS_BIAS:
        offset = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return columns, inside, raw, offset


@triton.jit
def chosen_logit(
    row_logits,
    chosen,
    V,
    bias,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS_FIRST: tl.constexpr,
    OUTSIDE: tl.constexpr,
):
    """z of column `chosen` of a row, or OUTSIDE where that is not in [0, V)."""
    here = (chosen >= 0) & (chosen < V)
    safe = tl.where(here, chosen, 0)
    raw = tl.load(row_logits + safe, mask=here, other=0.0).to(tl.float32)
    offset = tl.zeros_like(raw)
    if HAS_BIAS:
        offset = tl.load(bias + safe, mask=here, other=0.0).to(tl.float32)
    z, _ = transformed_logits(raw, offset, softcap, HAS_BIAS, HAS_SOFTCAP, BIAS_FIRST)
    return tl.where(here, z, OUTSIDE)


@triton.jit
def finish_statistics(m, s, t, q, chosen_z, scale):
    """(log-probability of the logit chosen_z, logsumexp, entropy, sum of squares), float32, in nats."""
    alive = s != 0.0  # also true of NaN, which thus stays NaN
    top = tl.where(m == -float("inf"), 0.0, m)
    log2_s = tl.log2(tl.where(alive, s, 1.0))
    logprob = ((chosen_z - top) * scale - log2_s) * 0.6931471805599453
    logprob = tl.where(alive, tl.where(logprob > 0.0, 0.0, logprob), -float("inf"))
    logsumexp = tl.where(alive, (top * scale + log2_s) * 0.6931471805599453, -float("inf"))
    entropy = tl.where(alive, (log2_s - t / tl.where(alive, s, 1.0)) * 0.6931471805599453, 0.0)
    sum_squares = tl.where(alive, q / tl.where(alive, s * s, 1.0), 0.0)
    return logprob, logsumexp, entropy, sum_squares


@triton.jit
def block_gradient(
    z,
    slope,
    is_chosen,
    inverse_temperature,
    logsumexp,
    entropy,
    grad_logprob,
    grad_entropy,
    HAS_ENTROPY: tl.constexpr,
):
    """Gradient of one block of raw logits; 0 where z is -inf. z, slope: as from transformed_logits; is_chosen: the
    column is the row's chosen one; logsumexp (finite), entropy: of the row, in nats; the rest: float32 numbers."""
    log2_p = z * (inverse_temperature * 1.4426950408889634) - logsumexp * 1.4426950408889634
    p = tl.exp2(log2_p)
    weight = -grad_logprob
    if HAS_ENTROPY:
        weight = weight - grad_entropy * (tl.maximum(log2_p, -16384.0) * 0.6931471805599453 + entropy)
    grad = p * weight + tl.where(is_chosen, grad_logprob, 0.0)
    return tl.where(z == -float("inf"), 0.0, grad * inverse_temperature * slope)


@triton.jit
def row_scale(temperatures, row, inverse_temperature, PER_ROW: tl.constexpr):
    """1 / temperature of a row: from the vector of them, or the one number."""
    if PER_ROW:
        inverse_temperature = tl.load(temperatures + row).to(tl.float32)
    return inverse_temperature


@triton.jit
def row_range(offsets, row, V, HAS_KEEP: tl.constexpr):
    """The bounds of a row's columns: of its keep set, or all."""
    begin, end = 0, V
    if HAS_KEEP:
        begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    return begin, end


@triton.jit
def statistics_kernel(
    logits,
    row_stride,
    V,
    index,
    mask,
    inverse_temperatures,
    inverse_temperature,
    bias,
    softcap,
    offsets,
    ids,
    logprobs,
    logsumexps,
    entropies,
    sums_squares,
    HAS_MASK: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS_FIRST: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row. A masked row is not read: its program writes zeros and ends."""
    row = tl.program_id(0).to(tl.int64)
    logprob = tl.full((), 0.0, tl.float32)
    logsumexp, entropy, sum_squares = logprob, logprob, logprob
    wanted = tl.full((), 1, tl.int1)
    if HAS_MASK:
        wanted = tl.load(mask + row) != 0
    if wanted:
        scale = row_scale(inverse_temperatures, row, inverse_temperature, PER_ROW) * 1.4426950408889634
        row_logits = logits + row * row_stride
        begin, end = row_range(offsets, row, V, HAS_KEEP)
        m, s, t, q = row_statistics(
            row_logits, ids, begin, end, bias, scale, softcap, HAS_KEEP, HAS_BIAS, HAS_SOFTCAP, BIAS_FIRST, BLOCK
        )
        chosen = tl.load(index + row).to(tl.int64)
        z = chosen_logit(row_logits, chosen, V, bias, softcap, HAS_BIAS, HAS_SOFTCAP, BIAS_FIRST, float("nan"))
        logprob, logsumexp, entropy, sum_squares = finish_statistics(m, s, t, q, z, scale)
    tl.store(logprobs + row, logprob)
    tl.store(logsumexps + row, logsumexp)
    if ENTROPY:
        tl.store(entropies + row, entropy)
    if SUM_SQUARES:
        tl.store(sums_squares + row, sum_squares)


@triton.jit
def blocks_kernel(
    logits,
    row_stride,
    V,
    blocks,
    mask,
    inverse_temperatures,
    inverse_temperature,
    bias,
    softcap,
    statistics,
    HAS_MASK: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of a row, for few rows: (m, s, t, q) into statistics [M, blocks, 4]."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    first = program % blocks * BLOCK
    wanted = tl.full((), 1, tl.int1)
    if HAS_MASK:
        wanted = tl.load(mask + row) != 0
    if wanted:
        scale = row_scale(inverse_temperatures, row, inverse_temperature, PER_ROW) * 1.4426950408889634
        _, _, raw, offset = load_block(logits + row * row_stride, mask, first, V, bias, False, HAS_BIAS, BLOCK)
        z, _ = transformed_logits(raw, offset, softcap, HAS_BIAS, HAS_SOFTCAP, BIAS_FIRST)
        m, s, t, q = block_statistics(z, scale)
        part = statistics + program.to(tl.int64) * 4
        tl.store(part, m)
        tl.store(part + 1, s)
        tl.store(part + 2, t)
        tl.store(part + 3, q)


@triton.jit
def merge_kernel(
    statistics,
    blocks,
    logits,
    row_stride,
    V,
    index,
    mask,
    inverse_temperatures,
    inverse_temperature,
    bias,
    softcap,
    logprobs,
    logsumexps,
    entropies,
    sums_squares,
    HAS_MASK: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS_FIRST: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_SQUARES: tl.constexpr,
):
    """One program per row merges what blocks_kernel wrote, in the order of the columns."""
    row = tl.program_id(0).to(tl.int64)
    logprob = tl.full((), 0.0, tl.float32)
    logsumexp, entropy, sum_squares = logprob, logprob, logprob
    wanted = tl.full((), 1, tl.int1)
    if HAS_MASK:
        wanted = tl.load(mask + row) != 0
    if wanted:
        scale = row_scale(inverse_temperatures, row, inverse_temperature, PER_ROW) * 1.4426950408889634
        m = tl.full((), -float("inf"), tl.float32)
        s = tl.full((), 0.0, tl.float32)
        t = tl.full((), 0.0, tl.float32)
        q = tl.full((), 0.0, tl.float32)
        for block in range(0, blocks):
            part = statistics + (row * blocks + block) * 4
            block_m, block_s = tl.load(part), tl.load(part + 1)
            block_t, block_q = tl.load(part + 2), tl.load(part + 3)
            m, s, t, q = merge_statistics(m, s, t, q, block_m, block_s, block_t, block_q, scale)
        chosen = tl.load(index + row).to(tl.int64)
        row_logits = logits + row * row_stride
        z = chosen_logit(row_logits, chosen, V, bias, softcap, HAS_BIAS, HAS_SOFTCAP, BIAS_FIRST, float("nan"))
        logprob, logsumexp, entropy, sum_squares = finish_statistics(m, s, t, q, z, scale)
    tl.store(logprobs + row, logprob)
    tl.store(logsumexps + row, logsumexp)
    if ENTROPY:
        tl.store(entropies + row, entropy)
    if SUM_SQUARES:
        tl.store(sums_squares + row, sum_squares)


@triton.jit
def partials_kernel(
    logits,
    row_stride,
    V,
    index,
    inverse_temperatures,
    inverse_temperature,
    bias,
    softcap,
    partials,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row of a vocabulary shard: the five numbers of `sweep_partials`, in nats."""
    row = tl.program_id(0).to(tl.int64)
    inverse = row_scale(inverse_temperatures, row, inverse_temperature, PER_ROW)
    scale = inverse * 1.4426950408889634
    row_logits = logits + row * row_stride
    m, s, t, q = row_statistics(
        row_logits, row_logits, 0, V, bias, scale, softcap, False, HAS_BIAS, HAS_SOFTCAP, BIAS_FIRST, BLOCK
    )
    chosen = tl.load(index + row).to(tl.int64)
    z = chosen_logit(row_logits, chosen, V, bias, softcap, HAS_BIAS, HAS_SOFTCAP, BIAS_FIRST, 0.0)
    top = m * inverse
    tl.store(partials + row * 5, top)
    tl.store(partials + row * 5 + 1, s)
    tl.store(partials + row * 5 + 2, t * 0.6931471805599453 + tl.where(s == 0.0, 0.0, top * s))
    tl.store(partials + row * 5 + 3, q)
    tl.store(partials + row * 5 + 4, z * inverse)


@triton.jit
def gradient_kernel(
    logits,
    row_stride,
    V,
    blocks,
    index,
    mask,
    inverse_temperatures,
    inverse_temperature,
    bias,
    softcap,
    offsets,
    ids,
    grad_logprobs,
    grad_entropies,
    logsumexps,
    entropies,
    out,
    out_stride,
    HAS_MASK: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS_FIRST: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of a row (with HAS_KEEP per row, over its kept columns alone). Rows that are masked, have
    no finite logit or have upstream gradient 0 get 0 and are not read. `out` may be `logits`: a program reads its
    block before it writes it, and nobody else's."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    begin, end = row_range(offsets, row, V, HAS_KEEP)
    if not HAS_KEEP:
        begin = program % blocks * BLOCK
        end = tl.minimum(begin + BLOCK, V)
    grad_logprob = tl.load(grad_logprobs + row).to(tl.float32)
    logsumexp = tl.load(logsumexps + row).to(tl.float32)
    wanted = grad_logprob != 0.0
    grad_entropy, entropy = 0.0, 0.0
    if HAS_ENTROPY:
        grad_entropy = tl.load(grad_entropies + row).to(tl.float32)
        entropy = tl.load(entropies + row).to(tl.float32)
        wanted = wanted | (grad_entropy != 0.0)
    wanted = wanted & (logsumexp != -float("inf"))
    if HAS_MASK:
        wanted = wanted & (tl.load(mask + row) != 0)
    inverse = row_scale(inverse_temperatures, row, inverse_temperature, PER_ROW)
    chosen = tl.load(index + row).to(tl.int64)
    chosen = tl.where((chosen >= 0) & (chosen < V), chosen, -1).to(tl.int32)
    row_logits = logits + row * row_stride
    row_out = out + row * out_stride
    for first in range(begin, end, BLOCK):
        if wanted:
            columns, inside, raw, offset = load_block(row_logits, ids, first, end, bias, HAS_KEEP, HAS_BIAS, BLOCK)
            z, slope = transformed_logits(raw, offset, softcap, HAS_BIAS, HAS_SOFTCAP, BIAS_FIRST)
            is_chosen = (columns == chosen) & inside
            grad = block_gradient(
                z, slope, is_chosen, inverse, logsumexp, entropy, grad_logprob, grad_entropy, HAS_ENTROPY
            )
            tl.store(row_out + columns, grad.to(out.dtype.element_ty), mask=inside)
        elif not HAS_KEEP:
            columns = first + tl.arange(0, BLOCK)
            zeros = tl.zeros((BLOCK,), tl.float32)
            tl.store(row_out + columns, zeros.to(out.dtype.element_ty), mask=columns < end)
