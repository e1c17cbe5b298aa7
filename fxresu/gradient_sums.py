"""Gradients of micro-batches summed up in host memory, for models whose gradients never fit the device.

A sum is in the gradient's own dtype, as torch's `.grad` would be. Bytes over the bus, for a weight in bfloat16: 2 out
in the first micro-batch of a step, 2 in and 2 out in each further one, 2 in in the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lanes import Lanes
from .moment_stream import MomentStream, Parcel, Piece

__all__ = ["GradientSums"]


class GradientSums:
    """Sums by parameter; the device holds a few parcels of them.

    Args:
        lanes: of the device.
        slots: parcels that the device holds.
        entries: of a parcel.
    """

    def __init__(self, lanes: Lanes, slots: int, entries: int) -> None:
        self.lanes, self.slots, self.entries = lanes, slots, entries
        self.pending: dict[int, Tensor] = {}  # parameters that have a sum
        self._pieces: dict[int, list[Piece]] = {}
        self._stream: MomentStream | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes of the slots."""
        return 0 if self._stream is None else self._stream.device_bytes

    def add(self, parameter: Tensor) -> None:
        """Add the parameter's gradient to its sum, and free it."""
        grad = parameter.grad
        assert grad is not None
        flat, first = grad.contiguous().view(-1), id(parameter) not in self.pending
        for piece in self._pieces_of(parameter, grad):
            assert self._stream is not None
            part = flat[piece.start : piece.stop]
            (kept,) = self._stream.take(piece.parcel, blank=first)
            kept.copy_(part) if first else kept.add_(part)
            self._stream.give_back(piece.parcel)
        self.pending[id(parameter)] = parameter
        parameter.grad = None

    def fold(self, parameter: Tensor) -> None:
        """Add the sum to the parameter's gradient; the sum is used up then."""
        if self.pending.pop(id(parameter), None) is None:
            return
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad = parameter.grad.contiguous()
        for piece in self._pieces_of(parameter, grad):
            assert self._stream is not None
            (kept,) = self._stream.take(piece.parcel)
            grad.view(-1)[piece.start : piece.stop].add_(kept)
            self._stream.let_go(piece.parcel)

    def end_pass(self, more: bool) -> None:
        """A backward pass is over; `more`: the sums are needed again, in the same order."""
        if self._stream is not None:
            self._stream.end_step(ahead=more)

    def clear(self) -> None:
        """Forget all sums."""
        self.pending.clear()
        if self._stream is not None:
            self._stream.settle()

    def _pieces_of(self, parameter: Tensor, grad: Tensor) -> list[Piece]:
        if id(parameter) not in self._pieces:
            size = grad.element_size()
            host = self.lanes.host(grad.nbytes).view(grad.dtype)
            cuts = range(0, grad.numel(), self.entries)
            ends = [min(start + self.entries, grad.numel()) for start in cuts]
            self._pieces[id(parameter)] = [Piece(Parcel((host[a:b],)), a, b) for a, b in zip(cuts, ends, strict=True)]
            if self._stream is None:
                self._stream = MomentStream(self.lanes, grad.device, self.slots, self.entries * max(size, 4))
        return self._pieces[id(parameter)]
