"""Exact k-th largest magnitude without a sort and without waiting for the device.

Magnitudes are compared by their bit pattern: for floats of one sign it orders like the values, and NaN orders above
infinity.
"""

import torch
from torch import Tensor

from ._check import check_device, check_float
from ._registry import operation
from ._triton import use_triton

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
            raise ValueError(f"mask must be bool of shape {tuple(values.shape)}, not {mask.dtype} of "
                             f"{tuple(mask.shape)}")
        check_device("mask", mask, values)


@operation("kth_largest", fake=_kth_largest_fake)
def _kth_largest_op(values: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    _check(values, k, mask)
    if use_triton(values):
        raise NotImplementedError
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
