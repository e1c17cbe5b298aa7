"""Phases of training and the plan that says everything about one. Plain data; passes read it, nothing else decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

Weights = Literal["dense", "sparse", "resu", "effective"]
Precision = Literal["inherit", "fp32", "bf16", "fp16"]
Activations = Literal["save", "needed", "discard"]
OptimizerState = Literal["keep", "drop", "offload", "pinned", "compress"]
ComputeCopy = Literal["none", "bf16"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "weights": ("dense", "sparse", "resu", "effective"),
    "precision": ("inherit", "fp32", "bf16", "fp16"),
    "activations": ("save", "needed", "discard"),
    "optimizer_state": ("keep", "drop", "offload", "pinned", "compress"),
    "compute_copy": ("none", "bf16"),
}
# How the marker's gradient behaves for each meaning of the weight (kernels.managed.MODES).
_GRADIENT_MODE = {"dense": "dense", "sparse": "sparse", "resu": "resu", "effective": "frozen"}


class Phase(StrEnum):
    """What a stretch of training is for."""

    WARMUP = "warmup"
    DENSE = "dense"
    SPARSE = "sparse"
    RESU = "resu"
    PREDICT = "predict"
    CORRECT = "correct"

    @classmethod
    def parse(cls, value: Phase | str) -> Phase:
        """The phase of that name; ValueError with the known names otherwise."""
        try:
            return cls(value)
        except ValueError:
            raise ValueError(f"phase={value!r} is unknown; use one of {', '.join(cls)}") from None


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """Everything a phase decides.

    Attributes:
        phase: the phase it is for.
        weights: what the managed weight means: "dense" (W, all of it trains), "sparse" (M∘W, the active part trains),
            "resu" (M∘W + Φ(θ), θ trains), "effective" (whatever it holds, nothing trains).
        precision: of the matrix products: "inherit" (the caller's autocast or the parameters' own dtype), or a dtype
            that casts inserted into the graph enforce.
        activations: "save" all that autograd wants, only what the trained part "needed" (RESU with column
            candidates keeps those columns of a linear's input), or "discard" (forward only).
        optimizer_state: of what the phase does not train, on entering it: "keep" it where it is, "drop" it, send it to
            pageable ("offload") or "pinned" host memory, or "compress" it to 8 bits on the device. In RESU that is the
            state of the managed weights (and of the rest while that is frozen, which "drop" leaves alone), in
            forward-only phases all. Phases that train the weights have "keep".
        restore_lookahead: "offload" and "pinned": steps before the phase's end in which the state comes back beside
            the computation; 0 waits for the end, and spares the device the state for so long.
        accumulation: micro-batches for one update; gradients are their mean.
        compute_copy: in RESU, "bf16" keeps the effective weight in bfloat16 beside a float32 weight, so that products
            in bfloat16 do not cast it in every forward; what trains is written to both.
    """

    phase: Phase
    weights: Weights
    precision: Precision = "inherit"
    activations: Activations = "save"
    optimizer_state: OptimizerState = "keep"
    accumulation: int = 1
    compute_copy: ComputeCopy = "none"
    restore_lookahead: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "phase", Phase.parse(self.phase))
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"{field}={value!r} in the plan of {self.phase}: use one of {', '.join(allowed)}")
        if not isinstance(self.accumulation, int) or self.accumulation < 1:
            raise ValueError(f"accumulation={self.accumulation!r} in the plan of {self.phase}: use an integer >= 1")
        if self.weights in ("dense", "sparse") and self.optimizer_state != "keep":
            raise ValueError(
                f"optimizer_state={self.optimizer_state!r} in the plan of {self.phase}: the phase trains what the state"
                " is for; use 'keep'"
            )
        if not isinstance(self.restore_lookahead, int) or self.restore_lookahead < 0:
            raise ValueError(
                f"restore_lookahead={self.restore_lookahead!r} in the plan of {self.phase}: use an integer >= 0"
            )
        if self.trains and self.activations == "discard":
            raise ValueError(f"activations='discard' in the plan of {self.phase}: a phase that trains needs them")

    @property
    def trains(self) -> bool:
        """Whether the phase has a backward pass."""
        return self.weights != "effective"

    @property
    def gradient_mode(self) -> str:
        """The marker's mode (see `fxresu.kernels.managed`)."""
        return _GRADIENT_MODE[self.weights]

    @property
    def transfers(self) -> bool:
        """Whether state comes back beside the phase's computation."""
        return self.optimizer_state in ("offload", "pinned") and self.restore_lookahead > 0

    @property
    def tag(self) -> str:
        """What the passes need of the plan, as the text that markers carry in the graph."""
        end = "/transfers" if self.transfers else ""
        return f"{self.phase}/{self.weights}/{self.precision}/{self.activations}{end}"

    @classmethod
    def from_tag(cls, tag: str) -> PhasePlan:
        """The plan that a marker's tag names (without accumulation, and of the optimizer's state only whether it is
        called back beside the computation)."""
        phase, weights, precision, activations, *more = tag.split("/")
        state = "pinned" if "transfers" in more else "keep"
        return cls(Phase.parse(phase), weights, precision, activations, state)  # type: ignore[arg-type]


DEFAULT_PLANS: Mapping[Phase, PhasePlan] = MappingProxyType(
    {
        Phase.WARMUP: PhasePlan(Phase.WARMUP, "dense"),
        Phase.DENSE: PhasePlan(Phase.DENSE, "dense"),
        Phase.SPARSE: PhasePlan(Phase.SPARSE, "sparse"),
        Phase.RESU: PhasePlan(Phase.RESU, "resu", activations="needed", optimizer_state="drop", compute_copy="bf16"),
        Phase.PREDICT: PhasePlan(Phase.PREDICT, "effective", precision="bf16", activations="discard"),
        Phase.CORRECT: PhasePlan(Phase.CORRECT, "effective", precision="fp32", activations="discard"),
    }
)
