"""The change of mask: losers to zero, survivors unchanged, resurrected coordinates from a theta-like tensor."""

import torch
from torch import Tensor

from ._check import check_bits, check_matrix, check_theta
from ._registry import operation, unobserved, written
from ._tiles import popcount, row_grid
from ._triton import jit, launch, processors, tl, use_triton
from .bits import popcount_reference, unpack_reference
from .phi import scatter_into_reference
from .phi_kernels import scatter_triton

# --- reference -------------------------------------------------------------------------------------------------------


def commit_reference(
    tensor: Tensor,
    old_bits: Tensor,
    new_bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    candidates: Tensor | None,
) -> None:
    if candidates is not None:
        # Every candidate is written, then what the new mask drops is zeroed: the rest are the resurrected ones.
        scatter_into_reference(tensor, candidates, old_bits, row_start, columns)
    apply_mask_reference(tensor, new_bits)


def apply_mask_reference(tensor: Tensor, bits: Tensor) -> None:
    tensor.masked_fill_(unpack_reference(bits, tensor.shape[1]).logical_not_(), 0)


def transition_counts_reference(old_bits: Tensor, new_bits: Tensor) -> Tensor:
    masks = (old_bits & new_bits, new_bits & ~old_bits, old_bits & ~new_bits, old_bits | new_bits)
    return torch.stack([popcount_reference(mask).sum() for mask in masks])


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _apply_mask_kernel(tensor, bits, K, W, CHUNKS: tl.constexpr, BLOCK_W: tl.constexpr):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    word = (tl.program_id(0) % CHUNKS) * BLOCK_W + tl.arange(0, BLOCK_W)
    lane = tl.arange(0, 32)
    column = word[:, None] * 32 + lane[None, :]
    bit = (tl.load(bits + row * W + word, mask=word < W, other=0)[:, None] >> lane[None, :]) & 1
    zeros = tl.zeros([BLOCK_W, 32], tensor.dtype.element_ty)
    tl.store(tensor + row * K + column, zeros, mask=(bit == 0) & (column < K))


@jit
def _transition_kernel(old_bits, new_bits, counts, n, BLOCK: tl.constexpr):
    kept = tl.zeros([BLOCK], tl.int32)
    resurrected = tl.zeros([BLOCK], tl.int32)
    dropped = tl.zeros([BLOCK], tl.int32)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        index = first + tl.arange(0, BLOCK)
        old = tl.load(old_bits + index, mask=index < n, other=0)
        new = tl.load(new_bits + index, mask=index < n, other=0)
        kept += popcount(old & new)
        resurrected += popcount(new & ~old)
        dropped += popcount(old & ~new)
    a = tl.sum(kept.to(tl.int64), axis=0)
    b = tl.sum(resurrected.to(tl.int64), axis=0)
    c = tl.sum(dropped.to(tl.int64), axis=0)
    tl.atomic_add(counts, a)
    tl.atomic_add(counts + 1, b)
    tl.atomic_add(counts + 2, c)
    tl.atomic_add(counts + 3, a + b + c)


def _commit_triton(
    tensor: Tensor,
    old_bits: Tensor,
    new_bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    candidates: Tensor | None,
) -> None:
    if candidates is not None:
        scatter_triton(tensor, candidates, old_bits, row_start, columns, active=False, fill=False)
    _apply_mask_triton(tensor, new_bits)


def _apply_mask_triton(tensor: Tensor, bits: Tensor) -> None:
    grid = row_grid(*tensor.shape)
    launch(
        _apply_mask_kernel,
        grid.tiles,
        tensor,
        tensor,
        bits,
        tensor.shape[1],
        bits.shape[1],
        CHUNKS=grid.chunks,
        BLOCK_W=grid.BLOCK_W,
        num_warps=grid.num_warps,
    )


