"""Which results the backward keeps, computes again, or gets from the host: tags on the nodes of a joint graph.

The joint graph holds a captured graph's forward and backward. This file only decides; `partition` acts on the tags.

- "recompute": what torch's partitioner takes for nearly free (activation functions, casts, indexing) is repeated, also
  where its rules prefer to spare the backward the memory traffic; norms and softmax in one piece as well.
- A budget: nodes may be repeated in the order of their cost for each byte that they would keep, up to the first price
  at which the kept bytes fit. A share leaves graphs alone that keep less than 64 KiB. Costs are estimated: bytes moved,
  or FLOPs at `_FLOPS_PER_BYTE`, whichever takes longer. On a GPU with FXRESU_MEASURE=1 products are measured.
- "offload": what is kept is tagged for the host, the earliest results first, until the rest fits the budget; without a
  budget all of it.

What the user's own checkpointing has tagged is never touched: what must be recomputed is not saved in the first place,
what must be saved is not repeated. Results of random operations, of operations that are not torch's own, and inputs of
the graph (weights among them) are not repeated, sent away, or counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import flop_registry

from fxresu.kernels.choose import asked
from fxresu.kernels.host_copies import can_wait

from ._compat import real_tensors, size_hint
from ._compat_partition import SavedChoice, memory_of, size_of, storage_of
from .bound_chains import chain_ends
from .measured_cost import measured_bytes
from .module_names import modules_of
from .plan import PhasePlan

TAG = "fxresu_activation"
"""Key of `Node.meta` for what becomes of a result: "save", "recompute" or "offload"."""
OFFLOAD_FROM = 1 << 14
"""Bytes from which on a tensor is worth a transfer."""
_FLOPS_PER_BYTE = 200  # what an H100 computes in bfloat16 while it moves a byte; CPUs are within a factor of three
_SMALL = 1 << 16  # bytes that a graph keeps, below which no share of them is worth work
_DEAREST_CHEAP = 8.0  # bytes moved for each byte of the result, up to which "recompute" repeats an operation
_CHAINS = (1, 4, 16, None)  # values used far apart that a budget may repeat in one go, tried in turn
_IN_ONE_PIECE = (
    "aten.index_select.default", "aten.native_layer_norm.default", "aten.native_group_norm.default",
    "aten._fused_rms_norm.default", "aten._softmax.default", "aten._log_softmax.default",
)  # fmt: skip


class ActivationBudgetError(ValueError):
    """A budget that not even computing everything again would keep."""


@dataclasses.dataclass(frozen=True)
class Activation:
    """One result of the forward that the backward wants.

    Attributes:
        name, op: of the node in the joint graph.
        module: FQN of the module that computes it; "" if unknown.
        shape, dtype: of the result.
        bytes: of its memory; of a view, of all that it looks at.
        decision: "save", "recompute" or "offload".
        reason: why it is not what the policy would make of it; mostly empty.
    """

    name: str
    op: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    decision: str
    reason: str = ""


@dataclasses.dataclass
class ActivationRecord:
    """What became of the activations of one captured graph.

    Attributes:
        by_default: bytes that torch's partitioner would keep by itself.
        rows: results that are kept or sent away, and those that torch would keep and that are computed again.
        repeated: operations of the forward that the backward runs again.
    """

    by_default: int = 0
    rows: list[Activation] = dataclasses.field(default_factory=list)
    repeated: int = 0

    def total(self, decision: str) -> int:
        """Bytes under a decision."""
        return sum(r.bytes for r in self.rows if r.decision == decision)


def tag(choice: SavedChoice, plan: PhasePlan, record: ActivationRecord) -> list[Node]:
    """Decide for a joint graph: tags its nodes, fills the record, and returns the nodes to save.

    Raises:
        ActivationBudgetError: if the budget cannot be met, with the smallest that can.
    """
    default = choice.solve()
    record.by_default = kept_bytes(default)
    saved = default
    if plan.activations == "recompute":
        saved = min(default, _cheaply(choice), key=kept_bytes)
    budget = _budget_bytes(plan, record.by_default)
    if budget is not None and plan.activations != "offload" and kept_bytes(saved) > budget:
        saved = _within(choice, plan, budget)
    if plan.activations == "offload":
        saved = _without_views(choice, saved)
        left = _send_away(choice, saved, budget)
        if budget is not None and left > budget:
            raise ActivationBudgetError(
                f"activation_budget={plan.activation_budget!r} in the plan of {plan.phase}: {budget:,} bytes are less"
                f" than the {left:,} that cannot wait on the host; use {left} or more"
            )
    record.rows = [_row(node, node.meta.get(TAG, "save")) for node in _tensors(saved)]
    kept = {storage_of(node) for node in saved}
    for node in _tensors(default):
        if storage_of(node) not in kept:
            node.meta[TAG] = "recompute"
            record.rows.append(_row(node, "recompute"))
    return saved


def kept_bytes(saved: Iterable[Node]) -> int:
    """Bytes that saved values hold, every storage once; inputs of the graph are alive anyway."""
    return sum(memory_of(node) for node in _tensors(saved))


def _tensors(saved: Iterable[Node]) -> list[Node]:
    """One node for each storage that the forward made."""
    saved = list(saved)
    seen = {storage_of(p) for n in saved[:1] for p in n.graph.find_nodes(op="placeholder")}
    found = []
    for node in saved:
        if isinstance(node.meta.get("val"), torch.Tensor) and node.op != "placeholder":
            storage = storage_of(node)
            if storage is None or storage not in seen:
                seen.add(storage)
                found.append(node)
    return found


def _budget_bytes(plan: PhasePlan, by_default: int) -> int | None:
    budget = plan.activation_budget
    if isinstance(budget, float) and by_default < _SMALL:
        return None
    return math.ceil(budget * by_default) if isinstance(budget, float) else budget


def _cheaply(choice: SavedChoice) -> list[Node]:
    free = [n for n in _repeatable(choice) if _is_light(choice, n) and cost_per_byte(n) <= _DEAREST_CHEAP]
    return choice.solve(free, relaxed=True, once=_chain_ends(choice, free, 1))


def _is_light(choice: SavedChoice, node: Node) -> bool:
    return choice.is_cheap(node) or str(node.target) in _IN_ONE_PIECE


def _chain_ends(choice: SavedChoice, free: Collection[Node], limit: int | None) -> list[Node]:
    return chain_ends(choice, free, functools.partial(_is_light, choice), limit)


def _within(choice: SavedChoice, plan: PhasePlan, budget: int) -> list[Node]:
    """The saved values of the cheapest repeated operations with which they fit: bisection over the prices, and then
    over the operations of the last price, the earliest of the forward first. Chains are as short as the budget allows:
    what is repeated in one go is alive in one go."""
    costs = {node: _rounded(cost_per_byte(node)) for node in _repeatable(choice)}
    prices = [0.0, *sorted(set(costs.values()))]
    once: Collection[Node] = ()
    for limit in _CHAINS:
        once = _chain_ends(choice, costs, limit)
        if kept_bytes(all_repeated := choice.solve(costs, relaxed=True, once=once)) <= budget:
            break
    solved: dict[int, list[Node]] = {len(costs): all_repeated}

    def at(nodes: Collection[Node]) -> bool:
        if len(nodes) not in solved:
            solved[len(nodes)] = choice.solve(nodes, relaxed=True, once=once)
        return kept_bytes(solved[len(nodes)]) <= budget

    def up_to(price: float) -> list[Node]:
        return [n for n, cost in costs.items() if cost <= price]

    least = _first(len(prices), lambda i: at(up_to(prices[i])))
    if least == len(prices):
        need = min(kept_bytes(s) for s in solved.values())
        raise ActivationBudgetError(
            f"activation_budget={plan.activation_budget!r} in the plan of {plan.phase}: {budget:,} bytes are less than"
            f" the {need:,} that remain when everything is computed again; use {need} or more, activations='offload',"
            " or a smaller batch"
        )
    if least == 0:
        return solved[0]
    cheaper = up_to(prices[least - 1])
    last = [n for n, cost in costs.items() if cost == prices[least]]
    enough = _first(len(last), lambda i: at([*cheaper, *last[: i + 1]]))
    return solved[len(cheaper) + min(enough + 1, len(last))]


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first index below `count` for which a monotone condition holds; `count` if there is none."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _rounded(cost: float) -> float:
    """To half powers of two, so that few prices have to be tried."""
    return 2.0 ** (round(2 * math.log2(max(cost, 0.125))) / 2)


def _repeatable(choice: SavedChoice) -> list[Node]:
    return [n for n in choice.forward if _can_repeat(n)]


def _can_repeat(node: Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace not in ("aten", "prims") or target._schema.is_mutable or "inductor" in target.name():
        return False
    if node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE:
        return False
    return bool(torch.Tag.nondeterministic_seeded not in target.tags or _no_dropout(node))


def _no_dropout(node: Node) -> bool:
    """Fused attention counts as random even where nothing is dropped."""
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == "dropout_p":
            given = node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return bool(given == 0)
    return False


def cost_per_byte(node: Node) -> float:
    """What repeating a node costs, in bytes moved (or FLOPs, as bytes) for each byte of its result."""
    flops = _flops(node)
    if flops and asked(node.meta["val"].device if _is_tensor(node) else torch.device("cpu")):
        found = measured_bytes(node)
        if found is not None:
            return found / max(size_of(node), 1)
    moved = size_of(node) + sum(size_of(n) for n in node.all_input_nodes if _is_tensor(n))
    return max(moved, flops / _FLOPS_PER_BYTE) / max(size_of(node), 1)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _flops(node: Node) -> int:
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0

    def example(operand: Node) -> Any:
        tensor = operand.meta.get("val")
        if not isinstance(tensor, torch.Tensor):
            return tensor
        return torch.empty([size_hint(s) for s in tensor.shape], dtype=tensor.dtype, device="meta")

    with real_tensors():
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), example)
        out = node.meta.get("val")
        shape = [size_hint(s) for s in out.shape] if isinstance(out, torch.Tensor) else None
        result = torch.empty(shape, device="meta") if shape is not None else None
        try:
            return int(formula(*args, **kwargs, out_val=result))
        except Exception:  # a formula that wants what meta tensors lack: the operation is a matrix product all the same
            return size_of(node) * 1024


def _without_views(choice: SavedChoice, saved: Collection[Node]) -> list[Node]:
    """The results that saved views look at, in the views' place: several views of one result leave once."""
    bases: dict[object, Node] = {}
    for node in choice.forward:
        if _is_tensor(node) and node.op == "call_function":
            bases.setdefault(storage_of(node), node)
    found: dict[Node, None] = {}
    for node in saved:
        base = bases.get(storage_of(node)) if _is_tensor(node) and node.op != "placeholder" else None
        found[base if base is not None and can_wait(base.meta["val"]) else node] = None
    return list(found)


