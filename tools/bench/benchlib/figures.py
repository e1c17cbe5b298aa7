"""Figures of committed results, and what a target is. Plain data, no torch.

A figure compares cases of one run on a GPU, with the settings that the target names: the best of all dense cases
against the best case of what is measured. A run that lacks one of the dense cases gives no figure; one that failed is
named. Of several runs that hold all of them, the latest counts; of peaks the latest of every case.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Document = dict[str, Any]

# Settings without which a run says nothing about the targets.
_GPT2 = {"batch": 16, "context": 1024, "sparsity": 0.5}
_SETTINGS: dict[str, dict[str, Any]] = {
    "layer": {"size": 4096, "batch": 32, "many": 8192, "sparsity": 0.5},
    "model 124M": _GPT2,
    "model 350M": _GPT2,
    "model 1.24B": {"batch": 4, "context": 2048, "sparsity": 0.5},
    "semistructured": {"width": 4096, "tokens": 8192},
    "compile_time": {"size": "124M"},
    "host_memory": {"layers": 6, "width": 256, "seq": 128, "batch": 32, "vocabulary": 788, "text_bytes": 24_000_000},
    "memory 1.24B": {"batch": 4, "context": 1024},
    "memory 6.7B": {"batch": 4, "context": 2048},
    "transfers 1.24B": {"mode": "compiled"},
    "quality": {"size": "124M"},
}
_ON_CPU = {"host_memory"}  # benchmarks whose figures come from a CPU


@dataclasses.dataclass(frozen=True)
class Figure:
    """What was measured for a target.

    Attributes:
        value: to hold against the bound.
        case, against: names of the cases behind it.
        detail: their values in words.
        source: name of the results file.
        falls_short: of something else than the bound, as `detail` says; the target is missed then.
    """

    value: float
    case: str
    against: str
    detail: str
    source: str
    falls_short: bool = False


@dataclasses.dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        key: short name; remarks refer to it.
        work: what is measured, in words.
        bound, at_least: the target, and its direction.
        unit: "x" for ratios, or a unit of bytes.
        figure: finds the figure in the results; None where nothing was measured.
    """

    key: str
    work: str
    bound: float
    at_least: bool
    figure: Callable[[Sequence[Document]], Figure | None]
    unit: str = "x"

    def met(self, figure: Figure) -> bool:
        """Whether the figure reaches the bound."""
        if figure.falls_short:
            return False
        return figure.value >= self.bound if self.at_least else figure.value <= self.bound


def load(folder: Path) -> list[Document]:
    """Documents of the suite in a folder, by file name; other JSON files there are left alone."""
    found = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if isinstance(document, dict) and "benchmark" in document:
            found.append({**document, "file": path.name})
    return found


def value_of(row: Any, metric: str) -> float | None:
    """A number of a case by its dotted path ("graph.median_ms"); None for cases that failed or lack it."""
    for part in metric.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return float(row) if isinstance(row, (int, float)) else None


def best(document: Document, patterns: Iterable[str], *metrics: str) -> tuple[str, float] | None:
    """(name, value) of the case with the smallest value of any of the metrics among those that match."""
    patterns = list(patterns)
    found = [
        (value, name)
        for name, row in document["cases"].items()
        for metric in metrics
        if any(fnmatchcase(name, p) for p in patterns) and (value := value_of(row, metric)) is not None
    ]
    return min(found)[::-1] if found else None


def as_many_tokens(row: Any, other: Any) -> bool:
    """Whether steps of two cases have as many tokens; rows that do not say are of one shape."""
    return value_of(row, "tokens") == value_of(other, "tokens")


_GROUP = {"published": 2, "step": 2, "tokens": 2, "state": 1, "sweep": 4}  # leading parts of a layer's case name


def dense_like(benchmark: str, name: str) -> list[str]:
    """Patterns of the dense cases that a case is compared with in the listing of its run; empty if there are none."""
    parts = name.split("/")
    if benchmark.startswith("model "):
        return [f"dense/{parts[1]}/*"]
    if benchmark.startswith("memory "):
        return ["dense/bf16"]
    if benchmark == "layer":
        return ["/".join([*parts[: _GROUP[parts[0]]], "dense*"])]
    others = {"semistructured": f"dense/{parts[-1]}", "few_tokens": "/".join(["cublas", *parts[1:]])}
    return [others[benchmark]] if benchmark in others else []


