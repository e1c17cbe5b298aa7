"""Faults for transitions: memory that runs out at the n-th allocation, copies in the worst order that is allowed."""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxresu.lanes import CudaLanes, HostLanes, Lane, Pairs
from fxresu.pinned_pool import PinnedPool
from fxresu.state_owners import flat


class FailAt(TorchDispatchMode):
    """The n-th allocation of a tensor runs out of memory; 0 only counts.

    Args:
        caching: as CUDA's allocator: memory that was freed inside serves later allocations, which then cannot fail.
    """

    def __init__(self, number: int = 0, caching: bool = False) -> None:
        super().__init__()
        self.number, self.caching, self.seen, self._cached = number, caching, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fresh = [r for r in func._schema.returns if "Tensor" in str(r.type) and r.alias_info is None]
        if not fresh:
            return func(*args, **(kwargs or {}))
        if not self.caching:
            self._count(func)
        result = func(*args, **(kwargs or {}))
        if self.caching:
            tensors = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)]
            need = sum(t.untyped_storage().nbytes() for t in tensors)
            if need > self._cached:
                self._count(func)
            else:
                self._cached -= need
            for tensor in tensors:
                storage = tensor.untyped_storage()
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, nbytes: int) -> None:
        self._cached += nbytes

    def _count(self, func: Any) -> None:
        self.seen += 1
        if self.seen == self.number:
            raise torch.OutOfMemoryError(f"injected: out of memory in {func}")


class Hostile(HostLanes):
    """Copies that run at any time the order allows, buffers full of NaN before they are written and after they are let
    go, and answers to `reached` that are as late as may be."""

    def __init__(self, seed: int) -> None:
        super().__init__(lambda: 0)
        self.random = random.Random(seed)
        self.poisoned = 0
        self._held: dict[int, Lane] = {}

    @property
    def queued(self) -> list[Any]:
        return [copy for queue in self._queues.values() for copy in queue]

    def _some(self) -> None:
        lanes: list[Lane] = ["in", "out"]
        for lane in self.random.sample(lanes, 2):
            if self.random.random() < 0.4:
                self.run(lane, self.random.randint(0, self.pending[lane]))

    def host(self, size: int, pooled: bool = False) -> Tensor:
        return super().host(size, pooled).fill_(255)

    def empty(self, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        fresh = super().empty(shape, stride, dtype, device)
        self.poisoned += 1
        flat(fresh).fill_(255)
        return fresh

    def copy(self, lane: Lane, pairs: Pairs, after: Sequence[Any] = ()) -> Any:
        assert self.mark() in after, "the lane would overtake the computation"
        self._some()
        return super().copy(lane, pairs, after)

    def hold(self, lane: Lane, tensor: Tensor) -> None:
        self._held[tensor.data_ptr()] = lane

    def let_go(self, tensor: Tensor) -> None:
        lane = self._held.pop(tensor.data_ptr(), None)
        self.poisoned += 1
        if lane is None:
            under_way = {t.untyped_storage().data_ptr() for c in self.queued for pair in c.pairs for t in pair}
            assert tensor.untyped_storage().data_ptr() not in under_way, "the allocator does not know of this copy"
            flat(tensor).fill_(255)
        else:  # the allocator hands it out again when this lane has come so far
            super().copy(lane, [(flat(tensor), torch.tensor(255, dtype=torch.uint8))])
        self._some()

    def reached(self, mark: Any) -> bool:
        self._some()
        return super().reached(mark)


def poison(lanes: HostLanes, slot: Any) -> None:
    """Fill a vacant slot of a stream with NaN as soon as it may be written, and no sooner; the lane does it before the
    next copy into the slot."""
    lanes.copy("in", [(slot.memory, torch.tensor(255, dtype=torch.uint8))], [slot.free])


class HostileCuda(CudaLanes):
    """Real streams: memory is full of NaN before it is written, what is let go is handed out and overwritten at once,
    and the computation has work queued so that copies which do not wait for it would overtake it."""

    def __init__(self, device: torch.device, seed: int) -> None:
        super().__init__(device)
        self.random, self.poisoned = random.Random(seed), 0
        self._square = torch.randn(1024, 1024, device=device)

    def host(self, size: int, pooled: bool = False) -> Tensor:
        return super().host(size, pooled).fill_(255)

    def empty(self, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        for _ in range(self.random.randint(0, 3)):
            self._square @ self._square
        fresh = super().empty(shape, stride, dtype, device)
        flat(fresh).fill_(255)
        return fresh

    def let_go(self, tensor: Tensor) -> None:
        self.poisoned += 1
        for _ in range(4):  # the allocator gives the same block again if it thinks that nobody needs it
            torch.full((tensor.numel() * tensor.element_size(),), 255, dtype=torch.uint8, device=tensor.device)


class PoisonedPool(PinnedPool):
    """Pieces that are free hold NaN."""

    def _free_spans(self, spans: list[tuple[int, int, int]]) -> None:
        for chunk, start, stop in spans:
            self.chunks[chunk][start:stop] = 255
        super()._free_spans(spans)
