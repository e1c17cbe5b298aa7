"""One update of θ over all managed weights, after the backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fxresu.kernels import theta_step_

from .config import CycleConfig
from .errors import PhaseError
from .model_state import Managed


def theta_gradients(weights: Iterable[Managed]) -> list[Tensor]:
    """dθ of every weight that has one, as accumulated so far."""
    return [g for m in weights if (g := m.entry.grad_of_theta()) is not None]


def clear_theta_gradients(weights: Iterable[Managed]) -> None:
    """Free dθ."""
    for managed in weights:
        if managed.entry.anchor is not None:
            managed.entry.anchor.grad = None


@torch.no_grad()
def step_theta(
    weights: Iterable[Managed], config: CycleConfig, lr: float, step: int, grad_scale: float = 1.0
) -> list[Tensor]:
    """Update θ by the configured rule and write Φ(θ) into the weights; frees dθ.

    Args:
        step: 1 for the first update since θ was initialised.
        grad_scale: multiplies dθ (clipping, unscaling).

    Returns:
        The kernels' statistics, float32 [4] a weight, still on the device.

    Raises:
        PhaseError: if no weight has a gradient: the model was run in another phase, or not at all.
    """
    stats = []
    for managed in weights:
        entry = managed.entry
        grad = entry.grad_of_theta()
        if grad is None:
            continue
        stats.append(
            theta_step_(
                None if entry.packed else entry.matrix(managed.parameter),
                None if entry.theta is None else entry.theta.detach(),
                entry.m,
                entry.v,
                grad,
                entry.bits,
                entry.row_start,
                entry.columns,
                rule=config.rule,
                lr=lr,
                betas=config.resolved_theta_betas(),
                eps=config.theta_eps,
                weight_decay=config.theta_weight_decay,
                step=step,
                consistency=config.consistency,
                select=config.select,
                top=config.top,
                grad_scale=grad_scale,
                K=entry.k,
            )
        )
        entry.anchor.grad = None
    if not stats:
        raise PhaseError(
            "no managed weight has a gradient of θ: run forward and backward of the transformed model itself in RESU,"
            " with gradients enabled, before the step"
        )
    return stats
