"""Why a weight became the node that it is, phase by phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from fxresu.passes import Considered

from .errors import ConfigError
from .inspection_data import Inspection, LeftAlone, WeightRow
from .inspection_text import percent, size
from .models import near_matches


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One parameter in several phases.

    Attributes:
        weight: FQN.
        shape: of the parameter.
        left_alone: why it is not managed; empty if it is.
        phases: its consumers by phase.
        trained: by phase, whether the phase has a backward.
    """

    weight: str
    shape: tuple[int, ...]
    left_alone: str
    phases: dict[str, tuple[WeightRow, ...]]
    trained: dict[str, bool]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON, with the candidates as `considered` makes them."""
        data = dataclasses.asdict(self)
        for phase, rows in self.phases.items():
            for row, source in zip(data["phases"][phase], rows):
                row["considered"] = [dataclasses.asdict(c) for c in considered(source)]
        return data

    def __str__(self) -> str:
        head = f"{self.weight}  {'x'.join(map(str, self.shape))}"
        if self.left_alone:
            return f"{head}\nnot managed: {self.left_alone}"
        parts = [_phase(phase, row, self.trained[phase]) for phase, rows in self.phases.items() for row in rows]
        return "\n\n".join([head, *parts])


def explain(found: Iterable[Inspection], name: str) -> Explanation:
    """What became of the parameter `name` in each of the inspections.

    Args:
        name: FQN of the parameter, or of its module, or the end of either if only one fits.

    Raises:
        ConfigError: nothing, or more than one parameter, fits the name.
    """
    inspections = list(found)
    first = inspections[0]
    known: dict[str, WeightRow | LeftAlone] = {row.weight: row for row in first.rows}
    known |= {left.weight: left for left in first.left_alone}
    weight = _resolve(name, list(known), first.model)
    entry = known[weight]
    if isinstance(entry, LeftAlone):
        return Explanation(weight, entry.shape, entry.reason, {}, {})
    phases = {str(p.phase): tuple(r for r in p.rows if r.weight == weight) for p in inspections}
    return Explanation(weight, entry.shape, "", phases, {str(p.phase): p.plan.trains for p in inspections})


def _resolve(name: str, known: Sequence[str], model: str) -> str:
    if name in known:
        return name
    owned = [w for w in known if w.rpartition(".")[0] == name]
    ends = [w for w in known if w.endswith(f".{name}") or w.rpartition(".")[0].endswith(f".{name}")]
    fits = owned or ends
    if len(fits) == 1:
        return fits[0]
    if fits:
        more = ", …" if len(fits) > 4 else ""
        raise ConfigError(f"weight {name!r}: {len(fits)} parameters fit: {', '.join(fits[:4])}{more}; name one")
    hint = near_matches(name, known)
    raise ConfigError(f"weight {name!r}: {model} has no parameter of two or more dimensions by that name{hint}")


def considered(row: WeightRow) -> tuple[Considered, ...]:
    """The ways to execute a consumer that were weighed; the operation itself where there was nothing to choose."""
    return row.considered or (Considered(row.after or "nothing", row.reason, None, row.rewritten),)


def _phase(phase: str, row: WeightRow, trains: bool) -> str:
    if not row.before:
        return f"{phase}: {row.reason}"
    lines = [f"{phase}: {row.before} -> {row.after}" if row.rewritten else f"{phase}: {row.before}, not rewritten"]
    if row.reason:
        lines.append(f"  reason    {row.reason}")
    lines.append(f"  in        {row.module or 'the model itself'}   {row.source}".rstrip())
    if row.steps:
        chain = "; ".join(f"{name} -> {op}" for name, op in row.steps[1:]) or "no pass changed it"
        lines.append(f"  passes    {chain}")
    lines.append(f"  casts     {'; '.join(row.casts) or 'none'}")
    if row.kept is not None and row.kept_plain is not None:
        lines.append(f"  keeps     {_keeps(row.kept_plain, row.kept, trains)}")
    lines.append(f"  executes  {row.executed or '-'}")
    return "\n".join([*lines, _candidates(considered(row))])


def _keeps(plain: int, now: int, trains: bool) -> str:
    """What the node has autograd keep, against the plain model."""
    discarded = f"; {size(plain - now)} discarded ({percent(plain, now)})" if now < plain else ""
    what = f"{size(now)} for the backward" if trains else f"{size(now)}: the phase has no backward"
    return f"{what}; plain, {size(plain)}{discarded}"


def _candidates(found: Sequence[Considered]) -> str:
    lines = [
        [c.name, "chosen" if c.chosen else "", f"{c.microseconds:,.1f} us" if c.microseconds is not None else "-",
         c.reason or "met"]
        for c in found
    ]  # fmt: skip
    number = "one candidate" if len(found) == 1 else f"{len(found)} candidates"
    table = tabulate(lines, [number, "", "measured", "condition"], disable_numparse=True)
    return "\n".join(f"    {line}" for line in table.splitlines())
