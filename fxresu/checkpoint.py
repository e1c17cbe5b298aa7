"""A run on disk, to go on from bit for bit.

=====================  ==============================================================================
model.safetensors      `model.state_dict()`: effective weights under their own names
optimizer.safetensors  tensors of `optimizer.state_dict()`
cycle.safetensors      masks, θ, its moments; random states of torch
state.json             format version, everything that is no tensor, and the SHA-256 of the files above
=====================  ==============================================================================

`save_state` and `load_state` write and read the cycle's part alone, for loops that store the rest themselves.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fxresu.passes import Phase

from . import weight_storage
from .checkpoint_folder import FORMAT, earlier, read_folder, write_folder
from .checkpoint_state import (
    check_cycle,
    cycle_state,
    from_plain,
    join_optimizer,
    load_cycle_state,
    random_tensors,
    refuse_pending,
    set_random,
    split_optimizer,
    to_plain,
)
from .errors import CheckpointError
from .model_state import managed_weights, state_of
from .state_manager import loading_to_host

if TYPE_CHECKING:
    from .cycle import ResuCycle

FILES = ("model.safetensors", "optimizer.safetensors", "cycle.safetensors")


def save(cycle: ResuCycle, path: str | Path, extra: Mapping[str, Any] | None = None, *, keep_last: int = 1) -> None:
    """Write a checkpoint folder: beside `path`, synced, then renamed over it. An earlier one survives any failure.

    Args:
        extra: plain values of the caller's (data position, a scheduler's state), returned by `load`.
        keep_last: how many checkpoints to keep: the newest at `path`, earlier ones as `<path>-<step>`.

    Raises:
        CheckpointError: gradients of a micro-batch are pending, or `path` is a file.
        OSError: the folder cannot be written (permissions, disk full).
    """
    refuse_pending(cycle)
    state = cycle_state(cycle)
    optimizer_tensors, optimizer_plain = split_optimizer(cycle.optimizer.state_dict())
    contents = {
        "model.safetensors": _unshared(cycle.model.state_dict()),
        "optimizer.safetensors": optimizer_tensors,
        "cycle.safetensors": {**state["tensors"], **random_tensors()},
    }
    document = {
        "kind": "run",
        "storage": state_of(cycle.model).storage,
        "cycle": state["meta"],
        "optimizer": optimizer_plain,
        "python_random": to_plain(random.getstate()),
        "numpy_random": to_plain([v.tolist() if isinstance(v, np.ndarray) else v for v in np.random.get_state()]),
        "extra": to_plain(dict(extra or {})),
    }
    write_folder(Path(path), contents, document, step=cycle.global_step, keep_last=keep_last)


def load(cycle: ResuCycle, path: str | Path) -> dict[str, Any]:
    """Resume from a checkpoint folder, bit for bit: weights, moments, masks, θ, position and random states.

    If a crash hit between the two renames of a save, the earlier checkpoint is used.

    Returns:
        The `extra` that was saved with it.

    Raises:
        CheckpointError: missing, truncated, damaged, of a later format, or of another model, optimizer or
            configuration. Nothing has changed then.
    """
    document, files = read_folder(Path(path), "run")
    missing = {"storage", "optimizer", "python_random", "numpy_random", "extra"} - document.keys()
    if missing or set(files) != set(FILES):
        raise CheckpointError(f"checkpoint {str(path)!r} lacks {sorted(missing or set(FILES) - set(files))[0]!r}")
    optimizer = join_optimizer(files["optimizer.safetensors"], document["optimizer"])
    state = {"tensors": files["cycle.safetensors"], "meta": document["cycle"]}
    _check_model(cycle.model, files["model.safetensors"], document["storage"])
    _check_optimizer(cycle, optimizer)
    check_cycle(cycle, state["tensors"], state["meta"])
    _load_model(cycle.model, files["model.safetensors"])
    strategy = cycle.plan_of(Phase(document["cycle"]["phase"])).optimizer_state
    with loading_to_host(cycle.optimizer, strategy):  # the phase says what of it the device needs
        cycle.optimizer.load_state_dict(optimizer)
    load_cycle_state(cycle, state)
    cycle.optimizer.zero_grad(set_to_none=True)
    set_random(files["cycle.safetensors"], document["python_random"], document["numpy_random"])
    return from_plain(document["extra"])


def save_state(cycle: ResuCycle, path: str | Path) -> None:
    """Write the cycle's own state (masks, θ, its moments, position) as a folder, as `save` does.

    For loops that store model, optimizer and random states themselves. Raises what `save` raises.
    """
    state = cycle_state(cycle)
    document = {"kind": "cycle", "cycle": state["meta"]}
    write_folder(Path(path), {"cycle.safetensors": state["tensors"]}, document, step=cycle.global_step, keep_last=1)


def load_state(cycle: ResuCycle, path: str | Path) -> None:
    """Go on from a folder that `save_state` wrote, once model and optimizer have been restored.

    Raises:
        CheckpointError: as for `load`. Nothing has changed then.
    """
    document, files = read_folder(Path(path), "cycle")
    load_cycle_state(cycle, {"tensors": files["cycle.safetensors"], "meta": document["cycle"]})


def _unshared(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tied tensors once for each name: safetensors refuses shared memory."""
    seen: set[tuple[int, int]] = set()
    result = {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        result[name] = tensor.clone() if key in seen and tensor.numel() else tensor
        seen.add(key)
    return result


def _check_model(model: nn.Module, tensors: Mapping[str, Tensor], storage: str) -> None:
    kinds = {k: (tuple(v.shape), str(v.dtype)) for k, v in model.state_dict().items()}
    saved = {k: (tuple(v.shape), str(v.dtype)) for k, v in tensors.items()}
    if kinds != saved:
        name = next(k for k in sorted(kinds.keys() | saved.keys()) if kinds.get(k) != saved.get(k))
        there, here = (" ".join(map(str, d[name])) if name in d else "missing" for d in (saved, kinds))
        raise CheckpointError(f"checkpoint is of another model: {name!r} is {there} there and {here} here")
    own = state_of(model).storage
    if own != storage:
        raise CheckpointError(f"checkpoint was written with storage={storage!r}, the model has {own!r}; give the same")


def _check_optimizer(cycle: ResuCycle, state: Mapping[str, Any]) -> None:
    own, saved = cycle.optimizer.state_dict()["param_groups"], state["param_groups"]
    if [len(g["params"]) for g in own] != [len(g["params"]) for g in saved] or any(
        a.keys() != b.keys() for a, b in zip(own, saved)
    ):
        raise CheckpointError(
            f"checkpoint is of another optimizer than {type(cycle.optimizer).__name__}: its parameter groups differ in"
            " number, size or options"
        )


@torch.no_grad()
def _load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy values without going through load hooks: masks and θ of the same checkpoint follow."""
    for managed in managed_weights(model).values():
        if managed.entry.packed:
            weight_storage.unpack_into(managed.entry, managed.parameter)
    own = model.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


__all__ = [
    "FILES", "FORMAT", "CheckpointError", "cycle_state", "earlier", "load", "load_cycle_state", "load_state", "save",
    "save_state",
]  # fmt: skip
