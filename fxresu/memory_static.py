"""What is there between the steps of a phase, and while one phase turns into another: counted from shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from fxresu.kernels.log8 import compressed_bytes
from fxresu.passes import Phase, PhasePlan

from . import weight_storage
from .candidates import panel_shape
from .ledger import memory_bill, tensors_of_weight
from .memory_stages import Stages
from .model_state import ModelState, freeze_rest, managed_weights, other_parameters, state_of
from .rehearsal import TEMPORARY, Rehearsal, tensors_of
from .rehearsed_step import MakeOptimizer, StepOptions
from .resurrection import DTYPES, allocate_moments
from .runner import refresh_copies
from .shape_copy import Fakes, enter_phase, meta_copy
from .state_manager import AWAY

_CODES = compressed_bytes(1 << 20) / (4 << 20)
# Shares of float32 state of the managed weights on the device and on the host, by what RESU does with it. Compressed it
# is a byte a value and a scale a block.
_AWAY = (0.0, 1.0)
_SHARES = {"keep": (1.0, 0.0), "drop": (0.0, 0.0), "offload": _AWAY, "pinned": _AWAY, "compress": (_CODES, 0.0)}
_OPTIMIZER, _OTHER = "optimizer state, managed", "optimizer state, other"


def optimizer_tensors(model: nn.Module, make: MakeOptimizer, device: str) -> dict[str, tuple[int, ...]]:
    """Bytes of each tensor of state on the device that the optimizer keeps for each parameter, found by one step on
    fakes.

    Args:
        model: on the meta device; it stays as it is.
    """
    copied, fakes = meta_copy(model), Fakes(device)
    fakes.mode = Rehearsal(device)  # which answers optimizers that read values
    fakes.replace_in(copied)
    with fakes.mode, torch.no_grad():
        trained = {n: p for n, p in copied.named_parameters() if p.requires_grad}
        if not trained:
            return {}
        optimizer = make(trained.values())
        for parameter in trained.values():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        return {n: _state_bytes(tensors_of({p: optimizer.state.get(p, {})}), device) for n, p in trained.items()}


def _state_bytes(tensors: Sequence[Tensor], device: str) -> tuple[int, ...]:
    return tuple(t.untyped_storage().nbytes() for t in tensors if t.device.type == device)


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """One managed weight in one phase.

    Attributes:
        fqn: its name.
        coordinates: of the weight.
        entries: of θ, padding included; 0 outside of RESU.
        drawn: entries with which θ starts, and is committed: packed storage keeps fewer of a panel; 0 outside of RESU.
        tensors: bytes of each storage in `held`, by component; those that weights share are the first's.
        copied_by_step: its compute copy is made by the first step of RESU, and not on the way there.
        held: bytes on the device by component, optimizer's state included.
        host: bytes that wait in host memory.
        offloaded: the weight itself waits there, and θ has a master of its own only as long as it does.
    """

    fqn: str
    coordinates: int
    entries: int
    held: Mapping[str, int]
    host: int = 0
    offloaded: bool = False
    drawn: int = 0
    tensors: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    copied_by_step: bool = False

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.held.values())

    def of(self, *components: str) -> int:
        """Bytes of these components."""
        return sum(self.held.get(name, 0) for name in components)


@dataclasses.dataclass(frozen=True)
class Standing:
    """What is there between the steps of a phase.

    Attributes:
        phase: which.
        parts: bytes on the device by component.
        weights: the managed weights among it.
        host: bytes in host memory by component.
        moves: bytes on the device of optimizer state that was sent away (codes; on a CPU all of it): they are there
            beside the state itself while it leaves and comes back.
        ahead: state comes back to the device before the phase ends.
        rest: bytes of each tensor on the device that is no managed weight's, by whose it is and component.
    """

    phase: str
    parts: Mapping[str, int]
    weights: tuple[WeightBytes, ...]
    host: Mapping[str, int]
    moves: int = 0
    ahead: bool = False
    rest: Mapping[tuple[str, str], tuple[int, ...]] = dataclasses.field(default_factory=dict)


def in_phase(model: nn.Module, phase: str, options: StepOptions, stages: Stages) -> nn.Module:
    """A meta copy of a transformed meta model in a phase, as training would have it there."""
    copied = meta_copy(model)
    record = state_of(copied)
    for managed in managed_weights(copied).values():
        managed.entry.grad_dtype, managed.entry.theta_dtype = stages.grad_dtype, DTYPES[stages.theta_dtype]
    plan = record.plans[Phase(phase)]
    enter_phase(copied, plan, stages.sparsity)
    for managed in managed_weights(copied).values():
        entry = managed.entry
        if record.base == "resu":
            allocate_moments(managed, options.rule, stages.moments)
        if entry.packed:
            managed.parameter.data = weight_storage.stand_in(entry, managed.parameter)
    if record.base == "resu":
        # Eager code reads the weights, and so do blocks that are compiled one by one.
        if record.plans[Phase.RESU].compute_copy == "bf16" and options.compiled and options.recompute is None:
            _copies(copied, options)
        if not stages.train_rest:
            freeze_rest(copied)
    return copied


def _copies(model: nn.Module, options: StepOptions) -> None:
    """The copies that the runner makes before RESU's first call; it asks autocast of the device the weights are on.
    Phases that go forward only come after steps of RESU: they leave the copies where they are, and do not read them."""
    record = state_of(model)
    before, resu = record.state.plan, record.plans[Phase.RESU]
    if resu.precision == "bf16" or (resu.precision == "inherit" and options.autocast == "bf16"):
        record.state.plan = dataclasses.replace(resu, precision="bf16")
        refresh_copies(model, record)
        record.state.plan = before
        record.state.reads_copies = before.weights == "resu"


def standing(
    model: nn.Module, phase: str, options: StepOptions, state: Mapping[str, Sequence[int]], batch: int
) -> Standing:
    """Count a model that `in_phase` made.

    Args:
        state: of `optimizer_tensors`, of the dense model.
        batch: bytes of the inputs.
    """
    record, weights = state_of(model), managed_weights(model)
    managed_by, other_by = _strategies(record)
    on_device, on_host = _shares(managed_by, options.device)
    other_device, other_host = _shares(other_by, options.device)
    found, seen = [], set[int]()
    for fqn, managed in weights.items():
        own = tensors_of_weight(managed)
        held = {n: sum(map(_bytes, tensors)) for n, tensors in own.items()}
        single = {n: _storages(tensors, seen) for n, tensors in own.items()}
        single[_OPTIMIZER] = _share(on_device, state.get(fqn, ()))
        held[_OPTIMIZER] = sum(single[_OPTIMIZER])
        entries = prod(managed.entry.theta_shape) if record.base == "resu" else 0
        host = _bytes(managed.entry.host)
        if options.device == "cpu":  # where host memory is the device's
            held["managed weights"], host = held["managed weights"] + host, 0
        offloaded = managed.entry.host is not None and managed.parameter.dtype == torch.float32
        drawn = entries if managed.entry.panel is None else prod(panel_shape(managed.entry, record.candidates))
        by_step = record.storage == "resident" and managed.entry.low is not None
        found.append(WeightBytes(fqn, managed.entry.numel, entries, held, host, offloaded, drawn, single, by_step))
    parts = memory_bill(model, None, "meta")
    parts["managed weights"] = sum(w.held["managed weights"] for w in found)
    parts[_OPTIMIZER] = sum(w.held[_OPTIMIZER] for w in found)
    others = dict(other_parameters(model))
    rest = sum(sum(state.get(n, ())) for n in others)
    parts[_OTHER] = int(other_device * rest)
    parts["batch"] = batch
    in_host = {
        "pinned copies of weights": sum(w.host for w in found),
        "optimizer state": int(on_host * sum(sum(state.get(n, ())) for n in weights) + other_host * rest),
    }
    moves = (managed_by in AWAY) * parts[_OPTIMIZER] + (other_by in AWAY) * parts[_OTHER]
    ahead = record.state.plan.transfers and options.device != "cpu"
    alone = {(n, "other parameters"): _storages([p], seen) for n, p in others.items()}
    alone |= {(n, "buffers"): _storages([b], seen) for n, b in model.named_buffers()}
    alone |= {("", "batch"): (batch,)}
    alone |= {(n, _OTHER): _share(other_device, state.get(n, ())) for n in others}
    return Standing(phase, parts, tuple(found), in_host, moves, ahead, alone)


def _storages(tensors: Sequence[Tensor | None], seen: set[int]) -> tuple[int, ...]:
    """Bytes of every storage that was not seen before."""
    sizes = []
    for tensor in tensors:
        if tensor is not None and _bytes(tensor) and (key := tensor.untyped_storage()._cdata) not in seen:
            seen.add(key)
            sizes.append(_bytes(tensor))
    return tuple(sizes)


def _share(share: float, sizes: Sequence[int]) -> tuple[int, ...]:
    """What of a parameter's state is on the device; codes lie in one piece."""
    return tuple(sizes) if share == 1 else tuple(filter(None, (int(share * sum(sizes)),)))


