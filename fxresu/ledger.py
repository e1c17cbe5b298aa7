"""The memory ledger: bytes of every component as the tensors are now, against what was measured."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .managed import ManagedWeight
from .memory_bill import COMPONENTS
from .model_state import Managed, managed_weights, other_parameters, state_of
from .state_owners import Slot


def _bytes(tensors: Iterable[Tensor | None], seen: set[tuple[torch.device, int]], device: torch.device) -> int:
    """Bytes of the storages behind `tensors` on `device` that were not counted before."""
    total = 0
    for tensor in tensors:
        if tensor is None or tensor.device != device:
            continue
        storage = tensor.untyped_storage()
        key = (tensor.device, storage._cdata)  # also where there is no memory: fakes and meta tensors
        if key in seen or storage.nbytes() == 0:
            continue
        seen.add(key)
        total += storage.nbytes()
    return total


def memory_bill(
    model: nn.Module, optimizer: Optimizer | None = None, device: torch.device | str | None = None
) -> dict[str, int]:
    """Bytes that the model and its training hold on `device` right now, by component (`COMPONENTS`).

    Storages are counted once, however many tensors share them. Activations live only within a step and are no part of
    it: compare with a peak to see them. State that was sent away counts where its bytes are: give device="cpu" for what
    is in host memory.

    Args:
        device: default is the first parameter's.

    Raises:
        NotTransformedError: if the model is not transformed.
    """
    state_of(model)
    weights = managed_weights(model)
    first = next(model.parameters())
    device = first.device if device is None else _with_index(torch.device(device))
    seen: set[tuple[torch.device, int]] = set()
    others = [p for _, p in other_parameters(model)]
    managed = [m.parameter for m in weights.values()]
    parts: dict[str, list[Tensor | None]] = {name: [] for name in COMPONENTS}
    for one in weights.values():
        for name, tensors in tensors_of_weight(one).items():
            parts[name] += tensors
    parts |= {
        "other parameters": list(others),
        "buffers": list(model.buffers()),
        "gradients": [p.grad for p in model.parameters()],
        "optimizer state, managed": _state(optimizer, managed),
        "optimizer state, other": _state(optimizer, others),
    }
    counted = {name: _bytes(tensors, seen, device) for name, tensors in parts.items()}
    counted["optimizer state, managed"] += _away(optimizer, managed, device)
    counted["optimizer state, other"] += _away(optimizer, others, device)
    return {name: counted[name] for name in COMPONENTS}


def masks_of(entry: ManagedWeight) -> list[Tensor | None]:
    """The tensors that say where a weight's active values and θ lie."""
    e = entry
    return [e.bits, e.row_start, e.columns, e.active_start, e.panel, e.panel_bits, e.panel_start]


def tensors_of_weight(managed: Managed) -> dict[str, list[Tensor | None]]:
    """The tensors that training keeps for one managed weight beside its gradient and its optimizer's state, by
    component."""
    e = managed.entry
    return {
        "θ": [e.theta],
        "θ gradient": [e.grad_of_theta()],
        "managed weights": [managed.parameter.data, e.active, e.active_scale],
        "compute copies": [e.low],
        "masks": masks_of(e),
        "θ moments": [e.m, e.v, e.m_scale, e.v_scale],
    }


def _state(optimizer: Optimizer | None, parameters: Iterable[Tensor]) -> list[Tensor | None]:
    if optimizer is None:
        return []
    return [v for p in parameters for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]


def _with_index(device: torch.device) -> torch.device:
    """The device that a name without a number means: tensors' devices have one."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def _away(optimizer: Optimizer | None, parameters: Iterable[Tensor], device: torch.device) -> int:
    """Bytes on `device` of state that is not in the optimizer's own tensors: codes, copies in host memory or under
    way."""
    if optimizer is None:
        return 0
    slots = (v for p in parameters for v in optimizer.state.get(p, {}).values() if isinstance(v, Slot))
    return sum(slot.bytes_on(device) for slot in slots)


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes, as the operating system counts it.

    From /proc where there is one: `ru_maxrss` survives exec, and starts with what the parent process held.
    """
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss() -> int:
    """Resident set of this process now, in bytes; the peak where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_rss()
