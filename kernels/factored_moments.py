"""The factored second moment of a matrix (Adafactor: Shazeer and Stern 2018, arXiv 1804.04235): a row and a column.

    row_i <- beta2 row_i + (1 - beta2) mean_j g_ij^2;    col_j <- beta2 col_j + (1 - beta2) mean_i g_ij^2
    mean  <- beta2 mean  + (1 - beta2) mean_ij g_ij^2

v_ij = row_i * col_j / mean has the row means and column means that a whole v would have; `adamw_step` reads it so. The
mean of all is a running mean of its own, so that nobody has to add a row vector up.

Means are over gradients that are not zero, where Adafactor's are over all: pruned weights have none, and would make
v smaller, and the others' steps longer, by the share that is pruned. Rows or columns without any count as zeros.

Two launches for any number of matrices, three where their norms are wanted too. The first reads every gradient once: a
program has a tile, and leaves sums of squares, and of how many are not zero, of its rows, of its columns and of all of
it. The others add these up. Nothing is added by atomics: the order of sums, and with it every bit, is the same in every
run.
"""

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._check import check_device, check_float, math_dtype
from ._registry import operation, unobserved, written
from ._triton import jit, launch, power_of_two, tl, use_triton

# A tile, and how many of its rows are read at a time, by so many warps: few, since these wait for one another where
# rows are added up.
_ROWS, _COLUMNS, _STRIP, _WARPS = 128, 256, 8, 2
# Sums that are added up at a time: so many partial ones of so many rows or columns.
_DEPTH, _CHUNK = 32, 128

# A row of the table: addresses (grad, row, col, mean, check), rows, columns, first tile, first program of the second
# launch, place of the partial sums; from _WORDS on float32: beta2, 1 - beta2.
_ROW = struct.Struct("=10q2f")
_WORDS = 10
_FIELDS = _ROW.size // 8
_TL = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# (gradient, row, col, mean, beta2, check) of a matrix.
Update = tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor | None]

# --- reference -------------------------------------------------------------------------------------------------------


def factored_moments_reference(update: Update, scale: Tensor | None = None) -> None:
    """One matrix in place; float64 arithmetic for a float64 gradient."""
    grad, row, col, mean, beta2, check = update
    if (scale is not None and bool(scale.isnan())) or (check is not None and not bool(check.isfinite())):
        return
    wide = math_dtype(grad.dtype)
    g = grad.reshape(row.numel(), col.numel()).to(wide)
    square = (g if scale is None else g * scale.to(wide)).square()
    for kept, fresh in zip((row, col, mean), means_of(square), strict=True):
        kept.copy_(kept.to(wide) * beta2 + fresh * (1 - beta2))


def means_of(square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a matrix [R, C] by rows [R], by columns [C] and of all [1], over entries that are not zero."""
    counted = (square != 0).to(square.dtype)
    row, col = (square.sum(i) / counted.sum(i).clamp(min=1) for i in (1, 0))
    return row, col, (square.sum() / counted.sum().clamp(min=1)).view(1)


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _item_of(table, field, program, count, COUNT: tl.constexpr, FIELDS: tl.constexpr):
    """The row of the table of the matrix that a program belongs to, by the first program of each."""
    each = tl.arange(0, COUNT)
    firsts = tl.load(table + each * FIELDS + field, mask=each < count, other=2**40)
    return table + (tl.sum((firsts <= program).to(tl.int32), axis=0) - 1) * FIELDS


@jit
def _tiling(item, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(rows, columns, tiles down, tiles across, place of the partial sums) of a matrix. These are [across, rows] of the
    rows, [down, columns] of the columns and [down * across] of all."""
    rows = tl.load(item + 5)
    columns = tl.load(item + 6)
    return rows, columns, (rows + ROWS - 1) // ROWS, (columns + COLUMNS - 1) // COLUMNS, tl.load(item + 9)


@jit
def _skipped(row, factor, HAS_CHECK: tl.constexpr):
    """Whether nothing of the matrix may be written."""
    bad = factor != factor
    if HAS_CHECK:
        norm = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32)))
        bad = bad | ~(tl.abs(norm) < float("inf"))
    return bad


