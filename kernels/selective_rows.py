"""Triton kernels of the selective update where every row has a line of its own: `selective_kernels` by rows.

One takes the moments and flags who is consistent, one steps who is chosen; the thresholds are found in between.
"""

from ._triton import jit_for_any, tl
from .row_moments import moments_of, new_scales, noise_of, read_moment, write_moment
from .theta_kernels import line_of, pointer, scale_of, statistics_of
from .theta_rows import entries, first_part, row_of, step_row


@jit_for_any("seed")
def moments_rows_kernel(
    table,
    flags,
    stats,
    scale,
    K,
    W,
    n_cols,
    capacity,
    seed,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    limit,
    grad_scale,
    MOMENT: tl.constexpr,
    GRAD: tl.constexpr,
    EIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """`selective_kernels.moments_kernel` by rows. Every flag of the line is written."""
    item = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    reach = slots < n_cols
    start = row * n_cols
    m, v, m_scale, v_scale, blocks = moments_of(table, item, row, n_cols, MOMENT, ALIGNED, SHARE)
    grad = line_of(table, item, 7, GRAD, start, ALIGNED)
    g = tl.load(grad + slots, mask=reach, other=0).to(tl.float32) * scale_of(grad_scale, scale, HAS_SCALE)
    code_m, first = read_moment(m, m_scale, blocks, slots, reach, EIGHT, True, SHARE)
    code_v, second = read_moment(v, v_scale, blocks, slots, reach, EIGHT, False, SHARE)
    _, count = entries(pointer(table, item, 8, tl.int32) + row * W, K, W, n_cols, WORDS)
    inside = slots < count
    noise = slots
    tops = slots
    others = slots
    first = first * beta1 + g * one_minus_beta1
    second = second * beta2 + tl.abs(g) * one_minus_beta2
    if EIGHT:
        noise = noise_of(start, seed, slots)
        tops, others = new_scales(m_scale, v_scale, blocks, first, second, inside, SLOTS // SHARE, True)
    first = write_moment(m, tops, slots, inside, reach, code_m, first, noise, EIGHT, True, True)
    second = write_moment(v, others, slots, inside, reach, code_v, second, noise, EIGHT, False, True)
    c = tl.where(inside, tl.abs(first) / (second + eps), 0.0)
    mine = flags + item.to(tl.int64) * capacity + start
    tl.store(mine + slots, tl.where(inside, tl.where(c > limit, 3, 1), 0).to(tl.uint8), mask=reach)
    written = statistics_of(stats, item)
    tl.store(written + 1, tl.sum(c, axis=0))
    tl.store(written + 2, count.to(tl.float32))


@jit_for_any("seed")
def apply_rows_kernel(
    table,
    flags,
    thresholds,
    stats,
    scale,
    K,
    W,
    n_cols,
    capacity,
    seed,
    decay,
    lr,
    eps,
    grad_scale,
    WEIGHT: tl.constexpr,
    LOW: tl.constexpr,
    THETA: tl.constexpr,
    MOMENT: tl.constexpr,
    GRAD: tl.constexpr,
    EIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """`selective_kernels.apply_kernel` by rows."""
    item = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    reach = slots < n_cols
    start = row * n_cols
    weight, low = row_of(table, item, row, K, WEIGHT, LOW, ALIGNED)
    part = first_part(weight, low, K, WEIGHT, LOW, BLOCK_W)
    m, v, m_scale, v_scale, blocks = moments_of(table, item, row, n_cols, MOMENT, ALIGNED, SHARE)
    bits = pointer(table, item, 8, tl.int32) + row * W
    grad = line_of(table, item, 7, GRAD, start, ALIGNED)
    raw = tl.load(grad + slots, mask=reach, other=0).to(tl.float32)
    flag = tl.load(flags + item.to(tl.int64) * capacity + start + slots, mask=reach, other=0)
    key = raw.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    chosen = (flag == 3) & (key.to(tl.int64) >= tl.load(thresholds + item))
    _, first = read_moment(m, m_scale, blocks, slots, reach, EIGHT, True, SHARE)
    _, second = read_moment(v, v_scale, blocks, slots, reach, EIGHT, False, SHARE)
    change = tl.abs(first) / (second + eps) * (raw * scale_of(grad_scale, scale, HAS_SCALE))
    change = tl.where(chosen, change, 0.0)
    words, count = entries(bits, K, W, n_cols, WORDS)
    moved = step_row(
        table,
        item,
        row,
        start,
        seed,
        weight,
        low,
        bits,
        words,
        part,
        change,
        slots < count,
        reach,
        slots,
        count,
        K,
        W,
        n_cols,
        decay,
        lr,
        WEIGHT,
        LOW,
        THETA,
        ALIGNED,
        CHUNKS,
        BLOCK_W,
    )
    written = statistics_of(stats, item)
    tl.store(written, tl.sum(chosen.to(tl.float32), axis=0))
    tl.store(written + 3, moved)
