"""2:4 sparse weights, and their transposes, in the order of Hopper's sparse tensor cores, in one pass.

A weight of the sparse phase changes on every step, and both y = x Wᵀ and dX = dY W want it compressed. cuSPARSELt's own
compression takes 1.4 ms for 4096 x 11008 in bfloat16, and a transposed copy first (H100): more than the products save.
Here one kernel reads the weight once, in any float dtype, and writes the values of both forms, two 16-bit ones of each
group of four in the order of the matrix; another makes the places from the mask's bits, four bits a group that say
which two (two bits each, the lower place low).

The order of the places is that of cuSPARSELt 0.8 on compute capability 9.0, found by compressing matrices whose
patterns spell the number of each group. Tiles of 64 rows and 64 columns (16 groups) follow one another along the rows,
512 bytes each. In a tile, with row r and group g, the 64-bit word (r & 7) + 8 (r >> 4 & 3) + 32 (g >> 3 & 1) has the
group at the four bits numbered (r >> 3 & 1) + 2 (g >> 2 & 1) + 4 (g & 1) + 8 (g >> 1 & 1). Nobody documents this, so
it is compared with the library's result before it is used (`_semi_structured.own_order`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, launch, tl, use_triton
from .bits import pack, unpack_aten

TILE = 64
"""Rows and columns of a weight must be multiples of this."""

_BLOCK = 64
_WORDS = 256


@jit
def two_of_four(a, b, c, d, has_a, has_b, has_c, has_d):
    """Two 16-bit values in 32 bits: the first of a, b, c that is kept, or else c, and the other that is, or else d."""
    first = tl.where(has_a, a, tl.where(has_b, b, c))
    at_c = has_c & (has_a | has_b)
    second = tl.where(has_d, d, tl.where(at_c, c, tl.where(has_a & has_b, b, d)))
    return (first & 0xFFFF) | (second << 16)


@jit
def four_columns(weight, row, column, K, inside, DTYPE: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """Columns 4 g, 4 g + 1, 4 g + 2 and 4 g + 3 of some rows as 16 bits in int32, [LINES, BLOCK / 4] each."""
    x = tl.load(weight + row.to(tl.int64)[:, None] * K + column[None, :], mask=inside[:, None], other=0)
    bits = x.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    even, odd = tl.split(tl.reshape(bits, (LINES, BLOCK // 4, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@jit
def kept(bits, row, group, K, inside):
    """Four bits a group: which of its columns are kept."""
    word = tl.load(bits + row.to(tl.int64)[:, None] * (K // 32) + (group // 8)[None, :], mask=inside[:, None], other=0)
    return (word >> ((group & 7) * 4)[None, :]) & 15


@jit
def values_kernel(
    weight, bits, values, back_values, rows, K, DTYPE: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr
):
    """Values of one block [BLOCK, BLOCK] of the weight in both forms (in one without BACK)."""
    LINES: tl.constexpr = BLOCK // 4
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    group = tl.program_id(0) * LINES + tl.arange(0, LINES)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = line * 4
    inside = row < rows
    a0, b0, c0, d0 = four_columns(weight, row, column, K, inside, DTYPE, LINES, BLOCK)
    a1, b1, c1, d1 = four_columns(weight, row + 1, column, K, inside, DTYPE, LINES, BLOCK)
    a2, b2, c2, d2 = four_columns(weight, row + 2, column, K, inside, DTYPE, LINES, BLOCK)
    a3, b3, c3, d3 = four_columns(weight, row + 3, column, K, inside, DTYPE, LINES, BLOCK)
    k0 = kept(bits, row, group, K, inside)
    k1 = kept(bits, row + 1, group, K, inside)
    k2 = kept(bits, row + 2, group, K, inside)
    k3 = kept(bits, row + 3, group, K, inside)
    at = values + row.to(tl.int64)[:, None] * (K // 4) + group[None, :]
    keep = inside[:, None] & (group >= 0)[None, :]
    tl.store(at, two_of_four(a0, b0, c0, d0, k0 & 1 != 0, k0 & 2 != 0, k0 & 4 != 0, k0 & 8 != 0), mask=keep)
    at += K // 4
    tl.store(at, two_of_four(a1, b1, c1, d1, k1 & 1 != 0, k1 & 2 != 0, k1 & 4 != 0, k1 & 8 != 0), mask=keep)
    at += K // 4
    tl.store(at, two_of_four(a2, b2, c2, d2, k2 & 1 != 0, k2 & 2 != 0, k2 & 4 != 0, k2 & 8 != 0), mask=keep)
    at += K // 4
    tl.store(at, two_of_four(a3, b3, c3, d3, k3 & 1 != 0, k3 & 2 != 0, k3 & 4 != 0, k3 & 8 != 0), mask=keep)
    if BACK:
        at = back_values + (group * 4).to(tl.int64)[:, None] * (rows // 4) + line[None, :]
        keep = tl.trans(keep)
        pair = two_of_four(a0, a1, a2, a3, k0 & 1 != 0, k1 & 1 != 0, k2 & 1 != 0, k3 & 1 != 0)
        tl.store(at, tl.trans(pair), mask=keep)
        at += rows // 4
        pair = two_of_four(b0, b1, b2, b3, k0 & 2 != 0, k1 & 2 != 0, k2 & 2 != 0, k3 & 2 != 0)
        tl.store(at, tl.trans(pair), mask=keep)
        at += rows // 4
        pair = two_of_four(c0, c1, c2, c3, k0 & 4 != 0, k1 & 4 != 0, k2 & 4 != 0, k3 & 4 != 0)
        tl.store(at, tl.trans(pair), mask=keep)
        at += rows // 4
        pair = two_of_four(d0, d1, d2, d3, k0 & 8 != 0, k1 & 8 != 0, k2 & 8 != 0, k3 & 8 != 0)
        tl.store(at, tl.trans(pair), mask=keep)


@jit
def spread(kept):
    """Places of the eight groups of 32 columns, from their bits, at their four bits of a 64-bit word (every other)."""
    ones = 0x11111111
    a, b, c, d = kept & ones, (kept >> 1) & ones, (kept >> 2) & ones, (kept >> 3) & ones
    at_c = c & (a | b) & ~d
    at_b = a & b & ~c & ~d
    code = ((b & ~a) | ((ones & ~(a | b)) << 1) | ((ones & ~at_c) << 2) | ((ones & ~at_b) << 3)).to(tl.int64)
    # Group g, bits 0 to 2, goes to 4 (g & 1) + 8 (g >> 1 & 1) + 2 (g >> 2 & 1).
    word = (code & 0xF) | ((code & 0xF0) << 12) | ((code & 0xF00) << 24) | ((code & 0xF000) << 36)
    upper = (code >> 16) & 0xFFFF
    upper = (upper & 0xF) | ((upper & 0xF0) << 12) | ((upper & 0xF00) << 24) | ((upper & 0xF000) << 36)
    return word | (upper << 8)


@jit
def word_place(row, group8, groups8):
    """Of a 64-bit word of places: row (that of the pair without bit 3) and eighth of the groups."""
    tile = (row // 64).to(tl.int64) * (groups8 // 2) + group8 // 2
    return tile * 64 + (row & 7) + ((row >> 4) & 3) * 8 + (group8 & 1) * 32


@jit
def column_bits(bits, column, line, W, inside):
    """The bits of a column, and of the one 8 to its right in the same word, in 32 rows."""
    found = tl.zeros_like(column)
    right = found
    for i in tl.static_range(32):
        word = tl.load(bits + (line * 32 + i).to(tl.int64) * W + column // 32, mask=inside, other=0)
        word = word >> (column & 31)
        found |= (word & 1) << i
        right |= ((word >> 8) & 1) << i
    return found, right


@jit
def places_kernel(bits, places, back_places, rows, K, BACK: tl.constexpr, WORDS: tl.constexpr):
    """Places of both forms (of one without BACK) from the mask's bits, WORDS words of 64 bits a program and form."""
    i = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    W = K // 32
    inside = i < rows // 2 * W
    # Neighbours share a word of the mask where they share a column, and lines of memory where rows follow.
    row, word = i // W, i % W
    row = row // 8 * 16 + row % 8
    at = bits + row.to(tl.int64) * W + word
    here = tl.load(at, mask=inside, other=0)
    below = tl.load(at + 8 * W, mask=inside, other=0)
    tl.store(places + word_place(row, word, W), spread(here) | (spread(below) << 4), mask=inside)
    if BACK:
        lines = rows // 32
        column, line = i % (K // 2), i // (K // 2)
        column = column // 8 * 16 + column % 8
        here, below = column_bits(bits, column, line, W, inside)
        tl.store(back_places + word_place(column, line, lines), spread(here) | (spread(below) << 4), mask=inside)


def _halves(form: Tensor) -> tuple[Tensor, Tensor]:
    """Values as int32 (two each) and places as int64 of a form."""
    flat = form.view(-1)
    count = flat.numel() // 9 * 8
    return flat[:count].view(torch.int32), flat[count:].view(torch.int64)


def compress(weight: Tensor, bits: Tensor, dtype: torch.dtype, back: bool) -> tuple[Tensor, Tensor | None]:
    """[rows, 9 K / 16] of a weight [rows, K] (contiguous; multiples of TILE) in a 16-bit dtype and, with `back`,
    [K, 9 rows / 16] of its transpose. `bits` keep at most two of every four, of rows and of columns."""
    rows, K = weight.shape
    if not use_triton(weight):
        across = weight.t().contiguous(), pack(unpack_aten(bits, K).t().contiguous())
        return compress_reference(weight, bits, dtype), compress_reference(*across, dtype) if back else None
    ahead = weight.new_empty((rows, K // 16 * 9), dtype=dtype)
    transposed = weight.new_empty((K, rows // 16 * 9), dtype=dtype) if back else None
    values, places = _halves(ahead)
    back_values, back_places = _halves(ahead if transposed is None else transposed)
    name = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    grid = (K // _BLOCK, rows // _BLOCK)
    launch(values_kernel, grid, weight, weight, bits, values, back_values, rows, K, name, back, _BLOCK, num_warps=4)
    programs = -(-(rows * K // 64) // _WORDS)
    launch(places_kernel, programs, weight, bits, places, back_places, rows, K, back, _WORDS, num_warps=4)
    return ahead, transposed


def compress_reference(weight: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The form of a weight [rows, K] with a 2:4 mask, by definition (see the module)."""
    rows, K = weight.shape
    groups = weight.to(dtype).view(rows, K // 4, 4)
    has = unpack_aten(bits, K).view(rows, K // 4, 4)
    low = torch.where(has[..., 0], 0, torch.where(has[..., 1], 1, 2))
    last = torch.where(has[..., 3], 3, torch.where(has[..., 2], 2, torch.where(has[..., 1], 1, 0)))
    high = torch.where(last > low, last, 3)
    values = groups.gather(-1, torch.stack((low, high), -1))
    r, g = torch.arange(rows)[:, None], torch.arange(K // 4)[None, :]
    word = (r // 64 * (K // 64) + g // 16) * 64 + (r & 7) + 8 * (r >> 4 & 3) + 32 * (g >> 3 & 1)
    four = (r >> 3 & 1) + 2 * (g >> 2 & 1) + 4 * (g & 1) + 8 * (g >> 1 & 1)
    codes = torch.zeros(rows * K // 4, dtype=torch.uint8)
    codes[(word * 16 + four).view(-1)] = (low | high << 2).to(torch.uint8).view(-1).cpu()
    places = (codes[::2] | codes[1::2] << 4).view(dtype).to(weight.device)
    return torch.cat((values.reshape(-1), places)).view(rows, K // 16 * 9)
