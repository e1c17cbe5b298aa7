"""What autograd keeps of a captured graph for the backward pass, found by running the graph on shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from fxresu.passes._compat import fake_mode, outside_functorch, size_hint, unwrapped
from fxresu.passes.markers import is_marker, target_of

from .executed import fresh
from .graph_view import is_copy

_LOOPS = ("scan", "associative_scan", "while_loop", "map_impl", "cond")
_PACKED = torch.ops.fxresu.managed_packed.default


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps alive for the backward, every storage once. Weights and the caller's inputs are not
    counted; nor is what the compiler recomputes on its own account afterwards.

    Attributes:
        results: by the node whose result is kept; what exists only inside an operation is under its own node.
        readers: by the node that asked first for it to be kept.
        unknown: why it could not be found out; the figures are empty then.
    """

    results: Mapping[str, int] = dataclasses.field(default_factory=dict)
    readers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unknown: str = ""

    @property
    def total(self) -> int | None:
        """Bytes of all; None if unknown."""
        return None if self.unknown else sum(self.results.values())


def kept_of(module: GraphModule, *, plain: bool = False) -> Kept:
    """What a training step of the graph keeps.

    Args:
        module: as Dynamo captured it, before or after the passes. It is run on fake tensors; nothing is allocated.
        plain: take markers for the plain weights that they stand for, and grad mode as training has it: what the
            untransformed model would keep.
    """
    try:
        with outside_functorch(), fake_mode(), torch.enable_grad():
            run = _Run(module, plain)
            run.run(*run.inputs())
            return run.found()
    except Exception as error:  # an operation without a fake, or whose shape depends on values: say so, go on
        return Kept(unknown=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


class _Region(Interpreter):
    """Runs a graph, with the plain weights in place of markers if `plain`."""

    def __init__(self, module: GraphModule, plain: bool) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.plain = plain

    def run_node(self, n: Node) -> Any:
        return self.weight(n) if self.plain and is_marker(n) else super().run_node(n)

    def weight(self, marker: Node) -> Tensor:
        """The plain weight that a marker stands for."""
        args = self.fetch_args_kwargs_from_env(marker)[0]
        if target_of(marker) is _PACKED:
            return torch.empty(args[5], dtype=args[6], device=args[0].device, requires_grad=True)
        if args[0].requires_grad or not is_copy(marker.args[0]):
            return args[0]
        # a bfloat16 copy that products read in the weight's place
        return torch.empty_like(args[0], dtype=torch.float32, requires_grad=True)


class _Run(_Region):
    """Notes which storage each node makes and asks autograd to keep."""

    def __init__(self, module: GraphModule, plain: bool) -> None:
        super().__init__(module, plain)
        self.node = ""
        self.made: dict[int, str] = {}
        self.kept: dict[int, tuple[int, str]] = {}
        self.given: set[int] = set()
        self.alive: list[Any] = []  # storages are told apart by address, so none may be freed

    def inputs(self) -> list[Any]:
        """A fresh fake for every placeholder."""
        examples = [n.meta.get("example_value") for n in self.module.graph.nodes if n.op == "placeholder"]
        values = [_fresh(e) for e in examples]
        for example, value in zip(examples, values):
            # What an earlier graph computed is kept on account of this one; weights and the caller's inputs are not.
            if isinstance(value, Tensor) and (example.is_leaf or not example.requires_grad):
                self.given.add(self._storage(value))
        return values

    def run_node(self, n: Node) -> Any:
        self.node = n.name
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda t: t):
            out = super().run_node(n)
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.made.setdefault(self._storage(tensor), n.name)
        return out

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(target, "_name", "")
        if name == "tag_activation_checkpoint":
            return self._recomputed(args, kwargs)
        if name in _LOOPS:
            raise NotImplementedError(f"the graph has a {name}; what one keeps depends on how it is compiled")
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, Tensor):
            value = fresh(value)
            self.given.add(self._storage(value))
        return value

    def weight(self, marker: Node) -> Tensor:
        found = super().weight(marker)
        self.given.add(self._storage(found))
        return found

    def found(self) -> Kept:
        """The figures after the run."""
        results: dict[str, int] = {}
        readers: dict[str, int] = {}
        for storage, (size, reader) in self.kept.items():
            maker = self.made.get(storage, reader)
            results[maker] = results.get(maker, 0) + size
            readers[reader] = readers.get(reader, 0) + size
        return Kept(results, readers)

    def _recomputed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A checkpoint region keeps its operands and nothing of what it computes."""
        body, *operands = args
        if kwargs.get("context_fn") is not None:
            raise NotImplementedError("a checkpoint region that chooses what it keeps")
        for operand in operands:
            if isinstance(operand, Tensor) and operand.requires_grad:
                self._keep(operand)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return _Region(body, self.plain).run(*operands)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = self._storage(tensor)
        if storage not in self.given:
            self.kept.setdefault(storage, (unwrapped(tensor).untyped_storage().nbytes(), self.node))
        return tensor

    def _storage(self, tensor: Tensor) -> int:
        storage = unwrapped(tensor).untyped_storage()
        self.alive.append(storage)
        return storage._cdata


def _fresh(value: Any) -> Any:
    """A placeholder's stand-in: tensors without memory, and numbers for symbolic ones."""
    if isinstance(value, Tensor):
        return fresh(value)
    if isinstance(value, torch.SymInt):
        return size_hint(value)
    return value
