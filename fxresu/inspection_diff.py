"""Graphs as text: as a pass left them, and what a pass changed. Repeated blocks that changed alike are shown once."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

from .errors import ConfigError
from .graph_view import CAPTURED, NodeView, Stage
from .inspection_data import GraphView, Inspection
from .inspection_text import fold, size
from .models import near_matches

_NAME = re.compile(r"%[\w.]+")
_NUMBER = re.compile(r"(?<![^.\s(,=])\d+(?=\.)")
_COLOURS = {"-": "\x1b[31m", "+": "\x1b[32m", "~": "\x1b[2m", "@": "\x1b[36m", "!": "\x1b[1m"}
_OFF = "\x1b[0m"
_HIDDEN = ("weight", "input", "output")


@dataclasses.dataclass(frozen=True)
class Change:
    """One line of a diff.

    Attributes:
        sign: "-" gone, "+" new, "~" the same operation on other operands, " " as it was.
        node: the node; of "~" as it is after the pass.
    """

    sign: str
    node: NodeView


def changes(before: Stage, after: Stage) -> list[Change]:
    """Every node of two stages of one graph, in order, with what became of it."""
    old_place = {n.name: i for i, n in enumerate(before.nodes)}
    new_names = {n.name for n in after.nodes}
    found: list[Change] = []
    at = 0
    for node in after.nodes:
        place = old_place.get(node.name)
        if place is None or place < at:
            found.append(Change("+", node))
            continue
        found += [Change("-", n) for n in before.nodes[at:place] if n.name not in new_names]
        at = place + 1
        old = before.nodes[place]
        if old == node:
            found.append(Change(" ", node))
        elif (old.op, old.value, _blank(old.call)) == (node.op, node.value, _blank(node.call)):
            found.append(Change("~", node))
        else:
            found += [Change("-", old), Change("+", node)]
    return found + [Change("-", n) for n in before.nodes[at:] if n.name not in new_names]


def _blank(call: str) -> str:
    return _NAME.sub("%", call)


def hunks(found: Sequence[Change], context: int = 1) -> Iterator[list[Change]]:
    """Runs of changes of one module, with up to `context` unchanged operations around them."""
    shown = [c for c in found if c.node.op not in _HIDDEN]
    hunk: list[Change] = []
    quiet = 0
    for i, change in enumerate(shown):
        if change.sign in "+-":
            if hunk and change.node.module != _home(hunk):
                yield hunk
                hunk = []
            if not hunk:
                hunk = shown[max(0, i - context) : i] if context else []
                hunk = [c for c in hunk if c.sign not in "+-"]
            hunk, quiet = [*hunk, change], 0
        elif hunk:
            quiet += 1
            if quiet > context:
                yield hunk
                hunk, quiet = [], 0
            elif context:
                hunk.append(change)
    if hunk:
        yield hunk


def _home(hunk: Sequence[Change]) -> str:
    return next(c.node.module for c in hunk if c.sign in "+-")


def _skeleton(hunk: Sequence[Change]) -> tuple[tuple[str, str], ...]:
    """What hunks of repeated blocks have in common: names by order of appearance, without numbers of blocks."""
    numbers: dict[str, str] = {}

    def local(match: re.Match[str]) -> str:
        return numbers.setdefault(match[0], f"%{len(numbers)}")

    return tuple((c.sign, _NUMBER.sub("#", _NAME.sub(local, str(c.node)))) for c in hunk)


def diff_text(
    found: Inspection, name: str | None = None, *, only_changed: bool = False, module: str = "", colour: bool = False
) -> str:
    """What the pass `name` changed (None: every pass), repeated blocks folded.

    Args:
        found: with its graphs.
        only_changed: without the unchanged operations around.
        module: FQN; show only what lies in it.
        colour: for a terminal; without it the signs in front of the lines say the same.

    Raises:
        ConfigError: the pass or the module is unknown, or the pass does not run in this phase.
    """
    _check_module(found, module)
    names = [_pass_name(found, name)] if name is not None else [p.name for p in found.passes]
    if name == CAPTURED:
        raise ConfigError(f"pass {name!r}: is the graph before all passes; a diff needs one of {_known(found)}")
    parts = [_pass_diff(found, n, only_changed, module) for n in names]
    return _coloured("\n\n".join(parts), colour)


def _pass_diff(found: Inspection, name: str, only_changed: bool, module: str) -> str:
    summary = next(p for p in found.passes if p.name == name)
    counts = ", ".join(f"{op} {a:,} -> {b:,}" for op, (a, b) in summary.changed.items())
    lines = [f"! pass {name}: {summary.matches:,} matches{'; ' if counts else ''}{counts}"]
    groups: dict[tuple[tuple[str, str], ...], list[list[Change]]] = {}
    rewired = 0
    for graph in found.graphs:
        before, after = _around(graph, name)
        if before is None or after is None:
            continue
        found_changes = changes(before, after)
        rewired += sum(c.sign == "~" for c in found_changes)
        for hunk in hunks(found_changes, 0 if only_changed else 1):
            if _inside(_home(hunk), module):
                groups.setdefault(_skeleton(hunk), []).append(hunk)
    for alike in groups.values():
        modules = [_home(hunk) for hunk in alike]
        for pattern, members in fold(modules):
            times = f"  x{len(members)}" if len(members) > 1 else ""
            lines += ["", f"@ {pattern or '(the model itself)'}{times}"]
            lines += [f"{c.sign} {str(c.node)}" for c in _gone_first(alike[members[0]])]
    if not groups:
        lines.append(f"  no operation changed{f' in {module}' if module else ''}")
    elif rewired and not only_changed:
        lines += ["", f"~ {rewired:,} operations stay and read what is new in place of what is gone"]
    return "\n".join(lines)


def _gone_first(hunk: Sequence[Change]) -> Iterator[Change]:
    """The hunk with what goes in front of what comes, wherever they meet."""
    for changed, run in itertools.groupby(hunk, lambda c: c.sign in "+-"):
        order = list(run)
        yield from sorted(order, key=lambda c: c.sign == "+") if changed else order


def _around(graph: GraphView, name: str) -> tuple[Stage | None, Stage | None]:
    names = [s.name for s in graph.stages]
    if name not in names:
        return None, None
    i = names.index(name)
    return graph.stages[i - 1], graph.stages[i]


def after_text(
    found: Inspection, name: str, *, only_changed: bool = False, module: str = "", colour: bool = False
) -> str:
    """The graphs as the pass `name` left them ("captured": before all passes), one operation a line.

    Args:
        only_changed: only operations that this pass put in or changed.
        module, colour: as for `diff_text`.

    Raises:
        ConfigError: as `diff_text`.
    """
    _check_module(found, module)
    name = _pass_name(found, name)
    parts = []
    for i, graph in enumerate(found.graphs):
        stage = graph.stage(name)
        if stage is None:
            continue
        new = _new(graph, name) if only_changed else None
        lines = [f"! graph {i} of {found.captured}, after {name}" if name != CAPTURED else f"! graph {i}, as captured"]
        home = None
        last = stage is graph.stages[-1]
        for node in stage.nodes:
            if node.op == "weight" or not _inside(node.module, module) or (new is not None and node.name not in new):
                continue
            if node.module != home:
                lines += ["", f"@ {node.module or '(the model itself)'}"]
                home = node.module
            lines.append(f"{_tag(graph, node, last)} {str(node)}")
        parts.append("\n".join(lines))
    return _coloured("\n\n".join(parts), colour)


def _new(graph: GraphView, name: str) -> set[str]:
    before, after = _around(graph, name)
    if before is None or after is None or before is after or name == CAPTURED:
        return set()
    return {c.node.name for c in changes(before, after) if c.sign == "+"}


def _tag(graph: GraphView, node: NodeView, last: bool) -> str:
    """`+` for rewritten nodes, and what else there is to say in front of a line."""
    kept = graph.kept.get(node.name, 0) if last else graph.kept_plain.get(node.name, 0)
    sign = {"rewritten": "+", "reads": "-", "cast": "~", "marker": "~"}.get(node.mark, " ")
    note = node.mark if node.mark else f"keeps {size(kept)}" if kept else ""
    return f"{sign} {note:<14}"


def _inside(module: str, outer: str) -> bool:
    return not outer or module == outer or module.startswith(outer + ".")


def _check_module(found: Inspection, module: str) -> None:
    if module and module not in found.modules:
        hint = near_matches(module, found.modules)
        raise ConfigError(f"module {module!r}: {found.model} has none of that name{hint}")


def _known(found: Inspection) -> str:
    return ", ".join(p.name for p in found.passes) or "none"


def _pass_name(found: Inspection, name: str) -> str:
    if not found.graphs:
        raise ConfigError("the graphs were not kept; inspect with keep_graphs=True")
    names = [CAPTURED, *(p.name for p in found.passes)]
    if name in names:
        return name
    hint = near_matches(name, names)
    raise ConfigError(
        f"pass {name!r}: does not run in phase {found.phase}; use {CAPTURED} or one of {_known(found)}{hint}"
    )


def _coloured(text: str, colour: bool) -> str:
    """The text with colours by the first character of a line; "!" is only for that and goes."""
    lines = []
    for line in text.split("\n"):
        paint = _COLOURS.get(line[:1]) if colour else None
        shown = line[2:] if line.startswith("! ") else line
        lines.append(f"{paint}{shown}{_OFF}" if paint else shown)
    return "\n".join(lines)
