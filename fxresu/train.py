"""`fxresu train`: a GPT on real text through the whole cycle, with a log, checkpoints and a report at the end."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from .activations import saved_bytes
from .config import CycleConfig
from .corpus import Corpus
from .cycle import PhaseEvent, ResuCycle, StepEvent, default_loss
from .data import Prefetcher, batches, held_out_batches
from .errors import ConfigError
from .host_memory import HostPlan, heap_free, mapped_bytes, plan_micro_batch, release, resident_parts, split
from .ledger import current_rss, memory_bill
from .log_sinks import load_sinks
from .memory_bill import TRANSITIONS
from .report import StepRecord, phase_table
from .run_log import RunLog
from .run_memory import FREE_HEAP
from .run_record import read_log
from .runner import runner_of
from .sizes import size_text
from .train_options import add_arguments, check, cycle_config
from .train_setup import framework_bytes, make_model, make_writable, open_corpus, pick_device, sequence_length
from .transform import transform

__all__ = ["Training", "add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Train as the options say; 0 when the run is complete."""
    check(args)
    config = cycle_config(args)
    device = pick_device(args.device)
    if args.host_budget is not None and device.type != "cpu":
        raise ConfigError(f"--host-budget={args.host_budget}: is for training on a CPU, and this run is on {device}")
    make_writable(args.out)
    load_sinks(sinks(args))
    baseline = framework_bytes(device, args.compile)
    corpus = open_corpus(args, sequence_length(args, device))
    with _tf32(device):
        training = Training(args, config, corpus, device, baseline)
        if args.resume:
            training.resume()
        training.train()
        training.report()
    return 0


