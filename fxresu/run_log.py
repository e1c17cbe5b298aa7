"""`RunLog`: follows a cycle, writes a JSON line for everything that happens, and a report at the end."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .events import PhaseEvent, StepEvent
from .log_sinks import Sink, check_sinks, open_sinks
from .mask_change import CommitResult, actual_sparsity, total_sparsity
from .model_state import state_of
from .report import PhaseRow, StepRecord, finite
from .run_memory import stage_of
from .run_record import cut_log, lines_of
from .stage_memory import Extra, StageMemory

if TYPE_CHECKING:
    from .cycle import ResuCycle

__all__ = ["RunLog"]


class RunLog:
    """Writes a run's folder: `log.jsonl` as it goes, `report.html`, `report.json` and `report.png` at its end.

    After a resume the log goes on from the checkpoint's step: lines of the run that was killed are cut off.

    Args:
        folder: made if it is not there.
        every: record each n-th step. Reading a loss waits for the device.
        tokens: tokens (or samples) of a step, for the throughput.
        evaluate: gives the held-out loss, nats; called around every phase. Without it, `held_out` may tell one.
        bill: further tensors of a stage (a phase or a transition) in the memory bill, by its name; host: further parts
            of the resident set.
        inputs: of one micro-batch, as for `predict_memory`: the report's bill is then predicted, after the run and in
            this process, which compiled models take some seconds a phase for. Without it the bill lists what was
            counted between steps, and activations are among what is unaccounted.
        sinks: "auto" (see `log_sinks.open_sinks`), or names out of "tensorboard" and "wandb"; () for none.
        title: of the report.

    Raises:
        ConfigError: an unknown sink, or one that is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int = 1,
        tokens: int | None = None,
        evaluate: Callable[[], float] | None = None,
        bill: Extra | None = None,
        host: Extra | None = None,
        inputs: Any = None,
        sinks: str | Iterable[str] = "auto",
        title: str = "RESU run",
    ) -> None:
        check_sinks(sinks := sinks if isinstance(sinks, str) else tuple(sinks))
        self.folder, self.every, self.tokens, self.title = Path(folder), max(1, every), tokens, title
        self.evaluate, self.bill, self.host, self.inputs = evaluate, bill, host, inputs
        self.listener: Callable[[StepEvent, StepRecord], None] | None = None
        self.info: dict[str, Any] = {}
        self._sink_names, self._sinks = sinks, list[Sink]()
        self._file: Any = None
        self._stage: tuple[int, str] | None = None
        self._sparsity = 0.0
        # Held-out losses: the last one known, the one before this phase, the one that the next step's line will carry.
        self._known: float | None = None
        self._before: float | None = None
        self._pending: float | None = None
        self._seconds: list[float] = []
        self._last: float | None = None
        self._seen: dict[str, None] = {}  # stages of the bill that were completed
        self._base = ""

    # Following

    def follow(self, cycle: ResuCycle) -> None:
        """Listen to a cycle, from its next event on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cycle = cycle
        self.device = next(cycle.model.parameters()).device
        self.memory, self._base = StageMemory(cycle, self.bill, self.host), state_of(cycle.model).base
        cycle.on_step(self._on_step)
        cycle.on_phase(self._on_phase)
        cycle.on_prune(lambda change: self._moved("prune"))
        cycle.on_commit(self._on_commit)

    def held_out(self, value: float) -> None:
        """A held-out loss (nats) of the model as it is now, where the loop evaluates by itself."""
        self._known = float(value)
        if self._file is not None:
            self._write({"event": "held_out", "step": self.cycle.global_step, "held_out": self._known})
            self._send({"held_out/loss": self._known}, self.cycle.global_step)

    def _on_step(self, event: StepEvent) -> None:
        self._open(event.step - 1)
        if self._stage != (event.cycle, event.stage):  # resumed in another stage than the run began with
            self._stage, self._seconds, self._last = (event.cycle, event.stage), [], None
            self._sparsity = total_sparsity(self.cycle.model)
        now, cuda = time.perf_counter(), self.device.type == "cuda"
        seconds = None if self._last is None else now - self._last
        if seconds is not None:
            self._seconds.append(seconds)
        self._last = now
        if event.step % self.every and self._pending is None:
            return
        resident, highest = self.memory.watch.step()
        record = StepRecord(
            step=event.step,
            phase=str(event.phase),
            cycle=event.cycle,
            loss=float(event.loss),
            sparsity=self._sparsity,
            held_out=self._pending,
            bytes_allocated=torch.cuda.memory_allocated(self.device) if cuda else None,
            rss=resident,
            rss_peak=highest,
            tokens_per_s=self.tokens / seconds if self.tokens and seconds else None,
        )
        self._pending = None
        lr = float(self.cycle.optimizer.param_groups[0]["lr"])
        self._write({"event": "step", "stage": event.stage, "lr": lr, **dataclasses.asdict(record)})
        self._send(
            {"train/loss": record.loss, "train/lr": lr, "train/tokens_per_s": record.tokens_per_s,
             "held_out/loss": record.held_out, "sparsity/total": record.sparsity, "train/cycle": record.cycle,
             "memory/bytes": record.bytes_allocated if cuda else record.rss},
            event.step,
        )  # fmt: skip
        if self.listener is not None:
            self.listener(event, record)

    def _on_phase(self, event: PhaseEvent) -> None:
        if event.when == "start":
            self._begin(event.cycle, event.stage)
        else:
            self._end(event)

    def _begin(self, cycle: int, stage: str) -> None:
        base = state_of(self.cycle.model).base
        if base == "resu" and self._base != "resu":
            self._moved("start RESU")
        self._base = base
        self._stage, self._seconds = (cycle, stage), []
        self._sparsity = total_sparsity(self.cycle.model)
        self._before = self._pending = self._evaluate()
        if self._before is None:
            self._before = self._known
        self._last = None  # evaluation and what led here are no part of the next step

    def _moved(self, transition: str) -> None:
        """A transition is done; what it held is from the end of the stage before it to here."""
        found = self.memory.transition(transition)
        self._seen[transition] = None
        if self._file is not None:  # a run starts with no transition, a resumed one may
            self._write({"event": "memory", "step": self.cycle.global_step, "cycle": self.cycle.cycle, **found})

    def _end(self, event: PhaseEvent) -> None:
        summary = event.summary
        assert summary is not None
        memory = self.memory.phase(str(event.phase))
        self._seen[stage_of(str(event.phase))] = None
        after = self._evaluate()
        after = self._known if after is None else after
        steps = summary.steps
        row = PhaseRow(
            phase=str(event.phase),
            cycle=event.cycle,
            steps=steps,
            loss_first=summary.loss_first if steps else None,
            loss_last=summary.loss_last if steps else None,
            held_out_before=self._before,
            held_out_after=after,
            # Of the median step; the first one, which compiles, is not among them.
            tokens_per_s=self.tokens / statistics.median(self._seconds) if self.tokens and self._seconds else None,
            sparsity=summary.sparsity,
        )
        self._open(max(0, event.step - 1))
        line = {"event": "phase", "step": event.step, "stage": event.stage, **dataclasses.asdict(row)}
        self._write({**line, "layers": self._layers(), "memory": memory, "summary": summary.to_dict()})
        peak = memory["device_peak"] if self.device.type == "cuda" else memory["host_peak"]
        self._send({"held_out/loss": after, "memory/peak": peak}, event.step)

    def _on_commit(self, result: CommitResult) -> None:
        self._moved("commit")
        before, after = self._known, self._evaluate()
        self._pending = after
        step, layers = self.cycle.global_step, self._layers()
        row = PhaseRow(
            phase="commit",
            cycle=self.cycle.cycle,
            steps=0,
            held_out_before=before,
            held_out_after=after,
            sparsity=result.sparsity,
            resurrected=result.resurrected,
            kept=result.kept,
        )
        figures = {"churn": result.churn, "dropped": result.dropped, "resurrection_rate": result.resurrection_rate}
        self._write({"event": "commit", "step": step, **dataclasses.asdict(row), **figures, "layers": layers})
        self._send(
            {"commit/churn": result.churn, "commit/resurrected": result.resurrected,
             "commit/resurrection_rate": result.resurrection_rate, "held_out/loss": after,
             **{f"sparsity/{name}": share for name, share in layers.items()}},
            step,
        )  # fmt: skip

    # Pieces

    def _evaluate(self) -> float | None:
        if self.evaluate is None:
            return None
        self.memory.aside("outside of stages")
        self._known = self.evaluate()
        self.memory.aside("held-out loss")
        return self._known

    def _layers(self) -> dict[str, float]:
        return {name: round(share, 6) for name, share in actual_sparsity(self.cycle.model).items()}

    def _open(self, step: int) -> None:
        """Open the log to go on after `step`: 0 for a new run."""
        if self._file is not None:
            return
        path = self.folder / "log.jsonl"
        kept = cut_log(path, step) if step else 0
        if kept:
            known = (line.get("held_out_after") for line in lines_of(path) if line["event"] in ("phase", "commit"))
            self._before = next((v for v in reversed(list(known)) if v is not None), self._before)
        self._file = path.open("a" if kept else "w", encoding="utf-8")
        cycle = self.cycle
        self.info = {
            "title": self.title,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "model": type(cycle.model).__name__,
            "parameters": sum(p.numel() for p in cycle.model.parameters()),
            "tokens_per_step": self.tokens,
            "config": cycle.config.to_dict(),
            **self.info,
        }
        if not kept:
            self._write({"event": "start", "step": 0, **self.info})
        self._sinks = open_sinks(self._sink_names, self.folder, step, self.info)

    def _write(self, line: dict[str, Any]) -> None:
        self._open(line["step"])
        self._file.write(json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def _send(self, values: dict[str, float | None], step: int) -> None:
        known = {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
        for sink in self._sinks:
            sink.write(known, step)

    def finish(
        self,
        *,
        write: Callable[[Path], Path] | None = None,
        predict: Callable[[tuple[str, ...]], dict[str, Any]] | None = None,
        **facts: Any,
    ) -> Path | None:
        """Close everything and write the reports; their HTML page, or None if no step was made.

        Args:
            predict: makes the memory bill (`MemoryBill.to_dict`) of these stages; default is a prediction from
                `inputs`, if they were given.
            write: writes the reports of a folder and returns the page; default is `report_html.write_reports`.
            facts: for the report, such as what was compiled.
        """
        if self._file is None:
            return None
        if self._pending is not None:
            self._write({"event": "held_out", "step": self.cycle.global_step, "held_out": self._pending})
        skipped = [list(s) for s in self.cycle.skipped]
        end = self.memory.end()
        self._predict(predict)
        self._write({"event": "end", "step": self.cycle.global_step, "skipped": skipped, "memory": end, **facts})
        self._file.close()
        for sink in self._sinks:
            sink.close()
        self._file, self._sinks = None, []
        if write is None:
            from .report_html import write_reports

            write = write_reports
        return write(self.folder)

    def _predict(self, predict: Callable[[tuple[str, ...]], dict[str, Any]] | None) -> None:
        """The run is over, so that whatever this takes is no part of what was measured."""
        if predict is None and self.inputs is None:
            return
        if predict is None:
            from .run_prediction import predicted

            predict = functools.partial(predicted, self.cycle, self.inputs)
        try:
            bill = predict(tuple(self._seen))
        except Exception as error:  # the run itself was fine, and its report is worth having
            told = " ".join(str(error).split())[:300]
            self._write({"event": "bill", "step": self.cycle.global_step, "failed": f"{type(error).__name__}: {told}"})
        else:
            self._write({"event": "bill", "step": self.cycle.global_step, "bill": bill})
