"""Batches of token windows whose order depends on (seed, step) only, and a bounded prefetcher."""

from __future__ import annotations

import hashlib
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .corpus import TokenFile
from .errors import ConfigError, DataError

__all__ = ["Batch", "Prefetcher", "batch_at", "batches", "held_out_batches"]

Batch = tuple[torch.Tensor, torch.Tensor]
Tokens = TokenFile | npt.NDArray[Any]


def batch_at(
    tokens: Tokens,
    step: int,
    batch_size: int,
    seq_len: int,
    seed: int,
    *,
    device: torch.device | str | None = None,
) -> Batch:
    """Batch number `step`: `batch_size` windows of `seq_len` + 1 tokens at random places.

    A pure function of its arguments, so a resumed run sees the batches that the uninterrupted run would have seen.
    Only the windows are read, never the file. Returns (inputs, targets), both int64 [batch_size, seq_len] on `device`
    (CPU by default); targets are the inputs one token later.

    Raises DataError when `tokens` is shorter than one window, ConfigError for sizes that are not positive.
    """
    _check(tokens, batch_size, seq_len)
    key = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key) >> 1)
    starts = torch.randint(len(tokens) - seq_len, (batch_size,), generator=generator)
    return _windows(tokens, starts.tolist(), seq_len, device)


def batches(
    tokens: Tokens,
    batch_size: int,
    seq_len: int,
    *,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """`batch_at` for steps `start`, `start` + 1, ... before `stop` (None: no end). Checks its arguments at once."""
    _check(tokens, batch_size, seq_len)
    if start < 0:
        raise ConfigError(f"start={start}: must be a step number, 0 or more")

    def generate() -> Iterator[Batch]:
        step = start
        while stop is None or step < stop:
            yield batch_at(tokens, step, batch_size, seq_len, seed, device=device)
            step += 1

    return generate()


def held_out_batches(
    tokens: Tokens, n: int, batch_size: int, seq_len: int, *, device: torch.device | str | None = None
) -> list[Batch]:
    """`n` batches of fixed windows at even distances from the first to the last token.

    Each batch is itself spread over the file. Windows overlap when there are fewer than n * batch_size * (seq_len + 1)
    tokens.
    """
    _check(tokens, batch_size, seq_len)
    if n < 1:
        raise ConfigError(f"n={n}: must be a positive number of batches")
    starts = np.linspace(0, len(tokens) - seq_len - 1, n * batch_size).astype(np.int64)
    return [_windows(tokens, starts[i::n].tolist(), seq_len, device) for i in range(n)]


def to_device(batch: Batch, device: torch.device | str | None) -> Batch:
    """`batch` on `device`; to a CUDA device through pinned memory, without waiting for the copy."""
    if device is None or torch.device(device).type == "cpu":
        return batch
    pin = torch.device(device).type == "cuda"
    inputs, targets = ((t.pin_memory() if pin else t).to(device, non_blocking=pin) for t in batch)
    return inputs, targets


def _windows(tokens: Tokens, starts: list[int], seq_len: int, device: torch.device | str | None) -> Batch:
    rows = np.stack([tokens[s : s + seq_len + 1] for s in starts]).astype(np.int64)
    windows = torch.from_numpy(rows)
    return to_device((windows[:, :-1].contiguous(), windows[:, 1:].contiguous()), device)


def _check(tokens: Tokens, batch_size: int, seq_len: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be a positive number of windows")
    if seq_len < 1:
        raise ConfigError(f"seq_len={seq_len}: must be a positive number of tokens")
    if len(tokens) < seq_len + 1:
        name = tokens.path if isinstance(tokens, TokenFile) else "tokens"
        raise DataError(
            f"{name}: {len(tokens):,} tokens are fewer than one window of seq_len={seq_len} + 1; "
            "give more text or a smaller seq_len"
        )


class Prefetcher(Iterator[Batch]):
    """Takes batches from an iterable on one background thread, at most `depth` ahead.

    The copy to `device` happens in the thread that consumes: CUDA calls of another thread would be ordered on another
    stream and can break a graph capture. An exception of the iterable is raised where its batch would have come.
    `close()`, the end of a `with` block and garbage collection stop the thread; afterwards iteration is at its end.
    """

    def __init__(self, source: Iterable[Batch], *, depth: int = 2, device: torch.device | str | None = None) -> None:
        if depth < 1:
            raise ConfigError(f"depth={depth}: must be a positive number of batches")
        self._device = device
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._finished = False
        # The thread must not hold a reference to self, or self would never be collected.
        self._thread = threading.Thread(
            target=_fill, args=(source, self._queue, self._stop), name="fxresu-prefetch", daemon=True
        )
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __next__(self) -> Batch:
        if self._finished:
            raise StopIteration
        kind, value = self._queue.get()
        if kind == "batch":
            return to_device(value, self._device)
        self.close()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait until it has ended. Harmless when it has ended already."""
        self._finished = True
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fill(source: Iterable[Batch], target: queue.Queue[tuple[str, Any]], stop: threading.Event) -> None:
    """Body of the thread: put batches, then the end or the error, and give up as soon as `stop` is set."""

    def put(item: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                target.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    try:
        for batch in source:
            if not put(("batch", batch)):
                break
        else:
            put(("end", None))
    except BaseException as error:  # handed to the consumer, whatever it is
        put(("error", error))
    finally:
        if isinstance(source, Iterator) and hasattr(source, "close"):
            source.close()  # a generator frees what it holds in the thread that ran it
