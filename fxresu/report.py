"""The end of a run: a table of the phases, a memory bill that adds up, `report.json`, and one picture."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from .errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MemoryRow", "PhaseRow", "StepRecord", "memory_table", "phase_table", "plot", "write_report"]


@dataclass(frozen=True)
class StepRecord:
    """One training step. Losses in nats per token, `sparsity` as the share of managed weights outside the mask, memory
    in bytes: `bytes_allocated` on the accelerator or `rss` (resident set) on a CPU."""

    step: int
    phase: str
    cycle: int
    loss: float
    sparsity: float
    held_out: float | None = None
    bytes_allocated: int | None = None
    rss: int | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class PhaseRow:
    """One phase of one cycle. None means "does not apply", as the losses of a commit, which takes no step.

    `resurrected` and `kept` count the candidates that a commit made active and the active weights that it left active.
    """

    phase: str
    cycle: int
    steps: int
    loss_first: float | None = None
    loss_last: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    tokens_per_s: float | None = None
    sparsity: float | None = None
    resurrected: int | None = None
    kept: int | None = None


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one component at the moment of the peak."""

    component: str
    bytes: int


# --------------------------------------------------------------------------------------------------------------- tables


def phase_table(rows: Sequence[PhaseRow]) -> str:
    """One line for each phase of each cycle, in the order given."""
    headers = ["cycle", "phase", "steps", "loss", "held-out", "tokens/s", "sparsity", "resurrected", "kept"]
    body = [
        [
            row.cycle,
            row.phase,
            f"{row.steps:,}",
            _change(row.loss_first, row.loss_last),
            _change(row.held_out_before, row.held_out_after),
            _number(row.tokens_per_s, ",.0f"),
            _number(row.sparsity, ".1%"),
            _number(row.resurrected, ",d"),
            _number(row.kept, ",d"),
        ]
        for row in rows
    ]
    align = ["right", "left", *["right"] * 7]
    return tabulate(body, headers, tablefmt="simple", disable_numparse=True, colalign=align if body else None)


def memory_table(rows: Sequence[MemoryRow], *, peak_bytes: int, peak_name: str = "measured peak") -> str:
    """Components against the measured peak, in MB (10^6 bytes), largest first, with what no component explains.

    "unaccounted" is the peak minus the components; it is negative when components were counted that were not all alive
    at the peak.
    """
    ordered = sorted(rows, key=lambda row: -row.bytes)
    accounted = sum(row.bytes for row in ordered)
    lines = [(row.component, row.bytes) for row in ordered]
    totals = [("accounted", accounted), ("unaccounted", peak_bytes - accounted), (peak_name, peak_bytes)]

    def cells(name: str, size: int) -> list[str]:
        return [name, f"{size / 1e6:,.1f}", f"{size / peak_bytes:.1%}" if peak_bytes > 0 else "-"]

    table = tabulate(
        [cells(*line) for line in lines + totals],
        ["component", "MB", "of peak"],
        tablefmt="simple",
        disable_numparse=True,
        colalign=["left", "right", "right"],
    ).splitlines()
    rule = table[1]
    return "\n".join([*table[: len(table) - 3], rule, *table[len(table) - 3 :]])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None and after is None else f"{_number(before, '.3f')} -> {_number(after, '.3f')}"


# ----------------------------------------------------------------------------------------------------------------- JSON


