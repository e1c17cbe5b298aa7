"""The bus between host and device: both directions at once, by copy engines and by kernels; what waits behind a copy.

Streamed training sends moments, activations and weights both ways at the same time, beside the computation. Cases:

- engine/in, engine/out, kernel/in, kernel/out: 64 MB pieces in one direction, pinned memory. "kernel" reads or writes
  the host's memory from a few programs of a Triton kernel.
- engine/both, kernel/both, and "engine in, kernel out": both directions, each on a stream of its own. "bytes_per_s" is
  the sum of both.
- behind/...: 4 kB that a kernel on the computation's stream wants, while pieces come in: copied from pinned memory,
  copied from pageable memory, or read in place. "median_ms" is how long the stream stands.

    python tools/bench/bus.py --out bus.json
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from benchlib.results import Run, arguments
from benchlib.timing import time_calls
from torch import Tensor

PIECE = 64 * 2**20
PIECES = 4  # in flight in a direction
PROGRAMS = 32
_BLOCK = 4096


@triton.jit
def _copy_kernel(target, source, n, BLOCK: tl.constexpr):
    """int64 entries, in turns."""
    for first in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < n), mask=at < n)


def by_kernel(target: Tensor, source: Tensor, programs: int = PROGRAMS) -> None:
    """Copy between the device and pinned memory without a copy engine."""
    whole = [t.view(torch.int64) for t in (target, source)]
    _copy_kernel[(programs,)](*whole, whole[0].numel(), BLOCK=_BLOCK, num_warps=8)


def by_engine(target: Tensor, source: Tensor) -> None:
    """Copy as torch does."""
    target.copy_(source, non_blocking=True)


class Bus:
    """Memory on both sides, and a stream a direction."""

    def __init__(self) -> None:
        self.here = [torch.randint(256, (PIECE,), dtype=torch.uint8, device="cuda") for _ in range(2)]
        self.there = [torch.zeros(PIECE, dtype=torch.uint8).pin_memory() for _ in range(2)]
        self.streams = [torch.cuda.Stream() for _ in range(2)]

    def copies(self, ways: dict[str, Callable[..., None]]) -> None:
        """Pieces in the directions of `ways`, at the same time; the present stream waits for all."""
        present = torch.cuda.current_stream()
        for (direction, copy), stream in zip(ways.items(), self.streams):
            stream.wait_stream(present)
            with torch.cuda.stream(stream):
                pair = (self.here[0], self.there[0]) if direction == "in" else (self.there[1], self.here[1])
                for _ in range(PIECES):
                    copy(*pair)
            present.wait_stream(stream)


def rate(ways: dict[str, Callable[..., None]], args: Any) -> dict[str, Any]:
    """Bytes/s of all directions together; AssertionError if something else arrived than was sent."""
    bus = Bus()
    row: dict[str, Any] = time_calls(lambda: bus.copies(ways), args.warmup, args.steps)
    torch.cuda.synchronize()
    arrived = {"in": (bus.here[0].cpu(), bus.there[0]), "out": (bus.there[1], bus.here[1].cpu())}
    if not all(torch.equal(*arrived[direction]) for direction in ways):
        raise AssertionError(f"{list(ways)}: the copies are not what was copied")
    return row | {"bytes_per_s": len(ways) * PIECES * PIECE / (row["median_ms"] * 1e-3)}


def behind(how: str, args: Any) -> dict[str, Any]:
    """How long the computation's stream stands for 4 kB while pieces come in on another."""
    bus, few = Bus(), torch.arange(512)
    pinned, target = few.pin_memory(), torch.empty(512, dtype=torch.int64, device="cuda")
    side = bus.streams[0]

    def busy() -> None:
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(PIECES):
                by_engine(bus.here[0], bus.there[0])

    def few_bytes() -> None:
        if how == "read in place":
            by_kernel(target, pinned, 1)
        else:
            target.copy_(pinned if how == "pinned" else few, non_blocking=True)

    row: dict[str, Any] = time_calls(few_bytes, args.warmup, args.steps, busy)
    alone = time_calls(few_bytes, args.warmup, args.steps, torch.cuda.synchronize)
    if not torch.equal(target.cpu(), few):
        raise AssertionError(f"{how}: the few bytes are not what was copied")
    return row | {"alone_ms": alone["median_ms"]}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    args = parser.parse_args(argv)
    if not (args.list or torch.cuda.is_available()):
        parser.error("there is no CUDA device here")
    run = Run("bus", args, {"piece_bytes": PIECE, "pieces": PIECES, "programs": PROGRAMS})
    ways = {
        "engine/in": {"in": by_engine}, "engine/out": {"out": by_engine},
        "kernel/in": {"in": by_kernel}, "kernel/out": {"out": by_kernel},
        "engine/both": {"in": by_engine, "out": by_engine}, "kernel/both": {"in": by_kernel, "out": by_kernel},
        "engine in, kernel out": {"in": by_engine, "out": by_kernel},
    }  # fmt: skip
    cases: dict[str, Any] = {name: functools.partial(rate, way, args) for name, way in ways.items()}
    cases |= {f"behind/{how}": functools.partial(behind, how, args) for how in ("pinned", "pageable", "read in place")}
    run.run(cases)
    for name, row in run.cases.items():
        if "median_ms" in row:
            rated = "bytes_per_s" in row
            beside = f"{row['bytes_per_s'] / 1e9:.1f} GB/s" if rated else f"alone {row['alone_ms']:.4f} ms"
            print(f"{name:24} {row['median_ms']:8.4f} ms  {beside}")
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
