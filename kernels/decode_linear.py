"""y = x Wᵀ of few tokens with W = M∘W + Φ(θ) decoded from packed storage in registers: no dense weight in memory.

With few tokens a product is as fast as its weight can be read. Packed at 50 % sparsity in 16 bits, without theta, that
is 9/16 of the dense bytes. Every program decodes rows a word (32 coordinates) at a time: a coordinate's rank in it is a
population count, so the values of a word are neighbours in memory, and the ranks of a row run on from word to word. A
program looks at several places of its rows at once, to have enough loads under way.

A 2:4 mask needs no ranks: a group of four holds two values, which are one 32-bit load, and the four mask bits put its
halves in place (`pairs`); theta's two go to the other places. The bits take the space of the format's usual indices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._check import check_bits, check_device, check_matrix, check_theta
from ._registry import operation
from ._tiles import popcount
from ._triton import INTERPRET, jit, launch, power_of_two, processors, tl, use_triton
from .compose import compose_reference

MOST_TOKENS = 32
_PROGRAMS_PER_PROCESSOR = 16


class Form(NamedTuple):
    """A way to run it: rows and words that a program looks at together, its warps, whether by matrix units, and whether
    in pairs (2:4 only)."""

    rows: int
    words: int
    warps: int
    dot: bool
    pairs: bool = False


FORMS = {
    "decode_16x4": Form(16, 4, 1, True),
    "decode_32x2": Form(32, 2, 1, True),
    "decode_64x4": Form(64, 4, 4, True),
    "decode_vector": Form(16, 2, 1, False),
    "decode_pairs_16": Form(16, 4, 1, True, True),
    "decode_pairs_64": Form(64, 4, 4, True, True),
    "decode_pairs_vector": Form(8, 4, 1, False, True),
}

# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _dot(left, right, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@jit
def _decode_kernel(
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
def _pairs_kernel(
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


def _splits(x: Tensor, row_blocks: int, steps: int, form: Form, tokens: int) -> tuple[int, int]:
    """(splits, steps of each): enough programs to fill the device, at least four steps in one where there are."""
    programs = row_blocks * (1 if form.dot else tokens) * form.warps
    wanted = -(-processors(x) * _PROGRAMS_PER_PROCESSOR // max(programs, 1))
    share = max(-(-steps // max(wanted, 1)), min(4, steps), 1)
    return -(-steps // share), share


def _decode_triton(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    form: Form,
) -> Tensor:
    tokens, K = x.shape
    rows, W = bits.shape
    row_blocks = -(-rows // form.rows)
    splits, share = _splits(x, row_blocks, -(-W // form.words), form, tokens)
    out = x.new_empty((splits, tokens, rows), dtype=x.dtype if splits == 1 else torch.float32)
    programs = (row_blocks, splits, 1 if form.dot else tokens)
    block_t = max(power_of_two(tokens), 16)
    common: dict[str, Any] = dict(
        DOT=form.dot,
        WIDEN=INTERPRET,
        BLOCK_R=form.rows,
        WORDS=form.words,
        BLOCK_T=block_t,
        num_warps=form.warps,
        num_stages=2,
    )
    has_theta = theta is not None
    if theta is None or row_start is None:
        theta, row_start = active, active_start  # stand-ins that the kernels do not touch
    if form.pairs:
        launch(
            _pairs_kernel,
            programs,
            x,
            x,
            active.view(torch.int32),
            theta,
            bits,
            row_start,
            out,
            tokens,
            rows,
            K,
            W,
            theta.numel(),
            share,
            HAS_THETA=has_theta,
            BFLOAT=active.dtype == torch.bfloat16,
            **common,
        )
    else:
        precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3"
        launch(
            _decode_kernel,
            programs,
            x,
            x,
            active,
            theta,
            bits,
            active_start,
            row_start,
            out,
            tokens,
            rows,
            K,
            W,
            active.numel(),
            theta.numel(),
            share,
            HAS_THETA=has_theta,
            PRECISION=precision,
            **common,
        )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


# --- operation -------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    how: str,
) -> Form:
    if how not in FORMS:
        raise ValueError(f"how={how!r} is unknown; use one of {', '.join(FORMS)}")
    form, rows = FORMS[how], bits.shape[0]
    check_matrix("x", x)
    check_device("x", x, active)
    check_theta("active", active, rows, active_start, None, active)
    check_bits("bits", bits, rows, x.shape[1], active)
    if theta is not None:
        check_theta("theta", theta, rows, row_start, None, active)
    if form.pairs:
        if active.element_size() != 2 or active.numel() * 2 != rows * x.shape[1] or x.shape[1] % 4:
            raise ValueError(
                f"active must hold two 16-bit values of every 4 inputs with how={how!r}, not "
                f"{tuple(active.shape)} {active.dtype} for [{rows}, {x.shape[1]}]"
            )
        if x.dtype != active.dtype:
            raise ValueError(f"x must be {active.dtype} like active with how={how!r}, not {x.dtype}")
    return form


def _fake(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    how: str,
) -> Tensor:
    _check(x, active, theta, bits, active_start, row_start, how)
    return x.new_empty((x.shape[0], bits.shape[0]))


def _flops(x: Any, active: Any, theta: Any, bits: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * bits[0]


@operation("decode_linear", fake=_fake, flops=_flops)
def _op(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    how: str,
) -> Tensor:
    form = _check(x, active, theta, bits, active_start, row_start, how)
    if x.shape[0] == 0 or x.shape[1] == 0:
        return x.new_zeros((x.shape[0], bits.shape[0]))
    if use_triton(x):
        if torch.float64 in (x.dtype, active.dtype):
            raise ValueError("decode_linear takes float64 on the CPU only; the kernel sums in float32")
        return _decode_triton(x, active, theta, bits, active_start, row_start, form)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dense = compose_reference(active, theta, bits, active_start, row_start, x.shape[1], x.dtype)
    return (x.to(wide) @ dense.to(wide).t()).to(x.dtype)


def decode_linear(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    how: str = "decode_16x4",
) -> Tensor:
    """x Wᵀ as [tokens, rows] with W = compose(active, theta, ...) in x's dtype; sums are float32.

    x: [tokens, K], contiguous; meant for at most 32 tokens. how: one of `FORMS`; those in pairs need a mask that keeps
    two of every four inputs and packed 16-bit values of x's dtype. No gradient of its own. Raises ValueError
    for arguments that do not fit each other.
    """
    return torch.ops.fxresu.decode_linear(x, active, theta, bits, active_start, row_start, how)
