"""Casts around matrix products, where the phase's plan asks for a precision.

Operands of a product are cast to the plan's dtype and its result back to the dtype that it had, so that nothing
downstream sees another type. A cast back that only feeds casts down again, directly or through views, is bypassed: in
a chain linear -> split heads -> attention -> merge -> linear no value leaves the low precision.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxresu.kernels._autocast import active_dtype

from ._compat import attention_builtin, enter_autocast, exit_autocast, linear_builtin
from .contract import Graph, Pass, PassResult
from .markers import target_of
from .plan import PhasePlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CAST = torch.ops.aten.to.dtype

# Positions of the operands to cast.
_PRODUCTS: dict[object, tuple[int, ...]] = {
    torch.ops.fxresu.linear.default: (0, 1, 2),
    torch.ops.fxresu.linear_columns.default: (0, 1, 2),
    torch.ops.fxresu.linear_packed.default: (0, 3),
    torch.ops.fxresu.matmul.default: (0, 1, 2),
    torch.ops.fxresu.grouped_linear.default: (0, 1),
    torch.ops.fxresu.convolution.default: (0, 1, 2),
    F.linear: (0, 1, 2),
    linear_builtin: (0, 1, 2),
    torch.matmul: (0, 1),
    operator.matmul: (0, 1),
    torch.mm: (0, 1),
    torch.bmm: (0, 1),
    torch.addmm: (0, 1, 2),
    torch.baddbmm: (0, 1, 2),
    F.scaled_dot_product_attention: (0, 1, 2, 3),
    attention_builtin: (0, 1, 2, 3),
    torch.conv1d: (0, 1, 2),
    torch.conv2d: (0, 1, 2),
}
_PRODUCT_METHODS = {"matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1)}
# Move or select elements without computing: they commute with a cast.
_VIEW_METHODS = {
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "split", "chunk", "squeeze",
    "unsqueeze", "expand", "t", "repeat_interleave",
}  # fmt: skip
_VIEW_FUNCTIONS = {
    operator.getitem, torch.reshape, torch.transpose, torch.permute, torch.flatten, torch.unflatten, torch.split,
    torch.chunk, torch.squeeze, torch.unsqueeze,
}  # fmt: skip


def _positions(node: Node) -> tuple[int, ...]:
    if node.op == "call_method":
        return _PRODUCT_METHODS.get(str(node.target), ())
    return _PRODUCTS.get(target_of(node), ()) if node.op == "call_function" else ()


def _value(node: object) -> object:
    return node.meta.get("example_value") if isinstance(node, Node) else None


def _castable(node: object, dtype: torch.dtype) -> bool:
    """A floating tensor of another precision; float64 is somebody's deliberate choice and stays."""
    value = _value(node)
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dtype not in (dtype, torch.float64)
    )


def _is_view(node: Node) -> bool:
    if not node.args or any(isinstance(a, torch.dtype) for a in node.args):  # view(dtype) reads the bits anew
        return False
    if node.op == "call_method":
        return node.target in _VIEW_METHODS
    return node.op == "call_function" and target_of(node) in _VIEW_FUNCTIONS


_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imatmul,
    operator.iand, operator.ior, operator.ixor,
}  # fmt: skip


def _writes(node: Node) -> bool:
    """Whether the node writes into its first argument."""
    if node.op not in ("call_method", "call_function"):
        return False
    if node.kwargs.get("inplace") is True or (node.op == "call_function" and node.target in _IN_PLACE):
        return True
    name = str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))
    name = name.partition(".")[0]
    if name in ("relu", "relu6", "leaky_relu", "elu", "silu", "mish", "hardtanh") and True in node.args[1:]:
        return True
    return name.endswith("_") and not name.startswith("__")


def _written(nodes: torch.fx.Graph) -> set[Node]:
    """Values that something writes into, itself or through a view: no second copy may stand in for them."""
    found = set()
    for node in nodes.nodes:
        target = node.args[0] if node.args and _writes(node) else node.kwargs.get("out", node.kwargs.get("input"))
        if not (_writes(node) or "out" in node.kwargs):
            continue
        while isinstance(target, Node) and _is_view(target) and isinstance(target.args[0], Node):
            target = target.args[0]
        if isinstance(target, Node):
            found.add(target)
    return found


