"""Copies beside the computation: two lanes, one to the device and one from it, and marks to order them by.

Whoever moves tensors between device and host uses this: the optimizer-state manager, and streamed training. (Transfers
inside compiled graphs are operators, in `kernels/host_copies.py`.) What every kind of lanes promises:

- A lane does its copies in the order in which they were given. A copy starts when all marks that it was given in
  `after` are reached, and not before; without any it may overtake the computation. `copy` returns at once with a mark
  behind its last pair.
- `mark()` is behind everything that the computation (the current stream) has been given so far. None is a mark that has
  been reached.
- `wait` holds up the computation and not the caller; what the computation is given afterwards runs after the mark.
  `finish` holds up the caller. `reached` never waits.
- The time for which the computation stood still in `wait` is measured on the device and summed in `stalled`.
- Memory of `host` is pinned, so that copies reach it without a stop on the way, and belongs to whoever asked until
  nobody refers to it or the lanes any more; it is not unpinned or unmapped while a copy of these lanes is under way.
- Host memory must not be used again, by the host or by a copy on the other lane, before the mark of its last copy.
  `PinnedPool` sees to it for the pieces that it gives out, others pass that mark in `after`.
- Device memory that a copy reads or writes goes back to the computation's allocator in one of two ways: after `wait`
  for the copy's mark, or after `hold`, when the allocator keeps it until the lane has come so far.

`CudaLanes` are streams and events. `HostLanes` are the same for a model on the CPU: every copy really waits until
somebody waits for it or asks whether it is done, so that an order which is wrong reads wrong bytes there as well.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import FxresuError, HostMemoryError
from .pinned_memory import PinnedMemory

__all__ = ["CudaLanes", "HostLanes", "Lane", "Lanes", "Pairs", "aligned", "lanes_for"]

Lane = Literal["in", "out"]
Pairs = Sequence[tuple[Tensor, Tensor]]
_OPEN = 64  # waits whose time is not known yet, from which on their events are looked at


def aligned(size: int) -> int:
    """Bytes that a tensor takes in memory that several share: the next one starts at a multiple of 256."""
    return (size + 255) // 256 * 256


class Lanes:
    """The lanes of a device; see the module for what they promise. A mark is opaque."""

    # Memory

    def host(self, size: int, pooled: bool = False) -> Tensor:
        """uint8 [size] in pinned host memory: zeros; or, for a pool that gives pieces of it out and does not mind what
        they hold, memory that is quick to come by.

        Raises:
            HostMemoryError: the host has none to spare.
        """
        raise NotImplementedError

    def pageable(self, like: Tensor) -> Tensor:
        """Ordinary host memory of a tensor's shape, strides and dtype.

        Raises:
            HostMemoryError: the host has none to spare.
        """
        try:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")
        except RuntimeError as error:
            raise HostMemoryError(f"{like.nbytes} bytes of host memory: {error}") from error

    def empty(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Device memory for a copy in; the computation's, so that the copy has to come after a `mark()`."""
        return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)

    def hold(self, lane: Lane, tensor: Tensor) -> None:
        """The device tensor is about to be let go: its memory is not used again before this lane's copies are done."""
        raise NotImplementedError

    def let_go(self, tensor: Tensor) -> None:
        """Nobody refers to the device tensor any more; for tests, which write into it what must not be read."""

    # Order

    def copy(self, lane: Lane, pairs: Pairs, after: Sequence[Any] = ()) -> Any:
        """Copy (target, source) pairs on a lane, after these marks; returns the mark of the last."""
        raise NotImplementedError

    def copies(self, lane: Lane, each: Sequence[tuple[Pairs, Sequence[Any]]]) -> list[Any]:
        """`copy` of several (pairs, after) in this order, for less of the host's time; returns the mark of each."""
        return [self.copy(lane, pairs, after) for pairs, after in each]

    def mark(self) -> Any:
        """What the computation has been given so far."""
        raise NotImplementedError

    def wait(self, mark: Any) -> None:
        """Let the computation go on after the mark only; the time that it stands still for is noted."""
        raise NotImplementedError

    def finish(self, mark: Any) -> None:
        """Let the caller go on after the mark only."""
        raise NotImplementedError

    def reached(self, mark: Any) -> bool:
        """Whether the mark has been reached, without waiting."""
        raise NotImplementedError

    def stalled(self) -> float:
        """Seconds that the computation has stood still in `wait`, of all waits that are over by now."""
        raise NotImplementedError


def lanes_for(device: torch.device) -> Lanes:
    """Lanes of a device; FxresuError for one that has none."""
    if device.type == "cuda":
        return CudaLanes(device)
    if device.type == "cpu":
        return HostLanes()
    raise FxresuError(f"device={device}: copies beside the computation need a CUDA device or a CPU")


