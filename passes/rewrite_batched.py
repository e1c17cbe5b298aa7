"""Products of batches with managed weights of three dimensions (banks of experts) become `fxresu::matmul`, and products
of rows sorted by expert `fxresu::grouped_linear`."""

from __future__ import annotations

import dataclasses
import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

from .contract import Graph, Pass, PassResult, Rewrite
from .emit import rank
from .markers import target_of
from .plan import PhasePlan
from .rewrite_linear import _LINEAR, argument, operation
from .weight_views import PACKED, Reading, consumers, erase_unread, operands, replace

_PRODUCTS = {
    torch.bmm, torch.matmul, operator.matmul, torch.ops.aten.bmm.default, torch.ops.aten.matmul.default,
}  # fmt: skip
_PRODUCT_METHODS = ("bmm", "matmul", "__matmul__")
_BADDBMM = {torch.baddbmm, torch.ops.aten.baddbmm.default}
_GROUPED = {getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None), torch.ops.aten._grouped_mm.default}


@dataclasses.dataclass(frozen=True)
class _Match:
    """A product: of x and the weight, or of the weight and x (`left`), plus `bias`; grouped by `offs` if given."""

    x: object
    reading: Reading
    bias: object = None
    left: bool = False
    offs: object = None
    native: bool = False


def _is_fallback(target: object) -> bool:
    """transformers' own grouped product, for dtypes that torch's does not take under compilation."""
    return str(target).startswith("transformers.grouped_mm_fallback")


def _match(user: Node, reading: Reading) -> _Match | None:
    if reading.unflattened or (reading.rank != 3 and reading.index is None):
        return None
    method = str(user.target) if user.op == "call_method" else ""
    target = target_of(user) if user.op == "call_function" else None
    if reading.rank == 2:  # one expert, chosen by a tensor
        linear = target in _LINEAR and argument(user, 1, "weight") is reading.node
        bias, turned = argument(user, 2, "bias"), dataclasses.replace(reading, flipped=not reading.flipped)
        return _Match(argument(user, 0, "input"), turned, bias) if linear else None
    first, second = argument(user, 0, "input", "self", "mat_a"), argument(user, 1, "mat2", "other", "mat_b", "weight")
    if target in _BADDBMM or method == "baddbmm":
        bias, x, weight = first, argument(user, 1, "batch1"), argument(user, 2, "batch2")
        plain = user.kwargs.get("beta", 1) == 1 and user.kwargs.get("alpha", 1) == 1
        return _Match(x, reading, bias) if plain and weight is reading.node and rank(x) == 3 else None
    if target in _PRODUCTS or method in _PRODUCT_METHODS:
        if second is reading.node and (rank(first) or 0) >= 3:
            return _Match(first, reading)
        if first is reading.node and (rank(second) or 0) >= 3:
            return _Match(second, reading, left=True)
        return None
    if (target in _GROUPED or _is_fallback(target)) and second is reading.node and rank(first) == 2 and reading.whole:
        offs = argument(user, 2, "offs")
        extra = {k: v for k, v in user.kwargs.items() if k not in ("offs", "mat_a", "mat_b") and v is not None}
        return _Match(first, reading, offs=offs, native=target in _GROUPED) if offs is not None and not extra else None
    return None


def _replace(graph: Graph, marker: Node, user: Node, match: _Match) -> str:
    nodes, swap = graph.module.graph, match.reading.flipped
    with nodes.inserting_before(user):
        weight, *rest = operands(graph, marker, match.reading)
        args = (match.x, weight, match.bias, *rest, *marker.args[5:7])
        if match.offs is not None:
            target, args = torch.ops.fxresu.grouped_linear.default, (*args, match.offs, swap, match.native)
        else:
            target, args = torch.ops.fxresu.matmul.default, (*args, swap, match.left, match.reading.index)
        new = nodes.call_function(target, args)
    replace(graph, user, new)
    return str(target).removesuffix(".default")


def _run(graph: Graph, plan: PhasePlan) -> PassResult:
    result = PassResult()
    for marker, name in graph.names.items():
        if target_of(marker) is PACKED:
            continue
        for user, readings in consumers(marker).items():
            match = next((m for r in readings if (m := _match(user, r)) is not None), None)
            if match is not None:
                before = operation(user)
                result.rewrites.append(Rewrite(name, before, _replace(graph, marker, user, match)))
                result.matches += 1
        erase_unread(graph, marker)
    return result


REWRITE_BATCHED = Pass("rewrite_batched", _run, provides=frozenset({"batched_rewritten"}), quiet=True)
