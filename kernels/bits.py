"""Mask bits: one bit per coordinate, int32 words [rows, ceil(K / 32)], least significant bit first, 1 = active.

Bits at and beyond column K are 0, so that population counts need no correction.
"""

import functools
import sys

import torch
from torch import Tensor

from ._registry import operation
from ._tiles import popcount, row_grid
from ._triton import jit, launch, power_of_two, tl, use_triton


def words(K: int) -> int:
    """Words per row of a packed mask over K columns."""
    return (K + 31) // 32


def _check_words(bits: Tensor, K: int | None = None) -> None:
    if bits.dtype != torch.int32 or bits.dim() != 2 or not bits.is_contiguous():
        raise ValueError(
            f"bits must be a contiguous int32 matrix, not {bits.dtype} of shape {tuple(bits.shape)} and "
            f"strides {bits.stride()}"
        )
    if K is not None and bits.shape[1] != words(K):
        raise ValueError(f"bits must have {words(K)} words per row for K = {K}, not {bits.shape[1]}")


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"mask must be a bool matrix, not {mask.dtype} of shape {tuple(mask.shape)}")


# --- reference -------------------------------------------------------------------------------------------------------


def unpack_aten(bits: Tensor, K: int) -> Tensor:
    """bool [rows, K] from packed bits by plain aten operations, which Inductor fuses into what consumes the mask."""
    lanes = torch.arange(32, dtype=torch.int32, device=bits.device)
    expanded = ((bits.unsqueeze(-1) >> lanes) & 1) != 0
    return expanded.view(bits.shape[0], bits.shape[1] * 32)[:, :K]


def unpack_columns_aten(bits: Tensor, columns: Tensor) -> Tensor:
    """bool [rows, n], `unpack_aten(bits, K)[:, columns]` for int32 columns [n], in fewer operations to compile."""
    return ((bits.index_select(1, columns >> 5) >> (columns & 31)) & 1) != 0


def pack_reference(mask: Tensor) -> Tensor:
    rows, K = mask.shape
    padded = torch.nn.functional.pad(mask, (0, words(K) * 32 - K)).view(rows, words(K), 32)
    weights = torch.ones(32, dtype=torch.int64, device=mask.device) << torch.arange(32, device=mask.device)
    return (padded * weights).sum(-1).to(torch.int32)


@functools.cache
def _expanded_bytes(device: torch.device) -> Tensor:
    """For every byte its eight bits as eight bools, read as one int64 (bool 0 is the lowest bit on every machine)."""
    lanes = torch.arange(8, device=device)
    return (((torch.arange(256, device=device).unsqueeze(1) >> lanes) & 1) != 0).view(torch.int64).view(-1)


def unpack_reference(bits: Tensor, K: int) -> Tensor:
    # Eight coordinates per look-up: an int32 temporary per coordinate, as in unpack_aten, is 20 times slower on a CPU.
    if sys.byteorder != "little" or bits.numel() == 0:
        return unpack_aten(bits, K).contiguous()
    groups = _expanded_bytes(bits.device).index_select(0, bits.view(torch.uint8).view(-1).int())
    return groups.view(torch.bool).view(bits.shape[0], -1)[:, :K].contiguous()


def popcount_reference(bits: Tensor) -> Tensor:
    """Ones in every word, as int64 of the same shape."""
    x = bits.to(torch.int64) & 0xFFFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) & 0xFFFFFFFF) >> 24


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _pack_kernel(mask, bits, K, W, stride_row, stride_column, CHUNKS: tl.constexpr, BLOCK_W: tl.constexpr):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    word = (tl.program_id(0) % CHUNKS) * BLOCK_W + tl.arange(0, BLOCK_W)
    lane = tl.arange(0, 32)
    column = word[:, None] * 32 + lane[None, :]
    bit = tl.load(mask + row * stride_row + column.to(tl.int64) * stride_column, mask=column < K, other=0)
    tl.store(bits + row * W + word, tl.sum(bit.to(tl.int32) << lane[None, :], axis=1), mask=word < W)


