"""The whole device's memory as CUDA reports it, sampled while a block runs; on a CPU the process's resident set."""

from __future__ import annotations

import threading
from typing import Any

import torch

from fxresu.ledger import current_rss, peak_rss

_EVERY_S = 0.002


def used_bytes() -> int:
    """Bytes in use on the device by everybody, contexts and libraries included; on a CPU the resident set."""
    if not torch.cuda.is_available():
        return current_rss()
    free, total = torch.cuda.mem_get_info()
    return total - free


def set_cap(gigabytes: float | None) -> None:
    """The most that PyTorch's allocator may take from the device, in 10^9 bytes; None: all of it. Not on a CPU."""
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        share = 1.0 if gigabytes is None else gigabytes * 1e9 / total
        if not 0 < share <= 1:
            raise ValueError(f"cap={gigabytes} GB: the device has {total / 1e9:.1f}")
        torch.cuda.set_per_process_memory_fraction(share)


class DevicePeak:
    """Peaks of a block. The allocator's are exact; the device's is the larger of what a thread saw every 2 ms and what
    the allocator held at its peak beside what is outside of it.

    Args:
        before: `used_bytes` before this process had a context: what others hold, which is not counted.

    Attributes:
        row: after the block: bytes by name.
    """

    def __init__(self, before: int = 0) -> None:
        self.before, self.row = before, dict[str, Any]()
        self._seen = 0
        self._done = threading.Event()

    def __enter__(self) -> DevicePeak:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_S):
            self._seen = max(self._seen, used_bytes())

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._done.set()
        self._thread.join()
        if not torch.cuda.is_available():
            self.row = {"peak_device_bytes": peak_rss()}
            return
        outside = used_bytes() - torch.cuda.memory_reserved() - self.before
        reserved = torch.cuda.max_memory_reserved()
        self.row = {
            "peak_device_bytes": max(self._seen - self.before, reserved + outside),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": reserved,
            "outside_allocator_bytes": outside,
        }
