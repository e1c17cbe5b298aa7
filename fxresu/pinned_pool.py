"""A bounded pool of pinned host memory in chunks, from which tensors of any size take pieces."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from .errors import HostMemoryError
from .lanes import Lanes

__all__ = ["Extents", "PinnedPool"]

CHUNK = 64 << 20  # a power of two: such memory comes back from torch's allocator, for the next pool
_LEAST = 1 << 16
_ALIGN = 512


class Extents:
    """Pieces of the pool that together hold some bytes; they go back when nobody refers to this any more.

    Attributes:
        pieces: uint8 views of pinned memory, in order.
        busy: mark of the last copy that reads or writes them; they are not given out again before it is reached.
    """

    def __init__(self, pool: PinnedPool, spans: list[tuple[int, int, int]], nbytes: int) -> None:
        self._pool, self._spans, self.nbytes = pool, spans, nbytes
        self.busy: Any = None

    @property
    def pieces(self) -> list[Tensor]:
        found, left = [], self.nbytes
        for chunk, start, stop in self._spans:
            size = min(stop - start, left)
            found.append(self._pool.chunks[chunk][start : start + size])
            left -= size
        return found

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        # No more than that: this may run in the middle of anything, a CUDA graph's recording or another copy included.
        self._pool._leaving.append((self._spans, self.busy))


class PinnedPool:
    """Chunks of pinned memory, kept for the next phase: locking pages is slow.

    Args:
        lanes: whose copies read and write the memory, and which get it from the host.
        limit: bytes that all chunks together may have; None leaves it to the host.
        chunk: bytes of a chunk; the first ones are smaller and double.
    """

    def __init__(self, lanes: Lanes, limit: int | None = None, chunk: int = CHUNK) -> None:
        self.lanes, self.limit, self.chunk = lanes, limit, chunk
        self.chunks: list[Tensor] = []
        self._free: list[tuple[int, int, int]] = []
        self._leaving: list[tuple[list[tuple[int, int, int]], Any]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks, in use or not."""
        return sum(c.numel() for c in self.chunks)

    @property
    def used(self) -> int:
        """Bytes that are given out, or still in a copy."""
        self._reclaim(wait=False)
        return self.nbytes - self._room()

    def take(self, nbytes: int) -> Extents:
        """Pieces that hold `nbytes`.

        Raises:
            HostMemoryError: at the limit, or no memory; nothing is taken then.
        """
        need = -(-nbytes // _ALIGN) * _ALIGN
        self._reclaim(wait=False)
        if self._room() < need and self._leaving:
            self._reclaim(wait=True)
        while (missing := need - self._room()) > 0:
            self._grow(missing)
        spans: list[tuple[int, int, int]] = []
        while need:
            chunk, start, stop = self._free.pop()
            if stop - start > need:
                self._free.append((chunk, start + need, stop))
                stop = start + need
            spans.append((chunk, start, stop))
            need -= stop - start
        return Extents(self, spans, nbytes)

    def _room(self) -> int:
        return sum(stop - start for _, start, stop in self._free)

    def _grow(self, missing: int) -> None:
        size = min(self.chunk, 1 << max(missing - 1, self.nbytes - 1, _LEAST - 1).bit_length())
        if self.limit is not None:
            room = (self.limit - self.nbytes) // _ALIGN * _ALIGN
            if room < min(size, missing):
                raise HostMemoryError(
                    f"pinned_limit={self.limit / 1e9:g} GB: {self.nbytes / 1e9:.3f} GB are taken and"
                    f" {missing / 1e9:.3f} GB more are needed"
                )
            size = min(size, room)
        try:
            chunk = self.lanes.host(size, pooled=True)
        except HostMemoryError as error:
            raise HostMemoryError(
                f"the host gives no {size / 1e6:.0f} MB of pinned memory beside {self.nbytes / 1e9:.3f} GB: {error}"
            ) from error
        self.chunks.append(chunk)
        self._free.append((len(self.chunks) - 1, 0, size))

    def _reclaim(self, wait: bool) -> None:
        """Free what was given back and whose copies are done, or with `wait` when they are."""
        leaving, self._leaving = self._leaving, []
        freed: list[tuple[int, int, int]] = []
        for spans, busy in leaving:
            if wait:
                self.lanes.finish(busy)
            if self.lanes.reached(busy):
                freed += spans
            else:
                self._leaving.append((spans, busy))
        if freed:  # a phase's whole state at a time
            self._free_spans(freed)

    def _free_spans(self, spans: list[tuple[int, int, int]]) -> None:
        self._free = _merged([*self._free, *spans])


def _merged(spans: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Neighbours joined; the longest last, from where pieces are taken."""
    joined: list[tuple[int, int, int]] = []
    for chunk, start, stop in sorted(spans):
        if joined and joined[-1][0] == chunk and joined[-1][2] == start:
            joined[-1] = (chunk, joined[-1][1], stop)
        else:
            joined.append((chunk, start, stop))
    return sorted(joined, key=lambda s: s[2] - s[1])