@jit
def _unpack_kernel(bits, mask, K, W, CHUNKS: tl.constexpr, BLOCK_W: tl.constexpr):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    word = (tl.program_id(0) % CHUNKS) * BLOCK_W + tl.arange(0, BLOCK_W)
    lane = tl.arange(0, 32)
    column = word[:, None] * 32 + lane[None, :]
    bit = (tl.load(bits + row * W + word, mask=word < W, other=0)[:, None] >> lane[None, :]) & 1
    tl.store(mask + row * K + column, bit != 0, mask=column < K)


@jit
def _row_popcounts_kernel(bits, counts, W, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    ones = tl.zeros([BLOCK], tl.int32)
    for first in range(0, W, BLOCK):
        ones += popcount(tl.load(bits + row * W + first + index, mask=first + index < W, other=0))
    tl.store(counts + row, tl.sum(ones, axis=0).to(tl.int64))


def _pack_triton(mask: Tensor) -> Tensor:
    rows, K = mask.shape
    bits = mask.new_empty((rows, words(K)), dtype=torch.int32)
    grid = row_grid(rows, K)
    launch(
        _pack_kernel,
        grid.tiles,
        mask,
        mask,
        bits,
        K,
        words(K),
        *mask.stride(),
        CHUNKS=grid.chunks,
        BLOCK_W=grid.BLOCK_W,
        num_warps=grid.num_warps,
    )
    return bits


def _unpack_triton(bits: Tensor, K: int) -> Tensor:
    mask = bits.new_empty((bits.shape[0], K), dtype=torch.bool)
    grid = row_grid(bits.shape[0], K)
    launch(
        _unpack_kernel,
        grid.tiles,
        bits,
        bits,
        mask,
        K,
        words(K),
        CHUNKS=grid.chunks,
        BLOCK_W=grid.BLOCK_W,
        num_warps=grid.num_warps,
    )
    return mask


def _row_popcounts_triton(bits: Tensor) -> Tensor:
    rows, W = bits.shape
    counts = bits.new_empty((rows,), dtype=torch.int64)
    block = min(power_of_two(W), 256)
    launch(_row_popcounts_kernel, rows, bits, bits, counts, W, BLOCK=block, num_warps=max(block // 128, 1))
    return counts


# --- operations ------------------------------------------------------------------------------------------------------


def _pack_fake(mask: Tensor) -> Tensor:
    _check_mask(mask)
    return mask.new_empty((mask.shape[0], words(mask.shape[1])), dtype=torch.int32)


@operation("pack_bits", fake=_pack_fake)
def _pack_op(mask: Tensor) -> Tensor:
    _check_mask(mask)
    if use_triton(mask):
        return _pack_triton(mask)
    return pack_reference(mask)


def _unpack_fake(bits: Tensor, K: int) -> Tensor:
    _check_words(bits, K)
    return bits.new_empty((bits.shape[0], K), dtype=torch.bool)


@operation("unpack_bits", fake=_unpack_fake)
def _unpack_op(bits: Tensor, K: int) -> Tensor:
    _check_words(bits, K)
    if use_triton(bits):
        return _unpack_triton(bits, K)
    return unpack_reference(bits, K)


def _row_popcounts_fake(bits: Tensor) -> Tensor:
    _check_words(bits)
    return bits.new_empty((bits.shape[0],), dtype=torch.int64)


@operation("row_popcounts", fake=_row_popcounts_fake)
def _row_popcounts_op(bits: Tensor) -> Tensor:
    _check_words(bits)
    if use_triton(bits):
        return _row_popcounts_triton(bits)
    return popcount_reference(bits).sum(1)


# --- public ----------------------------------------------------------------------------------------------------------


def pack(mask: Tensor) -> Tensor:
    """Packed int32 [rows, words(K)] of a bool mask [rows, K] of any strides."""
    return _pack_op(mask)


def unpack(bits: Tensor, K: int) -> Tensor:
    """bool [rows, K] of packed bits, as one opaque operation (see `unpack_aten` for the form that fuses)."""
    return _unpack_op(bits, K)


def row_counts(bits: Tensor, K: int, invert: bool = False) -> Tensor:
    """int64 [rows]: active coordinates of every row, or pruned ones with `invert`."""
    _check_words(bits, K)
    counts = _row_popcounts_op(bits)
    return K - counts if invert else counts


def count(bits: Tensor) -> Tensor:
    """Number of active coordinates, an int64 scalar tensor."""
    return _row_popcounts_op(bits).sum()
