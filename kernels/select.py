"""Exact k-th largest magnitude without a sort and without waiting for the device.

Magnitudes are compared by their bit pattern: for floats of one sign it orders like the values, and NaN orders above
infinity.
"""

import torch
from torch import Tensor

from ._check import check_device, check_float
from ._radix import BINS, DIGITS, decided_digits, digit_counts, magnitude_key, threshold_key
from ._registry import operation
from ._triton import jit, launch, processors, tl, use_triton

FRACTION_BITS = 30


def fraction_units(fraction: float) -> int:
    """A fraction in units of 2^-30, so that budgets are integer arithmetic and agree on every backend."""
    return round(fraction * (1 << FRACTION_BITS))


def budget(population: int, units: int) -> int:
    """round(fraction * population), at least 1 unless the fraction is 0. `units` from `fraction_units`."""
    if units == 0:
        return 0
    return max(1, (population * units + (1 << (FRACTION_BITS - 1))) >> FRACTION_BITS)


# --- reference -------------------------------------------------------------------------------------------------------


def magnitude_keys(values: Tensor) -> Tensor:
    """Integers that order like |values| (int64 for float64, else int32 of the float32 value)."""
    if values.dtype == torch.float64:
        return values.contiguous().view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return values.to(torch.float32).contiguous().view(torch.int32) & 0x7FFFFFFF


def kth_largest_reference(values: Tensor, k: int, mask: Tensor | None) -> Tensor:
    keys = magnitude_keys(values.reshape(-1) if mask is None else values[mask])
    if k <= 0:
        return values.new_full((), float("inf"))
    if k > keys.numel():
        return values.new_zeros(())
    key = keys.kthvalue(keys.numel() - k + 1).values
    return key.view(torch.float64 if key.dtype == torch.int64 else torch.float32).to(values.dtype)


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _count_digits_kernel(
    values, mask, k, counts, n, DIGIT: tl.constexpr, DOUBLE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    shift: tl.constexpr = (56 if DOUBLE else 24) - 8 * DIGIT
    prefix = decided_digits(counts, tl.load(k), DIGIT)
    found = tl.zeros([256], tl.int32)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        index = first + tl.arange(0, BLOCK)
        keep = index < n
        key = magnitude_key(tl.load(values + index, mask=keep, other=0), DOUBLE)
        if HAS_MASK:
            keep = keep & (tl.load(mask + index, mask=keep, other=0) != 0)
        if DIGIT > 0:
            keep = keep & ((key >> (shift + 8)) == prefix.to(key.dtype))
        found += digit_counts(((key >> shift) & 255).to(tl.int32), keep)
    tl.atomic_add(counts + DIGIT * 256 + tl.arange(0, 256), found.to(tl.int64))


@jit
def _kth_value_kernel(k, counts, out, DIGITS: tl.constexpr, DOUBLE: tl.constexpr):
    rank = tl.load(k)
    key = threshold_key(counts, rank, DIGITS, DOUBLE)
    if DOUBLE:
        value = tl.where(rank <= 0, 0x7FF0000000000000, key).to(tl.float64, bitcast=True)
    else:
        value = tl.where(rank <= 0, 0x7F800000, key).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(out, value.to(out.dtype.element_ty))


def _kth_largest_triton(values: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    out = values.new_empty(())
    values = values.contiguous()
    mask = None if mask is None else mask.contiguous()
    digits, double = DIGITS[values.dtype], values.dtype == torch.float64
    counts = torch.zeros((digits, BINS), dtype=torch.int64, device=values.device)
    block, n = 2048, values.numel()
    programs = min((n + block - 1) // block, 8 * processors(values))
    for digit in range(digits):
        launch(
            _count_digits_kernel,
            programs,
            values,
            values,
            values if mask is None else mask,
            k,
            counts,
            n,
            DIGIT=digit,
            DOUBLE=double,
            HAS_MASK=mask is not None,
            BLOCK=block,
            num_warps=4,
        )
    launch(_kth_value_kernel, 1, values, k, counts, out, DIGITS=digits, DOUBLE=double, num_warps=1)
    return out


# --- operation -------------------------------------------------------------------------------------------------------


def _kth_largest_fake(values: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    _check(values, k, mask)
    return values.new_empty(())


def _check(values: Tensor, k: Tensor, mask: Tensor | None) -> None:
    check_float("values.dtype", values.dtype)
    if k.dim() != 0 or k.dtype != torch.int64:
        raise ValueError(f"k must be an int or an int64 scalar tensor, not {k.dtype} of shape {tuple(k.shape)}")
    check_device("k", k, values)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != values.shape:
            raise ValueError(
                f"mask must be bool of shape {tuple(values.shape)}, not {mask.dtype} of {tuple(mask.shape)}"
            )
        check_device("mask", mask, values)


@operation("kth_largest", fake=_kth_largest_fake)
def _kth_largest_op(values: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    _check(values, k, mask)
    if use_triton(values):
        return _kth_largest_triton(values, k, mask)
    return kth_largest_reference(values, int(k), mask)


def kth_largest(values: Tensor, k: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """The k-th largest of |values| among `mask`, exact, a scalar tensor of the dtype of `values`.

    values: any shape, float. k: int, or an int64 scalar tensor on the same device (it is not read on the host).
    mask: bool of the same shape, None for all. k = 0 gives +inf (nothing reaches it); k beyond the population gives 0
    (everything reaches it). NaN counts as larger than infinity.
    """
    if not isinstance(k, Tensor):
        k = torch.full((), k, dtype=torch.int64, device=values.device)
    with torch.no_grad():
        return torch.ops.fxresu.kth_largest(values, k, mask)
