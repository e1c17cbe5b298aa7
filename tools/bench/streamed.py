"""Full training steps with streamed moments, activations and weights, against AdamW with everything on the device.

Every case is a fresh model with random bfloat16 weights, made on the device, and trains on one batch of random tokens:
the loss must fall, and the first losses of all cases can be compared. Reported: the step by CUDA events, tokens/s, and
the peak of the whole device (context, libraries, allocator) over the timed steps. `baseline/*` is uncapped AdamW in
bfloat16 throughout (weights, gradients, moments; fused): "whole" compiled as one graph, "blocks" block by block, with
the first `--baseline-recompute` share of blocks recomputed where the activations would not fit. `window/*` are
optimizer steps of four micro-batches with clipping and a learning-rate schedule. A case that fails is recorded with its
error.

    python tools/bench/streamed.py --size 1.24B --out tools/bench/results/streamed_1.24B.json
    python tools/bench/streamed.py --size 6.7B --only 'baseline/blocks' 'streamed/8bit' --out FILE

Both take a minute or two on an H100; almost all of it is compilation and the pinning of host memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable
from typing import Any

# Slots, gradients and tiles have many sizes: without this the allocator's fragments would count as memory.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F
from benchlib.models import Size, build, tokens
from benchlib.results import Run, arguments
from benchlib.timing import device_type, synchronize, time_calls
from torch import Tensor, nn

import fxresu
from fxresu import StreamedAdamW, linear_cross_entropy, stream_blocks

_LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
_TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setup:
    """A size and how it is streamed by default.

    Attributes:
        recompute, offload, weights: of `stream_blocks`.
        baseline_recompute: share of blocks that the baseline recomputes, because 80 GB do not hold their activations.
        chunk: of `StreamedAdamW`.
    """

    size: Size
    recompute: float
    offload: bool
    weights: int
    baseline_recompute: float
    chunk: int


# 1.24B: 2.5 GB of weights leave room for most activations. 6.7B: 13.5 GB of weights leave none, nor for all of these.
SETUPS = {
    "1.24B": Setup(Size("llama", _LLAMA_1B, 4, 1024), 0.375, False, 0, 0.0, 2**24),
    "6.7B": Setup(Size("llama", _LLAMA_7B, 4, 2048), 1.0, True, 10, 0.6, 2**23),
    "tiny": Setup(Size("llama", _TINY, 2, 32), 1.0, True, 2, 0.5, 2**12),
}
LEARNING_RATE, MAX_NORM, WINDOW = 1e-4, 1.0, 4


class TiledLoss(nn.Module):
    """tokens [B, T] to the loss of the next token, without whole logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.model.model(batch, use_cache=False).last_hidden_state
        return linear_cross_entropy(hidden, self.model.lm_head.weight, batch.roll(-1, 1))


class WholeLoss(TiledLoss):
    """The usual way."""

    def forward(self, batch: Tensor) -> Tensor:
        logits = self.model(batch, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, -2).float(), batch.roll(-1, 1).flatten())


@dataclasses.dataclass
class Job:
    """A model that is ready to train."""

    call: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    model: nn.Module
    extras: Callable[[], dict[str, Any]] = dict


