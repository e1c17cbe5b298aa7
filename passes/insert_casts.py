"""Casts around matrix products, where the phase's plan asks for a precision, or one of its overrides does.

Operands of a product are cast to the plan's dtype and its result back to the dtype that it had, so that nothing
downstream sees another type. A cast back that only feeds casts down again, directly or through views, is bypassed: in
a chain linear -> split heads -> attention -> merge -> linear no value leaves the low precision.

Norms, softmax and losses stay as they are unless an override names the module that calls them. "fp8" puts
`fxresu::linear_fp8` in place of linears on managed weights, and of others that an override names; all that has no such
form runs in bfloat16, with the reason counted.
"""

from __future__ import annotations

import operator
from collections import Counter
from fnmatch import fnmatchcase
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxresu.kernels import fp8
from fxresu.kernels._autocast import active_dtype

from ._compat import attention_builtin, enter_autocast, exit_autocast, linear_builtin, size_hint
from .contract import Graph, Pass, PassResult
from .markers import WEIGHT, target_of
from .module_names import modules_of
from .plan import PhasePlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "fp8"} | {torch.float64: "fp64"}
_CAST = torch.ops.aten.to.dtype

# Positions of the operands to cast.
_PRODUCTS: dict[object, tuple[int, ...]] = {
    torch.ops.fxresu.linear.default: (0, 1, 2),
    torch.ops.fxresu.linear_columns.default: (0, 1, 2),
    torch.ops.fxresu.linear_packed.default: (0, 3),
    torch.ops.fxresu.linear_packed_columns.default: (0, 3),
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
# Cast only where an override names them.
_SPARED: dict[object, tuple[int, ...]] = {
    F.layer_norm: (0, 2, 3),
    F.rms_norm: (0, 2),
    F.group_norm: (0, 2, 3),
    F.softmax: (0,),
    torch.softmax: (0,),
    F.log_softmax: (0,),
    torch.log_softmax: (0,),
    F.cross_entropy: (0,),
    F.nll_loss: (0,),
    F.mse_loss: (0, 1),
}
_SPARED_METHODS = {"softmax": (0,), "log_softmax": (0,)}
_LINEARS = (F.linear, linear_builtin)
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


def _spared_positions(node: Node) -> tuple[int, ...]:
    if node.op == "call_method":
        return _SPARED_METHODS.get(str(node.target), ())
    return _SPARED.get(target_of(node), ()) if node.op == "call_function" else ()


def names_of(node: Node) -> list[str]:
    """What a pattern may call a node by: the weight that it reads, the modules around it, innermost first."""
    weight = node.meta.get(WEIGHT, "")
    own = [weight, weight.rpartition(".")[0]] if weight else []
    return [n for n in (*own, *reversed(modules_of(node))) if n]


def _override(node: Node, plan: PhasePlan) -> str:
    """The precision that the first matching override asks for; "" without one."""
    names = names_of(node) if plan.precision_overrides else []
    return next((p for pattern, p in plan.precision_overrides if any(fnmatchcase(n, pattern) for n in names)), "")


def product_counts(nodes: torch.fx.Graph) -> Counter[str]:
    """Matrix products by the precision that they compute in."""
    found: Counter[str] = Counter()
    for node in nodes.nodes:
        if node.op == "call_function" and target_of(node) is torch.ops.fxresu.linear_fp8.default:
            found["fp8"] += 1
        elif _positions(node) and isinstance(value := _value(node), torch.Tensor):
            found[NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))] += 1
    return found


def _value(node: object) -> object:
    return node.meta.get("example_value") if isinstance(node, Node) else None


