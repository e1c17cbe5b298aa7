"""What a run's `log.jsonl` holds, read back: the steps, the phases, masks layer by layer, and memory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DataError
from .memory_bill import MemoryBill
from .report import PhaseRow, StepRecord
from .run_memory import Found, bill_of, highest, peak_of

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
        memory: what each stage held, one after another (see `stage_memory`).
        predicted: the memory bill that was predicted for the run; None without one.
        not_predicted: why there is none, if it failed.
        outside: highest points that belong to no stage, by what was done then.
        peak_rss: of the whole process until the run's end; 0 where it did not come to its end.
        summaries: the phases' summaries as the cycle made them.
    """

    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[StepRecord] = dataclasses.field(default_factory=list)
    phases: list[PhaseRow] = dataclasses.field(default_factory=list)
    layers: list[LayerState] = dataclasses.field(default_factory=list)
    commits: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    memory: list[Found] = dataclasses.field(default_factory=list)
    predicted: dict[str, Any] | None = None
    not_predicted: str = ""
    outside: dict[str, int] = dataclasses.field(default_factory=dict)
    peak_rss: int = 0
    summaries: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def bill(self) -> MemoryBill | None:
        """The memory bill; None if no stage was completed."""
        return bill_of(self.memory, self.predicted, str(self.info.get("model", "")))

    @property
    def peak(self) -> tuple[int, str]:
        """Highest point of the run in bytes, and the stage that had it: of the device's tensors, or of the process
        where it ran on a CPU."""
        found = {**self.outside, **{name: peak_of(one) for name, one in highest(self.memory).items()}}
        name = max(found, key=found.__getitem__, default="")
        size = found.get(name, 0)
        on_cpu = all(one.get("device_peak") is None for one in self.memory)
        return (self.peak_rss, "outside of stages") if on_cpu and self.peak_rss > size else (size, name)


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
            memory = line.pop("memory", {})
            record.peak_rss, record.outside = memory.get("peak_rss", 0), memory.get("outside", {})
            record.info |= line
        elif event == "memory":
            record.memory.append(line)
        elif event == "bill":
            record.predicted, record.not_predicted = line.get("bill"), line.get("failed", "")
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
    if line.get("memory"):
        record.memory.append({"step": line["step"], "cycle": line["cycle"], **line["memory"]})


def _made(kind: Any, line: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in line.items() if k in names})
