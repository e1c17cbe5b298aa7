"""What a node of a captured graph executes: the node is run on shapes, forward and backward, and its operations are
written down."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxresu.kernels._triton import HAS_TRITON, INTERPRET
from fxresu.passes._compat import fake_mode, size_hint

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
_FUSED = ("where", "index_select")


@dataclasses.dataclass(frozen=True)
class Executed:
    """Operations of one node, in order: matrix products, fxresu's kernels, and what touches as much memory as they do.

    Views, casts and bias sums are left out.
    """

    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"fwd {' '.join(self.forward)}"] if self.forward else []
        return "; ".join(parts + ([f"bwd {' '.join(self.backward)}"] if self.backward else []))


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "fxresu":
            self.names.append(f"fxresu.{name}")
        elif name in _PRODUCTS + _FUSED:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def executed(node: Node, cache: dict[Any, Executed], *, backward: bool = True) -> Executed:
    """The operations of a call to an OpOverload, from the example values of its operands; `backward` includes its
    backward. `cache` keeps results between calls."""
    args = pytree.tree_map_only(Node, lambda n: n.meta.get("example_value"), node.args)
    shapes = pytree.tree_map_only(Tensor, _signature, args)
    key = (str(node.target), str(shapes), str(node.kwargs), backward)
    if key not in cache:
        assert callable(node.target)
        with fake_mode():
            call = functools.partial(node.target, **node.kwargs)
            cache[key] = _run(call, pytree.tree_map_only(Tensor, fresh, args), backward)
    return cache[key]


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(map(size_hint, tensor.shape)), tensor.dtype, tensor.requires_grad


def fresh(tensor: Tensor) -> Tensor:
    """A new tensor of the same shape, type and need of a gradient; symbolic sizes become numbers."""
    sizes = [size_hint(s) for s in tensor.shape]
    return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device, requires_grad=tensor.requires_grad)


def _run(target: Any, args: Any, backward: bool) -> Executed:
    with torch.set_grad_enabled(backward), _Log() as ahead:
        out = target(*args)
    with _Log() as back:
        if out.requires_grad and out.grad_fn is not None:
            out.backward(torch.empty_like(out))
    return Executed(tuple(ahead.names), tuple(back.names))


def engine_of(operation: str, device: torch.device | str) -> str:
    """What runs one of the operations named in `Executed` on a device."""
    on_cuda = torch.device(device).type == "cuda"
    if operation.startswith("fxresu."):
        if on_cuda:
            return "Triton" if HAS_TRITON else "nothing: Triton is not installed"
        return "Triton's interpreter" if INTERPRET else "PyTorch reference (on CUDA: Triton)"
    if operation in _PRODUCTS:
        return "cuBLAS" if on_cuda else "CPU BLAS"
    return "Inductor, fused" if operation in _FUSED else "as the model has it"
