"""θ of packed storage over some inputs: compact over the panel of the chosen ones, a matrix of its own."""

from __future__ import annotations

from torch import Tensor

from fxresu.kernels import pack, row_counts, row_starts, scatter, unpack
from fxresu.kernels.layout import panel_words

from .managed import ManagedWeight

__all__ = ["for_commit", "set_panel"]


def set_panel(entry: ManagedWeight, columns: Tensor) -> None:
    """Lay θ out over the pruned coordinates of these inputs (int32 [n], ascending): θ's shape, and where it lies.

    Reads counts on the host. `ManagedWeight.panel` says what there is afterwards.
    """
    assert entry.bits is not None
    index, bits, k, panel = columns.long(), entry.bits, entry.k, None
    whole = columns.numel() == (entry.rows if entry.input_rows else entry.k)
    if not whole:
        panel = panel_words(columns, entry.rows, entry.k, entry.input_rows)
        if entry.input_rows:
            bits = entry.bits.index_select(0, index)
        else:
            bits, k = pack(unpack(entry.bits, entry.k).index_select(1, index)), columns.numel()
    counts = row_counts(bits, k, invert=True)
    shape = (1, max(int(counts.sum()), 1))
    start = row_starts(counts, shape, fit=True)
    entry.columns, entry.panel, entry.panel_bits = (None, None, None) if whole else (columns, panel, bits)
    entry.panel_start, entry.theta_shape = start, shape


def for_commit(entry: ManagedWeight, values: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(row_start, columns, theta-like values) in a layout over the whole weight, as `commit_` takes them."""
    if entry.panel_start is None or values is None:
        return entry.row_start, entry.columns, values
    if entry.panel is None:
        return entry.panel_start, None, values
    bits, start, _, k = entry.theta_layout
    return entry.row_start, entry.columns, scatter(values, bits, start, None, k)
