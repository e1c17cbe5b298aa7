"""How the consumers of a managed weight see it: whole, transposed, or a piece of it.

Models read weights through views: `w.t()` in GPT-2's Conv1D, `w.chunk(3)` in a fused projection, `w[i]` in a bank of
experts. A view is followed from the marker to the operation that computes with it, and written down as a `Reading`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .contract import Graph
from .emit import emit, example
from .markers import is_marker, target_of

PACKED = torch.ops.fxresu.managed_packed.default
_CAST_METHODS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_SPLITS = {
    "chunk": torch.chunk, "split": torch.split, "unbind": torch.unbind, "tensor_split": torch.tensor_split,
    torch.chunk: torch.chunk, torch.split: torch.split, torch.unbind: torch.unbind,
    torch.tensor_split: torch.tensor_split,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a consumer reads of a managed weight of shape [..., K].

    Attributes:
        node: the value that it reads.
        rank: dimensions of that value.
        flipped: the last two dimensions are swapped.
        start, stop: rows of the first dimension, or None for all.
        selected: `start` is a single index, whose dimension is gone.
        dtype: that the weight is cast to on the way, or None.
        unflattened: the matrix of a convolution, seen as [rows, in, k1, ...] again.
        index: a tensor in the graph that chooses from the first dimension, or None.
    """

    node: Node
    rank: int
    flipped: bool = False
    start: int | None = None
    stop: int | None = None
    selected: bool = False
    dtype: torch.dtype | None = None
    unflattened: bool = False
    index: Node | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of the weight."""
        return self.start is None and self.index is None


def marker_rank(marker: Node) -> int | None:
    """Dimensions of the marker's value."""
    if target_of(marker) is PACKED:
        size: Any = marker.args[5]
        return len(size)
    value = example(marker)
    return value.dim() if isinstance(value, Tensor) else None


def consumers(marker: Node) -> dict[Node, list[Reading]]:
    """Operations that compute with a marker's value, each with all that it reads of it, in the order of the graph."""
    found: dict[Node, list[Reading]] = {}
    dims = marker_rank(marker)
    for user, reading in _follow(Reading(marker, dims or 0)):
        found.setdefault(user, []).append(reading)
    return found


def _follow(reading: Reading) -> Iterator[tuple[Node, Reading]]:
    for user in list(reading.node.users):
        steps = list(_through(user, reading)) if user.args and user.args[0] is reading.node else []
        if not steps:
            yield user, reading
        for step in steps:
            yield from _follow(step)


def _through(view: Node, reading: Reading) -> Iterator[Reading]:
    """What readers of `view` read, if it is a view that can be followed."""
    name = str(view.target) if view.op == "call_method" else ""
    target = target_of(view) if view.op == "call_function" else None
    if _is_transpose(view, name, target, reading.rank):
        yield dataclasses.replace(reading, node=view, flipped=not reading.flipped)
    elif name == "contiguous" or target is torch.ops.aten.contiguous.default:
        yield dataclasses.replace(reading, node=view)
    elif name == "view" and _unflattens(view, reading):
        yield dataclasses.replace(reading, node=view, rank=example(view).dim(), unflattened=True)  # type: ignore
    elif (dtype := _cast(view, name, target)) is not None:
        yield dataclasses.replace(reading, node=view, dtype=dtype)
    elif reading.whole and (split := _SPLITS.get(name or target)) is not None:
        yield from _pieces(view, reading, split)
    elif reading.whole and (piece := _piece(view, name, target, reading)) is not None:
        yield piece


def _is_transpose(view: Node, name: str, target: object, rank: int) -> bool:
    """`w.t()`, `w.T`, `w.mT`, `w.transpose(0, 1)`, `w.permute(1, 0)` in the forms that Dynamo captures."""
    if rank < 2:
        return False
    if name == "t" or target in (torch.t, torch.ops.aten.t.default):
        return True
    if target is getattr:
        return view.args[1] == "mT" or (view.args[1] == "T" and rank == 2)
    dims = [d for d in _flat(view.args[1:]) if isinstance(d, int)]
    last = {rank - 2, rank - 1}
    if name in ("transpose", "swapaxes", "swapdims") or target is torch.transpose:
        return len(dims) == 2 and {d % rank for d in dims} == last
    if name == "permute" or target is torch.permute:
        return [d % rank for d in dims] == [*range(rank - 2), rank - 1, rank - 2]
    return False


