"""How a module hands out its managed weights.

The module keeps its `_parameters` entry, so names, `state_dict()` keys and optimizers do not notice. Reading
`module.weight` goes through a property on a cached subclass of the module's class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fxresu.kernels import unpack
from fxresu.passes._compat import only_inlined

from . import weight_storage
from .managed import ManagedWeight
from .packed_linear import linear_forward
from .recurrent import RECURRENT, forward_of

# For type checkers only: at run time the mixin has no base of its own, so that it fits in front of any module class.
if TYPE_CHECKING:
    _ModuleMixin = nn.Module
else:
    _ModuleMixin = object


class ManagedModule(_ModuleMixin):
    """Mixed into the class of a module that reads managed weights. `_fxresu` maps parameter names to their records."""

    _fxresu: dict[str, ManagedWeight]
    fxresu_base: ClassVar[type[nn.Module]]
    fxresu_names: ClassVar[tuple[str, ...]]
    fxresu_root: ClassVar[bool]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        entries = {n: e for n, e in self._fxresu.items() if self._parameters.get(n) is not None}
        packed = {n for n, e in entries.items() if e.packed}
        for name, entry in entries.items():
            weight = _held(self, name)
            if name in packed:
                weight.data = weight.data.flatten()[:1]  # move the stand-in's one element, not its expansion
            elif entry.anchor is not None and entry.theta is None and fn(weight.detach()[:0]).dtype != weight.dtype:
                weight_storage.keep_master(entry, weight)
        result = super()._apply(fn, recurse)
        for name, entry in entries.items():
            entry.apply(fn)
            if name in packed:
                weight = _held(self, name)
                weight.data = weight.data.expand(entry.shape)
                if entry.active is not None and entry.active_start is not None:
                    follows = entry.packed_values == "native"
                    active = entry.active.to(weight.dtype) if follows else entry.active
                    weight_storage.set_active(entry, active, entry.active_start, entry.active_scale)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for module in self.modules():
            for entry in getattr(module, "_fxresu", {}).values():
                if entry.anchor is not None:
                    entry.anchor.grad = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, entry in self._fxresu.items():
            if entry.packed and prefix + name in destination:
                destination[prefix + name] = entry.dense(_held(self, name))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        held = {n: e for n, e in self._fxresu.items() if self._parameters.get(n) is not None}
        entries = {n: e for n, e in held.items() if prefix + n in state_dict}
        away = {n: weight_storage.storage_of(e) for n, e in entries.items() if e.packed}
        for name in away:
            weight_storage.unpack_into(entries[name], _held(self, name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name, entry in entries.items():
            _after_load(entry, _held(self, name))
            if name in away:
                weight_storage.send_away(entry, _held(self, name), away[name])
            if entry.stream is not None:  # the next modules load into host memory, and not into what is under way
                entry.stream.send_home()

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        return _rebuild, (cls.fxresu_base, cls.fxresu_names, cls.fxresu_root), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if type(self).fxresu_root:
            from .runner import install_runner

            install_runner(self)


def _held(module: nn.Module, name: str) -> nn.Parameter:
    """The Parameter itself, past the property."""
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


@torch.no_grad()
def _after_load(entry: ManagedWeight, weight: Tensor) -> None:
    """Make a freshly loaded weight agree with the mask and θ: dead slots are zero, a master of θ follows the weight."""
    if entry.bits is None:
        return
    entry.bring(weight)
    matrix, kept = entry.matrix(weight), unpack(entry.bits, entry.k)
    if entry.columns is not None:
        kept |= entry.covered()
    if entry.anchor is None or entry.columns is not None:
        matrix.masked_fill_(~kept, 0)
    if entry.anchor is None:
        return
    if entry.theta is not None:
        entry.theta.data.copy_(entry.gather_theta(matrix, entry.theta.dtype))
    if entry.low is not None:
        weight_storage.make_copy(entry, weight)


def _property(name: str) -> property:
    def read(self: Any) -> Tensor | None:
        if name in self._parameters:
            parameter = self._parameters[name]
            return None if parameter is None else self._fxresu[name].read(parameter)
        # The parameter was taken away (weight_norm, nn.utils.prune): the name is an ordinary one again.
        if name in self.__dict__:
            return self.__dict__[name]
        raise AttributeError(name)  # `Module.__getattr__` looks on

    only_inlined(read)

    def write(self: Any, value: object) -> None:
        self.__dict__[name] = value

    def delete(self: Any) -> None:
        if name not in self.__dict__:
            raise AttributeError(name)
        del self.__dict__[name]

    return property(read, write, delete)


@functools.cache
def managed_class(base: type[nn.Module], names: tuple[str, ...], root: bool = False) -> type[nn.Module]:
    """The subclass of `base`, of the same name, whose parameters `names` are read as managed weights.

    Of a recurrent module (which manages none) Dynamo leaves the call to Python, and nothing else.
    """
    body: dict[str, Any] = {name: _property(name) for name in names}
    body |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    body |= {"fxresu_base": base, "fxresu_names": names, "fxresu_root": root}
    if issubclass(base, RECURRENT):
        body["forward"] = forward_of(base)
    if base.forward is nn.Linear.forward and "weight" in names:
        body["forward"] = linear_forward
    return type(base.__name__, (ManagedModule, base), body)


def _rebuild(base: type[nn.Module], names: tuple[str, ...], root: bool) -> nn.Module:
    cls = managed_class(base, names, root)  # type: ignore[arg-type]  # mypy has no class for hashable
    return cls.__new__(cls)


__all__ = ["ManagedModule", "managed_class"]
