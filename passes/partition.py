"""Acts on the tags of activations: splits the joint graph, and inserts the transfers of what waits on the host.

In the forward a tagged result leaves for the host after its last reader, and lives until it has left: the second
departure after it waits for that. In the backward the first transfers back start at once; each arrival starts the
transfer that is `_AHEAD` later, so that copies run beside the computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from . import _compat_partition as compat
from .plan import PhasePlan
from .tag_activations import TAG, ActivationRecord, tag

_AHEAD = 2  # transfers under way while an earlier result is used
_FX = torch.ops.fxresu


def partition(
    module: GraphModule, inputs: Any, *, plan: PhasePlan, found: Callable[[ActivationRecord], None], **kwargs: Any
) -> tuple[GraphModule, GraphModule]:
    """Forward and backward graph of a joint graph, under the plan's policy for activations.

    Args:
        module, inputs, kwargs: as AOTAutograd hands them to a partition function.
        found: gets the record of what was decided.

    Raises:
        ActivationBudgetError: a budget that cannot be met.
    """
    record = ActivationRecord()
    forward, backward = compat.partitioned(module, inputs, lambda choice: tag(choice, plan, record), **kwargs)
    names = [row.name for row in record.rows if row.decision == "offload"]
    if names:
        _transfer(forward, backward, names, kwargs["num_fwd_outputs"])
    record.repeated = len(_operations(forward) & _operations(backward))
    found(record)
    return forward, backward


def _operations(module: GraphModule) -> set[str]:
    """Names of the operations that compute something; views cost nothing."""
    views = compat.partitioner_ops()
    return {n.name for n in module.graph.nodes if n.op == "call_function" and not views.is_view(n)}


def _transfer(forward: GraphModule, backward: GraphModule, names: list[str], results: int) -> None:
    """Send the results of these names to the host in `forward`, and get them back in `backward`."""
    devices = _send(forward.graph, names, results)
    _fetch(backward.graph, devices)
    for module in (forward, backward):
        module.graph.lint()
        module.recompile()


def _send(graph: Graph, names: list[str], results: int) -> dict[str, torch.device]:
    """Device by the name of each result that leaves."""
    output = graph.output_node()
    outputs: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    order = {node: i for i, node in enumerate(graph.nodes)}
    leaving = list(dict.fromkeys(n for n in outputs[results:] if isinstance(n, Node) and n.name in names))
    last = {node: max(_readers(node), key=order.__getitem__, default=node) for node in leaving}
    leaving.sort(key=lambda node: order[last[node]])
    places: dict[Node, Node] = {}  # the departure behind a last reader, where there is one already
    hosts: dict[Node, Node] = {}
    for i, node in enumerate(leaving):
        before = leaving[i - _AHEAD] if i >= _AHEAD else None
        with graph.inserting_after(places.get(last[node], last[node])):
            if before is None:
                host = graph.call_function(_FX.to_host.default, (node,))
            else:
                host = graph.call_function(_FX.to_host_after.default, (node, hosts[before], before))
        host.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace", TAG)}
        host.meta["val"] = _FX.to_host(node.meta["val"])
        places[last[node]] = hosts[node] = host
    with graph.inserting_before(output):
        for node in leaving[-_AHEAD:]:
            graph.call_function(_FX.sent.default, (hosts[node], node)).meta["val"] = None
    outputs[results:] = [hosts.get(n, n) if isinstance(n, Node) else n for n in outputs[results:]]
    output.args = (tuple(outputs), *output.args[1:])
    return {node.name: node.meta["val"].device for node in leaving}


def _readers(node: Node) -> set[Node]:
    """What reads a result, itself or through views."""
    found: set[Node] = set()
    for user in node.users:
        if user.op != "output":
            found.add(user)
            if compat.partitioner_ops().is_view(user):
                found |= _readers(user)
    return found


def _fetch(graph: Graph, devices: dict[str, torch.device]) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    hosts = [n for n in graph.find_nodes(op="placeholder") if n.name in devices and n.users]
    first = {host: min(host.users, key=order.__getitem__) for host in hosts}
    hosts.sort(key=lambda host: order[first[host]])
    for host in graph.find_nodes(op="placeholder"):
        if host.name in devices:
            host.meta["val"] = _FX.to_host(host.meta["val"])
    compute = next(n for n in graph.nodes if n.op != "placeholder")
    back: dict[Node, Node] = {}
    for host in hosts[:_AHEAD]:
        with graph.inserting_before(compute):
            back[host] = graph.call_function(_FX.from_host.default, (host, devices[host.name]))
    for i, host in enumerate(hosts):
        users = [u for u in host.users if u is not back.get(host)]
        later = hosts[i + _AHEAD] if i + _AHEAD < len(hosts) else None
        with graph.inserting_before(first[host]):
            if later is None:
                graph.call_function(_FX.arrive.default, (back[host],)).meta["val"] = None
            else:
                operands = (back[host], later, devices[later.name], back[hosts[i - 1]] if i else None)
                back[later] = graph.call_function(_FX.arrive_and_fetch.default, operands)
        for user in users:
            user.replace_input_with(host, back[host])
    for host, node in back.items():
        node.meta["val"] = _FX.from_host(host.meta["val"], devices[host.name])
