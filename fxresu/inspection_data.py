"""What `inspect` finds, as plain data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxresu.passes import ActivationRecord, Considered, Phase, PhasePlan

from .capture import Break
from .executed import Executed, engine_of
from .graph_view import Stage

if TYPE_CHECKING:
    from .inspection_explain import Explanation

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
        steps: (pass, operation that it left) for the captured graph and every pass that changed the node.
        casts: that passes put around it, as `input f32 -> bf16`.
        kept_plain, kept: bytes that it has autograd keep in the plain model, and in this phase. A tensor that several
            operations need counts for the first. None if unknown.
        considered: the ways to execute it that were weighed; empty if there was nothing to choose.
        module, source: where it is in the model and in its code.
        graph, node: where it is in `Inspection.graphs`; -1 and "" if it is in none.
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
    steps: tuple[tuple[str, str], ...] = ()
    casts: tuple[str, ...] = ()
    kept_plain: int | None = None
    kept: int | None = None
    considered: tuple[Considered, ...] = ()
    module: str = ""
    source: str = ""
    graph: int = -1
    node: str = ""

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
    """

    name: str
    matches: int
    seconds: float
    changed: Mapping[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """Bytes of one component of a training step: in plain dense training, and in the phase. None if unknown."""

    component: str
    plain: int | None
    phase: int | None


@dataclasses.dataclass(frozen=True)
class GraphView:
    """One captured graph.

    Attributes:
        stages: as captured, and as each pass that ran left it.
        kept_plain, kept: bytes that autograd keeps for the backward, by node: of the captured graph with plain weights,
            and of the last stage.
        replaced: the captured node that a node of the last stage stands for, where its name is another.
    """

    stages: tuple[Stage, ...]
    kept_plain: Mapping[str, int]
    kept: Mapping[str, int]
    replaced: Mapping[str, str]

    def stage(self, name: str) -> Stage | None:
        """The stage of that name, or None if the pass did not run."""
        return next((s for s in self.stages if s.name == name), None)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What became of a model in one phase; see `fxresu.inspect`.

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
        operations: calls in all graphs after the passes.
        breaks: graph breaks.
        recompiles: graphs compiled by a second, identical call.
        markers_left: markers that serve consumers which no pass rewrote.
        memory: what the managed weights and all activations take, against plain dense training.
        memory_unknown: why the activations are unknown; empty if they are known.
        activations: what the policy for activations decides, one record a graph; empty without a policy.
        captured: number of captured graphs.
        graphs: their nodes at every stage; empty unless asked for.
        modules: class of every module by FQN, in the model's order; empty unless graphs were asked for.
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
    operations: int
    breaks: tuple[Break, ...]
    recompiles: int
    markers_left: int
    memory: tuple[MemoryRow, ...]
    memory_unknown: str
    captured: int
    graphs: tuple[GraphView, ...]
    modules: Mapping[str, str]
    seconds: float
    activations: tuple[ActivationRecord, ...] = ()

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
    def became(self) -> dict[tuple[str, str], int]:
        """Number of rewritten consumers by (operation before, operation after)."""
        return dict(Counter((r.before, r.after) for r in self.rows if r.rewritten))

    @property
    def reasons(self) -> dict[str, list[str]]:
        """FQNs of the weights with a consumer that was not rewritten, by reason."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.reason and row.weight not in found.setdefault(row.reason, []):
                found[row.reason].append(row.weight)
        return found

    @property
    def engines(self) -> dict[str, str]:
        """What runs each operation named in the rows."""
        names = dict.fromkeys(n for r in self.rows for n in (*r.executed.forward, *r.executed.backward))
        return {n: engine_of(n, self.device) for n in names}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        data = dataclasses.asdict(self)
        data["phase"] = str(self.phase)
        data["plan"] = {k: str(v) if isinstance(v, Phase) else v for k, v in data["plan"].items()}
        data |= {"weights": self.weights, "rewritten": self.rewritten, "engines": self.engines}
        for row, source in zip(data["rows"], self.rows):
            row["rewritten"] = source.rewritten
        return data

    def explain(self, name: str) -> Explanation:
        """Why a weight became the node that it is; see `fxresu.inspection_explain.explain`."""
        from .inspection_explain import explain

        return explain((self,), name)

    def diff(self, name: str | None = None, **options: Any) -> str:
        """What the pass `name`, or every pass, changed; see `fxresu.inspection_diff.diff_text`. Needs the graphs."""
        from .inspection_diff import diff_text

        return diff_text(self, name, **options)

    def after(self, name: str, **options: Any) -> str:
        """The graphs as the pass `name` left them; see `fxresu.inspection_diff.after_text`. Needs the graphs."""
        from .inspection_diff import after_text

        return after_text(self, name, **options)

    def __str__(self) -> str:
        from .inspection_text import render

        return render(self)

    def _repr_html_(self) -> str:
        from .inspection_html import fragment

        return fragment((self,))


@dataclasses.dataclass(frozen=True)
class PhaseInspections:
    """One model in several phases; see `fxresu.inspect_phases`. Iterates over the inspections, in training's order."""

    phases: tuple[Inspection, ...]

    def __iter__(self) -> Iterator[Inspection]:
        return iter(self.phases)

    def __len__(self) -> int:
        return len(self.phases)

    def __getitem__(self, phase: Phase | str) -> Inspection:
        """The inspection of a phase; KeyError if it is not among them."""
        wanted = Phase.parse(phase)
        for found in self.phases:
            if found.phase is wanted:
                return found
        raise KeyError(f"phase {str(wanted)!r} was not inspected; these were: {', '.join(p.phase for p in self)}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return {"model": self.phases[0].model, "phases": {str(p.phase): p.to_dict() for p in self.phases}}

    def explain(self, name: str) -> Explanation:
        """Why a weight became the nodes that it is; see `fxresu.inspection_explain.explain`."""
        from .inspection_explain import explain

        return explain(self.phases, name)

    def save_html(self, path: str | Path) -> None:
        """Write the page that `fxresu inspect --html` writes.

        Raises:
            ConfigError: the graphs were not kept (`keep_graphs=True`).
            OSError: the file cannot be written.
        """
        from .inspection_html import document, write_page

        write_page(path, document(self))

    def __str__(self) -> str:
        from .inspection_text import render_phases

        return render_phases(self)

    def _repr_html_(self) -> str:
        from .inspection_html import fragment

        return fragment(self.phases)
