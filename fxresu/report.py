"""The end of a run: a table of the phases, and `report.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

__all__ = ["PhaseRow", "StepRecord", "finite", "phase_table", "write_report", "write_whole"]


@dataclass(frozen=True)
class StepRecord:
    """One training step. Losses in nats per token, `sparsity` as the share of managed weights outside the mask, memory
    in bytes: `bytes_allocated` on the accelerator, `rss` (the process's resident set) after the step, and `rss_peak`,
    its highest since the step before."""

    step: int
    phase: str
    cycle: int
    loss: float
    sparsity: float
    held_out: float | None = None
    bytes_allocated: int | None = None
    rss: int | None = None
    rss_peak: int | None = None
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
    memory: Mapping[str, Any],
    info: dict[str, Any] | None = None,
) -> None:
    """Write everything as JSON, all or nothing. Numbers that JSON lacks (nan, inf) become null.

    Keys: `info` (as given: configuration, versions, machine), `phases`, `history` (lists of the records' fields), and
    `memory` as given: `bill` (`MemoryBill.to_dict`), `peak_bytes`, `peak_stage`, and `timeline`, the stages one after
    another; the timeline of the steps is in `history`.
    """
    report = {
        "version": 2,
        "info": info or {},
        "phases": [asdict(row) for row in phases],
        "memory": dict(memory),
        "history": [asdict(record) for record in history],
    }
    write_whole(Path(path), (json.dumps(finite(report), indent=1, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """Plain containers with None for numbers that JSON lacks, strings for keys and lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_whole(path: Path, data: bytes) -> None:
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
