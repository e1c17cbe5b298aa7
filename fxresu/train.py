"""`fxresu train`: a GPT on real text through the whole cycle, with a log, checkpoints and a report at the end."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from . import checkpoint
from .activations import saved_bytes
from .config import CycleConfig
from .corpus import Corpus
from .cycle import PhaseEvent, ResuCycle, StepEvent, default_loss
from .data import Prefetcher, batches, held_out_batches
from .errors import ConfigError
from .ledger import current_rss, device_peak, memory_bill
from .mask_change import CommitResult, total_sparsity
from .model_state import managed_weights, other_parameters
from .report import MemoryRow, PhaseRow, StepRecord, memory_table, phase_table, plot, write_report
from .runner import runner_of
from .train_options import add_arguments, check, cycle_config
from .train_setup import framework_bytes, make_model, make_writable, open_corpus, pick_device, sequence_length
from .transform import transform

__all__ = ["Training", "add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Train as the options say; 0 when the run is complete."""
    check(args)
    config = cycle_config(args)
    device = pick_device(args.device)
    make_writable(args.out)
    baseline = framework_bytes(device)
    corpus = open_corpus(args, sequence_length(args, device))
    training = Training(args, config, corpus, device, baseline)
    if args.resume:
        training.resume()
    training.train()
    training.report()
    return 0


