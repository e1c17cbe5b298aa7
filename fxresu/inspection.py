"""`inspect`: what the passes do to a model in a phase, found by capturing it and compiling nothing."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxresu.kernels import count
from fxresu.kernels._autocast import active_dtype
from fxresu.passes import DEFAULT_PLANS, Phase, PhasePlan

from .capture import Break, InspectionError, captured, captured_without_values, fake_device, stop
from .errors import ConfigError
from .example_inputs import as_inputs
from .inspection_data import (
    NEVER_READ,
    READ_IN_EAGER,
    GraphView,
    Inspection,
    LeftAlone,
    MemoryRow,
    PassSummary,
    PhaseInspections,
    WeightRow,
)
from .inspection_rows import assemble, timed
from .model_state import Managed, managed_weights, state_of
from .phases import set_phase
from .shape_copy import Counts, enter_phase, meta_copy
from .topk import count_true
from .transform import transform

_LARGEST_COPY = 2 << 30  # bytes of a model that is copied with its values when nothing else is said


def inspect(
    model: nn.Module,
    inputs: Any = None,
    *,
    phase: Phase | str = "resu",
    sparsity: float | None = None,
    granularity: str | None = None,
    candidates: float | None = None,
    storage: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    plans: Mapping[Phase | str, PhasePlan] | None = None,
    values: bool | None = None,
    device: torch.device | str | None = None,
    keep_graphs: bool = False,
) -> Inspection:
    """What the passes do to `model` in a phase. Works on a copy: the model, its gradients and the random state stay.

    The copy is brought into the phase, called twice on `inputs`, and captured with the phase's passes; nothing is
    compiled after them.

    Args:
        model: a plain module, which the copy of is transformed, or a transformed one, which keeps its settings and,
            where its weights are in the state that the phase needs, its masks.
        inputs: for one call: a tensor, a tuple of arguments, a dict of keyword arguments, or `ExampleInputs`. None
            derives them for models of transformers and timm.
        phase: a `Phase` or its name.
        sparsity: of new masks; default as the transform's (0.5).
        granularity, candidates, storage, include, exclude, plans: for `transform`; only for a plain model.
        values: True copies the weights and runs on them; False runs on shapes alone, which takes no memory; None does
            the former for models of up to 2 GiB. A model on the meta device has no values.
        device: on which the model would train, for naming what executes; default is the model's, and for one without
            values CUDA where there is one.
        keep_graphs: keep every node of the graphs, as captured and after each pass (`Inspection.graphs`).

    Raises:
        ConfigError: a bad argument, no inputs, or options for a transform that has happened already.
        InspectionError: the forward failed on the inputs.
    """
    try:
        target = Phase.parse(phase)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={type(model).__name__}: expected a torch.nn.Module")
    call = as_inputs(model, inputs)
    values = _with_values(model, values)
    options = {
        name: value
        for name, value in dict(
            granularity=granularity, candidates=candidates, storage=storage, include=include, exclude=exclude,
            plans=plans,
        ).items()
        if value is not None
    }  # fmt: skip
    start = time.perf_counter()
    with _random_state_kept(model):
        copied, counts = _prepared(model, target, sparsity, options, values)
        _check_offload(copied, values)
        capture = captured(copied, call) if values else captured_without_values(copied, call)
        where = _device(model, device)
        found = assemble(copied, capture, counts, values=values, device=where, keep_graphs=keep_graphs)
    return timed(found, time.perf_counter() - start)


def _check_offload(model: nn.Module, values: bool) -> None:
    record = state_of(model)
    device = next((p.device.type for p in model.parameters()), "cpu") if values else fake_device()
    plan = record.state.plan
    if record.storage != "offload" or plan.weights != "resu" or plan.precision != "inherit":
        return
    if active_dtype(device) != torch.bfloat16:
        raise ConfigError(
            f"storage='offload': its bfloat16 copies compute under bfloat16 autocast; inspect inside"
            f" torch.autocast({device!r}, torch.bfloat16), or with --autocast bf16"
        )


def inspect_phases(
    model: nn.Module, inputs: Any = None, *, phases: Iterable[Phase | str] | None = None, **options: Any
) -> PhaseInspections:
    """`inspect` in several phases.

    Args:
        model, inputs: as for `inspect`.
        phases: which, in any order; None is all of them.
        options: the other arguments of `inspect`.

    Raises:
        ConfigError, InspectionError: as `inspect` does.
    """
    try:
        wanted = {Phase.parse(p) for p in (Phase if phases is None else phases)}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not wanted:
        raise ConfigError(f"phases={phases!r}: name at least one phase")
    found: dict[PhasePlan, Inspection] = {}
    for phase in (p for p in Phase if p in wanted):
        plan = _plan(model, phase, options.get("plans"))
        alike = dataclasses.replace(plan, phase=Phase.DENSE)
        if alike not in found:
            found[alike] = inspect(model, inputs, phase=phase, **options)
        found[plan] = dataclasses.replace(found[alike], plan=plan)
    return PhaseInspections(tuple(found[_plan(model, p, options.get("plans"))] for p in Phase if p in wanted))


def _plan(model: nn.Module, phase: Phase, plans: Mapping[Phase | str, PhasePlan] | None) -> PhasePlan:
    own = model.__dict__.get("_fxresu_model") if isinstance(model, nn.Module) else None
    known: Mapping[Any, PhasePlan] = own.plans if own is not None else {**DEFAULT_PLANS, **(plans or {})}
    return known[phase]


def _with_values(model: nn.Module, values: bool | None) -> bool:
    on_meta = any(p.is_meta for p in model.parameters())
    if values and on_meta:
        raise ConfigError("values=True: the model is on the meta device and has none; build it on a real device")
    if values is None:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        return not on_meta and size <= _LARGEST_COPY
    return values


def _device(model: nn.Module, device: torch.device | str | None) -> str:
    if device is not None:
        return torch.device(device).type
    own = next((p.device.type for p in model.parameters()), "cpu")
    return own if own != "meta" else "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        yield


def _prepared(
    model: nn.Module, phase: Phase, sparsity: float | None, options: dict[str, Any], values: bool
) -> tuple[nn.Module, dict[str, Counts]]:
    """A transformed copy in the phase, and what its masks count."""
    source = model.__dict__.get("_fxresu_model")
    if source is not None and options:
        raise ConfigError(
            f"{next(iter(options))}={next(iter(options.values()))!r}: the model is transformed already and keeps its"
            " settings; inspect the plain model to try others"
        )
    copied = copy.deepcopy(model) if values else meta_copy(model)
    if source is None:
        transform(copied, sparsity=0.5 if sparsity is None else sparsity, **options)
    record = state_of(copied)
    kept = {k: v for k, v in (record.compile_options or {}).items() if k in ("dynamic", "mode", "options")}
    record.compile_options = {"backend": stop, **kept}
    plan = record.plans[phase]
    if not values:
        counts = enter_phase(copied, plan, record.sparsity if sparsity is None else sparsity)
        # What the model's own masks count is known, though the copy has no values.
        same = source is not None and source.base != "dense" and source.base == record.base
        return copied, ({n: _count(m) for n, m in managed_weights(model).items()} if same else counts)
    if plan.weights == "effective" and record.base != "resu":
        set_phase(copied, Phase.RESU, sparsity=sparsity)
    set_phase(copied, phase, sparsity=sparsity)
    return copied, {n: _count(m) for n, m in managed_weights(copied).items()}


def _count(managed: Managed) -> Counts:
    entry = managed.entry
    active = entry.numel if entry.bits is None else int(count(entry.bits))
    if entry.anchor is None:
        return Counts(active, 0)
    mask = entry.mask()
    if entry.columns is None or mask is None:
        return Counts(active, entry.numel - active)
    return Counts(active, count_true(~mask & entry.covered()))


__all__ = [
    "NEVER_READ", "READ_IN_EAGER", "Break", "GraphView", "Inspection", "InspectionError", "LeftAlone", "MemoryRow",
    "PassSummary", "PhaseInspections", "WeightRow", "inspect", "inspect_phases",
]  # fmt: skip
