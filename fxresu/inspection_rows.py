"""From a capture to an `Inspection`: which node each weight's consumer became, and what every pass did on the way."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fxresu.passes import PhasePlan, PipelineRecord, Rewrite

from .capture import Capture, Consumer, Seen
from .executed import Executed
from .graph_view import CAPTURED, NodeView, Stage
from .inspection_data import (
    NEVER_READ,
    READ_IN_EAGER,
    GraphView,
    Inspection,
    LeftAlone,
    PassSummary,
    WeightRow,
)
from .model_state import Managed, managed_weights, state_of
from .savings import memory_rows, with_policy
from .shape_copy import Counts

_READERS = ("reads", "rewritten")


def assemble(
    model: nn.Module, capture: Capture, counts: Mapping[str, Counts], *, values: bool, device: str, keep_graphs: bool
) -> Inspection:  # fmt: skip
    """The inspection of a model that is in the phase and was captured there; `seconds` is left at 0."""
    record, weights = state_of(model), managed_weights(model)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    memory, unknown = memory_rows(record, weights, [s.kept_plain for s in capture.seen], [s.kept for s in capture.seen])
    activations = tuple(a for graph in capture.graphs for a in graph.activations)
    if activations:
        memory = with_policy(memory, activations)
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
        passes=tuple(_passes(capture.graphs)),
        operations=sum(r.nodes for r in capture.graphs),
        breaks=tuple(capture.breaks),
        recompiles=capture.recompiles,
        markers_left=sum(len(m) for seen in capture.seen for m in seen.left.values()),
        memory=memory,
        memory_unknown=unknown,
        captured=len(capture.graphs),
        graphs=tuple(map(_graph, capture.seen)) if keep_graphs else (),
        modules={n: type(m).__name__ for n, m in model.named_modules()} if keep_graphs else {},
        seconds=0.0,
        activations=activations,
    )


def _readers(stage: Stage) -> dict[str, list[NodeView]]:
    """Nodes that read each managed weight, in order."""
    found: dict[str, list[NodeView]] = {}
    for node in stage.nodes:
        if node.mark in _READERS:
            found.setdefault(node.weight, []).append(node)
    return found


def _graph(seen: Seen) -> GraphView:
    before, after = _readers(seen.stages[0]), _readers(seen.stages[-1])
    replaced = {
        new.name: old.name
        for name, nodes in after.items()
        if len(nodes) == len(before.get(name, ()))
        for new, old in zip(nodes, before[name])
        if new.name != old.name
    }
    return GraphView(tuple(seen.stages), seen.kept_plain.results, seen.kept.results, replaced)


def _rows(weights: Mapping[str, Managed], counts: Mapping[str, Counts], capture: Capture) -> Iterator[WeightRow]:
    """Rows in the order of the model's weights."""
    consumers: dict[str, list[dict[str, Any]]] = {}
    for index, (graph, seen) in enumerate(zip(capture.graphs, capture.seen)):
        trains = PhasePlan.from_tag(graph.plan_tag).trains if graph.plan_tag else False
        by_weight: dict[str, list[Rewrite]] = {}
        for rewrite in graph.rewrites:
            by_weight.setdefault(rewrite.weight, []).append(rewrite)
        look = _Look(seen)
        for name, rewrites in by_weight.items():
            found = [{**look.row(name, i, r, rewrites, trains), "graph": index} for i, r in enumerate(rewrites)]
            consumers.setdefault(name, []).extend(found)
    for name, managed in weights.items():
        unread = READ_IN_EAGER if name in capture.eager else NEVER_READ
        missing = {"before": "", "after": "", "executed": Executed(), "reason": unread}
        own = counts[name]
        for fields in consumers.get(name) or [missing]:
            yield WeightRow(
                name, managed.entry.shape, own.active, own.candidates, own.active_exact, own.candidates_exact, **fields
            )


