"""Pinned host memory of one GPU."""

from __future__ import annotations

import contextlib
import mmap
import weakref

import torch
from torch import Tensor

from .errors import HostMemoryError

__all__ = ["PinnedMemory"]


class PinnedMemory:
    """Host memory that the device copies from and to by itself.

    Torch's pinned allocator keeps what is given back for the next one, and rounds sizes up to powers of two: it serves
    pools, whose chunks have such sizes. Other memory is mapped and registered, and stays so until nobody refers to
    this; it goes back to the system then.

    Args:
        device: a CUDA device.
        streams: on which copies from and to this memory run; they are waited for before it is unregistered.
    """

    def __init__(self, device: torch.device, streams: list[torch.cuda.Stream]) -> None:
        self.device = device
        self._registered: list[Tensor] = []  # kept alive: memory must not be freed while it is registered
        weakref.finalize(self, _unregister, self._registered, streams).atexit = False

    def take(self, size: int, pooled: bool = False) -> Tensor:
        """uint8 [size]: zeros, unless it is for a pool.

        Raises:
            HostMemoryError: the host has no memory, or none that can be pinned.
        """
        if pooled and size & (size - 1) == 0:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                raise _refused(size, error) from error
        # A mapping of its own, because registered ranges must not share a page; shared (mmap's default), because a fork
        # would leave a private one's pages, which the device writes, to the child.
        try:
            buffer = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)
        except (OSError, ValueError) as error:
            raise HostMemoryError(f"{size} bytes of host memory: {error}") from error
        with torch.cuda.device(self.device):
            code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
        if code:
            _forget_error(self.device)
            raise _refused(size, f"CUDA error {code}")
        self._registered.append(buffer)
        return buffer[:size]


def _refused(size: int, why: object) -> HostMemoryError:
    return HostMemoryError(
        f"{size} bytes of host memory could not be pinned ({why}); keep less in host memory (moments='8bit', a larger"
        " device_bytes, fewer weights), or raise the limit on locked memory (ulimit -l)"
    )


def _forget_error(device: torch.device) -> None:
    """Take the error of a failed call from the CUDA runtime, which would give it to the next kernel's check."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


# What could not be unregistered when its turn came.
_KEPT: list[tuple[list[Tensor], list[torch.cuda.Stream]]] = []


def _unregister(buffers: list[Tensor], streams: list[torch.cuda.Stream]) -> None:
    """Unpin memory that nobody refers to through its lanes any more, after the copies that are under way."""
    _KEPT.append((buffers, streams))
    if torch.cuda.is_current_stream_capturing():
        return  # waiting would spoil the recording
    while _KEPT:
        old, theirs = _KEPT.pop()
        for stream in theirs:
            stream.synchronize()
        for buffer in old:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