def _castable(node: object, dtype: torch.dtype) -> TypeGuard[Node]:
    """A floating tensor of another precision; float64 is somebody's deliberate choice and stays."""
    value = _value(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype not in (dtype, torch.float64)


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
        self.bytes = 0

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
        self._count(new, 1)
        return new

    def _count(self, cast: Node, sign: int) -> None:
        value = _value(cast)
        self.casts += sign
        if isinstance(value, torch.Tensor):
            self.bytes += sign * size_hint(value.numel()) * value.element_size()

    def product(self, node: Node, positions: tuple[int, ...]) -> None:
        """Cast the operands of a product, and its result back."""
        args, kwargs = list(node.args), dict(node.kwargs)
        for i in positions:
            if i < len(args) and _castable(operand := args[i], self.dtype):
                args[i] = self.cast(operand, node)
        for name, value in kwargs.items():
            if name != "out" and _castable(value, self.dtype):
                kwargs[name] = self.cast(value, node)
        before = _value(node)
        if tuple(args) == node.args and kwargs == node.kwargs and not self.autocast:
            return
        node.args, node.kwargs = tuple(args), kwargs
        self.leave_autocast(node)
        self.back(node, before)

    def back(self, node: Node, before: object) -> None:
        """Cast a product's result, now in the low precision, back to what it was."""
        if not isinstance(before, torch.Tensor) or before.dtype == torch.float64:
            return
        if before.dtype == self.dtype:
            return
        node.meta["example_value"] = _converted(before, self.dtype)
        with self.nodes.inserting_after(node):
            back = self.nodes.call_function(_CAST, (node, before.dtype))
        back.meta["example_value"] = before
        self._count(back, 1)
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
                if target_of(node) is _CAST:
                    self._count(node, -1)
                self.nodes.erase_node(node)


class _Casters(dict[torch.dtype, _Caster]):
    """The casters of one graph by dtype, made on demand."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __missing__(self, dtype: torch.dtype) -> _Caster:
        self[dtype] = _Caster(self._graph, dtype)
        return self[dtype]


def _run(graph: Graph, plan: PhasePlan) -> PassResult:
    result = PassResult()
    casters = _Casters(graph)
    for node in list(graph.module.graph.nodes):
        override = _override(node, plan)
        positions = _positions(node) or (_spared_positions(node) if override else ())
        precision = override or plan.precision
        if not positions or precision == "inherit":
            continue
        if precision == "fp8":
            reason = _no_fp8(node, bool(override))
            if not reason:
                _to_fp8(graph, node, casters)
                result.matches += 1
                continue
            result.counts[f"bf16 instead of fp8: {reason}"] += 1
        casters[DTYPES[precision]].product(node, positions)
    for caster in casters.values():
        caster.drop_unused()
        result.matches += caster.casts
        result.counts["bytes cast"] += caster.bytes
    return result


def _no_fp8(node: Node, named: bool) -> str:
    """Why a product stays in bfloat16; "" if it has a form in fp8."""
    target, x = target_of(node), _value(node.args[0])
    managed = target is torch.ops.fxresu.linear.default
    if not managed and not (named and target in _LINEARS and len(node.args) >= 2):
        return "no linear on a managed weight"
    weight = _value(node.args[1])
    if not isinstance(x, torch.Tensor) or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return "operands of unknown shape"
    if torch.float64 in (x.dtype, weight.dtype):
        return "float64 is somebody's choice"
    rows, K = weight.shape if not (managed and node.args[9]) else weight.shape[::-1]
    return fp8.unsupported(x.device) or fp8.misfit(rows, K)


def _to_fp8(graph: Graph, node: Node, casters: _Casters) -> None:
    """`fxresu::linear_fp8` in the place of a linear, and its result in the dtype that it had."""
    nodes = graph.module.graph
    caster = casters[torch.bfloat16]
    before = _value(node)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    transposed = target_of(node) is torch.ops.fxresu.linear.default and bool(node.args[9])
    x = node.args[0]
    low = caster.lowered(x) if isinstance(x, Node) else None
    how = fp8.how_on(_value(x).device)  # type: ignore[attr-defined]
    with nodes.inserting_before(node):
        new = nodes.call_function(
            torch.ops.fxresu.linear_fp8.default, (x if low is None else low, node.args[1], bias, how, transposed)
        )
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    nodes.erase_node(node)
    caster.back(new, before)


INSERT_CASTS = Pass(
    "insert_casts",
    _run,
    provides=frozenset({"casts"}),
    requires=frozenset({"linear_rewritten"}),
    applies=lambda plan: plan.precision != "inherit" or bool(plan.precision_overrides),
)
