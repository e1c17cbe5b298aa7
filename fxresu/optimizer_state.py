"""The optimizer's state of managed weights: found, dropped, carried across mask changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxresu.kernels import apply_mask_, commit_, gather
from fxresu.kernels.blockwise8 import decoded

from .errors import ConfigError
from .host_values import on_host
from .managed import ManagedWeight
from .model_state import Managed
from .state_forms import by_coordinate, coordinates, describe, editable, plain, shaped
from .state_owners import Slot
from .streamed_state import StreamedState
from .theta_panel import for_commit

# What a state tensor is, by the key that torch.optim and others give it.
_FIRST = ("exp_avg", "momentum_buffer", "grad_avg", "state1")  # running means of the gradient
_SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "state2")  # of its square
_WEIGHT = ("ax", "z", "master", "master_param", "fp32_param", "slow_param", "slow_buffer", "ema")  # copies of W
_REFUSED = {
    "LBFGS": "keeps one state for all parameters together, in which no coordinate can be masked",
    "SparseAdam": "takes sparse gradients, which a managed weight does not have",
}


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


def check_state(optimizer: Optimizer | None, weights: Iterable[Managed]) -> None:
    """Refuse an optimizer whose state cannot follow a change of masks, before anything changes.

    Raises:
        ConfigError: names the optimizer, the state and the remedy.
    """
    if optimizer is None:
        return
    kind = type(optimizer).__name__
    for base in type(optimizer).__mro__:
        if base.__name__ in _REFUSED:
            raise ConfigError(f"optimizer={kind} {_REFUSED[base.__name__]}; use AdamW, SGD or another one")
    for managed in weights:
        state = optimizer.state.get(managed.parameter, {})
        for key, value in state.items():
            if by_coordinate(key, value, managed.parameter) and not editable(state, key):
                raise ConfigError(
                    f"optimizer={kind}: its state {key!r} of weight {managed.entry.fqn!r} is {describe(value)}, which"
                    " cannot be read by coordinate, so that it cannot follow a change of masks; use an optimizer with"
                    " plain state, or with torchao's or bitsandbytes' blockwise 8-bit state"
                )


def state_tensors(optimizer: Optimizer | None, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """State tensors that hold a value for every coordinate of the parameter, in whatever form (see `coordinates`).

    Others (factored statistics, low-rank projections, preconditioners) are the optimizer's own business: they are
    kept or dropped as a whole.
    """
    if optimizer is None:
        return
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Slot):
            raise RuntimeError(f"optimizer state {key!r} is {value.owner}; it has to be called back first")
        if by_coordinate(key, value, parameter) and editable(state, key):
            yield key, value


def mask_state(optimizer: Optimizer | None, managed: Managed) -> None:
    """Zero the state at pruned coordinates, so that the optimizer leaves them exactly where they are."""
    if optimizer is None:
        return
    entry, state = managed.entry, optimizer.state.get(managed.parameter, {})
    for key, _ in state_tensors(optimizer, managed.parameter):
        with coordinates(state, key) as values:
            apply_mask_(values.view(entry.rows, entry.k), entry.bits)


@dataclasses.dataclass(frozen=True)
class DroppedState:
    """What is needed to rebuild a dropped state: the kind of every tensor, not its values."""

    shaped: dict[str, torch.dtype]
    scalars: dict[str, object]


def drop_state(optimizer: Optimizer | None, managed: Managed) -> DroppedState | None:
    """Delete the state of a weight; None if there was none.

    State that is neither a plain tensor of the weight's shape nor a scalar (factored statistics, 8-bit moments) goes
    too; the optimizer then builds all of the weight's state afresh at its next step.
    """
    if optimizer is None or not (state := optimizer.state.get(managed.parameter)):
        return None
    if isinstance(state, StreamedState):  # it lives in host memory, where it costs the device nothing
        return None
    kinds = {k: v.dtype for k, v in state.items() if _plain_by_coordinate(k, v, managed.parameter)}
    scalars = {
        k: (v.clone() if isinstance(v, Tensor) else v)
        for k, v in state.items()
        if k not in kinds and not isinstance(v, Slot) and (not isinstance(v, Tensor) or v.numel() == 1)
    }
    complete = len(kinds) + len(scalars) == len(state)
    del optimizer.state[managed.parameter]
    return DroppedState(kinds, scalars) if complete else None


def _plain_by_coordinate(key: str, value: object, parameter: Tensor) -> bool:
    """Whether a state, here or away, is an ordinary tensor with a value for every coordinate."""
    if isinstance(value, Slot):
        return value.plain and value.dtype.is_floating_point and shaped(key, value.shape, parameter)
    return isinstance(value, Tensor) and by_coordinate(key, value, parameter) and plain(value)


def restore_dropped(optimizer: Optimizer | None, managed: Managed, dropped: DroppedState | None, steps: int) -> bool:
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


def _moment(entry: ManagedWeight, name: str, rule: str) -> Tensor:
    """θ's moment "m" or "v" in float32, theta-like, whatever it is stored in (8-bit: as the rule stores it)."""
    value, scale = getattr(entry, name), getattr(entry, f"{name}_scale")
    if scale is None:
        return value.float()
    return decoded(value, scale, *entry.theta_layout, name, rule)


