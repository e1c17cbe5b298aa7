"""A memory bill as a picture: a stacked bar for every phase and transition, and the budget as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .memory_bill import CACHE, MemoryBill
from .report_plot import INK
from .sizes import size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    "managed weights": "#1f4e8c", "compute copies": "#4f83c4", "masks": "#9cc1e8", "θ": "#0b6b50",
    "θ moments": "#3da584", "θ gradient": "#a3dcc4", "other parameters": "#6c7480", "buffers": "#a6adb7",
    "gradients": "#d98a2b", "optimizer state, managed": "#8c3a52", "optimizer state, other": "#c98598",
    "batch": "#d9d9d9", "activations": "#e9c46a", "temporaries": "#7b6fb0", "overhead": "#c9ccd1",
    "activations, gradients, temporaries": "#e9c46a", "moments on their way": "#b0647c", CACHE: "#b9b2d6",
    "context and libraries": "#c9ccd1", "held-out batches": "#e8e8e8", "interpreter, libraries, files": "#e4e6ea",
}  # fmt: skip


def draw_bill(path: str | Path, bill: MemoryBill, title: str = "") -> None:
    """Write the picture; the suffix of `path` says in what format.

    Raises:
        OSError: it cannot be written.
        ValueError: a format that matplotlib does not have.
    """
    draw_bills(path, [bill], [title or f"{bill.model}: predicted memory on {bill.device}"])


def draw_bills(path: str | Path, bills: Sequence[MemoryBill], titles: Sequence[str]) -> None:
    """Several bills below one another, with one legend."""
    from matplotlib.figure import Figure

    wide = max(7.5, 1.7 + 0.95 * max(len(b.stages) for b in bills)) + 2.3
    figure = Figure(figsize=(wide, 0.4 + 3.9 * len(bills)), layout="constrained")
    draw_stages(figure, bills, titles)
    figure.savefig(path, dpi=130)


def draw_stages(figure: Figure, bills: Sequence[MemoryBill], titles: Sequence[str]) -> None:
    """The same into a figure, which should have a layout engine that leaves room for the legend."""
    from matplotlib.patches import Patch

    panels = figure.subplots(len(bills), 1, squeeze=False)[:, 0]
    names: dict[str, None] = {}
    for axes, bill, title in zip(panels, bills, titles):
        names |= dict.fromkeys(_draw(axes, bill, title))
    shown = [n for n in _COLOURS if n in names] + [n for n in names if n not in _COLOURS]
    patches = [Patch(facecolor=_COLOURS.get(n, "#333333"), label=n) for n in reversed(shown)]
    figure.legend(handles=patches, loc="outside right upper", fontsize=9, frameon=False)


def _draw(axes: Axes, bill: MemoryBill, title: str) -> list[str]:
    """One panel; the components that it shows."""
    # On a CPU what was measured in a run is the whole process, interpreter and libraries included.
    process = bill.device == "cpu" and any(s.measured_host for s in bill.stages)
    measured = [s.measured_host if process else s.measured for s in bill.stages]
    totals = [bill.process_total(s) if process else bill.total(s) for s in bill.stages]
    top = max([*totals, *([bill.budget] if bill.budget else []), *(m or 0 for m in measured)])
    unit, name = (1e9, "GB") if top >= 1e9 else (1e6, "MB")
    at = range(len(bill.stages))
    bottom = [0.0] * len(bill.stages)
    layers = [(c, [s.parts.get(c, 0) for s in bill.stages]) for c in bill.components]
    if any(bill.overhead.values()):
        layers.insert(0, ("overhead", [sum(bill.overhead.values())] * len(bill.stages)))
    if any(s.cached for s in bill.stages):
        layers.append((CACHE, [s.cached for s in bill.stages]))
    if process:
        layers.insert(0, ("interpreter, libraries, files", [bill.host_total(s) for s in bill.stages]))
    shown = []
    for label, sizes in layers:
        if max(sizes) < 0.002 * top:
            continue
        shown.append(label)
        colour = _COLOURS.get(label, "#333333")
        hatch = ["" if not s.transition else "////" for s in bill.stages]
        heights = [size / unit for size in sizes]
        axes.bar(at, heights, 0.72, bottom=bottom, color=colour, edgecolor="white", linewidth=0.5, hatch=hatch)
        bottom = [b + h for b, h in zip(bottom, heights)]
    for i, stage in enumerate(bill.stages):
        over = bill.budget is not None and bill.needed(stage) > bill.budget
        text = f"{totals[i] / unit:.3g}"
        above = max(bottom[i], (measured[i] or 0) / unit) + 0.012 * top / unit
        axes.text(i, above, text, ha="center", va="bottom", fontsize=9, zorder=4,
                  bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
                  color="#b3202a" if over else INK, fontweight="bold" if over else "normal")  # fmt: skip
        if (height := measured[i]) is not None:
            axes.plot([i - 0.36, i + 0.36], [height / unit] * 2, color="black", linewidth=1.6)
    if bill.budget is not None:
        axes.axhline(bill.budget / unit, color="#b3202a", linewidth=1.2, linestyle=(0, (5, 3)))
        axes.text(len(bill.stages) - 0.42, bill.budget / unit, f"budget {size_text(bill.budget)} ", color="#b3202a",
                  fontsize=9, ha="right", va="bottom")  # fmt: skip
    axes.set_xticks(list(at), [s.name.replace(" ", "\n") for s in bill.stages], fontsize=9)
    axes.set_xlim(-0.6, len(bill.stages) - 0.4)
    axes.set_ylim(0, 1.13 * top / unit)
    axes.set_ylabel(f"{name} (10^{9 if name == 'GB' else 6} bytes)", color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    notes = ["hatched: a transition, which takes no step"] if any(s.transition for s in bill.stages) else []
    if any(m is not None for m in measured):
        notes.append("black line: measured")
    axes.set_xlabel("; ".join(notes), fontsize=9, color="#5b6472", loc="right")
    return shown
