"""What a run's `log.jsonl` holds, read back: the steps, the phases, masks layer by layer, and the highest peak."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DataError
from .report import MemoryRow, PhaseRow, StepRecord

__all__ = ["LayerState", "RunRecord", "cut_log", "read_log"]

_STEPS = 4000  # a picture shows no more


@dataclasses.dataclass(frozen=True)
class LayerState:
    """Sparsity of every managed weight at the end of a phase, or after a commit: `what` says of which."""

    step: int
    cycle: int
    what: str
    sparsity: dict[str, float]


@dataclasses.dataclass
class RunRecord:
    """A run as its log tells it.

    Attributes:
        info: configuration and versions.
        history: the steps, thinned to some thousands if there are more; steps with a held-out loss all stay.
        phases: one row a phase and commit.
        layers: sparsity by weight, at the end of each phase and after each commit.
        commits: figures of each commit, with `step` and `cycle`.
        memory, peak_bytes: bill of the phase with the highest peak.
        summaries: the phases' summaries as the cycle made them.
    """

    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[StepRecord] = dataclasses.field(default_factory=list)
    phases: list[PhaseRow] = dataclasses.field(default_factory=list)
    layers: list[LayerState] = dataclasses.field(default_factory=list)
    commits: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    memory: list[MemoryRow] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    peak_phase: str = ""
    summaries: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The log's lines; the last one may have been cut off by a crash and is passed over."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def cut_log(path: Path, step: int) -> int:
    """Take lines after `step` out of a log, which a resumed run will write again; returns how many stay."""
    if not path.exists():
        return 0
    work, kept = path.with_name(f".{path.name}.cut"), 0
    with work.open("w", encoding="utf-8") as file:
        for line in lines_of(path):
            if line.get("step", 0) <= step:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                kept += 1
    work.replace(path)
    return kept


def read_log(path: Path) -> RunRecord:
    """Read a `log.jsonl`.

    Raises:
        DataError: there is none, or it holds no step.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no log; give the folder of a run, which holds log.jsonl")
    total = sum(line.get("event") == "step" for line in lines_of(path))
    if not total:
        raise DataError(f"{path}: holds no step")
    stride, seen = -(-total // _STEPS), 0
    record = RunRecord()
    for line in lines_of(path):
        event = line.pop("event", "")
        if event == "step":
            seen += 1
            if seen % stride == 0 or seen == 1 or line.get("held_out") is not None:
                loss = math.nan if line["loss"] is None else line["loss"]
                record.history.append(_made(StepRecord, line | {"loss": loss}))
        elif event in ("start", "end"):
            record.info |= line
        elif event in ("phase", "commit"):
            _add_phase(record, event, line)
        elif event == "held_out" and record.history:
            record.history[-1] = dataclasses.replace(record.history[-1], held_out=line["held_out"])
    return record


def _add_phase(record: RunRecord, event: str, line: dict[str, Any]) -> None:
    record.phases.append(_made(PhaseRow, line))
    if line.get("layers"):
        record.layers.append(LayerState(line["step"], line["cycle"], line["phase"], line["layers"]))
    if event == "commit":
        record.commits.append(line)
        return
    record.summaries.append(line.get("summary", {}))
    memory = line.get("memory") or {"peak_bytes": 0}
    if memory["peak_bytes"] > record.peak_bytes:
        record.peak_bytes, record.peak_phase = memory["peak_bytes"], line["phase"]
        record.memory = [MemoryRow(name, size) for name, size in memory["bill"].items() if size]


def _made(kind: Any, line: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in line.items() if k in names})
