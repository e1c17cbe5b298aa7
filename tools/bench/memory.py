"""The memory ladder: GPT-2 124M and 350M, Llama shapes of 1.24B, 3.2B and 6.7B, every phase and every transition.

Every variant is a process of its own, with random weights and random tokens, so that peaks do not mix. What fxresu
manages goes dense -> sparse -> RESU -> predict -> RESU -> commit -> sparse -> predict -> sparse -> dense, `--steps`
steps in each; peers train dense for two stretches, the second on a device that is warm, as that of the walk is. A row
has the peak of each stretch and of each transition alone, the largest of them, and the time of a median step, while
nothing waits for the device between steps. "peak_device_bytes" is that of the whole process as CUDA reports it:
context, libraries and kernels as well as what PyTorch's allocator holds (benchlib/whole_device.py). Variants with a cap
run under `torch.cuda.set_per_process_memory_fraction` and fail where they need more. What is not installed is said in
its row.

    python tools/bench/memory.py --size 1.24B --out tools/bench/results/memory_1.24B.json
    python tools/bench/memory.py --size 6.7B --only 'fxresu/streamed*' --steps 5 --budget 150 --out FILE
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# Slots, gradients and tiles have many sizes: without this the allocator's fragments would count as memory.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from benchlib.memory_variants import LEARNING_RATE, OPTIMIZERS, VARIANTS, MemoryVariant, NotHereError, plans_of
from benchlib.models import SIZES, build, build_on_host, tokens
from benchlib.results import Run, arguments, one_line
from benchlib.timing import device_type, synchronize
from benchlib.whole_device import DevicePeak, set_cap, used_bytes

import fxresu
from fxresu.model_state import freeze_rest, managed_weights, thaw_rest
from fxresu.streamed_blocks import find_blocks, stream_blocks

BY_NAME = {variant.name: variant for variant in VARIANTS}
# Sequences and tokens of a sequence in a step.
BATCHES = {"124M": (16, 1024), "350M": (16, 1024), "1.24B": (4, 1024), "3.2B": (4, 1024), "6.7B": (4, 2048)}
WALK = (
    "dense", "> sparse", "sparse", "> resu", "resu", "> predict", "predict", "> resu", "resu", "> sparse", "sparse",
    "> predict", "predict", "> sparse", "sparse", "> dense", "dense",
)  # fmt: skip
HOST_WALK = ("resu", "> predict", "predict", "> resu", "resu")


class Trainer:
    """One variant in this process: model, optimizer, batch, and the phase it is in."""

    def __init__(self, variant: MemoryVariant, args: argparse.Namespace) -> None:
        self.variant, self.phase = variant, "dense"
        size = SIZES[args.size]
        batch, context = BATCHES.get(args.size, (size.batch, size.context))
        self.batch = tokens(size, args.batch or variant.batch or batch)[:, :context]
        dtype = torch.bfloat16 if variant.dtype == "bf16" else torch.float32
        away = variant.host or "weights" in (variant.blocks or {})
        self.model = (build_on_host if away else build)(size, dtype)
        self.model.tiled = variant.tiled_loss and hasattr(self.model.model, "get_output_embeddings")
        if variant.checkpoint and hasattr(self.model.model, "gradient_checkpointing_enable"):
            self.model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        compiled: Any = {"backend": args.compiler} if variant.compiled else False
        self.call: Callable[[torch.Tensor], torch.Tensor] = self.model
        if variant.managed:
            whole = False if variant.blocks is not None or variant.host else compiled
            fxresu.transform(self.model, plans=plans_of(variant), compile=whole, **variant.transform)
        elif compiled and variant.blocks is None:
            self.call = torch.compile(self.model, backend=args.compiler)
        self.optimizer = OPTIMIZERS[variant.optimizer](self.model)
        if variant.blocks is not None:
            options = dict(variant.blocks)
            if "weights" in options:  # small models have fewer blocks
                most = len(find_blocks(self.model))
                options["weights"] = {phase: min(n, most) for phase, n in options["weights"].items()}
            stream_blocks(self.model, compile=compiled, optimizer=self.optimizer, device=device_type(), **options)
        self.theta: Any = None
        self._parameters = list(self.model.parameters())
        if variant.host:
            self._pack_from_host(compiled)
        self.scheduler = None
        if isinstance(self.optimizer, torch.optim.Optimizer) and not hasattr(self.optimizer, "fused_backward"):
            with contextlib.suppress(TypeError):  # torchao's offloading optimizer is none that schedulers accept
                self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + 0.01 * step))

    def _pack_from_host(self, compiled: Any) -> None:
        """Into RESU while two blocks at a time are on the device; packed, the whole model is."""
        blocks = stream_blocks(self.model, compile=False, optimizer=self.optimizer, device=device_type(), slots=2,
                               weights=len(find_blocks(self.model)))  # fmt: skip
        self.enter("resu")
        blocks.remove()
        stream_blocks(self.model, compile=compiled, recompute=1.0, offload=True)

    def enter(self, phase: str) -> None:
        """A transition of fxresu's."""
        options = self.variant.resu if phase == "resu" else {}
        if phase != "resu":
            thaw_rest(self.model)
        fxresu.set_phase(self.model, phase, optimizer=self.optimizer, **options)
        self.phase = phase
        if phase == "resu":
            config = fxresu.CycleConfig(
                rule=options.get("rule", "selective"), theta_lr=LEARNING_RATE,
                theta_in_backward=self.variant.theta_in_backward,
            )  # fmt: skip
            self.theta = fxresu.ThetaOptimizer(self.model, config)
            freeze_rest(self.model)

    def step(self) -> torch.Tensor:
        """One step of the phase; its loss."""
        if self.phase in ("predict", "correct"):
            with torch.no_grad(), self._autocast():
                return self.call(self.batch)
        parts = self.batch.chunk(self.variant.accumulation)
        total = torch.zeros((), device=self.batch.device)
        for number, part in enumerate(parts):
            with self._autocast():
                loss = self.call(part) / len(parts)
            with self._gathering(last=number == len(parts) - 1):
                self._backward(loss)
            total += loss.detach()
        self._update()
        return total

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device_type(), torch.bfloat16, enabled=self.variant.dtype == "fp32")

    @contextlib.contextmanager
    def _gathering(self, last: bool) -> Iterator[None]:
        wait = getattr(self.optimizer, "accumulate", None)
        with contextlib.ExitStack() as stack:
            if not last and wait is not None:
                stack.enter_context(wait())
            if self.theta is not None:
                stack.enter_context(self.theta.accumulate(not last))
            yield

    def _backward(self, loss: torch.Tensor) -> None:
        if hasattr(self.optimizer, "fused_backward"):  # LOMO: no step of its own
            self.optimizer.fused_backward(loss, LEARNING_RATE)
        else:
            loss.backward()

    def _update(self) -> None:
        if self.phase == "resu":
            self.theta.step()
            self.theta.zero_grad()
        elif not hasattr(self.optimizer, "fused_backward"):
            if self.variant.clip is not None:
                torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None],
                                               self.variant.clip)  # fmt: skip
            self.optimizer.step()
        if self.scheduler is not None and self.phase != "resu":
            self.scheduler.step()
        self.optimizer.zero_grad()
        for parameter in self._parameters:
            parameter.grad = None


