"""The memory bill: bytes by component for every phase and transition, as data, table and notebook view."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from .html_page import escape
from .sizes import size_text

# What a bill lists, in its order; what is nowhere is left out.
_ORDER = (
    "managed weights", "compute copies", "masks", "θ", "θ moments", "θ gradient", "other parameters", "buffers",
    "gradients", "optimizer state, managed", "optimizer state, other", "batch", "activations", "temporaries",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StageBill:
    """One phase, or one transition between two.

    Attributes:
        name: see `memory_stages.STAGES`.
        transition: whether it takes no step.
        parts: bytes on the device by component, at the stage's highest point.
        when: what happens there: the part of a step.
        host: bytes that the stage needs in host memory, by component.
        measured: bytes of tensors at the highest point as measured; None if they were not.
        measured_device: of the whole device, on a GPU.
    """

    name: str
    transition: bool
    parts: Mapping[str, int]
    when: str = ""
    host: Mapping[str, int] = dataclasses.field(default_factory=dict)
    measured: int | None = None
    measured_device: int | None = None

    @property
    def tensors(self) -> int:
        """Bytes of tensors, predicted."""
        return sum(self.parts.values())

    @property
    def unaccounted(self) -> int | None:
        """Measured less predicted; None where nothing was measured."""
        return None if self.measured is None else self.measured - self.tensors

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found = dataclasses.asdict(self)
        found |= {"parts": dict(self.parts), "host": dict(self.host)}
        return found | {"tensors": self.tensors, "unaccounted": self.unaccounted}


@dataclasses.dataclass(frozen=True)
class MemoryBill:
    """What training of a model takes, predicted from shapes.

    Attributes:
        model: its name.
        device: "cpu" or "cuda".
        settings: what it was predicted for.
        stages: phases and transitions in the order of a run.
        overhead: bytes on the device beside tensors, by name: context, libraries' workspaces, allocator.
        host: bytes in host memory in every stage, by name.
        budget: bytes that all stages must keep to; None for none.
        seconds: that the prediction took.
    """

    model: str
    device: str
    settings: Mapping[str, Any]
    stages: tuple[StageBill, ...]
    overhead: Mapping[str, int]
    host: Mapping[str, int]
    budget: int | None = None
    seconds: float = 0.0

    def __getitem__(self, name: str) -> StageBill:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"stage {name!r}: the bill has {', '.join(s.name for s in self.stages)}")

    def total(self, stage: StageBill) -> int:
        """Predicted bytes on the device in a stage, overhead included."""
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
        """Stages that take more than the budget."""
        return tuple(s.name for s in self.stages if self.budget is not None and self.total(s) > self.budget)

    def host_total(self, stage: StageBill) -> int:
        """Predicted bytes in host memory in a stage."""
        return sum(self.host.values()) + sum(stage.host.values())

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that are there, in the order of the bill."""
        there = {n for s in self.stages for n, size in s.parts.items() if size}
        return tuple(n for n in _ORDER if n in there) + tuple(sorted(there - set(_ORDER)))

    def rows(self) -> list[tuple[str, list[int | None]]]:
        """(name, bytes in every stage) of components, overhead, totals and measurements."""
        rows: list[tuple[str, list[int | None]]] = [
            (name, [s.parts.get(name, 0) for s in self.stages]) for name in self.components
        ]
        rows += [(name, [size] * len(self.stages)) for name, size in self.overhead.items() if size]
        rows.append(("predicted", [self.total(s) for s in self.stages]))
        extra = sum(self.overhead.values())
        if any(s.measured is not None for s in self.stages):
            rows.append(("measured, tensors", [s.measured for s in self.stages]))
            rows.append(("unaccounted", [s.unaccounted for s in self.stages]))
        if any(s.measured_device is not None for s in self.stages):
            rows.append(("measured, whole device", [s.measured_device for s in self.stages]))
            rows.append(
                (
                    "unaccounted, whole device",
                    [None if s.measured_device is None else s.measured_device - s.tensors - extra for s in self.stages],
                )
            )
        if self.device != "cpu" or any(self.host_total(s) for s in self.stages):
            rows.append(("host memory", [self.host_total(s) for s in self.stages]))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; sizes in bytes."""
        return {
            "version": 1,
            "model": self.model,
            "device": self.device,
            "settings": dict(self.settings),
            "stages": [s.to_dict() | {"total": self.total(s)} for s in self.stages],
            "overhead": dict(self.overhead),
            "host": dict(self.host),
            "peak": self.peak,
            "peak_stage": self.peak_stage,
            "budget": self.budget,
            "over_budget": list(self.over_budget),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        unit, name = (1e9, "GB") if self.peak >= 1e10 else (1e6, "MB")
        head = [f"{name} (10^{9 if name == 'GB' else 6} bytes)", *(s.name for s in self.stages)]
        body = [[label, *(_cell(v, unit) for v in values)] for label, values in self.rows()]
        if any(s.measured for s in self.stages):
            at = next(i for i, row in enumerate(body) if row[0] == "unaccounted")
            shares = [
                "" if s.measured is None or s.unaccounted is None else f"{s.unaccounted / s.measured:+.1%}"
                for s in self.stages
            ]
            body.insert(at + 1, ["  of measured", *shares])
        table = tabulate(
            body, head, tablefmt="simple", disable_numparse=True, colalign=["left", *["right"] * len(self.stages)]
        ).splitlines()
        rule = table[1]
        at = next(i for i, row in enumerate(body) if row[0] == "predicted")
        table.insert(2 + at, rule)
        return "\n".join([*self._head(), "", *table, *self._verdict()])

    def _head(self) -> list[str]:
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items() if v not in (None, "", False))
        return [f"{self.model} on {self.device}: {settings}"]

    def _verdict(self) -> list[str]:
        lines = ["", f"highest: {size_text(self.peak)} in {self.peak_stage}"]
        if self.budget is not None:
            over = ", ".join(f"{n} by {size_text(self.total(self[n]) - self.budget)}" for n in self.over_budget)
            lines.append(f"budget {size_text(self.budget)}: " + (f"exceeded in {over}" if over else "every stage fits"))
        return lines

    def _repr_html_(self) -> str:
        cells = "".join(f"<th>{escape(s.name)}</th>" for s in self.stages)
        rows = "".join(
            f"<tr><td>{escape(label)}</td>" + "".join(f"<td>{_cell(v, 1e6)}</td>" for v in values) + "</tr>"
            for label, values in self.rows()
        )
        verdict = " ".join(self._verdict()).strip()
        return (
            f"<p>{escape(self._head()[0])}</p><table><tr><th>MB</th>{cells}</tr>{rows}</table><p>{escape(verdict)}</p>"
        )


def _cell(value: int | None, unit: float) -> str:
    if value is None:
        return "-"
    if value == 0:
        return "0"
    shown = value / unit
    return f"{shown:,.2f}" if unit == 1e9 or abs(shown) < 10 else f"{shown:,.1f}"
