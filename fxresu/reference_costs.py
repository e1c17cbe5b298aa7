"""Memory that the PyTorch references of fxresu's operations take while they run on a CPU, beside their results.

On a GPU the operations are Triton kernels that take none. The counts follow `kernels.layout.positions`: the mask as
bools, where its entries are as int64, and the values that are moved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxresu.kernels.theta_rules import ROUNDED

from .model_state import Managed

_POSITION = 8  # bytes of an int64


def reference_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes at the highest point within one call of an fxresu operation on the CPU, without its result."""
    count = _COSTS.get(func._schema.name.partition("::")[2])
    return 0 if count is None else count(*args)


def entries_of(theta: Tensor) -> int:
    """Entries of a theta-like tensor, padding included."""
    return theta.numel()


def _gather(dense: Tensor, bits: Tensor, row_start: Any, columns: Any, rows: int, cols: int, *rest: Any) -> int:
    n = rows * cols
    return _POSITION * n * (2 if columns is not None else 1) + dense.element_size() * n


def _gather_add(out: Tensor, dense: Tensor, bits: Tensor, row_start: Any, columns: Any) -> int:
    n = entries_of(out)
    return _POSITION * n * (2 if columns is not None else 1) + 2 * dense.element_size() * n


def _scatter(theta: Tensor, *rest: Any) -> int:
    return (_POSITION + theta.element_size()) * entries_of(theta)


def _scatter_into(weight: Tensor, theta: Tensor, *rest: Any) -> int:
    return _scatter(theta)


def _compose(active: Tensor, theta: Tensor, *rest: Any) -> int:
    n = max(active.numel(), theta.numel())
    return (2 * _POSITION + max(active.element_size(), theta.element_size())) * n


def _mask(tensor: Tensor, bits: Tensor) -> int:
    return 32 * bits.numel() * 2


_COSTS: dict[str, Callable[..., int]] = {
    "gather": _gather,
    "gather_add_": _gather_add,
    "scatter": _scatter,
    "scatter_": _scatter_into,
    "compose": _compose,
    "compose_quantized": _compose,
    "apply_mask_": _mask,
}


# Bytes a candidate at the highest point of `theta_rules.theta_step_reference`, with float32 moments.
_STEP = {"selective": 49, "adam": 36, "momentum": 28, "sgd": 24}
# The same where a θ in bfloat16 is rounded, and what Philox takes for each of the entries that are rounded together.
_ROUNDING, _PHILOX = {"selective": 30, "adam": 24, "momentum": 16, "sgd": 12}, 120


def theta_step_bytes(weights: Iterable[Managed], rule: str, device: str) -> int:
    """Bytes that one update of θ takes beside its operands.

    On a CPU weights are updated one at a time; on a GPU weights of one shape together, and only the selective rule
    needs more than a few words a tile: a byte a candidate, which says what may be selected.
    """
    sizes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    rounds = False
    for managed in weights:
        sizes[(*managed.entry.shape, *managed.entry.theta_shape)].append(prod(managed.entry.theta_shape))
        rounds |= managed.entry.theta is not None and managed.entry.theta.dtype == torch.bfloat16
    if not sizes:
        return 0
    if device != "cpu":
        return sum(map(sum, sizes.values())) if rule == "selective" else 0
    largest = max(max(group) for group in sizes.values())
    rounding = _ROUNDING[rule] * largest + _PHILOX * min(largest, ROUNDED) if rounds else 0
    return max(_STEP[rule] * largest, rounding)