def _transition_counts_triton(old_bits: Tensor, new_bits: Tensor) -> Tensor:
    counts = old_bits.new_zeros((4,), dtype=torch.int64)
    n = old_bits.numel()
    programs = min((n + 1023) // 1024, 8 * processors(old_bits))
    launch(_transition_kernel, programs, old_bits, old_bits, new_bits, counts, n, BLOCK=1024, num_warps=4)
    return counts


# --- operations ------------------------------------------------------------------------------------------------------


def _check_commit(
    tensor: Tensor,
    old_bits: Tensor,
    new_bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    candidates: Tensor | None,
) -> None:
    check_matrix("tensor", tensor)
    rows, K = tensor.shape
    check_bits("old_bits", old_bits, rows, K, tensor)
    check_bits("new_bits", new_bits, rows, K, tensor)
    if candidates is not None:
        check_theta("candidates", candidates, rows, row_start, columns, tensor, K)


@operation("commit_", ("tensor",), fake=_check_commit)
def _commit_op(
    tensor: Tensor,
    old_bits: Tensor,
    new_bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    candidates: Tensor | None,
) -> None:
    _check_commit(tensor, old_bits, new_bits, row_start, columns, candidates)
    if use_triton(tensor):
        _commit_triton(tensor, old_bits, new_bits, row_start, columns, candidates)
    else:
        commit_reference(tensor, old_bits, new_bits, row_start, columns, candidates)


def _check_apply_mask(tensor: Tensor, bits: Tensor) -> None:
    check_matrix("tensor", tensor)
    check_bits("bits", bits, tensor.shape[0], tensor.shape[1], tensor)


@operation("apply_mask_", ("tensor",), fake=_check_apply_mask)
def _apply_mask_op(tensor: Tensor, bits: Tensor) -> None:
    _run_apply_mask(tensor, bits)


def _run_apply_mask(tensor: Tensor, bits: Tensor) -> None:
    _check_apply_mask(tensor, bits)
    if use_triton(tensor):
        _apply_mask_triton(tensor, bits)
    else:
        apply_mask_reference(tensor, bits)


def _transition_counts_fake(old_bits: Tensor, new_bits: Tensor) -> Tensor:
    _check_transition(old_bits, new_bits)
    return old_bits.new_empty((4,), dtype=torch.int64)


def _check_transition(old_bits: Tensor, new_bits: Tensor) -> None:
    if old_bits.dim() != 2 or not old_bits.is_contiguous():
        raise ValueError(f"old_bits must be a contiguous matrix of words, not of shape {tuple(old_bits.shape)}")
    check_bits("old_bits", old_bits, old_bits.shape[0], old_bits.shape[1] * 32, old_bits)
    check_bits("new_bits", new_bits, old_bits.shape[0], old_bits.shape[1] * 32, old_bits)


@operation("transition_counts", fake=_transition_counts_fake)
def _transition_counts_op(old_bits: Tensor, new_bits: Tensor) -> Tensor:
    _check_transition(old_bits, new_bits)
    if use_triton(old_bits):
        return _transition_counts_triton(old_bits, new_bits)
    return transition_counts_reference(old_bits, new_bits)


# --- public ----------------------------------------------------------------------------------------------------------


def commit_(
    tensor: Tensor,
    old_bits: Tensor,
    new_bits: Tensor,
    row_start: Tensor | None = None,
    columns: Tensor | None = None,
    candidates: Tensor | None = None,
) -> Tensor:
    """Move `tensor` [rows, K] (a weight or its optimizer state) from one mask to the next, in place.

    Not in the new mask: 0. In both: unchanged. New only: its value in `candidates` (theta-like, in the layout that
    row_start and columns describe for the *old* mask) where given and where that layout covers it, else unchanged.
    Returns tensor.
    """
    with torch.no_grad():
        torch.ops.fxresu.commit_(tensor, old_bits, new_bits, row_start, columns, candidates)
    return tensor


def apply_mask_(tensor: Tensor, bits: Tensor) -> Tensor:
    """Set `tensor` [rows, K] to exactly 0 wherever the bit is 0 (also where it was not finite), in place."""
    with torch.no_grad():
        if unobserved(tensor, bits):  # every weight's gradient comes by in a sparse step
            _run_apply_mask(tensor, bits)
            written(tensor)
        else:
            torch.ops.fxresu.apply_mask_(tensor, bits)
    return tensor


def transition_counts(old_bits: Tensor, new_bits: Tensor) -> Tensor:
    """int64 [4] on the device: coordinates (kept, resurrected, dropped, in the union of both masks)."""
    return torch.ops.fxresu.transition_counts(old_bits, new_bits)
