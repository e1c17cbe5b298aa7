"""The memory bill: bytes by component for every phase and transition, as data, table and notebook view.

`fxresu memory` fills it before anything is allocated; a run's report holds the same bill against what was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from .html_page import escape
from .sizes import size_text

TRANSITIONS = ("prune", "start RESU", "commit", "drop masks")
STAGES = ("dense", "prune", "sparse", "start RESU", "resu", "predict", "correct", "commit", "drop masks")
"""In the order of a run. Warm-up is like dense; "drop masks" is the way from RESU back to dense weights."""

COMPONENTS = (
    "managed weights", "compute copies", "masks", "θ", "θ moments", "θ gradient", "other parameters", "buffers",
    "gradients", "optimizer state, managed", "optimizer state, other",
)  # fmt: skip
"""Tensors that a model and its training keep, in the order of a bill."""

# What a bill lists, in its order; what is nowhere is left out.
_ORDER = (
    *COMPONENTS, "moments", "moments on their way", "optimizer state, coming back", "batch", "held-out batches",
    "activations", "temporaries",
)  # fmt: skip

WORKSPACE = "cuBLAS workspace"
"""The overhead that comes from torch's allocator, so that it is among the tensors that are measured."""

CACHE = "allocator's cache"
"""What torch's allocator holds of the device beside tensors, with expandable segments."""

Row = tuple[str, list[int | None]]