def _strategies(record: ModelState) -> tuple[str, str]:
    """What was done with the state of the managed weights and of the rest: by the phase itself where it is forward
    only, and before that by RESU, which leaves the rest's alone when it drops or trains it."""
    own = record.state.plan.optimizer_state if record.state.plan.weights == "effective" else "keep"
    if record.base != "resu":
        return own, own
    resu = record.plans[Phase.RESU].optimizer_state
    return own if resu == "keep" else resu, resu if resu in AWAY and record.frozen else own


def _shares(strategy: str, device: str) -> tuple[float, float]:
    """Shares of the state on the device and on the host."""
    on_device, on_host = _SHARES[strategy]
    return (on_device + on_host, 0.0) if device == "cpu" else (on_device, on_host)  # where the host's is the device's


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.untyped_storage().nbytes()


# --- transitions -----------------------------------------------------------------------------------------------------

Temporary = Callable[[WeightBytes, WeightBytes], float]


class _Walk:
    """The level of bytes while a transition goes through the weights, several times over."""

    def __init__(self, start: Standing) -> None:
        self.level = dict(start.parts)
        self.best, self.peak = dict(start.parts), sum(start.parts.values())

    def change(self, by: Mapping[str, int]) -> None:
        for name, size in by.items():
            self.level[name] = self.level.get(name, 0) + size

    def look(self, temporary: float = 0) -> None:
        total = sum(self.level.values()) + int(temporary)
        if total > self.peak:
            self.peak, self.best = total, {**self.level, TEMPORARY: int(temporary)}