class _Look:
    """Finds in one graph's stages what became of a consumer."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.readers = [_readers(stage) for stage in seen.stages]
        self.first = {n.name: n for n in seen.stages[0].nodes} if seen.stages else {}
        self.last = {n.name: n for n in seen.stages[-1].nodes} if seen.stages else {}
        self.users: dict[str, list[NodeView]] = {}
        for node in self.last.values():
            for operand in node.operands:
                self.users.setdefault(operand, []).append(node)

    def row(self, name: str, i: int, rewrite: Rewrite, rewrites: Sequence[Rewrite], trains: bool) -> dict[str, Any]:
        """Fields of the row of the weight's `i`-th consumer."""
        path = self._path(name, i, len(rewrites))
        last = path[-1][1] if path else None
        fields = self._operation(name, i, rewrite, rewrites, last, trains)
        if last is None:
            return fields
        return fields | {
            "steps": _steps(path),
            "casts": tuple(self._casts(last)),
            "kept_plain": self._kept(self.seen.kept_plain, path[0][1].name) if path[0][0] == CAPTURED else None,
            "kept": self._kept(self.seen.kept, last.name),
            "module": last.module,
            "source": last.source,
            "node": last.name,
        }

    def _operation(
        self, name: str, i: int, rewrite: Rewrite, rewrites: Sequence[Rewrite], last: NodeView | None, trains: bool
    ) -> dict[str, Any]:
        if not rewrite.reason:
            taken = self.seen.taken.get(name, [])
            order = sum(not r.reason for r in rewrites[:i])
            by_name = next((c for c in taken if last is not None and c.node == last.name), None)
            new = by_name or (taken[order] if order < len(taken) else Consumer("", rewrite.after, Executed()))
            return {
                "before": rewrite.before, "after": new.op, "executed": new.executed, "reason": "",
                "considered": new.considered,
            }  # fmt: skip
        left = self.seen.left.get(name)
        marker = left[0].executed if left else Executed()
        # The consumer itself stays as it is; what the marker adds comes before its forward and after its backward.
        own = (rewrite.before,)
        ran = Executed(marker.forward + own, own + marker.backward if trains else ())
        return {"before": rewrite.before, "after": rewrite.after, "executed": ran, "reason": rewrite.reason}

    def _path(self, name: str, i: int, number: int) -> list[tuple[str, NodeView]]:
        """The consumer's node from the stage on from which consumers can be told apart: a pass may take one to pieces
        that read several weights."""
        found: list[tuple[str, NodeView]] = []
        for stage, readers in zip(reversed(self.seen.stages), reversed(self.readers)):
            nodes = readers.get(name, [])
            if len(nodes) != number:
                break
            found.append((stage.name, nodes[i]))
        return found[::-1]

    def _casts(self, node: NodeView) -> Iterator[str]:
        for operand in node.operands:
            cast = self.last.get(operand)
            if cast is not None and cast.mark == "cast" and cast.name not in self.first:
                source = self.last.get(cast.operands[0]) if cast.operands else None
                role = "weight" if source is not None and source.op == "weight" else "input"
                if source is not None and source.call.endswith(".bias"):
                    role = "bias"
                yield f"{role} {_dtype(source)} -> {_dtype(cast)}"
        for user in self.users.get(node.name, ()):
            if user.mark == "cast" and user.name not in self.first:
                yield f"result {_dtype(node)} -> {_dtype(user)}"

    def _kept(self, kept: Any, node: str) -> int | None:
        return None if kept.unknown else kept.readers.get(node, 0)


def _dtype(node: NodeView | None) -> str:
    return node.value.partition("[")[0] if node is not None else "?"


def _steps(path: Sequence[tuple[str, NodeView]]) -> tuple[tuple[str, str], ...]:
    steps = [(path[0][0], path[0][1].op)]
    for (_, old), (name, new) in zip(path, path[1:]):
        if (old.name, old.op, old.operands) != (new.name, new.op, new.operands):
            steps.append((name, new.op))
    return tuple(steps)


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
        yield PassSummary(name, sum(e.matches for e in entries), sum(e.seconds for e in entries), changed)


def timed(found: Inspection, seconds: float) -> Inspection:
    """The same inspection with the time that it took."""
    return dataclasses.replace(found, seconds=seconds)