def _unflattens(view: Node, reading: Reading) -> bool:
    """The view that `fxresu.managed` puts behind the marker of a convolution's weight."""
    matrix, kernel = example(reading.node), example(view)
    if not (is_marker(reading.node) and isinstance(matrix, Tensor) and isinstance(kernel, Tensor)):
        return False
    return matrix.dim() == 2 and 3 <= kernel.dim() <= 5 and kernel.shape[0] == matrix.shape[0]


def _flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


def _cast(view: Node, name: str, target: object) -> torch.dtype | None:
    if name in _CAST_METHODS and len(view.args) == 1 and not view.kwargs:
        return _CAST_METHODS[name]
    if (name == "to" or target is torch.ops.aten.to.dtype) and len(view.args) == 2 and not view.kwargs:
        return view.args[1] if isinstance(view.args[1], torch.dtype) else None
    if name == "type_as" and isinstance(value := example(view), Tensor):
        return value.dtype
    return None


def _pieces(view: Node, reading: Reading, split: Any) -> Iterator[Reading]:
    """The parts of `w.chunk(3)` and the like; what it was split into is read off the example values."""
    parts = example(view)
    dim = view.kwargs.get("dim", view.args[-1] if len(view.args) > (1 if split is torch.unbind else 2) else 0)
    taken = all(u.op == "call_function" and u.target is operator.getitem for u in view.users)
    if dim not in (0, -reading.rank) or not isinstance(parts, (tuple, list)) or not taken or reading.flipped:
        return
    at, bounds = 0, []
    for part in parts:
        size = 1 if split is torch.unbind else part.shape[0]
        bounds.append((at, at + size))
        at += size
    for user in view.users:
        if isinstance(user.args[1], int):
            start, stop = bounds[user.args[1]]
            yield _cut(reading, user, start, stop, split is torch.unbind)


def _piece(view: Node, name: str, target: object, reading: Reading) -> Reading | None:
    """`w[2]`, `w[16:32]`, `w.narrow(0, 16, 16)`, `w.select(0, 2)`, with numbers that the graph knows."""
    value = example(reading.node)
    if reading.flipped or not isinstance(value, Tensor) or not isinstance(value.shape[0], int):
        return None
    size = value.shape[0]
    args: tuple[Any, ...] = view.args[1:]
    if target is operator.getitem:
        index = args[0][0] if isinstance(args[0], tuple) and len(args[0]) == 1 else args[0]
        chosen = example(index)
        if reading.rank == 3 and isinstance(chosen, Tensor) and chosen.dim() <= 1:
            known = chosen.dtype != torch.bool and isinstance(index, Node)
            return dataclasses.replace(reading, node=view, rank=2 + chosen.dim(), index=index) if known else None
        if type(index) is int and reading.rank == 3:
            return _cut(reading, view, index % size, index % size + 1, True)
        bounds = (index.start, index.stop, index.step) if isinstance(index, slice) else (view,)
        if index != slice(None) and all(b is None or type(b) is int for b in bounds) and bounds[-1] in (None, 1):
            start, stop, _ = slice(*bounds).indices(size)
            return _cut(reading, view, start, stop, False) if start < stop else None
    elif (name == "narrow" or target is torch.narrow) and len(args) == 3 and all(type(a) is int for a in args):
        dim, start, length = args
        return _cut(reading, view, start % size, start % size + length, False) if dim in (0, -reading.rank) else None
    elif (name == "select" or target is torch.select) and len(args) == 2 and all(type(a) is int for a in args):
        first = args[0] in (0, -reading.rank) and reading.rank == 3
        return _cut(reading, view, args[1] % size, args[1] % size + 1, True) if first else None
    return None


