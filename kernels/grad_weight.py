"""The weight's gradient of few tokens, written only where it is wanted.

dW = dYᵀ X is as large as the weight whatever the number of tokens. With few tokens the time goes into writing it, so
one kernel computes a tile in registers and stores what the phase needs: dθ = Φᵀ(dW) (`grad_gather`), half the bytes at
50 % sparsity, or M∘dW (`grad_masked`), without a second pass over dW. With many tokens a GEMM of the vendor's library
and a `gather` are faster (measured: 0.5 to 0.8 of cuBLAS for a Triton GEMM with such an epilogue).

Prototypes on an H100, 4096x4096 at 50 %, 32 tokens to a float32 dθ: 28.5 µs of bfloat16 operands, 43.5 of float32.

float32 operands are multiplied as three TF32 products (Triton's "tf32x3"), which keeps float32's accuracy on the matrix
units; under `torch.set_float32_matmul_precision("high")` as one.
"""

from typing import Any

import torch
from torch import Tensor

from ._check import check_bits, check_device, check_float, check_layout, check_matrix
from ._registry import operation, unobserved
from ._tiles import at, popcount
from ._triton import INTERPRET, jit, launch, power_of_two, tl, use_triton
from .bits import unpack_aten
from .phi import gather_reference

_BLOCK_ROWS = 32
_STEP_WORDS = 4  # of a row that a program computes at a time
_SPLIT_WORDS = 16  # of a row that one program covers
_WARPS = 4
_REGISTERS = 128  # a thread, of 16-bit operands: more programs run at a time; of float32 it would spill

