"""Triton kernels of the update of theta where every row has a line of its own: moments compact, theta in its columns.

A program has a row. What is theta-like (dtheta, moments, flags, a separate theta) is read, updated and written as the
one run of memory that it is, without a look at the mask; the change then goes through shared memory to the columns that
the mask gives it (`tl.gather`), and the weight's row is read and written whole. Against `theta_kernels`, which does all
of it in the columns' space, arithmetic at 50 % is halved and accesses are vectors where addresses allow: Adam takes 1.4
instructions a column instead of 3.0, with 8-bit moments 2.4 instead of 5.2 (counted in code for Hopper).

Writing back what was read costs no bytes: a sector that holds one candidate is read and written anyway, and padding
shares sectors with entries. Nothing else may write a weight or a moment meanwhile.
"""

from ._tiles import popcount, spread
from ._triton import jit, tl
from .blockwise8 import decode_m, decode_v, encode_m, encode_v, hash_bits
from .theta_kernels import pointer, scale_of


@jit
def line_of(table, item, FIELD: tl.constexpr, DTYPE: tl.constexpr, start, ALIGNED: tl.constexpr):
    """Address of element `start` of an operand; the operand is known to be a multiple of 16 bytes if ALIGNED."""
    # The hint sits on the operation itself, and would be lost on that of a call.
    found = tl.load(table + item * 16 + FIELD).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found + start


@jit
def moments_of(table, item, row, n_cols, MOMENT: tl.constexpr, ALIGNED: tl.constexpr, SHARE: tl.constexpr):
    """(m, v, scales of m, scales of v, blocks of a line) of a row."""
    blocks = (n_cols + SHARE - 1) // SHARE
    m = line_of(table, item, 3, MOMENT, row * n_cols, ALIGNED)
    v = line_of(table, item, 4, MOMENT, row * n_cols, ALIGNED)
    m_scale = pointer(table, item, 5, tl.float32) + row * blocks
    v_scale = pointer(table, item, 6, tl.float32) + row * blocks
    return m, v, m_scale, v_scale, blocks


@jit
def opened(line, index, K, W):
    """Words of a row of the mask, inverted: ones are candidates."""
    word = ~tl.load(line + index, mask=index < W, other=-1)
    valid = K - index * 32
    return word & tl.where(valid < 32, (1 << tl.maximum(tl.minimum(valid, 31), 0)) - 1, -1)


@jit
def entries(bits, K, W, n_cols, WORDS: tl.constexpr):
    """Candidates of a row; 0 if they exceed the line: a wrong mask must not write foreign memory."""
    count = tl.sum(popcount(opened(bits, tl.arange(0, WORDS), K, W)), axis=0)
    return tl.where(count <= n_cols, count, 0)


