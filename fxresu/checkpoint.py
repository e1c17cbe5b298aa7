"""A run on disk: a folder that is written whole or not at all, verified before it is read.

=====================  ==============================================================================
model.safetensors      `model.state_dict()`: effective weights under their own names
optimizer.safetensors  tensors of `optimizer.state_dict()`
cycle.safetensors      masks, θ, its moments; random states of torch
state.json             format version, everything that is no tensor, and the SHA-256 of the files above
=====================  ==============================================================================
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .checkpoint_state import (
    check_cycle,
    cycle_state,
    from_plain,
    join_optimizer,
    load_cycle_state,
    random_tensors,
    set_random,
    split_optimizer,
    to_plain,
)
from .errors import CheckpointError
from .files import sha256, sync
from .model_state import managed_weights

if TYPE_CHECKING:
    from .cycle import ResuCycle

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "cycle.safetensors")


def save(cycle: ResuCycle, path: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint folder: beside `path`, synced, then renamed over it. An earlier one survives any failure.

    Args:
        extra: plain values of the caller's (data position, arguments), returned by `load`.

    Raises:
        CheckpointError: gradients of a micro-batch are pending, or `path` is a file.
        OSError: the folder cannot be written (permissions, disk full).
    """
    path = Path(path)
    if path.exists() and not (path / "state.json").exists() and (path.is_file() or any(path.iterdir())):
        raise CheckpointError(f"path={str(path)!r} is there and is no checkpoint folder; choose another one")
    if cycle._micro:
        raise CheckpointError(
            f"{cycle._micro} of {cycle.accumulation} micro-batches are accumulated; save after a completed update"
        )
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(cycle, temporary, extra)
        _replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(cycle: ResuCycle, folder: Path, extra: Mapping[str, Any] | None) -> None:
    state = cycle_state(cycle)
    optimizer_tensors, optimizer_plain = split_optimizer(cycle.optimizer.state_dict())
    contents = {
        "model.safetensors": _unshared(cycle.model.state_dict()),
        "optimizer.safetensors": optimizer_tensors,
        "cycle.safetensors": {**state["tensors"], **random_tensors()},
    }
    for name, tensors in contents.items():
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, folder / name)
        sync(folder / name)
    document = {
        "format": FORMAT,
        "cycle": state["meta"],
        "optimizer": optimizer_plain,
        "python_random": to_plain(random.getstate()),
        "extra": to_plain(dict(extra or {})),
        "sha256": {name: sha256(folder / name) for name in FILES},
    }
    document["sha256"]["state.json"] = _document_digest(document)
    (folder / "state.json").write_text(json.dumps(document))
    sync(folder / "state.json")


def _document_digest(document: Mapping[str, Any]) -> str:
    """Digest of the document without its own digest."""
    rest = {**document, "sha256": {k: v for k, v in document["sha256"].items() if k != "state.json"}}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _unshared(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tied tensors once for each name: safetensors refuses shared memory."""
    seen: set[tuple[int, int]] = set()
    result = {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        result[name] = tensor.clone() if key in seen and tensor.numel() else tensor
        seen.add(key)
    return result


def _replace(temporary: Path, path: Path) -> None:
    """Rename over an earlier checkpoint; at every moment a complete one is there, under its own or the `.old` name."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    temporary.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def load(cycle: ResuCycle, path: str | Path) -> dict[str, Any]:
    """Resume from a checkpoint folder, bit for bit: weights, moments, masks, θ, position and random states.

    If a crash hit between the two renames of a save, the earlier checkpoint is used.

    Returns:
        The `extra` that was saved with it.

    Raises:
        CheckpointError: missing, truncated, damaged, of a later format, or of another model, optimizer or
            configuration. Nothing has changed then.
    """
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    folder = old if not path.exists() and old.exists() else path
    document = _read_document(folder)
    files = {name: _read_tensors(folder / name, document["sha256"].get(name)) for name in FILES}
    optimizer = join_optimizer(files["optimizer.safetensors"], document["optimizer"])
    state = {"tensors": files["cycle.safetensors"], "meta": document["cycle"]}
    _check_model(cycle.model, files["model.safetensors"])
    _check_optimizer(cycle, optimizer)
    check_cycle(cycle, state["tensors"], state["meta"])
    _load_model(cycle.model, files["model.safetensors"])
    cycle.optimizer.load_state_dict(optimizer)
    load_cycle_state(cycle, state)
    cycle.optimizer.zero_grad(set_to_none=True)
    set_random(files["cycle.safetensors"], document["python_random"])
    return from_plain(document["extra"])


def _read_document(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / "state.json").read_text())
        version = document["format"]
    except FileNotFoundError:
        raise CheckpointError(f"path={str(folder)!r} holds no checkpoint (no state.json)") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{folder / 'state.json'} is damaged or foreign ({error}); use an earlier checkpoint"
        ) from None
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {str(folder)!r} has format {version!r}; this fxresu reads format {FORMAT}")
    missing = {"cycle", "optimizer", "python_random", "extra", "sha256"} - document.keys()
    if missing:
        raise CheckpointError(f"{folder / 'state.json'} lacks {sorted(missing)[0]!r}: truncated or foreign")
    if document["sha256"].get("state.json") != _document_digest(document):
        raise CheckpointError(f"{folder / 'state.json'} is damaged (SHA-256 differs); use an earlier checkpoint")
    return document


def _read_tensors(path: Path, digest: str | None) -> dict[str, Tensor]:
    if not path.exists():
        raise CheckpointError(f"checkpoint file {str(path)!r} is missing; use an earlier checkpoint")
    if sha256(path) != digest:
        raise CheckpointError(
            f"checkpoint file {str(path)!r} is truncated or damaged (SHA-256 differs); use an earlier checkpoint"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint file {str(path)!r} cannot be read: {error}") from None


def _check_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    saved = {k: tuple(v.shape) for k, v in tensors.items()}
    if shapes == saved:
        return
    name = next(k for k in sorted(shapes.keys() | saved.keys()) if shapes.get(k) != saved.get(k))
    raise CheckpointError(
        f"checkpoint is of another model: {name!r} is {saved.get(name, 'missing')} there and"
        f" {shapes.get(name, 'missing')} here"
    )


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
            managed.entry.unpack_into(managed.parameter)
    own = model.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


__all__ = ["CheckpointError", "cycle_state", "load", "load_cycle_state", "save"]
