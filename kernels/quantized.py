"""Packed active values in 8 or 4 bits, and the composition that decodes them.

Blockwise symmetric absmax quantization (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv
2110.02861, with linear codes): of every block of 64 consecutive values, s = absmax / q with q = 127 or 7 is kept in
float32, and each value v as the integer round(v / s). What comes back is off by at most s / 2: absmax / 254 of the
block in 8 bits, absmax / 14 in 4 bits. Zero comes back as zero, and a block's largest value as itself. With the scales,
a value takes 8.5 or 4.5 bits.

Blocks count from the start of every line of the compact tensor. Two 4-bit values share a byte, the even one in the low
half, each shifted by 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._check import check_bits, check_device, check_float, check_matrix
from ._registry import operation
from ._tiles import active_tile, at, busy_grid, compact_entries, spread, theta_place
from ._triton import jit, launch, tl, use_triton
from .compose import check_covered, compose_reference, panel_kind, theta_gradient
from .compose_kernels import group_of, line_run, place_row, row_form

BLOCK = 64
"""Values that share a scale."""
LARGEST = {"int8": 127, "int4": 7}
"""The largest code; codes are symmetric about zero."""


_PIECE = 1 << 20  # values that are quantized at a time; a multiple of BLOCK


def code_shape(kind: str, shape: tuple[int, int]) -> tuple[tuple[int, int], torch.dtype]:
    """(shape, dtype) of the codes of a compact tensor of `shape`."""
    lines, length = shape
    return ((lines, length), torch.int8) if kind == "int8" else ((lines, length // 2), torch.uint8)


def value_count(codes: Tensor) -> int:
    """Values of a line that codes hold."""
    return codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the float32 scales of a compact tensor of `shape`."""
    return shape[0], -(-shape[1] // BLOCK)


def quantized_bytes(kind: str, shape: tuple[int, int]) -> int:
    """Bytes of codes and scales of a compact tensor of `shape`."""
    (lines, length), _ = code_shape(kind, shape)
    return lines * length + 4 * shape[0] * scale_shape(shape)[1]


def kind_of(codes: Tensor) -> str:
    """ "int8" or "int4", by the dtype of the codes; "" for values that are not quantized."""
    return {torch.int8: "int8", torch.uint8: "int4"}.get(codes.dtype, "")


@torch.no_grad()
def quantize(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(codes, scales) of compact values [lines, length] of any float dtype; `kind` is "int8" or "int4".

    Plain PyTorch: it runs once on entering RESU. Raises ValueError for an unknown kind, values that are not finite, or
    4 bits for lines of odd length.
    """
    if kind not in LARGEST:
        raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(LARGEST)}")
    check_matrix("values", values)
    lines, length = values.shape
    if kind == "int4" and length % 2:
        raise ValueError(f"values must have lines of even length for 4 bits, not {tuple(values.shape)}")
    (rows, width), dtype = code_shape(kind, (lines, length))
    codes = torch.empty(rows, width, dtype=dtype, device=values.device)
    scale = torch.empty(scale_shape((lines, length)), device=values.device)
    # In pieces: the arithmetic takes 16 bytes a value, and this happens while a model changes its phase.
    columns, per_byte = max(min(length, _PIECE), 1), 2 if kind == "int4" else 1
    step = max(_PIECE // columns, 1)
    for a in range(0, lines, step):
        for b in range(0, length, columns):
            piece, own = _quantized(values[a : a + step, b : b + columns], kind)
            codes[a : a + step, b // per_byte : b // per_byte + piece.shape[1]] = piece
            scale[a : a + step, b // BLOCK : b // BLOCK + own.shape[1]] = own
    if not bool(scale.isfinite().all()):
        raise ValueError("values must be finite to be quantized")
    return codes, scale


def _quantized(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    lines, length = values.shape
    blocks = -(-length // BLOCK)
    padded = torch.nn.functional.pad(values.detach().float(), (0, blocks * BLOCK - length)).view(lines, blocks, BLOCK)
    scale = padded.abs().amax(-1) / LARGEST[kind]
    # A subnormal scale would lose the values' precision; so small they are zero at any training's scale.
    small = scale < torch.finfo(torch.float32).tiny
    safe = scale.masked_fill(small, torch.inf)
    codes = (padded / safe.unsqueeze(-1)).round_().to(torch.int8).view(lines, -1)[:, :length]
    return (codes if kind == "int8" else _paired(codes)), scale.masked_fill(small, 0.0)


def _paired(codes: Tensor) -> Tensor:
    shifted = (codes + 8).to(torch.uint8)
    return shifted[:, ::2] | shifted[:, 1::2] << 4


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [lines, length] of codes and scales."""
    length = value_count(codes)
    if codes.dtype == torch.uint8:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).view(codes.shape[0], -1).to(torch.int8) - 8
    whole = scale.repeat_interleave(BLOCK, dim=1)[:, :length]
    return codes.float() * whole


# --- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _rows_kernel(
    codes,
    scale,
    theta,
    out,
    bits,
    K,
    W,
    code_line,
    t_line,
    code_capacity,
    t_capacity,
    blocks,
    HALF: tl.constexpr,
    SHARE: tl.constexpr,
    HAS_THETA: tl.constexpr,
    GROUP: tl.constexpr,
    T_GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """`compose_kernels.compose_rows_kernel` of codes. code_line: bytes of a line. blocks: scales of a line."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    if HALF:
        byte, shift = line_run(codes, row, code_line, code_capacity, SLOTS // 2, GROUP)
        byte = byte.to(tl.int32)
        code = tl.reshape(tl.join(byte & 15, byte >> 4), [SLOTS]) - 8
        shift = shift * 2
    else:
        code, shift = line_run(codes, row, code_line, code_capacity, SLOTS, GROUP)
    if GROUP == 1:
        which = tl.arange(0, SLOTS // SHARE)
        factor = spread(tl.load(scale + row * blocks + which, mask=which < blocks, other=0), SLOTS)
    else:
        which = (slots + (SHARE - shift)) // SHARE - 1
        factor = tl.load(scale + row * blocks + which, mask=(which >= 0) & (which < blocks), other=0)
    value = (code.to(tl.float32) * factor).to(out.dtype.element_ty)
    t, t_shift = value, shift
    if HAS_THETA:
        t, t_shift = line_run(theta, row, t_line, t_capacity, SLOTS, T_GROUP)
        t = t.to(out.dtype.element_ty)
    place_row(out, bits, row, K, W, value, shift, t, t_shift, HAS_THETA, BLOCK_W)


@jit
def _tiles_kernel(
    codes,
    scale,
    theta,
    out,
    bits,
    active_start,
    row_start,
    panel,
    K,
    W,
    length,
    lines,
    t_capacity,
    code_stride,
    scale_stride,
    HALF: tl.constexpr,
    SHARE: tl.constexpr,
    HAS_THETA: tl.constexpr,
    PANEL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """`compose_kernels.compose_tiles_kernel` of codes."""
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    column, bit, rank, _, _ = active_tile(bits, row, chunk, W, BLOCK_W)
    start = tl.maximum(tl.load(active_start + row), 0)
    line = tl.minimum(start // length, lines - 1)  # 0 where all rows share one line
    # The row's first block and everything before it are scalars, so that lanes compute in 32 bits.
    block = (start - line * length) // SHARE
    place = (start - line * length - block * SHARE).to(tl.int32) + rank
    room = tl.maximum(tl.minimum(length - block * SHARE, K + SHARE), 0).to(tl.int32)
    kept = (bit != 0) & (place < room)
    codes += line * code_stride
    if HALF:
        byte = tl.load(at(codes + block * (SHARE // 2), place >> 1), mask=kept, other=0).to(tl.int32)
        code = ((byte >> ((place & 1) * 4)) & 15) - 8
    else:
        code = tl.load(at(codes + block * SHARE, place), mask=kept, other=0).to(tl.int32)
    factor = tl.load(at(scale + line * scale_stride + block, place // SHARE), mask=kept, other=0)
    value = tl.where(kept, code.to(tl.float32) * factor, 0.0).to(out.dtype.element_ty)
    if HAS_THETA:
        t_start, slot, covered = theta_place(bits, row_start, panel, row, chunk, column, bit, rank, W, PANEL, BLOCK_W)
        fresh = compact_entries(theta, t_start, slot, covered, K, t_capacity).to(out.dtype.element_ty)
        value = tl.where(covered, fresh, value)
    tl.store(out + row * K + column, value, mask=column < K)


def _triton(
    codes: Tensor,
    scale: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    K: int,
    dtype: torch.dtype,
    panel: Tensor | None,
) -> Tensor:
    rows, W = bits.shape
    out = scale.new_empty((rows, K), dtype=dtype)
    length, half = value_count(codes), codes.dtype == torch.uint8
    has_theta = theta is not None
    form = None
    if panel is None and codes.shape[0] == rows and (theta is None or theta.shape[0] == rows):
        lines = [length + (group_of(codes) - 1) * (2 if half else 1)]
        if theta is not None:
            lines.append(theta.shape[1] + group_of(theta) - 1)
        form = row_form(W, *lines)
    if theta is None or row_start is None:
        theta, row_start = scale, active_start  # stand-ins that the kernels do not touch
    if form is not None:
        launch(
            _rows_kernel,
            rows,
            scale,
            codes,
            scale,
            theta,
            out,
            bits,
            K,
            W,
            codes.shape[1],
            theta.shape[1],
            codes.numel(),
            theta.numel(),
            scale.shape[1],
            HALF=half,
            SHARE=BLOCK,
            HAS_THETA=has_theta,
            GROUP=group_of(codes),
            T_GROUP=group_of(theta),
            **form,
        )
        return out
    grid = busy_grid(rows, K, words_per_warp=16)
    launch(
        _tiles_kernel,
        grid.tiles,
        scale,
        codes,
        scale,
        theta,
        out,
        bits,
        active_start,
        row_start,
        bits if panel is None else panel,
        K,
        W,
        length,
        codes.shape[0],
        theta.numel(),
        codes.shape[1],
        scale.shape[1],
        HALF=half,
        SHARE=BLOCK,
        HAS_THETA=has_theta,
        PANEL=panel_kind(panel),
        CHUNKS=grid.chunks,
        BLOCK_W=grid.BLOCK_W,
        num_warps=grid.num_warps,
    )
    return out


# --- operation -------------------------------------------------------------------------------------------------------


def _check(
    codes: Tensor,
    scale: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    K: int,
    dtype: torch.dtype,
    columns: Tensor | None,
    panel: Tensor | None,
    panel_bits: Tensor | None,
) -> None:
    kind, rows = kind_of(codes), bits.shape[0]
    if not kind:
        raise ValueError(f"codes must be int8 (8 bits) or uint8 (two of 4 bits), not {codes.dtype}")
    check_matrix("scale", scale)
    if codes.dim() != 2 or not codes.is_contiguous():
        raise ValueError(f"codes must be a contiguous matrix, not of shape {tuple(codes.shape)}")
    if scale.dtype != torch.float32 or scale.shape[0] != codes.shape[0]:
        raise ValueError(f"scale must be float32 with {codes.shape[0]} lines, not {scale.dtype} {tuple(scale.shape)}")
    check_device("codes", codes, scale)
    check_bits("bits", bits, rows, K, scale)
    check_covered(theta, bits, row_start, K, scale, columns, panel, panel_bits)
    check_float("dtype", dtype)


def _fake(
    codes: Tensor,
    scale: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    K: int,
    dtype: torch.dtype,
    use: int,
    anchor: Tensor | None,
    columns: Tensor | None = None,
    panel: Tensor | None = None,
    panel_bits: Tensor | None = None,
) -> Tensor:
    _check(codes, scale, theta, bits, active_start, row_start, K, dtype, columns, panel, panel_bits)
    return scale.new_empty((bits.shape[0], K), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    theta, bits, _, row_start = inputs[2:6]
    ctx.save_for_backward(bits, row_start, *inputs[10:])
    ctx.theta = None if theta is None else (tuple(theta.shape), theta.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bits, row_start, *covered = ctx.saved_tensors
    theta = None
    if ctx.needs_input_grad[2]:
        theta = theta_gradient(grad, bits, row_start, *covered, *ctx.theta)
    return None, None, theta, *(None,) * 10


@operation("compose_quantized", fake=_fake, backward=_backward, setup_context=_setup)
def _op(
    codes: Tensor,
    scale: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    K: int,
    dtype: torch.dtype,
    use: int,
    anchor: Tensor | None,
    columns: Tensor | None = None,
    panel: Tensor | None = None,
    panel_bits: Tensor | None = None,
) -> Tensor:
    _check(codes, scale, theta, bits, active_start, row_start, K, dtype, columns, panel, panel_bits)
    shape = scale_shape((codes.shape[0], value_count(codes)))
    if tuple(scale.shape) != shape:  # not in the fake: sizes of packed values are symbolic in graphs
        raise ValueError(f"scale must have shape {shape} for codes {tuple(codes.shape)}, not {tuple(scale.shape)}")
    if use_triton(scale):
        return _triton(codes, scale, theta, bits, active_start, row_start, K, dtype, panel)
    values = dequantize(codes, scale)
    return compose_reference(values, theta, bits, active_start, row_start, K, dtype, columns, panel, panel_bits)


def compose_quantized(
    codes: Tensor,
    scale: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    K: int,
    dtype: torch.dtype,
    use: int = 0,
    anchor: Tensor | None = None,
    columns: Tensor | None = None,
    panel: Tensor | None = None,
    panel_bits: Tensor | None = None,
) -> Tensor:
    """`compose` with active values that are decoded from (codes, scale) of `quantize`: [rows, K] of `dtype`.

    Differentiable in theta; the frozen values get no gradient. `use`, `anchor` and the rest are those of
    `compose`. Raises ValueError for arguments that do not fit each other.
    """
    return torch.ops.fxresu.compose_quantized(
        codes, scale, theta, bits, active_start, row_start, K, dtype, use, anchor, columns, panel, panel_bits
    )
