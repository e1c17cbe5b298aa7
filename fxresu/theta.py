"""One update of θ over all managed weights, after the backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fxresu.kernels import Rule, ThetaOperands, theta_steps_

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


def _operands(managed: Managed, grad: Tensor) -> ThetaOperands:
    entry = managed.entry
    return ThetaOperands(
        grad,
        entry.bits,
        entry.row_start,
        entry.columns,
        entry.k,
        weight=None if entry.packed else entry.matrix(managed.parameter),
        low=None if entry.low is None else entry.matrix(entry.low),
        theta=None if entry.theta is None else entry.theta.detach(),
        m=entry.m,
        v=entry.v,
        m_scale=entry.m_scale,
        v_scale=entry.v_scale,
    )


@torch.no_grad()
def step_theta(
    weights: Iterable[Managed], config: CycleConfig, lr: float, step: int, grad_scale: float | Tensor = 1.0
) -> Tensor:
    """Update θ by the configured rule and write Φ(θ) into the weights; frees dθ.

    Args:
        step: 1 for the first update since θ was initialised.
        grad_scale: multiplies dθ (clipping, unscaling); a float32 tensor of one element on the device is not waited
            for.

    Returns:
        The kernels' statistics, float32 [weights with a gradient, 4], still on the device.

    Raises:
        PhaseError: if no weight has a gradient: the model was run in another phase, or not at all.
    """
    stepped = [(m, grad) for m in weights if (grad := m.entry.grad_of_theta()) is not None]
    if not stepped:
        raise PhaseError(
            "no managed weight has a gradient of θ: run forward and backward of the transformed model itself in RESU,"
            " with gradients enabled, before the step"
        )
    beta1, beta2 = config.resolved_theta_betas()
    rule = Rule(
        config.rule, lr, beta1, beta2, config.theta_eps, config.theta_weight_decay, step, config.consistency,
        config.select, config.top,
    )  # fmt: skip
    scale = grad_scale if isinstance(grad_scale, Tensor) else None
    factor = 1.0 if scale is not None else float(grad_scale)
    stats = theta_steps_([_operands(m, grad) for m, grad in stepped], rule, factor, scale)
    for managed, _ in stepped:
        entry = managed.entry
        entry.anchor.grad = None
        if entry.low is not None:
            entry.low_version = managed.parameter._version  # the step has written both
    return stats
