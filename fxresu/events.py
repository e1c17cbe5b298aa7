"""What the cycle tells its listeners."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fxresu.passes import Phase

from .mask_change import MaskChange
from .metrics import PhaseSummary


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """What `on_step` gets after every optimizer step: where it was taken, and its loss (detached, on the device)."""

    step: int
    cycle: int
    stage: str
    phase: Phase
    loss: Tensor


@dataclasses.dataclass(frozen=True)
class PhaseEvent:
    """What `on_phase` gets: `when` is "start" or "end"; `summary` is there at the end.

    At the end of RESU the weights still hold W_eff; the commit follows, and its figures come with `on_commit`.
    """

    when: str
    step: int
    cycle: int
    stage: str
    phase: Phase
    summary: PhaseSummary | None = None


class Listeners:
    """Who wants to be told what."""

    def __init__(self) -> None:
        self._listeners: dict[str, list[Callable[[Any], None]]] = {k: [] for k in ("phase", "step", "prune", "commit")}

    def on_phase(self, listener: Callable[[PhaseEvent], None]) -> Callable[[PhaseEvent], None]:
        """Call `listener` when a stage starts and ends. Usable as a decorator."""
        return self._listen("phase", listener)

    def on_step(self, listener: Callable[[StepEvent], None]) -> Callable[[StepEvent], None]:
        """Call `listener` after every optimizer step. Usable as a decorator."""
        return self._listen("step", listener)

    def on_prune(self, listener: Callable[[MaskChange], None]) -> Callable[[MaskChange], None]:
        """Call `listener` after every pruning. Usable as a decorator."""
        return self._listen("prune", listener)

    def on_commit(self, listener: Callable[[MaskChange], None]) -> Callable[[MaskChange], None]:
        """Call `listener` after every commit. Usable as a decorator."""
        return self._listen("commit", listener)

    def _listen(self, kind: str, listener: Callable[[Any], None]) -> Callable[[Any], None]:
        self._listeners[kind].append(listener)
        return listener

    def _tell(self, kind: str, event: Any) -> None:
        for listener in self._listeners[kind]:
            listener(event)
