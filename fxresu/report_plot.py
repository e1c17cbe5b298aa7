"""Pictures of a run, drawn with matplotlib: loss, sparsity and memory over the steps, phases shaded."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .report import StepRecord, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "INK", "draw_loss", "draw_memory", "draw_sparsity", "mark_cycles", "phase_legend", "plot", "shade", "step_axis",
    "style",
]  # fmt: skip

# Okabe and Ito's palette, told apart with every common form of colour blindness.
_PHASE_COLOURS = {
    "warmup": "#999999",
    "dense": "#56B4E9",
    "sparse": "#E69F00",
    "resu": "#009E73",
    "predict": "#CC79A7",
    "correct": "#F0E442",
}
_OTHER_COLOURS = ("#0072B2", "#D55E00", "#000000")
INK, _HELD_OUT, _GRID = "#222222", "#D55E00", "#DDDDDD"
_MEMORY = {"allocated": ("#0072B2", 1.6), "RSS": (INK, 1.4), "RSS, highest": ("#888888", 0.8)}  # colour, width


def plot(path: str | os.PathLike[str], history: Sequence[StepRecord], *, title: str | None = None) -> None:
    """PNG of loss, sparsity and memory over the steps, with the phases shaded; written all or nothing.

    Raises ConfigError when there is no step to draw, OSError when the file cannot be written.
    """
    # No pyplot: nothing global changes and no display is needed.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not history:
        raise ConfigError("history=[]: holds no step; record at least one step before plotting")
    figure = Figure(figsize=(10, 6.6), dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
    grid = figure.subplots(3, 1, sharex=True, height_ratios=[3.2, 1, 1])
    loss, sparsity, memory = grid
    for axes in grid:
        style(axes)
        shade(axes, history)
    draw_loss(loss, history)
    draw_sparsity(sparsity, history)
    draw_memory(memory, history)
    mark_cycles(loss, history)
    step_axis(memory, history)
    figure.align_ylabels(list(grid))
    phase_legend(figure, history)
    if title:
        figure.suptitle(title, fontsize=12, color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(Path(path), buffer.getvalue())


def step_axis(axes: Axes, history: Sequence[StepRecord]) -> None:
    """Steps along the x axis, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.set_xlim(history[0].step - 0.5, history[-1].step + 0.5)


def style(axes: Axes) -> None:
    """Quiet lines, a grid behind the values."""
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#888888")
    axes.tick_params(colors=INK, labelsize=9)


def _colours(history: Sequence[StepRecord]) -> dict[str, str]:
    """Colour of each phase that occurs, in the order of the life of a cycle."""
    present = dict.fromkeys(record.phase for record in history)
    known = {phase: colour for phase, colour in _PHASE_COLOURS.items() if phase in present}
    others = [phase for phase in present if phase not in known]
    return known | {phase: _OTHER_COLOURS[i % len(_OTHER_COLOURS)] for i, phase in enumerate(others)}


def _stretches(keys: Sequence[Any], steps: Sequence[int]) -> list[tuple[Any, float, float]]:
    """(key, from, to) of each run of equal neighbours; a run reaches to the start of the next one."""
    starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    edges = [steps[i] - 0.5 for i in starts] + [steps[-1] + 0.5]
    return [(keys[i], edges[j], edges[j + 1]) for j, i in enumerate(starts)]


def shade(axes: Axes, history: Sequence[StepRecord]) -> None:
    """Colour the stretch of each phase."""
    colours = _colours(history)
    for (phase, _), begin, end in _stretches([(r.phase, r.cycle) for r in history], [r.step for r in history]):
        axes.axvspan(begin, end, color=colours[phase], alpha=0.25, linewidth=0, zorder=0)


def _smoothed(values: Sequence[float], span: float) -> list[float]:
    """Mean of the exponential moving averages of both directions, which does not lag behind the values as one does."""
    backward = _averaged(values[::-1], span)[::-1]
    return [(a + b) / 2 for a, b in zip(_averaged(values, span), backward)]


def _averaged(values: Iterable[float], span: float) -> list[float]:
    """Exponential moving average with bias correction; values that are not finite are passed over."""
    decay, average, weight = 1 - 2 / (span + 1), 0.0, 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            average = decay * average + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        out.append(average / weight if weight else math.nan)
    return out


