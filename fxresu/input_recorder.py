"""Sees the inputs of managed weights in a forward pass, whatever module or function multiplies them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxresu.passes._compat import GROUPED_PRODUCTS, TorchDispatchMode

from .model_state import Managed
from .weight_statistics import WeightStatistics

__all__ = ["InputRecorder", "groups"]

_aten = torch.ops.aten
# (position of the first factor, position of the second) of a matrix product's arguments
_PRODUCTS = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.mv.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.addmv.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}
_COPIES = (_aten._to_copy.default, _aten.clone.default)
# Where the mask is among the arguments.
_COMPOSED = {torch.ops.fxresu.compose.default: 2, torch.ops.fxresu.compose_quantized.default: 3}


class _Weight(NamedTuple):
    """Where a managed weight lies: `base` is the storage offset of its first element."""

    name: str
    rows: int
    k: int
    base: int
    group_rows: int


def groups(managed: Managed) -> int:
    """Matrices that a weight stacks along its rows: experts of a bank [experts, rows, K]."""
    shape = managed.entry.shape
    return shape[0] if len(shape) == 3 and shape[-1] == managed.entry.k else 1


class InputRecorder(TorchDispatchMode):
    """Within its context, adds the inputs of every managed weight to its `WeightStatistics`.

    Looks at operations below autograd: a factor of a matrix product that lies in a managed weight's storage (whole,
    transposed, or a slice; also a copy of it in another precision) makes the other factor that weight's input. A
    convolution's inputs are the values that each of its kernel's taps reads.
    """

    def __init__(self, weights: Mapping[str, Managed], statistics: Mapping[str, WeightStatistics]) -> None:
        super().__init__()
        self._statistics = statistics
        self._places: dict[int, _Weight] = {}
        self._packed: dict[int, _Weight] = {}
        self._alive: list[Tensor] = []  # copies: their addresses must not be given to other tensors
        for name, managed in weights.items():
            entry, parameter = managed.entry, managed.parameter
            place = _Weight(name, entry.rows, entry.k, int(parameter.storage_offset()), entry.rows // groups(managed))
            if entry.packed and entry.bits is not None:
                self._packed[entry.bits.data_ptr()] = place._replace(base=0)
            else:
                self._places[parameter.untyped_storage().data_ptr()] = place

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            first, second = (args[i] for i in _PRODUCTS[func])
            self._product(first, second)
        elif func is _aten.convolution.default:
            self._convolution(*args)
        elif str(func) in GROUPED_PRODUCTS:
            self._grouped(args[0], args[1], args[2] if len(args) > 2 else (kwargs or {}).get("offs"))
        elif func in _COPIES:
            self._follow(args[0], out)
        elif func in _COMPOSED:
            self._remember(self._packed.get(args[_COMPOSED[func]].data_ptr()), out)
        return out

    def _follow(self, source: Tensor, copy: Tensor) -> None:
        """A copy of a whole weight stands for it."""
        place = self._place(source)
        if place is not None and copy.numel() == place.rows * place.k and copy.stride() == source.stride():
            self._remember(place._replace(base=0), copy)

    def _remember(self, place: _Weight | None, tensor: Tensor) -> None:
        if place is not None:
            self._places[tensor.untyped_storage().data_ptr()] = place
            self._alive.append(tensor)

    def _place(self, tensor: Tensor) -> _Weight | None:
        return self._places.get(tensor.untyped_storage().data_ptr())

    def _product(self, first: Tensor, second: Tensor) -> None:
        place = self._place(second)
        if place is not None:
            self._factor(place, second, -2, first)
            return
        place = self._place(first)
        if place is not None:
            self._factor(place, first, -1, second.mT if second.dim() > 1 else second[None])

    def _factor(self, place: _Weight, factor: Tensor, dim: int, x: Tensor) -> None:
        """`factor` is (a part of) a weight whose dimension `dim` is contracted with the last one of `x`."""
        if factor.dim() < 3 or factor.shape[0] == 1 or factor.stride(0) == 0:
            self._record(place, factor, dim, x)
        else:  # a matrix for each entry of the batch
            for matrix, inputs in zip(factor.unbind(0), x.unbind(0)):
                self._record(place, matrix, dim, inputs)

    def _grouped(self, x: Tensor, matrices: Tensor, ends: Tensor | None) -> None:
        """Rows of `x` [vectors, n], one group after another, each times its own one of `matrices` [groups, n, out]."""
        place = self._place(matrices)
        if place is None or ends is None or x.dim() != 2 or matrices.dim() != 3:
            return
        start = 0
        for matrix, end in zip(matrices.unbind(0), ends.tolist()):
            self._record(place, matrix, -2, x[start:end])
            start = end

    def _record(self, place: _Weight, factor: Tensor, dim: int, x: Tensor) -> None:
        n, step = factor.shape[dim], factor.stride(dim)
        across = factor.stride(-3 - dim) if factor.dim() > 1 else 0
        single = factor.dim() == 1 or factor.shape[-3 - dim] == 1
        start = int(factor.storage_offset()) - place.base
        group = start // place.k // place.group_rows
        if step == 1 and (single or across == place.k) and start % place.k + n <= place.k:
            side, first, features = "columns", start % place.k, place.k
        elif step == place.k and (single or across == 1):
            side, first, features, group = "rows", start // place.k, place.rows, 0
        else:
            return
        self._statistics[place.name].add_inputs(x.detach().reshape(-1, n), side, first, features, group)

    def _convolution(
        self, x: Tensor, weight: Tensor, bias: Any, stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    ) -> None:  # fmt: skip
        """Features are (channel, tap) pairs, as in the kernel's matrix [out, in * k1 * k2 ...]."""
        place = self._place(weight)
        if place is None or transposed or groups != 1 or weight.numel() != place.rows * place.k:
            return
        sizes = weight.shape[2:]
        x = x if x.dim() == weight.dim() else x[None]
        x = nn.functional.pad(x.detach(), [p for size in reversed(padding) for p in (size, size)])
        counts = [(length - d * (k - 1) - 1) // s + 1 for length, k, s, d in zip(x.shape[2:], sizes, stride, dilation)]
        wide = torch.promote_types(x.dtype, torch.float32)
        rest = [0, *range(2, x.dim())]
        squares, sums = [], []
        for taps in itertools.product(*map(range, sizes)):
            window = x
            for dim, (tap, s, d, count) in enumerate(zip(taps, stride, dilation, counts), 2):
                read = slice(tap * d, tap * d + s * (count - 1) + 1, s)
                window = window[(slice(None),) * dim + (read,)]
            squares.append(torch.linalg.vector_norm(window, dim=rest, dtype=wide).double().square())
            sums.append(window.sum(rest, dtype=wide))
        vectors = x.shape[0] * torch.Size(counts).numel()
        self._statistics[place.name].add_sums(
            torch.stack(squares, 1).flatten(), torch.stack(sums, 1).flatten(), vectors, "columns", 0, place.k
        )
