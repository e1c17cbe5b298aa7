"""Convolutions fed by a managed weight become `fxresu::convolution`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .contract import Graph, Pass, PassResult, Rewrite
from .emit import example
from .markers import target_of
from .plan import PhasePlan
from .rewrite_linear import argument, operation
from .weight_views import PACKED, Reading, consumers, erase_unread, operands, replace

_DIMENSIONS = {
    torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3,
    torch.ops.aten.conv1d.default: 1, torch.ops.aten.conv2d.default: 2, torch.ops.aten.conv3d.default: 3,
}  # fmt: skip
_DEFAULTS = (("stride", 1), ("padding", 0), ("dilation", 1))


def _geometry(user: Node, dimensions: int, kernel: tuple[int, ...]) -> list[list[int]] | None:
    """stride, padding and dilation with one number a dimension; None if the padding is not the same on both sides."""
    found: list[list[int]] = []
    for index, (name, default) in enumerate(_DEFAULTS, start=3):
        given = argument(user, index, name)
        value: Any = default if given is None else given
        if value == "valid":
            value = 0
        if value == "same":
            dilation: Any = argument(user, 5, "dilation") or 1
            spread = dilation if isinstance(dilation, (tuple, list)) else [dilation] * dimensions
            total = [d * (k - 1) for d, k in zip(spread, kernel)]
            if any(t % 2 for t in total):
                return None
            value = [t // 2 for t in total]
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        found.append(values * dimensions if len(values) == 1 else values)
    return found


def _match(user: Node, reading: Reading) -> tuple | None:
    """Arguments of `fxresu::convolution` after the tag, or None."""
    dimensions = _DIMENSIONS.get(target_of(user)) if user.op == "call_function" else None
    shape = getattr(example(reading.node), "shape", ())
    plain = reading.unflattened and reading.whole and not reading.flipped
    if dimensions is None or not plain or len(shape) != dimensions + 2:
        return None
    if argument(user, 1, "weight") is not reading.node:
        return None
    geometry = _geometry(user, dimensions, tuple(shape[2:]))
    if geometry is None:
        return None
    groups = argument(user, 6, "groups")
    return (list(shape[1:]), *geometry, 1 if groups is None else groups)


def _run(graph: Graph, plan: PhasePlan) -> PassResult:
    result = PassResult()
    for marker, name in graph.names.items():
        if target_of(marker) is PACKED:
            continue
        for user, readings in consumers(marker).items():
            found = next(((m, r) for r in readings if (m := _match(user, r)) is not None), None)
            if found is None:
                continue
            before, (rest, reading) = operation(user), found
            with graph.module.graph.inserting_before(user):
                weight, *others = operands(graph, marker, reading)
                x, bias = argument(user, 0, "input"), argument(user, 2, "bias")
                args = (x, weight, bias, *others, *marker.args[5:7], *rest)
                new = graph.module.graph.call_function(torch.ops.fxresu.convolution.default, args)
            replace(graph, user, new)
            result.rewrites.append(Rewrite(name, before, "fxresu.convolution"))
            result.matches += 1
        erase_unread(graph, marker)
    return result


REWRITE_CONVOLUTION = Pass("rewrite_convolution", _run, provides=frozenset({"convolution_rewritten"}), quiet=True)