def trend(history: Sequence[StepRecord]) -> list[float]:
    """Smoothed training loss; each phase by itself unless they are many, so that the jump at a prune stays one."""
    losses = [r.loss for r in history]
    span = min(50.0, max(1.0, len(history) / 60))
    starts = [i for i, r in enumerate(history) if i == 0 or r.phase != history[i - 1].phase]
    if len(starts) > 30:
        starts = [0]
    bounds = [*starts, len(history)]
    return [value for i, j in zip(bounds, bounds[1:]) for value in _smoothed(losses[i:j], span)]


def draw_loss(axes: Axes, history: Sequence[StepRecord]) -> None:
    """Training loss with its trend, and held-out losses, on a logarithmic axis."""
    steps, smooth = [r.step for r in history], trend(history)
    held_out = [(r.step, r.held_out) for r in history if r.held_out is not None]
    axes.plot(steps, [r.loss for r in history], color=INK, alpha=0.25, linewidth=0.7)
    axes.plot(steps, smooth, color=INK, linewidth=1.4, label="training (smoothed)", marker=_marker(steps))
    if held_out:
        axes.plot(*zip(*held_out), color=_HELD_OUT, linewidth=0.9, alpha=0.8, zorder=3)
        axes.plot(*zip(*held_out), "o", color=_HELD_OUT, markersize=4.5, label="held-out", zorder=4, clip_on=False)
    shown = [v for v in [*smooth, *(v for _, v in held_out)] if math.isfinite(v) and v > 0]
    if shown:
        _log_scale(axes, min(shown), max(shown))
    axes.set_ylabel("loss (nats)", color=INK)
    axes.legend(loc="upper right", fontsize=9, framealpha=0.9, edgecolor="none")


def _log_scale(axes: Axes, low: float, high: float) -> None:
    """Logarithmic y axis from `low` to `high` with plain numbers at about eight round values, also below a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(low / 1.05, high * 1.1)
    if high / low > 10:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=30))
    elif high / low > 2:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8), numticks=30))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _marker(points: Sequence[Any]) -> str:
    return "o" if len(points) == 1 else ""  # a line of one point is invisible


def draw_sparsity(axes: Axes, history: Sequence[StepRecord]) -> None:
    """Share of pruned weights, over all layers."""
    steps, percent = [r.step for r in history], [100 * r.sparsity for r in history]
    axes.plot(steps, percent, color=INK, linewidth=1.4, drawstyle="steps-mid", marker=_marker(steps))
    axes.set_ylim(-4, 104)
    axes.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    axes.set_ylabel("sparsity", color=INK)


def draw_memory(axes: Axes, history: Sequence[StepRecord]) -> None:
    """The process's resident set, and bytes on the accelerator where there is one."""
    curves = {
        "allocated": [(r.step, r.bytes_allocated) for r in history],
        "RSS": [(r.step, r.rss) for r in history],
        "RSS, highest": [(r.step, r.rss_peak) for r in history],
    }
    known = {name: [(x, y) for x, y in points if y is not None] for name, points in curves.items()}
    known = {name: points for name, points in known.items() if points}
    if not known:
        axes.text(0.5, 0.5, "memory was not recorded", transform=axes.transAxes, ha="center", va="center", color=INK)
        axes.set_yticks([])
        return
    peak = max(size for points in known.values() for _, size in points)
    unit, name = (1e9, "GB") if peak >= 1e9 else (1e6, "MB")
    for label, points in known.items():
        colour, width = _MEMORY[label]
        axes.plot([x for x, _ in points], [y / unit for _, y in points], color=colour, linewidth=width, label=label,
                  marker=_marker(points))  # fmt: skip
    axes.set_ylim(0, 1.25 * peak / unit)
    axes.locator_params(axis="y", nbins=4)
    axes.set_ylabel(f"{'memory' if len(known) > 1 else next(iter(known))} ({name})", color=INK)
    if len(known) > 1:
        axes.legend(loc="lower right", fontsize=8, framealpha=0.9, edgecolor="none", ncols=len(known))


def mark_cycles(axes: Axes, history: Sequence[StepRecord]) -> None:
    """Number the cycles above the axes and draw their bounds, if they are few."""
    cycles = _stretches([r.cycle for r in history], [r.step for r in history])
    if not 1 < len(cycles) <= 12:
        return
    for cycle, begin, end in cycles:
        middle = (begin + end) / 2
        axes.text(
            middle,
            1.01,
            f"cycle {cycle}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
        )
        if begin > history[0].step:
            for panel in axes.figure.axes:
                panel.axvline(begin, color="#666666", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)


def phase_legend(figure: Figure, history: Sequence[StepRecord]) -> None:
    """What the shades mean."""
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, alpha=0.4, label=phase) for phase, colour in _colours(history).items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=9, frameon=False)
