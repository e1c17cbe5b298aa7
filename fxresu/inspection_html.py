"""Inspections as a self-contained page, and as a fragment for notebooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .graph_view import NodeView
from .html_page import escape, page, script_data
from .inspection_data import GraphView, Inspection, PhaseInspections, WeightRow
from .inspection_explain import considered
from .inspection_text import count_text, grouped, percent, plural, shape_text, size, totals

_SCRIPTS = ("inspect_page.js", "inspect_graph.js")
_BODY = """
<header>
  <h1 id="title"></h1>
  <p id="settings" class="quiet"></p>
</header>
<nav id="phases" role="tablist" aria-label="phases"></nav>
<main>
  <section id="answers" aria-label="in short"></section>
  <section id="weights"><h2>What became of the weights</h2><div id="table" class="wide"></div></section>
  <section id="graph">
    <h2>Graph</h2>
    <div id="passes">
      <label for="slider">after</label>
      <input id="slider" type="range" min="0" value="0" step="1" aria-describedby="pass">
      <div id="ticks"></div>
      <p id="pass"></p>
    </div>
    <div id="legend"></div>
    <div id="split">
      <div id="tree" role="tree" aria-label="modules"></div>
      <div id="view">
        <div id="path"></div>
        <div id="canvas" tabindex="0" aria-label="graph of the chosen module"></div>
        <div id="details" class="mono"></div>
      </div>
    </div>
    <h2>What this pass changed here</h2>
    <pre id="diff"></pre>
  </section>
  <section id="left"><h2>What was not rewritten, and why</h2><div id="reasons"></div></section>
</main>
"""


def document(found: PhaseInspections) -> str:
    """The page of `fxresu inspect --html`.

    Raises:
        ConfigError: the graphs were not kept.
    """
    if not all(p.graphs for p in found):
        raise ConfigError("the graphs were not kept; inspect with keep_graphs=True")
    folder = resources.files("fxresu")
    style = folder.joinpath("inspect_page.css").read_text(encoding="utf-8")
    script = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    body = _BODY + script_data("inspection", page_data(found))
    return page(f"{found.phases[0].model}: fxresu inspect", body, style=style, script=script)


def write_page(path: str | Path, text: str) -> None:
    """Write a page as UTF-8.

    Raises:
        OSError: it cannot be written.
    """
    Path(path).write_text(text, encoding="utf-8")


def page_data(found: PhaseInspections) -> dict[str, Any]:
    """What the page's script reads. Nodes that stages and phases have in common are stored once."""
    first = found.phases[0]
    nodes = _Nodes()
    phases = [_phase(p, nodes) for p in found]
    return {
        "model": first.model,
        "settings": _settings(found),
        "modules": list(first.modules.items()),
        "phases": phases,
        "nodes": nodes.rows,
        "texts": list(nodes.texts),
    }


class _Nodes:
    """Node records as rows of numbers and indices into a list of texts."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.texts: dict[str, int] = {}
        self._places: dict[NodeView, int] = {}

    def text(self, value: str) -> int:
        return self.texts.setdefault(value, len(self.texts))

    def place(self, node: NodeView, drawn: set[str]) -> int:
        """Index of a node's record, with those of its operands that are drawn."""
        if node not in self._places:
            self._places[node] = len(self.rows)
            operands = [self.text(name) for name in node.operands if name in drawn]
            texts = (node.name, node.op, node.call, node.value, node.module, node.mark, node.weight, node.source)
            self.rows.append([*map(self.text, texts), operands])
        return self._places[node]


def _settings(found: PhaseInspections) -> str:
    first, sparsity = found.phases[0], max(p.sparsity for p in found)
    source = "captured on the weights' values" if first.values else "captured from shapes alone, no weight allocated"
    return (
        f"{plural(first.weights, 'managed weight')} hold {first.managed:,} of {first.parameters:,} parameters"
        f" ({first.managed / max(first.parameters, 1):.0%}). Sparsity {sparsity:g}, granularity {first.granularity},"
        f" candidates {first.candidates:g}, storage {first.storage}; {source}."
    )