def write_report(
    path: str | os.PathLike[str],
    *,
    phases: Sequence[PhaseRow],
    history: Sequence[StepRecord],
    memory: Sequence[MemoryRow],
    peak_bytes: int,
    info: dict[str, Any] | None = None,
) -> None:
    """Write everything as JSON, all or nothing. Numbers that JSON lacks (nan, inf) become null.

    Keys: `info` (as given: configuration, versions, machine), `phases`, `history` (lists of the records' fields), and
    `memory` with `components`, `accounted_bytes`, `unaccounted_bytes`, `peak_bytes`.
    """
    accounted = sum(row.bytes for row in memory)
    report = {
        "version": 1,
        "info": info or {},
        "phases": [asdict(row) for row in phases],
        "memory": {
            "components": [asdict(row) for row in memory],
            "accounted_bytes": accounted,
            "unaccounted_bytes": peak_bytes - accounted,
            "peak_bytes": peak_bytes,
        },
        "history": [asdict(record) for record in history],
    }
    _write_whole(Path(path), (json.dumps(_finite(report), indent=1, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a run that dies here, sees the old content or the new one."""
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(work, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; give a writable folder with free space", str(path)) from error
    finally:
        work.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- picture

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
_INK, _HELD_OUT, _GRID = "#222222", "#D55E00", "#DDDDDD"


def plot(path: str | os.PathLike[str], history: Sequence[StepRecord], *, title: str | None = None) -> None:
    """PNG of loss, sparsity and memory over the steps, with the phases shaded; written all or nothing.

    Raises ConfigError when there is no step to draw, OSError when the file cannot be written.
    """
    # No pyplot: nothing global changes and no display is needed.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    if not history:
        raise ConfigError("history=[]: holds no step; record at least one step before plotting")
    figure = Figure(figsize=(10, 6.6), dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
    grid = figure.subplots(3, 1, sharex=True, height_ratios=[3.2, 1, 1])
    loss, sparsity, memory = grid
    for axes in grid:
        _style(axes)
        _shade(axes, history)
    _draw_loss(loss, history)
    _draw_sparsity(sparsity, history)
    _draw_memory(memory, history)
    _mark_cycles(loss, history)
    memory.set_xlabel("step", color=_INK)
    memory.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    memory.set_xlim(history[0].step - 0.5, history[-1].step + 0.5)
    figure.align_ylabels(list(grid))
    _phase_legend(figure, history)
    if title:
        figure.suptitle(title, fontsize=12, color=_INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    _write_whole(Path(path), buffer.getvalue())


def _style(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#888888")
    axes.tick_params(colors=_INK, labelsize=9)


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


def _shade(axes: Axes, history: Sequence[StepRecord]) -> None:
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


def _trend(history: Sequence[StepRecord]) -> list[float]:
    """Smoothed training loss; each phase by itself unless they are many, so that the jump at a prune stays one."""
    losses = [r.loss for r in history]
    span = min(50.0, max(1.0, len(history) / 60))
    starts = [i for i, r in enumerate(history) if i == 0 or r.phase != history[i - 1].phase]
    if len(starts) > 30:
        starts = [0]
    bounds = [*starts, len(history)]
    return [value for i, j in zip(bounds, bounds[1:]) for value in _smoothed(losses[i:j], span)]


def _draw_loss(axes: Axes, history: Sequence[StepRecord]) -> None:
    steps, smooth = [r.step for r in history], _trend(history)
    held_out = [(r.step, r.held_out) for r in history if r.held_out is not None]
    axes.plot(steps, [r.loss for r in history], color=_INK, alpha=0.25, linewidth=0.7)
    axes.plot(steps, smooth, color=_INK, linewidth=1.4, label="training (smoothed)", marker=_marker(steps))
    if held_out:
        axes.plot(*zip(*held_out), color=_HELD_OUT, linewidth=0.9, alpha=0.8, zorder=3)
        axes.plot(*zip(*held_out), "o", color=_HELD_OUT, markersize=4.5, label="held-out", zorder=4, clip_on=False)
    shown = [v for v in [*smooth, *(v for _, v in held_out)] if math.isfinite(v) and v > 0]
    if shown:
        _log_scale(axes, min(shown), max(shown))
    axes.set_ylabel("loss (nats)", color=_INK)
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


def _draw_sparsity(axes: Axes, history: Sequence[StepRecord]) -> None:
    steps, percent = [r.step for r in history], [100 * r.sparsity for r in history]
    axes.plot(steps, percent, color=_INK, linewidth=1.4, drawstyle="steps-mid", marker=_marker(steps))
    axes.set_ylim(-4, 104)
    axes.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    axes.set_ylabel("sparsity", color=_INK)


def _draw_memory(axes: Axes, history: Sequence[StepRecord]) -> None:
    on_device = any(r.bytes_allocated is not None for r in history)
    points = [(r.step, r.bytes_allocated if on_device else r.rss) for r in history]
    known = [(step, size) for step, size in points if size is not None]
    if not known:
        axes.text(0.5, 0.5, "memory was not recorded", transform=axes.transAxes, ha="center", va="center", color=_INK)
        axes.set_yticks([])
        return
    peak = max(size for _, size in known)
    unit, name = (1e9, "GB") if peak >= 1e9 else (1e6, "MB")
    axes.plot([s for s, _ in known], [b / unit for _, b in known], color=_INK, linewidth=1.4, marker=_marker(known))
    axes.set_ylim(0, 1.25 * peak / unit)
    axes.locator_params(axis="y", nbins=4)
    axes.set_ylabel(f"{'allocated' if on_device else 'RSS'} ({name})", color=_INK)


def _mark_cycles(axes: Axes, history: Sequence[StepRecord]) -> None:
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
            color=_INK,
        )
        if begin > history[0].step:
            for panel in axes.figure.axes:
                panel.axvline(begin, color="#666666", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)


def _phase_legend(figure: Figure, history: Sequence[StepRecord]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, alpha=0.4, label=phase) for phase, colour in _colours(history).items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=9, frameon=False)
