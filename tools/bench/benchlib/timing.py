"""Timing on one device: medians by CUDA events, cold caches, CUDA graphs, peaks of the allocator.

On a CPU the same functions time by the wall clock and capture nothing, so that every script can be run in a tiny form;
such figures are labelled with the device and mean nothing.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
_FLUSH_BYTES = 256 * 2**20  # five times the L2 of an H100


def device_type() -> str:
    """ "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(times_ms: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile (nearest rank) and mean of times in ms."""
    ordered = sorted(times_ms)
    rank = (len(ordered) - 1) / 10
    return {
        "median_ms": statistics.median(ordered),
        "p10_ms": ordered[math.floor(rank)],
        "p90_ms": ordered[math.ceil(len(ordered) - 1 - rank)],
        "mean_ms": statistics.fmean(ordered),
        "repetitions": len(ordered),
    }


class Flush:
    """Evicts the L2 cache: writes 256 MB, then reads another 256 MB.

    The read is there because a cache full of written lines would have to write them back while the timed kernel runs.
    """

    def __init__(self) -> None:
        count = _FLUSH_BYTES // 4 if torch.cuda.is_available() else 1024
        self._written = torch.empty(count, device=device_type())
        self._read = torch.zeros(count, device=device_type())

    def __call__(self) -> None:
        self._written.zero_()
        self._read.sum()


def time_calls(call: Call, warmup: int, repetitions: int, flush: Call | None = None) -> dict[str, float]:
    """Single calls, each between two events; `flush` runs before every call and is not counted.

    Without `flush` the calls follow each other at once, and one's end is the next one's start.
    """
    for _ in range(warmup):
        call()
    synchronize()
    if not torch.cuda.is_available():
        return spread([_wall_ms(call, flush) for _ in range(repetitions)])
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    previous = _event()
    for _ in range(repetitions):
        if flush is not None:
            flush()
            previous = _event()
        call()
        pairs.append((previous, previous := _event()))
    synchronize()
    return spread([start.elapsed_time(end) for start, end in pairs])


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _wall_ms(call: Call, before: Call | None) -> float:
    if before is not None:
        before()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def time_synchronized(call: Call, warmup: int, repetitions: int, before: Call | None = None) -> dict[str, float]:
    """Wall-clock times of single calls with the device drained before and after each, as the published loop does it."""
    for _ in range(warmup):
        if before is not None:
            before()
        call()
    times = []
    for _ in range(repetitions):
        if before is not None:
            before()
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return spread(times)


def capture(step: Call, warmup: int = 4) -> Call:
    """`step` as a CUDA graph: a function that replays it. Compiles and tunes in `warmup` calls on a side stream first.

    Whatever the step reads from the host (learning rate, step count) stays as it was at the capture.
    """
    if not torch.cuda.is_available():
        for _ in range(warmup):
            step()
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except Exception:
        # A capture that fails leaves the random generator in the capture's state, and everything after it fails.
        fresh = torch.Generator("cuda")
        fresh.manual_seed(torch.initial_seed())
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh.graphsafe_get_state())
        raise
    return graph.replay


def capture_parts(first: Call, second: Call, hold: Callable[[], Call]) -> Call:
    """Two parts of a step as two CUDA graphs, replayed one after the other.

    The second reads what the first leaves in `.grad`, and may prepare things by the addresses that it finds there: it
    runs once uncaptured on the memory of the first graph. `hold` remembers the gradients and returns what puts them
    back. Both parts must have run before.
    """
    backward = capture(first)
    put_back = hold()
    backward()
    second()
    put_back()
    update = capture(second, warmup=0)

    def replay() -> None:
        backward()
        update()

    return replay


def peaks(call: Call, repetitions: int = 3) -> dict[str, int]:
    """Peak bytes over some calls: allocated (what tensors hold) and reserved (what the allocator took). Empty on a CPU.

    The allocator's cache is emptied first, so that "reserved" is this call's own.
    """
    if not torch.cuda.is_available():
        call()
        return {}
    synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repetitions):
        call()
    synchronize()
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def copy_rate(repetitions: int = 20) -> float:
    """Bytes/s of a device-to-device copy of 512 MB, read and write counted: the bound of byte-bound kernels."""
    count = 2**27 if torch.cuda.is_available() else 2**16
    source = torch.ones(count, device=device_type())
    target = torch.empty_like(source)
    row = time_calls(lambda: target.copy_(source), 3, repetitions)
    return 2 * source.nbytes / (row["median_ms"] * 1e-3)


def bus_rates(repetitions: int = 5) -> dict[str, float]:
    """Bytes/s of copies of 256 MB to the device ("in") and to pinned host memory ("out"), alone and at the same time.

    "both" is what each direction has then.
    """
    count = 2**28
    here = [torch.ones(count, dtype=torch.uint8, device="cuda") for _ in range(2)]
    there = [torch.ones(count, dtype=torch.uint8).pin_memory() for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def copies(directions: str) -> Call:
        def run() -> None:
            for direction, stream in zip(("in", "out"), streams, strict=True):
                if direction not in directions:
                    continue
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    pair = (here[0], there[0]) if direction == "in" else (there[1], here[1])
                    pair[0].copy_(pair[1], non_blocking=True)
                torch.cuda.current_stream().wait_stream(stream)

        return run

    cases = {"in": "in", "out": "out", "both": "in, out"}
    times = {name: time_calls(copies(directions), 1, repetitions)["median_ms"] for name, directions in cases.items()}
    return {name: count / (ms * 1e-3) for name, ms in times.items()}


def matmul_rate(dtype: torch.dtype, repetitions: int = 10) -> float:
    """FLOP/s of the vendor's matrix product, 8192 x 4096 x 4096, in `dtype`: what GEMM-bound steps are held against."""
    rows, k = (8192, 4096) if torch.cuda.is_available() else (64, 64)
    a = torch.randn(rows, k, device=device_type(), dtype=dtype)
    b = torch.randn(k, k, device=device_type(), dtype=dtype)
    row = time_calls(lambda: a @ b, 3, repetitions)
    return 2 * rows * k * k / (row["median_ms"] * 1e-3)
