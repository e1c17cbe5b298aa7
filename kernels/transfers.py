"""Transfers as operations of a graph: `fxresu::restore_begin` starts a part of what comes back beside the computation,
`fxresu::restore_end` hands over what has arrived. Neither touches a tensor of the graph.

What they do is decided when they run: by whoever stands in `active` then. Every run is counted, with or without one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from ._registry import operation

__all__ = ["EXECUTED", "Transfers", "active", "restore_begin", "restore_end"]

EXECUTED: Counter[str] = Counter()
"""How often each operation has run in this process, by its name; "idle" counts runs without transfers to act on."""


class Transfers(Protocol):
    """What the operations act on."""

    def begin(self) -> int: ...

    def finish(self) -> int: ...


_ACTIVE: list[Transfers] = []


@contextlib.contextmanager
def active(transfers: Transfers | None) -> Iterator[None]:
    """The operations act on `transfers` inside; on nothing if it is None."""
    if transfers is None:
        yield
        return
    _ACTIVE.append(transfers)
    try:
        yield
    finally:
        _ACTIVE.pop()


def _fake(phase: str) -> None:
    return None


@operation("restore_begin", fake=_fake)
def restore_begin(phase: str) -> None:
    """Start the next part of what comes back. `phase` is for readers of the graph."""
    EXECUTED["restore_begin"] += 1
    if _ACTIVE:
        _ACTIVE[-1].begin()
    else:
        EXECUTED["idle"] += 1


@operation("restore_end", fake=_fake)
def restore_end(phase: str) -> None:
    """Hand over what has come back, without waiting."""
    EXECUTED["restore_end"] += 1
    if _ACTIVE:
        _ACTIVE[-1].finish()
    else:
        EXECUTED["idle"] += 1
