"""A captured graph as plain data: one record a node, with the module that it belongs to and what it is to fxresu."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxresu.passes import op_name
from fxresu.passes._compat import placeholder_example, placeholder_source
from fxresu.passes.insert_transfers import TRANSFER_OPS
from fxresu.passes.markers import is_marker, target_of

from .packed_linear import linear_forward

CAPTURED = "captured"
_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip
_CASTS = {"aten.to.dtype", ".to", ".float", ".half", ".bfloat16", ".double", ".type", ".type_as"}
# What may lie between a weight and the operation that reads it.
_PASS_ON = _CASTS | {".t", ".T", ".transpose", ".view", ".reshape", ".contiguous", "t", "transpose", "getattr"}
_ROOT = re.compile(r"^L\['(\w+)'\]")
_STEP = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]|_fxresu\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
_STORE = re.compile(r"\._fxresu\['([^']+)'\]\.?(\w*)$")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_FQN, _WEIGHT = "fxresu_fqn", "fxresu_seen_weight"
_GO_WITH_THE_WEIGHT = (
    ":anchor", ":bits", ":row_start", ":columns", ":active_start", ":panel", ":panel_bits", ":panel_start",
)  # fmt: skip
_LONGEST = 60  # characters of a constant argument


@dataclasses.dataclass(frozen=True)
class NodeView:
    """One node of a graph.

    Attributes:
        name: unique in its graph; nodes of nested graphs (checkpoint regions) carry their graph's name in front.
        op: `linear`, `.view`, `fxresu.linear`; "input" for what a caller gives, "weight" for parameters, buffers, masks
            and θ, "output" for the end.
        operands: names of the nodes that it reads.
        call: its arguments as text; parameters under their FQNs, other nodes as `%name`.
        value: dtype and shape of its result, as `f32[2, 64, 256]`.
        module: FQN of the module whose forward it came from; "" is the model itself.
        mark: "rewritten", "reads" (reads a managed weight and is not rewritten), "marker", "cast", "transfer" (its
            result is on another device than its operand, or it calls optimizer state back), or "".
        weight: FQN of the managed weight that a rewritten, reading or marker node is about.
        source: file, line and code in the user's model.
    """

    name: str
    op: str
    operands: tuple[str, ...] = ()
    call: str = ""
    value: str = ""
    module: str = ""
    mark: str = ""
    weight: str = ""
    source: str = ""

    def __str__(self) -> str:
        value = f" -> {self.value}" if self.value else ""
        return f"%{self.name} = {self.op}({self.call}){value}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A graph as captured (`name` is "captured") or as the pass `name` left it, in execution order."""

    name: str
    nodes: tuple[NodeView, ...]


class Names:
    """FQNs for what enters a graph.

    Args:
        parameters: FQN by `id` of every parameter and buffer of the model.
    """

    def __init__(self, parameters: Mapping[int, str]) -> None:
        self._parameters = parameters
        self._roots = {"module": ""}  # the frame that is compiled is `_call(module)`

    def annotate(self, module: GraphModule) -> None:
        """Write the FQN of what every placeholder stands for into its meta. Do it before passes run."""
        for node in module.graph.nodes:
            if node.op != "placeholder":
                continue
            source = placeholder_source(node)
            root, parts = _split(source)
            fqn = self._parameters.get(id(placeholder_example(node)), "")
            tail = ".".join(parts)
            if fqn and tail and fqn.endswith(tail):
                self._roots[root] = fqn[: len(fqn) - len(tail)].rstrip(".")
            if stored := _STORE.search(source):
                owner = ".".join(_split(source[: stored.start()])[1])
                fqn = self._full(root, ".".join(filter(None, (owner, stored[1])))) + f":{stored[2]}"
            elif not fqn and ("_parameters[" in source or "_buffers[" in source):
                fqn = self._full(root, tail)
            if fqn:
                node.meta[_FQN] = fqn

    def module_of(self, node: Node) -> str | None:
        """FQN of the module that a node came from; None if the node does not say."""
        stack = node.meta.get("nn_module_stack")
        if not stack:  # what the outermost forward does itself has a place in the code and no stack
            return self._roots.get("module", "") if node.meta.get("stack_trace") else None
        path = next(reversed(stack.values()))[0]
        root, parts = _split(path)
        return self._full(root, ".".join(parts)) if root else path

    def _full(self, root: str, tail: str) -> str:
        return ".".join(filter(None, (self._roots.get(root, ""), tail)))


