"""`fxresu::slope_tile_`: the slope of a cross-entropy over some words of the vocabulary, in place of their logits.

(softmax - one-hot) * factor for every token, where the softmax' denominator is known. Every logit is read once and
written once; the product before it and those after it are the caller's.
"""

import torch
from torch import Tensor

from ._check import check_device, check_float, check_matrix
from ._registry import operation
from ._triton import jit, launch, tl, use_triton

_BLOCK = 2048  # words of a program

# --- reference -------------------------------------------------------------------------------------------------------


def slope_tile_reference(logits: Tensor, denominator: Tensor, factor: Tensor, target: Tensor, start: int) -> Tensor:
    """The slope, in the logits' dtype."""
    share = (logits.to(denominator.dtype) - denominator[:, None]).exp()
    word = torch.arange(start, start + logits.shape[1], device=logits.device)
    return ((share - (word == target[:, None]).to(share.dtype)) * factor[:, None]).to(logits.dtype)


# --- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _slope_tile_kernel(logits, denominator, factor, target, words, start, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < words
    line = logits + row * words
    # The target's place among these words; none of them if it is elsewhere.
    place = tl.load(target + row) - start
    place = tl.where((place >= 0) & (place < words), place, -1).to(tl.int32)
    by = tl.load(factor + row)
    value = tl.load(line + column, mask=inside, other=0).to(WIDE)
    share = tl.exp(value - tl.load(denominator + row))
    slope = (share - tl.where(column == place, 1.0, 0.0)) * by
    tl.store(line + column, slope.to(logits.dtype.element_ty), mask=inside)


# --- operation -------------------------------------------------------------------------------------------------------


def _check(logits: Tensor, denominator: Tensor, factor: Tensor, target: Tensor) -> None:
    check_matrix("logits", logits)
    check_float("logits.dtype", logits.dtype)
    if not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous, not of strides {logits.stride()}")
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    vectors = {"denominator": (denominator, wide), "factor": (factor, wide), "target": (target, torch.int64)}
    for name, (one, dtype) in vectors.items():
        if one.shape != (rows,) or one.dtype != dtype or not one.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} [{rows}], not {one.dtype} {tuple(one.shape)}")
        check_device(name, one, logits)


def _fake(logits: Tensor, denominator: Tensor, factor: Tensor, target: Tensor, start: int) -> None:
    _check(logits, denominator, factor, target)


@operation("slope_tile_", ("logits",), fake=_fake)
def _slope_tile_op(logits: Tensor, denominator: Tensor, factor: Tensor, target: Tensor, start: int) -> None:
    _check(logits, denominator, factor, target)
    if not use_triton(logits):
        logits.copy_(slope_tile_reference(logits, denominator, factor, target, start))
        return
    rows, words = logits.shape
    launch(
        _slope_tile_kernel,
        (rows, -(-words // _BLOCK)),
        logits,
        logits,
        denominator,
        factor,
        target,
        words,
        start,
        WIDE=tl.float64 if logits.dtype == torch.float64 else tl.float32,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def slope_tile_(logits: Tensor, denominator: Tensor, factor: Tensor, target: Tensor, start: int) -> Tensor:
    """(softmax - one-hot) * factor over the logits of words start ... start + words - 1, in place; as the operation
    `fxresu::slope_tile_`. Not differentiable.

    Args:
        logits: [N, words], any float dtype, contiguous.
        denominator: [N], float32 (float64 of float64): log of the summed exponentials over the whole vocabulary.
        factor: [N] of that dtype; 0 for tokens that do not count.
        target: int64 [N], words of the whole vocabulary.

    Raises ValueError for operands that do not fit, before anything is written.
    """
    with torch.no_grad():
        torch.ops.fxresu.slope_tile_(logits, denominator, factor, target, start)
    return logits
