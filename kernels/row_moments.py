"""Moments of a row of theta, as device functions: read, decoded, brought to their new scales, written.

For the kernels of `theta_rows` and `selective_rows`, whose programs have a row: [SLOTS] values at a time.
"""

from ._tiles import spread
from ._triton import jit, tl
from .blockwise8 import decode_m, decode_v, encode_m, encode_v, hash_bits
from .theta_kernels import line_of, pointer


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
def noise_of(start, seed, slots):
    """Bits for stochastic rounding, a function of position (int64 start + int32 slots) and step."""
    return hash_bits(start.to(tl.uint32) + seed + slots)


@jit
def stored_moment(moment, scales, blocks, slots, reach, EIGHT: tl.constexpr, SHARE: tl.constexpr):
    """m or v as it is stored, and of 8 bits the scales of its blocks."""
    code = tl.load(moment + slots, mask=reach, other=0)
    scale = slots
    if EIGHT:
        which = tl.arange(0, slots.shape[0] // SHARE)
        scale = tl.load(scales + which, mask=which < blocks, other=0)
    return code, scale


@jit
def decoded_moment(code, scale, EIGHT: tl.constexpr, SIGNED: tl.constexpr):
    """What `stored_moment` gave for m (SIGNED) or v in float32; of 8-bit v what is stored, which may be its root."""
    value = code.to(tl.float32)
    if EIGHT:
        scale = spread(scale, code.shape[0])
        value = decode_m(code, scale) if SIGNED else decode_v(code, scale)
    return value


@jit
def read_moment(moment, scales, blocks, slots, reach, EIGHT: tl.constexpr, SIGNED: tl.constexpr, SHARE: tl.constexpr):
    """(m (SIGNED) or v as it is stored, and `decoded_moment`)."""
    code, scale = stored_moment(moment, scales, blocks, slots, reach, EIGHT, SHARE)
    return code, decoded_moment(code, scale, EIGHT, SIGNED)


@jit
def _larger(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@jit
def new_scales(m_scale, v_scale, blocks, a, b, inside, BLOCKS: tl.constexpr, BOTH: tl.constexpr):
    """Largest |a| and largest |b| of every block, [BLOCKS], stored as the scales of m and, with BOTH, of v."""
    a, b = tl.where(inside, tl.abs(a), 0.0), tl.where(inside, tl.abs(b), 0.0)
    a = tl.reshape(a, [BLOCKS, a.shape[0] // BLOCKS])
    b = tl.reshape(b, [BLOCKS, b.shape[0] // BLOCKS])
    a, b = tl.reduce((a, b), 1, _larger)
    which = tl.arange(0, BLOCKS)
    tl.store(m_scale + which, a, mask=which < blocks)
    if BOTH:
        tl.store(v_scale + which, b, mask=which < blocks)
    return a, b


@jit
def write_moment(
    moment,
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
    """Store a moment in place of `before`; with READ returns it as stored, in float32. tops: scales of its blocks."""
    stored = value
    if EIGHT:
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