@jit
def _tile_sums_kernel(
    table,
    sums,
    counts,
    scale,
    count,
    HAS_SCALE: tl.constexpr,
    HAS_CHECK: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD: tl.constexpr,
    COUNT: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIP: tl.constexpr,
):
    item = _item_of(table, 7, tl.program_id(0), count, COUNT, FIELDS)
    grad = tl.load(item).to(tl.pointer_type(GRAD))
    rows, columns, down, across, first = _tiling(item, ROWS, COLUMNS)
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
        columns = tl.multiple_of(columns, 16)
    factor = 1.0
    if HAS_SCALE:
        factor = tl.load(scale).to(tl.float32)
    tile = tl.program_id(0) - tl.load(item + 7)
    tile_row = tile // across
    tile_column = tile - tile_row * across
    reach = tl.where(_skipped(item, factor, HAS_CHECK), 0, rows)  # nobody will look at these sums
    line = tile_row * ROWS + tl.arange(0, STRIP)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    place_of_columns = first + across * rows + tile_row * columns + column
    place_of_all = first + across * rows + down * columns + tile
    squares = tl.zeros([STRIP, COLUMNS], tl.float32)
    others = tl.zeros([STRIP, COLUMNS], tl.float32)
    known = column[None, :] < columns
    end = tl.minimum(reach, (tile_row + 1) * ROWS)
    source = grad + line[:, None] * columns + column[None, :]
    coming = tl.load(source, mask=(line[:, None] < reach) & known, other=0)
    for strip in range(0, ROWS, STRIP):
        g = coming.to(tl.float32) * factor
        # Asked for before these are added up: the stores in between keep the compiler from moving it.
        below = strip + STRIP
        coming = tl.load(source + below * columns, mask=(line[:, None] + below < end) & known, other=0)
        square = g * g
        other = (square != 0).to(tl.float32)
        squares += square
        others += other
        place_of_rows = first + tile_column * rows + line + strip
        tl.store(sums + place_of_rows, tl.sum(square, axis=1), mask=line + strip < rows)
        tl.store(counts + place_of_rows, tl.sum(other, axis=1), mask=line + strip < rows)
    in_columns = tl.sum(squares, axis=0)
    found = tl.sum(others, axis=0)
    tl.store(sums + place_of_columns, in_columns, mask=column < columns)
    tl.store(counts + place_of_columns, found, mask=column < columns)
    tl.store(sums + place_of_all, tl.sum(in_columns, axis=0))
    tl.store(counts + place_of_all, tl.sum(found, axis=0))


@jit
def _total(sums, tiles, DEPTH: tl.constexpr, CHUNK: tl.constexpr):
    """All of the sums, as a scalar."""
    each = tl.arange(0, DEPTH)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    found = tl.zeros([DEPTH, CHUNK], tl.float32)
    for first in range(0, tiles, DEPTH * CHUNK):
        found += tl.load(sums + first + each, mask=first + each < tiles, other=0)
    return tl.sum(tl.sum(found, axis=0), axis=0)


