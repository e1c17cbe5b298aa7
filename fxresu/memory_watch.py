"""How much memory a process has held since one last asked: the highest resident set, and the device's highest point.

The operating system keeps one highest resident set for the whole life of a process. It tells the peak of a stage only
where the stage reached a new one; below it a thread looks every 20 ms, so peaks that are shorter may go unseen.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from pathlib import Path

import torch

from .ledger import current_rss, peak_rss

__all__ = ["Held", "MemoryWatch"]

_EVERY = 0.02  # seconds; a look takes some 20 microseconds


@dataclasses.dataclass(frozen=True)
class Held:
    """Peaks of a stretch of a run, in bytes.

    Attributes:
        host: of the process's resident set.
        device: of tensors, as CUDA's allocator counts them; None on a CPU.
        whole_device: what is in use on the device at its end. The allocator gives nothing back by itself, so that this
            includes the highest point of the run so far.
    """

    host: int
    device: int | None = None
    whole_device: int | None = None


class MemoryWatch:
    """Looks at the process until it is closed or nobody refers to it any more.

    Args:
        device: that the model is on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._step = self._stretch = current_rss()
        self._highest = peak_rss()
        self._stop = threading.Event()
        weakref.finalize(self, self._stop.set)
        threading.Thread(target=_look, args=(weakref.ref(self), self._stop), name="fxresu-memory", daemon=True).start()

    def see(self, resident: int) -> None:
        """The resident set is this now."""
        self._step, self._stretch = max(self._step, resident), max(self._stretch, resident)

    def step(self) -> tuple[int, int]:
        """(resident set now, highest since the last call or `take`)."""
        now = self._now()
        highest, self._step = self._step, now
        return now, highest

    def take(self) -> Held:
        """What the stretch that ends here has held; the next one begins."""
        now = self._now()
        held, self._step, self._stretch = self._stretch, now, now
        if self.device.type != "cuda":
            return Held(held)
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return Held(held, peak, total - free)

    def _now(self) -> int:
        now, highest = current_rss(), peak_rss()
        self.see(now if highest == self._highest else max(now, highest))
        self._highest = highest
        return now

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()


def _look(watch: weakref.ref[MemoryWatch], stop: threading.Event) -> None:
    while not stop.wait(_EVERY):
        there = watch()
        if there is None:
            return
        there.see(current_rss())
        del there


def children_bytes() -> int:
    """Resident bytes of their own (not shared files) of the processes that this one has started, such as a data
    loader's workers; 0 where the system does not tell."""
    total = 0
    for task in Path("/proc/self/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # the thread has just ended
            continue
        for child in children:
            total += _own_bytes(child)
    return total


def _own_bytes(process: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
