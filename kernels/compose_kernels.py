"""Triton kernels that build a dense matrix from packed active values and theta, and what `quantized` shares with them.

Where every row has a line of its own in both compact tensors, a program has a row: both lines are read as the runs of
memory that they are, joined, and brought to their columns by one `tl.gather` through shared memory. Everything else
(one line for all rows, panels, rows too long for one program) goes in tiles, whose lanes look positions up. Measured on
an H100, 4096x4096, bfloat16 from bfloat16 and float32: 31.5 µs by rows at 50 %. Of their prototypes: 34.3 in tiles; at
70 %, where lines start anywhere, 34.2 by rows and 37.7 in tiles (38.2 by rows that begin elsewhere than at 16 bytes).
"""

from typing import Any

from torch import Tensor

from ._tiles import active_tile, compact_entries, popcount, theta_place
from ._triton import jit, power_of_two, tl

_MOST = 16384  # slots, or columns, of a program that has a row: they live in registers
_PER_WARP = 256


def group_of(line: Tensor) -> int:
    """How many entries of a line are read at once: 1 where the compiler sees that lines start at multiples of 16 bytes,
    else what 16 bytes hold, from the last such multiple on."""
    return 1 if line.shape[1] % 16 == 0 else 16 // line.element_size()


def row_form(W: int, *lines: int) -> dict[str, Any] | None:
    """Options of a kernel whose programs have a row of W words and lines of so many slots; None if that is too much."""
    slots = max(power_of_two(max(lines)), 64)
    block_w = power_of_two(W)
    most = max(len(lines) * slots, 32 * block_w)
    if most > _MOST:
        return None
    return {"SLOTS": slots, "BLOCK_W": block_w, "num_warps": min(max(most // _PER_WARP, 1), 16)}


@jit
def line_run(values, row, n, capacity, SLOTS: tl.constexpr, GROUP: tl.constexpr):
    """(entries of line `row` of n entries, how many others come before them), in GROUPs, [SLOTS]; zeros behind them.

    Whole groups may begin with the line before and end with the line after, but not outside of the `capacity` entries
    of the tensor: a last group that does is read entry by entry.
    """
    slots = tl.arange(0, SLOTS)
    start = row * n
    shift = 0
    if GROUP == 1:
        found = tl.load(values + start + slots, mask=slots < n, other=0)
    else:
        base = start // GROUP * GROUP
        shift = (start - base).to(tl.int32)
        end = shift + n
        whole = tl.minimum(end + (GROUP - 1), capacity - base).to(tl.int32) // GROUP * GROUP
        address = values + base + slots
        found = tl.load(address, mask=slots < whole, other=0)
        if whole < end:
            found = tl.load(address, mask=(slots >= whole) & (slots < end), other=found)
    return found, shift


@jit
def place_row(out, bits, row, K, W, active, a_shift, theta, t_shift, HAS_THETA: tl.constexpr, BLOCK_W: tl.constexpr):
    """Store a row: its active columns from `active` [SLOTS], the others from `theta` or as zeros.

    Slots wrap around: a wrong mask brings values that are in these runs to wrong columns, and nothing else.
    """
    SLOTS: tl.constexpr = active.shape[0]
    BLOCK: tl.constexpr = 32 * BLOCK_W
    lane = tl.arange(0, 32)
    index = tl.arange(0, BLOCK_W)
    word = tl.load(bits + row * W + index, mask=index < W, other=0)
    count = popcount(word)
    before = tl.cumsum(count, axis=0) - count
    bit = ((word[:, None] >> lane[None, :]) & 1) != 0
    rank = before[:, None] + popcount(word[:, None] & ((1 << lane[None, :]) - 1))
    if HAS_THETA:
        slot = index[:, None] * 32 + lane[None, :] - rank
        place = tl.where(bit, 2 * (rank + a_shift), 2 * (slot + t_shift) + 1) & (2 * SLOTS - 1)
        both = tl.reshape(tl.join(active, theta), [2 * SLOTS])
        value = tl.gather(both, tl.reshape(place, [BLOCK]), 0)
    else:
        value = tl.gather(active, tl.reshape((rank + a_shift) & (SLOTS - 1), [BLOCK]), 0)
        value = tl.where(tl.reshape(bit, [BLOCK]), value, 0.0).to(active.dtype)
    column = tl.arange(0, BLOCK)
    tl.store(out + row * K + column, value, mask=column < K)


@jit
def compose_rows_kernel(
    active,
    theta,
    out,
    bits,
    K,
    W,
    a_line,
    t_line,
    a_capacity,
    t_capacity,
    HAS_THETA: tl.constexpr,
    A_GROUP: tl.constexpr,
    T_GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a, a_shift = line_run(active, row, a_line, a_capacity, SLOTS, A_GROUP)
    a = a.to(out.dtype.element_ty)
    t, t_shift = a, a_shift
    if HAS_THETA:
        t, t_shift = line_run(theta, row, t_line, t_capacity, SLOTS, T_GROUP)
        t = t.to(out.dtype.element_ty)
    place_row(out, bits, row, K, W, a, a_shift, t, t_shift, HAS_THETA, BLOCK_W)


@jit
def compose_tiles_kernel(
    active,
    theta,
    out,
    bits,
    active_start,
    row_start,
    panel,
    K,
    W,
    a_capacity,
    t_capacity,
    HAS_THETA: tl.constexpr,
    PANEL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    column, bit, rank, _, _ = active_tile(bits, row, chunk, W, BLOCK_W)
    value = compact_entries(active, tl.load(active_start + row), rank, bit != 0, K, a_capacity)
    value = value.to(out.dtype.element_ty)
    if HAS_THETA:
        start, slot, covered = theta_place(bits, row_start, panel, row, chunk, column, bit, rank, W, PANEL, BLOCK_W)
        fresh = compact_entries(theta, start, slot, covered, K, t_capacity).to(out.dtype.element_ty)
        value = tl.where(covered, fresh, value)
    tl.store(out + row * K + column, value, mask=column < K)
