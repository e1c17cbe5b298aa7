"""Training in a phase, and all that a change of phase may touch, for the tests of transitions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fxresu_testing import loss_of
from torch import nn

from fxresu.config import CycleConfig
from fxresu.model_state import managed_weights, state_of
from fxresu.phases import current_phase
from fxresu.theta import step_theta

ADAM = {"rule": "adam", "betas": (0.9, 0.999)}
CONFIG = CycleConfig(rule="adam")


def batch(seed: int = 1) -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    steps: int = 1,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Ordinary steps; in RESU θ is stepped as well, by Adam."""
    record = state_of(model)
    for i in range(steps):
        if optimizer is not None:
            optimizer.zero_grad()
        loss_of(model(batch(i))).backward()
        if optimizer is not None:
            optimizer.step()
        if record.state.mode == "resu":
            record.theta_steps += 1
            step_theta(managed_weights(model).values(), CONFIG, 1e-2, record.theta_steps)
        after()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Copies of everything that a transition may touch."""
    record = state_of(model)
    found = {"phase": current_phase(model), "mode": record.state.mode, "base": record.base}
    found |= {k: getattr(record, k) for k in ("nominal_sparsity", "capacity_sparsity", "theta_steps", "rotation")}
    for name, m in managed_weights(model).items():
        found[name] = m.entry.dense(m.parameter).clone()
        for key in (*m.entry.TENSORS, "anchor"):
            value = getattr(m.entry, key)
            found[name, key] = None if value is None else value.detach().clone()
        found[name, "shape"] = m.entry.theta_shape
        if optimizer is not None:
            state = optimizer.state.get(m.parameter, {})
            found[name, "state"] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    return found


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return a == b
