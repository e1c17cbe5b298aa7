"""One tensor of an optimizer's state that has left, or is leaving, or comes back: who owns its values.

=========== ==============================================================  ======================================
owner       where the values are                                            next
=========== ==============================================================  ======================================
DEVICE      in the optimizer's own tensor                                   LEAVING, HOST, COMPRESSED, DROPPED
LEAVING     being copied to pinned memory; nobody may use them              PINNED, DEVICE (given up), DROPPED
PINNED      in pinned host memory                                           RETURNING, DROPPED
HOST        in pageable host memory                                         RETURNING, DROPPED
COMPRESSED  in 8-bit codes on the device                                    RETURNING, DROPPED
RETURNING   being copied (decoded) into a new tensor of the device; what    DEVICE, or back (given up): PINNED, HOST,
            they come from is still whole                                   COMPRESSED; DROPPED
DROPPED     nowhere                                                         none: the optimizer builds a new tensor
=========== ==============================================================  ======================================

While a tensor is away its `Slot` stands in its place in `optimizer.state[parameter]`, so that whoever takes it for a
tensor fails at once. A copy or pickle of the optimizer gets the values.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxresu.kernels import log8

from .errors import FxresuError
from .lanes import Lanes, Pairs
from .pinned_pool import Extents, PinnedPool

__all__ = ["TRANSITIONS", "Owner", "OwnerError", "Slot", "flat", "movable"]


class Owner(enum.StrEnum):
    """Who has the values of a state tensor."""

    DEVICE = "device"
    LEAVING = "leaving"
    PINNED = "pinned"
    HOST = "host"
    COMPRESSED = "compressed"
    RETURNING = "returning"
    DROPPED = "dropped"


_REST = frozenset({Owner.PINNED, Owner.HOST, Owner.COMPRESSED})
TRANSITIONS: dict[Owner, frozenset[Owner]] = {
    Owner.DEVICE: frozenset({Owner.LEAVING, Owner.HOST, Owner.COMPRESSED, Owner.DROPPED}),
    Owner.LEAVING: frozenset({Owner.PINNED, Owner.DEVICE, Owner.DROPPED}),
    Owner.PINNED: frozenset({Owner.RETURNING, Owner.DROPPED}),
    Owner.HOST: frozenset({Owner.RETURNING, Owner.DROPPED}),
    Owner.COMPRESSED: frozenset({Owner.RETURNING, Owner.DROPPED}),
    Owner.RETURNING: frozenset({Owner.DEVICE, Owner.DROPPED}) | _REST,
    Owner.DROPPED: frozenset(),
}


class OwnerError(FxresuError, RuntimeError):
    """A state tensor was to go from one owner to another that cannot follow it."""


def flat(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor in the order of its memory: uint8 [nbytes], sharing it."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _dense(tensor: Tensor) -> bool:
    """Whether its elements fill its storage: moving it moves all of it, and frees all of it."""
    return (
        tensor.layout is torch.strided
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() > 0
        and torch.ops.aten.is_non_overlapping_and_dense.default(tensor)
    )


def _parts(value: Tensor) -> list[Tensor]:
    """The plain tensors of which a tensor is made: itself, or those inside a subclass."""
    if type(value) in (Tensor, nn.Parameter):
        return [value.detach()]
    inner: Any = value
    return [getattr(value, name) for name in inner.__tensor_flatten__()[0]]


def movable(value: Any) -> str:
    """Why a state tensor cannot leave its device; "" if it can."""
    if type(value) not in (Tensor, nn.Parameter) and not is_traceable_wrapper_subclass(value):
        return f"a {type(value).__name__} does not say what it is made of"
    if getattr(value, "is_paged", False):
        return "it is paged memory, which moves by itself"
    parts = _parts(value)
    if any(type(p) not in (Tensor, nn.Parameter) for p in parts):
        return f"a {type(value).__name__} of other subclasses"
    if not all(map(_dense, parts)):
        return "it is a part of a larger tensor, or has gaps"
    return ""


class Slot:
    """Stands in an optimizer's state for a tensor that is away.

    Attributes:
        owner: who has the values (see the module); changed by `go` alone.
        dtype, shape: of the tensor.
        plain: whether it is an ordinary tensor, no subclass.
        device: where it belongs.
        nbytes: that it has there.
    """

    def __init__(self, value: Tensor, lanes: Lanes) -> None:
        parts = _parts(value)
        self.owner = Owner.DEVICE
        self.dtype, self.shape, self.device = value.dtype, value.shape, value.device
        self.plain = type(value) in (Tensor, nn.Parameter)
        self.nbytes = sum(p.numel() * p.element_size() for p in parts)
        self._lanes = lanes
        self._value: Tensor | None = value
        self._forms = [(p.shape, p.stride(), p.dtype, p.device) for p in parts]
        self._meta: Any = None
        if not self.plain:
            inner: Any = value
            self._meta = type(value), *inner.__tensor_flatten__(), value.shape, value.stride()
        self._extents: list[Extents] = []
        self._host: list[Tensor] = []
        self._codes: tuple[Tensor, Tensor, bool] | None = None
        self._left: Any = None  # mark behind the copy to pinned memory
        self._came: Any = None  # mark behind the copy back
        self._from = self._target = Owner.DEVICE

    def belongs_on(self, device: torch.device) -> None:
        """Come back to this device, not to the one where the values were found."""
        self.device = device
        self._forms = [(*form[:3], device) for form in self._forms]

    def go(self, owner: Owner) -> None:
        """Change the owner.

        Raises:
            OwnerError: the values cannot go there from where they are.
        """
        if owner not in TRANSITIONS[self.owner]:
            allowed = ", ".join(sorted(TRANSITIONS[self.owner])) or "nothing"
            raise OwnerError(f"state that is {self.owner} cannot become {owner}: only {allowed}")
        self.owner = owner

    # Away

    def leave(self, pool: PinnedPool) -> None:
        """Queue the copy to pinned memory; the device's tensor stays until `depart`.

        Raises:
            HostMemoryError: the pool has no room; nothing has changed then.
        """
        parts = _parts(self._kept)
        extents = [pool.take(p.numel() * p.element_size()) for p in parts]
        self.go(Owner.LEAVING)
        self._extents = extents
        pairs = [(piece, part) for p, e in zip(parts, extents) for part, piece in _pieces(flat(p), e)]
        self._left = self._lanes.copy("out", pairs, [self._lanes.mark()])
        for extent in extents:
            extent.busy = self._left

    def leave_pageable(self) -> None:
        """Copy to pageable memory, at once; the device's tensor stays until `depart`."""
        parts = _parts(self._kept)
        host = [self._lanes.pageable(p) for p in parts]
        for target, part in zip(host, parts):
            target.copy_(part)
        self._host, self._target = host, Owner.HOST

    def compress(self, signed: bool) -> None:
        """Encode; the tensor itself stays until `depart`."""
        codes, scales = log8.encode(self._kept.detach().as_strided((self._kept.numel(),), (1,)), signed)
        self._codes, self._target = (codes, scales, signed), Owner.COMPRESSED

    def depart(self) -> None:
        """The values are owned elsewhere from now on: let the device's tensor go."""
        parts = _parts(self._kept)
        if self.owner is Owner.LEAVING:
            for part in parts:
                self._lanes.hold("out", part)
        else:
            self.go(self._target)
        self._value = None
        for part in parts:
            self._lanes.let_go(part)

    def stay(self) -> None:
        """Give the way out up; the device's tensor never changed. What was stored goes."""
        if self._value is None:
            raise OwnerError(f"state that is {self.owner} has left the device already")
        if self.owner is Owner.LEAVING:
            for part in _parts(self._value):  # the copy goes on, and the optimizer may let the tensor go before its end
                self._lanes.hold("out", part)
            self.go(Owner.DEVICE)
        self._forget()

    def land(self, wait: bool = False) -> None:
        """PINNED if the copy to pinned memory is done, or with `wait` when it is."""
        if self.owner is not Owner.LEAVING or self._value is not None:
            return
        if wait:
            self._lanes.finish(self._left)
        if self._lanes.reached(self._left):
            self.go(Owner.PINNED)

    # Back

    def come_back(self) -> None:
        """Queue the copy into a new tensor of the device. What it comes from stays whole until `arrive`."""
        if self.owner is Owner.LEAVING:  # the copy back waits for the copy out
            self.go(Owner.PINNED)
        source = self.owner
        if source not in _REST:
            raise OwnerError(f"state that is {source} cannot come back: only {', '.join(sorted(_REST))}")
        parts = [self._lanes.empty(*form) for form in self._forms]
        if source is Owner.COMPRESSED:
            self._decode(parts[0])
            self._came = None
        else:
            pairs = [pair for p, e in zip(parts, self._extents) for pair in _pieces(flat(p), e)]
            pairs += [(flat(part), flat(host)) for part, host in zip(parts, self._host)]
            self._came = self._lanes.copy("in", pairs, [self._lanes.mark(), self._left])
        self.go(Owner.RETURNING)
        self._from = source
        for extent in self._extents:
            extent.busy = self._came
        self._value = self._built(parts)

    def arrive(self) -> Tensor:
        """The tensor on its device; what the computation does from now on finds the values in it. What they came from
        is let go by `forget`."""
        if self.owner is not Owner.RETURNING:
            raise OwnerError(f"state that is {self.owner} has not been called back")
        self._lanes.wait(self._came)
        return self._kept

    def forget(self) -> None:
        """The optimizer has the tensor again."""
        self.go(Owner.DEVICE)
        self._forget()

    def go_back(self) -> None:
        """Give the way back up: what the values came from owns them again."""
        parts = _parts(self._kept)
        if self._came is not None:
            for part in parts:
                self._lanes.hold("in", part)
        self.go(self._from)
        self._value = self._came = None
        for part in parts:
            self._lanes.let_go(part)

    @property
    def returned(self) -> bool:
        """Whether it is RETURNING and the copy is done."""
        return self.owner is Owner.RETURNING and self._lanes.reached(self._came)

    # Looking

    def value(self) -> Tensor:
        """The values in host memory, the owner unchanged. Waits for copies that are under way."""
        if self._extents:
            self._lanes.finish(self._left)
            parts = [torch.empty_strided(s, t, dtype=d) for s, t, d, _ in self._forms]
            for part, extent in zip(parts, self._extents):
                start, target = 0, flat(part)
                for piece in extent.pieces:
                    target[start : start + piece.numel()].copy_(piece)
                    start += piece.numel()
        elif self._host:
            parts = [h.clone() for h in self._host]
        elif self._codes is not None:
            shape, stride, dtype, _ = self._forms[0]
            parts = [torch.empty_strided(shape, stride, dtype=dtype)]
            codes, scales, signed = self._codes
            log8.decode(codes.cpu(), scales.cpu(), signed, parts[0].as_strided((parts[0].numel(),), (1,)))
        else:
            return self._kept
        return self._built(parts)

    def bytes_on(self, device: torch.device) -> int:
        """Bytes that it holds on a device: of all that is whole or under way."""
        held: list[Tensor] = [*self._host, *(self._codes or ())[:2]]
        held += [] if self._value is None else _parts(self._value)
        pinned = sum(e.nbytes for e in self._extents) if device.type == "cpu" else 0
        return pinned + sum(t.numel() * t.element_size() for t in held if t.device == device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.value().to(self.device)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.value(),)

    def __repr__(self) -> str:
        return f"<{self.dtype} {tuple(self.shape)}: {self.owner}, away from {self.device}>"

    # Pieces

    @property
    def _kept(self) -> Tensor:
        if self._value is None:
            raise OwnerError(f"state that is {self.owner} is not on its device")
        return self._value

    def _decode(self, target: Tensor) -> None:
        assert self._codes is not None
        codes, scales, signed = self._codes
        log8.decode(codes, scales, signed, target.as_strided((target.numel(),), (1,)))

    def _built(self, parts: list[Tensor]) -> Tensor:
        if self._meta is None:
            return parts[0]
        kind, names, context, shape, stride = self._meta
        return kind.__tensor_unflatten__(dict(zip(names, parts)), context, shape, stride)

    def _forget(self) -> None:
        self._extents, self._host, self._codes, self._value = [], [], None, None


def _same(value: Tensor) -> Tensor:
    return value


def _pieces(bytes_: Tensor, extents: Extents) -> Pairs:
    """A tensor's bytes cut up as the pieces of pinned memory that hold them: (part, piece)."""
    pieces = extents.pieces
    return list(zip(bytes_.split([piece.numel() for piece in pieces]), pieces))
