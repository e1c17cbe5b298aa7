"""Schedules: target sparsity and the commit's quota over the cycles of a run, and theta's learning rate over a phase.

With n cycles, cycle c has t = c / (n - 1); a run of one cycle is at the end of its schedule (t = 1). Source: the
published RESU cycle (constant, linear, exponential, cosine, custom, stepped densification; amnesty ratio 0.10 to 0.02);
"cubic" is gradual magnitude pruning (Zhu and Gupta 2017).

A schedule that starts at 0 leaves cycle 0 without a pruned coordinate, so nothing can be resurrected in it: that is
right for the schedule, and `has_work` lets the cycle skip the phases that need pruned coordinates instead of running
them idle.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from numbers import Real

from fxresu.errors import ConfigError
from fxresu.options import import_callable

__all__ = [
    "DENSIFICATION",
    "LR_SCHEDULES",
    "SCHEDULES",
    "SHAPES",
    "Schedule",
    "amnesty_ratio",
    "has_work",
    "lr_factor",
    "sparsity_at",
]

Schedule = str | Callable[[int, int], float] | Sequence[float]

DENSIFICATION = (0.7, 0.5, 0.3, 0.1, 0.0)
"""Sparsities that "densification" steps through, one for each cycle; later cycles stay at the last one."""

_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: t,
    "exponential": lambda t: 1.0 - (1.0 - t) ** 2,
    "cosine": lambda t: (1.0 - math.cos(math.pi * t)) / 2.0,
    "cubic": lambda t: 1.0 - (1.0 - t) ** 3,
}
SHAPES = tuple(_SHAPES)
"""Shapes of a way from a start to an end."""
SCHEDULES = (*SHAPES, "densification")
"""Names that `sparsity_at` accepts."""
LR_SCHEDULES = ("constant", "linear", "cosine")
"""Names that `lr_factor` accepts: 1 throughout, or falling to 0 over the phase."""


def sparsity_at(schedule: Schedule, cycle: int, n_cycles: int, start: float, end: float) -> float:
    """Target sparsity in [0, 1) of cycle `cycle` (0-based) of `n_cycles`.

    `schedule` is one of `SCHEDULES`, a sequence with one sparsity for each cycle, or a callable (cycle, n_cycles) ->
    sparsity, also as "module:function". "constant" is `end` in every cycle; "linear", "exponential" (1 - (1 - t)^2),
    "cubic" (1 - (1 - t)^3) and "cosine" go from `start` to `end`; "densification" steps through `DENSIFICATION`.
    Sequences, callables and "densification" ignore `start` and `end`.

    Raises ConfigError: unknown name, cycle outside the run, a sequence of another length, a value outside [0, 1).
    """
    _check_cycle(cycle, n_cycles)
    if isinstance(schedule, str) and ":" in schedule:
        schedule = import_callable(schedule, "schedule")
    if not isinstance(schedule, str):
        return _custom(schedule, cycle, n_cycles)
    if schedule == "densification":
        return DENSIFICATION[min(cycle, len(DENSIFICATION) - 1)]
    if schedule not in _SHAPES:
        near = difflib.get_close_matches(schedule, SCHEDULES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(
            f"schedule={schedule!r} is unknown{hint}; use one of {', '.join(SCHEDULES)}, a sequence with one sparsity "
            "for each cycle, or a callable (cycle, n_cycles) -> sparsity"
        )
    start, end = _check_sparsity("start", start), _check_sparsity("end", end)
    share = _SHAPES[schedule](_progress(cycle, n_cycles))
    # Exact at the ends: start + 1.0 * (end - start) may differ from `end` in the last bit and so keep one weight less.
    return end if share == 1.0 else start + share * (end - start)


def amnesty_ratio(
    cycle: int,
    n_cycles: int,
    start: float = 0.10,
    end: float = 0.02,
    shape: str | Callable[[int, int], float] = "linear",
) -> float:
    """Share of the kept slots that the commit of `cycle` gives to candidates.

    shape: one of `SHAPES` on the way from `start` to `end`, of which "linear" is the published
    r(c) = start - (start - end) * t, or a callable (cycle, n_cycles) -> share in [0, 1], also as "module:function".
    """
    _check_cycle(cycle, n_cycles)
    for name, value in (("start", start), ("end", end)):
        if not (_is_real(value) and 0.0 <= value <= 1.0):
            raise ConfigError(f"amnesty {name}={value!r}; must be a number in [0, 1]")
    shape = import_callable(shape, "amnesty_schedule") if isinstance(shape, str) and ":" in shape else shape
    if not isinstance(shape, str):
        value = shape(cycle, n_cycles)
        if not (_is_real(value) and 0.0 <= value <= 1.0):
            raise ConfigError(f"amnesty_schedule({cycle}, {n_cycles})={value!r}; a share is a number in [0, 1]")
        return float(value)
    if shape not in _SHAPES:
        raise ConfigError(f"amnesty_schedule={shape!r}; use one of {', '.join(SHAPES)}, or a callable")
    share = _SHAPES[shape](_progress(cycle, n_cycles))
    return end if share == 1.0 else start - (start - end) * share


def lr_factor(schedule: str | Callable[[int, int], float], step: int, steps: int) -> float:
    """Factor of theta's learning rate at step `step` (0-based) of a RESU phase of `steps`.

    "constant": 1; "linear": 1 - step / steps; "cosine": (1 + cos(pi * step / steps)) / 2; or a callable (step, steps)
    -> factor >= 0, also as "module:function".
    """
    if isinstance(schedule, str) and ":" in schedule:
        schedule = import_callable(schedule, "theta_schedule")
    if not isinstance(schedule, str):
        factor = schedule(step, steps)
        if not (_is_real(factor) and 0.0 <= factor < math.inf):
            raise ConfigError(f"theta_schedule({step}, {steps})={factor!r}; a factor is a finite number >= 0")
        return float(factor)
    if schedule not in LR_SCHEDULES:
        raise ConfigError(f"theta_schedule={schedule!r}; use one of {', '.join(LR_SCHEDULES)}, or a callable")
    t = min(step / steps, 1.0) if steps else 0.0
    return {"constant": 1.0, "linear": 1.0 - t, "cosine": (1.0 + math.cos(math.pi * t)) / 2.0}[schedule]


def has_work(sparsity: float) -> bool:
    """Whether a cycle at this sparsity prunes anything, so that its stabilize and RESU phases have something to do."""
    return sparsity > 0.0


def _progress(cycle: int, n_cycles: int) -> float:
    return 1.0 if n_cycles == 1 else cycle / (n_cycles - 1)


def _custom(schedule: Callable[[int, int], float] | Sequence[float], cycle: int, n_cycles: int) -> float:
    if callable(schedule):
        return _check_sparsity(f"schedule({cycle}, {n_cycles})", schedule(cycle, n_cycles))
    if not isinstance(schedule, Sequence):
        raise ConfigError(
            f"schedule={schedule!r}; must be one of {', '.join(SCHEDULES)}, a sequence of sparsities, or a callable"
        )
    if len(schedule) != n_cycles:
        raise ConfigError(f"schedule has {len(schedule)} sparsities for {n_cycles} cycles; give one for each cycle")
    return _check_sparsity(f"schedule[{cycle}]", schedule[cycle])


def _check_cycle(cycle: int, n_cycles: int) -> None:
    if n_cycles < 1:
        raise ConfigError(f"n_cycles={n_cycles!r}; must be at least 1")
    if not 0 <= cycle < n_cycles:
        raise ConfigError(f"cycle={cycle!r}; must be in 0..{n_cycles - 1} for a run of {n_cycles} cycles")


def _check_sparsity(name: str, value: float) -> float:
    if not (_is_real(value) and 0.0 <= value < 1.0):
        raise ConfigError(f"{name}={value!r}; a sparsity is a number in [0, 1)")
    return float(value)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