@dataclasses.dataclass(frozen=True)
class StageBill:
    """One phase, or one transition between two.

    Attributes:
        name: out of `STAGES`.
        transition: whether it takes no step.
        parts: bytes on the device by component, at the stage's highest point.
        when: what happens there: the part of a step.
        host: bytes that the stage needs in host memory, by component; not the tensors of a run on a CPU.
        measured: bytes of tensors at the highest point as measured; None if they were not.
        measured_device: of the whole device, on a GPU.
        measured_host: of the whole process, as the operating system counts its resident set.
        measured_cached: of `measured_device`, what torch's allocator held beside tensors: its cache, and gaps.
        cached: the same, predicted.
    """

    name: str
    transition: bool
    parts: Mapping[str, int]
    when: str = ""
    host: Mapping[str, int] = dataclasses.field(default_factory=dict)
    measured: int | None = None
    measured_device: int | None = None
    measured_host: int | None = None
    measured_cached: int | None = None
    cached: int = 0

    @property
    def tensors(self) -> int:
        """Bytes of tensors, predicted."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found = dataclasses.asdict(self)
        return found | {"parts": dict(self.parts), "host": dict(self.host), "tensors": self.tensors}


@dataclasses.dataclass(frozen=True)
class MemoryBill:
    """What training of a model takes.

    Attributes:
        model: its name.
        device: "cpu" or "cuda".
        settings: what it was predicted for.
        stages: phases and transitions in the order of a run.
        overhead: bytes on the device beside tensors that are there in every stage, by name: context, libraries'
            workspaces.
        host: bytes in host memory in every stage, by name.
        budget: bytes that all stages must keep to; None for none.
        seconds: that the prediction took.
        basis: "predicted" from shapes, or "counted": tensors as they were there at the end of each stage, which knows
            no temporaries.
    """

    model: str
    device: str
    settings: Mapping[str, Any]
    stages: tuple[StageBill, ...]
    overhead: Mapping[str, int]
    host: Mapping[str, int]
    budget: int | None = None
    seconds: float = 0.0
    basis: str = "predicted"

    def __getitem__(self, name: str) -> StageBill:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"stage {name!r}: the bill has {', '.join(s.name for s in self.stages)}")

    def total(self, stage: StageBill) -> int:
        """Predicted bytes on the device in a stage, overhead and the allocator's cache included."""
        return self.needed(stage) + stage.cached

    def needed(self, stage: StageBill) -> int:
        """Of these, what a stage cannot do without. The allocator gives its cache back before it runs out of memory,
        so that this is what a budget is held against; gaps within pages that are in use stay."""
        return stage.tensors + sum(self.overhead.values())

    @property
    def peak(self) -> int:
        """The highest of all stages, overhead included."""
        return max(self.total(s) for s in self.stages)

    @property
    def peak_stage(self) -> str:
        """The stage that has it."""
        return max(self.stages, key=self.total).name

    @property
    def over_budget(self) -> tuple[str, ...]:
        """Stages that need more than the budget."""
        return tuple(s.name for s in self.stages if self.budget is not None and self.needed(s) > self.budget)

    def host_total(self, stage: StageBill) -> int:
        """Predicted bytes in host memory in a stage."""
        return sum(self.host.values()) + sum(stage.host.values())

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that are there, in the order of the bill."""
        there = {n for s in self.stages for n, size in s.parts.items() if size}
        return tuple(n for n in _ORDER if n in there) + tuple(sorted(there - set(_ORDER)))

    def process_total(self, stage: StageBill) -> int:
        """Bytes that the process holds in host memory in a stage; on a CPU its tensors are among them."""
        return self.host_total(stage) + (self.total(stage) if self.device == "cpu" else 0)

    def unaccounted(self, stage: StageBill) -> int | None:
        """Of tensors: measured less predicted; None where they were not measured."""
        if stage.measured is None:
            return None
        return stage.measured - stage.tensors - self.overhead.get(WORKSPACE, 0)

    def unaccounted_device(self, stage: StageBill) -> int | None:
        """Of the whole device; None where it was not measured."""
        return None if stage.measured_device is None else stage.measured_device - self.total(stage)

    def unaccounted_host(self, stage: StageBill) -> int | None:
        """Of the whole process in host memory; None where it was not measured."""
        return None if stage.measured_host is None else stage.measured_host - self.process_total(stage)

    def sections(self) -> list[list[Row]]:
        """The table's rows in groups: components, their totals against what was measured, and the same for the host."""
        stages = self.stages
        parts: list[Row] = [(name, [s.parts.get(name, 0) for s in stages]) for name in self.components]
        parts += [(name, [size] * len(stages)) for name, size in self.overhead.items() if size]
        parts += [(CACHE, [s.cached for s in stages])] if any(s.cached for s in stages) else []
        totals: list[Row] = [(self.basis, [self.total(s) for s in stages])]
        for label, shown, rest in (
            ("tensors", [s.measured for s in stages], [self.unaccounted(s) for s in stages]),
            ("whole device", [s.measured_device for s in stages], [self.unaccounted_device(s) for s in stages]),
        ):
            totals += _against(f"measured, {label}", shown, "unaccounted" + ", device" * (label != "tensors"), rest)
        cached = [s.measured_cached for s in stages]
        totals += [(f"of it the {CACHE}", cached)] if any(c is not None for c in cached) else []
        names = {**self.host, **{n: 0 for s in stages for n in s.host}}
        host: list[Row] = [(n, [self.host.get(n, 0) + s.host.get(n, 0) for s in stages]) for n in names]
        host = [(name, sizes) for name, sizes in host if any(sizes)]
        measured = [s.measured_host for s in stages]
        if not host and not any(measured):
            return [parts, totals]
        where = "whole process" if self.device == "cpu" else "host memory"
        process: list[Row] = [(f"{where}, {self.basis}", [self.process_total(s) for s in stages])]
        process += _against(
            f"{where}, measured", measured, "unaccounted, host", [self.unaccounted_host(s) for s in stages]
        )
        return [parts, totals, host, process]

    def rows(self) -> list[Row]:
        """(name, bytes in every stage) of everything that the table shows."""
        return [row for section in self.sections() for row in section]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; sizes in bytes."""
        return {
            "version": 1,
            "model": self.model,
            "device": self.device,
            "settings": dict(self.settings),
            "stages": [self._stage(s) for s in self.stages],
            "overhead": dict(self.overhead),
            "host": dict(self.host),
            "peak": self.peak,
            "peak_stage": self.peak_stage,
            "budget": self.budget,
            "over_budget": list(self.over_budget),
            "seconds": self.seconds,
            "basis": self.basis,
        }

    def _stage(self, stage: StageBill) -> dict[str, Any]:
        return stage.to_dict() | {
            "total": self.total(stage),
            "needed": self.needed(stage),
            "process": self.process_total(stage),
            "unaccounted": self.unaccounted(stage),
            "unaccounted_device": self.unaccounted_device(stage),
            "unaccounted_host": self.unaccounted_host(stage),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryBill:
        """The bill that `to_dict` gave, or a file of `fxresu memory --json`."""
        known = {f.name for f in dataclasses.fields(StageBill)}
        stages = tuple(StageBill(**{k: v for k, v in stage.items() if k in known}) for stage in data["stages"])
        own = {f.name for f in dataclasses.fields(cls)} - {"stages"}
        return cls(stages=stages, **{k: v for k, v in data.items() if k in own})

    def __str__(self) -> str:
        head, *body = self.cells()
        table = tabulate(
            body, head, tablefmt="simple", disable_numparse=True, colalign=["left", *["right"] * len(self.stages)]
        ).splitlines()
        rule, at = table[1], 2
        for section in self._texts()[:-1]:
            at += len(section)
            table.insert(at, rule)
            at += 1
        return "\n".join([*self._head(), "", *table, "", *self.notes()])

    def cells(self) -> list[list[str]]:
        """The table as text: its head, then its lines."""
        name = self._unit[1]
        head = [f"{name} (10^{9 if name == 'GB' else 6} bytes)", *(s.name for s in self.stages)]
        return [head, *(line for section in self._texts() for line in section)]

    @property
    def _unit(self) -> tuple[float, str]:
        return (1e9, "GB") if self.peak >= 1e10 else (1e6, "MB")

    def _texts(self) -> list[list[list[str]]]:
        return [self._shown(section, self._unit[0]) for section in self.sections() if section]

    def _shown(self, section: list[Row], unit: float) -> list[list[str]]:
        """The section's cells; what is unaccounted also as a share of what was measured in the row above it."""
        lines, above = [], [None] * len(self.stages)
        for label, values in section:
            lines.append([label, *(_cell(v, unit) for v in values)])
            if label.startswith("unaccounted"):
                shares = ["" if not m or v is None else f"{v / m:+.1%}" for v, m in zip(values, above)]
                lines.append(["share of measured", *shares])
            above = values  # type: ignore[assignment]
        return lines

    def _head(self) -> list[str]:
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items() if v not in (None, "", False))
        return [f"{self.model} on {self.device}" + (f": {settings}" if settings else "")]

    def notes(self) -> list[str]:
        """What the table says, in sentences."""
        lines = [f"highest: {size_text(self.peak)} in {self.peak_stage}"]
        if self.basis != "predicted":
            lines[0] += " (counted between steps: activations and temporaries are unaccounted)"
        if self.budget is not None:
            over = ", ".join(f"{n} by {size_text(self.needed(self[n]) - self.budget)}" for n in self.over_budget)
            told = f"exceeded in {over}" if over else "every stage fits"
            told += f", without the {CACHE}, which it gives back" * any(s.cached for s in self.stages)
            lines.append(f"budget {size_text(self.budget)}: {told}")
        return lines

    def _repr_html_(self) -> str:
        head, *body = self.cells()
        cells = "".join(f"<th>{escape(text)}</th>" for text in head)
        rows = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in body)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes())
        return f"<p>{escape(self._head()[0])}</p><table><tr>{cells}</tr>{rows}</table>{notes}"


def _against(label: str, measured: list[int | None], rest: str, unaccounted: list[int | None]) -> list[Row]:
    """The two rows of a measurement, where there is one."""
    return [(label, measured), (rest, unaccounted)] if any(m is not None for m in measured) else []


def _cell(value: int | None, unit: float) -> str:
    if value is None:
        return "-"
    if value == 0:
        return "0"
    shown = value / unit
    return f"{shown:,.2f}" if unit == 1e9 or abs(shown) < 10 else f"{shown:,.1f}"
