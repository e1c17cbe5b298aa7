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
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxresu.passes import Phase

from .config import CycleConfig
from .errors import CheckpointError
from .managed import check_bits_shape
from .metrics import PhaseMeter, PhaseSummary
from .model_state import managed_weights, state_of
from .optimizer_state import DroppedState
from .phases import activate

if TYPE_CHECKING:
    from .cycle import ResuCycle

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "cycle.safetensors")
_ENTRY = ("bits", "row_start", "columns", "theta", "m", "v")
_DTYPES = {str(d): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64)}


# --- the cycle's own state -------------------------------------------------------------------------------------------


def cycle_state(cycle: ResuCycle) -> dict[str, Any]:
    """{"tensors": flat dict of tensors, "meta": plain values} of all that neither model nor optimizer hold."""
    record = state_of(cycle.model)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Any] = {}
    for name, managed in managed_weights(cycle.model).items():
        entry = managed.entry
        for field in _ENTRY:
            value = getattr(entry, field)
            if value is not None:
                tensors[f"{name}.{field}"] = value.detach().clone()
        if entry.grad_of_theta() is not None:
            tensors[f"{name}.theta_grad"] = entry.grad_of_theta().clone()
        weights[name] = {
            "theta_shape": list(entry.theta_shape),
            "trains": None if entry.anchor is None else entry.anchor.requires_grad,
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
        "micro": cycle._micro,
        "micro_loss": None if cycle._micro_loss is None else float(cycle._micro_loss),
        "summaries": [s.to_dict() for s in cycle.summaries],
        "skipped": [list(s) for s in cycle.skipped],
        "meter": cycle.meter.state_dict(),
    }
    return {"tensors": tensors, "meta": meta}


def load_cycle_state(cycle: ResuCycle, state: Mapping[str, Any]) -> None:
    """Put a `cycle_state` back. Checks names, shapes and configuration first.

    Raises:
        CheckpointError: the state is of another model or configuration; nothing has changed then.
    """
    tensors, meta = state["tensors"], state["meta"]
    _check_cycle(cycle, tensors, meta)
    record, weights = state_of(cycle.model), managed_weights(cycle.model)
    for managed in weights.values():
        managed.entry.remove_hook()
        if managed.entry.packed:
            managed.entry.unpack_into(managed.parameter)
    cycle._thaw_rest()
    for name, managed in weights.items():
        _load_entry(managed.entry, managed.parameter, name, tensors, meta["weights"][name], record.storage)
    for field in ("base", "nominal_sparsity", "capacity_sparsity", "theta_steps", "rotation"):
        setattr(record, field, meta[field])
    for field in ("cycle", "stage", "global_step", "finished"):
        setattr(cycle, field, meta[field])
    cycle._started, cycle._micro = meta["started"], meta["micro"]
    cycle._micro_loss = None if meta["micro_loss"] is None else torch.tensor(meta["micro_loss"])
    cycle.summaries = [PhaseSummary(**s) for s in meta["summaries"]]
    cycle.skipped = [tuple(s) for s in meta["skipped"]]
    cycle.meter = PhaseMeter()
    cycle.meter.load_state_dict(meta["meter"])
    activate(cycle.model, record.plans[Phase(meta["phase"])], cycle.optimizer)
    if record.base == "resu":
        cycle._freeze_rest()


def _check_cycle(cycle: ResuCycle, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    weights = managed_weights(cycle.model)
    saved = set(meta["weights"])
    if saved != set(weights):
        odd = sorted(saved ^ set(weights))[0]
        raise CheckpointError(
            f"checkpoint manages {len(saved)} weights and the model {len(weights)}, and they differ in {odd!r};"
            " transform the model with the same include and exclude"
        )
    for name, managed in weights.items():
        bits = tensors.get(f"{name}.bits")
        if bits is not None:
            try:
                check_bits_shape(managed.entry, bits)
            except ValueError as error:
                raise CheckpointError(f"checkpoint does not fit the model: {error}") from None
    if meta["config"] != cycle.config.to_dict():
        own = cycle.config.to_dict()
        field = next(k for k in own if meta["config"].get(k) != own[k])
        raise CheckpointError(
            f"checkpoint was written with {field}={meta['config'].get(field)!r}, this run has {own[field]!r};"
            " resume with the configuration that it was started with"
        )


def _load_entry(
    entry: Any, parameter: Tensor, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], storage: str
) -> None:
    device = parameter.device
    for field in _ENTRY:
        value = tensors.get(f"{name}.{field}")
        setattr(entry, field, None if value is None else value.to(device).clone())
    entry.theta_shape = tuple(meta["theta_shape"])
    entry.dropped = _dropped_from_plain(meta["dropped"])
    entry.anchor = None
    if meta["trains"] is not None:
        entry.set_anchor(device, meta["trains"])
        grad = tensors.get(f"{name}.theta_grad")
        entry.anchor.grad = None if grad is None else grad.to(device).clone()
        if storage == "packed":
            entry.pack(parameter)


