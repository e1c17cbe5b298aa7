"""One capture of a transformed model: call it, stop after the passes, and keep what was seen on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxresu.kernels._autocast import active_dtype, autocast_off
from fxresu.passes import CONSIDERED, Considered, Pass, PhasePlan, Pipeline, PipelineRecord, op_name
from fxresu.passes._compat import honour_dynamic_marks, quiet_fakes, recorded_breaks, recurrent_modules_allowed
from fxresu.passes._compat_partition import traced_by_aot
from fxresu.passes.markers import graphs, is_marker

from .errors import FxresuError
from .executed import Executed, executed
from .graph_view import (
    CAPTURED,
    Names,
    Stage,
    Viewer,
    consumer_of,
    is_rewritten,
    mark_weight,
    nested,
    weight_behind,
)
from .kept import Kept, kept_of
from .managed import ManagedWeight
from .model_state import managed_weights, state_of
from .models import ExampleInputs
from .runner import refresh_copies, runner_of
from .shape_copy import Fakes


class InspectionError(FxresuError, RuntimeError):
    """The model could not be run on the inputs given, so there is nothing to show."""


@dataclasses.dataclass(frozen=True)
class Break:
    """A graph break: why, where in the user's code (`file:line in function`), and how often."""

    reason: str
    where: str
    times: int


