"""Copies beside the computation: two lanes, one to the device and one from it, and marks to order them by.

A lane works off its copies in the order in which they were given; a copy starts when the marks that it was given are
reached. `CudaLanes` are streams and events. `HostLanes` are the same for a model on the CPU: every copy really waits
until somebody needs it, so that an order which is wrong reads wrong bytes there as well.
"""

from __future__ import annotations

import dataclasses
import mmap
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .errors import FxresuError

__all__ = ["CudaLanes", "HostLanes", "HostMemoryError", "Lane", "Lanes", "lanes_for"]

Lane = Literal["in", "out"]


class HostMemoryError(FxresuError, MemoryError):
    """Host memory, or host memory that can be pinned, did not suffice."""


class Lanes(Protocol):
    """What streaming needs of a device. A mark is opaque: a point on a lane or in the computation."""

    def host(self, size: int) -> Tensor:
        """Zeros, uint8 [size], in host memory that copies can reach without a stop on the way; HostMemoryError if there
        is none."""

    def copy(self, lane: Lane, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Any] = ()) -> Any:
        """Copy (target, source) pairs on a lane, after these marks; returns the mark of the last."""

    def mark(self) -> Any:
        """What the computation has been given so far."""

    def wait(self, mark: Any) -> None:
        """Let the computation go on after the mark only."""

    def finish(self, mark: Any) -> None:
        """Let the caller go on after the mark only."""

    def reached(self, mark: Any) -> bool:
        """Whether the mark has been reached, without waiting."""


def lanes_for(device: torch.device) -> Lanes:
    """Lanes of a device; FxresuError for one that has none."""
    if device.type == "cuda":
        return CudaLanes(device)
    if device.type == "cpu":
        return HostLanes()
    raise FxresuError(f"device={device}: streaming knows cuda and cpu")


class CudaLanes:
    """Streams and events of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {lane: torch.cuda.Stream(device) for lane in ("in", "out")}
        self._registered: list[Tensor] = []
        weakref.finalize(self, _unregister, self._registered).atexit = False

    def host(self, size: int) -> Tensor:
        # Registered and not allocated as pinned: torch's pinned allocator rounds up to powers of two. Mapped, because
        # registered ranges must not share a page.
        try:
            buffer = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)
        except (OSError, ValueError) as error:
            raise HostMemoryError(f"{size} bytes of host memory for streamed state: {error}") from None
        code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
        if code:
            raise HostMemoryError(
                f"{size} bytes of host memory could not be pinned (CUDA error {code}); stream less of the state"
                " (moments='8bit', a larger device_bytes), or raise the limit on locked memory (ulimit -l)"
            )
        self._registered.append(buffer)  # kept alive: memory must not be freed while it is registered
        return buffer

    def copy(self, lane: Lane, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Any] = ()) -> Any:
        stream = self._streams[lane]
        for mark in after:
            stream.wait_event(mark)
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self, mark: Any) -> None:
        mark.synchronize()

    def reached(self, mark: Any) -> bool:
        return mark.query()


def _unregister(buffers: list[Tensor]) -> None:
    torch.cuda.synchronize()  # a copy may still be on its way
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


@dataclasses.dataclass(eq=False)
class _Copy:
    lane: Lane
    pairs: list[tuple[Tensor, Tensor]]
    after: list[Any]
    done: bool = False


class HostLanes:
    """Copies on the CPU that are put off until a mark is waited for.

    Args:
        eager: asked after every copy that is given, how many of that lane's copies to work off at once; None puts all
            of them off.
    """

    def __init__(self, eager: Callable[[], int] | None = None) -> None:
        self._eager = eager
        self._queues: dict[Lane, deque[_Copy]] = {"in": deque(), "out": deque()}

    def host(self, size: int) -> Tensor:
        try:
            return torch.zeros(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise HostMemoryError(f"{size} bytes of host memory for streamed state: {error}") from None

    def copy(self, lane: Lane, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Any] = ()) -> _Copy:
        copy = _Copy(lane, list(pairs), list(after))
        queue = self._queues[lane]
        queue.append(copy)
        for _ in range(self._eager() if self._eager is not None else 0):
            if queue:
                self._work_off(queue[0])
        return copy

    def _work_off(self, copy: _Copy) -> None:
        """Run a copy, those before it on its lane, and those that they wait for."""
        queue = self._queues[copy.lane]
        while not copy.done:
            head = queue[0]
            for mark in head.after:
                self.finish(mark)
            with torch.no_grad():
                for target, source in head.pairs:
                    target.copy_(source)
            head.done, head.pairs, head.after = True, [], []
            queue.popleft()

    def mark(self) -> None:
        """Computation on the CPU is done when it returns."""
        return None

    def wait(self, mark: _Copy | None) -> None:
        self.finish(mark)

    def finish(self, mark: _Copy | None) -> None:
        if mark is not None:
            self._work_off(mark)

    def reached(self, mark: _Copy | None) -> bool:
        return mark is None or mark.done
