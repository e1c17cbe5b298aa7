"""What a run of the cycle records: one summary a phase, gathered on the device and read once at the phase's end."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from .mask_change import MaskChange


@dataclasses.dataclass(frozen=True)
class PhaseSummary:
    """One phase of one cycle, as it ended.

    Attributes:
        phase: "dense", "sparse" or "resu"; stage: "train", "stabilize" or "resu".
        steps: optimizer steps (of θ in RESU).
        loss_first, loss_last: of the phase's first and last step.
        seconds: wall time from the phase's start to its end, compilation included.
        target_sparsity, sparsity: asked for, and what the masks have.
        theta_updates: updates of θ; 0 outside RESU.
        mean_consistency: mean of C = |m|/(v+δ) over candidates and steps ("selective" only; else 0).
        selection_ratio: share of the candidates that an update changed.
        budget: share of the kept slots that the commit's quota gave to candidates; 0 without a quota.
        resurrected, kept, dropped, churn, resurrection_rate: of the pruning or commit that ended the phase; 0 without
            one.
        skipped_updates: steps without an update, because float16's loss scale was too large.
        dropped_micro_batches: accumulated in a phase that was changed by hand before their update.
        products: matrix products in the phase's compiled graphs, by the precision that they compute in.
        bytes_cast: that casts inserted for the phase write in one pass through its graphs.
        layer_sparsity, layer_churn: the same two by FQN.
        survival: share of the weights that a commit resurrected which is active now, by that commit's cycle.
        state_out, state_back: bytes of optimizer state sent away and called back, from the end of the stage before to
            this one's (the way into the stage counts here, the way out of it in the next); state_ahead: of those
            called back, begun before the stage's end.
        state_pageable: of those sent, to pageable memory for want of pinned; state_late: called back by a step that
            came upon them; state_postponed: times that the device had no memory to begin ahead.
        state_stall_seconds: that the computation stood still for these copies.
    """

    cycle: int
    stage: str
    phase: str
    steps: int
    loss_first: float
    loss_last: float
    seconds: float
    target_sparsity: float
    sparsity: float
    theta_updates: int = 0
    mean_consistency: float = 0.0
    selection_ratio: float = 0.0
    budget: float = 0.0
    resurrected: int = 0
    kept: int = 0
    dropped: int = 0
    churn: float = 0.0
    resurrection_rate: float = 0.0
    skipped_updates: int = 0
    dropped_micro_batches: int = 0
    products: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes_cast: int = 0
    layer_sparsity: dict[str, float] = dataclasses.field(default_factory=dict)
    layer_churn: dict[str, float] = dataclasses.field(default_factory=dict)
    survival: dict[str, float] = dataclasses.field(default_factory=dict)
    state_out: int = 0
    state_back: int = 0
    state_ahead: int = 0
    state_pageable: int = 0
    state_late: int = 0
    state_postponed: int = 0
    state_stall_seconds: float = 0.0

    def changed(self, change: MaskChange, survival: dict[str, float], budget: float = 0.0) -> PhaseSummary:
        """This summary with the change of masks that ended the phase."""
        return dataclasses.replace(
            self,
            budget=budget,
            sparsity=change.sparsity,
            resurrected=change.resurrected,
            kept=change.kept,
            dropped=change.dropped,
            churn=change.churn,
            resurrection_rate=change.resurrection_rate,
            layer_sparsity=change.layer_sparsity,
            layer_churn=change.layer_churn,
            survival=survival,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


class PhaseMeter:
    """Accumulates one phase. Losses and θ's statistics stay on the device until `read`."""

    def __init__(self) -> None:
        self.steps = 0
        self.first: Tensor | None = None
        self.last: Tensor | None = None
        self.theta_updates = 0
        self.skipped_updates = 0
        self.dropped = 0
        self.theta_stats: Tensor | None = None
        self._earlier = 0.0
        self._start = time.perf_counter()

    def step(self, loss: Tensor) -> None:
        """One optimizer step with this (detached) loss."""
        self.steps += 1
        self.first = loss if self.first is None else self.first
        self.last = loss

    def skip(self) -> None:
        """A step whose update was left out."""
        self.skipped_updates += 1

    def drop(self, micro_batches: int) -> None:
        """Micro-batches whose update never came."""
        self.dropped += micro_batches

    def theta(self, stats: Tensor) -> None:
        """Statistics of one update of θ, [weights, 4]: selected, sum of C, candidates, sum of |Δθ|."""
        total = stats.sum(0, dtype=torch.float64)
        self.theta_updates += 1
        self.theta_stats = total if self.theta_stats is None else self.theta_stats + total

    def seconds(self) -> float:
        """Wall time so far, over interruptions."""
        return self._earlier + time.perf_counter() - self._start

    def read(self) -> dict[str, Any]:
        """The fields of `PhaseSummary` that are measured here."""
        selected, consistency, candidates, _ = (0.0, 0.0, 0.0, 0.0)
        if self.theta_stats is not None:
            selected, consistency, candidates, _ = self.theta_stats.tolist()
        return {
            "steps": self.steps,
            "loss_first": float("nan") if self.first is None else float(self.first),
            "loss_last": float("nan") if self.last is None else float(self.last),
            "seconds": self.seconds(),
            "theta_updates": self.theta_updates,
            "skipped_updates": self.skipped_updates,
            "dropped_micro_batches": self.dropped,
            "mean_consistency": consistency / candidates if candidates else 0.0,
            "selection_ratio": selected / candidates if candidates else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values, exact."""
        return {
            "steps": self.steps,
            "first": None if self.first is None else float(self.first),
            "last": None if self.last is None else float(self.last),
            "theta_updates": self.theta_updates,
            "skipped_updates": self.skipped_updates,
            "dropped": self.dropped,
            "theta_stats": None if self.theta_stats is None else self.theta_stats.tolist(),
            "seconds": self.seconds(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps, self.theta_updates, self._earlier = state["steps"], state["theta_updates"], state["seconds"]
        self.skipped_updates, self.dropped = state["skipped_updates"], state.get("dropped", 0)
        self.first = None if state["first"] is None else torch.tensor(state["first"])
        self.last = None if state["last"] is None else torch.tensor(state["last"])
        stats = state["theta_stats"]
        self.theta_stats = None if stats is None else torch.tensor(stats, dtype=torch.float64)