def _model(size: Size) -> nn.Module:
    """Random bfloat16 weights, made as such: float32 ones would be the run's highest point."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return build(size, torch.bfloat16).model
    finally:
        torch.set_default_dtype(before)


def _compile(args: Any) -> dict[str, Any]:
    return {"backend": args.compiler}


def baseline(setup: Setup, args: Any, whole: bool) -> Job:
    """Uncapped AdamW with bfloat16 moments."""
    model = _model(setup.size)
    fused = {"fused": True} if device_type() == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, **fused)
    if whole:
        module = WholeLoss(model)
        return Job(torch.compile(module, **_compile(args)), optimizer, module)
    share = setup.baseline_recompute if args.baseline_recompute is None else args.baseline_recompute
    stream_blocks(model, compile=_compile(args), recompute=share)
    module = TiledLoss(model)
    return Job(module, optimizer, module)


def streamed(setup: Setup, args: Any, moments: str, clip: str | None = None, plain: bool = False) -> Job:
    """`StreamedAdamW` under `stream_blocks`. plain: blocks as the baseline has them, so that only moments differ."""
    model = _model(setup.size)
    optimizer = StreamedAdamW(
        model.parameters(), lr=LEARNING_RATE, moments=moments, chunk=args.chunk or setup.chunk,
        lookahead=args.lookahead, device_bytes=int(args.device_gb * 1e9),
        max_norm=None if clip is None else MAX_NORM, clip=clip or "running",
    )  # fmt: skip
    given = {"recompute": args.recompute, "offload": args.offload, "weights": args.weights}
    own = {"recompute": setup.recompute, "offload": setup.offload, "weights": setup.weights}
    options = {k: own[k] if v is None else v for k, v in given.items()}
    if plain:
        options = {"recompute": setup.baseline_recompute, "offload": False, "weights": 0}
    blocks = stream_blocks(model, compile=_compile(args), optimizer=optimizer, slots=args.slots, **options)
    module = TiledLoss(model)

    def extras() -> dict[str, Any]:
        found: dict[str, Any] = dict(optimizer.statistics())
        found["workspace_bytes"] = optimizer.workspace_bytes
        if blocks.weights is not None:
            found |= {"weights_fetched": blocks.weights.fetched, "weights_misses": blocks.weights.misses}
        if blocks.activations is not None:
            found["inputs_sent"] = blocks.activations.sent
        return {**found, **options}

    return Job(module, optimizer, module, extras)


def measure(make: Callable[[], Job], window: bool, setup: Setup, args: Any) -> dict[str, Any]:
    """Time and peak of steps (or windows of four micro-batches) of a job."""
    job, size = make(), setup.size
    batch = tokens(size, args.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(job.optimizer, lambda step: 1.0)
    losses: list[Tensor] = []

    def step() -> None:
        losses.append(_window(job, batch, schedule) if window else _step(job, batch))

    for _ in range(max(args.warmup, 2)):
        step()
    _forget_peaks()
    row: dict[str, Any] = {"first_loss": float(losses[0])}
    row |= time_calls(step, 0, args.steps) | _peaks()
    last = float(losses[-1])
    if not (math.isfinite(last) and last < row["first_loss"]):
        raise AssertionError(f"losses {row['first_loss']} to {last} on one batch do not fall")
    count = batch.numel() * (WINDOW if window else 1)
    row |= {"last_loss": last, "tokens": count, "tokens_per_s": count / (row["median_ms"] * 1e-3)}
    row["parameters"] = sum(p.numel() for p in job.model.parameters())
    return row | job.extras()


def measure_cycle(setup: Setup, args: Any) -> dict[str, Any]:
    """Peaks of every stage of a RESU cycle at 50 % sparsity, a stage's with the transition at its end; median step."""
    model = TiledLoss(_model(setup.size))
    fxresu.transform(model, sparsity=0.5, candidates=args.alpha, compile=False)
    optimizer = StreamedAdamW(model.parameters(), lr=LEARNING_RATE, chunk=args.chunk or setup.chunk)
    recompute = setup.recompute if args.recompute is None else args.recompute
    stream_blocks(model, compile=_compile(args), recompute=recompute, offload=setup.offload, optimizer=optimizer)
    steps = max(args.steps // 2, 2)
    config = fxresu.CycleConfig(
        cycles=1, train_steps=steps, stabilize_steps=steps, resu_steps=steps, sparsity_end=0.5, schedule="constant",
        candidates=args.alpha, rule="adam", theta_moments="8bit",
    )  # fmt: skip
    cycle, batch = fxresu.ResuCycle(model, optimizer, config), tokens(setup.size, args.batch)
    row: dict[str, Any] = {"stages": {}, "alpha": args.alpha, "recompute": recompute}
    while not cycle.finished:
        stage = cycle.stage
        _forget_peaks()
        times = time_calls(lambda: cycle.step(batch), 0, steps)
        row["stages"][stage] = {"p10_ms": times["p10_ms"], **_peaks()}
    peaks = [s["peak_device_bytes"] for s in row["stages"].values() if "peak_device_bytes" in s]
    loss = float(cycle.step(batch))
    if not math.isfinite(loss):
        raise AssertionError(f"loss {loss} after the cycle")
    return row | {"last_loss": loss, "peak_device_bytes": max(peaks, default=math.nan)}


def _step(job: Job, batch: Tensor) -> Tensor:
    loss = job.call(batch)
    loss.backward()
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _window(job: Job, batch: Tensor, schedule: Any) -> Tensor:
    """Four micro-batches, clipping and the scheduler; the on-device optimizer clips with torch's own function."""
    own = isinstance(job.optimizer, StreamedAdamW)
    total = batch.new_zeros((), dtype=torch.float32)
    for i in range(WINDOW):
        loss = job.call(batch) / WINDOW
        if own and i + 1 < WINDOW:
            with job.optimizer.accumulate():
                loss.backward()
        else:
            loss.backward()
        total += loss.detach()
    if not own:
        nn.utils.clip_grad_norm_(job.model.parameters(), MAX_NORM)
    job.optimizer.step()
    schedule.step()
    job.optimizer.zero_grad(set_to_none=True)
    return total


def _forget_peaks() -> None:
    synchronize()
    if device_type() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peaks() -> dict[str, int]:
    """Of the allocator, and of the device; what is not the allocator's (context, libraries) does not shrink."""
    if device_type() != "cuda":
        return {}
    synchronize()
    free, total = torch.cuda.mem_get_info()
    other = total - free - torch.cuda.memory_reserved()
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "peak_device_bytes": torch.cuda.max_memory_reserved() + other,
        "other_bytes": other,
    }


