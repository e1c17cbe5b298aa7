"""Triton kernels of the update of theta, over many weights at a time: what rules share, and the simple rules.

All weights of one shape form a group, which a launch covers: a launch costs the host 30 to 60 µs, and a model has tens
to hundreds of managed weights. The kernels find their operands through a table of addresses, int64 [weights, 16].

Every kernel moves each byte once. Addresses out of a table are not known to be aligned, so the compiler gives a lane
one coordinate everywhere, and nothing has to be exchanged between lanes.
"""

from ._tiles import at, candidate_tile, total
from ._triton import jit, jit_for_any, tl
from .blockwise8 import block_scale, decode_m, decode_v, encode_m, encode_v, hash_bits
from .philox import random_words, round_bf16

# Order of the addresses in a row of the table, before the key of the weight's rounding; and the row's length.
TABLE = ("weight", "low", "theta", "m", "v", "m_scale", "v_scale", "grad", "bits", "row_start", "columns")
FIELDS = 16
STATISTICS = 4  # of a tile: selected, the sum of C, candidates, the sum of |change|


@jit
def statistics_of(stats, item):
    """Where the tile program_id(0) of the weight `item` writes its statistics, side by side: one sum over all tiles
    gives the result, where every further operation costs the host as much as a launch."""
    return stats + (item.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 4


@jit
def pointer(table, item, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """The address of one operand (its place in TABLE). A missing one is 0 and never followed."""
    return tl.load(table + item * 16 + FIELD).to(tl.pointer_type(DTYPE))


@jit
def line_of(table, item, FIELD: tl.constexpr, DTYPE: tl.constexpr, start, ALIGNED: tl.constexpr):
    """Address of element `start` of an operand; the operand is known to be a multiple of 16 bytes if ALIGNED."""
    # The hint sits on the operation itself, and would be lost on that of a call.
    found = tl.load(table + item * 16 + FIELD).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found + start


@jit
def tile_of(table, item, K, W, n_cols, capacity, PANEL: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_W: tl.constexpr):
    """(row, column, keep, start, slot, count) of tile program_id(0) of the weight `item`."""
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    bits = pointer(table, item, 8, tl.int32)
    row_start = pointer(table, item, 9, tl.int64)
    columns = pointer(table, item, 10, tl.int32)
    row, column, keep, start, slot, _, count = candidate_tile(
        bits, row_start, columns, row, tl.program_id(0) % CHUNKS, K, W, n_cols, capacity, PANEL, False, BLOCK_W
    )
    if PANEL != 0:
        count = total(keep.to(tl.int32))
    return row, column, keep, start, slot, count


@jit
def load_moment(moment, scales, tile, start, slot, keep, EIGHT: tl.constexpr, SIGNED: tl.constexpr):
    """m (SIGNED) or v in float32; of 8-bit v what is stored, which may be its root."""
    code = tl.load(at(moment + start, slot), mask=keep, other=0)
    if EIGHT:
        if SIGNED:
            value = decode_m(code, tl.load(scales + tile))
        else:
            value = decode_v(code, tl.load(scales + tile))
    else:
        value = code.to(tl.float32)
    return value


@jit
def store_moment(
    moment, scales, tile, start, slot, keep, value, noise, EIGHT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr
):
    """Store a moment; with READ returns it as stored, in float32."""
    stored = value
    if EIGHT:
        scale, inverse = block_scale(tl.where(keep, tl.abs(value), 0.0))
        if SIGNED:
            code = encode_m(value, inverse, noise)
            if READ:
                stored = decode_m(code, scale)
        else:
            code = encode_v(value, inverse, noise)
            if READ:
                stored = decode_v(code, scale)
        tl.store(at(moment + start, slot), code, mask=keep)
        tl.store(scales + tile, scale)
    else:
        narrow = value.to(moment.dtype.element_ty)
        tl.store(at(moment + start, slot), narrow, mask=keep)
        if READ:
            stored = narrow.to(tl.float32)
    return stored


@jit
def noise_of(start, slot, seed, EIGHT: tl.constexpr):
    """Bits for stochastic rounding, a function of position and step."""
    if EIGHT:
        noise = hash_bits(start + seed + slot)
    else:
        noise = slot  # not looked at
    return noise


@jit
def load_values(weight, low, theta, row, column, start, slot, keep, K, WEIGHT: tl.constexpr, THETA: tl.constexpr):
    """theta, from whichever tensor is its master."""
    if THETA is not None:
        value = tl.load(at(theta + start, slot), mask=keep, other=0)
    elif WEIGHT is not None:
        value = tl.load(at(weight + row * K, column), mask=keep, other=0)
    else:
        value = tl.load(at(low + row * K, column), mask=keep, other=0)
    return value


@jit
def as_theta(value, table, item, position, seed, THETA: tl.constexpr):
    """float32 values in the precision of a theta of its own, bfloat16 rounded stochastically: `theta_rules.rounded`."""
    if tl.bfloat16 == THETA:
        key = tl.load(table + item * 16 + 11)
        # A step of 1 comes as a constant.
        key += (key * 0 + seed) * 4294967296
        word, _, _, _ = random_words(key, position.to(tl.uint32))
        stored = round_bf16(value, word)
    else:
        stored = value.to(THETA)
    return stored


@jit
def store_values(
    table,
    item,
    seed,
    weight,
    low,
    theta,
    value,
    row,
    column,
    start,
    slot,
    keep,
    K,
    WEIGHT: tl.constexpr,
    LOW: tl.constexpr,
    THETA: tl.constexpr,
):
    """Store theta to its master and its casts to the slots; returns it as stored, in float32."""
    if THETA is not None:
        stored = as_theta(value, table, item, start + slot, seed, THETA)
        tl.store(at(theta + start, slot), stored, mask=keep)
    elif WEIGHT is not None:
        stored = value.to(WEIGHT)
    else:
        stored = value.to(LOW)
    if WEIGHT is not None:
        tl.store(at(weight + row * K, column), stored.to(WEIGHT), mask=keep)
    if LOW is not None:
        tl.store(at(low + row * K, column), stored.to(LOW), mask=keep)
    return stored.to(tl.float32)


@jit
def scale_of(grad_scale, scale, HAS_SCALE: tl.constexpr):
    if HAS_SCALE:
        grad_scale = grad_scale * tl.load(scale).to(tl.float32)
    return grad_scale


@jit_for_any("seed")
def simple_kernel(
    table,
    stats,
    scale,
    K,
    W,
    n_cols,
    capacity,
    seed,
    decay,
    rate,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    root_correction2,
    grad_scale,
    RULE: tl.constexpr,
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
    """sgd, momentum and adam: read everything once, write everything once.

    stats: float32 [weights, tiles, STATISTICS]; every candidate is selected, and there is no C.
    """
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
    noise = noise_of(start, slot, seed, EIGHT)
    g = tl.load(at(grad + start, slot), mask=keep, other=0).to(tl.float32) * scale_of(grad_scale, scale, HAS_SCALE)
    before = load_values(weight, low, theta, row, column, start, slot, keep, K, WEIGHT, THETA).to(tl.float32)
    change = g
    if RULE != "sgd":
        change = load_moment(m, m_scale, tile, start, slot, keep, EIGHT, True) * beta1 + g * one_minus_beta1
        store_moment(m, m_scale, tile, start, slot, keep, change, noise, EIGHT, True, False)
    if RULE == "adam":
        second = load_moment(v, v_scale, tile, start, slot, keep, EIGHT, False)
        if EIGHT:
            second = second * second
        second = second * beta2 + g * g * one_minus_beta2
        root = tl.sqrt(second)
        store_moment(v, v_scale, tile, start, slot, keep, root if EIGHT else second, noise, EIGHT, False, False)
        change = change / (root * root_correction2 + eps)
    after = before * decay - rate * change
    after = store_values(
        table, item, seed, weight, low, theta, after, row, column, start, slot, keep, K, WEIGHT, LOW, THETA
    )
    mine = statistics_of(stats, item)
    tl.store(mine, count.to(tl.float32))
    tl.store(mine + 1, 0.0)
    tl.store(mine + 2, count.to(tl.float32))
    tl.store(mine + 3, total(tl.where(keep, tl.abs(after - before), 0.0)))
