"""Transfers in the graph: state that the next phase needs comes back while this phase computes.

A phase whose plan sends optimizer state away and calls it back ahead of its end gets `fxresu::restore_begin` in front
of its first operation and `fxresu::restore_end` behind its last. Both are registered as ordered effects, so that
nothing removes, merges or exchanges them although no tensor depends on them. They do nothing until the phase's last
steps have come. Where CUDA graphs replay the graph they would run in the capture alone: the runner calls the same
functions around the graph then, as it does in eager code.
"""

from __future__ import annotations

import torch

from fxresu.kernels import transfers as _transfers  # noqa: F401  (registers the operations)

from . import _compat
from .contract import Graph, Pass, PassResult
from .plan import PhasePlan

TRANSFER_OPS = (torch.ops.fxresu.restore_begin.default, torch.ops.fxresu.restore_end.default)

for _op in TRANSFER_OPS:
    _compat.register_ordered_effect(_op)


def _run(graph: Graph, plan: PhasePlan) -> PassResult:
    nodes = graph.module.graph
    work = [n for n in nodes.nodes if n.op not in ("placeholder", "output")]
    if not graph.outermost or not work:
        return PassResult()
    begin, end = TRANSFER_OPS
    with nodes.inserting_before(work[0]):
        nodes.call_function(begin, (str(plan.phase),))
    with nodes.inserting_before(next(n for n in reversed(nodes.nodes) if n.op == "output")):
        nodes.call_function(end, (str(plan.phase),))
    return PassResult(matches=2)


INSERT_TRANSFERS = Pass(
    "insert_transfers",
    _run,
    provides=frozenset({"transfers"}),
    requires=frozenset({"linear_rewritten"}),
    applies=lambda plan: plan.transfers,
)
