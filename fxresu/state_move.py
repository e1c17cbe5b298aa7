"""What a move of optimizer state is made of: a place, the two parts of a move, what has been counted, and advice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxresu.passes.notices import FxresuWarning

from .errors import HostMemoryError

__all__ = ["Move", "Place", "TransferCounts", "TransferWarning", "advise", "capturing", "out_of_memory", "plainly"]


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tensors made inside are ordinary ones, whatever forward it is called in (`torch.inference_mode`)."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call


class TransferWarning(FxresuWarning):
    """Optimizer state is not where it was to be: right, but slower or larger."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a state tensor, or the slot in its place, is kept."""

    parameter: Tensor
    state: dict[str, Any]
    key: str

    @property
    def value(self) -> Any:
        return self.state[self.key]


@dataclasses.dataclass
class Move:
    """State that is about to change its owner; see the module."""

    _commit: list[Callable[[], object]] = dataclasses.field(default_factory=list)
    _rollback: list[Callable[[], object]] = dataclasses.field(default_factory=list)

    def with_(self, other: Move) -> Move:
        """Both as one."""
        return Move([*self._commit, *other._commit], [*self._rollback, *other._rollback])

    def commit(self) -> None:
        """The new owners are the only ones."""
        for step in self._commit:
            step()
        self._commit, self._rollback = [], []

    def rollback(self) -> None:
        """As if nothing had been begun. After `commit` this does nothing."""
        for step in reversed(self._rollback):
            step()
        self._commit, self._rollback = [], []


@dataclasses.dataclass
class TransferCounts:
    """What has moved so far, in bytes of the device's tensors.

    Attributes:
        out, back: sent away, and called back.
        ahead: of `back`: begun before the phase ended.
        pageable: of `out`: to pageable memory because the host gave no pinned memory.
        late: of `back`: because `optimizer.step()` came upon it.
        postponed: attempts to begin ahead for which the device had no memory.
        stall_seconds: that the computation stood still for copies (waits that were over when this was read).
    """

    out: int = 0
    back: int = 0
    ahead: int = 0
    pageable: int = 0
    late: int = 0
    postponed: int = 0
    stall_seconds: float = 0.0

    def since(self, earlier: TransferCounts) -> TransferCounts:
        """What came on top of `earlier`."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(earlier))
        return TransferCounts(*(a - b for a, b in pairs))


def capturing() -> bool:
    """Whether a CUDA graph is being captured: copies would become a part of it, and run at every replay."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def advise(error: BaseException, strategy: str, what: str) -> None:
    """Say what to change, on whatever error it is."""
    if isinstance(error, HostMemoryError) and strategy != "pinned":
        remedy = "free memory of the host, or use optimizer_state='compress' or 'drop'"
    elif isinstance(error, HostMemoryError):
        remedy = "raise pinned_limit, leave pinned_required False, or use optimizer_state='offload' or 'compress'"
    elif strategy == "compress":
        remedy = "compressing holds the codes beside the state for a moment: use optimizer_state='offload' or 'drop'"
    else:
        remedy = "free memory of the device, use a smaller batch, or keep less there (optimizer_state='drop')"
    error.add_note(f"optimizer state: {what}; {remedy}")
