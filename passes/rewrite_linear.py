"""Linear nodes fed by a managed weight become `fxresu::linear` (or `fxresu::linear_packed`).

Every consumer that no pass has rewritten by then is recorded here, with the reason.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxresu.kernels.layout import panel_lines

from ._compat import linear_builtin
from .contract import Graph, Pass, PassResult, Rewrite
from .emit import example, rank
from .markers import PATTERN, WEIGHT, marker_pattern, target_of
from .plan import PhasePlan
from .weight_views import PACKED, Reading, can_cut, consumers, erase_unread, operands, replace

_LINEAR = {F.linear, linear_builtin, torch.ops.aten.linear.default}
_ADDMM = {torch.addmm, torch.ops.aten.addmm.default}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, torch.ops.aten.mm.default, torch.ops.aten.matmul.default}
_METHODS = {"matmul": torch.matmul, "__matmul__": torch.matmul, "mm": torch.mm, "addmm": torch.addmm}

# (input, bias, whether the product is input @ weight rather than input @ weight.T, whether the weight is on the left)
Match = tuple[object, object, bool, bool]


def operation(node: Node) -> str:
    """A node's operation for people."""
    if node.op == "call_method":
        return f".{node.target}"
    if node.op == "output":
        return "returned from the graph"
    target = target_of(node)
    return getattr(target, "__name__", str(target))


def argument(node: Node, index: int, *names: str) -> object:
    """An argument by position, or by any of the names that it goes by; None if it is not given."""
    if len(node.args) > index:
        return node.args[index]
    return next((node.kwargs[n] for n in names if n in node.kwargs), None)


def _match(user: Node, reading: Reading) -> Match | str:
    """How `user` is a linear in what it reads, or the reason why it is none."""
    if user.op == "call_method":
        target: object = _METHODS.get(str(user.target))
    else:
        target = target_of(user) if user.op == "call_function" else None
    if user.op == "output":
        return "a graph break, or the model's result, hands it to code outside this graph"
    if reading.index is not None:
        return f"no pass rewrites {operation(user)} of experts that a tensor chooses"
    if reading.rank != 2:
        return f"no pass rewrites {operation(user)} of a weight of {reading.rank} dimensions"
    x = argument(user, 0, "input", "self")
    if target in _LINEAR:
        w, bias = argument(user, 1, "weight"), argument(user, 2, "bias")
        if w is not reading.node:
            return "the managed weight is the linear's input or bias, not its weight"
        return x, bias, reading.flipped, False
    if target in _ADDMM:
        bias, x, w = x, argument(user, 1, "mat1"), argument(user, 2, "mat2")
        if user.kwargs.get("beta", 1) != 1 or user.kwargs.get("alpha", 1) != 1:
            return "addmm with alpha or beta other than 1"
        if w is not reading.node or rank(bias) != 1:
            return "addmm in which the managed weight is not mat2, or whose bias is not a vector"
        return x, bias, not reading.flipped, False
    if target in _MATMUL:
        other = argument(user, 1, "mat2", "other")
        if other is reading.node and (rank(x) or 0) >= 1:
            return x, None, not reading.flipped, False
        if x is reading.node and (rank(other) or 0) >= 1:
            return other, None, reading.flipped, True
        return "a product of which one operand's shape is unknown"
    return f"no pass rewrites {operation(user)}"


def _match_any(marker: Node, user: Node, readings: list[Reading]) -> tuple[Match, Reading] | str:
    """`_match` for whichever of the values that `user` reads is its weight."""
    matches = [(_match(user, r), r) for r in readings]
    match, reading = next((m for m in matches if not isinstance(m[0], str)), matches[0])
    if isinstance(match, str):
        return match
    if target_of(marker) is PACKED and (match[2] or match[3] or reading.dtype is not None):
        return "packed storage rewrites only input @ weight.T"
    if target_of(marker) is PACKED and _covers_rows(marker):
        return "θ of packed storage covers rows, and this product's inputs are columns"
    if not reading.whole and (why := can_cut(marker)):
        return why
    return match, reading


def _covers_rows(marker: Node) -> bool:
    panel = example(marker.kwargs.get("panel"))
    return isinstance(panel, torch.Tensor) and panel_lines(panel)


def _replace(graph: Graph, marker: Node, user: Node, match: Match, reading: Reading) -> str:
    x, bias, transposed, left = match
    nodes = graph.module.graph
    args: tuple[Any, ...]
    with nodes.inserting_before(user):
        if target_of(marker) is PACKED:
            packed: tuple[Any, ...] = marker.args[:8]
            active, theta, bits, active_start, row_start, size, _dtype, tag = packed
            target = torch.ops.fxresu.linear_packed.default
            scale = marker.kwargs.get("scale")
            args = (x, active, theta, bias, bits, active_start, row_start, size[0], size[1], tag, scale)
            if marker.kwargs.get("panel") is not None:
                target = torch.ops.fxresu.linear_packed_columns.default
                covered = (marker.kwargs[name] for name in ("columns", "panel", "panel_bits"))
                args = (*args[:7], *covered, *args[7:])
        else:
            weight, *rest = operands(graph, marker, reading)
            args = (x, weight, bias, *rest, *marker.args[5:7])
            if left:
                target, args = torch.ops.fxresu.matmul.default, (*args, reading.flipped, True)
            else:
                target, args = torch.ops.fxresu.linear.default, (*args, transposed)
        new = nodes.call_function(target, args)
    replace(graph, user, new)
    new.meta[WEIGHT] = graph.names[marker]
    new.meta[PATTERN] = marker_pattern(marker) if reading.whole else ""
    return str(target).removesuffix(".default")


def _run(graph: Graph, plan: PhasePlan) -> PassResult:
    result = PassResult()
    for marker, name in graph.names.items():
        for user, readings in consumers(marker).items():
            before = operation(user)
            found = _match_any(marker, user, readings)
            if isinstance(found, str):
                result.rewrites.append(Rewrite(name, before, before, found))
                continue
            match, reading = found
            result.rewrites.append(Rewrite(name, before, _replace(graph, marker, user, match, reading)))
            result.matches += 1
        erase_unread(graph, marker)
    return result


REWRITE_LINEAR = Pass("rewrite_linear", _run, provides=frozenset({"linear_rewritten"}))
