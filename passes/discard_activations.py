"""Activations that the phase does not need are not saved.

Forward-only phases: autograd is switched off inside the graph, so that AOTAutograd sees an inference graph.
RESU with inputs as candidates: a linear keeps only these columns of its input (`fxresu::linear_columns`;
on packed storage it is `fxresu::linear_packed_columns` from the start).
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxresu.kernels.layout import row_panel

from ._compat import set_grad_enabled
from .contract import Graph, Pass, PassResult
from .markers import target_of
from .plan import PhasePlan


def _needs_grad(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad and node.op != "placeholder"


def _forward_only(graph: Graph) -> int:
    """Wrap the graph in `no_grad`; the number of results that autograd no longer tracks."""
    nodes = graph.module.graph
    tracked = sum(map(_needs_grad, nodes.nodes))
    for node in nodes.nodes:
        # The end of a `no_grad` region of the model's own would switch tracking on for all that follows.
        if node.op == "call_function" and node.target is set_grad_enabled:
            node.args = (False,)
    if not tracked or not graph.outermost:
        return tracked
    first = next(n for n in nodes.nodes if n.op != "placeholder")
    with nodes.inserting_before(first):
        nodes.call_function(set_grad_enabled, (False,))
    with nodes.inserting_before(next(n for n in reversed(nodes.nodes) if n.op == "output")):
        nodes.call_function(set_grad_enabled, (True,))
    return tracked


def _covers_rows(*operands: Node) -> bool:
    weight, anchor, columns = (o.meta["example_value"] for o in operands)
    return row_panel(anchor.shape, columns, weight.shape[0])


def _keep_columns(graph: Graph) -> int:
    """`fxresu::linear` in RESU whose candidates are inputs becomes `fxresu::linear_columns`.

    A panel of columns used the other way round (input @ weight), or one of rows in a plain linear, covers outputs: that
    needs all of the input.
    """
    found = 0
    for node in list(graph.module.graph.nodes):
        if node.op != "call_function" or target_of(node) is not torch.ops.fxresu.linear.default:
            continue
        x, weight, bias, anchor, bits, row_start, columns, mode, tag, transposed = node.args
        if mode != "resu" or columns is None or _covers_rows(weight, anchor, columns) != bool(transposed):
            continue
        with graph.module.graph.inserting_before(node):
            new = graph.module.graph.call_function(
                torch.ops.fxresu.linear_columns.default,
                (x, weight, bias, anchor, bits, row_start, columns, tag, bool(transposed)),
            )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.module.graph.erase_node(node)
        found += 1
    return found


def _run(graph: Graph, plan: PhasePlan) -> PassResult:
    if plan.activations == "discard":
        return PassResult(matches=_forward_only(graph))
    return PassResult(matches=_keep_columns(graph))


DISCARD_ACTIVATIONS = Pass(
    "discard_activations",
    _run,
    provides=frozenset({"activations_discarded"}),
    requires=frozenset({"linear_rewritten"}),
    applies=lambda plan: plan.activations == "discard" or (plan.activations != "save" and plan.weights == "resu"),
)