class Training:
    """One run: model, optimizer, cycle and data, and everything that is recorded on the way."""

    def __init__(
        self, args: argparse.Namespace, config: CycleConfig, corpus: Corpus, device: torch.device, baseline: int
    ) -> None:
        self.args, self.config, self.device, self.baseline = args, config, device, baseline
        self.seq, self.batch = sequence_length(args, device), args.batch or (8 if device.type == "cpu" else 32)
        self.corpus = corpus
        torch.manual_seed(config.seed)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        model = make_model(args, corpus.vocab_size, self.seq, device)
        self.model = transform(
            model,
            sparsity=config.sparsity(config.cycles - 1),
            granularity=config.granularity,
            candidates=config.candidates,
            storage=args.storage,
            compile={"fullgraph": True} if args.compile else False,
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=device.type == "cuda"
        )
        self.cycle = ResuCycle(self.model, self.optimizer, config, loss=self._loss)
        self.scheduler = LambdaLR(self.optimizer, self._lr_factor)
        self.cycle.on_step(self._on_step)
        self.cycle.on_phase(self._on_phase)
        self.cycle.on_commit(self._on_commit)
        self.history: list[StepRecord] = []
        self.rows: list[PhaseRow] = []
        self.checks = held_out_batches(corpus.held_out, args.eval_batches, self.batch, self.seq, device=device)
        self._held_out: float | None = None
        self._stage: dict[str, Any] = {}
        self._peak: dict[str, Any] = {"bytes": 0, "bill": {}, "phase": ""}
        self._activations = 0
        self._compiler = 0
        self._bar: Any = None
        self._log: Any = None

    # Pieces of a step

    def _lr_factor(self, step: int) -> float:
        if step < self.args.warmup:
            return (step + 1) / self.args.warmup
        done = (step - self.args.warmup) / max(1, self.cycle.total_steps - self.args.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))

    def _loss(self, model: torch.nn.Module, batch: Any) -> Tensor:
        loss = default_loss(model, batch)
        if self.cycle.meter.steps == 1 and loss.requires_grad:
            # The phase's second step: the first one still holds the compiler's own tensors.
            parameters = [p.data for p in model.parameters()]
            self._activations = saved_bytes(loss, parameters)
        return loss

    def _footprint(self) -> tuple[int, int, int]:
        """(compiled functions, resident bytes, bytes that the bill explains) right now."""
        explained = sum(memory_bill(self.model, self.optimizer).values())
        return len(runner_of(self.model).entries), current_rss(), explained

    def _note_compiler(self, before: tuple[int, int, int]) -> None:
        """If something was compiled since `before`, add what the process grew by beyond the bill: the compiler's own
        tables, generated code, and what the allocator did not give back."""
        entries, resident, explained = self._footprint()
        if entries > before[0]:
            self._compiler += max(0, resident - before[1] - (explained - before[2]))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean held-out loss, nats per token, over fixed windows."""
        before = self._footprint()
        with self.cycle._autocast():
            losses = [self.model(*batch) for batch in self.checks]
        self._note_compiler(before)
        return float(torch.stack(losses).mean())

    # Events

    def _on_step(self, event: StepEvent) -> None:
        self.scheduler.step()
        cuda = self.device.type == "cuda"
        tokens = self.batch * self.seq * self.cycle.accumulation
        if self.cycle.meter.steps == 1 and "footprint" in self._stage:
            self._note_compiler(self._stage["footprint"])
        now = time.perf_counter()
        if self._stage.get("last"):
            self._stage["seconds"].append(now - self._stage["last"])
        record = StepRecord(
            step=event.step,
            phase=str(event.phase),
            cycle=event.cycle,
            loss=float(event.loss),
            sparsity=self._stage["sparsity"],
            held_out=self._held_out,
            bytes_allocated=torch.cuda.memory_allocated(self.device) if cuda else None,
            rss=None if cuda else current_rss(),
            tokens_per_s=tokens / (now - self._stage["last"]) if self._stage.get("last") else None,
        )
        self._held_out, self._stage["last"] = None, now
        self.history.append(record)
        self._write({"event": "step", "lr": self.scheduler.get_last_lr()[0], **dataclasses.asdict(record)})
        if self._bar is not None:
            self._bar(event, record)

    def _on_phase(self, event: PhaseEvent) -> None:
        if event.when == "start":
            self._start_stage()
            return
        self._end_stage(event)

    def _start_stage(self) -> None:
        self._held_out = self.held_out_loss()
        self._stage = {"sparsity": total_sparsity(self.model), "held_out": self._held_out, "seconds": []}
        self._stage["footprint"] = self._footprint()
        self._activations = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _end_stage(self, event: PhaseEvent) -> None:
        self._note_peak(str(event.phase))
        summary, steps = event.summary, event.summary.steps
        seconds = self._stage["seconds"]
        after = self.held_out_loss()
        self._held_out = after
        tokens = self.batch * self.seq * self.cycle.accumulation
        self.rows.append(
            PhaseRow(
                phase=str(event.phase),
                cycle=event.cycle,
                steps=steps,
                loss_first=summary.loss_first if steps else None,
                loss_last=summary.loss_last if steps else None,
                held_out_before=self._stage["held_out"],
                held_out_after=after,
                # Of the median step; the first one, which compiles, is not among them.
                tokens_per_s=tokens / statistics.median(seconds) if seconds else None,
                sparsity=summary.sparsity,
            )
        )
        self._write({"event": "phase", **dataclasses.asdict(self.rows[-1]), "summary": summary.to_dict()})

    def _on_commit(self, result: CommitResult) -> None:
        after = self.held_out_loss()
        row = PhaseRow(
            phase="commit",
            cycle=self.cycle.cycle,
            steps=0,
            held_out_before=self.rows[-1].held_out_after,
            held_out_after=after,
            sparsity=result.sparsity,
            resurrected=result.resurrected,
            kept=result.kept,
        )
        self.rows.append(row)
        self._write({"event": "commit", **dataclasses.asdict(row), "churn": result.churn})

    def _note_peak(self, phase: str) -> None:
        """Keep the bill of the phase with the highest peak. Gradients are gone by now: as large as what trains."""
        peak = device_peak(self.device)
        if peak <= self._peak["bytes"]:
            return
        bill = memory_bill(self.model, self.optimizer)
        if phase == "resu":
            bill["θ gradient"] = sum(a.numel() * a.element_size() for a in self._theta_anchors())
            trained = [p for _, p in other_parameters(self.model)]
        else:
            trained = list(self.model.parameters())
        bill["gradients"] = sum(p.numel() * p.element_size() for p in trained if p.requires_grad)
        bill["activations saved for the backward"] = self._activations
        bill["held-out batches"] = sum(t.numel() * t.element_size() for b in self.checks for t in b)
        if self.baseline:
            bill["interpreter and libraries"] = self.baseline
            bill["compiler, growth over first steps"] = self._compiler
        self._peak = {"bytes": peak, "bill": bill, "phase": phase}

    def _theta_anchors(self) -> list[Tensor]:
        return [m.entry.anchor for m in managed_weights(self.model).values() if m.entry.anchor is not None]

    # Running

    @property
    def _corpus_digest(self) -> str:
        return self.corpus.meta["splits"]["train"]["sha256"]

    @property
    def _checkpoint(self) -> Path:
        return self.args.out / "checkpoint"

    def resume(self) -> None:
        """Go on from the last checkpoint; the log is cut back to it."""
        extra = checkpoint.load(self.cycle, self._checkpoint)
        for name, value in (("batch", self.batch), ("seq", self.seq), ("corpus", self._corpus_digest)):
            if extra[name] != value:
                raise ConfigError(
                    f"--resume: the checkpoint was made with {name}={extra[name]!r}, this run has {value!r}"
                )
        self.scheduler.load_state_dict(extra["scheduler"])
        self.history = [StepRecord(**r) for r in extra["history"]]
        self.rows = [PhaseRow(**r) for r in extra["rows"]]
        self._stage = {**extra["stage"], "last": None}
        self._peak, self._held_out = extra["peak"], extra["held_out"]

    def save(self) -> None:
        """Write the checkpoint folder."""
        extra = {
            "batch": self.batch,
            "seq": self.seq,
            "corpus": self._corpus_digest,
            "scheduler": self.scheduler.state_dict(),
            "history": [dataclasses.asdict(r) for r in self.history],
            "rows": [dataclasses.asdict(r) for r in self.rows],
            "stage": {k: v for k, v in self._stage.items() if k in ("sparsity", "held_out", "seconds")},
            "peak": self._peak,
            "held_out": self._held_out,
        }
        checkpoint.save(self.cycle, self._checkpoint, extra)

    def _write(self, record: dict[str, Any]) -> None:
        self._log.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._log.flush()

    def _open_log(self) -> Any:
        """Append after a resume, without the lines that the checkpoint does not know; else start anew."""
        path = self.args.out / "log.jsonl"
        kept: list[str] = []
        if self.args.resume and path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line).get("step", 0) <= self.cycle.global_step:
                        kept.append(line)
        file = path.open("w")
        file.writelines(f"{line}\n" for line in kept)
        return file

    def train(self) -> None:
        """Train until the cycle is complete."""
        parts = self.cycle.accumulation
        start, stop = self.cycle.global_step * parts, self.cycle.total_steps * parts
        source = batches(self.corpus.train, self.batch, self.seq, seed=self.config.seed, start=start, stop=stop)
        with self._open_log() as self._log, self._progress(), Prefetcher(source, device=self.device) as data:
            for batch in data:
                self.cycle.step(batch)
                due = self.args.save_every and self.cycle.global_step % self.args.save_every == 0
                if due and not self.cycle._micro:
                    self.save()
            self.save()

    @contextlib.contextmanager
    def _progress(self):
        if self.args.quiet:
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("cycle {task.fields[cycle]} {task.fields[stage]:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:>9}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(
                "", total=self.cycle.total_steps, completed=self.cycle.global_step, cycle=1, stage="compiling",
                loss=math.nan, rate="",
            )  # fmt: skip

            def show(event: StepEvent, record: StepRecord) -> None:
                rate = "" if record.tokens_per_s is None else f"{record.tokens_per_s:,.0f} tok/s"
                progress.update(
                    task, completed=event.step, cycle=event.cycle + 1, stage=event.stage, loss=record.loss, rate=rate
                )

            self._bar = show
            yield
            self._bar = None

    def report(self) -> None:
        """Print the tables; write report.json and report.png."""
        if self._held_out is not None and self.history:
            self.history[-1] = dataclasses.replace(self.history[-1], held_out=self._held_out)
        memory = [MemoryRow(name, size) for name, size in self._peak["bill"].items() if size]
        name = "peak of the GPU allocator" if self.device.type == "cuda" else "peak resident set"
        print(phase_table(self.rows))
        print(f"\nMemory at the highest peak ({self._peak['phase']} phase):\n")
        print(memory_table(memory, peak_bytes=self._peak["bytes"], peak_name=name))
        graphs = {tag: (len(e.graphs), e.breaks, e.recompiles) for tag, e in runner_of(self.model).entries.items()}
        for tag, (count, breaks, again) in graphs.items():
            print(f"compiled {tag}: graphs {count}, breaks {breaks}, recompilations {again}")
        info = {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokens_per_step": self.batch * self.seq * self.config.accumulation,
            "corpus": {k: self.corpus.meta[k] for k in ("tokenizer", "vocab_size", "source_bytes")},
            "config": self.config.to_dict(),
            "cycles": [s.to_dict() for s in self.cycle.summaries],
            "skipped": self.cycle.skipped,
            "graphs": graphs,
        }
        out = self.args.out
        write_report(
            out / "report.json",
            phases=self.rows,
            history=self.history,
            memory=memory,
            peak_bytes=self._peak["bytes"],
            info=info,
        )
        plot(out / "report.png", self.history, title="RESU on a GPT: loss, sparsity and memory")
        print(f"\nreport: {out / 'report.json'}  picture: {out / 'report.png'}  log: {out / 'log.jsonl'}")