def _send_away(choice: SavedChoice, saved: Collection[Node], budget: int | None) -> int:
    """Tag what leaves; the bytes that stay."""
    order = {node: i for i, node in enumerate(choice.forward)}
    tensors = sorted(_tensors(saved), key=lambda n: order.get(n, 0))
    left = sum(map(memory_of, tensors))
    shared = _shared(saved)
    for node in tensors:
        if budget is not None and left <= budget:
            break
        if not (why := _stays(node, shared)):
            node.meta[TAG] = "offload"
            left -= memory_of(node)
        else:
            node.meta[TAG + "_reason"] = why
    return left


def _shared(saved: Collection[Node]) -> set[object]:
    """Storages that several saved values share, or that the forward hands out."""
    seen: set[object] = set()
    twice: set[object] = set()
    for node in saved:
        if _is_tensor(node):
            storage = storage_of(node)
            (twice if storage in seen else seen).add(storage)
    results: list[Node] = []
    for node in saved:
        torch.fx.map_arg(node.graph.output_node().args, results.append)
        break
    return twice | {storage_of(r) for r in results}


def _stays(node: Node, shared: Collection[object]) -> str:
    """Why a saved tensor cannot wait on the host; "" if it can."""
    if size_of(node) < OFFLOAD_FROM:
        return f"smaller than {OFFLOAD_FROM} bytes"
    if not can_wait(node.meta["val"]):
        return "not dense"
    if storage_of(node) in shared:
        return "its memory is saved twice, or a result of the forward"
    return ""


def _row(node: Node, decision: str) -> Activation:
    value, modules = node.meta["val"], modules_of(node)
    return Activation(
        node.name,
        _operation(node),
        modules[-1] if modules else "",
        tuple(size_hint(s) for s in value.shape),
        str(value.dtype).removeprefix("torch."),
        memory_of(node),
        decision,
        node.meta.get(TAG + "_reason", ""),
    )


def _operation(node: Node) -> str:
    """Name of the operation; of one with several results, with the number of the result."""
    if node.target is operator.getitem:
        return f"{_operation(node.args[0])}[{node.args[1]}]"  # type: ignore[arg-type]
    return str(node.target).removesuffix(".default")
