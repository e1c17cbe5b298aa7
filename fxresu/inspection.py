"""`inspect`: what the passes do to a model in a phase, found by capturing it and compiling nothing."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxresu.kernels import count
from fxresu.passes import Phase, PhasePlan, PipelineRecord, Rewrite

from .capture import Break, Capture, InspectionError, captured, captured_without_values, stop
from .errors import ConfigError
from .executed import Executed, engine_of
from .model_state import Managed, managed_weights, state_of
from .models import ExampleInputs
from .phases import set_phase
from .shape_copy import Counts, enter_phase, meta_copy
from .transform import transform

_LARGEST_COPY = 2 << 30  # bytes of a model that is copied with its values when nothing else is said
NEVER_READ = "never read in this phase's graph"
READ_IN_EAGER = "read outside the captured graphs, in code that Dynamo leaves to Python"


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """One consumer of a managed weight.

    Attributes:
        weight: FQN.
        shape: of the parameter.
        active, candidates: coordinates kept by the mask, and covered by θ.
        active_exact, candidates_exact: False where that depends on values which were not there; it is a mean then.
        before, after: the consumer's operation as captured, and as the passes leave it.
        executed: operations that it runs, forward and backward.
        reason: why it was left alone; empty if it was rewritten.
    """

    weight: str
    shape: tuple[int, ...]
    active: int
    candidates: int
    active_exact: bool
    candidates_exact: bool
    before: str
    after: str
    executed: Executed
    reason: str = ""

    @property
    def rewritten(self) -> bool:
        """Whether a pass took the consumer over."""
        return not self.reason


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """A parameter of two or more dimensions that is not managed, and why."""

    weight: str
    shape: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class PassSummary:
    """One pass over all graphs together.

    Attributes:
        name: the pass.
        matches: nodes that it rewrote or inserted.
        seconds: wall time.
        changed: (before, after) count of every operation whose count it changed.
        texts: code before and after, a pair for every graph that it changed; empty unless asked for.
    """

    name: str
    matches: int
    seconds: float
    changed: Mapping[str, tuple[int, int]]
    texts: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What became of a model in one phase; see `inspect`.

    Attributes:
        model: name of its class.
        plan: of the phase.
        values: whether it ran on the weights' values, or on shapes alone.
        device: on which the named engines would run.
        sparsity, granularity, candidates, storage: the settings shown.
        parameters: elements of all parameters, tied ones once.
        managed: elements of the managed weights.
        rows: every consumer of every managed weight.
        left_alone: large parameters that are not managed.
        passes: in order.
        graphs, operations: captured, and calls in them after the passes.
        breaks: graph breaks.
        recompiles: graphs compiled by a second, identical call.
        markers_left: markers that serve consumers which no pass rewrote.
        seconds: the whole capture took.
    """

    model: str
    plan: PhasePlan
    values: bool
    device: str
    sparsity: float
    granularity: str
    candidates: float
    storage: str
    parameters: int
    managed: int
    rows: tuple[WeightRow, ...]
    left_alone: tuple[LeftAlone, ...]
    passes: tuple[PassSummary, ...]
    graphs: int
    operations: int
    breaks: tuple[Break, ...]
    recompiles: int
    markers_left: int
    seconds: float

    @property
    def phase(self) -> Phase:
        """The phase that is shown."""
        return self.plan.phase

    @property
    def rewritten(self) -> int:
        """Consumers that a pass rewrote."""
        return sum(r.rewritten for r in self.rows)

    @property
    def weights(self) -> int:
        """Managed weights."""
        return len({r.weight for r in self.rows})

    @property
    def engines(self) -> dict[str, str]:
        """What runs each operation named in the rows."""
        names = dict.fromkeys(n for r in self.rows for n in (*r.executed.forward, *r.executed.backward))
        return {n: engine_of(n, self.device) for n in names}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        data = dataclasses.asdict(self)
        data["phase"] = str(self.phase)
        data["plan"]["phase"] = str(self.phase)
        data |= {"weights": self.weights, "rewritten": self.rewritten, "engines": self.engines}
        for row, source in zip(data["rows"], self.rows):
            row["rewritten"] = source.rewritten
        return data

    def __str__(self) -> str:
        from .inspection_text import render

        return render(self)


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
    keep_text: bool = False,
) -> Inspection:
    """What the passes do to `model` in a phase. Works on a copy: the model, its gradients and the random state stay.

    The copy is brought into the phase, called twice on `inputs`, and captured with the phase's passes; nothing is
    compiled after them.

    Args:
        model: a plain module, which the copy of is transformed, or a transformed one, which keeps its settings and,
            where its weights are in the state that the phase needs, its masks.
        inputs: for one call: a tensor, a tuple of arguments, a dict of keyword arguments, or `ExampleInputs`.
        phase: a `Phase` or its name.
        sparsity: of new masks; default as the transform's (0.5).
        granularity, candidates, storage, include, exclude, plans: for `transform`; only for a plain model.
        values: True copies the weights and runs on them; False runs on shapes alone, which takes no memory; None does
            the former for models of up to 2 GiB. A model on the meta device has no values.
        device: on which the model would train, for naming what executes; default is the model's, and for one without
            values CUDA where there is one.
        keep_text: keep the graphs' code before and after each pass.

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
    call = _as_inputs(model, inputs)
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
        if values:
            capture = captured(copied, call, keep_text)
        else:
            capture = captured_without_values(copied, call, keep_text)
    return _assemble(copied, capture, counts, values, _device(model, device), start)


def _as_inputs(model: nn.Module, inputs: Any) -> ExampleInputs:
    if inputs is None:
        raise ConfigError(
            f"inputs=None: capturing {type(model).__name__} takes one call; give example inputs (a tensor, a tuple of"
            " arguments or a dict of keyword arguments)"
        )
    if isinstance(inputs, ExampleInputs):
        return inputs
    if isinstance(inputs, Mapping):
        return ExampleInputs(kwargs=dict(inputs))
    return ExampleInputs(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,))


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
    dynamic = (record.compile_options or {}).get("dynamic")
    record.compile_options = {"backend": stop, **({} if dynamic is None else {"dynamic": dynamic})}
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
    return Counts(active, int((~mask[:, entry.columns.long()]).sum()))


# ------------------------------------------------------------------------------------------------------------ assembly


def _assemble(
    model: nn.Module, capture: Capture, counts: dict[str, Counts], values: bool, device: str, start: float
) -> Inspection:  # fmt: skip
    record, weights = state_of(model), managed_weights(model)
    first = capture.graphs
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    return Inspection(
        model=type(model).__name__,
        plan=record.state.plan,
        values=values,
        device=device,
        sparsity=record.nominal_sparsity,
        granularity=str(record.granularity),
        candidates=record.candidates,
        storage=record.storage,
        parameters=sum(p.numel() for p in model.parameters()),
        managed=sum(m.entry.numel for m in weights.values()),
        rows=tuple(_rows(weights, counts, capture)),
        left_alone=tuple(LeftAlone(n, shapes.get(n, ()), r) for n, r in record.skipped.items()),
        passes=tuple(_passes(first)),
        graphs=len(first),
        operations=sum(r.nodes for r in first),
        breaks=tuple(capture.breaks),
        recompiles=capture.recompiles,
        markers_left=sum(len(m) for left in capture.observer.left[: len(first)] for m in left.values()),
        seconds=time.perf_counter() - start,
    )


def _rows(
    weights: Mapping[str, Managed], counts: Mapping[str, Counts], capture: Capture
) -> Iterator[WeightRow]:
    """Rows in the order of the model's weights."""
    consumers: dict[str, list[tuple[str, str, Executed, str]]] = {}
    for graph, taken, left in zip(capture.graphs, capture.observer.taken, capture.observer.left):
        new, old = {n: iter(v) for n, v in taken.items()}, {n: v for n, v in left.items()}
        trains = PhasePlan.from_tag(graph.plan_tag).trains if graph.plan_tag else False
        for rewrite in graph.rewrites:
            consumers.setdefault(rewrite.weight, []).append(_consumer(rewrite, new, old, trains))
    for name, managed in weights.items():
        unread = READ_IN_EAGER if name in capture.eager else NEVER_READ
        for before, after, ran, reason in consumers.get(name) or [("", "", Executed(), unread)]:
            own = counts[name]
            yield WeightRow(
                name, managed.entry.shape, own.active, own.candidates, own.active_exact, own.candidates_exact, before,
                after, ran, reason,
            )  # fmt: skip


