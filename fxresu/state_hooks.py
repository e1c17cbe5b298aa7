"""The optimizer's own calls while its state is away: a step, its dictionary, and what is loaded from one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from .state_owners import Slot, movable

if TYPE_CHECKING:
    from .state_manager import StateManager

__all__ = ["follow"]


def follow(manager: StateManager, optimizer: Optimizer) -> None:
    """Have the manager asked in the optimizer's calls, as long as it lives."""
    me = weakref.ref(manager)

    def asked(function: Callable[..., Any]) -> Callable[..., Any]:
        def hook(optimizer: Optimizer, *args: Any) -> Any:
            live = me()
            return None if live is None else function(live, optimizer, *args)

        return hook

    optimizer.register_step_pre_hook(asked(_before_step))
    optimizer.register_state_dict_post_hook(asked(_with_values))
    optimizer.register_load_state_dict_pre_hook(asked(_on_host))
    optimizer.register_load_state_dict_post_hook(asked(_send_loaded))


def _before_step(manager: StateManager, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """State of parameters that this step will change comes back, however it came to be away."""
    stepped = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    slots = manager.slots(stepped)
    if not slots:
        return
    manager.counts.late += sum(s.nbytes for s in slots)
    manager.tell("late", f"{type(optimizer).__name__}.step() changes parameters whose state this phase sends away"
                 " (optimizer_state in its plan): it was called back, and the step waited")  # fmt: skip
    manager.fetch(stepped).commit()


def _with_values(manager: StateManager, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Values in place of slots, in host memory; the owners stay."""
    for index, state in state_dict["state"].items():
        if isinstance(state, dict) and any(isinstance(v, Slot) for v in state.values()):
            values = {k: v.value() if isinstance(v, Slot) else v for k, v in state.items()}
            state_dict["state"][index] = values
    return state_dict


def _on_host(manager: StateManager, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """State that is loaded for what is away does not pass through the device."""
    away, strategy = manager.stay_away
    if strategy not in ("offload", "pinned"):
        return None
    kept = {id(p) for p in away}
    ids = [i for g in state_dict["param_groups"] for i in g["params"]]
    parameters = dict(zip(ids, (p for g in optimizer.param_groups for p in g["params"])))
    loaded = {}
    for index, state in state_dict["state"].items():
        parameter = parameters.get(index)
        if parameter is not None and id(parameter) in kept and isinstance(state, dict):
            state = {k: _host_slot(manager, parameter, k, v, strategy) for k, v in state.items()}
        loaded[index] = state
    return {**state_dict, "state": loaded}


def _host_slot(manager: StateManager, parameter: Tensor, key: str, value: Any, strategy: str) -> Any:
    """A slot in host memory for what `load_state_dict` would copy to the device as it is; others unchanged."""
    if type(value) is not Tensor or value.numel() < 2 or value.dtype != parameter.dtype or movable(value):
        return value
    lanes = manager.lanes_of(parameter.device)
    slot = Slot(value.detach().clone() if value.device.type == "cpu" else value, lanes)
    slot.belongs_on(parameter.device)  # the pool, too, is that device's
    if strategy == "offload" or not manager.pin(slot):
        slot.leave_pageable()
    slot.depart()
    slot.land(wait=True)
    return slot


def _send_loaded(manager: StateManager, optimizer: Optimizer) -> None:
    """What was loaded to the device and belongs elsewhere in this phase goes there."""
    parameters, strategy = manager.stay_away
    if strategy in ("offload", "pinned", "compress"):
        manager.send(parameters, strategy).commit()
