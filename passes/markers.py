"""Finding markers in a captured graph, and the names of the weights that they read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ._compat import placeholder_example, placeholder_source
from .contract import Graph

MARKER_OPS = (torch.ops.fxresu.managed.default, torch.ops.fxresu.managed_packed.default)
# What passes put in place of a consumer; the weight is the second argument of each.
REWRITTEN_OPS = tuple(
    getattr(torch.ops.fxresu, name).default
    for name in (
        "linear",
        "linear_columns",
        "linear_fp8",
        "linear_packed",
        "linear_packed_columns",
        "matmul",
        "grouped_linear",
        "convolution",
    )
)
_TAGS = tuple([a.name for a in op._schema.arguments].index("tag") for op in MARKER_OPS)
WEIGHT = "fxresu_weight"
"""Key of `Node.meta` for the FQN of the weight that a rewritten node reads."""
PATTERN = "fxresu_pattern"
"""Key of `Node.meta` for the pattern of that weight's mask."""
_SOURCE = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]|_fxresu\['([^']+)'\]")
_PLACEHOLDER = re.compile(r"(?:_modules|_parameters)_(.+?)(?=_modules_|_parameters_|$)")


def target_of(node: Node) -> object:
    """The callable of a call, with an overload packet resolved to its default overload."""
    target = node.target
    return getattr(target, "default", target) if isinstance(target, torch._ops.OpOverloadPacket) else target


def is_marker(node: object) -> bool:
    """Whether the node is where a managed weight enters the graph."""
    return isinstance(node, Node) and node.op == "call_function" and target_of(node) in MARKER_OPS


def marker_tag(marker: Node) -> str:
    """The tag of the plan under which the marker was emitted."""
    index = _TAGS[MARKER_OPS.index(target_of(marker))]
    return str(marker.args[index] if len(marker.args) > index else marker.kwargs["tag"])


def marker_pattern(marker: Node) -> str:
    """The pattern that the weight's mask follows; "" for none."""
    return str(marker.kwargs.get("pattern", ""))


def _source_name(placeholder: Node, names: Mapping[int, str]) -> str:
    """FQN of the parameter behind a placeholder: by identity if known, else from Dynamo's source, else its own name."""
    example = placeholder_example(placeholder)
    if id(example) in names:
        return names[id(example)]
    parts = [a or b for a, b in _SOURCE.findall(placeholder_source(placeholder))]
    return ".".join(parts) if parts else ".".join(_PLACEHOLDER.findall(placeholder.name)) or placeholder.name


def _operand_names(module: GraphModule, names: Mapping[int, str], outer: dict[int, str]) -> dict[Node, str]:
    """Name of every placeholder. `outer` gives names by position where an enclosing graph passed them in."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    return {p: outer.get(i) or _source_name(p, names) for i, p in enumerate(placeholders)}


def fed_weights(module: GraphModule, names: Mapping[int, str]) -> dict[int, str]:
    """FQN of the managed weight that each input of a captured module is, by the input's position."""
    examples = [placeholder_example(n) for n in module.graph.nodes if n.op == "placeholder"]
    return {i: names[id(e)] for i, e in enumerate(examples) if id(e) in names}


def graphs(module: GraphModule, names: Mapping[int, str]) -> Iterator[Graph]:
    """The graph of `module` and of every GraphModule nested in it (checkpoint regions, branches), outermost first.

    Args:
        module: as Dynamo captured it.
        names: FQN by `id` of the real parameter, for graphs captured from a part of the model.
    """
    yield from _walk(module, names, {}, True, set())


def _walk(
    module: GraphModule, names: Mapping[int, str], outer: dict[int, str], outermost: bool, seen: set[int]
) -> Iterator[Graph]:
    if id(module) in seen:
        return
    seen.add(id(module))
    operands = _operand_names(module, names, outer)
    marker_names = {
        n: _marker_name(operands.get(_operand(n), str(_operand(n)))) for n in module.graph.nodes if is_marker(n)
    }
    yield Graph(module, marker_names, outermost)
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        nested = getattr(module, str(node.target), None)
        if not isinstance(nested, GraphModule):
            continue
        for user in node.users:
            # A higher-order op takes its body first and the body's operands after it, in order.
            tail: tuple[Any, ...] = user.args[user.args.index(node) + 1 :] if node in user.args else ()
            flat = tail[0] if len(tail) == 1 and isinstance(tail[0], (tuple, list)) else tail
            inner = {i: operands[a] for i, a in enumerate(flat) if isinstance(a, Node) and a in operands}
            yield from _walk(nested, names, inner, False, seen)


def _operand(marker: Node) -> Node:
    """What the marker reads; of a convolution's weight, before it became a matrix."""
    operand = marker.args[0]
    while isinstance(operand, Node) and operand.op == "call_method" and operand.target == "flatten":
        operand = operand.args[0]
    return operand  # type: ignore[return-value]


def _marker_name(operand: str) -> str:
    """A packed marker reads `<fqn>.active`; the weight's name is the part before."""
    return operand.removesuffix(".active")