@contextlib.contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """Float32 products as TF32 on CUDA, for this run only: the setting is the whole process's."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sinks(args: argparse.Namespace) -> str | list[str]:
    """Where numbers go besides the log. Within a host budget only where it was asked for: importing takes memory."""
    return args.log or ("auto" if args.host_budget is None else [])


class Training:
    """One run: model, optimizer, cycle and data, and everything that is recorded on the way."""

    def __init__(
        self, args: argparse.Namespace, config: CycleConfig, corpus: Corpus, device: torch.device, baseline: int
    ) -> None:
        self.args, self.device, self.baseline = args, device, baseline
        self.files = resident_parts().get("file", 0)
        self.seq, self.batch = sequence_length(args, device), args.batch or (8 if device.type == "cpu" else 32)
        self.corpus = corpus
        torch.manual_seed(config.seed)
        model = make_model(args, corpus.vocab_size, self.seq, device)
        self.gpt = model.config
        self.checks = held_out_batches(corpus.held_out, args.eval_batches, self.batch, self.seq, device=device)
        self.plan = None if args.host_budget is None else self._plan(model, config)
        # Micro-batches of a batch; the configuration's own accumulation is over whole batches.
        self.parts = 1 if self.plan is None else self.plan.parts
        self.checks = list(split(self.checks, self.parts))
        self.config = dataclasses.replace(config, accumulation=config.accumulation * self.parts)
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
        self.cycle = ResuCycle(self.model, self.optimizer, self.config, loss=self._loss)
        self.scheduler = LambdaLR(self.optimizer, self._lr_factor)
        self.log = RunLog(
            args.out,
            tokens=self.batch * self.seq * config.accumulation,
            evaluate=self.held_out_loss,
            bill=self._tensors,
            host=self._host,
            sinks=sinks(args),
            title="RESU on a GPT",
        )
        self.log.info = {"corpus": {k: corpus.meta[k] for k in ("tokenizer", "vocab_size", "source_bytes")}}
        self.log.follow(self.cycle)
        self.cycle.on_step(self._on_step)
        self.cycle.on_phase(self._on_phase)
        self._stage_start: tuple[int, int, int] | None = None
        self._activations = 0
        self._compiler = 0

    @staticmethod
    def _prunes(config: CycleConfig) -> bool:
        return any(config.has_work(cycle) for cycle in range(config.cycles))

    def _plan(self, model: torch.nn.Module, config: CycleConfig) -> HostPlan:
        """Of the model as it is before the transform: its dense phase holds the most."""
        inputs, targets = self.checks[0]
        return plan_micro_batch(
            model,
            lambda: model(inputs[:1], targets[:1]),
            budget=self.args.host_budget,
            batch=self.batch,
            mapped=sum(2 * len(part) for part in (self.corpus.train, self.corpus.held_out)),
            # The first phase's step, its forward without gradients, and as much as one more for the sparse phases and
            # RESU, which reuse what those free.
            compiled_graphs=0 if not self.args.compile else 3 if self._prunes(config) else 2,
        )

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
        """(compiled functions, resident bytes, bytes that something else explains) right now."""
        if self.plan is not None:
            release()  # what the compiler has left for garbage
        explained = sum(memory_bill(self.model, self.optimizer).values())
        explained += resident_parts().get("file", 0) + heap_free()
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
        if self.cycle.meter.steps == 1 and self._stage_start is not None:
            self._note_compiler(self._stage_start)

    def _on_phase(self, event: PhaseEvent) -> None:
        if self.plan is not None:
            release()
        if event.when == "start":
            self._stage_start, self._activations = self._footprint(), 0

    def _tensors(self, stage: str) -> dict[str, int]:
        """What the run has on the device beside the model and its training."""
        return {
            "activations": 0 if stage in TRANSITIONS else self._activations,
            "held-out batches": sum(t.numel() * t.element_size() for b in self.checks for t in b),
        }

    def _host(self, stage: str) -> dict[str, int]:
        """What the process holds beside tensors. Within a budget free heap goes back before a transition."""
        tokens = mapped_bytes(self.corpus.train.path, self.corpus.held_out.path)
        code = resident_parts().get("file", 0) - self.files - tokens
        return {
            "interpreter and libraries": self.baseline,
            "libraries' code, read since": max(0, code),
            "token files, mapped pages": tokens,
            "compiler, growth over first steps": self._compiler,
            FREE_HEAP: 0 if self.plan is not None and stage in TRANSITIONS else heap_free(),
        }

    def _predicted(self, stages: tuple[str, ...]) -> dict[str, Any]:
        """The bill that `fxresu memory` makes of this run, in a process of its own: what it takes while it rehearses
        is no part of the run's memory."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "bill.json"
            command = [sys.executable, "-m", "fxresu", *self.memory_command(stages), f"--json={file}"]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
            return json.loads(file.read_text())

    def memory_command(self, stages: tuple[str, ...]) -> list[str]:
        """The arguments of `fxresu` that predict this run."""
        config, args, shape = self.config, self.args, self.gpt
        model = "&".join(f"{f.name}={getattr(shape, f.name)}" for f in dataclasses.fields(shape))
        given = {
            "batch": self.batch // self.parts, "seq": self.seq, "optimizer": "adamw", "device": self.device.type,
            "autocast": config.autocast or "none", "accumulation": config.accumulation, "storage": args.storage,
            "sparsity": max(config.sparsity(c) for c in range(config.cycles)), "granularity": config.granularity,
            "candidates": config.candidates, "rule": config.rule, "theta-moments": config.theta_moments,
            "theta-dtype": config.theta_dtype, "optimizer-state": config.optimizer_state,
        }  # fmt: skip
        flags = ["--compile" if args.compile else "--no-compile", *(["--train-rest"] if config.train_rest else [])]
        flags += ["--theta-in-backward"] if config.theta_in_backward else []
        return [
            "memory", f"demo?{model}", *(f"--{name}={value}" for name, value in given.items()), *flags,
            *(f"--phase={name}" for name in stages),
        ]  # fmt: skip

    # Running

    @property
    def _corpus_digest(self) -> str:
        return self.corpus.meta["splits"]["train"]["sha256"]

    @property
    def _checkpoint(self) -> Path:
        return self.args.out / "checkpoint"

    def resume(self) -> None:
        """Go on from the last checkpoint; the log is cut back to it."""
        extra = self.cycle.load(self._checkpoint)
        for name, value in (("batch", self.batch), ("seq", self.seq), ("corpus", self._corpus_digest)):
            if extra[name] != value:
                raise ConfigError(
                    f"--resume: the checkpoint was made with {name}={extra[name]!r}, this run has {value!r}"
                )
        self.scheduler.load_state_dict(extra["scheduler"])

    def save(self) -> None:
        """Write the checkpoint folder."""
        extra = {
            "batch": self.batch,
            "seq": self.seq,
            "corpus": self._corpus_digest,
            "scheduler": self.scheduler.state_dict(),
        }
        self.cycle.save(self._checkpoint, extra, keep_last=self.args.keep_last)

    def train(self) -> None:
        """Train until the cycle is complete."""
        whole = self.config.accumulation // self.parts
        start, stop = self.cycle.global_step * whole, self.cycle.total_steps * whole
        source = batches(self.corpus.train, self.batch, self.seq, seed=self.config.seed, start=start, stop=stop)
        tokens = self.batch * self.seq // self.parts
        weight = tokens if self.config.accumulation_normalization == "tokens" else None
        with self._progress(), Prefetcher(split(source, self.parts), device=self.device) as data:
            for batch in data:
                self.cycle.step(batch, weight=weight)
                due = self.args.save_every and self.cycle.global_step % self.args.save_every == 0
                if due and not self.cycle.accumulated:
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

            self.log.listener = show
            yield
            self.log.listener = None

    def report(self) -> None:
        """Print the tables; write the reports."""
        graphs = {tag: (len(e.graphs), e.breaks, e.recompiles) for tag, e in runner_of(self.model).entries.items()}
        page = self.log.finish(
            write=_report_apart if self.plan else None,
            predict=self._predicted if self.args.memory_bill else None,
            graphs=graphs,
        )
        page = page or self.args.out / "report.html"
        out, record = self.args.out, read_log(self.args.out / "log.jsonl")
        (peak, stage), bill = record.peak, record.bill
        print(phase_table(record.phases))
        if bill is not None:
            print(f"\nMemory, {bill}")
        if record.not_predicted:
            print(f"not predicted: {record.not_predicted}")
        name = "peak of the GPU's allocator" if self.device.type == "cuda" else "peak resident set"
        print(f"{name}: {size_text(peak)}, {stage}")
        if self.plan is not None:
            kept = "kept" if record.peak_rss <= self.plan.budget else "EXCEEDED"
            print(f"\n{self.plan}; {record.peak_rss / 1e6:,.0f} MB measured: {kept}")
        for entry in runner_of(self.model).entries.values():
            what = f"phase {entry.plan.phase}" if entry.plan.trains else "calls without gradients"
            print(
                f"compiled for {what}: graphs {len(entry.graphs)}, graph breaks {entry.breaks},"
                f" recompilations {entry.recompiles}"
            )
        print(f"\nreport: {page}  the same as data: {out / 'report.json'}  log: {out / 'log.jsonl'}")


def _report_apart(folder: Path) -> Path:
    """The reports, written by another process: what draws them takes more memory than a step may."""
    subprocess.run([sys.executable, "-m", "fxresu", "report", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder / "report.html"
