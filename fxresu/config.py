"""`CycleConfig`: every option of the RESU cycle, one validation, presets."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, ClassVar

from fxresu.candidates import THETA_INITS
from fxresu.errors import ConfigError
from fxresu.granularity import parse_granularity
from fxresu.schedules import Schedule, amnesty_ratio, sparsity_at

__all__ = ["PHASES", "PRESETS", "RULES", "CycleConfig", "phase_steps"]

RULES = ("selective", "adam", "momentum", "sgd")
PHASES = ("train", "stabilize", "resu")
"""The phases of a cycle that take steps, in order; pruning and the commit take none."""

_GRADIENT_RULE_LR = 0.1
_BETAS = {"adam": (0.9, 0.999)}


@dataclass(frozen=True)
class CycleConfig:
    """Options of `ResuCycle`. Frozen and validated: ConfigError names the field, the value and the remedy.

    Cycle
        cycles: number of cycles (train, prune, stabilize, RESU, commit).
        steps_per_cycle, split: steps of a cycle, and their shares for train, stabilize and RESU (sum 1).
        train_steps, stabilize_steps, resu_steps: all three together replace `steps_per_cycle` and `split`.

    Sparsity
        sparsity_start, sparsity_end, schedule: see `schedules.sparsity_at`; in [0, 1). `schedule` is a name, a sequence
            with one sparsity for each cycle, or a callable (cycle, n_cycles) -> sparsity.
        granularity: "row", "layer", "global", "n:m" (its only sparsities are 0 and 1 - n/m, so the schedule must give
            these, as "constant" does) or "block:HxW".

    Candidates and theta
        candidates: share (0, 1] of the input columns that theta covers, in blocks of 64; 1 is every
            pruned coordinate.
        theta_init, theta_epsilon: "normal", "uniform" or "zero", of standard deviation epsilon * std(active weights).
        train_theta: False leaves theta at its initial value, the control that shows what training it is worth.

    Update of theta
        rule: "selective" (the published one), "adam", "momentum", "sgd".
        theta_lr: None is the learning rate of the managed weights' group in the optimizer for "adam", and 0.1 for the
            other rules, whose step is proportional to the gradient: with them the published 1e-4 hardly moves theta in
            a phase of some hundred steps. The preset "published" keeps 1e-4.
        theta_betas: None is (0.9, 0.999) for "adam" and (0.9, 0.9) otherwise; theta_eps: delta of the consistency
            |m| / (v + delta), or Adam's epsilon; theta_weight_decay: decoupled, theta *= 1 - lr * decay.
        select, top, consistency: of p candidates, the `select * p` largest |g| among the `top` share by |g| whose
            consistency exceeds `consistency` are updated ("selective" only).

    Commit
        amnesty_start, amnesty_end: share of the kept slots that goes to candidates, linear over the cycles.

    Training
        optimizer_state: what happens to the optimizer's state of managed weights in RESU: "drop" or "keep".
        theta_moments: storage of θ's moments: "fp32", "bf16" or "8bit".
        train_rest: unmanaged parameters (biases, norms, embeddings) keep training in RESU.
        accumulation: micro-batches for each step; autocast: None, "bf16" or "fp16"; grad_clip: largest norm of the
            gradient, theta's included, or None; seed: of theta's initial values.
    """

    cycles: int = 5
    steps_per_cycle: int = 1000
    split: tuple[float, float, float] = (0.6, 0.1, 0.3)
    train_steps: int | None = None
    stabilize_steps: int | None = None
    resu_steps: int | None = None
    sparsity_start: float = 0.0
    sparsity_end: float = 0.7
    schedule: Schedule = "linear"
    granularity: str = "row"
    candidates: float = 1.0
    theta_init: str = "normal"
    theta_epsilon: float = 0.1
    train_theta: bool = True
    rule: str = "selective"
    theta_lr: float | None = None
    theta_betas: tuple[float, float] | None = None
    theta_eps: float = 1e-8
    theta_weight_decay: float = 0.01
    select: float = 0.2
    top: float = 0.5
    consistency: float = 0.5
    amnesty_start: float = 0.10
    amnesty_end: float = 0.02
    optimizer_state: str = "drop"
    theta_moments: str = "fp32"
    train_rest: bool = False
    accumulation: int = 1
    autocast: str | None = None
    grad_clip: float | None = None
    seed: int = 0

    _choices: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "theta_init": THETA_INITS,
        "rule": RULES,
        "optimizer_state": ("drop", "keep"),
        "theta_moments": ("fp32", "bf16", "8bit"),
        "autocast": (None, "bf16", "fp16"),
    }

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        self._check_steps()
        self._check_schedule()

    # Reading

    @property
    def steps_in_cycle(self) -> int:
        """Optimizer steps of one cycle, over all phases."""
        return sum(phase_steps(self).values())

    def sparsity(self, cycle: int) -> float:
        """Target sparsity of a cycle."""
        return sparsity_at(self.schedule, cycle, self.cycles, self.sparsity_start, self.sparsity_end)

    def amnesty(self, cycle: int) -> float:
        """Share of the kept slots that the commit of a cycle gives to candidates."""
        return amnesty_ratio(cycle, self.cycles, self.amnesty_start, self.amnesty_end)

    def resolved_theta_lr(self, optimizer_lr: float) -> float:
        """Learning rate of theta, where `optimizer_lr` is the one of the managed weights' group in the optimizer."""
        if self.theta_lr is not None:
            return self.theta_lr
        return float(optimizer_lr) if self.rule == "adam" else _GRADIENT_RULE_LR

    def resolved_theta_betas(self) -> tuple[float, float]:
        """Decay rates of theta's first and second moment."""
        return self.theta_betas if self.theta_betas is not None else _BETAS.get(self.rule, (0.9, 0.9))

    # Making

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CycleConfig:
        """A named configuration (see `PRESETS`), with `changes` on top."""
        if name not in PRESETS:
            raise ConfigError(f"preset={name!r} is unknown{_near(name, PRESETS)}; use one of {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CycleConfig:
        """The configuration with these fields, as from JSON, TOML or YAML (lists for tuples); refuses unknown keys."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"configuration={values!r}; must be a mapping of options to values")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown option {key!r}{_near(key, known)}; the options are {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which `from_dict` reads back; a callable schedule becomes its list of sparsities."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if not isinstance(self.schedule, str):
            values["schedule"] = [self.sparsity(cycle) for cycle in range(self.cycles)]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def replace(self, **changes: Any) -> CycleConfig:
        """A copy with some fields changed, validated again."""
        return self.from_dict({**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **changes})

    # Validation

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value, optional = getattr(self, field.name), "None" in str(field.type)
            if field.name == "schedule" or (optional and value is None):
                continue
            kind = str(field.type).removesuffix(" | None")
            if kind.startswith("tuple"):
                self._normalise_tuple(field.name, kind.count(",") + 1)
            elif kind == "bool" and not isinstance(value, bool):
                _refuse(field.name, value, "must be True or False")
            elif kind == "int":
                if isinstance(value, bool) or not isinstance(value, Integral):
                    _refuse(field.name, value, "must be an integer")
                object.__setattr__(self, field.name, int(value))
            elif kind == "float":
                if not _is_number(value):
                    _refuse(field.name, value, "must be a finite number")
                object.__setattr__(self, field.name, float(value))
        object.__setattr__(self, "granularity", str(parse_granularity(self.granularity)))
        for name, choices in self._choices.items():
            value = getattr(self, name)
            if value not in choices:
                near = _near(value, [c for c in choices if c]) if isinstance(value, str) else ""
                _refuse(name, value, f"must be one of {', '.join(map(repr, choices))}{near}")

    def _normalise_tuple(self, name: str, length: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, (tuple, list)) or len(value) != length or not all(map(_is_number, value)):
            _refuse(name, value, f"must be {length} numbers")
        object.__setattr__(self, name, tuple(map(float, value)))

    def _check_ranges(self) -> None:
        for name in ("cycles", "steps_per_cycle", "accumulation"):
            if getattr(self, name) < 1:
                _refuse(name, getattr(self, name), "must be at least 1")
        for name in ("sparsity_start", "sparsity_end"):
            if not 0.0 <= getattr(self, name) < 1.0:
                _refuse(name, getattr(self, name), "must be in [0, 1), a share of pruned weights")
        for name in ("candidates", "select", "top"):
            if not 0.0 < getattr(self, name) <= 1.0:
                _refuse(name, getattr(self, name), "must be in (0, 1]")
        if not 0.0 <= self.consistency < 1.0:
            _refuse("consistency", self.consistency, "must be in [0, 1): a consistency never exceeds 1")
        for name in ("amnesty_start", "amnesty_end"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                _refuse(name, getattr(self, name), "must be in [0, 1], a share of the kept weights")
        for name in ("theta_epsilon", "theta_weight_decay"):
            if getattr(self, name) < 0.0:
                _refuse(name, getattr(self, name), "must not be negative")
        for name in ("theta_lr", "theta_eps", "grad_clip"):
            value = getattr(self, name)
            if value is not None and value <= 0.0:
                _refuse(name, value, "must be positive")
        if self.theta_betas is not None and not all(0.0 <= beta < 1.0 for beta in self.theta_betas):
            _refuse("theta_betas", self.theta_betas, "must be two numbers in [0, 1)")
        if not 0 <= self.seed < 2**63:
            _refuse("seed", self.seed, "must be in [0, 2**63)")

    def _check_steps(self) -> None:
        explicit = {name: getattr(self, name) for name in ("train_steps", "stabilize_steps", "resu_steps")}
        missing = [name for name, value in explicit.items() if value is None]
        if 0 < len(missing) < 3:
            given = ", ".join(f"{name}={value}" for name, value in explicit.items() if value is not None)
            raise ConfigError(
                f"{missing[0]}=None, but {given}; give all of {', '.join(explicit)}, or none and use split"
            )
        for name, value in explicit.items():
            if value is not None and value < 0:
                _refuse(name, value, "must not be negative")
        if min(self.split) < 0.0 or abs(sum(self.split) - 1.0) > 1e-6:
            _refuse("split", self.split, f"must be three shares >= 0 that sum to 1, not {sum(self.split):g}")
        if self.steps_in_cycle < 1:
            raise ConfigError("train_steps=0, stabilize_steps=0 and resu_steps=0; a cycle takes at least 1 step")

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, list):
            object.__setattr__(self, "schedule", tuple(self.schedule))
        grain = parse_granularity(self.granularity)
        for cycle in range(self.cycles):
            sparsity = self.sparsity(cycle)
            if not grain.allows(sparsity):
                raise ConfigError(
                    f"schedule={self.schedule!r} gives sparsity {sparsity:g} in cycle {cycle}, but "
                    f"granularity={self.granularity!r} allows only 0 and {grain.pattern_sparsity}; use "
                    f"schedule='constant' with sparsity_end={grain.pattern_sparsity}"
                )


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "aggressive": {
        "sparsity_end": 0.9,
        "cycles": 7,
        "steps_per_cycle": 2000,
        "amnesty_start": 0.15,
        "amnesty_end": 0.05,
    },
    "conservative": {
        "sparsity_end": 0.5,
        "cycles": 3,
        "steps_per_cycle": 500,
        "rule": "sgd",
        "amnesty_start": 0.20,
    },
    "densification": {
        "schedule": "densification",
        "sparsity_start": 0.7,
        "sparsity_end": 0.0,
        "amnesty_start": 0.30,
        "amnesty_end": 0.10,
    },
    "quick_test": {
        "sparsity_end": 0.5,
        "cycles": 2,
        "steps_per_cycle": 100,
        "split": (0.5, 0.1, 0.4),
    },
    "published": {"theta_lr": 1e-4, "theta_betas": (0.9, 0.9), "granularity": "layer"},
}
"""Options of the published presets. All but "published" take this package's theta learning rate and granularity."""


def phase_steps(config: CycleConfig) -> dict[str, int]:
    """Optimizer steps of each phase of a cycle: {"train": ..., "stabilize": ..., "resu": ...}.

    The explicit numbers if given; else `split` of `steps_per_cycle`, rounded down, with the left-over steps given to
    the largest remainders (the earlier phase first), so that the sum is exact.
    """
    if config.train_steps is not None and config.stabilize_steps is not None and config.resu_steps is not None:
        return dict(zip(PHASES, (config.train_steps, config.stabilize_steps, config.resu_steps)))
    shares = [Fraction(repr(share)) * config.steps_per_cycle for share in config.split]
    steps = [math.floor(share) for share in shares]
    by_remainder = sorted(range(3), key=lambda i: steps[i] - shares[i])
    for i in by_remainder[: max(config.steps_per_cycle - sum(steps), 0)]:
        steps[i] += 1
    return dict(zip(PHASES, steps))


def _near(word: object, known: Any) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=2)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def _refuse(field: str, value: object, remedy: str) -> None:
    raise ConfigError(f"{field}={value!r}; {remedy}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
