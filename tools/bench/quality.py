"""What the savings cost in quality: held-out loss after equal steps on text, everything saved against all in fp32.

GPT-2 124M with random weights trains on source code and documentation of this machine (24 MB, byte-level BPE; nothing
is downloaded), every form from the same weights on the same batches for the same steps, with every seed.

- dense/fp32: AdamW in float32 without TF32. dense/AMP: under bfloat16 autocast.
- dense/bf16: weights, gradients and moments in bfloat16, rounded to nearest: savings without care.
- dense/savings: bfloat16 weights rounded stochastically, 8-bit moments in host memory, gradients consumed as they are
  made, blocks recomputed from inputs in host memory, no whole logits (`StreamedAdamW`, `stream_blocks`,
  `linear_cross_entropy`). dense/savings, factored: and the second moment as a row and a column of each weight.
- cycle/fp32, cycle/savings: the same pair through RESU cycles to 50 %; with the savings θ's moments are 8-bit too.

Reported: held-out loss (nats per token) of every seed, their mean, and their spread (largest less smallest): the noise
that a difference has to be seen in.

    python tools/bench/quality.py --out tools/bench/results/quality.json
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchlib.models import SIZES, Size, build
from benchlib.results import Run, arguments
from benchlib.text import text_corpus
from benchlib.timing import device_type, synchronize
from torch import Tensor, nn

import fxresu
from fxresu import CycleConfig, ResuCycle, StreamedAdamW, linear_cross_entropy, stream_blocks
from fxresu.corpus import Corpus
from fxresu.data import Batch, batch_at, held_out_batches

FORMS = {
    "dense/fp32": True, "dense/AMP": True, "dense/bf16": True, "dense/savings": True,
    "dense/savings, factored": True, "cycle/fp32": True, "cycle/savings": True,
}  # fmt: skip
MAX_NORM, SPARSITY = 1.0, 0.5


class Loss(nn.Module):
    """(inputs, targets) [B, T] to the mean cross-entropy, with logits that are whole or never are."""

    def __init__(self, model: nn.Module, tiled: bool) -> None:
        super().__init__()
        self.model, self.tiled = model, tiled

    def forward(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        if self.tiled:
            hidden = self.model.base_model(inputs, use_cache=False).last_hidden_state
            return linear_cross_entropy(hidden, self.model.get_output_embeddings().weight, targets)
        logits = self.model(inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Training:
    """One form from one seed's weights: `step(batch)` and the model.

    Attributes:
        schedule: of the learning rate; warmed up, then a cosine to a tenth.
    """

    def __init__(self, form: str, size: Size, seed: int, args: Any) -> None:
        kind, how = form.split("/")
        how, _, special = how.partition(", ")
        saving = how == "savings"
        network = build(size, seed=seed).model.to(torch.bfloat16 if saving or how == "bf16" else torch.float32)
        self.model = Loss(network, tiled=saving)
        self.autocast = torch.autocast(device_type(), torch.bfloat16, enabled=how == "AMP")
        compiled: Any = {"backend": args.compiler}
        if kind == "cycle":
            fxresu.transform(self.model, sparsity=SPARSITY, compile=False if saving else compiled)
        self.call: Callable[[Batch], Tensor] = self.model
        if saving:
            clip = {"max_norm": MAX_NORM} if kind == "dense" else {}
            self.optimizer: torch.optim.Optimizer = StreamedAdamW(
                self.model.parameters(), lr=args.lr, moments=special or "8bit", seed=seed, **clip
            )
            stream_blocks(self.model, compile=compiled, recompute=1.0, offload=True, optimizer=self.optimizer)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, fused=device_type() == "cuda")
            if kind == "dense":
                self.call = torch.compile(self.model, backend=args.compiler)
        self.cycle = None
        if kind == "cycle":
            config = _cycle(args, seed, saving)
            self.cycle = ResuCycle(self.model, self.optimizer, config, loss=lambda module, batch: module(batch))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, functools.partial(_share, args.steps))

    def step(self, batch: Batch) -> Tensor:
        """One step; its loss."""
        if self.cycle is not None:
            loss = self.cycle.step(batch)
        else:
            with self.autocast:
                loss = self.call(batch)
            loss.backward()
            if not isinstance(self.optimizer, StreamedAdamW):  # it clips by itself
                nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return loss.detach()


def _share(steps: int, step: int) -> float:
    warm = max(steps // 20, 1)
    return (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def _cycle(args: Any, seed: int, saving: bool) -> CycleConfig:
    return CycleConfig(
        cycles=args.cycles, steps_per_cycle=args.steps // args.cycles, split=(0.5, 0.2, 0.3), sparsity_start=SPARSITY,
        sparsity_end=SPARSITY, rule="adam", theta_moments="8bit" if saving else "fp32", seed=seed,
    )  # fmt: skip


def measure(form: str, size: Size, corpus: Corpus, args: Any) -> dict[str, Any]:
    """Every seed of one form."""
    held_out = held_out_batches(corpus.held_out, args.held_out, args.batch, size.context, device=device_type())
    losses, first, ends, seconds = [], [], [], []
    for seed in range(args.seeds):
        torch._dynamo.reset()
        training = Training(form, size, seed, args)
        began = time.monotonic()
        loss = torch.zeros(())
        for step in range(args.steps):
            loss = training.step(batch_at(corpus.train, step, args.batch, size.context, seed, device=device_type()))
            if step == 0:
                first.append(float(loss))
        synchronize()
        seconds.append(time.monotonic() - began)
        ends.append(float(loss))
        losses.append(_evaluate(training, held_out))
        print(f"{form}, seed {seed}: held-out {losses[-1]:.4f} in {seconds[-1]:.0f} s", file=sys.stderr, flush=True)
        del training
    if not all(math.isfinite(loss) and loss < start for loss, start in zip(losses, first)):
        raise AssertionError(f"{form}: losses went from {first} to {losses}")
    return {
        "held_out": losses, "mean": statistics.fmean(losses), "spread": max(losses) - min(losses),
        "first_loss": first, "last_loss": ends, "seconds": seconds, "tokens_per_step": args.batch * size.context,
    }  # fmt: skip


@torch.no_grad()
def _evaluate(training: Training, batches: list[Batch]) -> float:
    was = training.model.training
    training.model.eval()
    with training.autocast:
        losses = [float(training.model(batch)) for batch in batches]
    training.model.train(was)
    return statistics.fmean(losses)


def table(run: Run) -> str:
    """Means, differences from float32 of the same kind, and seed noise."""
    lines = [f"{'form':<24} {'held-out':>9} {'spread':>8} {'against fp32':>13} {'s':>7}"]
    for name, row in run.cases.items():
        if "mean" not in row:
            lines.append(f"{name:<24} {row.get('error', row.get('skipped'))}")
            continue
        base = run.cases.get(f"{name.split('/')[0]}/fp32", {}).get("mean", math.nan)
        lines.append(
            f"{name:<24} {row['mean']:9.4f} {row['spread']:8.4f} {row['mean'] / base - 1:+12.2%}"
            f" {statistics.fmean(row['seconds']):7.0f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.set_defaults(steps=400)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--context", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=2, help="of the forms with cycles")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--held-out", type=int, default=16, metavar="N", help="batches of held-out text")
    parser.add_argument("--text-bytes", type=int, default=24_000_000)
    parser.add_argument("--vocabulary", type=int, default=8192)
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("highest")
    whole = SIZES[args.size]
    size = Size(whole.kind, whole.config, args.batch, args.context)
    kept = ("size", "batch", "context", "seeds", "cycles", "lr", "held_out", "text_bytes", "vocabulary")
    run = Run("quality", args, {**{k: getattr(args, k) for k in kept}, "sparsity": SPARSITY})
    with tempfile.TemporaryDirectory() as folder:
        corpus = None if args.list else text_corpus(Path(folder), args.text_bytes, args.vocabulary, args.context)
        run.run({form: functools.partial(measure, form, size, corpus, args) for form in FORMS}, FORMS.__getitem__)
    print(table(run))
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
