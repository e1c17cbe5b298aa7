"""New nodes in a captured graph, with the example values that passes after this one read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from ._compat import quiet_fakes


def example(node: object) -> object:
    """The fake value that a node has in the captured graph; None if it is unknown."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def rank(node: object) -> int | None:
    """Dimensions of a node's value; None if it is no tensor."""
    value = example(node)
    return value.dim() if isinstance(value, Tensor) else None


def emit(graph: Graph, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Node:
    """A call at the graph's insertion point: of a function, or of the method of that name on the first argument."""
    if isinstance(target, str):
        node = graph.call_method(target, args, kwargs)
    else:
        node = graph.call_function(target, args, kwargs)
    evaluate(node)
    return node


def evaluate(node: Node) -> None:
    """Give a node the example value that its operands' values lead to, if all of them are known."""
    operands = [*node.args, *node.kwargs.values()]
    if any(example(n) is None for n in pytree.tree_leaves(operands) if isinstance(n, Node)):
        return
    args, kwargs = pytree.tree_map_only(Node, example, (node.args, node.kwargs))
    with quiet_fakes(), torch.random.fork_rng(devices=[]):
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]
