"""The state of a run as tensors and plain values: the cycle's own, the optimizer's, the random generators'."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxresu.kernels import words
from fxresu.passes import Phase

from . import weight_storage
from .candidates import share_columns
from .config import CycleConfig
from .cycle_extras import extras_plain, extras_tensors, load_extras
from .errors import CheckpointError
from .managed import ManagedWeight
from .metrics import PhaseMeter, PhaseSummary
from .model_state import managed_weights, state_of
from .optimizer_state import DroppedState
from .phases import activate
from .theta_layout import pattern_of
from .theta_panel import set_panel

if TYPE_CHECKING:
    from .cycle import ResuCycle

_ENTRY = ("bits", "row_start", "columns", "theta", "m", "v", "m_scale", "v_scale", "panel_start")
# Options that change no result.
_OF_THE_MACHINE = ("restore_lookahead", "pinned_limit", "pinned_required", "theta_in_backward")
_CODES = ("active", "active_scale")
_DTYPES = {str(d): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64)}


# --- the cycle's own state -------------------------------------------------------------------------------------------


def cycle_state(cycle: ResuCycle) -> dict[str, Any]:
    """{"tensors": flat dict of tensors, "meta": plain values} of all that neither model nor optimizer hold.

    Raises:
        CheckpointError: gradients of a micro-batch are pending.
    """
    refuse_pending(cycle)
    record = state_of(cycle.model)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Any] = {}
    for name, managed in managed_weights(cycle.model).items():
        entry = managed.entry
        for field in _ENTRY:
            value = getattr(entry, field)
            if value is not None:
                tensors[f"{name}.{field}"] = value.detach().clone()
        if entry.active_scale is not None:  # the model's state holds what they stand for, which rounds to others
            tensors |= {f"{name}.{field}": getattr(entry, field).clone() for field in _CODES}
        if (grad := entry.grad_of_theta()) is not None:
            tensors[f"{name}.theta_grad"] = grad.clone()
        weights[name] = {
            "theta_shape": list(entry.theta_shape),
            "trains": None if entry.anchor is None else entry.anchor.requires_grad,
            "grad_dtype": str(entry.grad_dtype),
            "dropped": _dropped_to_plain(entry.dropped),
        }
    meta = {
        "config": cycle.config.to_dict(),
        "phase": str(cycle.phase),
        "base": record.base,
        "nominal_sparsity": record.nominal_sparsity,
        "capacity_sparsity": record.capacity_sparsity,
        "theta_steps": record.theta_steps,
        "rotation": record.rotation,
        "weights": weights,
        "cycle": cycle.cycle,
        "stage": cycle.stage,
        "global_step": cycle.global_step,
        "finished": cycle.finished,
        "started": cycle._started,
        "summaries": [s.to_dict() for s in cycle.summaries],
        "skipped": [list(s) for s in cycle.skipped],
        "meter": cycle.meter.state_dict(),
        "extras": extras_plain(cycle),
    }
    return {"tensors": {**tensors, **extras_tensors(cycle)}, "meta": meta}


def refuse_pending(cycle: ResuCycle) -> None:
    """CheckpointError in the middle of a window of micro-batches: their gradients are in no checkpoint."""
    if cycle.accumulated:
        raise CheckpointError(
            f"{cycle.accumulated} of {cycle.accumulation} micro-batches are accumulated; save after a completed update,"
            " or flush() them first"
        )


def load_cycle_state(cycle: ResuCycle, state: Mapping[str, Any]) -> None:
    """Put a `cycle_state` back. Checks names, shapes and configuration first.

    Raises:
        CheckpointError: the state is of another model or configuration; nothing has changed then.
    """
    tensors, meta = state["tensors"], state["meta"]
    check_cycle(cycle, tensors, meta)
    record, weights = state_of(cycle.model), managed_weights(cycle.model)
    for managed in weights.values():
        managed.entry.remove_hook()
        if managed.entry.packed:
            weight_storage.unpack_into(managed.entry, managed.parameter)
    cycle._thaw_rest()
    # Offloaded weights are away in RESU itself only.
    resident = record.storage == "offload" and Phase(meta["phase"]) is not Phase.RESU
    storage = "resident" if resident else record.storage
    for name, managed in weights.items():
        _load_entry(managed.entry, managed.parameter, name, tensors, meta["weights"][name], storage)
        managed.entry.pattern = pattern_of(record, managed.entry, managed.entry.bits)
    share_columns(m.entry for m in weights.values())
    for field in ("base", "nominal_sparsity", "capacity_sparsity", "theta_steps", "rotation"):
        setattr(record, field, meta[field])
    for field in ("cycle", "stage", "global_step", "finished"):
        setattr(cycle, field, meta[field])
    cycle._started, cycle._window = meta["started"], None
    cycle.summaries = [PhaseSummary(**s) for s in meta["summaries"]]
    cycle.skipped = [tuple(s) for s in meta["skipped"]]
    cycle.meter = PhaseMeter()
    cycle.meter.load_state_dict(meta["meter"])
    load_extras(cycle, tensors, meta["extras"])
    if record.base == "resu":
        cycle._freeze_rest()
    activate(cycle.model, cycle.plan_of(Phase(meta["phase"])), cycle.optimizer)


def check_cycle(cycle: ResuCycle, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """CheckpointError unless the state is of this cycle's managed weights and configuration."""
    weights = managed_weights(cycle.model)
    names = set(meta["weights"])
    if names != set(weights):
        odd = sorted(names ^ set(weights))[0]
        raise CheckpointError(
            f"checkpoint manages {len(names)} weights and the model {len(weights)}, and they differ in {odd!r};"
            " transform the model with the same include and exclude"
        )
    for name, managed in weights.items():
        bits = tensors.get(f"{name}.bits")
        if bits is not None:
            _check_mask(managed.entry, bits)
    own = cycle.config.to_dict()
    saved = CycleConfig().to_dict() | meta["config"]  # options that are newer than the checkpoint had their default
    field = next((k for k in own if k not in _OF_THE_MACHINE and saved[k] != own[k]), None)
    if field is not None:
        raise CheckpointError(
            f"checkpoint was written with {field}={saved[field]!r}, this run has {own[field]!r};"
            " resume with the configuration that it was started with"
        )


