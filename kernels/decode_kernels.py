"""Triton kernels of `decode_linear`: by ranks for any mask, in pairs for 2:4 masks.

Every program decodes rows a word (32 coordinates) at a time: a coordinate's rank in it is a population count, so the
values of a word are neighbours in memory, and the ranks of a row run on from word to word. A program looks at several
places of its rows at once, to have enough loads under way.

A 2:4 mask needs no ranks: a group of four holds two values, which are one 32-bit load, and the four mask bits put its
halves in place (`pairs`); theta's two go to the other places. The bits take the space of the format's usual indices.
"""

from ._tiles import popcount
from ._triton import jit, tl


@jit
def _dot(left, right, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@jit
def decode_kernel(
    x,
    active,
    theta,
    bits,
    active_start,
    row_start,
    out,
    T,
    rows,
    K,
    W,
    a_capacity,
    t_capacity,
    share,
    HAS_THETA: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One block of rows and one split of the words; without DOT also one token. A split is WORDS runs of `share`
    words, and one word of each run is decoded at a time, so that every run carries its own rank."""
    split = tl.program_id(1)
    first_token = tl.program_id(2)
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    run = (split * WORDS + tl.arange(0, WORDS)) * share
    lane = tl.arange(0, 32)
    inside = row < rows
    line = bits + row[:, None] * W + run[None, :]
    before = tl.zeros([BLOCK_R], tl.int32)
    for done in range(0, split * WORDS * share, 32):
        earlier = done + lane
        word = tl.load(
            bits + row[:, None] * W + earlier[None, :],
            mask=inside[:, None] & (earlier < tl.minimum(split * WORDS * share, W))[None, :],
            other=0,
        )
        before += tl.sum(popcount(word), axis=1)
    own = tl.zeros([BLOCK_R, WORDS], tl.int32)
    for i in range(0, share):
        own += popcount(tl.load(line + i, mask=inside[:, None] & (run + i < W)[None, :], other=0))
    ones = before[:, None] + tl.cumsum(own, axis=1) - own
    # Once a row instead of once a value: a wrong start must not read foreign memory.
    a_first = tl.load(active_start + row, mask=inside, other=0)
    last = before + tl.sum(own, axis=1)
    inside = inside & (a_first >= 0) & (a_first + last <= a_capacity)
    values = active + a_first
    fresh = theta + a_first
    if HAS_THETA:
        t_first = tl.load(row_start + row, mask=inside, other=0)
        columns = tl.minimum((split + 1) * WORDS * share * 32, K)
        inside = inside & (t_first >= 0) & (t_first + (columns - last) <= t_capacity)
        fresh = theta + t_first
    below = (1 << lane) - 1
    token = tl.arange(0, BLOCK_T)
    flat = tl.arange(0, WORDS * 32)
    flat_run = (split * WORDS + flat // 32) * share
    if DOT:
        total = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    else:
        total = tl.zeros([BLOCK_R, WORDS, 32], tl.float32)
    for i in range(0, share):
        word = tl.load(line + i, mask=inside[:, None] & (run + i < W)[None, :], other=0)
        here = (1 << lane)[None, None, :]
        kept = (word[:, :, None] & here) != 0
        rank = ones[:, :, None] + popcount(word[:, :, None] & below[None, None, :])
        # Lanes are the fast dimension (see `_tiles`).
        value = tl.load(tl.max_contiguous(values[:, None, None] + rank, (1, 1, 2)), mask=kept, other=0)
        value = value.to(x.dtype.element_ty)
        column = (run[:, None] + i) * 32 + lane[None, :]
        if HAS_THETA:
            left = tl.minimum(tl.maximum(K - (run + i) * 32, 0), 32)  # columns of the word that the row has
            valid = tl.where(left == 32, -1, (1 << left) - 1)
            pruned = tl.where(inside[:, None], (word ^ -1) & valid[None, :], 0)
            place = fresh[:, None, None] + (column[None, :, :] - rank)
            other = tl.load(tl.max_contiguous(place, (1, 1, 2)), mask=(pruned[:, :, None] & here) != 0, other=0)
            value = tl.where(kept, value, other.to(x.dtype.element_ty))
        if DOT:
            wide = tl.reshape(value, [BLOCK_R, WORDS * 32])
            at = (flat_run + i) * 32 + flat % 32
            right = tl.load(
                x + token[None, :] * K + at[:, None], mask=(at < K)[:, None] & (token < T)[None, :], other=0
            )
            total = _dot(wide, right, total, PRECISION, WIDEN)
        else:
            right = tl.load(x + first_token * K + column, mask=column < K, other=0).to(tl.float32)
            total += value.to(tl.float32) * right[None, :, :]
        ones += popcount(word)
    if DOT:
        tl.store(
            out + (split * T + token[None, :]) * rows + row[:, None],
            total.to(out.dtype.element_ty),
            mask=inside[:, None] & (token < T)[None, :],
        )
    else:
        whole = tl.sum(tl.sum(total, axis=2), axis=1)
        tl.store(out + (split * T + first_token) * rows + row, whole.to(out.dtype.element_ty), mask=inside)


@jit
def _half(pair, HIGH: tl.constexpr, BFLOAT: tl.constexpr):
    """One 16-bit value of a 32-bit word, in float32."""
    if BFLOAT:
        if HIGH:
            word = pair & -65536
        else:
            word = pair << 16
        return word.to(tl.float32, bitcast=True)
    if HIGH:
        word = pair >> 16
    else:
        word = pair
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _placed(pair, first, second, nibble, J: tl.constexpr, BFLOAT: tl.constexpr):
    """The value at place J of a group of four: one of the pair where the mask keeps it, else one of theta's two."""
    kept = ((nibble >> J) & 1) != 0
    active = tl.where((nibble & ((1 << J) - 1)) != 0, _half(pair, True, BFLOAT), _half(pair, False, BFLOAT))
    candidate = tl.where(((nibble ^ 15) & ((1 << J) - 1)) != 0, second, first)
    return tl.where(kept, active, candidate)


@jit
def pairs_kernel(
    x,
    pairs,
    theta,
    bits,
    row_start,
    out,
    T,
    rows,
    K,
    W,
    t_capacity,
    share,
    HAS_THETA: tl.constexpr,
    BFLOAT: tl.constexpr,
    DOT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """2:4: WORDS neighbouring words (8 groups each) of a block of rows at a time, `share` of these in a split."""
    split = tl.program_id(1)
    first_token = tl.program_id(2)
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    index = tl.arange(0, WORDS)
    eight = tl.arange(0, 8)
    two = tl.arange(0, 2)
    inside = row < rows
    token = tl.arange(0, BLOCK_T)
    flat = tl.arange(0, WORDS * 32)
    groups = K // 4
    t_first = row * 0
    if HAS_THETA:
        t_first = tl.load(row_start + row, mask=inside, other=0)
    if DOT:
        total = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    else:
        total = tl.zeros([BLOCK_R, WORDS, 8], tl.float32)
    for step in range(split * share, (split + 1) * share):
        at = step * WORDS + index
        word = tl.load(bits + row[:, None] * W + at[None, :], mask=inside[:, None] & (at < W)[None, :], other=0)
        group = at[:, None] * 8 + eight[None, :]
        fits = group < groups
        here = inside[:, None, None] & fits[None, :, :]
        pair = tl.load(pairs + row[:, None, None] * groups + group[None, :, :], mask=here, other=0)
        nibble = (word[:, :, None] >> (eight * 4)[None, None, :]) & 15
        first = tl.zeros([BLOCK_R, WORDS, 8], tl.float32)
        second = first
        if HAS_THETA:
            slot = t_first[:, None, None] + group[None, :, :] * 2
            both = slot[:, :, :, None] + two[None, None, None, :]
            value = tl.load(theta + both, mask=here[:, :, :, None] & (both < t_capacity), other=0).to(tl.float32)
            first, second = tl.split(value)
        v0 = _placed(pair, first, second, nibble, 0, BFLOAT)
        v1 = _placed(pair, first, second, nibble, 1, BFLOAT)
        v2 = _placed(pair, first, second, nibble, 2, BFLOAT)
        v3 = _placed(pair, first, second, nibble, 3, BFLOAT)
        if DOT:
            low = x.dtype.element_ty
            even = tl.join(v0.to(low), v2.to(low))
            odd = tl.join(v1.to(low), v3.to(low))
            wide = tl.reshape(tl.join(even, odd), [BLOCK_R, WORDS * 32])
            column = step * (WORDS * 32) + flat
            right = tl.load(
                x + token[None, :] * K + column[:, None], mask=(column < K)[:, None] & (token < T)[None, :], other=0
            )
            total = _dot(wide, right, total, "ieee", WIDEN)
        else:
            four = group[:, :, None, None] * 4 + two[None, None, :, None] * 2 + two[None, None, None, :]
            right = tl.load(x + first_token * K + four, mask=fits[:, :, None, None], other=0).to(tl.float32)
            even, odd = tl.split(right)
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            total += v0 * x0[None, :, :] + v1 * x1[None, :, :] + v2 * x2[None, :, :] + v3 * x3[None, :, :]
    if DOT:
        tl.store(
            out + (split * T + token[None, :]) * rows + row[:, None],
            total.to(out.dtype.element_ty),
            mask=inside[:, None] & (token < T)[None, :],
        )
    else:
        whole = tl.sum(tl.sum(total, axis=2), axis=1)
        tl.store(out + (split * T + first_token) * rows + row, whole.to(out.dtype.element_ty), mask=inside)