def _phase(found: Inspection, nodes: _Nodes) -> dict[str, Any]:
    both = totals(found)
    plan = {f.name: str(getattr(found.plan, f.name)) for f in dataclasses.fields(found.plan)}
    return {
        "phase": str(found.phase),
        "plan": plan,
        "trains": found.plan.trains,
        "rewritten": found.rewritten,
        "consumers": len(found.rows),
        "became": [[n, a, b] for (a, b), n in found.became.items()],
        "memory": [[r.component, size(r.plain), size(r.phase), r.plain, r.phase] for r in found.memory],
        "total": [size(both[0]), size(both[1]), percent(*both)] if both else None,
        "unknown": found.memory_unknown,
        "captured": found.captured,
        "operations": found.operations,
        "breaks": [[b.reason, b.where, b.times] for b in found.breaks],
        "recompiles": found.recompiles,
        "rows": [_group(pattern, rows) for pattern, rows in grouped(found.rows, False)],
        "reasons": [[reason, names] for reason, names in found.reasons.items()],
        "alone": [[a.weight, shape_text(a.shape), a.reason] for a in found.left_alone],
        "passes": [[p.name, p.matches, [[op, a, b] for op, (a, b) in p.changed.items()]] for p in found.passes],
        "graphs": [_graph(g, nodes) for g in found.graphs],
        "at": [_place(r) for r in found.rows if r.node],
    }


def _group(pattern: str, rows: Sequence[WeightRow]) -> dict[str, Any]:
    row = rows[0]
    known = all(r.kept is not None and r.kept_plain is not None for r in rows)
    plain, now = sum(r.kept_plain or 0 for r in rows), sum(r.kept or 0 for r in rows)
    return {
        "weight": pattern,
        "times": len(rows),
        "shape": shape_text(row.shape),
        "active": count_text([r.active for r in rows], row.active_exact),
        "candidates": count_text([r.candidates for r in rows], row.candidates_exact),
        "before": row.before,
        "after": row.after,
        "reason": row.reason,
        "casts": list(row.casts),
        "keeps": [size(plain), size(now), percent(plain, now)] if known else None,
        "executes": str(row.executed),
        "graph": row.graph,
        "node": row.node,
        "module": row.module,
    }


def _place(row: WeightRow) -> dict[str, Any]:
    """What the details of a consumer's node add to the node itself."""
    return {
        "graph": row.graph,
        "node": row.node,
        "steps": [list(s) for s in row.steps],
        "casts": list(row.casts),
        "executes": str(row.executed),
        "reason": row.reason,
        "considered": [[c.name, c.reason, c.microseconds, c.chosen] for c in considered(row)],
    }


def _graph(graph: GraphView, nodes: _Nodes) -> dict[str, Any]:
    stages = []
    for stage in graph.stages:
        shown = [n for n in stage.nodes if n.op != "weight"]
        drawn = {n.name for n in shown}
        stages.append([stage.name, _runs([nodes.place(n, drawn) for n in shown])])
    kept = [{name: [size(b), b] for name, b in found.items() if b} for found in (graph.kept_plain, graph.kept)]
    return {"stages": stages, "plain": kept[0], "kept": kept[1], "replaced": dict(graph.replaced)}


def _runs(places: Sequence[int]) -> list[int]:
    """[start, length, start, length, ...] of consecutive numbers."""
    runs: list[int] = []
    for place in places:
        if runs and place == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [place, 1]
    return runs


# ------------------------------------------------------------------------------------------------------------ notebooks


def fragment(found: Sequence[Inspection]) -> str:
    """A few tables without a script, for a notebook's cell."""
    parts = [_fragment_phase(p) for p in found]
    return f'<div style="overflow-x:auto">{"".join(parts)}</div>'


def _fragment_phase(found: Inspection) -> str:
    both = totals(found)
    became = ", ".join(f"{n:,} {a} → {b}" for (a, b), n in found.became.items())
    saves = f"{size(both[0])} → {size(both[1])} ({percent(*both)})" if both else f"unknown: {found.memory_unknown}"
    head = (
        f"<p><b>{escape(found.model)}, phase {escape(found.phase)}</b>: {found.rewritten:,} of"
        f" {plural(len(found.rows), 'consumer')} rewritten{escape(f': {became}' if became else '')}. Memory of a step"
        f" against plain dense training: {escape(saves)}.</p>"
    )
    cells = [
        (pattern, f"×{len(rows)}" if len(rows) > 1 else "", shape_text(rows[0].shape),
         rows[0].reason or f"{rows[0].before} → {rows[0].after}")
        for pattern, rows in grouped(found.rows, False)
    ]  # fmt: skip
    alone = [(a.weight, "", shape_text(a.shape), f"not managed: {a.reason}") for a in found.left_alone]
    return head + _fragment_table(("weight", "", "shape", "became"), [*cells, *alone])


def _fragment_table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th style="text-align:left">{escape(h)}</th>' for h in headers)
    body = ("".join(f'<td style="text-align:left">{escape(c)}</td>' for c in line) for line in lines)
    rows = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