def _split(source: str) -> tuple[str, list[str]]:
    """Root variable and steps of one of Dynamo's sources: `L['m']._modules['a'].b[0]` is ("m", ["a", "b", "0"])."""
    root = _ROOT.match(source)
    if root is None:
        return "", []
    steps = [next(filter(None, found), "") for found in _STEP.findall(source[root.end() :])]
    return root[1], [s for s in steps if s not in ("_modules", "_parameters", "_buffers", "")]


def weight_behind(node: object) -> str:
    """FQN of the managed weight that a node is, or passes on through casts and views; "" if it is none."""
    while isinstance(node, Node):
        if _WEIGHT in node.meta:
            return node.meta[_WEIGHT]
        if op_name(node) not in _PASS_ON or not node.args:
            return ""
        node = node.args[0]
    return ""


def mark_weight(node: object, name: str) -> None:
    """Remember that a node is the managed weight `name`."""
    if isinstance(node, Node):
        node.meta[_WEIGHT] = name


def is_copy(node: object) -> bool:
    """Whether the node is the low-precision copy of a managed weight that fxresu keeps."""
    return isinstance(node, Node) and str(node.meta.get(_FQN, "")).endswith(":low")


def is_rewritten(node: Node) -> bool:
    """Whether the node is one of fxresu's operators in a consumer's place."""
    target = target_of(node)
    own = isinstance(target, torch._ops.OpOverload) and target.namespace == "fxresu"
    return own and not is_marker(node) and target not in TRANSFER_OPS


def consumer_of(node: Node) -> str:
    """FQN of the managed weight that a rewritten node, or a direct reader of a marker, reads; "" for other nodes."""
    if node.op not in ("call_function", "call_method") or is_marker(node):
        return ""
    if is_rewritten(node):
        return next(filter(None, map(weight_behind, node.all_input_nodes)), "")
    if op_name(node) in _PASS_ON:
        return ""
    return next((name for n in node.all_input_nodes if _reads_marker(n) and (name := weight_behind(n))), "")


def _reads_marker(node: Node) -> bool:
    while not is_marker(node):
        if op_name(node) not in _PASS_ON or not node.args or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
    return True


class Viewer:
    """Makes `Stage`s of one graph and shares the records that stages have in common."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._shared: dict[NodeView, NodeView] = {}

    def stage(self, module: GraphModule, name: str) -> Stage:
        """The graph of `module`, nested graphs inside it, as it is now."""
        found = [self._shared.setdefault(view, view) for view in self._walk(module, "", {})]
        return Stage(name, tuple(found))

    def _walk(self, module: GraphModule, prefix: str, given: Mapping[Node, str]) -> Iterator[NodeView]:
        """Views of a graph's nodes; `given` maps placeholders of a nested graph to what the outer graph passes in."""
        labels: dict[Node, str] = dict(given)
        homes: dict[Node, str] = {}
        for node in module.graph.nodes:
            if node in labels or _nested(module, node) is not None:
                continue
            labels[node] = prefix + node.name
            for inner, operands in _bodies(module, node):
                places = [n for n in inner.graph.nodes if n.op == "placeholder"]
                outer = {p: labels[a] for p, a in zip(places, operands) if isinstance(a, Node) and a in labels}
                yield from self._walk(inner, f"{prefix}{_attribute(node, inner, module)}.", outer)
            homes[node] = self._home(node, homes)
            yield self._view(node, labels, homes[node])

    def _home(self, node: Node, homes: Mapping[Node, str]) -> str:
        own = self._names.module_of(node)
        if own is not None:
            return own
        # What a pass inserted lies with the rewritten node that it serves, else with its first reader.
        before = [n for n in node.all_input_nodes if n in homes]
        rewritten = next((n for n in before if is_rewritten(n)), None)
        if rewritten is not None:
            return homes[rewritten]
        reader = next((home for u in node.users if (home := self._names.module_of(u)) is not None), None)
        return reader if reader is not None else next((homes[n] for n in before), "")

    def _view(self, node: Node, labels: Mapping[Node, str], home: str) -> NodeView:
        op, value = _kind(node), node.meta.get("example_value")
        if op in ("input", "weight"):
            return NodeView(labels[node], op, (), node.meta.get(_FQN, ""), _value(value), home)
        if op == "output":
            return NodeView(labels[node], op, tuple(labels[n] for n in node.all_input_nodes if n in labels))
        operands = tuple(labels[n] for n in node.all_input_nodes if n in labels)
        mark, weight = _mark(node, value)
        return NodeView(
            labels[node], op, operands, _arguments(node, labels), _value(value), home, mark, weight, _source(node)
        )


