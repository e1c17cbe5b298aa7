"""Where the entries of a compact (theta-like or packed) tensor belong in the dense matrix."""

import torch
from torch import Tensor

from .bits import popcount_reference, unpack_reference


def row_starts(counts: Tensor, shape: tuple[int, int]) -> Tensor:
    """Flat position of the first entry of every row: int64 [rows].

    counts: int64 [rows], entries of every row. shape: of the compact tensor; (rows, capacity) gives every row its own
    capacity and starts r * capacity; (1, capacity) packs the rows one after another. Raises ValueError when the entries
    do not fit. Reads `counts` on the host: call it where masks change, not in a step.
    """
    rows = counts.numel()
    if counts.dim() != 1 or counts.dtype != torch.int64:
        raise ValueError(f"counts must be an int64 vector, not {counts.dtype} of shape {tuple(counts.shape)}")
    if len(shape) != 2 or shape[0] not in (rows, 1) or shape[1] < 0:
        raise ValueError(f"shape must be ({rows}, capacity) or (1, capacity) for {rows} rows, not {tuple(shape)}")
    if rows == 0:
        return counts.new_empty(0)
    if shape[0] == rows:
        largest = int(counts.max())
        if largest > shape[1]:
            raise ValueError(f"shape {tuple(shape)} holds {shape[1]} entries per row, but a row has {largest}")
        return torch.arange(rows, device=counts.device) * shape[1]
    total = int(counts.sum())
    if total > shape[1]:
        raise ValueError(f"shape {tuple(shape)} holds {shape[1]} entries, but the rows have {total}")
    return counts.cumsum(0) - counts


def coordinates(bits: Tensor, row_start: Tensor | None, columns: Tensor | None, K: int, active: bool = False
                ) -> tuple[Tensor, Tensor]:
    """Flat positions (in the dense [rows, K] matrix, in the theta-like tensor) of all entries, in row-major order.

    The entries are the candidates, or with `active` the active coordinates. Two int64 [n]. This is the definition of
    the layout on which every reference is built; its size depends on data, so it is not for graphs.
    """
    dense, slot = positions(bits, row_start, columns, K, active)
    if isinstance(slot, slice):
        slot = torch.arange(slot.stop, device=bits.device)
    return dense, slot


def positions(bits: Tensor, row_start: Tensor | None, columns: Tensor | None, K: int, active: bool = False
              ) -> tuple[Tensor, Tensor | slice]:
    """As `coordinates`, but the positions in the theta-like tensor are a slice where they are its first n ones."""
    mask = unpack_reference(bits, K)
    if not active:
        mask = mask.logical_not_()
    if columns is not None:
        chosen = columns.long()
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
