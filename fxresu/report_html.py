"""`report.html`: a run on one page that needs no network: loss, sparsity by layer, churn, memory, and the tables."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .html_page import escape, page
from .memory_bill import MemoryBill
from .memory_plot import draw_stages
from .report import PhaseRow, phase_table, write_report, write_whole
from .report_plot import INK, draw_loss, draw_memory, mark_cycles, phase_legend, plot, shade, step_axis, style
from .run_record import LayerState, RunRecord, read_log
from .sizes import size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["report_page", "write_reports"]

_STYLE = """
main { max-width: 1040px; margin: 0 auto; padding: 20px; }
figure { margin: 14px 0; padding: 10px; background: #ffffff; border: 1px solid var(--line); border-radius: 6px; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: #5b6472; font-size: 13px; padding: 4px 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 6px 0; }
dt { color: var(--quiet); } dd { margin: 0; font-family: var(--mono); font-size: 12.5px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
"""
_MANY_CELLS = 2000  # of a heat map; more are drawn as a bitmap


def write_reports(folder: str | Path) -> Path:
    """Write `report.html`, `report.json` and `report.png` of a run from its `log.jsonl`; the path of the page.

    Raises:
        DataError: there is no log, or no step in it.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    record = read_log(folder / "log.jsonl")
    write_report(
        folder / "report.json",
        phases=record.phases,
        history=record.history,
        memory=memory_of(record),
        info={**record.info, "cycles": record.summaries},
    )
    title = str(record.info.get("title", "RESU run"))
    plot(folder / "report.png", record.history, title=title)
    path = folder / "report.html"
    write_whole(path, report_page(record, title).encode())
    return path


def memory_of(record: RunRecord) -> dict[str, Any]:
    """The bill, the highest point, and the timeline of the stages; sizes in bytes."""
    bill, (peak, stage) = record.bill, record.peak
    return {
        "bill": None if bill is None else bill.to_dict(),
        "not_predicted": record.not_predicted,
        "peak_bytes": peak,
        "peak_stage": stage,
        "outside": record.outside,
        "timeline": [dict(one) for one in record.memory],
    }


def report_page(record: RunRecord, title: str) -> str:
    """The whole page."""
    figures = [
        ("loss", _loss, "Training loss and held-out loss, phases shaded.", bool(record.history)),
        ("layers", _layers, "Share of pruned weights in each layer, at the end of each phase and after each commit.",
         bool(record.layers)),
        ("churn", _churn, "What each commit changed: share of the mask (1 - Jaccard overlap), and share of the active"
         " weights that were resurrected.", bool(record.commits)),
        ("memory", _memory, "Memory of the process (and of the accelerator's allocator) after each step, and the"
         " highest since the step before.", True),
        ("stages", _stages, "The memory bill of each stage, and what was measured in it (black line).",
         record.bill is not None),
    ]  # fmt: skip
    shown = [_figure(name, draw, record, text) for name, draw, text, there in figures if there]
    body = [f"<main><h1>{escape(title)}</h1>", _head(record), *shown, "<h2>Phases</h2>", _phases(record.phases)]
    if record.bill is not None:
        body += ["<h2>Memory bill</h2>", _bill(record, record.bill)]
    body += ["<h2>Configuration</h2>", _configuration(record.info), "</main>"]
    return page(title, "\n".join(body), style=_STYLE)


# --- figures ---------------------------------------------------------------------------------------------------------


def _figure(name: str, draw: Callable[[Figure, RunRecord], None], record: RunRecord, caption: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Text stays text, and equal runs give equal pages.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure = Figure(figsize=(10, 3.4), layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06))
        draw(figure, record)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f'<figure id="{name}">{_inline(buffer.getvalue(), name)}<figcaption>{escape(caption)}</figcaption></figure>'


def _inline(svg: str, name: str) -> str:
    """The element alone, its ids made unique in the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)


def _over_steps(figure: Figure, record: RunRecord, draw: Callable[[Axes, Any], None]) -> Axes:
    axes = figure.subplots()
    style(axes)
    shade(axes, record.history)
    draw(axes, record.history)
    step_axis(axes, record.history)
    phase_legend(figure, record.history)
    return axes


def _loss(figure: Figure, record: RunRecord) -> None:
    mark_cycles(_over_steps(figure, record, draw_loss), record.history)


def _memory(figure: Figure, record: RunRecord) -> None:
    _over_steps(figure, record, draw_memory)


def _stages(figure: Figure, record: RunRecord) -> None:
    assert record.bill is not None
    figure.set_size_inches(10, 4)
    draw_stages(figure, [record.bill], [""])


def _layers(figure: Figure, record: RunRecord) -> None:
    """A heat map: layers down, changes of masks along."""
    names = list(record.layers[-1].sparsity)
    cells = [[100 * state.sparsity.get(name, 0.0) for state in record.layers] for name in names]
    figure.set_size_inches(10, min(12.0, 1.4 + 0.2 * len(names)))
    axes = figure.subplots()
    many = len(names) * len(record.layers) > _MANY_CELLS
    mesh = axes.pcolormesh(cells, cmap="viridis", vmin=0, vmax=100, rasterized=many)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01)
    bar.set_label("pruned (%)", color=INK)
    every = max(1, len(names) // 50)
    axes.set_yticks([i + 0.5 for i in range(0, len(names), every)], [_short(n) for n in names[::every]], fontsize=8)
    axes.invert_yaxis()
    wide = max(1, len(record.layers) // 14)
    labels = [_moment(state) for state in record.layers[::wide]]
    axes.set_xticks([i + 0.5 for i in range(0, len(record.layers), wide)], labels, fontsize=8)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _moment(state: LayerState) -> str:
    return f"{state.what}\ncycle {state.cycle}"


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:18]}…{name[-21:]}"


def _churn(figure: Figure, record: RunRecord) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    style(axes)
    cycles = [commit["cycle"] for commit in record.commits]
    for offset, key, colour, label in (
        (-0.2, "churn", "#0072B2", "mask churn"), (0.2, "resurrection_rate", "#009E73", "resurrected")
    ):  # fmt: skip
        values = [100 * (commit.get(key) or 0.0) for commit in record.commits]
        axes.bar([c + offset for c in cycles], values, 0.38, color=colour, label=label)
    axes.set_xlabel("cycle", color=INK)
    axes.set_ylabel("share (%)", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    axes.set_xlim(min(cycles) - 0.6, max(cycles) + 0.6)
    axes.legend(loc="upper right", fontsize=9, framealpha=0.9, edgecolor="none")


# --- tables ----------------------------------------------------------------------------------------------------------


def _head(record: RunRecord) -> str:
    info, last = record.info, record.history[-1]
    known = [row.held_out_after for row in record.phases if row.held_out_after is not None]
    facts = [
        f"{info.get('model', 'model')}, {info.get('parameters', 0):,} parameters",
        f"{last.step:,} steps",
        f"{last.sparsity:.1%} pruned",
        *([f"held-out loss {known[0]:.3f} to {known[-1]:.3f}"] if known else []),
        f"torch {info.get('torch', '?')} on {info.get('device', '?')}",
    ]
    return f'<p class="quiet">{escape(" · ".join(facts))}</p>'


def _phases(rows: Sequence[PhaseRow]) -> str:
    """The same cells as the table in the terminal."""
    if not rows:
        return '<p class="quiet">No phase was completed.</p>'
    lines = phase_table(rows).splitlines()
    edges = [m.span() for m in re.finditer(r"-+", lines[1])]
    cells = [[line[a:b].strip() for a, b in edges] for line in [lines[0], *lines[2:]]]
    return _table(cells[0], cells[1:], "phases")


def _bill(record: RunRecord, bill: MemoryBill) -> str:
    lines = bill.cells()
    peak, stage = record.peak
    notes = [f"Highest point of the run: {size_text(peak)}, {stage}.", *bill.notes()]
    if record.not_predicted:
        notes.append(f"Not predicted: {record.not_predicted}")
    return _table(lines[0], lines[1:], "bill") + "".join(f'<p class="quiet">{escape(n)}</p>' for n in notes)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["" if re.match(r"[^\d\s-]", text) and tag == "td" else ' class="number"' for text in cells]
        return "<tr>" + "".join(f"<{tag}{k}>{escape(t)}</{tag}>" for t, k in zip(cells, kinds)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    table = f'<table id="{name}"><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _configuration(info: dict[str, Any]) -> str:
    config = info.get("config") or {}
    rest = {k: v for k, v in info.items() if k not in ("config", "title", "step") and not isinstance(v, dict | list)}
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in {**config, **rest}.items())
    return f"<dl>{items}</dl>"
