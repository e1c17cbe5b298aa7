"""One capture of a transformed model: call it, stop after the passes, and keep what was seen on the way."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxresu.passes import PhasePlan, Pipeline, PipelineRecord
from fxresu.passes._compat import honour_dynamic_marks, quiet_fakes, recorded_breaks
from fxresu.passes.markers import graphs, is_marker

from .errors import FxresuError
from .executed import Executed, executed
from .managed import ManagedWeight
from .model_state import managed_weights, state_of
from .models import ExampleInputs
from .runner import runner_of
from .shape_copy import Fakes

_LINEARS = tuple(
    getattr(torch.ops.fxresu, name).default for name in ("linear", "linear_columns", "linear_packed")
)


class InspectionError(FxresuError, RuntimeError):
    """The model could not be run on the inputs given, so there is nothing to show."""


@dataclasses.dataclass(frozen=True)
class Break:
    """A graph break: why, where in the user's code (`file:line in function`), and how often."""

    reason: str
    where: str
    times: int


def stop(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The compiler behind the passes: none."""
    return module.forward


class _Watched(ManagedWeight):
    """Notices reads outside captured graphs."""

    eager_reads: int = 0

    def read(self, weight: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.eager_reads += 1
        return super().read(weight)


class Observer(Pipeline):
    """The pipeline, and a look at each graph after it: which nodes read which managed weight, and what they run."""

    def __init__(self, keep_text: bool) -> None:
        super().__init__(keep_text=keep_text)
        self.taken: list[dict[str, list[tuple[str, Executed]]]] = []
        self.left: list[dict[str, list[Executed]]] = []
        self._cache: dict[Any, Executed] = {}

    def __call__(
        self, module: GraphModule, names: Mapping[int, str] | None = None, plan: PhasePlan | None = None
    ) -> PipelineRecord:
        for graph in graphs(module, names or {}):
            for marker, name in graph.names.items():
                marker.meta["fxresu_weight"] = name
                if isinstance(marker.args[0], Node):
                    marker.args[0].meta["fxresu_weight"] = name
        record = super().__call__(module, names, plan)
        backward = not record.plan_tag or PhasePlan.from_tag(record.plan_tag).trains
        taken: dict[str, list[tuple[str, Executed]]] = {}
        left: dict[str, list[Executed]] = {}
        for sub in module.modules():
            for node in sub.graph.nodes if isinstance(sub, GraphModule) else ():
                if is_marker(node):
                    left.setdefault(node.meta.get("fxresu_weight", ""), []).append(self._run(node, backward))
                elif node.target in _LINEARS and isinstance(node.args[1], Node):
                    name = _weight_behind(node.args[1])
                    taken.setdefault(name, []).append((_name(node), self._run(node, backward)))
        self.taken.append(taken)
        self.left.append(left)
        return record

    def _run(self, node: Node, backward: bool) -> Executed:
        return executed(node, self._cache, backward=backward)


def _weight_behind(node: Node) -> str:
    """FQN of the weight that a node passes on, through the casts and views that passes put in between."""
    while "fxresu_weight" not in node.meta:
        if node.op == "placeholder" or not (node.args and isinstance(node.args[0], Node)):
            return ""
        node = node.args[0]
    return node.meta["fxresu_weight"]


def _name(node: Node) -> str:
    return str(node.target).removesuffix(".default")


@dataclasses.dataclass
class Capture:
    """What one capture found.

    Attributes:
        graphs: records of the first call.
        recompiles: graphs that a second, identical call compiled.
        observer: what each graph holds after the passes.
        breaks: graph breaks of the first call.
        eager: managed weights that were read outside captured graphs.
    """

    graphs: list[PipelineRecord]
    recompiles: int
    observer: Observer
    breaks: list[Break]
    eager: set[str]


def captured_without_values(model: nn.Module, inputs: ExampleInputs, keep_text: bool) -> Capture:
    """`captured` on fake tensors, for a model on the meta device."""
    fakes = Fakes("cuda" if torch.cuda.is_available() else "cpu")
    fakes.replace_in(model)
    try:
        with fakes.mode:
            return captured(model, ExampleInputs(fakes.inputs(inputs.args), fakes.inputs(inputs.kwargs)), keep_text)
    except InspectionError as error:
        hint = "it ran on shapes alone; if it needs the weights' values, ask for them: values=True, --values"
        raise InspectionError(f"{error} ({hint})") from error.__cause__


def captured(model: nn.Module, inputs: ExampleInputs, keep_text: bool) -> Capture:
    """Call the model twice; the first call's graphs are what is shown, the second's are recompilations."""
    for managed in managed_weights(model).values():
        managed.entry.__class__ = _Watched
    observer, name = Observer(keep_text), type(model).__name__
    with torch.enable_grad():
        entry = runner_of(model).entry(model, state_of(model))
        observer.passes = entry.backend.pipeline.passes
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
    return Capture(entry.graphs[:first], len(entry.graphs) - first, observer, _breaks(found), eager)


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
