"""Device functions shared by the kernels: which coordinates a tile of a row covers, and their compact positions.

A tile is BLOCK_W mask words, shown as [BLOCK_W, 32]: a word's coordinates sit side by side in the lanes of a warp, so
that the rank of a coordinate inside its word is a population count and compact positions are neighbours across lanes.
The rank at the start of a tile is counted from the words before it (1/32 of an int per coordinate, which the L2 cache
holds), so tiles are independent of each other and long rows give enough programs.

Compact positions are not contiguous for the compiler, which then orders threads along the words and scatters every
access (measured on an H100: 0.6 to 1.0 TB/s). `max_contiguous` on the addresses says that lanes are the fast dimension
(2.4 TB/s); it claims two, and alignment of one element keeps it from making vectors of that.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._check import row_panel
from ._triton import INTERPRET, jit, power_of_two, tl

BLOCK_COLUMNS = 1024  # of a tile; also the block that 8-bit moments share a scale over
_BLOCK_W = BLOCK_COLUMNS // 32


class Grid(NamedTuple):
    """Launch geometry over the tiles of all rows."""

    tiles: int
    chunks: int
    BLOCK_W: int
    num_warps: int


@functools.lru_cache(maxsize=1024)  # worked out for every launch, and the same in every step
def row_grid(rows: int, columns: int) -> Grid:
    """Tiles for `rows` rows of `columns` entries; at least one tile per row, so that padding gets written."""
    words = (columns + 31) // 32
    block = min(power_of_two(words), _BLOCK_W)
    chunks = max((words + block - 1) // block, 1)
    return Grid(rows * chunks, chunks, block, 1)


@functools.lru_cache(maxsize=1024)
def busy_grid(rows: int, columns: int, words_per_warp: int) -> Grid:
    """`row_grid` for kernels with many operands, which want few coordinates a lane: registers bound how many run."""
    grid = row_grid(rows, columns)
    return grid._replace(num_warps=max(grid.BLOCK_W // words_per_warp, 1))


def theta_grid(
    bits: Tensor, columns: Tensor | None, K: int, shape: Sequence[int], words_per_warp: int = _BLOCK_W
) -> Grid:
    """Tiles over the candidates of a theta-like tensor of `shape`: over the matrix, or over the panel."""
    rows, entries = (bits.shape[0], K) if columns is None else shape
    return busy_grid(rows, entries, words_per_warp)


def panel_kind(shape: Sequence[int], columns: Tensor | None, rows: int) -> int:
    """What PANEL of a kernel means: 0 no panel, 1 one of columns, 2 one of rows."""
    return 0 if columns is None else 1 + row_panel(shape, columns, rows)


@jit
def _popcount_portable(word):
    x = word.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@jit
def _popcount_ptx(word):
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


# Ones in every int32 word. One instruction where there is a GPU, twelve in the interpreter.
popcount = _popcount_portable if INTERPRET else _popcount_ptx


@jit
def _quotient_portable(a, b):
    return a / b


@jit
def _quotient_ptx(a, b):
    return tl.inline_asm_elementwise(
        "div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
    )


# a / b in float32 to two units in the last place, for b up to 2**126 and flushing subnormals: two instructions.
quotient = _quotient_portable if INTERPRET else _quotient_ptx


@jit
def _ask_portable(address):
    return address


@jit
def _ask_ptx(address):
    return tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


# Ask for what is at int64 addresses: it comes to the L2 cache while the program does other things, without registers.
ask = _ask_portable if INTERPRET else _ask_ptx


@jit
def total(values):
    """The sum of a tile. Over the words first: those of a lane sit in one thread, and lanes meet only once."""
    return tl.sum(tl.sum(values, axis=0), axis=0)


@jit
def largest(values):
    """The maximum of a tile, likewise."""
    return tl.max(tl.max(values, axis=0), axis=0)


@jit
def at(pointer, position):
    """Addresses of compact or chosen positions, [n, 32], with lanes as the fast dimension (see the module).

    The hint has to sit on the address itself: it does not survive the addition to a pointer.
    """
    return tl.max_contiguous(pointer + position, (1, 2))


@jit
def active_tile(
    bits, row, chunk, W, BLOCK_W: tl.constexpr, BEFORE: tl.constexpr = 128, also=None, ALSO: tl.constexpr = False
):
    """(column, bit, active coordinates of the row before this one), each int32 [BLOCK_W, 32]; and the numbers of active
    coordinates of the row up to the end of the tile, and of the tile. With ALSO the coordinates whose bit is set in the
    words `also`, which are those of every row, count as active too."""
    index = tl.arange(0, BLOCK_W)
    lane = tl.arange(0, 32)
    first = chunk * BLOCK_W
    line = bits + row * W
    ones = tl.zeros([BEFORE], tl.int32)
    for done in range(0, first, BEFORE):
        earlier = done + tl.arange(0, BEFORE)
        word = tl.load(line + earlier, mask=earlier < first, other=0)
        if ALSO:
            word = word | tl.load(also + earlier, mask=earlier < first, other=0)
        ones += popcount(word)
    base = tl.sum(ones, axis=0)
    word = tl.load(line + first + index, mask=first + index < W, other=0)
    if ALSO:
        word = word | tl.load(also + first + index, mask=first + index < W, other=0)
    count = popcount(word)
    before = base + tl.cumsum(count, axis=0) - count
    column = (first + index)[:, None] * 32 + lane[None, :]
    bit = (word[:, None] >> lane[None, :]) & 1
    rank = before[:, None] + popcount(word[:, None] & ((1 << lane[None, :]) - 1))
    here = tl.sum(count, axis=0)
    return column, bit, rank, base + here, here


@jit
def theta_place(bits, row_start, panel, row, chunk, column, bit, rank, W, PANEL: tl.constexpr, BLOCK_W: tl.constexpr):
    """(start of a line of a compact theta, position after it, whether theta covers it) for what `active_tile` gave: an
    int64, and int32 and bool [BLOCK_W, 32]. Columns from K on may seem covered.

    PANEL: 0, every pruned coordinate is covered; 1, those in columns whose bit in the words `panel` is 0; 2, those in
    rows for which `panel` holds a line of theta, and not -1.
    """
    line = row
    if PANEL == 1:
        _, bit, rank, _, _ = active_tile(bits, row, chunk, W, BLOCK_W, 128, panel, True)
    covered = bit == 0
    if PANEL == 2:
        line = tl.load(panel + row).to(tl.int64)
        covered = bit == tl.where(line >= 0, 0, -1)
        line = tl.maximum(line, 0)
    return tl.load(row_start + line), column - rank, covered


@jit
def compact_entries(values, start, slot, keep, K, capacity):
    """Entries start + slot of a compact tensor of `capacity`, 0 where not `keep` or outside of it; [n, 32].

    start: int64 scalar. slot: int32, from 0 on. With the scalar in the address of the line, lanes compute in 32 bits.
    """
    room = tl.maximum(tl.minimum(capacity - start, K), 0)
    room = tl.where(start >= 0, room, 0).to(tl.int32)
    return tl.load(at(values + start, slot), mask=keep & (slot < room), other=0)


@jit
def spread(values, SLOTS: tl.constexpr):
    """A block's value at its slots."""
    BLOCKS: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[:, None], [BLOCKS, SLOTS // BLOCKS]), [SLOTS])


@jit
def candidate_tile(
    bits,
    row_start,
    columns,
    row,
    chunk,
    K,
    W,
    n_cols,
    capacity,
    PANEL: tl.constexpr,
    ACTIVE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """(row, column, keep, start, slot, end, count) of a tile; column, keep and slot are [BLOCK_W, 32].

    row: of the matrix, which in a panel of rows is not the tile's. keep: the coordinate is an entry (a candidate, or
    active with ACTIVE). Its flat position is start + slot, the row's first (int64) and an int32. end: entries of the
    row up to the end of the tile; count: of the tile (of a panel: with padding). A tile whose entries would fall
    outside `capacity` keeps none: a wrong row_start must not write foreign memory.
    """
    if PANEL != 0:
        index = tl.arange(0, BLOCK_W)
        lane = tl.arange(0, 32)
        slot = (chunk * BLOCK_W + index)[:, None] * 32 + lane[None, :]
        inside = slot < n_cols
        start = row * n_cols
        if PANEL == 2:
            row = tl.load(columns + row).to(tl.int64)
            column = slot
        else:
            column = tl.load(columns + slot, mask=inside, other=0)
        word = tl.load(at(bits + row * W, column >> 5), mask=inside, other=-1)
        keep = inside & (((word >> (column & 31)) & 1) == 0)
        end = n_cols
        count = n_cols
    else:
        column, bit, rank, actives, here = active_tile(bits, row, chunk, W, BLOCK_W)
        start = tl.load(row_start + row)
        if ACTIVE:
            slot = rank
            end = actives
            count = here
        else:
            slot = column - rank
            end = tl.minimum((chunk + 1) * BLOCK_W * 32, K) - actives
            count = tl.minimum(BLOCK_W * 32, K - chunk * BLOCK_W * 32) - here
        limit = tl.where(start + end <= capacity, K, 0)
        keep = (bit == (1 if ACTIVE else 0)) & (column < limit)
    return row, column, keep, start, slot, end, count
