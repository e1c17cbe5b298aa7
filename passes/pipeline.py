"""Runs the passes of a phase over every graph of a captured module, and records what each did."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch.fx import GraphModule

from ._compat import trace_artifact, tracing_artifacts
from .choose_kernels import CHOOSE_KERNELS, choose_kernels
from .contract import Pass, PassResult, Rewrite, check_order
from .decompose_attention import DECOMPOSE_ATTENTION
from .discard_activations import DISCARD_ACTIVATIONS
from .insert_casts import INSERT_CASTS, product_counts
from .insert_transfers import INSERT_TRANSFERS
from .markers import graphs, marker_tag
from .plan import PhasePlan
from .rewrite_batched import REWRITE_BATCHED
from .rewrite_convolution import REWRITE_CONVOLUTION
from .rewrite_linear import REWRITE_LINEAR
from .tag_activations import ActivationRecord

DEFAULT_PASSES: tuple[Pass, ...] = (
    DECOMPOSE_ATTENTION,
    REWRITE_BATCHED,
    REWRITE_CONVOLUTION,
    REWRITE_LINEAR,  # after the others: it records what nobody rewrote
    INSERT_CASTS,
    DISCARD_ACTIVATIONS,
    INSERT_TRANSFERS,
    CHOOSE_KERNELS,
)


def configured_passes(kernels: Mapping[str, str], *, graphed: bool) -> tuple[Pass, ...]:
    """The default passes, with the chooser's configuration (`choose_kernels`). In graphs that CUDA graphs replay there
    are no transfers: a replay does not run what a CPU does."""
    kept = [p for p in DEFAULT_PASSES[:-1] if not (graphed and p is INSERT_TRANSFERS)]
    return (*kept, choose_kernels(kernels, graphed=graphed))


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """One pass over one captured module.

    Attributes:
        name: the pass.
        matches: nodes that it rewrote or inserted, over all nested graphs.
        seconds: wall time.
        before, after: operation counts, empty if it changed nothing.
        text_before, text_after: the graphs as code, empty unless the pipeline keeps text and the pass changed them.
        counts: what else the pass counted (bytes cast, products that could not have the precision).
    """

    name: str
    matches: int
    seconds: float
    before: Mapping[str, int] = dataclasses.field(default_factory=dict)
    after: Mapping[str, int] = dataclasses.field(default_factory=dict)
    text_before: str = ""
    text_after: str = ""
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class PipelineRecord:
    """What the pipeline did to one captured module.

    Attributes:
        plan_tag: tag of the plan it ran under; "" if no marker was in the module and none was given.
        passes: one record a pass that ran.
        rewrites: every consumer of a managed weight, rewritten or not.
        nodes: operations after the pipeline, all nested graphs together.
        products: matrix products by the precision that they compute in ("fp32", "bf16", "fp16", "fp8", "fp64").
        activations: what became of the activations where the plan has a policy for them; empty before the graph is
            compiled under autograd, and where the compiled graph came from a cache.
    """

    plan_tag: str = ""
    passes: list[PassRecord] = dataclasses.field(default_factory=list)
    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    nodes: int = 0
    products: Counter[str] = dataclasses.field(default_factory=Counter)
    activations: list[ActivationRecord] = dataclasses.field(default_factory=list)

    def serve(self, weights: Mapping[str, str]) -> None:
        """Note that the graph ran with these weights in place of its own, {FQN: FQN of its own}."""
        known = {r.weight for r in self.rewrites}
        for name, own in weights.items():
            if name not in known:
                self.rewrites += [dataclasses.replace(r, weight=name) for r in self.rewrites if r.weight == own]


class MixedPlansError(RuntimeError):
    """One graph holds markers of two phases."""


def plan_of(module: GraphModule, names: Mapping[int, str]) -> PhasePlan | None:
    """The plan that the module's markers carry, or None if it has no marker.

    Raises:
        MixedPlansError: if the markers name different plans.
    """
    tags = {marker_tag(m) for g in graphs(module, names) for m in g.names}
    if len(tags) > 1:
        raise MixedPlansError(
            f"one captured graph reads weights of models in different phases ({', '.join(sorted(tags))});"
            " set both models to the same phase, or compile them apart"
        )
    return PhasePlan.from_tag(tags.pop()) if tags else None


def op_counts(module: GraphModule) -> Counter[str]:
    """Operations by name over all nested graphs."""
    return Counter(
        op_name(node)
        for sub in module.modules()
        if isinstance(sub, GraphModule)
        for node in sub.graph.nodes
        if node.op.startswith("call_")
    )


def op_name(node: torch.fx.Node) -> str:
    """Readable name of a call's target: `fxresu.linear`, `linear`, `.view`."""
    if node.op == "call_method":
        return f".{node.target}"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _text(module: GraphModule) -> str:
    """The module's graphs as code, nested ones inside."""
    return module.print_readable(print_output=False)


class Pipeline:
    """An ordered list of passes.

    Args:
        passes: in the order in which they run.
        keep_text: keep the graphs' code before and after each pass that changed something.

    Raises:
        PassOrderError: if the order breaks a contract.
    """

    def __init__(self, passes: Sequence[Pass] = DEFAULT_PASSES, *, keep_text: bool = False) -> None:
        check_order(passes)
        self.passes = tuple(passes)
        self.keep_text = keep_text

    def __call__(
        self, module: GraphModule, names: Mapping[int, str] | None = None, plan: PhasePlan | None = None
    ) -> PipelineRecord:
        """Run every pass that the plan asks for over every nested graph of `module`, in place.

        The markers name the plan; `plan` is for modules without one (the rest of a model after a graph break).
        """
        names = names or {}
        plan = plan_of(module, names) or plan
        record = PipelineRecord()
        if plan is None:
            record.nodes = sum(op_counts(module).values())
            return record
        record.plan_tag = plan.tag
        tracing = tracing_artifacts()
        self.observe("", module)
        for index, current in enumerate(p for p in self.passes if p.applies(plan)):
            wants_text = self.keep_text or tracing
            text, counts = (_text(module) if wants_text else ""), op_counts(module)
            start = time.perf_counter()
            result = _run(current, module, names, plan)
            seconds = time.perf_counter() - start
            record.rewrites += result.rewrites
            changed = bool(result.matches)
            if current.quiet and not changed:
                continue
            after = _text(module) if wants_text and changed else ""
            if changed and tracing:
                for when, code in (("before", text), ("after", after)):
                    trace_artifact(f"fxresu_{index:02d}_{current.name}_{when}", functools.partial(str, code))
            record.passes.append(
                PassRecord(
                    current.name,
                    result.matches,
                    seconds,
                    dict(counts) if changed else {},
                    dict(op_counts(module)) if changed else {},
                    text if self.keep_text and changed else "",
                    after if self.keep_text else "",
                    dict(result.counts),
                )
            )
            self.observe(current.name, module)
        record.products = sum((product_counts(g.module.graph) for g in graphs(module, names)), Counter())
        record.nodes = sum(op_counts(module).values())
        return record

    def observe(self, name: str, module: GraphModule) -> None:
        """Called with the module as captured (`name` is "") and as each pass leaves it; for subclasses that look on."""


def _run(current: Pass, module: GraphModule, names: Mapping[int, str], plan: PhasePlan) -> PassResult:
    total = PassResult()
    for graph in list(graphs(module, names)):
        result = current.run(graph, plan)
        if result.matches:
            graph.module.graph.lint()
            graph.module.recompile()
        total.matches += result.matches
        total.rewrites += result.rewrites
        total.counts += result.counts
    return total
