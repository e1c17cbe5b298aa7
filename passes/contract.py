"""What a pass is, what it promises, and the check of an order before anything runs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from torch.fx import GraphModule, Node

from .plan import PhasePlan

CONSIDERED = "fxresu_considered"
"""Key of `Node.meta` under which a pass leaves the `Considered` records of a choice that it made for the node."""


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One consumer of a managed weight, and what became of it.

    Attributes:
        weight: FQN of the managed weight.
        before: the node's operation before the pass.
        after: the operation put in its place, or `before` if it was left alone.
        reason: why it was left alone; empty if it was rewritten.
    """

    weight: str
    before: str
    after: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Considered:
    """One way to execute a node, and why it was or was not taken.

    Attributes:
        name: of the kernel or form, as a reader would look it up.
        reason: the condition that it does not meet here; empty if it could have run.
        microseconds: measured time of one call, forward and backward; None if nobody measured it.
        chosen: whether it is the one that runs.
    """

    name: str
    reason: str = ""
    microseconds: float | None = None
    chosen: bool = False


@dataclasses.dataclass
class PassResult:
    """What one pass did to one graph. `counts`: what else it counted, by its name for people."""

    matches: int = 0
    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass(frozen=True)
class Graph:
    """One graph of a (nested) GraphModule, with the FQNs of the managed weights that its markers read."""

    module: GraphModule
    names: dict[Node, str]
    outermost: bool


@dataclasses.dataclass(frozen=True)
class Pass:
    """A graph pass: a function over one graph, and its contract.

    Attributes:
        name: unique within a pipeline.
        run: `(graph, plan) -> PassResult`; edits the graph in place.
        provides: facts that hold after it ran.
        requires: facts that an earlier pass must have provided.
        conflicts: facts that must not hold yet when it runs.
        applies: whether the plan asks for it at all.
        quiet: leaves no record where it found nothing, because few models have what it looks for.
    """

    name: str
    run: Callable[[Graph, PhasePlan], PassResult]
    provides: frozenset[str] = frozenset()
    requires: frozenset[str] = frozenset()
    conflicts: frozenset[str] = frozenset()
    applies: Callable[[PhasePlan], bool] = lambda plan: True
    quiet: bool = False


class PassOrderError(ValueError):
    """A pipeline whose passes cannot run in the order given."""


def check_order(passes: Sequence[Pass]) -> None:
    """Refuse an order in which a pass lacks a requirement, meets a conflict, or is there twice.

    Raises:
        PassOrderError: naming the pass, the fact, and where the fact comes from.
    """
    provided: dict[str, str] = {}
    seen: set[str] = set()
    for current in passes:
        if current.name in seen:
            raise PassOrderError(f"pass {current.name!r} is in the pipeline twice; names are unique")
        seen.add(current.name)
        for fact in sorted(current.requires - provided.keys()):
            later = [p.name for p in passes if fact in p.provides]
            hint = f"put {later[0]!r} before it" if later else "no pass of this pipeline provides it"
            raise PassOrderError(f"pass {current.name!r} requires {fact!r}: {hint}")
        for fact in sorted(current.conflicts & provided.keys()):
            raise PassOrderError(
                f"pass {current.name!r} conflicts with {fact!r}, which {provided[fact]!r} provides before it"
            )
        provided.update(dict.fromkeys(current.provides, current.name))