def walk(variant: MemoryVariant, args: argparse.Namespace) -> dict[str, Any]:
    """In the child: the variant's row."""
    set_cap(variant.cap.get(args.size) if args.cap is None else args.cap)
    before, stretches = args.before, list[dict[str, Any]]()
    with DevicePeak(before) as peak:
        trainer = Trainer(variant, args)
    stretches.append({"stretch": "build", **peak.row})
    rows: dict[str, Any] = {}
    path = HOST_WALK if variant.host else WALK if variant.managed else ("dense", "dense")
    try:
        for stretch in path:
            began = time.perf_counter()
            with DevicePeak(before) as peak:
                found = _transition(trainer, stretch[2:]) if stretch[0] == ">" else _steps(trainer, args.steps)
            found["seconds"] = time.perf_counter() - began
            stretches.append({"stretch": stretch, **found, **peak.row, "bill": _bill(trainer)})
    except (torch.OutOfMemoryError, MemoryError) as error:
        rows["error"] = f"in {stretch!r}: {one_line(error)}"
    rows |= _summary(trainer, stretches)
    return rows


def _transition(trainer: Trainer, phase: str) -> dict[str, Any]:
    trainer.enter(phase)
    synchronize()
    return {}


def _steps(trainer: Trainer, count: int) -> dict[str, Any]:
    """The first ones compile and allocate; nothing waits for the device between the others, as in training."""
    first, loss = list[float](), torch.zeros(())
    for _ in range(min(3, count - 1)):
        synchronize()
        began = time.perf_counter()
        loss = trainer.step()
        synchronize()
        first.append(time.perf_counter() - began)
    ends, stalled = [_now()], _stalled(trainer)
    for _ in range(count - len(first)):
        loss = trainer.step()
        ends.append(_now())
    synchronize()
    stalled = 1e3 * (_stalled(trainer) - stalled) / len(ends[1:])
    steady = [_seconds(a, b) for a, b in itertools.pairwise(ends)]
    if not math.isfinite(float(loss)):
        raise AssertionError(f"loss {float(loss)} in {trainer.phase}")
    row = {"loss": float(loss), "first_step_s": (first or steady)[0], "median_ms": 1e3 * statistics.median(steady)}
    return row | ({"stalled_ms": stalled} if stalled else {})


