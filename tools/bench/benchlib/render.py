"""docs/BENCHMARKS.md from committed results: the targets, remarks on missed ones, and every case of every run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .figures import Document, Figure, Target, as_many_tokens, best, dense_like, load, switch_steps, value_of
from .targets import TARGETS

_PEAK = "peak_allocated_bytes"

_HEAD = """# Benchmarks

Rendered by `tools/bench/table` from `tools/bench/results/*.json`; do not edit. Times are medians. A figure compares
cases of one run on one GPU: the strongest dense variant in it against the best fxresu case of the row. "Not measured"
means that no committed run holds both. How each case is measured, and the formulas behind limits and useful bytes, are
in the scripts' docstrings (`tools/bench/*.py`, `tools/bench/benchlib/limits.py`).

A run is one command, for example `python tools/bench/layer.py --out tools/bench/results/layer.json`; every script
has `--list`, `--only` and `--budget`. The scripts: `layer.py`, `model.py`, `kernels.py`, `compile_time.py`,
`semistructured.py`, `few_tokens.py`, `bill.py`, `memory.py` (a process for each case), `transfers.py`, `streamed.py`,
`quality.py`, `bus.py`. `host_memory.py` runs on a CPU, its cases in turns, and `--only` names groups of them.
`suite.py` runs several of them side by side, a lane on each GPU.
"""
_REMARKS = """Written by hand (`tools/bench/remarks.md`).
"""


def read_remarks(path: Path) -> dict[str, str]:
    """Remarks by target: a line `## KEY`, then text up to the next one.

    Raises:
        ValueError: a key that is no target's, or that comes twice.
    """
    remarks: dict[str, str] = {}
    known = {target.key for target in TARGETS}
    key = ""
    for line in path.read_text().splitlines():
        if line.startswith("## "):
            key = line[3:].strip()
            if key not in known or key in remarks:
                keys = ", ".join(sorted(known))
                raise ValueError(f"{path}: '## {key}' is no target's key, or comes twice; the keys are {keys}")
            remarks[key] = ""
        elif key:
            remarks[key] += line + "\n"
    return {key: text.strip() for key, text in remarks.items()}


def document(results: Path, remarks: Path) -> str:
    """The whole document."""
    documents = load(results)
    figures = {target.key: target.figure(documents) for target in TARGETS}
    parts = [_HEAD, "## Targets\n", _targets(figures), _missed(figures, read_remarks(remarks))]
    parts += [_run(run) for run in documents]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def verdict(target: Target, figure: Figure | None) -> str:
    """ "met", "missed" or "not measured"."""
    if figure is None:
        return "not measured"
    return "met" if target.met(figure) else "**missed**"


def _targets(figures: dict[str, Figure | None]) -> str:
    rows = []
    for target in TARGETS:
        figure = figures[target.key]
        bound = f"{'≥' if target.at_least else '≤'} {_number(target.bound, target.unit)}"
        shown = "" if figure is None else f"{_number(figure.value, target.unit)} ({figure.detail})"
        cases = "" if figure is None else f"`{figure.case}`" + (f" / `{figure.against}`" if figure.against else "")
        source = "" if figure is None else figure.source
        rows.append([target.key, target.work, bound, shown, verdict(target, figure), cases, source])
    return _table(["#", "work", "target", "figure", "", "cases", "run"], rows)


def _number(value: float, unit: str) -> str:
    return f"{value:.3g}x" if unit == "x" else f"{value:.4g} {unit}"


def _missed(figures: dict[str, Figure | None], remarks: dict[str, str]) -> str:
    texts = []
    for target in TARGETS:
        figure = figures[target.key]
        if target.key in remarks:
            texts.append(f"**{target.key}** ({verdict(target, figure).strip('*')}): {remarks[target.key]}\n")
        elif figure is not None and not target.met(figure):
            texts.append(f"**{target.key}** (missed): no remark yet.\n")
    return "\n".join(["## Remarks\n", _REMARKS, *texts]) if texts else ""


def _run(run: Document) -> str:
    """Every case of one run."""
    environment, settings = run["environment"], run["settings"]
    where = ", ".join(f"{k} {environment[k]}" for k in ("torch", "triton", "cuda", "python") if environment.get(k))
    rate = f"device copy {environment['copy_bytes_per_s'] / 1e12:.2f} TB/s"
    if bus := environment.get("bus_bytes_per_s"):
        rate += ", bus " + ", ".join(f"{way} {bus[way] / 1e9:.0f}" for way in ("in", "out", "both")) + " GB/s"
    what = ", ".join(f"{k}: {_setting(v)}" for k, v in settings.items() if v is not None)
    source = f"`{run['file']}`: {environment['device']}, {where}, {environment['date']}, {rate}"
    head = f"## {run['benchmark']}\n\n{source}\n\n{what}\n"
    cases = {name: {**row, **_against_dense(run, name, row)} for name, row in run["cases"].items()}
    columns = [c for c in _COLUMNS if any(c[1](row) for row in cases.values())]
    rows = [[f"`{name}`", *(shown(row) for _, shown in columns)] for name, row in cases.items()]
    return head + "\n" + _table(["case", *(title for title, _ in columns)], rows) + _ledger(run["cases"])


def _ledger(cases: dict[str, dict[str, Any]]) -> str:
    """What the peaks consist of, where cases have recorded it; largest first, what nothing explains last."""
    known = {name: row["components"] for name, row in cases.items() if row.get("components")}
    if not known:
        return ""
    largest = {key: max(parts.get(key, 0) for parts in known.values()) for parts in known.values() for key in parts}
    order = sorted(largest, key=lambda key: (key == "unaccounted", -largest[key]))
    rows = [[key, *(f"{parts[key] / 1e6:.1f}" if key in parts else "" for parts in known.values())] for key in order]
    return "\nMB of the peak:\n\n" + _table(["component", *(f"`{name}`" for name in known)], rows)


def _against_dense(run: Document, name: str, row: dict[str, Any]) -> dict[str, float]:
    """Speed and peak of a case against the strongest dense one beside it, and its bytes/s against the device copy."""
    found: dict[str, float] = {}
    dense = dense_like(run["benchmark"], name)
    for key, own, references in (("speed", "median_ms", ("median_ms", "graph.median_ms")), ("share", _PEAK, (_PEAK,))):
        value, reference = value_of(row, own), best(run, dense, *references)
        if value is not None and reference is not None and as_many_tokens(row, run["cases"][reference[0]]):
            found[key] = reference[1] / value if key == "speed" else value / reference[1]
    if (rate := value_of(row, "bytes_per_s")) is not None:
        found["of_copy"] = rate / run["environment"]["copy_bytes_per_s"]
    return found


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_setting(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _time(row: dict[str, Any]) -> str:
    median = value_of(row, "median_ms")
    if median is None:
        return ""
    low, high = value_of(row, "p10_ms"), value_of(row, "p90_ms")
    return f"{median:.4g}" if low is None or high is None else f"{median:.4g} ({low:.4g} to {high:.4g})"


def _gigabytes(key: str) -> Any:
    return lambda row: "" if (value := value_of(row, key)) is None else f"{value / 1e9:.3f}"


def _plain(key: str, form: str, scale: float = 1.0) -> Any:
    return lambda row: "" if (value := value_of(row, key)) is None else form.format(value * scale)


def _errors(row: dict[str, Any]) -> str:
    errors = row.get("errors") or {"": row.get("relative_error")}
    return ", ".join(f"{name} {error:.1e}".strip() for name, error in errors.items() if error is not None)


def _held_out(row: dict[str, Any]) -> str:
    value = value_of(row, "held_out")
    value = value_of(row, "mean") if value is None else value
    return "" if value is None else f"{value:.4f}"


def _switches(row: dict[str, Any]) -> str:
    return ", ".join(f"{way} {steps:.2f}" for way, steps in switch_steps(row).items())


def _failure(row: dict[str, Any]) -> str:
    text = row.get("error") or row.get("skipped") or row.get("graph_error") or ""
    return " ".join(text.split())[:160]


_COLUMNS: list[tuple[str, Any]] = [
    ("ms (p10 to p90)", _time),
    ("speed, x dense", _plain("speed", "{:.2f}")),
    ("ms in a graph", _plain("graph.median_ms", "{:.4g}")),
    ("of the limit", _plain("of_limit", "{:.0%}")),
    ("TB/s", _plain("bytes_per_s", "{:.2f}", 1e-12)),
    ("of a copy", _plain("of_copy", "{:.0%}")),
    ("TB/s of a copy of as many bytes", _plain("same_copy_bytes_per_s", "{:.2f}", 1e-12)),
    ("peak GB, allocated", _gigabytes(_PEAK)),
    ("peak, x dense", _plain("share", "{:.2f}")),
    ("peak GB, reserved", _gigabytes("peak_reserved_bytes")),
    ("saved GB", _gigabytes("saved_bytes")),
    ("peak GB, whole device", _gigabytes("peak_device_bytes")),
    ("highest in", lambda row: row.get("highest") or ""),
    ("tokens/s", _plain("tokens_per_s", "{:.0f}")),
    ("tokens per CPU second", _plain("tokens_per_cpu_s", "{:.0f}")),
    ("speed by CPU time", _plain("cpu_speed", "{:.2f}")),
    ("held-out loss", _held_out),
    ("spread over seeds", _plain("spread", "{:.4f}")),
    ("unaccounted, worst stage", _plain("unaccounted", "{:.1%}")),
    ("worst stage", lambda row: row.get("worst") or ""),
    ("stall", _plain("stall_share", "{:.2%}")),
    ("switches, steps", _switches),
    ("peak MB, resident", _plain("peak_rss_bytes", "{:.0f}", 1e-6)),
    ("its children's", _plain("children_peak_rss_bytes", "{:.0f}", 1e-6)),
    ("unaccounted MB", _plain("components.unaccounted", "{:.0f}", 1e-6)),
    ("θ moments MiB", _plain("bill.θ moments", "{:.2f}", 2**-20)),
    ("masks MiB", _plain("bill.masks", "{:.2f}", 2**-20)),
    ("compile s, cold", _plain("cold.compile_s", "{:.1f}")),
    ("compile s, warm", _plain("warm.compile_s", "{:.1f}")),
    ("error against float64", _errors),
    ("failed", _failure),
]