class CudaLanes(Lanes):
    """Streams and events of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        streams: dict[Lane, torch.cuda.Stream] = {"in": torch.cuda.Stream(device), "out": torch.cuda.Stream(device)}
        self._streams = streams
        self._memory = PinnedMemory(device, list(streams.values()))
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stalled = 0.0

    def host(self, size: int, pooled: bool = False) -> Tensor:
        return self._memory.take(size, pooled)

    def hold(self, lane: Lane, tensor: Tensor) -> None:
        if tensor.is_cuda:
            tensor.record_stream(self._streams[lane])

    def copy(self, lane: Lane, pairs: Pairs, after: Sequence[Any] = ()) -> Any:
        return self.copies(lane, [(pairs, after)])[0]

    def copies(self, lane: Lane, each: Sequence[tuple[Pairs, Sequence[Any]]]) -> list[Any]:
        stream, marks = self._streams[lane], []
        with torch.no_grad(), torch.cuda.stream(stream):  # to enter it costs the host more than a copy does
            for pairs, after in each:
                for mark in after:
                    if mark is not None:
                        stream.wait_event(mark)
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
                marks.append(stream.record_event())
        return marks

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Any) -> None:
        if self.reached(mark):
            return
        current = torch.cuda.current_stream(self.device)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(current)
        current.wait_event(mark)
        after.record(current)
        self._waits.append((before, after))
        if len(self._waits) > _OPEN:
            self.stalled()

    def finish(self, mark: Any) -> None:
        if mark is not None:
            mark.synchronize()

    def reached(self, mark: Any) -> bool:
        return mark is None or mark.query()

    def stalled(self) -> float:
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._stalled += before.elapsed_time(after) / 1e3
        return self._stalled


@dataclasses.dataclass(eq=False)
class _Copy:
    lane: Lane
    pairs: list[tuple[Tensor, Tensor]]
    after: list[Any]
    done: bool = False


class HostLanes(Lanes):
    """Copies on the CPU that are put off until a mark is waited for, or somebody asks whether it is reached.

    Args:
        eager: asked after every copy that is given, and whenever somebody asks whether a mark is reached, how many of
            that lane's copies to work off; `lambda: 0` is as late as may be. None puts all of them off until somebody
            waits or asks, and who asks finds them done: whoever asks again and again must see progress.
    """

    def __init__(self, eager: Callable[[], int] | None = None) -> None:
        self._eager = eager
        self._queues: dict[Lane, deque[_Copy]] = {"in": deque(), "out": deque()}
        self._stalled = 0.0

    def host(self, size: int, pooled: bool = False) -> Tensor:
        try:
            return torch.zeros(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise HostMemoryError(f"{size} bytes of host memory: {error}") from error

    def hold(self, lane: Lane, tensor: Tensor) -> None:
        """The queued copy refers to the tensor, which keeps it alive."""

    def copy(self, lane: Lane, pairs: Pairs, after: Sequence[Any] = ()) -> _Copy:
        copy = _Copy(lane, list(pairs), list(after))
        self._queues[lane].append(copy)
        if self._eager is not None:
            self.run(lane, self._eager())
        return copy

    def mark(self) -> None:
        """Computation on the CPU is done when it returns."""
        return None

    def wait(self, mark: _Copy | None) -> None:
        start = time.perf_counter()
        self.finish(mark)
        self._stalled += time.perf_counter() - start

    def finish(self, mark: _Copy | None) -> None:
        """Run a copy, those before it on its lane, and those that they wait for."""
        while mark is not None and not mark.done:
            head = self._queues[mark.lane][0]
            for earlier in head.after:
                self.finish(earlier)
            with torch.no_grad():
                for target, source in head.pairs:
                    target.copy_(source)
            head.done, head.pairs, head.after = True, [], []
            self._queues[mark.lane].popleft()

    def reached(self, mark: _Copy | None) -> bool:
        if mark is None or mark.done:
            return True
        if self._eager is None:
            self.finish(mark)
        else:
            self.run(mark.lane, self._eager())
        return mark.done

    def stalled(self) -> float:
        return self._stalled

    def run(self, lane: Lane, count: int) -> None:
        """Work off the next copies of a lane, `count` or as many as there are."""
        for _ in range(min(count, len(self._queues[lane]))):
            self.finish(self._queues[lane][0])

    @property
    def pending(self) -> dict[Lane, int]:
        """Copies queued on each lane."""
        return {lane: len(queue) for lane, queue in self._queues.items()}
