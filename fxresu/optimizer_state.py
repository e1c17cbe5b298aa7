"""The optimizer's state of managed weights: found, dropped, carried across mask changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxresu.kernels import apply_mask_, commit_

from .errors import ConfigError
from .managed import ManagedWeight
from .model_state import Managed

# What a state tensor of the parameter's shape is, by the key that torch.optim gives it.
_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")


def check_holds(optimizer: Optimizer | None, weights: Iterable[Managed]) -> None:
    """ConfigError unless the optimizer holds the (trainable) managed weights. None passes: it has no state."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [m.entry.fqn for m in weights if m.parameter.requires_grad and id(m.parameter) not in held]
    if missing:
        raise ConfigError(
            f"optimizer={type(optimizer).__name__} does not hold {len(missing)} managed weights, such as"
            f" {missing[0]!r}; build it from model.parameters() of this very model"
        )


def state_tensors(optimizer: Optimizer | None, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """State tensors of the parameter's shape: those that hold a value for every coordinate."""
    if optimizer is None:
        return
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and parameter.dim() > 0:
            yield key, value


def _in_place(entry: ManagedWeight, tensor: Tensor, change) -> None:
    """Run `change` on the [rows, K] view of a state tensor, through a copy if it is not contiguous."""
    if tensor.is_contiguous():
        change(tensor.view(entry.rows, entry.k))
        return
    copy = tensor.contiguous()
    change(copy.view(entry.rows, entry.k))
    tensor.copy_(copy)


def mask_state(optimizer: Optimizer | None, managed: Managed) -> None:
    """Zero the state at pruned coordinates, so that the optimizer leaves them exactly where they are."""
    for _, tensor in state_tensors(optimizer, managed.parameter):
        _in_place(managed.entry, tensor, lambda t: apply_mask_(t, managed.entry.bits))


@dataclasses.dataclass(frozen=True)
class DroppedState:
    """What is needed to rebuild a dropped state: the kind of every tensor, not its values."""

    shaped: dict[str, torch.dtype]
    scalars: dict[str, object]


def drop_state(optimizer: Optimizer | None, managed: Managed) -> DroppedState | None:
    """Delete the state of a weight; None if there was none.

    State that is neither of the weight's shape nor a scalar (factored statistics) goes too; the optimizer builds it
    afresh at its next step.
    """
    if optimizer is None or not (state := optimizer.state.get(managed.parameter)):
        return None
    shaped = {k: t.dtype for k, t in state_tensors(optimizer, managed.parameter)}
    scalars = {
        k: (v.clone() if isinstance(v, Tensor) else v)
        for k, v in state.items()
        if k not in shaped and (not isinstance(v, Tensor) or v.numel() == 1)
    }
    complete = len(shaped) + len(scalars) == len(state)
    del optimizer.state[managed.parameter]
    return DroppedState(shaped, scalars) if complete else None


def restore_dropped(
    optimizer: Optimizer | None, managed: Managed, dropped: DroppedState | None, steps: int
) -> bool:
    """Rebuild a dropped state with zeros, as after `steps` steps without a gradient; whether there was one to rebuild.

    The step count is θ's, not the one from before the drop: bias correction at the old count would give the fresh
    zeros a first update several times too large.
    """
    if optimizer is None or dropped is None or optimizer.state.get(managed.parameter):
        return False
    state: dict[str, object] = {
        k: torch.zeros_like(managed.parameter, dtype=dtype, memory_format=torch.preserve_format)
        for k, dtype in dropped.shaped.items()
    }
    for key, value in dropped.scalars.items():
        if key == "step":
            value = torch.full_like(value, steps) if isinstance(value, Tensor) else steps
        state[key] = value
    optimizer.state[managed.parameter] = state
    return True


def _debiased(entry: ManagedWeight, rule: str, betas: tuple[float, float], steps: int) -> tuple[Tensor, Tensor] | None:
    """(mean gradient, mean squared gradient) at the candidates, from θ's moments; None if the rule keeps none."""
    if entry.m is None or steps == 0:
        return None
    m = entry.moment("m", rule)
    if rule == "momentum":
        mean = m * (1 - betas[0]) / (1 - betas[0] ** steps)
        return mean, mean.square()
    mean = m / (1 - betas[0] ** steps)
    if entry.v is None:
        return mean, mean.square()
    second = entry.moment("v", rule) / (1 - betas[1] ** steps)
    # The selective rule's v is a mean of |g|, not of g².
    return mean, second.square() if rule == "selective" else second


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def _bias(group: dict, key: str, step: float) -> float:
    """What the optimizer's own running mean `key` would hold after `step` steps of a constant 1."""
    if key == "momentum_buffer":
        momentum = group.get("momentum", 0.0)
        if "dampening" not in group:  # an exponential mean (Muon), not SGD's sum
            return 1 - momentum**max(step, 1)
        return (1 - group["dampening"]) * (1 - momentum**max(step, 1)) / (1 - momentum)
    betas = group.get("betas", (0.9, 0.999))
    return 1 - betas[0 if key in _FIRST else 1] ** max(step, 1)


def commit_state(
    optimizer: Optimizer | None,
    managed: Managed,
    new_bits: Tensor,
    rule: str,
    betas: tuple[float, float],
    steps: int,
) -> None:
    """Carry a weight's state across a commit: survivors keep theirs, resurrected take θ's moments, losers get zero.

    θ's moments are debiased and scaled to the bias that the optimizer's own moments have at its step count, so that its
    correction is right for them. State tensors that this cannot name get zero at resurrected coordinates.
    """
    entry = managed.entry
    tensors = dict(state_tensors(optimizer, managed.parameter))
    if optimizer is None or not tensors:
        return
    group, state = _group_of(optimizer, managed.parameter), optimizer.state[managed.parameter]
    step = float(state.get("step", steps))
    means = _debiased(entry, rule, betas, steps)
    for key, tensor in tensors.items():
        source = None
        if means is not None and key in _FIRST:
            source = means[0] * _bias(group, key, step)
        elif means is not None and key in _SECOND:
            source = means[1] * _bias(group, key, step)
        elif means is None or key not in _FIRST + _SECOND:
            source = torch.zeros(entry.theta_shape, device=tensor.device)

        def change(matrix: Tensor, source: Tensor | None = source) -> None:
            commit_(matrix, entry.bits, new_bits, entry.row_start, entry.columns, source)

        _in_place(entry, tensor, change)
