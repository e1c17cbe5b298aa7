"""The plan that a model's managed weights follow now: what a read of one asks, and what reads leave behind for others.

One object is shared by all managed weights of a model, so that a change of phase reaches all of them at once, and
compiled graphs have one place to be guarded on.
"""

from __future__ import annotations

import torch

from fxresu.passes import DEFAULT_PLANS, EagerFallbackWarning, Phase, PhasePlan
from fxresu.passes.notices import warn

__all__ = ["PhaseState"]

# Forward only, and the same graph in every phase: what a call without autograd asks for.
_INFERENCE = PhasePlan(Phase.DENSE, "effective")


class PhaseState:
    """The current plan, shared by all managed weights of one model. Graphs are guarded on its fields.

    Attributes:
        tracked: the model's last call began with gradients on.
        untracked: FQNs that eager code read with gradients off in such a call of this phase.
        reads_copies: products run in bfloat16, and read the weights' copies in it (the runner decides at every call).
        evaluated: the last call that read them was in evaluation mode.
    """

    def __init__(self) -> None:
        self.eager_reads: set[str] | None = None  # collects, while a compiled call runs, what Dynamo left to Python
        self.tracked = self.evaluated = False
        self._told: set[str] = set()
        self.set(DEFAULT_PLANS[Phase.DENSE])

    def set(self, plan: PhasePlan) -> None:
        """Make `plan` current."""
        self.plan = plan
        self.untracked: set[str] = set()
        self.reads_copies = False
        self.mode = plan.gradient_mode
        self.tag = plan.tag
        self.forward_only = not plan.trains
        self.inference_tag = _INFERENCE.tag if plan.trains else plan.tag

    def tell_left(self, fqn: str) -> None:
        """Say once in each plan that the user's own `torch.compile` leaves the code that reads a weight to Python."""
        if self.tag not in self._told:
            self._told.add(self.tag)
            warn(
                EagerFallbackWarning,
                f"phase {self.plan.phase}: eager code read {fqn}, perhaps among others, inside a call of your own"
                " torch.compile, which leaves that code to Python (TORCH_LOGS=graph_breaks shows where); numbers are"
                " the same, speed and memory are not",
            )

    def current(self) -> tuple[str, str]:
        """(gradient mode, tag) for a read right now."""
        if torch.is_grad_enabled():
            return self.mode, self.tag
        return "frozen", self.inference_tag
