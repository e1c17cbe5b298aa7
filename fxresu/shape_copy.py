"""Copies of models that have every shape and no memory, so that one can look at what a phase does to the graph of a
model that would not fit."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxresu.kernels import words
from fxresu.kernels.quantized import LARGEST, code_shape, scale_shape
from fxresu.passes import PhasePlan
from fxresu.passes._compat import fake_mode, mark_dynamic

from .candidates import panel_shape, share_columns
from .managed import ManagedWeight
from .masks import kept_total
from .model_state import Managed, ModelState, managed_weights, state_of
from .phases import activate
from .theta_layout import SLACK
from .topk import keep_count

_META = torch.device("meta")
_PLAIN = (Tensor, nn.Parameter)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Active and candidate coordinates of one weight, and whether they are known without the weights' values."""

    active: int
    candidates: int
    active_exact: bool = True
    candidates_exact: bool = True


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters, buffers and other tensors are on the meta device. Ties stay, and `model` too."""
    return empty_copy(model, _META)


def empty_copy(model: nn.Module, device: torch.device | str) -> nn.Module:
    """A deep copy whose parameters, buffers and other tensors are on a device, with whatever values memory there has.
    Ties stay."""
    memo = {id(t): _without_values(t, device) for t in _tensors(model)}
    return copy.deepcopy(model, memo)


class Fakes:
    """Fake tensors, which say they are on a device and have no memory.

    Capture runs on them rather than on meta tensors: code that asks for the device, or for autocast on it, finds what
    it will find in training.

    Attributes:
        mode: to be active while they are computed with.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.mode = fake_mode()
        self._device = device
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The fake of a tensor, the same for every call."""
        if id(tensor) not in self._made:
            self._made[id(tensor)] = tensor, _without_values(tensor, self._device, self.mode)
        return self._made[id(tensor)][1]

    def inputs(self, inputs: Any) -> Any:
        """The same nested inputs with a fake for every tensor."""
        return pytree.tree_map_only(Tensor, self.of, inputs)

    def replace_in(self, model: nn.Module) -> None:
        """Put fakes in place of all tensors of a (meta) model."""
        for module in model.modules():
            places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            for tensors in places:
                tensors.update({n: self.of(t) for n, t in tensors.items() if type(t) in _PLAIN})
        for managed in managed_weights(model).values():
            entry = managed.entry
            for name in (*ManagedWeight.TENSORS, "anchor"):
                tensor = getattr(entry, name)
                setattr(entry, name, None if tensor is None else self.of(tensor))
            if entry.active is not None:
                mark_dynamic(entry.active, 1)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for entry in vars(module).get("_fxresu", {}).values():
            own += vars(entry).values()
        yield from (t for t in own if type(t) in _PLAIN)


def _without_values(
    tensor: Tensor, device: torch.device | str = _META, mode: AbstractContextManager[Any] | None = None
) -> Tensor:
    with mode or nullcontext():
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(new, tensor.requires_grad)
        return new.requires_grad_(tensor.requires_grad)


def enter_phase(model: nn.Module, plan: PhasePlan, sparsity: float) -> dict[str, Counts]:
    """Bring a transformed model on the meta device into a phase: masks, θ and packed values as shapes.

    Forward-only phases are entered from RESU, where training meets them.

    Returns:
        Counts by FQN, as pruning to `sparsity` will make them.
    """
    record = state_of(model)
    base = "resu" if plan.weights == "effective" else plan.weights
    counts = {n: _lay_out(record, m, base, sparsity) for n, m in managed_weights(model).items()}
    share_columns(m.entry for m in managed_weights(model).values())
    if record.storage == "offload" and base == "resu":
        for managed in managed_weights(model).values():
            _offload(managed, away=plan.weights == "resu")
    record.base = base
    record.nominal_sparsity = 0.0 if base == "dense" else sparsity
    activate(model, plan, None)
    return counts


def _lay_out(record: ModelState, managed: Managed, base: str, sparsity: float) -> Counts:
    entry, weight = managed.entry, managed.parameter
    entry.remove_hook()
    for name in (*ManagedWeight.TENSORS, "anchor", "host"):
        setattr(entry, name, None)
    if base == "dense":
        return Counts(entry.numel, 0)
    counts = _counts(record, entry, sparsity)
    entry.bits = torch.empty(entry.rows, words(entry.k), dtype=torch.int32, device=_META)
    entry.row_start = torch.empty(entry.rows, dtype=torch.int64, device=_META)
    entry.pattern = "2:4" if record.granularity.transposable and sparsity > 0 else ""
    entry.theta_shape = _theta_shape(record, entry, counts)
    if base == "sparse":
        return dataclasses.replace(counts, candidates=0, candidates_exact=True)
    if record.candidates < 1:
        _lay_out_columns(record, entry, counts)
    if record.storage != "resident" or weight.dtype != torch.float32:
        entry.theta = torch.empty(entry.theta_shape, dtype=entry.theta_dtype, device=_META)
    if record.storage == "packed":
        shape = (entry.rows, counts.active // entry.rows) if _rowwise(record) else (1, counts.active)
        _lay_out_values(entry, shape, weight.dtype)
        entry.active_start = torch.empty(entry.rows, dtype=torch.int64, device=_META)
    entry.set_anchor(_META)
    return counts


def _lay_out_columns(record: ModelState, entry: ManagedWeight, counts: Counts) -> None:
    """The chosen inputs; on packed storage θ has slots for their pruned coordinates only."""
    rows, k = panel_shape(entry, record.candidates)
    chosen, inputs = (rows, entry.rows) if entry.input_rows else (k, entry.k)
    whole = record.storage == "packed" and chosen == inputs
    entry.columns = None if whole else torch.empty(chosen, dtype=torch.int32, device=_META)
    if record.storage != "packed":
        return
    entry.theta_shape = 1, max(counts.candidates, 1)
    entry.panel_start = torch.empty(rows, dtype=torch.int64, device=_META)
    if not whole:
        entry.panel_bits = torch.empty(rows, words(k), dtype=torch.int32, device=_META)
        shape = (entry.rows, 1) if entry.input_rows else (1, words(entry.k))
        entry.panel = torch.empty(shape, dtype=torch.int32, device=_META)


def _lay_out_values(entry: ManagedWeight, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if entry.packed_values in LARGEST:
        even = shape[0], shape[1] + shape[1] % 2
        shape, dtype = code_shape(entry.packed_values, even)
        entry.active_scale = torch.empty(scale_shape(even), device=_META)
    elif entry.packed_values == "bf16":
        dtype = torch.bfloat16
    entry.active = torch.empty(shape, dtype=dtype, device=_META)


def _offload(managed: Managed, away: bool) -> None:
    """The copy that offloaded storage computes with; the weight itself and θ's master only where it is `away`."""
    entry, dtype = managed.entry, managed.parameter.dtype
    entry.low = torch.empty(entry.shape, dtype=torch.bfloat16, device=_META)
    if away:
        entry.host = torch.empty(entry.shape, dtype=dtype, device=_META)
    elif dtype == torch.float32:
        entry.theta = None


def _rowwise(record: ModelState) -> bool:
    return record.granularity.kind in ("row", "n:m")


def _counts(record: ModelState, entry: ManagedWeight, sparsity: float) -> Counts:
    """How many coordinates masks keep and θ covers; of weights ranked together and of chosen columns the mean."""
    active = kept_total({entry.fqn: (entry.rows, entry.k)}, sparsity, record.granularity)
    exact = record.granularity.kind != "global"
    pruned = entry.numel - active
    if record.candidates == 1:
        return Counts(active, pruned, exact, exact)
    covered = math.prod(panel_shape(entry, record.candidates))
    return Counts(active, round(pruned * covered / entry.numel), exact, exact and covered == entry.numel)


def _theta_shape(record: ModelState, entry: ManagedWeight, counts: Counts) -> tuple[int, int]:
    if record.candidates < 1:
        return panel_shape(entry, record.candidates)
    pruned = entry.numel - counts.active
    if _rowwise(record):
        planned = entry.k - keep_count(entry.k, max(record.capacity_sparsity, record.sparsity))
        return entry.rows, max(pruned // entry.rows, planned, 1)
    slack = SLACK if record.granularity.kind == "global" else 1.0
    return 1, min(entry.numel, max(int(pruned * slack), 1))
