"""Copies between device and host beside the computation: streams and events of CUDA, and the same order on a CPU.

The computation has one stream, the current one. Copies out and copies back have one each. A copy begins after what the
computation had queued when the batch was begun; what it writes may be used once its event has been waited for. On a
CPU nothing runs beside anything, so copies are put off until someone waits for them or asks whether they are done:
code that forgets to wait reads stale values there too.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor

__all__ = ["BACK", "OUT", "Copies", "CudaCopies", "DeferredCopies", "copies_for"]

OUT, BACK = "out", "back"


class Copies:
    """What both kinds have in common; see the module for the order that they promise."""

    def __init__(self) -> None:
        self._stalls: list[tuple[Any, Any]] = []
        self._stalled = 0.0

    def pinned(self, nbytes: int) -> Tensor:
        """uint8 host memory that the device copies from and to by itself.

        Raises:
            RuntimeError: the host has none to spare.
        """
        raise NotImplementedError

    def pageable(self, like: Tensor) -> Tensor:
        """Ordinary host memory of a tensor's shape, strides and dtype."""
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")

    def empty(self, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Device memory for a copy back; allocated for the computation's stream."""
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    def begin(self, way: str) -> None:
        """What follows on this way runs after the computation's work so far."""
        raise NotImplementedError

    def copy(self, way: str, target: Tensor, source: Tensor) -> None:
        """Queue a copy between contiguous tensors of one length and dtype."""
        raise NotImplementedError

    def after(self, way: str, event: Any) -> None:
        """What follows on this way runs after `event`."""
        raise NotImplementedError

    def mark(self, way: str) -> Any:
        """An event (`done()`, `synchronize()`) behind what was queued on this way."""
        raise NotImplementedError

    def hold(self, way: str, tensor: Tensor) -> None:
        """The device tensor is about to be let go: its memory is not used again before this way's copies are done."""
        raise NotImplementedError

    def let_go(self, tensor: Tensor) -> None:
        """Nobody refers to the device tensor any more; for tests, which write into it what must not be read."""

    def wait(self, event: Any) -> None:
        """What the computation does from now on runs after `event`; the time that it stands still for is noted."""
        raise NotImplementedError

    def stalled(self) -> float:
        """Seconds that the computation has stood still in `wait`, of all waits that are over by now."""
        raise NotImplementedError


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        return self.event.query()

    def synchronize(self) -> None:
        self.event.synchronize()


class CudaCopies(Copies):
    """Copies on two side streams of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._streams = {way: torch.cuda.Stream(device) for way in (OUT, BACK)}

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def begin(self, way: str) -> None:
        self._streams[way].wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, way: str, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._streams[way]):
            target.copy_(source, non_blocking=True)

    def after(self, way: str, event: _CudaEvent) -> None:
        self._streams[way].wait_event(event.event)

    def mark(self, way: str) -> _CudaEvent:
        return _CudaEvent(self._streams[way].record_event())

    def hold(self, way: str, tensor: Tensor) -> None:
        if tensor.is_cuda:
            tensor.record_stream(self._streams[way])

    def wait(self, event: _CudaEvent) -> None:
        current = torch.cuda.current_stream(self.device)
        if event.done():
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(current)
        current.wait_event(event.event)
        after.record(current)
        self._stalls.append((before, after))

    def stalled(self) -> float:
        open_ones = []
        for before, after in self._stalls:
            if after.query():
                self._stalled += before.elapsed_time(after) / 1e3
            else:
                open_ones.append((before, after))
        self._stalls = open_ones
        return self._stalled


class _Put:
    """An event of `DeferredCopies`: the number of operations on its way that were queued before it."""

    def __init__(self, copies: DeferredCopies, way: str, number: int) -> None:
        self._copies, self._way, self._number = copies, way, number

    @property
    def over(self) -> bool:
        """Whether it is done, without doing anything for it."""
        return self._copies.ran[self._way] >= self._number

    def done(self) -> bool:
        return self._copies.asked(self)

    def synchronize(self) -> None:
        self._copies.run(self._way, self._number)


class DeferredCopies(Copies):
    """Copies of a CPU, done as late as the promise allows.

    Attributes:
        ran: operations done on each way so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._queues: dict[str, list[Any]] = {OUT: [], BACK: []}
        self.ran = {OUT: 0, BACK: 0}

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def begin(self, way: str) -> None:
        """The computation is never behind on a CPU."""

    def copy(self, way: str, target: Tensor, source: Tensor) -> None:
        self._queues[way].append(functools.partial(target.copy_, source))

    def after(self, way: str, event: _Put) -> None:
        self._queues[way].append(event.synchronize)

    def mark(self, way: str) -> _Put:
        return _Put(self, way, self.ran[way] + len(self._queues[way]))

    def hold(self, way: str, tensor: Tensor) -> None:
        """The queued copy refers to the tensor, which keeps it alive."""

    def wait(self, event: _Put) -> None:
        start = time.perf_counter()
        event.synchronize()
        self._stalled += time.perf_counter() - start

    def stalled(self) -> float:
        return self._stalled

    def asked(self, event: _Put) -> bool:
        """Whether the event is done: someone who asks again and again must see progress."""
        event.synchronize()
        return True

    def run(self, way: str, until: int) -> None:
        """Do what is queued on a way, up to its `until`-th operation."""
        queue = self._queues[way]
        while self.ran[way] < until:
            queue.pop(0)()
            self.ran[way] += 1

    @property
    def pending(self) -> dict[str, int]:
        """Operations queued on each way."""
        return {way: len(queue) for way, queue in self._queues.items()}


def copies_for(device: torch.device) -> Copies:
    """The copies of a device: CUDA's, or those of a CPU.

    Raises:
        RuntimeError: another kind of device.
    """
    if device.type == "cuda":
        return CudaCopies(device)
    if device.type == "cpu":
        return DeferredCopies()
    raise RuntimeError(f"optimizer state moves between a CUDA device or a CPU and the host, not on {device}")