# --- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _dot(left, right, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@jit
def _kernel(
    dy,
    x,
    out,
    bits,
    row_start,
    rows,
    K,
    W,
    T,
    capacity,
    dy_token,
    dy_row,
    x_token,
    x_column,
    splits,
    SPLIT: tl.constexpr,
    STEP: tl.constexpr,
    GATHER: tl.constexpr,
    SHORT: tl.constexpr,
    ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Rows in blocks of BLOCK_N, STEP mask words of columns at a time, SPLIT words a program."""
    row = (tl.program_id(0) // splits).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (tl.program_id(0) % splits) * SPLIT
    lane = tl.arange(0, 32)
    inside = row < rows
    line = bits + row * W
    position = row * 0
    if GATHER:
        start = tl.load(row_start + row, mask=inside, other=0)
        known = start.to(tl.uint64) <= capacity  # a wrong one must not wrap around
        if SHORT:  # half the registers for positions
            start = start.to(tl.int32)
        start = tl.where(known, start, capacity)
        ones = tl.zeros([BLOCK_N], tl.int32)
        for done in range(0, first, 32):
            earlier = done + lane
            word = tl.load(line[:, None] + earlier[None, :], mask=inside[:, None] & (earlier < first)[None, :], other=0)
            ones += tl.sum(popcount(word), axis=1)
        position = start + (first * 32 - ones)
    token = tl.arange(0, BLOCK_T)
    dy_tile = dy + row[:, None] * dy_row + token[None, :].to(tl.int64) * dy_token
    x_tile = x + token[:, None].to(tl.int64) * x_token
    if ONE:
        left = tl.load(dy_tile, mask=inside[:, None] & (token < T)[None, :], other=0)
    for w in tl.range(first, tl.minimum(first + SPLIT, W), STEP, num_stages=1):
        column = w * 32 + tl.arange(0, STEP * 32)
        if ONE:
            right = tl.load(
                x_tile + column[None, :] * x_column, mask=(token < T)[:, None] & (column < K)[None, :], other=0
            )
            total = _dot(left, right, PRECISION, WIDEN)
        else:
            total = tl.zeros([BLOCK_N, STEP * 32], tl.float32)
            for t in range(0, T, BLOCK_T):
                here = (t + token) < T
                part = tl.load(dy_tile + t * dy_token, mask=inside[:, None] & here[None, :], other=0)
                right = tl.load(
                    x_tile + t * x_token + column[None, :] * x_column,
                    mask=here[:, None] & (column < K)[None, :],
                    other=0,
                )
                total += _dot(part, right, PRECISION, WIDEN)
        index = w + tl.arange(0, STEP)
        mask = inside[:, None] & (index < W)[None, :]
        if GATHER:
            valid = K - index * 32
            valid = tl.where(valid < 32, (1 << tl.maximum(tl.minimum(valid, 31), 0)) - 1, -1)
            word = ~tl.load(line[:, None] + index[None, :], mask=mask, other=-1) & valid[None, :]
            count = popcount(word)
            before = position[:, None] + tl.cumsum(count, axis=1) - count
            position += tl.sum(count, axis=1)
            word = tl.where(before + count <= capacity, word, 0)
            place = before[:, :, None] + popcount(word[:, :, None] & ((1 << lane[None, None, :]) - 1))
            keep = ((word[:, :, None] >> lane[None, None, :]) & 1) != 0
            # Positions are expanded, not reshaped: that moves words to the lanes that store, not 64-bit addresses.
            value = tl.reshape(total, [BLOCK_N, STEP, 32])
            tl.store(tl.max_contiguous(out + place, (1, 1, 2)), value.to(out.dtype.element_ty), mask=keep)
        else:
            word = tl.load(line[:, None] + index[None, :], mask=mask, other=0)
            bit = tl.reshape((word[:, :, None] >> lane[None, None, :]) & 1, [BLOCK_N, STEP * 32])
            tl.store(
                out + row[:, None] * K + column[None, :],
                tl.where(bit != 0, total, 0.0).to(out.dtype.element_ty),
                mask=inside[:, None] & (column < K)[None, :],
            )
    if GATHER:  # noqa: SIM102 (decided when the kernel is compiled)
        if first + SPLIT >= W:
            # A row's padding lies between its last entry and the next row's first.
            limit = tl.load(row_start + row + 1, mask=row + 1 < rows, other=capacity)
            limit = tl.where(limit.to(tl.uint64) <= capacity, limit, capacity).to(position.dtype)
            longest = tl.max(tl.where(inside, limit - position, 0), axis=0).to(tl.int32)
            for done in range(0, longest, 32):
                place = position[:, None] + done + lane[None, :]
                tl.store(
                    at(out, place),
                    tl.zeros([BLOCK_N, 32], out.dtype.element_ty),
                    mask=inside[:, None] & (place < limit[:, None]),
                )


def _launch(out: Tensor, dy: Tensor, x: Tensor, bits: Tensor, row_start: Tensor | None) -> None:
    tokens, rows = dy.shape
    K, W = x.shape[1], bits.shape[1]
    block_t = min(max(power_of_two(tokens), 16), 64)
    splits = max((W + _SPLIT_WORDS - 1) // _SPLIT_WORDS, 1)
    precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3"
    launch(
        _kernel,
        (rows + _BLOCK_ROWS - 1) // _BLOCK_ROWS * splits,
        dy,
        dy,
        x,
        out,
        bits,
        bits if row_start is None else row_start,
        rows,
        K,
        W,
        tokens,
        out.numel(),
        *dy.stride()[:1],
        dy.stride(1),
        *x.stride(),
        splits,
        SPLIT=_SPLIT_WORDS,
        STEP=_STEP_WORDS,
        GATHER=row_start is not None,
        SHORT=out.numel() + 32 * W < 2**31,
        ONE=tokens <= block_t,
        PRECISION=precision,
        WIDEN=INTERPRET,
        BLOCK_N=_BLOCK_ROWS,
        BLOCK_T=block_t,
        num_warps=_WARPS,
        **({} if dy.dtype == torch.float32 else {"maxnreg": _REGISTERS}),
    )


# --- operations ------------------------------------------------------------------------------------------------------


def _check(dy: Tensor, x: Tensor, bits: Tensor) -> None:
    check_matrix("dy", dy, strided=True)
    check_matrix("x", x, strided=True)
    check_device("x", x, dy)
    if dy.shape[0] != x.shape[0] or dy.dtype != x.dtype:
        raise ValueError(
            f"dy [tokens, rows] and x [tokens, K] must agree in tokens and dtype, not {tuple(dy.shape)} "
            f"{dy.dtype} and {tuple(x.shape)} {x.dtype}"
        )
    check_bits("bits", bits, dy.shape[1], x.shape[1], dy)


def _on_gpu(dy: Tensor) -> bool:
    if use_triton(dy):
        if dy.dtype == torch.float64:
            raise ValueError("grad_gather and grad_masked take float64 on the CPU only; the kernel sums in float32")
        return True
    return False


def _product(dy: Tensor, x: Tensor) -> Tensor:
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy.to(wide).t() @ x.to(wide)


def _flops(dy: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * dy[0] * dy[1] * x[1]


def _gather_fake(
    dy: Tensor, x: Tensor, bits: Tensor, row_start: Tensor, t_rows: int, t_cols: int, dtype: torch.dtype
) -> Tensor:
    _check(dy, x, bits)
    check_layout("shape", (t_rows, t_cols), dy.shape[1], row_start, None, dy)
    check_float("dtype", dtype)
    return dy.new_empty((t_rows, t_cols), dtype=dtype)


def _gather(
    dy: Tensor, x: Tensor, bits: Tensor, row_start: Tensor, t_rows: int, t_cols: int, dtype: torch.dtype
) -> Tensor:
    out = _gather_fake(dy, x, bits, row_start, t_rows, t_cols, dtype)
    if _on_gpu(dy):
        if dy.shape[1] == 0:
            return out.zero_()
        _launch(out, dy, x, bits, row_start)
        return out
    return gather_reference(_product(dy, x), bits, row_start, None, t_rows, t_cols, dtype, False)


operation("grad_gather", fake=_gather_fake, flops=_flops)(_gather)


def _masked_fake(dy: Tensor, x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    _check(dy, x, bits)
    check_float("dtype", dtype)
    return dy.new_empty((dy.shape[1], x.shape[1]), dtype=dtype)


def _masked(dy: Tensor, x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    out = _masked_fake(dy, x, bits, dtype)
    if _on_gpu(dy):
        _launch(out, dy, x, bits, None)
        return out
    return torch.where(unpack_aten(bits, x.shape[1]), _product(dy, x), 0).to(dtype)


operation("grad_masked", fake=_masked_fake, flops=_flops)(_masked)


# --- public ----------------------------------------------------------------------------------------------------------


def grad_gather(
    dy: Tensor, x: Tensor, bits: Tensor, row_start: Tensor, shape: tuple[int, int], dtype: torch.dtype | None = None
) -> Tensor:
    """dθ = Φᵀ(dYᵀ X) in the compact layout, padding 0, without a dense dW in memory.

    dy: [tokens, rows], x: [tokens, K], of one float dtype and any strides; sums are float32. bits: int32
    [rows, words(K)]. row_start: int64 [rows]. shape: of dθ. dtype: of the result, default that of dy. Raises ValueError
    for arguments that do not fit each other. No gradient of its own: it is a backward.
    """
    operands = (dy, x, bits, row_start, *shape, dtype or dy.dtype)
    if not torch.is_grad_enabled() and unobserved(dy, x):  # eager code waits for the host
        return _gather(*operands)
    return torch.ops.fxresu.grad_gather(*operands)


def grad_masked(dy: Tensor, x: Tensor, bits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """M∘(dYᵀ X) as [rows, K], zero at pruned coordinates, in one pass. Arguments as for `grad_gather`."""
    if not torch.is_grad_enabled() and unobserved(dy, x):
        return _masked(dy, x, bits, dtype or dy.dtype)
    return torch.ops.fxresu.grad_masked(dy, x, bits, dtype or dy.dtype)