def _stalled(trainer: Trainer) -> float:
    """Seconds for which the computation has stood still for moments that stream."""
    optimizer = trainer.optimizer
    return optimizer.statistics()["stalled"] if isinstance(optimizer, fxresu.StreamedAdamW) else 0.0


def _now() -> Any:
    """The present place in what the device has to do."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def _summary(trainer: Trainer, stretches: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest peak, each phase's largest, its time, and what the state takes at the end."""
    count = trainer.batch.numel()
    row: dict[str, Any] = {"tokens": count, "parameters": sum(p.numel() for p in trainer.model.parameters())}
    building = trainer.variant.host or not trainer.variant.managed  # a managed one begins with a dense phase of its own
    measured = [s for s in stretches if s["stretch"] != "build" or building]
    row["peak_device_bytes"] = max((s["peak_device_bytes"] for s in measured), default=0)
    highest = max(measured, key=lambda s: s["peak_device_bytes"], default=None)
    row["highest"] = highest and highest["stretch"]
    for name in ("peak_allocated_bytes", "peak_reserved_bytes"):
        if found := [s[name] for s in measured if name in s]:
            row[name] = max(found)
    phases: dict[str, Any] = {}
    for stretch in stretches:
        if "median_ms" in stretch:
            phase = phases.setdefault(stretch["stretch"], {"median_ms": [], "peak_device_bytes": 0})
            phase["median_ms"].append(stretch["median_ms"])
            phase["peak_device_bytes"] = max(phase["peak_device_bytes"], stretch["peak_device_bytes"])
    for phase in phases.values():
        phase["median_ms"] = statistics.median(phase["median_ms"])
        phase["tokens_per_s"] = count / phase["median_ms"] * 1e3
    if phases:
        row["median_ms"] = next(iter(phases.values()))["median_ms"]
    return row | {"bill": _bill(trainer), "phases": phases, "stretches": stretches}


def _bill(trainer: Trainer) -> dict[str, int]:
    """Bytes by component that are on the device between steps; of what fxresu manages."""
    if not (trainer.variant.managed and managed_weights(trainer.model)):
        return {}
    bill = fxresu.memory_bill(trainer.model, trainer.optimizer, device=device_type())
    bill["moments on their way"] = getattr(trainer.optimizer, "workspace_bytes", 0)
    return {name: size for name, size in bill.items() if size}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """In the parent: a process for the variant; its row, its error, or why it cannot be had."""
    with _nothing_held() as before:
        command = [sys.executable, __file__, "--child", name, "--size", args.size, "--steps", str(args.steps)]
        command += ["--compiler", args.compiler, "--before", str(before)]
        command += ["--batch", str(args.batch)] if args.batch else []
        command += ["--cap", str(args.cap)] if args.cap else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
        except subprocess.TimeoutExpired:  # whose own words are the command, paths and all
            raise TimeoutError(f"took more than {args.limit:g} s") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"row":')]
    if lines:
        return json.loads(lines[-1])["row"]
    print(done.stderr[-4000:], file=sys.stderr)
    last = done.stderr.strip().splitlines()[-1:] or [""]
    raise RuntimeError(f"the process of {name!r} ended with status {done.returncode}: {last[0]}")


@contextlib.contextmanager
def _nothing_held() -> Iterator[int]:
    """Bytes in use while this process holds only its context."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        yield used_bytes()
    else:
        yield 0


def child(args: argparse.Namespace) -> None:
    """Print the row of one variant as the last line."""
    torch.set_float32_matmul_precision("high")
    try:
        row = walk(BY_NAME[args.child], args)
    except NotHereError as error:
        row = {"skipped": str(error)}
    except fxresu.ConfigError as error:  # a combination that this version has not got
        row = {"skipped": f"refused: {error}"}
    except torch.OutOfMemoryError as error:
        row = {"error": one_line(error)}
    print(json.dumps({"row": row}), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch", type=int, help="sequences of a step; default is the ladder's own")
    parser.add_argument("--cap", type=float, metavar="GB", help="for every variant, in place of its own")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="longest time of one variant")
    parser.add_argument("--child", choices=BY_NAME, metavar="VARIANT", help=argparse.SUPPRESS)
    parser.add_argument("--before", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args)
        return 0
    size = SIZES[args.size]
    batch, context = BATCHES.get(args.size, (size.batch, size.context))
    run = Run(
        f"memory {args.size}",
        args,
        {"size": args.size, "config": size.config, "batch": args.batch or batch, "context": context,
         "sparsity": 0.5, "alpha": 0.2},
    )  # fmt: skip
    run.run({name: functools.partial(measure, name, args) for name in BY_NAME})
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
