"""How far results are from float64 references."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxresu.kernels import coordinates


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest absolute value of `want`, in float64; inf if `got` is not finite."""
    got = got.detach().double()
    if not bool(got.isfinite().all()):
        return math.inf
    scale = float(want.detach().double().abs().max())
    return float((got - want.detach().double()).abs().max()) / max(scale, 1e-300)


def distance(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of `want`: for what went through many layers."""
    return float((got.detach().double() - want).norm() / want.norm())


def gathered(entry: Any, dense: Tensor) -> Tensor:
    """Φᵀ of a dense [rows, K] matrix by the definition of θ's layout; `entry`: the record of a managed weight."""
    source, slot = coordinates(entry.bits, entry.row_start, entry.columns, entry.k, shape=entry.theta_shape)
    theta = torch.zeros(entry.theta_shape, dtype=dense.dtype, device=dense.device)
    theta.view(-1)[slot] = dense.reshape(-1)[source]
    return theta
