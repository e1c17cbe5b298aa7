"""What the cycle tells its listeners."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fxresu.passes import Phase

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
