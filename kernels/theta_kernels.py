"""Triton kernels of the update of theta, over many weights at a time.

All weights of one shape form a group, which a launch covers: a launch costs the host 30 to 60 µs, and a model has tens
to hundreds of managed weights. The kernels find their operands through a table of addresses, int64 [weights, FIELDS].

Every kernel moves each byte once; measured on an H100 at 4096 x 4096 and 50 %: adam 2.5 TB/s of a copy's 2.9.
"""

from ._radix import budget_of, decided_digits, digit_counts, magnitude_key, threshold_key
from ._tiles import at, candidate_tile
from ._triton import jit, tl
from .blockwise8 import block_scale, decode_m, decode_v, encode_m, encode_v, hash_bits

# Order of the addresses in a row of the table.
TABLE = ("weight", "low", "theta", "m", "v", "m_scale", "v_scale", "grad", "bits", "row_start", "columns")
FIELDS = 16  # a row's length: a power of two


@jit
def _pointer(table, item, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of one operand. A missing one is 0 and never followed."""
    pointer = tl.load(table + item * 16 + FIELD).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def _tile(table, item, tile, chunks, K, W, n_cols, capacity, PANEL: tl.constexpr, BLOCK_W: tl.constexpr):
    """(row, column, keep, slot) of a tile of one weight."""
    row = (tile // chunks).to(tl.int64)
    bits = _pointer(table, item, 8, tl.int32, False)
    row_start = _pointer(table, item, 9, tl.int64, False)
    columns = _pointer(table, item, 10, tl.int32, False)
    column, keep, slot, _ = candidate_tile(bits, row_start, columns, row, tile % chunks, K, W, n_cols, capacity, PANEL,
                                           False, BLOCK_W)
    return row, column, keep, slot


@jit
def _load_moment(moment, scales, tile, slot, keep, EIGHT: tl.constexpr, SIGNED: tl.constexpr):
    code = tl.load(at(moment, slot), mask=keep, other=0)
    if EIGHT:
        if SIGNED:
            value = decode_m(code, tl.load(scales + tile))
        else:
            value = decode_v(code, tl.load(scales + tile))
    else:
        value = code.to(tl.float32)
    return value


@jit
def _store_moment(moment, scales, tile, slot, keep, value, noise, EIGHT: tl.constexpr, SIGNED: tl.constexpr):
    """Store a moment; returns it as stored, in float32."""
    if EIGHT:
        scale, inverse = block_scale(tl.where(keep, tl.abs(value), 0.0))
        if SIGNED:
            code = encode_m(value, inverse, noise)
            stored = decode_m(code, scale)
        else:
            code = encode_v(value, inverse, noise)
            stored = decode_v(code, scale)
        tl.store(at(moment, slot), code, mask=keep)
        tl.store(scales + tile, scale)
    else:
        narrow = value.to(moment.dtype.element_ty)
        tl.store(at(moment, slot), narrow, mask=keep)
        stored = narrow.to(tl.float32)
    return stored


@jit
def _noise(slot, seed, EIGHT: tl.constexpr):
    if EIGHT:
        noise = hash_bits(slot, seed)
    else:
        noise = slot  # not looked at
    return noise


@jit
def _dense(matrix, row, column, K, PANEL: tl.constexpr):
    """Addresses in the matrix: vectors where the columns are consecutive."""
    if PANEL:
        address = at(matrix + row * K, column)
    else:
        address = matrix + row * K + column
    return address


@jit
def _load_values(weight, low, theta, row, column, slot, keep, K, WEIGHT: tl.constexpr, LOW: tl.constexpr,
                 THETA: tl.constexpr, PANEL: tl.constexpr):
    """(weight around the slots, copy around the slots, theta), as stored. Whole rows in the compact layout: vector
    accesses, and every sector is touched either way."""
    wanted = keep if PANEL else column < K
    value = keep
    around = keep
    around_low = keep
    if LOW is not None:
        if WEIGHT is None or PANEL:
            around_low = tl.load(_dense(low, row, column, K, PANEL), mask=wanted, other=0)
            value = around_low
    if WEIGHT is not None:
        around = tl.load(_dense(weight, row, column, K, PANEL), mask=wanted, other=0)
        value = around
    if THETA is not None:
        value = tl.load(at(theta, slot), mask=keep, other=0)
    return around, around_low, value


@jit
def _store_values(weight, low, theta, around, around_low, value, row, column, slot, keep, K, WEIGHT: tl.constexpr,
                  LOW: tl.constexpr, THETA: tl.constexpr, PANEL: tl.constexpr):
    """Store theta to its master and its casts to the slots; returns it as stored, in float32."""
    wanted = keep if PANEL else column < K
    if THETA is not None:
        stored = value.to(THETA)
        tl.store(at(theta, slot), stored, mask=keep)
    elif WEIGHT is not None:
        stored = value.to(WEIGHT)
    else:
        stored = value.to(LOW)
    if WEIGHT is not None:
        written = tl.where(keep, stored.to(WEIGHT), around)
        tl.store(_dense(weight, row, column, K, PANEL), written, mask=wanted)
    if LOW is not None:
        if WEIGHT is not None and not PANEL:
            copied = written.to(LOW)  # of the frozen part too: saves reading the copy
        else:
            copied = tl.where(keep, stored.to(LOW), around_low)
        tl.store(_dense(low, row, column, K, PANEL), copied, mask=wanted)
    return stored.to(tl.float32)


@jit
def _store_stats(stats, program, selected, consistency, candidates, moved):
    tl.store(stats + program * 4, selected)
    tl.store(stats + program * 4 + 1, consistency)
    tl.store(stats + program * 4 + 2, candidates)
    tl.store(stats + program * 4 + 3, moved)


@jit
def _scale_of(grad_scale, scale, HAS_SCALE: tl.constexpr):
    if HAS_SCALE:
        grad_scale = grad_scale * tl.load(scale).to(tl.float32)
    return grad_scale


@jit
def simple_kernel(table, stats, scale, K, W, n_cols, capacity, tiles, chunks, seed, decay, rate, beta1, one_minus_beta1,
                  beta2, one_minus_beta2, eps, correction2, grad_scale, RULE: tl.constexpr, WEIGHT: tl.constexpr,
                  LOW: tl.constexpr, THETA: tl.constexpr, MOMENT: tl.constexpr, GRAD: tl.constexpr,
                  EIGHT: tl.constexpr, HAS_SCALE: tl.constexpr, ALIGNED: tl.constexpr, PANEL: tl.constexpr,
                  BLOCK_W: tl.constexpr):
    """sgd, momentum and adam: read everything once, write everything once."""
    item = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row, column, keep, slot = _tile(table, item, tile, chunks, K, W, n_cols, capacity, PANEL, BLOCK_W)
    grad = _pointer(table, item, 7, GRAD, ALIGNED)
    weight = _pointer(table, item, 0, tl.float32 if WEIGHT is None else WEIGHT, ALIGNED)
    low = _pointer(table, item, 1, tl.bfloat16 if LOW is None else LOW, ALIGNED)
    theta = _pointer(table, item, 2, tl.float32 if THETA is None else THETA, ALIGNED)
    m = _pointer(table, item, 3, MOMENT, ALIGNED)
    v = _pointer(table, item, 4, MOMENT, ALIGNED)
    m_scale = _pointer(table, item, 5, tl.float32, False)
    v_scale = _pointer(table, item, 6, tl.float32, False)
    noise = _noise(slot, seed, EIGHT)
    g = tl.load(at(grad, slot), mask=keep, other=0).to(tl.float32) * _scale_of(grad_scale, scale, HAS_SCALE)
    around, around_low, value = _load_values(weight, low, theta, row, column, slot, keep, K, WEIGHT, LOW, THETA, PANEL)
    before = value.to(tl.float32)
    change = g
    if RULE != "sgd":
        first = _load_moment(m, m_scale, tile, slot, keep, EIGHT, True) * beta1 + g * one_minus_beta1
        _store_moment(m, m_scale, tile, slot, keep, first, noise, EIGHT, True)
        change = first
    if RULE == "adam":
        second = _load_moment(v, v_scale, tile, slot, keep, EIGHT, False)
        if EIGHT:
            second = second * second
        second = second * beta2 + g * g * one_minus_beta2
        if EIGHT:
            _store_moment(v, v_scale, tile, slot, keep, tl.sqrt(second), noise, EIGHT, False)
        else:
            _store_moment(v, v_scale, tile, slot, keep, second, noise, EIGHT, False)
        change = first / (tl.sqrt(second * correction2) + eps)
    after = _store_values(weight, low, theta, around, around_low, before * decay - rate * change, row, column, slot,
                          keep, K, WEIGHT, LOW, THETA, PANEL)
    count = tl.sum(tl.sum(keep.to(tl.float32), axis=1), axis=0)
    moved = tl.sum(tl.sum(tl.where(keep, tl.abs(after - before), 0.0), axis=1), axis=0)
    _store_stats(stats, tl.program_id(0), count, 0.0, count, moved)


@jit
def _digit_counts(key, keep, SHIFT: tl.constexpr, BLOCK_W: tl.constexpr):
    digit = tl.reshape((key >> SHIFT) & 255, [BLOCK_W * 32])
    return digit_counts(digit, tl.reshape(keep, [BLOCK_W * 32]))


@jit
def moments_kernel(table, consistent, counts, stats, scale, K, W, n_cols, capacity, tiles, chunks, tile_words, programs,
                   seed, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, limit, grad_scale, MOMENT: tl.constexpr,
                   GRAD: tl.constexpr, EIGHT: tl.constexpr, HAS_SCALE: tl.constexpr, ALIGNED: tl.constexpr,
                   PANEL: tl.constexpr, BLOCK_W: tl.constexpr):
    """selective, first: update m and v, mark what is consistent (one bit each), count the first digit of |g| of all
    and of those. consistent: int32 [weights, rows, tile_words]; counts: int64 [weights, 2, 4, 256]."""
    item = tl.program_id(0) // programs
    grad = _pointer(table, item, 7, GRAD, ALIGNED)
    m = _pointer(table, item, 3, MOMENT, ALIGNED)
    v = _pointer(table, item, 4, MOMENT, ALIGNED)
    m_scale = _pointer(table, item, 5, tl.float32, False)
    v_scale = _pointer(table, item, 6, tl.float32, False)
    mine = consistent + item.to(tl.int64) * (tiles // chunks) * tile_words
    index = tl.arange(0, BLOCK_W)
    lane = tl.arange(0, 32)
    factor = _scale_of(grad_scale, scale, HAS_SCALE)
    found = tl.zeros([256], tl.int32)
    found_consistent = tl.zeros([256], tl.int32)
    count = tl.zeros([BLOCK_W], tl.float32)
    c_sum = tl.zeros([BLOCK_W], tl.float32)
    for tile in range(tl.program_id(0) % programs, tiles, programs):
        row, column, keep, slot = _tile(table, item, tile, chunks, K, W, n_cols, capacity, PANEL, BLOCK_W)
        noise = _noise(slot, seed, EIGHT)
        raw = tl.load(at(grad, slot), mask=keep, other=0).to(tl.float32)
        g = raw * factor
        first = _load_moment(m, m_scale, tile, slot, keep, EIGHT, True) * beta1 + g * one_minus_beta1
        second = _load_moment(v, v_scale, tile, slot, keep, EIGHT, False) * beta2 + tl.abs(g) * one_minus_beta2
        first = _store_moment(m, m_scale, tile, slot, keep, first, noise, EIGHT, True)
        second = _store_moment(v, v_scale, tile, slot, keep, second, noise, EIGHT, False)
        c = tl.abs(first) / (second + eps)
        good = keep & (c > limit)
        word = (tile % chunks) * BLOCK_W + index
        tl.store(mine + row * tile_words + word, tl.sum(good.to(tl.int32) << lane[None, :], axis=1),
                 mask=word < tile_words)
        key = magnitude_key(raw, False)
        found += _digit_counts(key, keep, 24, BLOCK_W)
        found_consistent += _digit_counts(key, good, 24, BLOCK_W)
        count += tl.sum(keep.to(tl.float32), axis=1)
        c_sum += tl.sum(tl.where(keep, c, 0.0), axis=1)
    here = counts + item.to(tl.int64) * 2048
    tl.atomic_add(here + tl.arange(0, 256), found.to(tl.int64))
    tl.atomic_add(here + 1024 + tl.arange(0, 256), found_consistent.to(tl.int64))
    _store_stats(stats, tl.program_id(0), 0.0, tl.sum(c_sum, axis=0), tl.sum(count, axis=0), 0.0)


@jit
def _candidates_of(counts):
    """Their number: every candidate was counted by its first digit."""
    return tl.sum(tl.load(counts + tl.arange(0, 256)), axis=0)


@jit
def digits_kernel(table, consistent, counts, K, W, n_cols, capacity, tiles, chunks, tile_words, programs, top_units,
                  select_units, DIGIT: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, PANEL: tl.constexpr,
                  BLOCK_W: tl.constexpr):
    """selective: count digit number DIGIT of |g| for both thresholds."""
    SHIFT: tl.constexpr = 24 - 8 * DIGIT
    item = tl.program_id(0) // programs
    grad = _pointer(table, item, 7, GRAD, ALIGNED)
    mine = consistent + item.to(tl.int64) * (tiles // chunks) * tile_words
    here = counts + item.to(tl.int64) * 2048
    index = tl.arange(0, BLOCK_W)
    lane = tl.arange(0, 32)
    p = _candidates_of(here)
    prefix = decided_digits(here, budget_of(p, top_units), DIGIT).to(tl.int32)
    prefix_consistent = decided_digits(here + 1024, budget_of(p, select_units), DIGIT).to(tl.int32)
    found = tl.zeros([256], tl.int32)
    found_consistent = tl.zeros([256], tl.int32)
    for tile in range(tl.program_id(0) % programs, tiles, programs):
        row, column, keep, slot = _tile(table, item, tile, chunks, K, W, n_cols, capacity, PANEL, BLOCK_W)
        key = magnitude_key(tl.load(at(grad, slot), mask=keep, other=0), False)
        word = (tile % chunks) * BLOCK_W + index
        good = tl.load(mine + row * tile_words + word, mask=word < tile_words, other=0)
        good = ((good[:, None] >> lane[None, :]) & 1) != 0
        decided = key >> (SHIFT + 8)
        found += _digit_counts(key, keep & (decided == prefix), SHIFT, BLOCK_W)
        found_consistent += _digit_counts(key, good & (decided == prefix_consistent), SHIFT, BLOCK_W)
    tl.atomic_add(here + DIGIT * 256 + tl.arange(0, 256), found.to(tl.int64))
    tl.atomic_add(here + 1024 + DIGIT * 256 + tl.arange(0, 256), found_consistent.to(tl.int64))


@jit
def thresholds_kernel(counts, thresholds, top_units, select_units, DIGITS: tl.constexpr):
    """selective: the smallest key that is stepped, int64 [weights].

    Of the consistent candidates the select * p largest are wanted, but only above the magnitude threshold: taking the
    larger of both thresholds is the same as selecting inside the intersection.
    """
    here = counts + tl.program_id(0).to(tl.int64) * 2048
    p = _candidates_of(here)
    key = tl.maximum(threshold_key(here, budget_of(p, top_units), DIGITS, False),
                     threshold_key(here + 1024, budget_of(p, select_units), DIGITS, False))
    tl.store(thresholds + tl.program_id(0), key)


@jit
def apply_kernel(table, consistent, thresholds, stats, scale, K, W, n_cols, capacity, tiles, chunks, tile_words, decay,
                 lr, eps, grad_scale, WEIGHT: tl.constexpr, LOW: tl.constexpr, THETA: tl.constexpr,
                 MOMENT: tl.constexpr, GRAD: tl.constexpr, EIGHT: tl.constexpr, HAS_SCALE: tl.constexpr,
                 ALIGNED: tl.constexpr, PANEL: tl.constexpr, BLOCK_W: tl.constexpr):
    """selective, last: decay every candidate and step the selected ones."""
    item = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row, column, keep, slot = _tile(table, item, tile, chunks, K, W, n_cols, capacity, PANEL, BLOCK_W)
    grad = _pointer(table, item, 7, GRAD, ALIGNED)
    weight = _pointer(table, item, 0, tl.float32 if WEIGHT is None else WEIGHT, ALIGNED)
    low = _pointer(table, item, 1, tl.bfloat16 if LOW is None else LOW, ALIGNED)
    theta = _pointer(table, item, 2, tl.float32 if THETA is None else THETA, ALIGNED)
    m = _pointer(table, item, 3, MOMENT, ALIGNED)
    v = _pointer(table, item, 4, MOMENT, ALIGNED)
    m_scale = _pointer(table, item, 5, tl.float32, False)
    v_scale = _pointer(table, item, 6, tl.float32, False)
    word = (tile % chunks) * BLOCK_W + tl.arange(0, BLOCK_W)
    mine = consistent + item.to(tl.int64) * (tiles // chunks) * tile_words
    good = tl.load(mine + row * tile_words + word, mask=word < tile_words, other=0)
    raw = tl.load(at(grad, slot), mask=keep, other=0).to(tl.float32)
    chosen = keep & (((good[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0)
    chosen = chosen & (magnitude_key(raw, False).to(tl.int64) >= tl.load(thresholds + item))
    around, around_low, value = _load_values(weight, low, theta, row, column, slot, keep, K, WEIGHT, LOW, THETA, PANEL)
    before = value.to(tl.float32)
    first = _load_moment(m, m_scale, tile, slot, chosen, EIGHT, True)
    second = _load_moment(v, v_scale, tile, slot, chosen, EIGHT, False)
    change = tl.abs(first) / (second + eps) * (raw * _scale_of(grad_scale, scale, HAS_SCALE))
    change = tl.where(chosen, change, 0.0)
    after = _store_values(weight, low, theta, around, around_low, before * decay - lr * change, row, column, slot, keep,
                          K, WEIGHT, LOW, THETA, PANEL)
    moved = tl.sum(tl.sum(tl.where(keep, tl.abs(after - before), 0.0), axis=1), axis=0)
    _store_stats(stats, tl.program_id(0), tl.sum(tl.sum(chosen.to(tl.float32), axis=1), axis=0), 0.0, 0.0, moved)