def _nested(module: GraphModule, node: Node) -> GraphModule | None:
    found = getattr(module, str(node.target), None) if node.op == "get_attr" else None
    return found if isinstance(found, GraphModule) else None


def _bodies(module: GraphModule, node: Node) -> Iterator[tuple[GraphModule, tuple[Any, ...]]]:
    """Graphs that a higher-order call runs, each with its operands."""
    for i, argument in enumerate(node.args):
        body = _nested(module, argument) if isinstance(argument, Node) else None
        if body is not None:
            tail = node.args[i + 1 :]
            yield body, tuple(tail[0]) if len(tail) == 1 and isinstance(tail[0], (tuple, list)) else tail


def nested(module: GraphModule, prefix: str = "") -> Iterator[tuple[GraphModule, str]]:
    """A graph and the graphs nested in it, each with what stands before its nodes' names in a `Stage`."""
    yield module, prefix
    for node in module.graph.nodes:
        for inner, _ in _bodies(module, node):
            yield from nested(inner, f"{prefix}{_attribute(node, inner, module)}.")


def _attribute(node: Node, inner: GraphModule, module: GraphModule) -> str:
    nodes = (a for a in node.args if isinstance(a, Node))
    return next((str(a.target) for a in nodes if _nested(module, a) is inner), node.name)


def _kind(node: Node) -> str:
    if node.op == "placeholder":
        return "weight" if _FQN in node.meta else "input"
    if node.op == "get_attr":
        return "weight"
    return "output" if node.op == "output" else op_name(node)


def _mark(node: Node, value: object) -> tuple[str, str]:
    if is_marker(node):
        return "marker", weight_behind(node)
    if target_of(node) in TRANSFER_OPS:
        return "transfer", ""
    weight = consumer_of(node)
    if is_rewritten(node):
        return "rewritten", weight
    source = node.args[0].meta.get("example_value") if node.args and isinstance(node.args[0], Node) else None
    if isinstance(value, Tensor) and isinstance(source, Tensor):
        if value.device != source.device:
            return "transfer", ""
        if op_name(node) in _CASTS and value.dtype != source.dtype:
            return "cast", ""
    return ("reads", weight) if weight else ("", "")


def _value(value: object) -> str:
    if isinstance(value, Tensor):
        sizes = ", ".join(map(str, value.shape))
        return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{sizes}]"
    if isinstance(value, (tuple, list)):
        parts = [_value(v) for v in value[:3]] + (["…"] if len(value) > 3 else [])
        return f"({', '.join(parts)})"
    return ""


def _arguments(node: Node, labels: Mapping[Node, str]) -> str:
    """Arguments as text, without those at their defaults; operators name theirs from the third on."""
    target = target_of(node)
    if not isinstance(target, torch._ops.OpOverload):
        return ", ".join([*(_argument(a, labels) for a in node.args), *_named(node, labels)])
    parts = []
    for i, (spec, value) in enumerate(zip(target._schema.arguments, node.args)):
        if value is None or spec.name == "tag" or (spec.has_default_value() and value == spec.default_value):
            continue
        if isinstance(value, Node) and value.meta.get(_FQN, "").endswith(_GO_WITH_THE_WEIGHT):
            continue
        text = _argument(value, labels)
        parts.append(text if i < 2 else f"{spec.name}={text}")
    return ", ".join([*parts, *_named(node, labels)])


def _named(node: Node, labels: Mapping[Node, str]) -> list[str]:
    return [f"{name}={_argument(value, labels)}" for name, value in node.kwargs.items() if value is not None]


def _argument(value: Any, labels: Mapping[Node, str]) -> str:
    if isinstance(value, Node):
        return value.meta.get(_FQN) or f"%{labels.get(value, value.name)}"
    if isinstance(value, (tuple, list)):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return f"{left}{', '.join(_argument(v, labels) for v in value)}{right}"
    if isinstance(value, slice):
        return ":".join("" if v is None else _argument(v, labels) for v in (value.start, value.stop))
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    text = repr(value) if not callable(value) else getattr(value, "__name__", repr(value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _source(node: Node) -> str:
    """`file.py:12  code` of the innermost frame but managed layers' own forward: it is in the model's code."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return ""
    lines = trace.rstrip().splitlines()
    for i in range(len(lines) - 1, -1, -1):
        frame = _FRAME.search(lines[i])
        if frame and frame[1] != linear_forward.__code__.co_filename:
            code = lines[i + 1].strip() if i + 1 < len(lines) else ""
            return f"{frame[1].replace(chr(92), '/').rpartition('/')[2]}:{frame[2]}  {code}".rstrip()
    return ""
