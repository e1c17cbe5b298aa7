"""Triton kernels of the update of theta where every row has a line of its own: moments compact, theta in its columns.

A program has a row. What is theta-like (dtheta, moments, flags, a separate theta) is read, updated and written as the
one run of memory that it is, without a look at the mask; the change then goes through shared memory to the columns that
the mask gives it (`tl.gather`), and the weight's row is read and written whole. Against `theta_kernels`, which does all
of it in the columns' space, arithmetic at 50 % is halved and accesses are vectors where addresses allow: Adam takes 1.4
instructions a column instead of 3.0, with 8-bit moments 2.4 instead of 5.2 (counted in code for Hopper).

With 8-bit moments the row is asked for at the start and read last, when its values are there: codes take the registers
meanwhile (a prototype on an H100, 4096x4096 at 50 %, Adam: 78 µs; 99 with the row held throughout and exact divisions.
Of float32 moments no form was faster than 111 µs).

Writing back what was read costs no bytes: a sector that holds one candidate is read and written anyway, and padding
shares sectors with entries. Nothing else may write a weight or a moment meanwhile.
"""

from ._tiles import ask, popcount, quotient
from ._triton import jit, jit_for_any, tl
from .row_moments import decoded_moment, moments_of, new_scales, noise_of, stored_moment, write_moment
from .theta_kernels import as_theta, line_of, pointer, scale_of, statistics_of


@jit
def opened(line, index, K, W):
    """Words of a row of the mask, inverted: ones are candidates."""
    word = ~tl.load(line + index, mask=index < W, other=-1)
    valid = K - index * 32
    return word & tl.where(valid < 32, (1 << tl.maximum(tl.minimum(valid, 31), 0)) - 1, -1)


@jit
def entries(bits, K, W, n_cols, WORDS: tl.constexpr):
    """(words of a row as `opened`, how many candidates): 0 if they exceed the line, for a wrong mask must not write
    foreign memory."""
    words = opened(bits, tl.arange(0, WORDS), K, W)
    count = tl.sum(popcount(words), axis=0)
    return words, tl.where(count <= n_cols, count, 0)


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
    words,
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
    LATE: tl.constexpr,
):
    """Bring [SLOTS] values to the row's candidates, and the weight's row to its copy; returns the sum of |change|.

    value: theta as stored if there is a THETA, else what steps it: theta <- decay * theta - rate * value. first: part 0
    of the row (`read_row`), and every other part is read one part ahead; or, if LATE, anything: a part is read when its
    values are there. words: of the row (`entries`), taken if LATE; else they are read again, for want of registers.
    """
    BLOCK: tl.constexpr = 32 * BLOCK_W
    lane = tl.arange(0, 32)
    moved = tl.zeros([BLOCK], tl.float32)
    seen = 0
    next_part = first
    for chunk in range(CHUNKS):
        old = next_part
        if CHUNKS > 1 and not LATE:
            next_part = read_row(weight, low, K, chunk + 1, WEIGHT, BLOCK_W)
        if CHUNKS == 1 and LATE:
            word = words
        else:
            word = opened(bits, chunk * BLOCK_W + tl.arange(0, BLOCK_W), K, W)
        here = popcount(word)
        before = seen + tl.cumsum(here, axis=0) - here
        if CHUNKS > 1:
            seen += tl.sum(here, axis=0)
        rank = before[:, None] + popcount(word[:, None] & ((1 << lane[None, :]) - 1))
        keep = tl.reshape((((word[:, None] >> lane[None, :]) & 1) != 0) & (count > 0), [BLOCK])
        found = tl.gather(value, tl.reshape(rank, [BLOCK]) & (value.shape[0] - 1), 0)
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        if LATE:
            old = read_row(weight, low, K, chunk, WEIGHT, BLOCK_W)
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
    return tl.sum(moved, axis=0)


@jit
def step_row(
    table,
    item,
    row,
    start,
    seed,
    weight,
    low,
    bits,
    words,
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
    LATE: tl.constexpr = False,
):
    """theta <- decay * theta - rate * change in every tensor that holds theta; the sum of |change of theta|."""
    moved = 0.0
    if THETA is not None:
        theta = line_of(table, item, 2, THETA, row * n_cols, ALIGNED)
        master = tl.load(theta + slots, mask=reach, other=0)
        known = master.to(tl.float32)
        fresh = as_theta(known * decay - rate * change, table, item, start + slots, seed, THETA)
        stored = tl.where(inside, fresh, master)
        tl.store(theta + slots, stored, mask=reach)
        moved = tl.sum(tl.abs(stored.to(tl.float32) - known), axis=0)
        if WEIGHT is not None or LOW is not None:
            write_row(
                weight,
                low,
                bits,
                words,
                first,
                stored,
                count,
                K,
                W,
                decay,
                rate,
                WEIGHT,
                LOW,
                THETA,
                CHUNKS,
                BLOCK_W,
                LATE,
            )
    else:
        moved = write_row(
            weight, low, bits, words, first, change, count, K, W, decay, rate, WEIGHT, LOW, THETA, CHUNKS, BLOCK_W, LATE
        )
    return moved


