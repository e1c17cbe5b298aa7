"""Into RESU and out of it again without a commit: θ's start, and its end.

Like every transition (see `sparsify`), each is done whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.kernels import apply_mask_, gather, scatter_
from fxresu.kernels.blockwise8 import scale_shape
from fxresu.kernels.theta_rules import MOMENTS_OF

from . import weight_storage
from .candidates import (
    active_spread,
    active_std,
    candidate_columns,
    panel_shape,
    seeded,
    share_columns,
    std_of,
    theta_init,
)
from .errors import ConfigError, PhaseError
from .host_values import on_host
from .model_state import Managed, ModelState, managed_weights, state_of
from .optimizer_state import check_holds, drop_state
from .phase_state import call_back
from .state_manager import Move
from .theta_layout import end_theta, restore, settle_streams, undone_on_error, unpack
from .theta_panel import set_panel

# Storage of θ's moments.
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
# Storage of θ itself, where it has one.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.no_grad()
def start_theta(
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    init: str = "normal",
    epsilon: float = 0.1,
    seed: int = 0,
    rule: str = "selective",
    trains: bool = True,
    optimizer_state: str = "drop",
    moments: str = "fp32",
    grad_dtype: torch.dtype = torch.float32,
    theta_dtype: str = "fp32",
    send: Callable[[], Move] = Move,
) -> None:
    """From sparse to RESU: initialise θ, write Φ(θ) into the pruned slots, free the optimizer's state if it is dropped.

    θ = ε·σ·N(0, 1) with σ the standard deviation of the layer's active weights (RESU), or "uniform", or "zero".

    Args:
        optimizer_state: "drop" frees the managed weights' state.
        moments: storage of θ's m and v, a key of `MOMENTS`.
        grad_dtype: of dθ (packed storage: that of θ).
        theta_dtype: storage of θ, a key of `DTYPES`.
        send: prepares to send the optimizer's state away; last of all that can fail.

    Raises:
        PhaseError: if the weights are not sparse.
        ConfigError: unknown init, moments or dtype; an optimizer that does not hold the weights; θ in bfloat16 where
            it is in float32 weights' own slots.
    """
    record, weights = state_of(model), managed_weights(model)
    if record.base != "sparse":
        raise PhaseError(f"start_theta: the weights are {record.base}, not sparse; prune first")
    check_holds(optimizer, weights.values())
    check_theta_dtype(model, theta_dtype)
    settle_streams(weights.values())  # what their own memory keeps of weights that leave is what an error restores
    sigmas = _known_deviations(weights)
    with undone_on_error() as undo:
        for name, managed in weights.items():
            managed.entry.bring(managed.parameter)
            # W's slots can be θ's master only while W is there, and in θ's precision.
            own_theta = record.storage == "packed" or managed.parameter.dtype != torch.float32
            managed.entry.theta_dtype = DTYPES[theta_dtype]
            theta, columns = _fresh_theta(record, managed, init, epsilon, seed, sigmas.get(name))
            managed.entry.grad_dtype = grad_dtype
            _enter_resu(managed, theta, columns, own_theta, trains, undo, compact=record.storage == "packed")
            allocate_moments(managed, rule, moments)
            if record.storage != "resident":
                rounds = weight_storage.rounds(managed.entry, managed.parameter)
                exact = managed.parameter.data if rounds else None
                weight_storage.send_away(managed.entry, managed.parameter, record.storage)
                # What rounding loses is kept until nothing can fail any more.
                undo(weight_storage.unpack_into, managed.entry, managed.parameter, exact)
        if optimizer_state == "drop" and optimizer is not None:
            for managed in weights.values():
                state = optimizer.state.get(managed.parameter)
                if state is not None:
                    undo(optimizer.state.__setitem__, managed.parameter, state)
                managed.entry.dropped = drop_state(optimizer, managed)
        move = send()
    move.commit()
    share_columns(m.entry for m in weights.values())
    for managed in weights.values():
        managed.parameter.grad = None
    record.base, record.theta_steps = "resu", 0


def check_theta_dtype(model: nn.Module, theta_dtype: str) -> None:
    """ConfigError for an unknown storage of θ, or where θ has none: float32 weights keep it in their own slots."""
    if theta_dtype not in DTYPES:
        raise ConfigError(f"theta_dtype={theta_dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if theta_dtype == "fp32" or state_of(model).storage == "packed":
        return
    for name, managed in managed_weights(model).items():
        if managed.parameter.dtype in (torch.float32, torch.float64):
            raise ConfigError(
                f"theta_dtype={theta_dtype!r} with storage={state_of(model).storage!r}: weights in float32, such as"
                f" {name!r}, keep θ in their own pruned slots, where it costs nothing; use storage='packed' or weights"
                " in bfloat16, or leave theta_dtype 'fp32'"
            )


def _enter_resu(
    managed: Managed,
    theta: Tensor,
    columns: Tensor | None,
    own_theta: bool,
    trains: bool,
    undo: Callable[..., object],
    compact: bool,
) -> None:
    """Write Φ(θ) into one weight and make its record one in RESU. `compact`: θ of a panel has no slots for active
    coordinates."""
    entry, parameter = managed.entry, managed.parameter
    undo(leave_resu, managed)
    scatter_(entry.matrix(parameter), theta, entry.bits, entry.row_start, columns)
    entry.columns = columns
    if compact and columns is not None:
        set_panel(entry, columns)
        entry.theta = entry.from_panel(theta, entry.theta_dtype)
    elif own_theta:
        ones = torch.ones(1, 1, device=theta.device).expand(entry.rows, entry.k)
        # Padding of every theta-like tensor is zero.
        theta.mul_(gather(ones, entry.bits, entry.row_start, columns, entry.theta_shape))
        entry.theta = theta.to(entry.theta_dtype)
    entry.set_anchor(parameter.device, trains)


def leave_resu(managed: Managed) -> None:
    """Back to M∘W with the mask as it is."""
    managed.entry.bring(managed.parameter)
    apply_mask_(managed.entry.matrix(managed.parameter), managed.entry.bits)
    end_theta(managed)


def _known_deviations(weights: Mapping[str, Managed]) -> dict[str, float]:
    """σ of the weights that are on a GPU now, by FQN: the host waits for all of them together."""
    spreads = {}
    for name, managed in weights.items():
        entry, parameter = managed.entry, managed.parameter
        mask = entry.mask() if parameter.is_cuda and entry.stream is None else None
        if mask is not None:
            spreads[name] = active_spread(entry.matrix(parameter), mask)
    return {name: std_of(*spread) for name, spread in on_host(spreads).items()}


def _fresh_theta(
    record: ModelState, managed: Managed, init: str, epsilon: float, seed: int, sigma: float | None
) -> tuple[Tensor, Tensor | None]:
    """`sigma`: of the active values, where it is known."""
    entry, parameter = managed.entry, managed.parameter
    columns, shape = None, entry.theta_shape
    mask = entry.mask() if sigma is None or record.candidates < 1 else None
    if record.candidates < 1:
        assert mask is not None
        shape = panel_shape(entry, record.candidates)
        by_input = mask.t() if entry.input_rows else mask
        columns = candidate_columns(None, by_input, record.candidates, rotation=record.rotation)
    if sigma is None:
        assert mask is not None
        sigma = active_std(entry.matrix(parameter), mask)
    generator = seeded(parameter.device, seed, record.rotation, entry.fqn)
    return theta_init(init, shape, sigma, epsilon, generator, device=parameter.device), columns


def allocate_moments(managed: Managed, rule: str, storage: str) -> None:
    """Zero moments of θ for the rule, in their storage."""
    if rule not in MOMENTS_OF:
        raise ConfigError(f"rule={rule!r} is unknown; use one of {', '.join(MOMENTS_OF)}")
    if storage not in MOMENTS:
        raise ConfigError(f"moments={storage!r} is unknown; use one of {', '.join(MOMENTS)}")
    entry, device = managed.entry, managed.parameter.device
    for name in MOMENTS_OF[rule]:
        setattr(entry, name, torch.zeros(entry.theta_shape, dtype=MOMENTS[storage], device=device))
        if storage == "8bit":
            bits, _, _, k = entry.theta_layout
            scales = scale_shape(entry.theta_shape, bits.shape[0], k)
            setattr(entry, f"{name}_scale", torch.zeros(scales, device=device))


@torch.no_grad()
def discard_theta(model: nn.Module, optimizer: Optimizer | None) -> None:
    """From RESU back to sparse with the old mask: Φ(θ) is zeroed."""
    record, weights = state_of(model), managed_weights(model)
    if record.base != "resu":
        raise PhaseError(f"discard_theta: the weights are {record.base}, not in RESU")
    check_holds(optimizer, weights.values())
    with undone_on_error() as undo:
        home = call_back(model, optimizer, undo)
        for managed in weights.values():
            unpack(managed, undo)
            restore(optimizer, managed, record.theta_steps, undo)
    home.commit()
    for managed in weights.values():
        managed.parameter.grad = None
        leave_resu(managed)
    record.base = "sparse"
    record.rotation += 1