def _consumer(
    rewrite: Rewrite, new: dict[str, Iterator[tuple[str, Executed]]], old: dict[str, list[Executed]], trains: bool
) -> tuple[str, str, Executed, str]:
    if not rewrite.reason:
        after, ran = next(new.get(rewrite.weight, iter(())), (rewrite.after, Executed()))
        return rewrite.before, after, ran, ""
    marker = old[rewrite.weight][0]
    # The consumer itself stays as it is; what the marker adds to it comes before its forward and after its backward.
    own = (rewrite.before,)
    ran = Executed(marker.forward + own, own + marker.backward if trains else ())
    return rewrite.before, rewrite.after, ran, rewrite.reason


def _passes(records: Sequence[PipelineRecord]) -> Iterator[PassSummary]:
    by_name: dict[str, list[Any]] = {}
    for graph in records:
        for entry in graph.passes:
            by_name.setdefault(entry.name, []).append(entry)
    for name, entries in by_name.items():
        before: Counter[str] = Counter()
        after: Counter[str] = Counter()
        for entry in entries:
            before.update(entry.before)
            after.update(entry.after)
        changed = {op: (before[op], after[op]) for op in sorted(before | after) if before[op] != after[op]}
        texts = tuple((e.text_before, e.text_after) for e in entries if e.text_before)
        yield PassSummary(name, sum(e.matches for e in entries), sum(e.seconds for e in entries), changed, texts)


__all__ = ["Break", "Inspection", "InspectionError", "LeftAlone", "PassSummary", "WeightRow", "inspect"]
