"""What an update reads of a factored second moment: the root of row * col / mean at the entries of a tile."""

from ._triton import jit, tl
from .adamw_rule import BLOCK, AdamWOperands


@jit
def root_of_tile(
    col,
    row,
    average,
    place,
    columns,
    left,
    inside,
    FACTORED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Root of row * col / mean at a tile that begins with entry `place` of the line that `row` points to, and that has
    `left` entries up to the end. A block that is no longer than a line lies in two of them at most."""
    start = place + tl.arange(0, LANES) * BLOCK
    lane = tl.arange(0, BLOCK)[None, :]
    if FACTORED == 1:
        line = (start[:, None] + lane) // columns
        column = start[:, None] + lane - line * columns
        scale = tl.load(row + line, mask=inside, other=0)
        share = tl.sqrt(tl.where(average > 0, scale / average, 0.0))
    else:
        line = start // columns
        column = (start - line * columns)[:, None] + lane
        ahead = (line + 1) * columns - place < left
        scale = tl.load(row + line, mask=start - place < left, other=0)
        next_scale = tl.load(row + line + 1, mask=ahead, other=0)
        share = tl.sqrt(tl.where(average > 0, scale / average, 0.0))[:, None]
        next_share = tl.sqrt(tl.where(average > 0, next_scale / average, 0.0))[:, None]
        wraps = column >= columns
        column = tl.where(wraps, column - columns, column)
        if FACTORED == 3:
            column = tl.max_contiguous(tl.multiple_of(column, [1, 16]), [1, 16])
        share = tl.where(wraps, next_share, share)
    return share * tl.sqrt(tl.load(col + column, mask=inside, other=0))


def factored_form(o: AdamWOperands) -> int:
    """FACTORED of the kernels: 0 for a whole v, 1 for a factored one, 2 if no line is shorter than a block, 3 if the
    column vector can be read 16 entries at a time, too (a line then begins and ends where 16 entries do)."""
    if o.col is None:
        return 0
    columns = o.col.numel()
    return 1 if columns < BLOCK else 2 if columns % 16 or o.col.data_ptr() % 16 else 3