def ratio(
    benchmark: str,
    dense: Sequence[str],
    ours: Sequence[str],
    metric: str = "median_ms",
    inverse: bool = False,
    captured: bool = False,
    also: Sequence[str] = (),
) -> Callable[[Sequence[Document]], Figure | None]:
    """Best of the cases `dense` over the best that match `ours` (a speed-up); with `inverse` ours over dense.

    A run without all of `dense` gives no figure. `also`: further dense cases, which count where they were run.

    Where a dense step was also timed in a CUDA graph, the better of both times counts; with `captured` for ours too.
    """
    strongest = (metric, "graph.median_ms") if metric == "median_ms" else (metric,)
    own_metrics = strongest if captured else (metric,)

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in latest_first(documents, benchmark):
            if any(name not in document["cases"] for name in dense):
                continue
            reference, own = best(document, [*dense, *also], *strongest), best(document, ours, *own_metrics)
            if reference is None or own is None:
                continue
            value = own[1] / reference[1] if inverse else reference[1] / own[1]
            detail = f"{show(own[1], metric)} against {show(reference[1], metric)}"
            if inverse and (time := value_of(document["cases"][own[0]], "median_ms")) is not None:
                detail += f", at {show(time, 'median_ms')} a step"
            failed = [name for name in dense if value_of(document["cases"][name], metric) is None]
            detail += "".join(f"; {name} failed" for name in failed)
            return Figure(value, own[0], reference[0], detail, document["file"])
        return None

    return find


def peak_at_speed(
    benchmark: str, against: str, groups: Sequence[tuple[str, Sequence[str], float]]
) -> Callable[[Sequence[Document]], Figure | None]:
    """The smallest peak over that of the case `against` in the same run, of steps that are fast enough: memory that is
    paid for with the speed which another row promises does not count. Where no step is fast enough, the smallest of
    all. Of every case its last run counts: runs of other cases, each with a dense step of its own, do not hide it.

    Args:
        groups: (strongest dense case, patterns of ours, least speed-up).
    """
    metric = "peak_allocated_bytes"

    def find(documents: Sequence[Document]) -> Figure | None:
        found: dict[str, Figure] = {}
        for document in latest_first(documents, benchmark):
            reference = value_of(document["cases"].get(against), metric)
            if reference is None:
                continue
            for slow, peak, name, speed in _at_speed(document, groups, metric):
                detail = f"{show(peak, metric)} against {show(reference, metric)}, at {speed:.3g}x the speed"
                detail += "; none is fast enough" * slow
                found.setdefault(name, Figure(peak / reference, name, against, detail, document["file"], slow))
        return min(found.values(), key=lambda f: (f.falls_short, f.value), default=None)

    return find


def _at_speed(
    document: Document, groups: Sequence[tuple[str, Sequence[str], float]], metric: str
) -> Iterator[tuple[bool, float, str, float]]:
    """(too slow, peak, name, speed-up) of every case of the groups."""
    for dense, ours, least in groups:
        strongest = best(document, [dense, f"{dense}/tiled"], "median_ms", "graph.median_ms")
        for name, row in document["cases"].items():
            peak, time = value_of(row, metric), value_of(row, "median_ms")
            if strongest and peak and time and any(fnmatchcase(name, p) for p in ours):
                speed = strongest[1] / time
                yield speed < least, peak, name, speed


def counts(document: Document) -> bool:
    """Whether a run is one that figures come from: on a GPU (or of the host's memory), compiled by Inductor, at the
    targets' sizes."""
    settings = document["settings"]
    wanted = {"compiler": "inductor", **_SETTINGS.get(document["benchmark"], {})}
    on_cpu = document["environment"]["device"].startswith("CPU")
    fits = on_cpu == (document["benchmark"] in _ON_CPU)
    return fits and all(settings.get(key) == value for key, value in wanted.items())


def latest_first(documents: Sequence[Document], benchmark: str) -> list[Document]:
    """Runs of a benchmark that figures come from (`counts`)."""
    mine = [d for d in documents if d["benchmark"] == benchmark and counts(d)]
    return sorted(mine, key=lambda d: d["environment"]["date"], reverse=True)


def switch_steps(row: Any) -> dict[str, float]:
    """Both phase switches of `transfers.py` in dense steps: up to where the next step may begin, and what that step
    then takes longer than the others of its stage, since copies may go on beside it. (Rows without the first step
    behind RESU have the way out up to there only.)"""
    found = dict(row.get("switch_steps", {}))
    for way, stage in (("into RESU", "resu"), ("out of RESU", "train")):
        if first := row.get(f"first_{stage}_steps_ms"):
            found[way] += max(first[0] - row["step_ms"][stage], 0.0) / row["step_ms"]["train"]
    return found


def show(value: float, metric: str) -> str:
    """A time or a number of bytes, by its metric's name."""
    if metric.endswith("_ms"):
        return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"
    return f"{value / 1e9:.3g} GB" if metric.endswith("bytes") else f"{value:.3g} s"