def _cut(reading: Reading, node: Node, start: int, stop: int, selected: bool) -> Reading:
    return dataclasses.replace(
        reading, node=node, start=start, stop=stop, selected=selected, rank=reading.rank - selected
    )


def can_cut(marker: Node) -> str:
    """Why operands of a piece cannot be cut out of the marker's; "" if they can."""
    if target_of(marker) is PACKED:
        return "packed storage composes whole weights, and this reads a piece of one"
    anchor, bits = example(marker.args[1]), example(marker.args[2])
    if isinstance(anchor, Tensor) and isinstance(bits, Tensor) and anchor.shape[0] != bits.shape[0]:
        return "a piece of a weight whose θ runs over all rows (granularity layer or global)"
    return ""


def operands(graph: Graph, marker: Node, reading: Reading) -> list[Any]:
    """weight, anchor, bits, row_start and columns of what is read, for a rewritten node at the insertion point.

    Rows of a piece are cut out of every operand that has rows; gradients of the pieces add up by themselves.
    """
    weight, anchor, bits, row_start, columns = marker.args[:5]
    nodes = graph.module.graph
    if reading.start is not None and reading.stop is not None:
        first, last = reading.start, reading.stop
        per_index = _rows_per_index(marker)
        a, b = first * per_index, last * per_index

        def rows(node: Any) -> Any:
            return None if node is None else emit(nodes, torch.ops.aten.slice.Tensor, node, 0, a, b)

        if row_start is not None:
            capacity = example(anchor).shape[1]  # type: ignore[attr-defined]
            row_start = emit(nodes, torch.ops.aten.sub.Scalar, rows(row_start), a * capacity)
        anchor, bits = rows(anchor), rows(bits)
        if reading.selected:
            weight = emit(nodes, torch.ops.aten.select.int, weight, 0, first)
        else:
            weight = emit(nodes, torch.ops.aten.slice.Tensor, weight, 0, first, last)
    if reading.dtype is not None and _dtype(weight) is not reading.dtype:
        weight = emit(nodes, torch.ops.aten.to.dtype, weight, reading.dtype)
    return [weight, anchor, bits, row_start, columns]


def _rows_per_index(marker: Node) -> int:
    """Matrix rows of one index of the first dimension."""
    value = example(marker)
    return value[0].numel() // value.shape[-1] if isinstance(value, Tensor) and value.dim() > 2 else 1


def _dtype(node: Any) -> torch.dtype | None:
    value = example(node)
    return value.dtype if isinstance(value, Tensor) else None


def replace(graph: Graph, user: Node, new: Node) -> None:
    """Put `new` in the place of a consumer; it keeps the consumer's example value and origin."""
    new.meta = {**user.meta, **{k: v for k, v in new.meta.items() if k == "example_value"}}
    user.replace_all_uses_with(new)
    graph.module.graph.erase_node(user)


def erase_unread(graph: Graph, marker: Node) -> None:
    """Erase a marker, and the views of it, that nothing reads any more."""

    def erase(node: Node) -> None:
        for user in list(node.users):
            if user.args and user.args[0] is node and _is_view(user):
                erase(user)
        if not node.users:
            graph.module.graph.erase_node(node)

    if is_marker(marker):
        erase(marker)


def _is_view(node: Node) -> bool:
    name = str(node.target) if node.op == "call_method" else ""
    views = ("t", "transpose", "permute", "contiguous", "to", "type_as", "narrow", "select", "view", *_CAST_METHODS)
    if name in views or name in _SPLITS:
        return True
    target = target_of(node) if node.op == "call_function" else None
    return target in _SPLITS or target in (
        getattr, operator.getitem, torch.t, torch.transpose, torch.permute, torch.narrow, torch.select,
        torch.ops.aten.t.default, torch.ops.aten.contiguous.default, torch.ops.aten.to.dtype,
    )  # fmt: skip
