"""`activations="offload"` without compilation: tensors saved for the backward wait on the host, by autograd's hooks.

The earliest leave first, until what stays fits the budget. A tensor that comes back lets those before it start on
their way, so that copies run beside the backward.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxresu.kernels.host_copies import arrive, can_wait, from_host, send
from fxresu.passes import PhasePlan
from fxresu.passes.tag_activations import OFFLOAD_FROM

_AHEAD = 2  # transfers under way while an earlier tensor is used


class _Waiting:
    """A tensor that autograd has saved: on its device, on the host, or on its way back."""

    def __init__(self, tensor: Tensor, earlier: _Waiting | None) -> None:
        self.device, self.nbytes = tensor.device, tensor.nbytes
        self.here: Tensor | None = tensor
        self.host: Tensor | None = None
        self.source = StorageWeakRef(tensor.untyped_storage())
        self.earlier = weakref.ref(earlier) if earlier is not None else lambda: None

    def send(self) -> None:
        """Leave the device, unless it has left."""
        if self.host is None and self.here is not None:
            (self.host, _), self.here = send(self.here), None

    def fetch(self) -> None:
        """Start on the way back, unless it is here."""
        if self.here is None and self.host is not None:
            self.here = from_host(self.host, self.device)

    def get(self) -> Tensor:
        """The tensor, on its device; the host keeps it for a second backward."""
        self.fetch()
        tensor = self.here
        assert tensor is not None
        if self.host is not None:
            arrive(tensor)
            self.here = None
        before = self.earlier()
        for _ in range(_AHEAD):
            if before is None:
                break
            before.fetch()
            before = before.earlier()
        return tensor


class EagerOffload:
    """Remembers from one forward to the next what a share of the saved bytes is."""

    def __init__(self) -> None:
        self._packed = 0

    @contextlib.contextmanager
    def __call__(self, plan: PhasePlan, held: Iterable[Tensor]) -> Iterator[None]:
        """Context of a forward.

        Args:
            held: tensors that are alive anyway (weights, arguments); what shares their memory is left alone.
        """
        forward = _Forward(self._limit(plan), {t.untyped_storage().data_ptr() for t in held})
        with torch.autograd.graph.saved_tensors_hooks(forward.pack, _unpack):
            yield
        self._packed = forward.packed

    def _limit(self, plan: PhasePlan) -> int:
        """Bytes that may stay. A share of what the forward before has saved; in the first one nothing stays."""
        budget = plan.activation_budget
        return int(budget * self._packed) if isinstance(budget, float) else budget or 0


class _Forward:
    def __init__(self, limit: int, held: set[int]) -> None:
        self._limit, self._held = limit, held
        self._known: weakref.WeakValueDictionary[tuple, _Waiting] = weakref.WeakValueDictionary()
        self._staying: deque[weakref.ref[_Waiting]] = deque()
        self._last: weakref.ref[_Waiting] | None = None
        self._bytes = 0
        self.packed = 0

    def pack(self, tensor: Tensor) -> Tensor | _Waiting:
        storage = tensor.untyped_storage()
        if tensor.nbytes < OFFLOAD_FROM or storage.data_ptr() in self._held or not can_wait(tensor):
            return tensor
        key = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        known = self._known.get(key)
        if known is not None and not known.source.expired():
            return known
        waiting = _Waiting(tensor.detach(), self._last() if self._last is not None else None)
        self._known[key] = waiting
        self._last = weakref.ref(waiting)
        self._staying.append(self._last)
        self._bytes += waiting.nbytes
        self.packed += waiting.nbytes
        while self._bytes > self._limit:
            earliest = self._staying.popleft()()
            if earliest is not None:
                earliest.send()
                self._bytes -= earliest.nbytes
        return waiting


def _unpack(packed: Tensor | _Waiting) -> Tensor:
    return packed.get() if isinstance(packed, _Waiting) else packed
