"""What fxresu keeps about a whole transformed model, and how to walk its managed weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from fxresu.passes import Phase, PhasePlan

from .current_plan import PhaseState
from .errors import FxresuError
from .granularity import Granularity
from .managed import ManagedWeight
from .managed_module import ManagedModule

if TYPE_CHECKING:
    from .weight_stream import WeightStream

_KEY = "_fxresu_model"
_STREAM = "_fxresu_weight_stream"


class NotTransformedError(FxresuError, TypeError):
    """A function that needs a transformed model got another one."""


@dataclasses.dataclass
class ModelState:
    """The record of one transformed model, kept on its root module.

    Attributes:
        state: current plan; shared with every `ManagedWeight`.
        plans: the plan of each phase.
        base: what the weights hold underneath a forward-only phase: "dense", "sparse" or "resu".
        sparsity, granularity, candidates, storage: as given to `transform`.
        compile_options: arguments for `torch.compile`; None runs eager.
        packed_values: as given to `transform`.
        kernels: candidate of the chooser by FQN pattern, where the user forces one.
        skipped: weights that were considered and left alone, with the reason.
        nominal_sparsity: that the current masks were asked for.
        capacity_sparsity: the largest sparsity that θ's tensors are laid out for.
        distribution: how masks share their sparsity out over the layers (see `distributions`).
        theta_steps: updates of θ since it was initialised.
        rotation: RESU phases so far; rotates column candidates and seeds θ.
        frozen: unmanaged parameters that RESU keeps from training; their `requires_grad` comes back after it.
        memory_plan: what was chosen for a memory budget (see `memory_budget`); None without one.
        watch: what observes the optimizer's steps in this phase (see `phases`); never copied or pickled.
        transfers: the `StateManager` whose state comes back beside this phase's computation; never copied or pickled.
    """

    state: PhaseState
    plans: dict[Phase, PhasePlan]
    sparsity: float
    granularity: Granularity
    candidates: float
    storage: str
    compile_options: dict[str, Any] | None
    skipped: dict[str, str]
    packed_values: str = "native"
    kernels: dict[str, str] = dataclasses.field(default_factory=dict)
    base: str = "dense"
    nominal_sparsity: float = 0.0
    capacity_sparsity: float = 0.0
    distribution: Any = "uniform"
    theta_steps: int = 0
    rotation: int = 0
    frozen: list[Tensor] = dataclasses.field(default_factory=list)
    watch: Any = None
    transfers: Any = None
    memory_plan: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "watch": None, "transfers": None}


def state_of(model: nn.Module) -> ModelState:
    """The model's record.

    Raises:
        NotTransformedError: if `fxresu.transform` has not been applied to this very module.
    """
    record = model.__dict__.get(_KEY) if isinstance(model, nn.Module) else None
    if record is None:
        raise NotTransformedError(
            f"model={type(model).__name__} has not been transformed; call fxresu.transform(model) on it first"
            " (on the module itself, not on a wrapper or a part)"
        )
    return record


def is_transformed(model: nn.Module) -> bool:
    """Whether `fxresu.transform` has been applied to this very module."""
    return _KEY in model.__dict__


def attach(model: nn.Module, record: ModelState) -> None:
    """Keep `record` on the model; `__dict__` directly, so that neither names nor buffers change."""
    model.__dict__[_KEY] = record


def link_stream(model: nn.Module, stream: WeightStream | None) -> None:
    """Let the managed weights know what brings those that wait in host memory; None: nothing does any more. A model
    that is transformed later learns it then."""
    if stream is None:
        model.__dict__.pop(_STREAM, None)
    else:
        model.__dict__[_STREAM] = stream
    for managed in managed_weights(model).values():
        managed.entry.stream = stream if stream is not None and stream.streams(managed.parameter) else None


def stream_of(model: nn.Module) -> WeightStream | None:
    """What brings weights of the model that wait in host memory."""
    return model.__dict__.get(_STREAM)


def detach(model: nn.Module) -> None:
    """Forget the model's record."""
    model.__dict__.pop(_KEY, None)


@dataclasses.dataclass(frozen=True)
class Managed:
    """A managed weight with its Parameter and the modules that read it."""

    entry: ManagedWeight
    parameter: nn.Parameter
    owners: tuple[tuple[ManagedModule, str], ...]


def managed_weights(model: nn.Module) -> dict[str, Managed]:
    """Every managed weight once, by FQN.

    Weights that were tied after the transform are unified here, and those that were untied (a new Parameter; `to_empty`
    from the meta device, which knows no ties) get a record each.
    """
    by_parameter: dict[int, list[tuple[ManagedModule, str]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name in getattr(module, "_fxresu", {}):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameters[id(parameter)] = parameter
                by_parameter.setdefault(id(parameter), []).append((cast(ManagedModule, module), name))
    found: dict[str, Managed] = {}
    for key, owners in by_parameter.items():
        module, name = owners[0]
        entry = module._fxresu[name]
        if entry.fqn in found:
            path = next(path for path, m in model.named_modules() if m is module)
            entry = module._fxresu[name] = entry.twin(f"{path}.{name}" if path else name)
        for other, other_name in owners[1:]:
            other._fxresu[other_name] = entry
        found[entry.fqn] = Managed(entry, parameters[key], tuple(owners))
    return found


def parameter_names(model: nn.Module) -> Mapping[int, str]:
    """FQN by `id` of every managed parameter."""
    return {id(m.parameter): fqn for fqn, m in managed_weights(model).items()}


def operand_names(model: nn.Module) -> Mapping[int, str]:
    """FQN by `id` of each tensor that graphs read a managed weight from: the Parameter, its copy, its active values."""
    found = {}
    for fqn, managed in managed_weights(model).items():
        for tensor in (managed.parameter, managed.entry.low, managed.entry.active):
            if tensor is not None:
                found[id(tensor)] = fqn
    return found


def other_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Named parameters that are not managed."""
    managed = parameter_names(model)
    return ((n, p) for n, p in model.named_parameters() if id(p) not in managed)


def freeze_rest(model: nn.Module) -> None:
    """Keep unmanaged parameters from training, until `thaw_rest`."""
    record = state_of(model)
    for _, parameter in other_parameters(model):
        if parameter.requires_grad:
            record.frozen.append(parameter)
            parameter.requires_grad_(False)


def thaw_rest(model: nn.Module) -> None:
    """Let those train again that `freeze_rest` stopped."""
    record = state_of(model)
    for parameter in record.frozen:
        parameter.requires_grad_(True)
    record.frozen = []
