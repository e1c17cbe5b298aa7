"""Phases of training and the plan that says everything about one. Plain data; passes read it, nothing else decides."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

Weights = Literal["dense", "sparse", "resu", "effective"]
Precision = Literal["inherit", "fp32", "bf16", "fp16", "fp8"]
Activations = Literal["save", "needed", "discard", "recompute", "offload"]
OptimizerState = Literal["keep", "drop", "offload", "pinned", "compress"]
ComputeCopy = Literal["none", "bf16"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "weights": ("dense", "sparse", "resu", "effective"),
    "precision": ("inherit", "fp32", "bf16", "fp16", "fp8"),
    "activations": ("save", "needed", "discard", "recompute", "offload"),
    "optimizer_state": ("keep", "drop", "offload", "pinned", "compress"),
    "compute_copy": ("none", "bf16"),
}
# They separate the parts of a tag.
_RESERVED = "/:,"
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
            that casts inserted into the graph enforce. "fp8" (e4m3, forward-only phases): managed linears in 8 bits,
            all other products in bfloat16. Norms, softmax and losses are never cast.
        precision_overrides: pairs (FQN pattern of a module or weight, precision), a mapping works too; the first that
            matches a product, or a module around it, decides. Norms and losses are cast where one names them.
        activations: "save" all that autograd wants, only what the trained part "needed" (RESU with column
            candidates keeps those columns of a linear's input), or "discard" (forward only). "recompute" also computes
            cheap results (activation functions, norms, casts, selected columns) again in the backward; "offload" sends
            what is saved to pinned host memory until the backward wants it.
        activation_budget: of what the backward may keep on the device, as a share in (0, 1] of what the compiler
            would keep by itself (a float), or in bytes for each graph (an integer). Beyond it the cheapest results by
            bytes saved are computed again, or with "offload" the rest leaves for the host.
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
    precision_overrides: tuple[tuple[str, Precision], ...] = ()
    activation_budget: float | int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "phase", Phase.parse(self.phase))
        object.__setattr__(self, "precision_overrides", self._checked_overrides(self.precision_overrides))
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
        if not self.trains and self.activations in ("recompute", "offload"):
            raise ValueError(
                f"activations={self.activations!r} in the plan of {self.phase}: it has no backward; use 'discard'"
            )
        self._check_budget()
        precisions = {self.precision, *(p for _, p in self.precision_overrides)}
        if self.trains and "fp8" in precisions:
            raise ValueError(f"precision='fp8' in the plan of {self.phase}: forward-only phases take it; use 'bf16'")

    def _checked_overrides(self, overrides: object) -> tuple[tuple[str, Precision], ...]:
        pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
        try:
            found = tuple((pattern, precision) for pattern, precision in pairs)  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            raise ValueError(
                f"precision_overrides={overrides!r} in the plan of {self.phase}: use a mapping of FQN patterns to"
                " precisions, such as {'lm_head': 'fp32'}"
            ) from None
        for pattern, precision in found:
            if not isinstance(pattern, str) or not pattern or set(pattern) & set(_RESERVED):
                raise ValueError(
                    f"precision_overrides[{pattern!r}] in the plan of {self.phase}: use an FQN pattern, as 'h.*.mlp'"
                )
            if precision not in _CHOICES["precision"]:
                raise ValueError(
                    f"precision_overrides[{pattern!r}]={precision!r} in the plan of {self.phase}: use one of"
                    f" {', '.join(_CHOICES['precision'])}"
                )
        return found

    def _check_budget(self) -> None:
        budget = self.activation_budget
        if budget is None:
            return
        share = isinstance(budget, float) and 0 < budget <= 1 and math.isfinite(budget)
        if not share and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
            raise ValueError(
                f"activation_budget={budget!r} in the plan of {self.phase}: use a share in (0, 1] as a float, or bytes"
                " as an integer >= 1"
            )
        if not self.trains:
            raise ValueError(f"activation_budget={budget!r} in the plan of {self.phase}: it keeps no activations")

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
        tag = f"{self.phase}/{self.weights}/{self.precision}/{self.activations}"
        if self.activation_budget is not None or self.precision_overrides or self.transfers:
            overrides = ",".join(f"{pattern}:{precision}" for pattern, precision in self.precision_overrides)
            budget = "" if self.activation_budget is None else repr(self.activation_budget)
            tag += f"/{budget}/{overrides}/{'transfers' if self.transfers else ''}"
        return tag

    @property
    def manages_activations(self) -> bool:
        """Whether what the backward keeps is chosen here, and not by the compiler alone."""
        return self.trains and (self.activations in ("recompute", "offload") or self.activation_budget is not None)

    @classmethod
    @functools.cache  # every eager call asks, and checking a plan takes longer than a small layer
    def from_tag(cls, tag: str) -> PhasePlan:
        """The plan that a marker's tag names (without accumulation, and of the optimizer's state only whether it is
        called back beside the computation)."""
        phase, weights, precision, activations, *more = tag.split("/")
        budget, overrides, transfers = more or ("", "", "")
        return cls(
            Phase.parse(phase),
            weights,  # type: ignore[arg-type]
            precision,  # type: ignore[arg-type]
            activations,  # type: ignore[arg-type]
            optimizer_state="pinned" if transfers else "keep",
            activation_budget=None if not budget else float(budget) if not budget.isdigit() else int(budget),
            precision_overrides=tuple(tuple(o.split(":")) for o in overrides.split(",") if o),  # type: ignore[misc]
        )


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
