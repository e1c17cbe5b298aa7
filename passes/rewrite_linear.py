"""Linear nodes fed by a managed weight become `fxresu::linear` (or `fxresu::linear_packed`)."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

from ._compat import linear_builtin
from .contract import Graph, Pass, PassResult, Rewrite
from .markers import PATTERN, WEIGHT, is_marker, marker_pattern, target_of
from .plan import PhasePlan

_LINEAR = {F.linear, linear_builtin, torch.ops.aten.linear.default}
_ADDMM = {torch.addmm, torch.ops.aten.addmm.default}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, torch.ops.aten.mm.default, torch.ops.aten.matmul.default}
_METHODS = {"matmul": torch.matmul, "__matmul__": torch.matmul, "mm": torch.mm, "addmm": torch.addmm}


def _is_transpose(node: Node) -> bool:
    """`w.t()`, `w.T`, `w.mT`, `w.transpose(0, 1)` of a matrix, in the forms that Dynamo captures."""
    if node.op == "call_method" and node.target in ("t", "transpose"):
        return node.target == "t" or _swaps_two(node.args[1:])
    if node.op == "call_function" and target_of(node) is getattr and node.args[1] in ("T", "mT"):
        return True
    if node.op == "call_function" and target_of(node) in (torch.t, torch.ops.aten.t.default):
        return True
    return node.op == "call_function" and target_of(node) is torch.transpose and _swaps_two(node.args[1:])


def _swaps_two(dims: tuple) -> bool:
    return len(dims) == 2 and {d % 2 for d in dims} == {0, 1}


def _operation(node: Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    target = target_of(node)
    return getattr(target, "__name__", str(target))


def _argument(node: Node, index: int, *names: str) -> object:
    """An argument by position, or by any of the names that it goes by; None if it is not given."""
    if len(node.args) > index:
        return node.args[index]
    return next((node.kwargs[n] for n in names if n in node.kwargs), None)


def _packed_call(graph: Graph, marker: Node, x: object, bias: object) -> Node:
    active, theta, bits, active_start, row_start, size, _dtype, tag = marker.args[:8]
    args = (x, active, theta, bias, bits, active_start, row_start, size[0], size[1], tag, marker.kwargs.get("scale"))
    return graph.module.graph.call_function(torch.ops.fxresu.linear_packed.default, args)


def _resident_call(graph: Graph, marker: Node, x: object, bias: object, transposed: bool) -> Node:
    weight, anchor, bits, row_start, columns, mode, tag = marker.args[:7]
    args = (x, weight, bias, anchor, bits, row_start, columns, mode, tag, transposed)
    return graph.module.graph.call_function(torch.ops.fxresu.linear.default, args)


def _match(user: Node, weight: Node, flipped: bool) -> tuple[object, object, bool] | str:
    """(input, bias, transposed) if `user` is a linear in `weight`, else the reason why not.

    `flipped`: `weight` is a transposed view of the marker.
    """
    if user.op == "call_method":
        target: object = _METHODS.get(str(user.target))
    else:
        target = target_of(user) if user.op == "call_function" else None
    x = _argument(user, 0, "input", "self")
    if target in _LINEAR:
        w, bias = _argument(user, 1, "weight"), _argument(user, 2, "bias")
        if w is not weight:
            return "the managed weight is the linear's input or bias, not its weight"
        return x, bias, flipped
    if target in _ADDMM:
        bias, x, w = x, _argument(user, 1, "mat1"), _argument(user, 2, "mat2")
        if user.kwargs.get("beta", 1) != 1 or user.kwargs.get("alpha", 1) != 1:
            return "addmm with alpha or beta other than 1"
        if w is not weight or not _is_vector(bias):
            return "addmm in which the managed weight is not mat2, or whose bias is not a vector"
        return x, bias, not flipped
    if target in _MATMUL:
        if _argument(user, 1, "mat2", "other") is not weight:
            return "a product in which the managed weight is the left factor"
        return x, None, not flipped
    return f"no pass rewrites {_operation(user)}"


def _is_vector(node: object) -> bool:
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value is not None and value.dim() == 1


def _replace(graph: Graph, marker: Node, user: Node, match: tuple[object, object, bool]) -> str:
    x, bias, transposed = match
    packed = target_of(marker) is torch.ops.fxresu.managed_packed.default
    with graph.module.graph.inserting_before(user):
        if packed:
            new = _packed_call(graph, marker, x, bias)
        else:
            new = _resident_call(graph, marker, x, bias, transposed)
    new.meta = {**user.meta, WEIGHT: graph.names[marker], PATTERN: marker_pattern(marker)}
    user.replace_all_uses_with(new)
    graph.module.graph.erase_node(user)
    return "fxresu.linear_packed" if packed else "fxresu.linear"


def _rank(marker: Node) -> int | None:
    if target_of(marker) is torch.ops.fxresu.managed_packed.default:
        return len(marker.args[5])
    value = marker.meta.get("example_value")
    return None if value is None else value.dim()


def _consumers(marker: Node) -> dict[Node, list[tuple[Node, bool]]]:
    """Consumers of a marker's value, each with the values it reads: (node, whether that is a transposed view)."""
    found: dict[Node, list[tuple[Node, bool]]] = {}
    for user in marker.users:
        if _is_transpose(user) and user.args[0] is marker:
            for second in user.users:
                found.setdefault(second, []).append((user, True))
        else:
            found.setdefault(user, []).append((marker, False))
    return found


def _match_any(marker: Node, user: Node, reads: list[tuple[Node, bool]]) -> tuple[object, object, bool] | str:
    """`_match` for whichever of the values that `user` reads is its weight."""
    if _rank(marker) != 2:
        return f"a weight of {_rank(marker)} dimensions"
    matches = [_match(user, weight, flipped) for weight, flipped in reads]
    match = next((m for m in matches if not isinstance(m, str)), matches[0])
    packed = target_of(marker) is torch.ops.fxresu.managed_packed.default
    if packed and not isinstance(match, str) and match[2]:
        return "packed storage rewrites only input @ weight.T"
    return match


def _run(graph: Graph, plan: PhasePlan) -> PassResult:
    result = PassResult()
    for marker, name in graph.names.items():
        for user, reads in _consumers(marker).items():
            before = _operation(user)
            match = _match_any(marker, user, reads)
            if isinstance(match, str):
                result.rewrites.append(Rewrite(name, before, before, match))
                continue
            result.rewrites.append(Rewrite(name, before, _replace(graph, marker, user, match)))
            result.matches += 1
        _erase_unread(graph, marker)
    return result


def _erase_unread(graph: Graph, marker: Node) -> None:
    for view in list(marker.users):
        if _is_transpose(view) and not view.users:
            graph.module.graph.erase_node(view)
    if is_marker(marker) and not marker.users:
        graph.module.graph.erase_node(marker)


REWRITE_LINEAR = Pass("rewrite_linear", _run, provides=frozenset({"linear_rewritten"}))
