"""Sees the inputs of managed weights in a forward pass, whatever module or function multiplies them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxresu.passes._compat import TorchDispatchMode

from .model_state import Managed
from .weight_statistics import WeightStatistics

__all__ = ["InputRecorder"]

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


class _Weight(NamedTuple):
    """Where a managed weight lies: `base` is the storage offset of its first element."""

    name: str
    rows: int
    k: int
    base: int


class InputRecorder(TorchDispatchMode):
    """Within its context, adds the inputs of every managed weight to its `WeightStatistics`.

    Looks at operations below autograd: a factor of a matrix product that lies in a managed weight's storage (whole,
    transposed, or a slice; also a copy of it in another precision) makes the other factor that weight's input.
    """

    def __init__(self, weights: Mapping[str, Managed], statistics: Mapping[str, WeightStatistics]) -> None:
        super().__init__()
        self._statistics = statistics
        self._places: dict[int, _Weight] = {}
        self._packed: dict[int, _Weight] = {}
        self._alive: list[Tensor] = []  # copies: their addresses must not be given to other tensors
        for name, managed in weights.items():
            entry, parameter = managed.entry, managed.parameter
            place = _Weight(name, entry.rows, entry.k, int(parameter.storage_offset()))
            if entry.packed and entry.bits is not None:
                self._packed[entry.bits.data_ptr()] = place._replace(base=0)
            else:
                self._places[parameter.untyped_storage().data_ptr()] = place

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            first, second = (args[i] for i in _PRODUCTS[func])
            self._product(first, second)
        elif func in _COPIES:
            self._follow(args[0], out)
        elif func is torch.ops.fxresu.compose.default:
            self._remember(self._packed.get(args[2].data_ptr()), out)
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
            self._record(place, second, -2, first)
            return
        place = self._place(first)
        if place is not None:
            self._record(place, first, -1, second.mT if second.dim() > 1 else second[None])

    def _record(self, place: _Weight, factor: Tensor, dim: int, x: Tensor) -> None:
        """`factor` is (a part of) a weight whose dimension `dim` is contracted with the last one of `x`."""
        if factor.dim() == 3 and (factor.shape[0] != 1 and factor.stride(0) != 0):
            return  # a batch of different matrices: what is multiplied is not the weight's matrix
        n, step = factor.shape[dim], factor.stride(dim)
        across = factor.stride(-3 - dim) if factor.dim() > 1 else 0
        single = factor.dim() == 1 or factor.shape[-3 - dim] == 1
        start = int(factor.storage_offset()) - place.base
        if step == 1 and (single or across == place.k) and start % place.k + n <= place.k:
            side, first, features = "columns", start % place.k, place.k
        elif step == place.k and (single or across == 1):
            side, first, features = "rows", start // place.k, place.rows
        else:
            return
        self._statistics[place.name].add_inputs(x.detach().reshape(-1, n), side, first, features)