def stop(module: GraphModule, inputs: Sequence[Any], partition: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The compiler behind the passes: none. A policy for activations is asked what it decides."""
    if partition is not None:
        traced_by_aot(module, inputs, partition, decompose=True)
    return module.forward


stop.takes_partition = True  # type: ignore[attr-defined]


class _Watched(ManagedWeight):
    """Notices reads outside captured graphs."""

    eager_reads: int = 0

    def read(self, weight: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.eager_reads += 1
        return super().read(weight)


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A node that reads a managed weight in a graph after the passes, or the marker in front of it.

    Attributes:
        node: its name in the graph's stages; "" for a marker.
        op: its operation.
        executed: what it runs.
        considered: what a pass weighed before it chose.
    """

    node: str
    op: str
    executed: Executed
    considered: tuple[Considered, ...] = ()


@dataclasses.dataclass
class Seen:
    """One graph, looked at before the passes and after each.

    Attributes:
        stages: as captured and after every pass.
        kept_plain, kept: what autograd keeps of it, as captured with plain weights, and after the passes.
        taken: rewritten nodes by the weight that they read.
        left: markers that are still there, by weight.
    """

    stages: list[Stage] = dataclasses.field(default_factory=list)
    kept_plain: Kept = Kept()
    kept: Kept = Kept()
    taken: dict[str, list[Consumer]] = dataclasses.field(default_factory=dict)
    left: dict[str, list[Consumer]] = dataclasses.field(default_factory=dict)


class Observer(Pipeline):
    """The pipeline, and a look at each graph before, between and after the passes.

    Args:
        passes: those of the phase's own pipeline.
        fqns: FQN by `id` of every parameter and buffer.
        ambient: makes the context in which the user trains; phases with a precision of their own leave it.
    """

    def __init__(
        self, passes: Sequence[Pass], fqns: Mapping[int, str], ambient: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__(passes)
        self._ambient = ambient
        self.seen: list[Seen] = []
        self._names = Names(fqns)
        self._viewer = Viewer(self._names)
        self._cache: dict[Any, Executed] = {}

    def __call__(
        self, module: GraphModule, names: Mapping[int, str] | None = None, plan: PhasePlan | None = None
    ) -> PipelineRecord:
        seen = Seen()
        self.seen.append(seen)
        for graph in graphs(module, names or {}):
            self._names.annotate(graph.module)
            for marker, name in graph.names.items():
                mark_weight(marker, name)
                mark_weight(marker.args[0], name)
        with self._ambient():
            seen.kept_plain = kept_of(module, plain=True)
        self._viewer = Viewer(self._names)
        record = super().__call__(module, names, plan)
        seen.kept = kept_of(module)
        backward = not record.plan_tag or PhasePlan.from_tag(record.plan_tag).trains
        for sub, prefix in nested(module):
            for node in sub.graph.nodes:
                self._note(node, prefix, seen, backward)
        return record

    def observe(self, name: str, module: GraphModule) -> None:
        self.seen[-1].stages.append(self._viewer.stage(module, name or CAPTURED))

    def _note(self, node: Node, prefix: str, seen: Seen, backward: bool) -> None:
        name = weight_behind(node) if is_marker(node) else consumer_of(node) if is_rewritten(node) else ""
        if not name:
            return
        place = seen.left if is_marker(node) else seen.taken
        ran = executed(node, self._cache, backward=backward)
        place.setdefault(name, []).append(
            Consumer(prefix + node.name, op_name(node), ran, tuple(node.meta.get(CONSIDERED, ())))
        )


@dataclasses.dataclass
class Capture:
    """What one capture found.

    Attributes:
        graphs: what the passes say of the graphs of the first call.
        seen: the same graphs as they were seen.
        recompiles: graphs that a second, identical call compiled.
        breaks: graph breaks of the first call.
        eager: managed weights that were read outside captured graphs.
    """

    graphs: list[PipelineRecord]
    seen: list[Seen]
    recompiles: int
    breaks: list[Break]
    eager: set[str]


def fake_device() -> str:
    """The kind of device that models without values are captured for."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def captured_without_values(model: nn.Module, inputs: ExampleInputs) -> Capture:
    """`captured` on fake tensors, for a model on the meta device."""
    fakes = Fakes(fake_device())
    fakes.replace_in(model)
    try:
        with fakes.mode:
            return captured(model, ExampleInputs(fakes.inputs(inputs.args), fakes.inputs(inputs.kwargs)))
    except InspectionError as error:
        hint = "it ran on shapes alone; if it needs the weights' values, ask for them: values=True, --values"
        raise InspectionError(f"{error} ({hint})") from error.__cause__


def captured(model: nn.Module, inputs: ExampleInputs) -> Capture:
    """Call the model twice; the first call's graphs are what is shown, the second's are recompilations."""
    for managed in managed_weights(model).values():
        managed.entry.__class__ = _Watched
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    fqns: dict[int, str] = {}
    for fqn, tensor in tensors:
        fqns.setdefault(id(tensor), fqn)
    name, record, ambient = type(model).__name__, state_of(model), _ambient(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if record.base == "resu" and record.state.plan.compute_copy == "bf16":
            refresh_copies(model, record)
        entry = runner_of(model).entry(model, record)
        if entry.plan.precision != "inherit":
            stack.enter_context(autocast_off(_device_of(model)))
        if entry.recurrent:
            stack.enter_context(recurrent_modules_allowed())
        observer = Observer(entry.backend.pipeline.passes, fqns, ambient)
        entry.backend.pipeline = observer
        try:
            with recorded_breaks() as found, honour_dynamic_marks(), quiet_fakes(), _without_notes():
                entry.function(model, *inputs.args, **inputs.kwargs)
            first = len(entry.graphs)
            entry.function(model, *inputs.args, **inputs.kwargs)
        except Exception as error:
            told = _told(_eager_error(model, inputs) or error)
            raise InspectionError(f"the forward of {name} raised {told}") from error
    if not first:
        raise InspectionError(
            f"capturing {name} gave no graph: torch.compile skipped it (TORCH_LOGS=graph_breaks says why)"
        )
    eager = {n for n, m in managed_weights(model).items() if getattr(m.entry, "eager_reads", 0)}
    return Capture(entry.graphs[:first], observer.seen[:first], len(entry.graphs) - first, _breaks(found), eager)


def _device_of(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


def _ambient(model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts with the autocast that is active now."""
    kind = _device_of(model)
    dtype = active_dtype(kind)
    return contextlib.nullcontext if dtype is None else lambda: torch.autocast(kind, dtype=dtype)


@contextmanager
def _without_notes() -> Iterator[None]:
    """Dynamo's remarks on how it traces cached functions of other libraries are of no use to the reader."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        yield


def _eager_error(model: nn.Module, inputs: ExampleInputs) -> Exception | None:
    """The error that the model raises without Dynamo, which says more to its author; None if it raises none."""
    try:
        model._call_impl(*inputs.args, **inputs.kwargs)
    except Exception as error:
        return error
    return None


def _told(error: Exception) -> str:
    """What an error says, without torch's wrapping and its advice about debugging torch."""
    error = getattr(error, "inner_exception", error)
    return f"{type(error).__name__}: {str(error).partition(chr(10) * 2)[0]}".rstrip(": ")


def _breaks(found: list[tuple[str, list[Any]]]) -> list[Break]:
    """Breaks by reason and place. A break in an inlined function is met twice, in its caller and then by itself; the
    shortest stacks are the latter."""
    stacks: dict[tuple[str, str], list[int]] = {}
    for reason, stack in found:
        lines = [line.strip() for line in reason.splitlines()] or [""]
        explanation = next((l.removeprefix("Explanation: ") for l in lines if l.startswith("Explanation: ")), "")
        text = f"{lines[0]}: {explanation}" if explanation else lines[0]
        if text.startswith("generic_jump"):
            text = "control flow that depends on a tensor's value"
        where = f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else ""
        stacks.setdefault((text, where), []).append(len(stack))
    return [Break(reason, where, depths.count(min(depths))) for (reason, where), depths in stacks.items()]