def _check_mask(entry: ManagedWeight, bits: Tensor) -> None:
    want = (entry.rows, words(entry.k))
    if tuple(bits.shape) != want or bits.dtype != torch.int32:
        raise CheckpointError(
            f"checkpoint does not fit the model: mask of {entry.fqn}: got {bits.dtype} {tuple(bits.shape)}, expected"
            f" torch.int32 {want}"
        )


def _load_entry(
    entry: Any, parameter: Tensor, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], storage: str
) -> None:
    device = entry.device(parameter)
    for field in _ENTRY:
        value = tensors.get(f"{name}.{field}")
        setattr(entry, field, None if value is None else value.to(device).clone())
    entry.theta_shape = tuple(meta["theta_shape"])
    entry.panel = entry.panel_bits = None
    if entry.columns is not None and entry.panel_start is not None:
        set_panel(entry, entry.columns)
    entry.dropped = _dropped_from_plain(meta["dropped"])
    entry.anchor = entry.low = None
    entry.grad_dtype = _DTYPES[meta["grad_dtype"]]
    if meta["trains"] is not None:
        entry.set_anchor(device, meta["trains"])
        grad = tensors.get(f"{name}.theta_grad")
        entry.anchor.grad = None if grad is None else grad.to(device).clone()
        if storage == "packed":
            weight_storage.pack(entry, parameter)
            if entry.active_scale is not None:
                active, scale = (tensors[f"{name}.{field}"].to(device).clone() for field in _CODES)
                weight_storage.set_active(entry, active, entry.active_start, scale)
        elif storage == "offload":
            weight_storage.offload(entry, parameter)


def _dropped_to_plain(dropped: DroppedState | None) -> dict[str, Any] | None:
    if dropped is None:
        return None
    return {"shaped": {k: str(d) for k, d in dropped.shaped.items()}, "scalars": to_plain(dropped.scalars)}


def _dropped_from_plain(plain: Mapping[str, Any] | None) -> DroppedState | None:
    if plain is None:
        return None
    return DroppedState({k: _DTYPES[d] for k, d in plain["shaped"].items()}, from_plain(plain["scalars"]))


# --- optimizer state as tensors and plain values ---------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """JSON form of nested containers with small tensors and tuples in them.

    Raises:
        CheckpointError: for a value of any other kind.
    """
    if isinstance(value, Tensor):
        return {"__tensor__": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return {"__tuple__": [to_plain(v) for v in value]}
    if isinstance(value, list):
        return [to_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"optimizer state holds a {type(value).__name__}, which has no place in a checkpoint")


def from_plain(value: Any) -> Any:
    """What `to_plain` was given."""
    if isinstance(value, dict):
        if "__tensor__" in value:
            return torch.tensor(value["__tensor__"], dtype=getattr(torch, value["dtype"].removeprefix("torch.")))
        if "__tuple__" in value:
            return tuple(from_plain(v) for v in value["__tuple__"])
        return {k: from_plain(v) for k, v in value.items()}
    return [from_plain(v) for v in value] if isinstance(value, list) else value


def split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(flat dict of tensors, plain values) of an optimizer's `state_dict()`."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {"param_groups": to_plain(state["param_groups"]), "state": {}}
    for index, values in state["state"].items():
        plain["state"][str(index)] = {}
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                tensors[f"{index}.{key}"] = value
            else:
                plain["state"][str(index)][key] = to_plain(value)
    return tensors, plain


def join_optimizer(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's state dict that `split_optimizer` took apart."""
    state = {int(i): {k: from_plain(v) for k, v in values.items()} for i, values in plain["state"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state[int(index)][key] = tensor
    return {"state": state, "param_groups": from_plain(plain["param_groups"])}


# --- random states ---------------------------------------------------------------------------------------------------


def random_tensors() -> dict[str, Tensor]:
    """States of torch's generators, by name."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random(tensors: Mapping[str, Tensor], python: Any, numpy: Any) -> None:
    """Put back `random_tensors` and, as plain values, the states of Python's and NumPy's global generators.

    GPUs that are absent here are passed over.
    """
    torch.set_rng_state(tensors["rng.cpu"].cpu())
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"rng.cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"].cpu(), i)
    random.setstate(from_plain(python))
    np.random.set_state(tuple(from_plain(numpy)))


__all__ = [
    "check_cycle",
    "cycle_state",
    "from_plain",
    "join_optimizer",
    "load_cycle_state",
    "random_tensors",
    "set_random",
    "split_optimizer",
    "to_plain",
]
