"""Where the entries of a compact (theta-like or packed) tensor belong in the dense matrix.

A panel is dense: a theta-like tensor of all coordinates in the chosen columns, [rows, n], or rows, [n, K] (the inputs
of a weight that multiplies from the right lie along its rows). Its shape tells which; `columns` holds the indices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import row_panel
from .bits import pack_reference, popcount_reference, unpack_reference


def row_starts(counts: Tensor, shape: tuple[int, int], *, fit: bool = False) -> Tensor:
    """Flat position of the first entry of every row: int64 [rows].

    counts: int64 [rows], entries of every row. shape: of the compact tensor; (rows, capacity) gives every row its own
    capacity and starts r * capacity; (1, capacity) packs the rows one after another. Raises ValueError when the entries
    do not fit. Reads `counts` on the host, unless the caller knows that they `fit`: call it where masks change, not in
    a step.
    """
    rows = counts.numel()
    if counts.dim() != 1 or counts.dtype != torch.int64:
        raise ValueError(f"counts must be an int64 vector, not {counts.dtype} of shape {tuple(counts.shape)}")
    if len(shape) != 2 or shape[0] not in (rows, 1) or shape[1] < 0:
        raise ValueError(f"shape must be ({rows}, capacity) or (1, capacity) for {rows} rows, not {tuple(shape)}")
    if rows == 0:
        return counts.new_empty(0)
    if shape[0] == rows:
        largest = 0 if fit else int(counts.max())
        if largest > shape[1]:
            raise ValueError(f"shape {tuple(shape)} holds {shape[1]} entries per row, but a row has {largest}")
        return torch.arange(rows, device=counts.device) * shape[1]
    total = 0 if fit else int(counts.sum())
    if total > shape[1]:
        raise ValueError(f"shape {tuple(shape)} holds {shape[1]} entries, but the rows have {total}")
    return counts.cumsum(0) - counts


def coordinates(
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    K: int,
    active: bool = False,
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Flat positions (in the dense [rows, K] matrix, in the theta-like tensor) of all entries, in row-major order.

    shape: of the theta-like tensor; None for a panel of columns. The entries are the candidates, or with `active` the
    active coordinates. Two int64 [n]. This is the definition of the layout on which every reference is built; its
    size depends on data, so it is not for graphs.
    """
    dense, slot = positions(bits, row_start, columns, K, active, shape)
    if isinstance(slot, slice):
        slot = torch.arange(slot.stop, device=bits.device)
    return dense, slot


def positions(
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    K: int,
    active: bool = False,
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | slice]:
    """As `coordinates`, but the positions in the theta-like tensor are a slice where they are its first n ones."""
    mask = unpack_reference(bits, K)
    if not active:
        mask = mask.logical_not_()
    if columns is not None:
        chosen = columns.long()
        if shape is not None and row_panel(shape, columns, bits.shape[0]):
            slot = mask[chosen].reshape(-1).nonzero().squeeze(1)
            line = torch.div(slot, K, rounding_mode="floor")
            return (chosen[line] - line) * K + slot, slot
        slot = mask[:, chosen].reshape(-1).nonzero().squeeze(1)
        row = torch.div(slot, max(chosen.numel(), 1), rounding_mode="floor")
        return row * K + chosen[slot - row * chosen.numel()], slot
    if row_start is None:
        raise ValueError("row_start is required where columns is None (the compact layout)")
    dense = mask.view(-1).nonzero().squeeze(1)
    ones = popcount_reference(bits).sum(1)
    counts = ones if active else K - ones
    packed_start = counts.cumsum(0) - counts
    if torch.equal(packed_start, row_start):
        return dense, slice(0, dense.numel())
    slot = torch.repeat_interleave(row_start - packed_start, counts)
    return dense, slot.add_(torch.arange(dense.numel(), device=bits.device))


def panel_words(columns: Tensor, rows: int, K: int, by_rows: bool) -> Tensor:
    """Which inputs a compact theta covers, for `compose`: int32 [1, words(K)] with the bits of all other columns set,
    or, of chosen rows, int32 [rows, 1] with the line of theta that a row has, and -1 without one.

    columns: int32 [n], ascending, fewer than there are inputs. Reads nothing on the host.
    """
    index = columns.long()
    if by_rows:
        lines = torch.full((rows, 1), -1, dtype=torch.int32, device=columns.device)
        lines[index, 0] = torch.arange(index.numel(), dtype=torch.int32, device=columns.device)
        return lines
    outside = torch.ones(1, K, dtype=torch.bool, device=columns.device)
    outside[0, index] = False
    return pack_reference(outside)


def panel_lines(panel: Tensor) -> bool:
    """Whether `panel_words` stands for chosen rows: with one row there is nothing to choose."""
    return panel.shape[0] > 1
