"""The process's resident set: a budget for it, the micro-batch that holds it, and where the bytes are.

Sizes are bytes as the operating system counts them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor, nn

from .activations import saved_bytes
from .errors import ConfigError
from .ledger import current_rss

__all__ = [
    "HostPlan",
    "heap_free",
    "mapped_bytes",
    "plan_micro_batch",
    "release",
    "resident_parts",
    "split",
]

# What a backward needs beside the saved tensors (gradients of activations, the logits' among them) and what glibc's
# heap loses between blocks, as a share of the saved bytes; and what first used code and tables of later steps take.
# Measured on the GPT of tools/bench/host_memory.py, eager, with 1 to 8 sequences a micro-batch.
_OVER_SAVED = 1.6
_LATER = 10_000_000
# What compiling one more graph leaves behind beyond Inductor's import, on the same model.
_A_GRAPH = 35_000_000


@dataclasses.dataclass(frozen=True)
class HostPlan:
    """How a step stays within the budget.

    Attributes:
        budget: bytes that the resident set may reach.
        batch: sequences of a step, as asked for.
        micro_batch: sequences of one forward and backward; divides `batch`.
        predicted: bytes by component at the peak, with what is there already as it was measured.
    """

    budget: int
    batch: int
    micro_batch: int
    predicted: dict[str, int]

    @property
    def parts(self) -> int:
        """Forwards and backwards of a step."""
        return self.batch // self.micro_batch

    @property
    def peak(self) -> int:
        """Predicted peak in bytes."""
        return sum(self.predicted.values())

    def __str__(self) -> str:
        size = f"{self.parts} x {self.micro_batch}" if self.parts > 1 else str(self.batch)
        return f"host budget {self.budget / 1e6:,.0f} MB: {size} sequences a step, {self.peak / 1e6:,.0f} MB expected"


def plan_micro_batch(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    budget: int,
    batch: int,
    state_bytes: int = 8,
    mapped: int = 0,
    compiled_graphs: int = 0,
) -> HostPlan:
    """The largest micro-batch with which training stays within `budget`.

    Equal micro-batches, each loss divided by their number, give the gradient of the whole batch (up to rounding).

    Runs one forward and backward of one sequence, uncompiled: this shows what the backward keeps and brings in the code
    of the libraries. Gradients are freed, parameters stay as they are. Give the model before its transform.

    Args:
        loss: the loss of a batch of one sequence.
        batch: sequences of a step.
        state_bytes: bytes of optimizer state for an element (8: Adam's two moments in float32).
        mapped: bytes of mapped files; training reads all over them, so their pages come to be resident.
        compiled_graphs: graphs that the run will compile.

    Raises:
        ConfigError: not even one sequence fits; names the smallest budget that would do.
    """
    value = loss()
    sequence = round(_OVER_SAVED * saved_bytes(value, (p.data for p in model.parameters())))
    value.backward()
    del value
    for parameter in model.parameters():
        parameter.grad = None
    trained = [p for p in model.parameters() if p.requires_grad]
    release()
    fixed = {
        "process so far": current_rss(),
        "code first used later": _LATER,
        "gradients": sum(p.nbytes for p in trained),
        "optimizer state": state_bytes * sum(p.numel() for p in trained),
        "mapped files": mapped,
        "compiler": _A_GRAPH * compiled_graphs,
    }
    least = sum(fixed.values()) + sequence
    if least > budget:
        raise ConfigError(
            f"host_budget={budget / 1e6:,.0f}MB: one sequence at a time takes {least / 1e6:,.0f} MB; give at least"
            " that, or a smaller model, a shorter sequence, or no compilation"
        )
    fitting = (budget - least) // max(1, sequence) + 1
    micro = max(m for m in range(1, batch + 1) if batch % m == 0 and m <= fitting)
    return HostPlan(budget, batch, micro, {**fixed, "activations": micro * sequence})


def split(batches: Iterable[tuple[Tensor, Tensor]], parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every batch as `parts` micro-batches of equally many sequences, in order; tensors are [batch, ...]."""
    for batch in batches:
        first, second = batch
        yield from zip(first.chunk(parts), second.chunk(parts)) if parts > 1 else [(first, second)]


def release() -> None:
    """Give memory that nothing uses back to the operating system: Python's cycles, then free pages of glibc's heap."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def resident_parts() -> dict[str, int]:
    """The resident set in two kinds of pages: "anonymous" (heap, stacks, relocated code) and "file" (libraries' code,
    mapped token files). Empty where the system does not tell."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return {}
    found = {name: re.search(rf"^{key}:\s+(\d+) kB", text, re.M) for name, key in _KINDS.items()}
    return {name: 1024 * int(match[1]) for name, match in found.items() if match}


_KINDS = {"anonymous": "RssAnon", "file": "RssFile"}


class _Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2` (malloc.h)."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def heap_free() -> int:
    """Bytes in free blocks of glibc's heap; 0 where there is no glibc of at least 2.33."""
    info = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if info is None:
        return 0
    info.restype = _Mallinfo2
    return int(info().fordblks)


def mapped_bytes(*paths: Path) -> int:
    """Resident bytes of files that are mapped into this process; 0 where the system does not tell."""
    names, total, counting = {str(p.resolve()) for p in paths}, 0, False
    try:
        with open("/proc/self/smaps") as file:
            for line in file:
                head = line.split(None, 5)
                if "-" in head[0]:
                    counting = len(head) == 6 and head[5].rstrip("\n") in names
                elif counting and head[0] == "Rss:":
                    total += 1024 * int(head[1])
    except OSError:
        return 0
    return total
