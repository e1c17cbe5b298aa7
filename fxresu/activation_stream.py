"""Inputs of checkpointed blocks in host memory between forward and backward, copied beside the computation."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .lanes import Lanes

__all__ = ["ActivationStream"]

_SMALL = 2**20  # bytes up to which a tensor stays
_LEAVING = 2  # tensors whose copies may be under way before the computation waits for one


@dataclasses.dataclass(eq=False)
class _Buffer:
    memory: Tensor
    read: Any = None  # mark of the last copy from it


@dataclasses.dataclass(eq=False)
class _Saved:
    """A tensor that is in host memory."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    buffer: _Buffer
    home: Any
    here: tuple[Tensor, Any] | None = None


class ActivationStream:
    """Sends what autograd saves inside `saving()` to host memory, and brings it back one ahead of its use.

    Attributes:
        sent: tensors sent so far.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self.sent = lanes, 0
        self._free: dict[int, list[_Buffer]] = {}
        self._leaving: deque[tuple[Any, Tensor]] = deque()
        self._saved: list[weakref.ref[_Saved]] = []
        self._ahead: tuple[Tensor, Any] | None = None  # what has been brought and not been used yet

    def saving(self, only: Sequence[Any] | None = None) -> contextlib.AbstractContextManager[Any]:
        """Context of the forward whose saved tensors leave; small ones and integers stay. only: what may leave, where
        weights are saved as well."""
        if only is None:
            return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        places = {value.data_ptr() for value in only if isinstance(value, Tensor)}
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: self._pack(tensor) if tensor.data_ptr() in places else tensor, self._unpack
        )

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that no tensor is in at the moment."""
        return sum(buffer.memory.nbytes for free in self._free.values() for buffer in free)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        if not tensor.is_floating_point() or tensor.nbytes < max(_SMALL, 1) or not tensor.is_contiguous():
            return tensor
        free = self._free.get(tensor.nbytes)
        buffer = free.pop() if free else _Buffer(self.lanes.host(tensor.nbytes))
        host = buffer.memory.view(tensor.dtype).view(tensor.shape)
        source = tensor.detach()
        after = [m for m in (self.lanes.mark(), buffer.read) if m is not None]
        home = self.lanes.copy("out", [(host, source)], after)
        self.sent += 1
        self._leaving.append((home, source))
        while self._leaving and (len(self._leaving) > _LEAVING or self.lanes.reached(self._leaving[0][0])):
            # The memory goes back to the computation, which must not write it before the copy has read it.
            self.lanes.wait(self._leaving.popleft()[0])
        saved = _Saved(tensor.shape, tensor.dtype, tensor.device, buffer, home)
        self._saved = [ref for ref in self._saved if ref() is not None]
        self._saved.append(weakref.ref(saved))
        weakref.finalize(saved, self._free.setdefault(tensor.nbytes, []).append, buffer)
        return saved

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        tensor, here = saved.here or self._fetch(saved)
        saved.here = None
        self.lanes.wait(here)
        if self._ahead is not None:
            # Used now; or left over from a backward that ended early, when its memory is given back after the copy.
            self.lanes.wait(self._ahead[1])
            self._ahead = None
        waiting = [s for ref in self._saved if (s := ref()) is not None]
        place = waiting.index(saved)
        if place and waiting[place - 1].here is None:
            self._ahead = waiting[place - 1].here = self._fetch(waiting[place - 1])
        self._leaving = deque((mark, t) for mark, t in self._leaving if mark is not saved.home)
        return tensor

    def _fetch(self, saved: _Saved) -> tuple[Tensor, Any]:
        tensor = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
        host = saved.buffer.memory.view(saved.dtype).view(saved.shape)
        # The memory is the computation's: what it has been given so far may still read it.
        after = [m for m in (self.lanes.mark(), saved.home) if m is not None]
        saved.buffer.read = self.lanes.copy("in", [(tensor, host)], after)
        return tensor, saved.buffer.read
