"""Triton kernels of the selective rule: moments, exact thresholds without a sort, and the step of the selected.

The thresholds are the k-th largest |g|, found from their bit patterns, four bits at a time: a pass counts, among the
gradients that agree with the bits decided so far, how often each next digit occurs. It runs over the compact gradient
alone, which is contiguous; counters of sixteen digits sit in one 64-bit integer per lane, so that counting is an
addition. (`tl.histogram` costs 150 instructions a value: 10 times slower, measured on an H100.)

`flags`, uint8 like the gradient, carries from pass to pass which candidates are consistent: 1 for a candidate, 3 for a
consistent one, 0 for padding.
"""

from ._tiles import at, total
from ._triton import jit, jit_for_any, tl
from .theta_kernels import (
    load_moment,
    load_values,
    noise_of,
    pointer,
    scale_of,
    statistics_of,
    store_moment,
    store_values,
    tile_of,
)

DIGIT_BINS = 16
# Four-bit digits that can differ between keys: the low bits of a half-width float in float32 are zero.
SHORT_DIGITS = {2: 4, 4: 8}
BLOCK = 2048  # gradients that a program counts at a time


@jit_for_any("seed")
def moments_kernel(
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
    PANEL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """First: update m and v, flag candidates and what of them is consistent.

    flags: uint8 [weights, capacity], zero. stats: float32 [weights, tiles, STATISTICS], of which it writes the sum of C
    and the number of candidates.
    """
    item = tl.program_id(1)
    tile = tl.program_id(0)
    row, column, keep, start, slot, count = tile_of(table, item, K, W, n_cols, capacity, PANEL, CHUNKS, BLOCK_W)
    grad = pointer(table, item, 7, GRAD)
    m = pointer(table, item, 3, MOMENT)
    v = pointer(table, item, 4, MOMENT)
    m_scale = pointer(table, item, 5, tl.float32)
    v_scale = pointer(table, item, 6, tl.float32)
    noise = noise_of(start, slot, seed, EIGHT)
    g = tl.load(at(grad + start, slot), mask=keep, other=0).to(tl.float32) * scale_of(grad_scale, scale, HAS_SCALE)
    first = load_moment(m, m_scale, tile, start, slot, keep, EIGHT, True) * beta1 + g * one_minus_beta1
    second = load_moment(v, v_scale, tile, start, slot, keep, EIGHT, False) * beta2 + tl.abs(g) * one_minus_beta2
    first = store_moment(m, m_scale, tile, start, slot, keep, first, noise, EIGHT, True, True)
    second = store_moment(v, v_scale, tile, start, slot, keep, second, noise, EIGHT, False, True)
    c = tl.abs(first) / (second + eps)
    mine = flags + item.to(tl.int64) * capacity
    tl.store(at(mine + start, slot), tl.where(c > limit, 3, 1).to(tl.uint8), mask=keep)
    written = statistics_of(stats, item)
    tl.store(written + 1, total(tl.where(keep, c, 0.0)))
    tl.store(written + 2, count.to(tl.float32))


@jit
def _decided(counts, k, DIGITS: tl.constexpr):
    """The first DIGITS digits of the k-th largest key as an int64; negative when fewer than k keys exist.

    counts: int64 [8, 16]. k must be positive for the result to mean anything.
    """
    bins = tl.arange(0, 16)
    prefix = k * 0
    remaining = k
    for digit in tl.static_range(DIGITS):
        here = tl.load(counts + digit * 16 + bins)
        at_least = tl.sum(here, axis=0) - tl.cumsum(here, axis=0) + here
        chosen = tl.sum((at_least >= remaining).to(tl.int32), axis=0) - 1
        remaining -= tl.sum(tl.where(bins > chosen, here, 0), axis=0)
        prefix = prefix * 16 + chosen
    return prefix


@jit
def _budget(counts, units):
    """round(fraction * candidates), at least 1 unless the fraction is 0; the fraction in units of 2^-30. Every
    candidate was counted by its first digit."""
    rounded = (tl.sum(tl.load(counts + tl.arange(0, 16)), axis=0) * units + 536870912) >> 30
    return tl.where(units == 0, 0, tl.where(rounded < 1, 1, rounded))


@jit
def _digit_counts(digit, counted):
    """int32 [16, lanes]: how often each digit occurs where `counted`; both [8, lanes]."""
    one = tl.where(counted, 1, 0).to(tl.int64)
    packed = tl.sum(one << (digit.to(tl.int64) * 4), axis=0)  # at most 8 in every field of 4 bits
    fields = (packed[None, :] >> (tl.arange(0, 16) * 4).to(tl.int64)[:, None]) & 15
    return fields.to(tl.int32)


@jit
def digits_kernel(
    table,
    flags,
    counts,
    capacity,
    top_units,
    select_units,
    DIGIT: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count digit number DIGIT of |g|, of all candidates and of the consistent. counts: int64 [weights, 2, 8, 16].

    Vector loads would be fewer instructions, but their layout spreads the eight that are added first over warps."""
    SHIFT: tl.constexpr = 28 - 4 * DIGIT
    item = tl.program_id(1)
    grad = pointer(table, item, 7, GRAD)
    mine = flags + item.to(tl.int64) * capacity
    here = counts + item.to(tl.int64) * 256
    prefix = _decided(here, _budget(here, top_units), DIGIT).to(tl.int32)
    prefix_consistent = _decided(here + 128, _budget(here, select_units), DIGIT).to(tl.int32)
    found = tl.zeros([16, BLOCK // 8], tl.int32)
    found_consistent = tl.zeros([16, BLOCK // 8], tl.int32)
    index = tl.arange(0, 8)[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    for first in range(tl.program_id(0) * BLOCK, capacity, tl.num_programs(0) * BLOCK):
        position = first + index
        key = tl.load(at(grad, position), mask=position < capacity, other=0).to(tl.float32)
        key = key.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        flag = tl.load(at(mine, position), mask=position < capacity, other=0)
        digit = (key >> SHIFT) & 15
        counted = flag != 0
        consistent = flag == 3
        if DIGIT > 0:  # nothing is decided before the first digit
            decided = key >> (SHIFT + 4)
            counted = counted & (decided == prefix)
            consistent = consistent & (decided == prefix_consistent)
        found += _digit_counts(digit, counted)
        found_consistent += _digit_counts(digit, consistent)
    bins = tl.arange(0, 16)
    tl.atomic_add(here + DIGIT * 16 + bins, tl.sum(found, axis=1).to(tl.int64))
    tl.atomic_add(here + 128 + DIGIT * 16 + bins, tl.sum(found_consistent, axis=1).to(tl.int64))


@jit
def _threshold(counts, k, DIGITS: tl.constexpr):
    """The smallest key (int64) that is taken: 0 when fewer than k keys exist, beyond every key when k is 0."""
    prefix = _decided(counts, k, DIGITS)
    key = tl.where(prefix < 0, 0, prefix) << (32 - 4 * DIGITS)
    return tl.where(k <= 0, 0x7FFFFFFFFFFFFFFF, key)


@jit
def thresholds_kernel(counts, thresholds, top_units, select_units, DIGITS: tl.constexpr):
    """The smallest key that is stepped, int64 [weights].

    Of the consistent candidates the select * p largest are wanted, but only above the magnitude threshold: taking the
    larger of both thresholds is the same as selecting inside the intersection.
    """
    here = counts + tl.program_id(0).to(tl.int64) * 256
    top = _threshold(here, _budget(here, top_units), DIGITS)
    selected = _threshold(here + 128, _budget(here, select_units), DIGITS)
    tl.store(thresholds + tl.program_id(0), tl.maximum(top, selected))


@jit_for_any("seed")
def apply_kernel(
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
    PANEL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Last: decay every candidate and step the selected ones. stats: what `moments_kernel` has left to write."""
    item = tl.program_id(1)
    tile = tl.program_id(0)
    row, column, keep, start, slot, count = tile_of(table, item, K, W, n_cols, capacity, PANEL, CHUNKS, BLOCK_W)
    grad = pointer(table, item, 7, GRAD)
    weight = pointer(table, item, 0, tl.float32 if WEIGHT is None else WEIGHT)
    low = pointer(table, item, 1, tl.bfloat16 if LOW is None else LOW)
    theta = pointer(table, item, 2, tl.float32 if THETA is None else THETA)
    m = pointer(table, item, 3, MOMENT)
    v = pointer(table, item, 4, MOMENT)
    m_scale = pointer(table, item, 5, tl.float32)
    v_scale = pointer(table, item, 6, tl.float32)
    raw = tl.load(at(grad + start, slot), mask=keep, other=0).to(tl.float32)
    flag = tl.load(at(flags + item.to(tl.int64) * capacity + start, slot), mask=keep, other=0)
    key = raw.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    chosen = keep & (flag == 3) & (key.to(tl.int64) >= tl.load(thresholds + item))
    before = load_values(weight, low, theta, row, column, start, slot, keep, K, WEIGHT, THETA).to(tl.float32)
    first = load_moment(m, m_scale, tile, start, slot, chosen, EIGHT, True)
    second = load_moment(v, v_scale, tile, start, slot, chosen, EIGHT, False)
    change = tl.abs(first) / (second + eps) * (raw * scale_of(grad_scale, scale, HAS_SCALE))
    change = tl.where(chosen, change, 0.0)
    after = before * decay - lr * change
    after = store_values(
        table, item, seed, weight, low, theta, after, row, column, start, slot, keep, K, WEIGHT, LOW, THETA
    )
    written = statistics_of(stats, item)
    tl.store(written, total(chosen.to(tl.float32)))
    tl.store(written + 3, total(tl.where(keep, tl.abs(after - before), 0.0)))