def _debiased(entry: ManagedWeight, rule: str, betas: tuple[float, float], steps: int) -> tuple[Tensor, Tensor] | None:
    """(mean gradient, mean squared gradient) at the candidates, from θ's moments; None if the rule keeps none."""
    if entry.m is None or steps == 0:
        return None
    m = _moment(entry, "m", rule)
    if rule == "momentum":
        mean = m * (1 - betas[0]) / (1 - betas[0] ** steps)
        return mean, mean.square()
    mean = m / (1 - betas[0] ** steps)
    if entry.v is None:
        return mean, mean.square()
    second = _moment(entry, "v", rule) / (1 - betas[1] ** steps)
    # The selective rule's v is a mean of |g|, not of g².
    return mean, second.square() if rule == "selective" else second


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def _decay(group: dict, key: str) -> float:
    """Decay rate of the optimizer's running mean `key`."""
    for name in ("alpha", "rho"):  # RMSprop, Adadelta
        if key in ("square_avg", "grad_avg") and name in group:
            return float(group[name])
    betas = group.get("betas") or (0.9, 0.999)
    return float(betas[0 if key in _FIRST else -1])


def _bias(group: dict, key: str, step: float) -> float:
    """What the optimizer's own running mean `key` would hold after `step` steps of a constant 1."""
    if key == "momentum_buffer" and "momentum" in group:
        momentum = group["momentum"]
        if "dampening" not in group:  # an exponential mean (Muon), not SGD's sum
            return 1 - momentum ** max(step, 1)
        return (1 - group["dampening"]) * (1 - momentum ** max(step, 1)) / (1 - momentum)
    return 1 - _decay(group, key) ** max(step, 1)


def _resurrected(
    optimizer: Optimizer, managed: Managed, key: str, means: tuple[Tensor, Tensor] | None, step: float
) -> Tensor | None:
    """What a state holds at candidates that become active, in θ's layout; None keeps what it holds.

    θ's moments are scaled to the bias that the optimizer's own have at its count `step`, so that its correction is
    right for them.
    """
    entry, state = managed.entry, optimizer.state[managed.parameter]
    group = _group_of(optimizer, managed.parameter)
    if key in _WEIGHT:
        if entry.theta is not None:
            return entry.theta.detach()
        weight, shape = entry.matrix(managed.parameter), entry.theta_shape
        return gather(weight, entry.bits, entry.row_start, entry.columns, shape, torch.float32)
    if key == "step_size":  # Rprop's own rate: at zero a coordinate would not move again
        return torch.full(entry.theta_shape, float(group["lr"]), device=managed.parameter.device)
    normalised = key == "momentum_buffer" and "square_avg" in state  # RMSprop's is of update, not of gradient
    if means is None or normalised:
        return torch.zeros(entry.theta_shape, device=managed.parameter.device)
    if key in _FIRST:
        return means[0] * _bias(group, key, step)
    if key in _SECOND:
        return means[1] * _bias(group, key, step)
    if key == "sum":  # Adagrad: a sum of squares
        return means[1] * step
    if key == "exp_inf":  # Adamax: a norm
        return means[1].sqrt()
    return torch.zeros(entry.theta_shape, device=managed.parameter.device)


def set_memory_aside(optimizer: Optimizer | None, weights: Iterable[Managed]) -> None:
    """Allocate and free at once what `commit_state` takes for its largest weight, so that torch's allocator has it.

    `commit_state` belongs to the part of a transition that must not fail. Called last before it.
    """
    if optimizer is None:
        return
    need, device = 0, None
    for managed in weights:
        state, parameter = optimizer.state.get(managed.parameter, {}), managed.parameter
        forms = [v for k, v in state.items() if by_coordinate(k, v, parameter)]
        if forms:
            odd = any(not plain(v) or not v.is_contiguous() for v in forms)
            # θ's means and what they are made from; copies of state that is not plain.
            theta = managed.entry.theta_shape[0] * managed.entry.theta_shape[1]
            panel = managed.entry.panel_bits
            spread = theta if managed.entry.panel is None or panel is None else panel.numel() * 32
            need = max(need, 4 * (5 * theta + spread + 8 * odd * parameter.numel()))
            device = managed.entry.device(parameter)
    if need:
        torch.empty(need, dtype=torch.uint8, device=device)


def step_counts(optimizer: Optimizer | None, weights: Mapping[str, Managed], steps: int) -> dict[str, float]:
    """How many steps the optimizer has counted for each weight; `steps` where it counts none. They may be on the
    device, which is waited for once here and would be at every weight otherwise."""
    states = {} if optimizer is None else {n: optimizer.state.get(m.parameter, {}) for n, m in weights.items()}
    found = {n: state.get("step", steps) for n, state in states.items()}
    read = on_host({n: c.reshape(()).double() for n, c in found.items() if isinstance(c, Tensor)})
    return {n: float(read.get(n, found.get(n, steps))) for n in weights}


def commit_state(
    optimizer: Optimizer | None,
    managed: Managed,
    new_bits: Tensor,
    rule: str,
    betas: tuple[float, float],
    steps: int,
    counted: float,
) -> None:
    """Carry a weight's state across a commit: survivors keep theirs, resurrected take θ's moments, losers get zero.

    steps: of θ; counted: the optimizer's own, of `step_counts`, which stay. A copy of the weight (fp32 master, averaged
    weights) takes θ itself. State tensors that this cannot name get zero at resurrected coordinates.
    """
    if optimizer is None:
        return
    entry, state = managed.entry, optimizer.state.get(managed.parameter, {})
    keys = [key for key, _ in state_tensors(optimizer, managed.parameter)]
    if not keys:
        return
    means = _debiased(entry, rule, betas, steps)
    for key in keys:
        source = _resurrected(optimizer, managed, key, means, counted)
        with coordinates(state, key) as values:
            matrix = values.view(entry.rows, entry.k)
            commit_(matrix, entry.bits, new_bits, *for_commit(entry, source))