@jit
def _moments_kernel(
    table,
    sums,
    counts,
    scale,
    count,
    HAS_SCALE: tl.constexpr,
    HAS_CHECK: tl.constexpr,
    COUNT: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program has the mean, or so many rows or columns."""
    item = _item_of(table, 8, tl.program_id(0), count, COUNT, FIELDS)
    factor = 1.0
    if HAS_SCALE:
        factor = tl.load(scale).to(tl.float32)
    if _skipped(item, factor, HAS_CHECK):
        return
    rows, columns, down, across, first = _tiling(item, ROWS, COLUMNS)
    numbers = (item + WORDS).to(tl.pointer_type(tl.float32))
    beta2 = tl.load(numbers)
    one_minus_beta2 = tl.load(numbers + 1)
    part = tl.program_id(0) - tl.load(item + 8) - 1
    if part < 0:
        mean = tl.load(item + 3).to(tl.pointer_type(tl.float32))
        place = first + across * rows + down * columns
        of_all = _total(sums + place, down * across, DEPTH, CHUNK)
        of_all /= tl.maximum(_total(counts + place, down * across, DEPTH, CHUNK), 1.0)
        tl.store(mean, tl.load(mean) * beta2 + of_all * one_minus_beta2)
    else:
        row_parts = (rows + CHUNK - 1) // CHUNK
        of_rows = part < row_parts
        address = tl.where(of_rows, tl.load(item + 1), tl.load(item + 2))
        kept = address.to(tl.pointer_type(tl.float32))
        length = tl.where(of_rows, rows, columns)
        partial = tl.where(of_rows, across, down)
        start = first + tl.where(of_rows, 0, across * rows)
        entry = tl.where(of_rows, part, part - row_parts) * CHUNK + tl.arange(0, CHUNK)
        depth = tl.arange(0, DEPTH)
        found = tl.zeros([DEPTH, CHUNK], tl.float32)
        counted = tl.zeros([DEPTH, CHUNK], tl.float32)
        for earlier in range(0, partial, DEPTH):
            which = earlier + depth[:, None]
            inside = (which < partial) & (entry[None, :] < length)
            place = start + which * length + entry[None, :]
            found += tl.load(sums + place, mask=inside, other=0)
            counted += tl.load(counts + place, mask=inside, other=0)
        fresh = tl.sum(found, axis=0) / tl.maximum(tl.sum(counted, axis=0), 1.0)
        old = tl.load(kept + entry, mask=entry < length, other=0)
        tl.store(kept + entry, old * beta2 + fresh * one_minus_beta2, mask=entry < length)


@jit
def _norms_kernel(
    table,
    sums,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program has a matrix: the root of its sum of squares becomes its check."""
    item = table + tl.program_id(0) * FIELDS
    rows, columns, down, across, first = _tiling(item, ROWS, COLUMNS)
    norm = tl.sqrt(_total(sums + first + across * rows + down * columns, down * across, DEPTH, CHUNK))
    tl.store(tl.load(item + 4).to(tl.pointer_type(tl.float32)), norm)


def _launch(updates: Sequence[Update], scale: Tensor | None, measure: bool) -> None:
    rows, tiles, programs, place, bits = [], 0, 0, 0, 0
    for grad, row, col, mean, beta2, check in updates:
        R, C = row.numel(), col.numel()
        down, across = -(-R // _ROWS), -(-C // _COLUMNS)
        addresses = [0 if t is None else t.data_ptr() for t in (grad, row, col, mean, check)]
        bits |= addresses[0] | C
        rows.append(_ROW.pack(*addresses, R, C, tiles, programs, place, beta2, 1 - beta2))
        tiles += down * across
        programs += 1 + -(-R // _CHUNK) + -(-C // _CHUNK)
        place += across * R + down * C + down * across
    first, *_, check = updates[0]
    host = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int64)
    # A copy from pageable memory would wait for the device; pinned memory is not used again before it is done.
    table = host.pin_memory().to(first.device, non_blocking=True) if first.is_cuda else host
    sums, counts = (torch.empty(place, device=first.device) for _ in range(2))
    operands = (first, table, sums, counts, table if scale is None else scale, len(rows))
    tiling: dict[str, Any] = {"FIELDS": _FIELDS, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    adding: dict[str, Any] = tiling | {"DEPTH": _DEPTH, "CHUNK": _CHUNK, "num_warps": 4}
    reading: dict[str, Any] = tiling | {"STRIP": _STRIP, "GRAD": getattr(tl, _TL[first.dtype]), "num_warps": _WARPS}
    common: dict[str, Any] = {"HAS_SCALE": scale is not None, "COUNT": power_of_two(len(rows))}
    known, reading, last = check is not None, reading | common, adding | common
    launch(_tile_sums_kernel, tiles, *operands, HAS_CHECK=known and not measure, ALIGNED=bits % 16 == 0, **reading)
    if measure:
        launch(_norms_kernel, len(rows), first, table, sums, **adding)
    launch(_moments_kernel, programs, *operands, HAS_CHECK=known, WORDS=_WORDS, **last)


# --- operation -------------------------------------------------------------------------------------------------------


def _check_update(update: Update, scale: Tensor | None) -> None:
    grad, row, col, mean, beta2, check = update
    for name, kept in (("row", row), ("col", col), ("mean", mean)):
        if kept.dtype != torch.float32 or kept.dim() != 1 or not kept.is_contiguous():
            raise ValueError(f"{name} must be a contiguous float32 vector, not {kept.dtype} {tuple(kept.shape)}")
        if kept.device != grad.device:
            check_device(name, kept, grad)
    if mean.numel() != 1:
        raise ValueError(f"mean must hold one float, not {mean.numel()}")
    if not grad.numel() or row.numel() * col.numel() != grad.numel():
        raise ValueError(
            f"row and col must be those of a matrix of grad's {grad.numel()} entries, at least one, not of"
            f" {row.numel()} and {col.numel()}"
        )
    if not grad.is_contiguous():
        raise ValueError(f"grad must be contiguous, not of strides {grad.stride()}")
    check_float("grad.dtype", grad.dtype)
    if not 0 <= beta2 < 1:
        raise ValueError(f"beta2 must be in [0, 1), not {beta2}")
    if check is not None and (check.numel() != 1 or check.dtype != torch.float32):
        raise ValueError(f"check must hold one float32, not {check.dtype} of shape {tuple(check.shape)}")
    if scale is not None and (scale.numel() != 1 or not scale.is_floating_point()):
        raise ValueError(f"scale must hold one float, not {scale.dtype} of shape {tuple(scale.shape)}")


def _measure(updates: Sequence[Update]) -> None:
    for grad, *_, check in updates:
        assert check is not None
        torch.linalg.vector_norm(grad, dtype=torch.float32, out=check)


def _run(updates: Sequence[Update], scale: Tensor | None, measure: bool = False) -> None:
    if not use_triton(updates[0][0]):  # the others are on its device
        if measure:
            _measure(updates)
        for update in updates:
            factored_moments_reference(update, scale)
        return
    kinds: dict[tuple[Any, ...], list[Update]] = {}
    for update in updates:
        grad, check = update[0], update[-1]
        if grad.dtype not in _TL:
            raise ValueError(f"factored_moments_ takes {grad.dtype} on the CPU only; its GPU kernel is in float32")
        kinds.setdefault((grad.dtype, grad.device, check is None), []).append(update)
    for members in kinds.values():
        _launch(members, scale, measure)


def _factored_fake(
    grad: Tensor, row: Tensor, col: Tensor, mean: Tensor, scale: Tensor | None, check: Tensor | None, beta2: float
) -> None:
    _check_update((grad, row, col, mean, beta2, check), scale)


@operation("factored_moments_", ("row", "col", "mean"), fake=_factored_fake)
def _factored_op(
    grad: Tensor, row: Tensor, col: Tensor, mean: Tensor, scale: Tensor | None, check: Tensor | None, beta2: float
) -> None:
    update = (grad, row, col, mean, beta2, check)
    _check_update(update, scale)
    _run([update], scale)


def factored_moments_(updates: Sequence[Update], scale: Tensor | None = None, measure: bool = False) -> None:
    """Bring the factored second moments of matrices on one device up to date, in place; as the operation
    `fxresu::factored_moments_` of each where somebody watches.

    Args:
        updates: (grad, row, col, mean, beta2, check) of each. grad: row.numel() * col.numel() entries row after row, of
            any float dtype. row, col: float32 vectors. mean: float32 [1]. check: a float32 scalar
            that leaves the matrix out unless it is finite, or None.
        scale: one float that multiplies all gradients; NaN leaves all out. Neither is waited for.
        measure: the gradients' 2-norms are written into the checks first, for less than reading gradients once more
            costs. All updates have one then, and there is no scale.

    Raises ValueError for arguments that do not fit, before anything is written.
    """
    for update in updates:
        _check_update(update, scale)
        if measure and (scale is not None or update[-1] is None):
            raise ValueError("measure=True writes a norm into every check, of gradients without a scale")
    if not updates:
        return
    with torch.no_grad():
        if unobserved(*(update[0] for update in updates)):
            _run(updates, scale, measure)
            written(*(t for update in updates for t in update[1:4]))
            return
        if measure:
            _measure(updates)
        for grad, row, col, mean, beta2, check in updates:
            torch.ops.fxresu.factored_moments_(grad, row, col, mean, scale, check, beta2)
