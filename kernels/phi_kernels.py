"""Triton kernels of Phi and its transpose (see `phi`), and their launches."""

import torch
from torch import Tensor

from ._check import math_dtype
from ._tiles import at, candidate_tile, panel_kind, theta_grid
from ._triton import jit, launch, tl


@jit
def _place_of(dense, row, column, stride_row, stride_column, HINT: tl.constexpr):
    """Addresses of entries of a row, with lanes as the fast dimension where HINT."""
    offset = column.to(tl.int64) * stride_column
    if HINT:
        return at(dense + row * stride_row, offset)
    else:
        return dense + row * stride_row + offset


@jit
def _gather_kernel(
    dense,
    out,
    bits,
    row_start,
    columns,
    rows,
    K,
    W,
    n_cols,
    capacity,
    stride_row,
    stride_column,
    PANEL: tl.constexpr,
    HINT: tl.constexpr,
    ACTIVE: tl.constexpr,
    ADD: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    if PANEL == 0:
        # What these loads read does not depend on the mask, and they are under way while its bits are counted. Loading
        # what is not kept costs no sector that is not touched anyway, and lets the loads be vectors.
        place = (chunk * BLOCK_W + tl.arange(0, BLOCK_W))[:, None] * 32 + tl.arange(0, 32)[None, :]
        loaded = tl.load(_place_of(dense, row, place, stride_row, stride_column, HINT), mask=place < K, other=0)
    row, column, keep, start, slot, end, _ = candidate_tile(
        bits, row_start, columns, row, chunk, K, W, n_cols, capacity, PANEL, ACTIVE, BLOCK_W
    )
    if PANEL != 0:
        loaded = tl.load(_place_of(dense, row, column, stride_row, stride_column, HINT), mask=keep, other=0)
    value = loaded.to(WIDE)
    if ADD:
        value += tl.load(at(out + start, slot), mask=keep, other=0).to(WIDE)
    written = keep
    if PANEL != 0 and not ADD:
        written = slot < n_cols  # padding too: the loads above left it 0
    tl.store(at(out + start, slot), value.to(out.dtype.element_ty), mask=written)
    if PANEL == 0 and not ADD:  # noqa: SIM102 (the first is decided when the kernel is compiled)
        if chunk == CHUNKS - 1:
            # The row's padding lies between its last entry and the next row's first.
            limit = tl.load(row_start + row + 1, mask=row + 1 < rows, other=capacity)
            for first in range(tl.load(row_start + row) + end, limit, BLOCK_W * 32):
                position = first + tl.arange(0, BLOCK_W * 32)
                tl.store(out + position, tl.zeros([BLOCK_W * 32], out.dtype.element_ty), mask=position < limit)


@jit
def _scatter_kernel(
    theta,
    dense,
    bits,
    row_start,
    columns,
    K,
    W,
    n_cols,
    capacity,
    PANEL: tl.constexpr,
    ACTIVE: tl.constexpr,
    FILL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    row, column, keep, start, slot, _, _ = candidate_tile(
        bits, row_start, columns, row, chunk, K, W, n_cols, capacity, PANEL, ACTIVE, BLOCK_W
    )
    value = tl.load(at(theta + start, slot), mask=keep, other=0).to(dense.dtype.element_ty)
    written = keep
    if FILL:
        written = column < K
    if PANEL != 0:
        tl.store(at(dense + row * K, column), value, mask=written)
    else:
        tl.store(dense + row * K + column, value, mask=written)


def gather_triton(
    out: Tensor, dense: Tensor, bits: Tensor, row_start: Tensor | None, columns: Tensor | None, active: bool, add: bool
) -> None:
    """Write the candidates of `dense` (with `active` the active coordinates) into `out`, padding 0; or `add` them."""
    rows, K = dense.shape
    if rows == 0 and not add:
        out.zero_()
    grid = theta_grid(bits, columns, K, out.shape)
    wide = tl.float64 if math_dtype(out.dtype, dense.dtype) == torch.float64 else tl.float32
    panel = panel_kind(out.shape, columns, rows)
    # What `at` claims makes vectors where all strides are even, and is true of a stride of 1 only.
    hint = 1 in dense.stride()
    launch(
        _gather_kernel,
        grid.tiles,
        dense,
        dense,
        out,
        bits,
        bits if row_start is None else row_start,
        bits if columns is None else columns,
        rows,
        K,
        bits.shape[1],
        out.shape[1],
        out.numel(),
        *dense.stride(),
        PANEL=panel,
        HINT=hint,
        ACTIVE=active,
        ADD=add,
        WIDE=wide,
        CHUNKS=grid.chunks,
        BLOCK_W=grid.BLOCK_W,
        num_warps=grid.num_warps,
    )


def scatter_triton(
    dense: Tensor,
    theta: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    active: bool,
    fill: bool,
) -> None:
    """Write theta's entries into `dense`; with `fill` (compact layouts only) also zeros everywhere else."""
    K = dense.shape[1]
    grid = theta_grid(bits, columns, K, theta.shape)
    panel = panel_kind(theta.shape, columns, dense.shape[0])
    launch(
        _scatter_kernel,
        grid.tiles,
        dense,
        theta,
        dense,
        bits,
        bits if row_start is None else row_start,
        bits if columns is None else columns,
        K,
        bits.shape[1],
        theta.shape[1],
        theta.numel(),
        PANEL=panel,
        ACTIVE=active,
        FILL=fill,
        CHUNKS=grid.chunks,
        BLOCK_W=grid.BLOCK_W,
        num_warps=grid.num_warps,
    )