def _chunk(coordinates: int) -> int:
    """Coordinates that selection looks at together (see `topk.row_chunks`)."""
    return min(coordinates, max(1 << 17, min(coordinates // 64, 1 << 22)))


def _difference(before: WeightBytes, after: WeightBytes, *components: str) -> dict[str, int]:
    return {n: after.held.get(n, 0) - before.held.get(n, 0) for n in components}


def transition(name: str, before: Standing, after: Standing, device: str) -> dict[str, int]:
    """Bytes by component at the highest point of a transition; what a single weight needs for the moment is among the
    temporaries. See `sparsify` and `resurrection` for the order of what they do.

    Args:
        name: one of `memory_bill.TRANSITIONS`.
        before, after: the phases on both sides.
    """
    if before.ahead:
        before = _come_back(before, after)
    walk = _Walk(before)
    pairs = list(zip(before.weights, after.weights))
    rest = {_OTHER: after.parts[_OTHER] - before.parts[_OTHER]}
    if name != "start RESU":
        walk.change(rest)
        walk.change({_OPTIMIZER: before.moves})
    {"prune": _prune, "start RESU": _start, "commit": _commit, "drop masks": _drop}[name](walk, pairs, device == "cpu")
    walk.look(after.moves)
    return walk.best


def _come_back(before: Standing, after: Standing) -> Standing:
    """The phase as it is at its end, with the optimizer's state at home again."""
    weights = tuple(
        dataclasses.replace(b, held={**b.held, _OPTIMIZER: a.held[_OPTIMIZER]})
        for b, a in zip(before.weights, after.weights)
    )
    parts = {**before.parts, **{name: after.parts[name] for name in (_OPTIMIZER, _OTHER)}}
    return dataclasses.replace(before, parts=parts, weights=weights)


_Pairs = Sequence[tuple[WeightBytes, WeightBytes]]
# Bytes a coordinate that packing a mask takes on a CPU, where it has no kernel: a bool, and int64 twice.
_PACK = 17
# A bool mask, and the keys of a chunk with what ranks them.
_KEYS = 16


def selection_bytes(coordinates: int) -> tuple[int, int]:
    """Sizes of what selection needs of a weight for the moment on a GPU: its mask, and the keys of a chunk."""
    return coordinates, _KEYS * _chunk(coordinates)


def _prune(walk: _Walk, pairs: _Pairs, cpu: bool) -> None:
    for before, after in pairs:
        n = before.coordinates
        walk.look(n + max(_KEYS * _chunk(n), _PACK * n if cpu else 0))
        walk.change({"masks": after.of("masks")})
    walk.look(2 * pairs[-1][0].coordinates if cpu else 0)


def _start(walk: _Walk, pairs: _Pairs, cpu: bool) -> None:
    for before, after in pairs:
        n, entries = before.coordinates, after.drawn
        walk.look(16 * entries if cpu else 4 * entries + n + 9 * _chunk(n))
        walk.change(_difference(before, after, "θ", "θ moments", "masks"))
        # A weight that goes away is there until what stands for it is.
        if not after.copied_by_step:
            walk.change(_difference(before, after, "compute copies"))
        goes = _difference(before, after, "managed weights")
        if goes["managed weights"]:
            walk.look(after.of("managed weights") + (12 * entries if cpu else 0))
        walk.change(goes)
    walk.look()


def _commit(walk: _Walk, pairs: _Pairs, cpu: bool) -> None:
    for before, after in pairs:
        n = before.coordinates
        dense = n * 4 if before.of("managed weights") < after.of("managed weights") else 0
        walk.look(dense + 2 * n + max(_KEYS * _chunk(n), _PACK * n if cpu else 0))
        walk.change({"masks": after.of("masks")})
    _restored(walk, pairs, cpu)
    for before, _ in pairs:
        walk.look((28 if cpu else 16) * before.drawn)
        walk.change(_left(before))


def _drop(walk: _Walk, pairs: _Pairs, cpu: bool) -> None:
    _restored(walk, pairs, cpu)
    for before, _ in pairs:
        walk.look((_PACK if cpu else 0) * before.coordinates)
        walk.change({"masks": before.coordinates // 8})
    for before, _ in pairs:
        walk.look((28 if cpu else 16) * before.drawn)
        walk.change(_left(before))
        walk.change({"masks": -before.coordinates // 8})


def _restored(walk: _Walk, pairs: _Pairs, cpu: bool) -> None:
    """Weights come back, and the state that RESU dropped, before anything of RESU goes."""
    for before, after in pairs:
        dense = _difference(before, after, "managed weights")
        walk.change(dense)
        walk.look(20 * before.entries if cpu and dense["managed weights"] else 0)
        if before.offloaded:
            walk.look((4 * before.coordinates + 16 * before.entries) if cpu else 0)
            walk.change({"θ": -before.of("θ")})
        walk.change(_difference(before, after, _OPTIMIZER))
        walk.look()


def _left(before: WeightBytes) -> dict[str, int]:
    """What ends with RESU."""
    gone = ("θ moments", "compute copies") if before.offloaded else ("θ", "θ moments", "compute copies")
    return {n: -before.held.get(n, 0) for n in gone} | {"masks": -before.of("masks")}


def plan_of(model: nn.Module, phase: str) -> PhasePlan:
    """The model's plan for a phase."""
    return state_of(model).plans[Phase(phase)]
