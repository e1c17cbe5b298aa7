"""A rehearsal: real training code on tensors without memory, which notes every storage that comes and goes.

The level of live bytes over the notes is what the same code takes on a device, because nothing else decides it: eager
code frees what Python and autograd let go, and compiled code runs the buffers that Inductor's own wrapper allocates.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxresu.passes._compat import FakeTensorMode, shape_env

from .reference_costs import reference_bytes

SAVED, GRADIENTS, THETA_GRADIENT, TEMPORARY = "activations", "gradients", "θ gradient", "temporaries"
DYNAMIC = (SAVED, GRADIENTS, THETA_GRADIENT, TEMPORARY)
"""What a step adds to what is there all the time: kept for the backward, gradients, and the rest."""

Region = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class Peak:
    """The highest level within a stretch of a step, above what was there before the step.

    Attributes:
        region: name of the stretch.
        parts: bytes by a name in `DYNAMIC`.
    """

    region: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Trace:
    """Storages of a step in the order in which they come and go.

    Attributes:
        events: (number of the storage, bytes gained or lost).
        update: how many of them come before the update.
        sections: how many come before the forward (of what was there before it, and counts as the step's), before the
            backward, and before the update.
    """

    events: tuple[tuple[int, int], ...]
    update: int
    sections: tuple[int, ...] = ()


class Rehearsal(FakeTensorMode):
    """A fake mode that follows storages on one kind of device.

    Args:
        device: "cpu" or "cuda"; storages elsewhere are not counted.
        references: fxresu's operations run as the PyTorch references that a CPU has, which take memory of their own.

    Attributes:
        recording: notes what comes and goes; off while something is compiled or only prepared.
    """

    def __init__(self, device: str, references: bool = True) -> None:
        super().__init__(allow_non_fake_inputs=True, shape_env=shape_env())
        self.kind, self.recording, self._inside = device, False, False
        self._references = references and device == "cpu"
        self._live: dict[int, int] = {}  # number by storage
        self._sizes: list[int] = []  # by number
        self._events: list[tuple[int, int]] = []  # (number, bytes gained or lost)
        self._names: dict[int, str] = {}
        self._marks: list[tuple[str, int]] = []
        self._begun = 0  # events that were noted before the step's own

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # code that asks for a value gets one
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        outermost, self._inside = not self._inside, True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self._inside = not outermost
        if self.recording and outermost:  # what fakes are computed from inside an operation is no part of it
            for value in pytree.tree_leaves(out):
                if isinstance(value, Tensor):
                    self._number(value)
            if func.namespace == "fxresu" and self._references:
                self.transient(reference_bytes(func, args))
        return out

    def known(self, tensors: Iterable[Tensor | None], name: str = "") -> None:
        """These are there already; with a name out of `DYNAMIC` they count as part of the step all the same."""
        recording, self.recording = self.recording, bool(name)
        for tensor in tensors:
            if tensor is not None:
                number = self._number(tensor)
                if name and number is not None:
                    self._names[number] = name
        self.recording = recording

    def name(self, tensors: Iterable[Tensor | None], name: str) -> None:
        """Call these storages, if they are followed, by a name out of `DYNAMIC`."""
        for tensor in tensors:
            number = None if tensor is None else self._live.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._names.setdefault(number, name)

    def name_living(self, name: str) -> None:
        """All that has come since the recording began, is still there and has no name."""
        came = {number for number, size in self._events if size > 0}
        for number in self._live.values():
            if number in came:
                self._names.setdefault(number, name)

    def transient(self, size: int) -> None:
        """Bytes that come and go within one operation."""
        if size:
            self._sizes.append(size)
            self._events += [(len(self._sizes) - 1, size), (len(self._sizes) - 1, -size)]

    def begin(self) -> None:
        """Note from now on what comes and goes."""
        self.recording, self._begun = True, len(self._events)

    def mark(self, name: str) -> None:
        """A stretch called `name` ends here."""
        self._marks.append((name, len(self._events)))

    def peaks(self) -> tuple[Peak, ...]:
        """The highest level in both halves of every stretch.

        Halves, because in a row of equal blocks the level rises or falls steadily: the highest of a half moves in
        proportion to the number of blocks, which the highest of the whole does not.
        """
        regions: list[Region] = []
        begin = 0
        for name, end in self._marks:
            middle = (begin + end) // 2
            regions += [(f"{name}, first half", begin, middle), (f"{name}, second half", middle, end)]
            begin = end
        level = dict.fromkeys(DYNAMIC, 0)
        found, position = [], 0
        for name, _, end in regions:
            best = dict(level)
            for number, size in self._events[position:end]:
                level[self._names.get(number, TEMPORARY)] += size
                if size > 0 and sum(level.values()) > sum(best.values()):
                    best = dict(level)
            position = end
            found.append(Peak(name, best))
        return tuple(found)

    def trace(self) -> Trace:
        """All that was noted; the update begins where a stretch called "backward" ends."""
        ends = {name: at for name, at in self._marks}
        update = ends.get("backward", len(self._events))
        return Trace(tuple(self._events), update, (self._begun, ends.get("forward", update), update))

    def _number(self, tensor: Tensor) -> int | None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if size == 0 or tensor.device.type != self.kind:
            return None
        key = storage._cdata
        if key not in self._live:
            number = len(self._sizes)
            self._sizes.append(size)
            self._live[key] = number
            if self.recording:
                self._events.append((number, size))
            weakref.finalize(storage, self._gone, key, number, self.recording).atexit = False
        return self._live[key]

    def _gone(self, key: int, number: int, counted: bool) -> None:
        self._live.pop(key, None)
        if counted or self.recording:
            self._events.append((number, -self._sizes[number]))


def grads(parameters: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Gradients of these, where there are some."""
    return [None if p is None else p.grad for p in parameters]


def tensors_of(state: Mapping[Any, Mapping[str, Any]]) -> list[torch.Tensor]:
    """All tensors of an optimizer's state."""
    return [v for entry in state.values() for v in entry.values() if isinstance(v, Tensor)]