def _converted(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, (tuple, list)):
        return type(value)(_converted(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def _ambient_autocast(nodes: torch.fx.Graph) -> str:
    """Device type of the autocast under which the graph is compiled; "" without one."""
    values = (_value(n) for n in nodes.nodes)
    value = next((v for v in values if isinstance(v, torch.Tensor)), None)
    if value is None or active_dtype(value.device.type) is None:
        return ""
    return value.device.type


class _Caster:
    """Casts within one graph; remembers what is already there in the low precision."""

    def __init__(self, graph: Graph, dtype: torch.dtype) -> None:
        self.nodes = graph.module.graph
        self.dtype = dtype
        self.low: dict[Node, Node | None] = {}
        self.written = _written(self.nodes)
        self.autocast = _ambient_autocast(self.nodes)
        self.casts = 0

    def lowered(self, node: Node) -> Node | None:
        """The same value in the low precision without a new cast, if a product computed it so."""
        if node in self.low:
            return self.low[node]
        found = None
        if _is_view(node) and isinstance(node.args[0], Node):
            source = self.lowered(node.args[0])
            if source is not None:
                with self.nodes.inserting_after(node):
                    found = self.nodes.node_copy(node, lambda a: source if a is node.args[0] else a)
                found.meta["example_value"] = _converted(_value(node), self.dtype)
        self.low[node] = found
        return found

    def cast(self, node: Node, before: Node) -> Node:
        """`node` in the low precision, by a cast placed before its consumer if there is no other way."""
        known = self.lowered(node)
        if known is not None:
            return known
        with self.nodes.inserting_before(before):
            new = self.nodes.call_function(_CAST, (node, self.dtype))
        new.meta["example_value"] = _converted(_value(node), self.dtype)
        self.casts += 1
        return new

    def product(self, node: Node, positions: tuple[int, ...]) -> None:
        """Cast the operands of a product, and its result back."""
        args, kwargs = list(node.args), dict(node.kwargs)
        for i in positions:
            if i < len(args) and _castable(args[i], self.dtype):
                args[i] = self.cast(args[i], node)
        for name, value in kwargs.items():
            if name != "out" and _castable(value, self.dtype):
                kwargs[name] = self.cast(value, node)
        before = _value(node)
        if tuple(args) == node.args and kwargs == node.kwargs and not self.autocast:
            return
        node.args, node.kwargs = tuple(args), kwargs
        self.leave_autocast(node)
        if not isinstance(before, torch.Tensor) or before.dtype in (self.dtype, torch.float64):
            return
        node.meta["example_value"] = _converted(before, self.dtype)
        with self.nodes.inserting_after(node):
            back = self.nodes.call_function(_CAST, (node, before.dtype))
        back.meta["example_value"] = before
        self.casts += 1
        node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
        if node not in self.written:
            self.low[back] = node

    def leave_autocast(self, node: Node) -> None:
        """Under an ambient autocast the plan's precision wins in the product; all other operations stay as captured."""
        if not self.autocast:
            return
        with self.nodes.inserting_before(node):
            mode = self.nodes.call_function(enter_autocast, (self.autocast, None, False, None))
        with self.nodes.inserting_after(node):
            self.nodes.call_function(exit_autocast, (mode,))
        self.casts += 1

    def drop_unused(self) -> None:
        """Erase casts back and views that every reader bypassed."""
        for node in reversed(list(self.nodes.nodes)):
            bypassed = node in self.low and not node.users
            if bypassed and (_is_view(node) or target_of(node) is _CAST):
                self.casts -= target_of(node) is _CAST
                self.nodes.erase_node(node)


def _run(graph: Graph, plan: PhasePlan) -> PassResult:
    caster = _Caster(graph, DTYPES[plan.precision])
    for node in list(graph.module.graph.nodes):
        positions = _positions(node)
        if positions:
            caster.product(node, positions)
    caster.drop_unused()
    return PassResult(matches=caster.casts)


INSERT_CASTS = Pass(
    "insert_casts",
    _run,
    provides=frozenset({"casts"}),
    requires=frozenset({"linear_rewritten"}),
    applies=lambda plan: plan.precision != "inherit",
)