@jit
def row_of(table, item, row, K, WEIGHT: tl.constexpr, LOW: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses of a row of the weight and of its copy."""
    weight = line_of(table, item, 0, tl.float32 if WEIGHT is None else WEIGHT, row * K, ALIGNED)
    low = line_of(table, item, 1, tl.bfloat16 if LOW is None else LOW, row * K, ALIGNED)
    return weight, low


@jit
def first_part(weight, low, K, WEIGHT: tl.constexpr, LOW: tl.constexpr, BLOCK_W: tl.constexpr):
    """`read_row` of part 0; zeros where only theta is written."""
    if WEIGHT is None and LOW is None:
        first = tl.zeros([32 * BLOCK_W], tl.float32)
    else:
        first = read_row(weight, low, K, 0, WEIGHT, BLOCK_W)
    return first


@jit
def ask_row(weight, low, K, WEIGHT: tl.constexpr, LOW: tl.constexpr, WORDS: tl.constexpr):
    """Ask for the row that `write_row` reads LATE."""
    column = tl.maximum(tl.minimum(tl.arange(0, WORDS) * 32, K - 1), 0)
    if WEIGHT is not None:
        ask((weight + column).to(tl.int64))
    elif LOW is not None:
        ask((low + column).to(tl.int64))


@jit_for_any("seed")
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
    weight, low = row_of(table, item, row, K, WEIGHT, LOW, ALIGNED)
    first = slots
    if EIGHT:  # codes take the registers that the row would hold meanwhile
        ask_row(weight, low, K, WEIGHT, LOW, WORDS)
    else:
        first = first_part(weight, low, K, WEIGHT, LOW, BLOCK_W)
    m, v, m_scale, v_scale, blocks = moments_of(table, item, row, n_cols, MOMENT, ALIGNED, SHARE)
    grad = line_of(table, item, 7, GRAD, start, ALIGNED)
    bits = pointer(table, item, 8, tl.int32) + row * W
    g = tl.load(grad + slots, mask=reach, other=0).to(tl.float32) * scale_of(grad_scale, scale, HAS_SCALE)
    # All is asked for before a program's threads wait for each other to count, and decoded after it.
    code_m, code_v, top_m, top_v = slots, slots, slots, slots
    if RULE != "sgd":
        code_m, top_m = stored_moment(m, m_scale, blocks, slots, reach, EIGHT, SHARE)
    if RULE == "adam":
        code_v, top_v = stored_moment(v, v_scale, blocks, slots, reach, EIGHT, SHARE)
    words, count = entries(bits, K, W, n_cols, WORDS)
    inside = slots < count
    noise = slots
    tops = slots
    roots = slots
    change = g
    second = g
    root = g
    if EIGHT:
        noise = noise_of(start, seed, slots)
    if RULE != "sgd":
        change = decoded_moment(code_m, top_m, EIGHT, True) * beta1 + g * one_minus_beta1
    if RULE == "adam":
        second = decoded_moment(code_v, top_v, EIGHT, False)
        if EIGHT:
            second = second * second
        second = second * beta2 + g * g * one_minus_beta2
        root = tl.sqrt(second)
    if EIGHT:
        both: tl.constexpr = RULE == "adam"
        tops, roots = new_scales(m_scale, v_scale, blocks, change, root, inside, SLOTS // SHARE, both)
    if RULE != "sgd":
        write_moment(m, tops, slots, inside, reach, code_m, change, noise, EIGHT, True, False)
    if RULE == "adam":
        write_moment(
            v,
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
        divisor = root * root_correction2 + eps
        if EIGHT:
            change = rate * quotient(change, divisor)
            rate = 1.0
        else:
            change = change / divisor
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
        EIGHT,
    )
    mine = statistics_of(stats, item)
    tl.store(mine, count.to(tl.float32))
    tl.store(mine + 1, 0.0)
    tl.store(mine + 2, count.to(tl.float32))
    tl.store(mine + 3, moved)