def _dropped_to_plain(dropped: DroppedState | None) -> dict[str, Any] | None:
    if dropped is None:
        return None
    return {"shaped": {k: str(d) for k, d in dropped.shaped.items()}, "scalars": _plain(dropped.scalars)}


def _dropped_from_plain(plain: Mapping[str, Any] | None) -> DroppedState | None:
    if plain is None:
        return None
    return DroppedState({k: _DTYPES[d] for k, d in plain["shaped"].items()}, _unplain(plain["scalars"]))


# --- optimizer state as tensors and plain values ---------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """JSON form of nested containers with scalar tensors and tuples in them."""
    if isinstance(value, Tensor):
        return {"__tensor__": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return {"__tuple__": [_plain(v) for v in value]}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"optimizer state holds a {type(value).__name__}, which has no place in a checkpoint")


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        if "__tensor__" in value:
            return torch.tensor(value["__tensor__"], dtype=getattr(torch, value["dtype"].removeprefix("torch.")))
        if "__tuple__" in value:
            return tuple(_unplain(v) for v in value["__tuple__"])
        return {k: _unplain(v) for k, v in value.items()}
    return [_unplain(v) for v in value] if isinstance(value, list) else value


def _split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {"param_groups": _plain(state["param_groups"]), "state": {}}
    for index, values in state["state"].items():
        plain["state"][str(index)] = {}
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                tensors[f"{index}.{key}"] = value
            else:
                plain["state"][str(index)][key] = _plain(value)
    return tensors, plain


def _join_optimizer(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    state = {int(i): {k: _unplain(v) for k, v in values.items()} for i, values in plain["state"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state[int(index)][key] = tensor
    return {"state": state, "param_groups": _unplain(plain["param_groups"])}


# --- random states ---------------------------------------------------------------------------------------------------


def _random_tensors() -> dict[str, Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random(tensors: Mapping[str, Tensor], python: Any) -> None:
    torch.set_rng_state(tensors["rng.cpu"].cpu())
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"rng.cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"].cpu(), i)
    random.setstate(_unplain(python))


# --- files -----------------------------------------------------------------------------------------------------------


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
    optimizer_tensors, optimizer_plain = _split_optimizer(cycle.optimizer.state_dict())
    contents = {
        "model.safetensors": _unshared(cycle.model.state_dict()),
        "optimizer.safetensors": optimizer_tensors,
        "cycle.safetensors": {**state["tensors"], **_random_tensors()},
    }
    for name, tensors in contents.items():
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, folder / name)
        _sync(folder / name)
    document = {
        "format": FORMAT,
        "cycle": state["meta"],
        "optimizer": optimizer_plain,
        "python_random": _plain(random.getstate()),
        "extra": _plain(dict(extra or {})),
        "sha256": {name: _digest(folder / name) for name in FILES},
    }
    document["sha256"]["state.json"] = _document_digest(document)
    (folder / "state.json").write_text(json.dumps(document))
    _sync(folder / "state.json")


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
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    optimizer = _join_optimizer(files["optimizer.safetensors"], document["optimizer"])
    state = {"tensors": files["cycle.safetensors"], "meta": document["cycle"]}
    _check_model(cycle.model, files["model.safetensors"])
    _check_optimizer(cycle, optimizer)
    _check_cycle(cycle, state["tensors"], state["meta"])
    _load_model(cycle.model, files["model.safetensors"])
    cycle.optimizer.load_state_dict(optimizer)
    load_cycle_state(cycle, state)
    cycle.optimizer.zero_grad(set_to_none=True)
    _set_random(files["cycle.safetensors"], document["python_random"])
    return _unplain(document["extra"])


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
    if _digest(path) != digest:
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


def config_of(path: str | Path) -> CycleConfig:
    """The configuration that a checkpoint was written with."""
    return CycleConfig.from_dict(_read_document(Path(path))["cycle"]["config"])


__all__ = ["CheckpointError", "config_of", "cycle_state", "load", "load_cycle_state", "save"]
