"""The chooser: several implementations of one operation, and which of them a problem of one shape runs.

A candidate says by itself whether it can run a problem. Those that can are measured once for every problem and device
(`_measure`, and for graphs `passes/measure_apart`), checked against the first candidate, which is the default, and the
fastest is remembered on disk (`_choice_cache`). Nothing is measured where there is no CUDA device: the default runs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

MARGIN = 0.97
"""A candidate replaces the default if its time is below this share of the default's: less is noise."""

ENVIRONMENT = "FXRESU_KERNELS"
MEASURE = "FXRESU_MEASURE"


class KernelChoiceError(ValueError):
    """A choice of a kernel was forced that does not exist or cannot run."""


class UnmeasuredError(RuntimeError):
    """Candidates could not be measured; the message says why."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What one node of a graph computes, as far as the speed of its candidates depends on it.

    Attributes:
        op: "linear" or "linear_packed".
        mode: gradient mode of the weight (`managed.MODES`).
        rows, K: shape of the weight as a matrix.
        tokens: rows of the input, leading dimensions flattened.
        dtype, weight_dtype: of the product and of the stored weight, as torch names them ("bfloat16").
        layout: of theta: "rows" ([rows, capacity]), "flat" ([1, capacity]), "columns" (a panel), or "" without theta.
        pattern: "2:4" if rows and columns of the mask keep 2 of every 4, else "".
        sparsity: share of pruned coordinates to the nearest 0.05; 0.5 where the graph does not tell.
        values: how packed storage keeps active values: "" (in `weight_dtype`), "int8" or "int4".
        transposed: the product is input @ weight.
        input_grad: a backward computes the gradient of the input.
        graphed: the graph will be replayed by CUDA graphs, so that only time on the device counts.
    """

    op: str
    mode: str
    rows: int
    K: int
    tokens: int
    dtype: str
    weight_dtype: str
    layout: str = ""
    pattern: str = ""
    sparsity: float = 0.5
    values: str = ""
    transposed: bool = False
    input_grad: bool = True
    graphed: bool = False

    @property
    def key(self) -> str:
        """The problem as one line, for cache files."""
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))

    @property
    def trains(self) -> bool:
        """Whether a backward computes a gradient of the weight or of theta."""
        return self.mode != "frozen"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation of an operation.

    Attributes:
        name: unique for the operation; what the operation's argument `how` says.
        supports: why it cannot run a problem on a device, or None if it can.
        run: the operation with the operation's own arguments, without `how`.
    """

    name: str
    supports: Callable[[Problem, torch.device], str | None]
    run: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for a problem, and what was compared.

    Attributes:
        chosen: name of the candidate.
        default: whether that is the first one, which runs when nothing is said.
        reasons: by name, why a candidate cannot run.
        microseconds: by name, the time of one forward and backward; empty if nothing was measured.
        note: how the choice came about.
    """

    chosen: str
    default: bool
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    microseconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""


_REGISTRY: dict[str, dict[str, Candidate]] = {}


def register(
    op: str,
    name: str,
    supports: Callable[[Problem, torch.device], str | None],
    run: Callable[..., Any],
    *,
    default: bool = False,
) -> None:
    """Add a candidate for an operation; `default` puts it in front of those that are there.

    Raises ValueError for a name that is taken.
    """
    known = _REGISTRY.setdefault(op, {})
    if name in known:
        raise ValueError(f"candidate {name!r} of {op} is registered already")
    added = {name: Candidate(name, supports, run)}
    _REGISTRY[op] = {**added, **known} if default else {**known, **added}


def candidates(op: str) -> tuple[Candidate, ...]:
    """Candidates of an operation, the default first; none for an operation that has no choice."""
    return tuple(_REGISTRY.get(op, {}).values())


def names() -> tuple[str, ...]:
    """Names of all candidates of all operations."""
    return tuple(dict.fromkeys(name for known in _REGISTRY.values() for name in known))


def implementation(op: str, how: str) -> Callable[..., Any]:
    """The function that runs `op` as `how` says.

    Raises:
        KernelChoiceError: no candidate of that name.
    """
    known = _REGISTRY.get(op, {})
    if how not in known:
        raise KernelChoiceError(f"how={how!r}: fxresu.{op} has no such candidate; use one of {', '.join(known)}")
    return known[how].run


def parse_override(text: str) -> dict[str, str]:
    """Overrides as the environment gives them: "pattern=name,pattern=name", or "name" for every weight.

    Raises:
        KernelChoiceError: a part is empty on a side.
    """
    found = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        pattern, equals, name = (p.strip() for p in part.rpartition("="))
        if not name or (equals and not pattern):
            raise KernelChoiceError(f"{ENVIRONMENT}={text!r}: {part!r} is not 'name' or 'pattern=name'")
        found[pattern or "*"] = name
    return found