@jit
def read_moment(moment, scales, blocks, slots, reach, EIGHT: tl.constexpr, SIGNED: tl.constexpr, SHARE: tl.constexpr):
    """m (SIGNED) or v as it is stored, and in float32; of 8-bit v what is stored, which may be its root."""
    code = tl.load(moment + slots, mask=reach, other=0)
    value = code.to(tl.float32)
    if EIGHT:
        SLOTS: tl.constexpr = slots.shape[0]
        which = tl.arange(0, SLOTS // SHARE)
        scale = spread(tl.load(scales + which, mask=which < blocks, other=0), SLOTS)
        value = decode_m(code, scale) if SIGNED else decode_v(code, scale)
    return code, value


@jit
def _larger(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@jit
def block_maxima(a, b, inside, BLOCKS: tl.constexpr):
    """Largest |a| and largest |b| of every block, [BLOCKS]."""
    a, b = tl.where(inside, tl.abs(a), 0.0), tl.where(inside, tl.abs(b), 0.0)
    a = tl.reshape(a, [BLOCKS, a.shape[0] // BLOCKS])
    b = tl.reshape(b, [BLOCKS, b.shape[0] // BLOCKS])
    return tl.reduce((a, b), 1, _larger)


@jit
def write_moment(
    moment,
    scales,
    blocks,
    tops,
    slots,
    inside,
    reach,
    before,
    value,
    noise,
    EIGHT: tl.constexpr,
    SIGNED: tl.constexpr,
    READ: tl.constexpr,
):
    """Store a moment in place of `before`; with READ returns it as stored, in float32. tops: of its `blocks` blocks."""
    stored = value
    if EIGHT:
        which = tl.arange(0, tops.shape[0])
        tl.store(scales + which, tops, mask=which < blocks)
        inverse = spread(tl.where(tops > 0, 1 / tops, 0.0), slots.shape[0])
        code = encode_m(value, inverse, noise) if SIGNED else encode_v(value, inverse, noise)
        if READ:
            scale = spread(tops, slots.shape[0])
            stored = decode_m(code, scale) if SIGNED else decode_v(code, scale)
    else:
        code = value.to(moment.dtype.element_ty)
        if READ:
            stored = code.to(tl.float32)
    tl.store(moment + slots, tl.where(inside, code, before), mask=reach)
    return stored


@jit
def read_row(weight, low, K, chunk, WEIGHT: tl.constexpr, BLOCK_W: tl.constexpr):
    """Part `chunk` of the row that is written: of the weight, or of its copy where there is no weight."""
    column = chunk * (32 * BLOCK_W) + tl.arange(0, 32 * BLOCK_W)
    if WEIGHT is not None:
        value = tl.load(weight + column, mask=column < K, other=0)
    else:
        value = tl.load(low + column, mask=column < K, other=0)
    return value


@jit
def write_row(
    weight,
    low,
    bits,
    first,
    value,
    count,
    K,
    W,
    decay,
    rate,
    WEIGHT: tl.constexpr,
    LOW: tl.constexpr,
    THETA: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Bring [SLOTS] values to the row's candidates, and the weight's row to its copy; returns the sum of |change|.

    value: theta as stored if there is a THETA, else what steps it: theta <- decay * theta - rate * value. first: part 0
    of the row, which the caller asks for long before (`read_row`); every part is asked for one part ahead.
    """
    BLOCK: tl.constexpr = 32 * BLOCK_W
    lane = tl.arange(0, 32)
    moved = tl.zeros([BLOCK], tl.float32)
    seen = 0
    old = first
    for chunk in range(CHUNKS):
        ahead = old
        if CHUNKS > 1:
            ahead = read_row(weight, low, K, chunk + 1, WEIGHT, BLOCK_W)
        word = opened(bits, chunk * BLOCK_W + tl.arange(0, BLOCK_W), K, W)
        here = popcount(word)
        before = seen + tl.cumsum(here, axis=0) - here
        if CHUNKS > 1:
            seen += tl.sum(here, axis=0)
        rank = before[:, None] + popcount(word[:, None] & ((1 << lane[None, :]) - 1))
        keep = tl.reshape((((word[:, None] >> lane[None, :]) & 1) != 0) & (count > 0), [BLOCK])
        found = tl.gather(value, tl.minimum(tl.reshape(rank, [BLOCK]), value.shape[0] - 1), 0)
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        if THETA is None:
            known = old.to(tl.float32)
            found = (known * decay - rate * found).to(old.dtype)
            moved += tl.where(keep, tl.abs(found.to(tl.float32) - known), 0.0)
        if WEIGHT is not None:
            fresh = tl.where(keep, found.to(WEIGHT), old)
            tl.store(weight + column, fresh, mask=column < K)
            if LOW is not None:
                tl.store(low + column, fresh.to(LOW), mask=column < K)
        else:
            tl.store(low + column, tl.where(keep, found.to(LOW), old), mask=column < K)
        old = ahead
    return tl.sum(moved, axis=0)


@jit
def step_row(
    table,
    item,
    row,
    bits,
    first,
    change,
    inside,
    reach,
    slots,
    count,
    K,
    W,
    n_cols,
    decay,
    rate,
    WEIGHT: tl.constexpr,
    LOW: tl.constexpr,
    THETA: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """theta <- decay * theta - rate * change in every tensor that holds theta; the sum of |change of theta|."""
    weight = line_of(table, item, 0, tl.float32 if WEIGHT is None else WEIGHT, row * K, ALIGNED)
    low = line_of(table, item, 1, tl.bfloat16 if LOW is None else LOW, row * K, ALIGNED)
    moved = 0.0
    if THETA is not None:
        theta = line_of(table, item, 2, THETA, row * n_cols, ALIGNED)
        master = tl.load(theta + slots, mask=reach, other=0)
        known = master.to(tl.float32)
        stored = tl.where(inside, (known * decay - rate * change).to(THETA), master)
        tl.store(theta + slots, stored, mask=reach)
        moved = tl.sum(tl.abs(stored.to(tl.float32) - known), axis=0)
        if WEIGHT is not None or LOW is not None:
            write_row(weight, low, bits, first, stored, count, K, W, decay, rate, WEIGHT, LOW, THETA, CHUNKS, BLOCK_W)
    else:
        moved = write_row(
            weight, low, bits, first, change, count, K, W, decay, rate, WEIGHT, LOW, THETA, CHUNKS, BLOCK_W
        )
    return moved


@jit
def first_part(
    table, item, row, K, WEIGHT: tl.constexpr, LOW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_W: tl.constexpr
):
    """`read_row` of part 0; zeros where only theta is written."""
    weight = line_of(table, item, 0, tl.float32 if WEIGHT is None else WEIGHT, row * K, ALIGNED)
    low = line_of(table, item, 1, tl.bfloat16 if LOW is None else LOW, row * K, ALIGNED)
    if WEIGHT is None and LOW is None:
        first = tl.zeros([32 * BLOCK_W], tl.float32)
    else:
        first = read_row(weight, low, K, 0, WEIGHT, BLOCK_W)
    return first


@jit
def simple_rows_kernel(
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
    ALIGNED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """sgd, momentum and adam as in `theta_kernels.simple_kernel`; stats as there, of rows.

    WORDS: power of two, at least W. SLOTS: power of two, at least n_cols. SHARE: slots to a block of 8-bit moments.
    """
    item = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    reach = slots < n_cols
    start = row * n_cols
    first = first_part(table, item, row, K, WEIGHT, LOW, ALIGNED, BLOCK_W)
    m, v, m_scale, v_scale, blocks = moments_of(table, item, row, n_cols, MOMENT, ALIGNED, SHARE)
    grad = line_of(table, item, 7, GRAD, start, ALIGNED)
    bits = pointer(table, item, 8, tl.int32) + row * W
    g = tl.load(grad + slots, mask=reach, other=0).to(tl.float32) * scale_of(grad_scale, scale, HAS_SCALE)
    count = entries(bits, K, W, n_cols, WORDS)
    inside = slots < count
    noise = slots
    tops = slots
    roots = slots
    change = g
    second = g
    root = g
    if EIGHT:
        noise = hash_bits(start + seed + slots)
    if RULE != "sgd":
        code_m, mean = read_moment(m, m_scale, blocks, slots, reach, EIGHT, True, SHARE)
        change = mean * beta1 + g * one_minus_beta1
    if RULE == "adam":
        code_v, second = read_moment(v, v_scale, blocks, slots, reach, EIGHT, False, SHARE)
        if EIGHT:
            second = second * second
        second = second * beta2 + g * g * one_minus_beta2
        root = tl.sqrt(second)
    if EIGHT:
        tops, roots = block_maxima(change, root, inside, SLOTS // SHARE)
    if RULE != "sgd":
        write_moment(m, m_scale, blocks, tops, slots, inside, reach, code_m, change, noise, EIGHT, True, False)
    if RULE == "adam":
        write_moment(
            v,
            v_scale,
            blocks,
            roots,
            slots,
            inside,
            reach,
            code_v,
            root if EIGHT else second,
            noise,
            EIGHT,
            False,
            False,
        )
        change = change / (root * root_correction2 + eps)
    moved = step_row(
        table,
        item,
        row,
        bits,
        first,
        change,
        inside,
        reach,
        slots,
        count,
        K,
        W,
        n_cols,
        decay,
        rate,
        WEIGHT,
        LOW,
        THETA,
        ALIGNED,
        CHUNKS,
        BLOCK_W,
    )
    mine = stats + (item.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(mine, count.to(tl.float32))
    tl.store(mine + 1, moved)