def cases(setup: Setup, args: Any) -> dict[str, tuple[Callable[[], dict[str, Any]], bool]]:
    """Every case, and whether it runs without `--only`."""
    small = setup.baseline_recompute == 0.0

    def case(make: Callable[..., Job], *how: Any, window: bool = False, **more: Any) -> Callable[[], dict[str, Any]]:
        return functools.partial(measure, functools.partial(make, setup, args, *how, **more), window, setup, args)

    return {
        "baseline/whole": (case(baseline, True), small),
        "baseline/blocks": (case(baseline, False), True),
        "streamed/8bit": (case(streamed, "8bit"), True),
        "streamed/bf16": (case(streamed, "bf16"), False),
        "streamed/8bit/clip running": (case(streamed, "8bit", "running"), False),
        "streamed/8bit/clip exact": (case(streamed, "8bit", "exact"), False),
        "window/on device": (case(baseline, False, window=True), small),
        "window/streamed": (case(streamed, "8bit", "running", True, window=True), small),
        "window/streamed exact": (case(streamed, "8bit", "exact", True, window=True), False),
        "cycle/streamed": (functools.partial(measure_cycle, setup, args), False),
    }


def table(run: Run) -> str:
    """Milliseconds, tokens/s against the best baseline, and peaks in 10^9 bytes."""
    done = {name: row for name, row in run.cases.items() if "median_ms" in row}
    best = max((r["tokens_per_s"] for n, r in done.items() if n.startswith("baseline/")), default=math.nan)
    device = done.get("window/on device", {}).get("tokens_per_s", math.nan)
    lines = [f"{'case':<30} {'ms':>9} {'tokens/s':>9} {'of base':>8} {'peak GB':>8} {'misses':>7}"]
    for name, row in done.items():
        base = device if name.startswith("window/") else best
        peak = row.get("peak_device_bytes", math.nan) / 1e9
        lines.append(
            f"{name:<30} {row['median_ms']:9.1f} {row['tokens_per_s']:9.0f} {row['tokens_per_s'] / base:8.2f}"
            f" {peak:8.2f} {row.get('misses', ''):>7}"
        )
    for name, row in run.cases.items():
        for stage, found in row.get("stages", {}).items():
            peak = found.get("peak_device_bytes", math.nan) / 1e9
            lines.append(f"{name + ' ' + stage:<30} {found['p10_ms']:9.1f} {'':>9} {'':>8} {peak:8.2f}")
    return "\n".join([*lines, *(f"{n:<30} {r['error']}" for n, r in run.cases.items() if "error" in r)])


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.set_defaults(warmup=3, steps=8)
    parser.add_argument("--size", choices=SETUPS, default="1.24B")
    parser.add_argument("--batch", type=int, help="sequences of a micro-batch; default is the size's own")
    parser.add_argument("--recompute", type=float, help="share of blocks that streamed cases recompute")
    parser.add_argument("--baseline-recompute", type=float, help="share of blocks that baseline/blocks recomputes")
    parser.add_argument("--offload", action=argparse.BooleanOptionalAction, help="block inputs in host memory")
    parser.add_argument("--weights", type=int, help="blocks whose weights are in host memory")
    parser.add_argument("--slots", type=int, default=3, help="of such blocks that the device holds")
    parser.add_argument("--lookahead", type=int, default=2, help="parcels of moments brought ahead")
    parser.add_argument("--chunk", type=int, help="entries of a parcel")
    parser.add_argument("--device-gb", type=float, default=0.0, help="moments that stay on the device, in 10^9 bytes")
    parser.add_argument("--alpha", type=float, default=0.25, help="candidates of cycle/streamed")
    parser.add_argument("--cap", type=float, help="hard limit of the allocator for streamed cases, in 10^9 bytes")
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    setup = SETUPS[args.size]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "only", "list", "budget")}
    run = Run(f"streamed {args.size}", args, {**settings, "config": setup.size.config, "context": setup.size.context})
    found = cases(setup, args)
    run.run({n: functools.partial(_capped, n, c, args) for n, (c, _) in found.items()}, lambda n: found[n][1])
    print(table(run))
    return 1 if run.failed() else 0


def _capped(name: str, case: Callable[[], dict[str, Any]], args: Any) -> dict[str, Any]:
    """Streamed cases under `--cap`."""
    capped = args.cap is not None and device_type() == "cuda" and "streamed" in name
    if not capped:
        return case()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(args.cap * 1e9 / total)
    try:
        return case() | {"cap_bytes": int(args.cap * 1e9)}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


if __name__ == "__main__":
    sys.exit(main())