def forced_for(weight: str, overrides: Mapping[str, str]) -> str | None:
    """The candidate that `overrides`, or else the environment, forces for the weight of this FQN; None if none does.

    A pattern is matched against the FQN and against the FQN of its module; the first that matches counts.
    """
    for given in (overrides, parse_override(os.environ.get(ENVIRONMENT, ""))):
        for pattern, name in given.items():
            if fnmatchcase(weight, pattern) or fnmatchcase(weight.rpartition(".")[0], pattern):
                return name
    return None


Measure = Callable[[Problem, torch.device, Sequence[str]], Mapping[str, float | str]]


def measurable(device: torch.device) -> bool:
    """Whether there is a choice to make on this device at all: on a GPU."""
    return device.type == "cuda" and torch.cuda.is_available()


def asked(device: torch.device) -> bool:
    """Whether anything is measured on this device: `FXRESU_MEASURE=1` in the environment."""
    return measurable(device) and os.environ.get(MEASURE, "0") == "1"


def missing(problem: Problem, device: torch.device, forced: str | None = None) -> list[str]:
    """The candidates that `choose` would measure: none if it has nothing to compare, or knows their times."""
    from . import _choice_cache

    able = [c.name for c in candidates(problem.op) if c.supports(problem, device) is None]
    if forced is not None or len(able) < 2 or not asked(device):
        return []
    return [] if _choice_cache.of(device).get(problem.key, able) is not None else able


def remember(problem: Problem, device: torch.device, figures: Mapping[str, float | str]) -> None:
    """Keep measured times on disk, unless the device was out of memory."""
    from . import _choice_cache

    if not any(isinstance(f, str) and "out of memory" in f for f in figures.values()):
        _choice_cache.of(device).put(problem.key, dict(figures))


def _in_place(problem: Problem, device: torch.device, names: Sequence[str]) -> Mapping[str, float | str]:
    from . import _measure

    return _measure.compare(problem, device, names)


def choose(problem: Problem, device: torch.device, forced: str | None = None, measure: Measure = _in_place) -> Choice:
    """Which candidate runs `problem` on `device`.

    Args:
        forced: take this one, measured or not.
        measure: gives times that are not on disk yet. Where it raises UnmeasuredError the default runs, and every other
            candidate's reason says why.

    Raises:
        KernelChoiceError: `forced` is unknown or cannot run; the message says why.
    """
    known = candidates(problem.op)
    reasons = {c.name: why for c in known if (why := c.supports(problem, device)) is not None}
    able = [c.name for c in known if c.name not in reasons]
    if forced is not None:
        implementation(problem.op, forced)
        if forced in reasons:
            raise KernelChoiceError(f"kernel {forced!r} was asked for, but it cannot run here: {reasons[forced]}")
        return Choice(forced, forced == known[0].name, reasons, note="asked for")
    if not able:
        raise KernelChoiceError(f"no candidate of fxresu.{problem.op} can run: {reasons}")
    if not measurable(device):
        where = f"on {device.type}" if device.type != "cuda" else "without a CUDA device"
        return Choice(able[0], able[0] == known[0].name, reasons, note=f"nothing is measured {where}: the default")
    if not asked(device):
        # Off unless asked for: it takes time once, and memory beside the model's while it lasts.
        return Choice(able[0], able[0] == known[0].name, reasons, note=f"not measured without {MEASURE}=1: the default")
    if len(able) == 1:
        return Choice(able[0], able[0] == known[0].name, reasons, note="the only one that can run")
    return _measured(problem, device, able, reasons, known[0].name, measure)


def _measured(
    problem: Problem,
    device: torch.device,
    able: list[str],
    reasons: dict[str, str],
    default: str,
    measure: Measure,
) -> Choice:
    from . import _choice_cache

    figures: Mapping[str, float | str] | None = _choice_cache.of(device).get(problem.key, able)
    if figures is None:
        try:
            figures = measure(problem, device, able)
        except UnmeasuredError as error:
            reasons = reasons | {name: f"not measured: {error}" for name in able[1:]}
            return Choice(able[0], able[0] == default, reasons, note=f"not measured: {error}")
        remember(problem, device, figures)
    times = {n: f for n, f in figures.items() if isinstance(f, float)}
    reasons = reasons | {n: f for n, f in figures.items() if isinstance(f, str)}
    first = able[0]  # nothing replaces what it could not be checked against
    best = min(times, key=times.__getitem__, default=first)
    chosen = best if first in times and times[best] < MARGIN * times[first] else first
    return Choice(chosen, chosen == default, reasons, times, "measured")
