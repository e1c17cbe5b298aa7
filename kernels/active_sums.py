"""Sums over the active values of a matrix, by rows, in one launch: what a mean and a standard deviation are made of."""

import torch
from torch import Tensor

from ._check import check_device, check_matrix
from ._registry import operation
from ._triton import jit, launch, tl, use_triton

_BLOCK = 1024


# --- reference -------------------------------------------------------------------------------------------------------


def active_sums_reference(weight: Tensor, mask: Tensor, mean: Tensor | None) -> Tensor:
    value = weight.float() if mean is None else (weight.float() - mean.float()).square()
    return torch.stack((mask.sum(1).double(), value.masked_fill(~mask, 0.0).sum(1).double()))


# --- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _active_sums_kernel(
    weight, mask, mean, sums, K, stride_row, stride_column, SQUARES: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, K, BLOCK):
        column = first + index
        active = tl.load(mask + row * K + column, mask=column < K, other=0) != 0
        place = weight + row * stride_row + column.to(tl.int64) * stride_column
        value = tl.load(place, mask=active, other=0).to(tl.float32)
        if SQUARES:
            value = value - tl.load(mean).to(tl.float32)
            value = value * value
        total += tl.where(active, value, 0.0)
        count += active.to(tl.int32)
    tl.store(sums + row, tl.sum(count, axis=0).to(tl.float64))
    tl.store(sums + tl.num_programs(0) + row, tl.sum(total, axis=0).to(tl.float64))


def _active_sums_triton(weight: Tensor, mask: Tensor, mean: Tensor | None) -> Tensor:
    sums = torch.empty((2, weight.shape[0]), dtype=torch.float64, device=weight.device)
    launch(
        _active_sums_kernel,
        weight.shape[0],
        weight,
        weight,
        mask,
        sums if mean is None else mean,
        sums,
        weight.shape[1],
        *weight.stride(),
        SQUARES=mean is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return sums


# --- operation -------------------------------------------------------------------------------------------------------


def _check(weight: Tensor, mask: Tensor, mean: Tensor | None) -> None:
    check_matrix("weight", weight, strided=True)
    if mask.dtype != torch.bool or mask.shape != weight.shape or not mask.is_contiguous():
        raise ValueError(
            f"mask must be contiguous bool of shape {tuple(weight.shape)}, not {mask.dtype} of {tuple(mask.shape)}"
        )
    check_device("mask", mask, weight)
    if mean is not None:
        if mean.numel() != 1 or mean.dtype != torch.float64:
            raise ValueError(f"mean must be one float64, not {mean.dtype} of shape {tuple(mean.shape)}")
        check_device("mean", mean, weight)


def _active_sums_fake(weight: Tensor, mask: Tensor, mean: Tensor | None) -> Tensor:
    _check(weight, mask, mean)
    return weight.new_empty((2, weight.shape[0]), dtype=torch.float64)


@operation("active_sums", fake=_active_sums_fake)
def _active_sums_op(weight: Tensor, mask: Tensor, mean: Tensor | None) -> Tensor:
    _check(weight, mask, mean)
    if use_triton(weight):
        return _active_sums_triton(weight, mask, mean)
    return active_sums_reference(weight, mask, mean)


def active_sums(weight: Tensor, mask: Tensor, mean: Tensor | None = None) -> Tensor:
    """float64 [2, rows]: of every row how many values are active, and their sum, or the sum of (value - mean)^2.

    weight: float [rows, K], any strides, taken in float32. mask: contiguous bool [rows, K], True = active. mean: one
    float64 on the device. A row is summed in float32, in an order that does not change from call to call.
    """
    with torch.no_grad():
        return _active_sums_op(weight.detach(), mask, mean)
