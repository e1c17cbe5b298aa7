"""torch's CUDA caching allocator with expandable segments, on numbers alone: where tensors would lie, and how many
bytes of the device are mapped for them.

Follows `DeviceCachingAllocator` in c10/cuda/CUDACachingAllocator.cpp of torch 2.11 for one stream, with
`expandable_segments:True` and its other settings at their defaults. Memory never runs out here, so that nothing is
given back but by `empty_cache`.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, insort

GRAIN = 512
"""Sizes are rounded up to this many bytes (`kMinBlockSize`)."""
SMALL = 1 << 20
"""Requests of more than this come from the large pool (`kSmallSize`)."""
SMALL_PAGE, LARGE_PAGE = 2 << 20, 20 << 20
"""What the pools map at a time (`kSmallBuffer`, `kLargeBuffer`)."""

# Address space of a segment. torch reserves 9/8 of the device's memory, which here has no end.
_SPACE = 1 << 60


@dataclasses.dataclass(eq=False)
class Block:
    """A stretch of a segment: a tensor's, free, or without memory behind it.

    Attributes:
        start, size: bytes.
        mapped: there is memory behind it.
        taken: a tensor has it.
        before, after: its neighbours in the segment.
    """

    start: int
    size: int
    mapped: bool = True
    taken: bool = False
    before: Block | None = None
    after: Block | None = None

    @property
    def reach(self) -> int:
        """Its size with the unmapped neighbour that it could grow into."""
        return self.size + (self.after.size if self.after is not None and not self.after.mapped else 0)


class Pool:
    """One expandable segment with its free and its unmapped blocks.

    Args:
        page: bytes that are mapped at a time.

    Attributes:
        mapped: bytes with memory behind them.
    """

    def __init__(self, page: int) -> None:
        self.page, self.mapped = page, 0
        self.first = Block(0, _SPACE, mapped=False)
        self._free: list[tuple[int, int]] = []  # (size, start), which is the order of best fit
        self._unmapped = [0]
        self._at = {0: self.first}  # free and unmapped blocks by their start

    def allocate(self, size: int) -> Block:
        """A block of exactly `size` bytes, a multiple of `GRAIN`."""
        block = self._best_fit(size) or self._grown(size)
        self._forget(block)
        if block.size > size:
            rest = self._split(block, size)
            self._keep(rest)
        block.taken = True
        return block

    def free(self, block: Block) -> None:
        """The block's tensor is gone."""
        block.taken = False
        self._keep(self._merged(block))

    def empty_cache(self) -> None:
        """Give back whole pages in which there is nothing."""
        for _, start in list(self._free):
            block = self._at[start]
            begin = -(-block.start // self.page) * self.page
            end = (block.start + block.size) // self.page * self.page
            if begin >= end:
                continue
            self._forget(block)
            if begin > block.start:
                whole, block = block, self._split(block, begin - block.start)
                self._keep(whole)
            if end < block.start + block.size:
                self._keep(self._split(block, end - block.start))
            block.mapped = False
            self.mapped -= block.size
            self._keep(self._merged(block))

    def _best_fit(self, size: int) -> Block | None:
        """The smallest that is large enough; one that could grow counts with what it could grow to."""
        at = bisect_left(self._free, (size, 0))
        if at == len(self._free):
            return None
        found = self._at[self._free[at][1]]
        for _, start in self._free[at + 1 :]:
            other = self._at[start]
            if other.reach >= found.reach:
                break
            found = other
        return found

    def _grown(self, size: int) -> Block:
        """A free block that was enlarged, or made, by mapping the first unmapped addresses that have room."""
        block = next(b for b in map(self._with_room, self._unmapped, [size] * len(self._unmapped)) if b is not None)
        if not block.mapped:
            block = self._map(block, size)
        while block.size < size:
            assert block.after is not None
            block = self._map(block.after, size - block.size)
        return block

    def _with_room(self, start: int, size: int) -> Block | None:
        block = self._at[start]
        if block.before is not None and not block.before.taken:
            block = block.before
        room, end = 0, block
        while end is not None and not end.taken and room < size:
            room += end.size
            end = end.after  # type: ignore[assignment]
        return block if room >= size else None

    def _map(self, block: Block, size: int) -> Block:
        """The first `size` bytes of an unmapped block, in whole pages, with the free blocks beside it."""
        self._forget(block)
        size = min(-(-size // self.page) * self.page, block.size)
        if size < block.size:
            self._keep(self._split(block, size))
        block.mapped = True
        self.mapped += size
        block = self._merged(block)
        self._keep(block)
        return block

    def _split(self, block: Block, size: int) -> Block:
        """What is left of a block behind its first `size` bytes."""
        rest = Block(block.start + size, block.size - size, block.mapped, False, block, block.after)
        if rest.after is not None:
            rest.after.before = rest
        block.size, block.after = size, rest
        return rest

    def _merged(self, block: Block) -> Block:
        """The block with the neighbours of its kind, which are no blocks of their own any more."""
        before = block.before
        if before is not None and not before.taken and before.mapped == block.mapped:
            self._forget(before)
            block = _joined(before, block)
        after = block.after
        if after is not None and not after.taken and after.mapped == block.mapped:
            self._forget(after)
            block = _joined(block, after)
        return block

    def _keep(self, block: Block) -> None:
        self._at[block.start] = block
        if block.mapped:
            insort(self._free, (block.size, block.start))
        else:
            insort(self._unmapped, block.start)

    def _forget(self, block: Block) -> None:
        del self._at[block.start]
        if block.mapped:
            del self._free[bisect_left(self._free, (block.size, block.start))]
        else:
            del self._unmapped[bisect_left(self._unmapped, block.start)]


def _joined(block: Block, after: Block) -> Block:
    block.size, block.after = block.size + after.size, after.after
    if block.after is not None:
        block.after.before = block
    return block


class CachingAllocator:
    """Both pools of a device.

    Attributes:
        live: bytes of tensors, each rounded up to `GRAIN`.
        peak_live, peak_reserved: the highest since the start or `reset_peaks`, as torch.cuda.max_memory_allocated and
            max_memory_reserved tell them.
    """

    def __init__(self) -> None:
        self.small, self.large = Pool(SMALL_PAGE), Pool(LARGE_PAGE)
        self.live = self.peak_live = self.peak_reserved = 0

    @property
    def reserved(self) -> int:
        """Bytes mapped on the device."""
        return self.small.mapped + self.large.mapped

    def allocate(self, size: int) -> Block:
        """Room for a storage of `size` bytes, at least 1."""
        size = -(-size // GRAIN) * GRAIN
        block = self._pool(size).allocate(size)
        self.live += size
        self.peak_live, self.peak_reserved = max(self.peak_live, self.live), max(self.peak_reserved, self.reserved)
        return block

    def free(self, block: Block) -> None:
        """The storage that has this block is gone."""
        self.live -= block.size
        self._pool(block.size).free(block)

    def empty_cache(self) -> None:
        """As torch.cuda.empty_cache."""
        self.large.empty_cache()
        self.small.empty_cache()

    def reset_peaks(self) -> None:
        """As torch.cuda.reset_peak_memory_stats."""
        self.peak_live, self.peak_reserved = self.live, self.reserved

    def _pool(self, size: int) -> Pool:
        return self.small if size <= SMALL else self.large
