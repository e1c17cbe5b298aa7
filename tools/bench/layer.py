"""One linear layer: the published benchmark, the same with its optimizer, 8192 tokens, state, and a sweep of shapes.

Groups of cases (all with random data and a check of y and every gradient against float64 before anything is timed):

- published: 4096 x 4096, fp32 without TF32, 32 tokens, forward and backward without dX. `loop`: as published, a Python
  loop that drains the device around the forward and around the backward of `y.sum()`; "graphed" ones drain it around
  the replay of a CUDA graph of both. `graph`: four independent layers
  captured in one CUDA graph, so that every layer finds cold caches; per layer.
  "few tokens": by the kernels of that name, which fxresu's dense phase may use as well as RESU; the strongest dense is
  the better of torch.compile's and of that.
- step: the same with the update: fused AdamW (capturable) for dense and sparse, θ's step for RESU (its bias frozen).
- tokens: 8192 tokens in bf16 with dX, full step in one CUDA graph, the L2 flushed before every replay. Dense under
  autocast and in bf16 throughout.
- state: bytes of θ's moments and of the mask of the published layer, and the peak of its steps.
- sweep: widths, tokens, precisions, sparsities and shares α, with the share of the byte and FLOP limit that is reached
  (formulas in benchlib/limits.py).

    python tools/bench/layer.py --out tools/bench/results/layer.json
    python tools/bench/layer.py --groups sweep --out tools/bench/results/layer_sweep.json
    python tools/bench/layer.py --groups published step --only '*/loop/*/eager' --rounds 7 \
        --out tools/bench/results/layer_loops_rounds.json
    python tools/bench/layer.py --groups published --published CHECKOUT --out tools/bench/results/layer_published.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchlib.layers import Layer, LayerStep
from benchlib.limits import Kernel, Shape, dense_kernels, limit_ms, resu_kernels
from benchlib.published import MODES, published_layer
from benchlib.results import Case, Run, arguments
from benchlib.timing import Flush, capture, copy_rate, matmul_rate, peaks, time_calls, time_synchronized

import fxresu
from fxresu.model_state import managed_weights

GROUPS = ("published", "step", "tokens", "state", "sweep")
COPIES = 4  # of a 64 MB weight: five times the L2 of an H100
DTYPES = {"fp32": torch.float32, "AMP": torch.bfloat16, "bf16": torch.bfloat16}


def options(args: argparse.Namespace) -> argparse.Namespace:
    """Repetitions of the published loop: its own numbers unless a quick run is asked for."""
    args.loop_warmup, args.loop_steps = min(10, 2 * args.warmup), min(100, 5 * args.steps)
    return args


# --- measurements ----------------------------------------------------------------------------------------------------


def graphed_loop(layer: Layer, args: argparse.Namespace, update: bool) -> dict[str, Any]:
    """A loop that replays forward and backward (with `update` the whole step) from CUDA graphs, drained before and
    after each."""
    step = LayerStep(layer, capturable=True)
    row: dict[str, Any] = {"errors": step.check()}
    row |= time_synchronized(_replay(step, update), args.loop_warmup, args.loop_steps)
    step.check_finite()
    return row


def loop(layer: Layer, args: argparse.Namespace, update: bool) -> dict[str, Any]:
    """The published loop; with `update` whole steps, drained before and after each."""
    step = LayerStep(layer)
    row: dict[str, Any] = {"errors": step.check()}
    if update:
        row |= time_synchronized(step.full, args.loop_warmup, args.loop_steps)
        return row | peaks(step.full)

    def forward_backward() -> None:
        step.forward()[0].sum().backward()

    def backward_of() -> None:
        nonlocal loss
        loss = step.forward()[0].sum()

    def clear_and_forward() -> None:
        step.clear()
        backward_of()

    loss = torch.zeros(())
    for _ in range(args.loop_warmup):
        step.clear()
        forward_backward()
    forward = time_synchronized(step.forward, 2, args.loop_steps)
    backward = time_synchronized(lambda: loss.backward(), 2, args.loop_steps, clear_and_forward)
    return row | _sum(forward, backward) | peaks(lambda: (step.clear(), forward_backward()))


def _sum(forward: dict[str, float], backward: dict[str, float]) -> dict[str, Any]:
    """The published figure: forward and backward timed in loops of their own, added."""
    return {
        "median_ms": forward["median_ms"] + backward["median_ms"],
        "mean_ms": forward["mean_ms"] + backward["mean_ms"],
        "forward": forward,
        "backward": backward,
    }


def published_loop(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """The published layer itself in that loop."""
    layer = published_layer(args.published, mode, args.size, args.sparsity)
    x = torch.randn(args.batch, args.size, device=next(layer.parameters()).device)
    loss = torch.zeros(())

    def forward() -> None:
        nonlocal loss
        layer.zero_grad()
        loss = layer(x).sum()

    for _ in range(args.loop_warmup):
        forward()
        loss.backward()
    ahead = time_synchronized(lambda: layer(x), 2, args.loop_steps)
    back = time_synchronized(lambda: loss.backward(), 2, args.loop_steps, forward)
    return _sum(ahead, back) | peaks(lambda: (forward(), loss.backward()))


def graph(layer: Layer, args: argparse.Namespace, update: bool) -> dict[str, Any]:
    """Captured (where it can be), with cold caches by independent copies in one graph; times are per layer."""
    layer = replace(layer, copies=args.copies)
    step = LayerStep(layer, capturable=True)
    row: dict[str, Any] = {"errors": step.check()}
    replay = _replay(step, update)
    times = time_calls(replay, args.warmup, args.steps)
    step.check_finite()
    scaled = {k: v / layer.copies if k.endswith("_ms") else v for k, v in times.items()}
    return row | scaled | {"copies": layer.copies, "captured": _capturable(layer)}


def _capturable(layer: Layer) -> bool:
    """masked_scatter's backward waits for the host (masked_select), which a capture does not allow."""
    return layer.method != "naive"


def _replay(step: LayerStep, update: bool) -> Any:
    """The step as a CUDA graph; as it is where it cannot be one."""
    if _capturable(step.layer):
        return step.captured() if update else capture(step.forward_backward)
    return step.full if update else step.forward_backward


def flushed(layer: Layer, args: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """Captured (where it can be), one layer, L2 flushed before every replay; with the limit of its bytes and FLOPs."""
    step = LayerStep(layer, capturable=True)
    row: dict[str, Any] = {"errors": step.check()}
    replay = _replay(step, True)
    row |= time_calls(replay, args.warmup, args.steps, Flush())
    step.check_finite()
    if layer.method != "naive" and layer.storage == "resident":
        limit = limit_ms(kernels_of(layer), rates["copy"], rates[layer.precision])
        row |= {"limit_ms": limit, "of_limit": limit / row["median_ms"]}
    return row | _bill(step)


def kernels_of(layer: Layer) -> list[Kernel]:
    """The kernels of a full step whose bytes and FLOPs bound it from below."""
    operand = 4 if layer.precision == "fp32" else 2
    master = 2 if layer.precision == "bf16" else 4
    shape = Shape(layer.rows, layer.columns, layer.tokens, operand, master, layer.input_gradient)
    if layer.method != "resu":
        return dense_kernels(shape, update=True)
    moment = {"fp32": 4.0, "bf16": 2.0, "8bit": 1.0}[layer.moments]
    return resu_kernels(shape, True, layer.sparsity, layer.alpha, moment, 2 if layer.theta == "bf16" else 4)


def _bill(step: LayerStep) -> dict[str, Any]:
    if not step.weights:
        return {}
    return {"bill": {k: v for k, v in fxresu.memory_bill(step.model, step.optimizer).items() if v}}


def state(layer: Layer, args: argparse.Namespace) -> dict[str, Any]:
    """Peak of full steps, and the bytes of every component between two steps."""
    step = LayerStep(layer)
    for _ in range(2):
        step.full()
    row: dict[str, Any] = dict(peaks(step.full))
    step.clear()
    if step.weights:
        row |= _bill(step)
        entries = [m.entry for m in managed_weights(step.model).values()]
        row["candidates"] = sum(e.numel - int(e.mask().sum()) for e in entries)
        row["mask_bytes"] = sum(e.bits.nbytes for e in entries)
    return row


# --- cases -----------------------------------------------------------------------------------------------------------


def published_cases(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    base = _published_shape(args)
    for method, mode in (
        ("dense", "eager"), ("dense", "compiled"), ("sparse", "compiled"), ("resu", "eager"), ("resu", "compiled"),
        ("naive", "eager"), ("naive", "compiled"),
    ):  # fmt: skip
        layer = replace(base, method=method, mode=mode)
        yield f"published/loop/{method}/{mode}", functools.partial(loop, layer, args, False)
        yield f"published/graph/{method}/{mode}", functools.partial(graph, layer, args, False)
    for method in ("dense", "resu"):
        layer = replace(base, method=method, kernels="few_tokens")
        yield f"published/loop/{method}/few tokens", functools.partial(loop, layer, args, False)
        yield f"published/graph/{method}/few tokens", functools.partial(graph, layer, args, False)
    for method, kernels in itertools.product(("dense", "resu"), ("", "few_tokens")):
        layer = replace(base, method=method, kernels=kernels)
        name = f"published/loop/{method}/graphed{', few tokens' if kernels else ''}"
        yield name, functools.partial(graphed_loop, layer, args, False)
    if args.published is not None:
        for mode in MODES:
            yield f"published/loop/theirs/{mode}", functools.partial(published_loop, mode, args)


def _published_shape(args: argparse.Namespace) -> Layer:
    return Layer("dense", args.size, args.size, args.batch, sparsity=args.sparsity, compiler=args.compiler)


def step_cases(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    base = replace(_published_shape(args), frozen_rest=True)
    named = {
        "dense/eager": replace(base, mode="eager"),
        "dense": base,
        "sparse": replace(base, method="sparse"),
        "resu, fp32 moments": replace(base, method="resu"),
        "resu, bf16 moments": replace(base, method="resu", moments="bf16"),
        "resu, 8-bit moments": replace(base, method="resu", moments="8bit"),
        "resu, selective": replace(base, method="resu", rule="selective"),
        "naive": replace(base, method="naive"),
    }
    few = ("dense", "sparse", "resu, fp32 moments", "resu, 8-bit moments")
    eager = {f"{name}/eager": replace(named[name], mode="eager") for name in few[1:]}
    named |= {f"{name}, few tokens": replace(named[name], kernels="few_tokens") for name in few} | eager
    for name, layer in named.items():
        if name in eager:  # its host time is what a loop measures; the kernels are those of the others
            yield f"step/loop/{name}", functools.partial(loop, layer, args, True)
            continue
        yield f"step/graph/{name}", functools.partial(graph, layer, args, True)
        yield f"step/loop/{name}", functools.partial(loop, layer, args, True)
        if layer.mode != "eager" and _capturable(layer):
            yield f"step/loop/{name}/graphed", functools.partial(graphed_loop, layer, args, True)


def tokens_cases(args: argparse.Namespace, rates: dict[str, float]) -> Iterator[tuple[str, Case]]:
    base = replace(_published_shape(args), tokens=args.many, input_gradient=True)
    for precision in ("AMP", "bf16"):
        own = replace(base, precision=precision)
        moments = "bf16" if precision == "bf16" else "fp32"  # dense in bf16 has bf16 moments
        frozen = replace(own, method="resu", frozen_rest=True, moments=moments)
        named = {
            "dense": own,
            "sparse": replace(own, method="sparse"),
            "naive": replace(own, method="naive", frozen_rest=True),
            "resu, a=1": frozen,
            "resu, a=0.25": replace(frozen, alpha=0.25),
            "resu, a=1, 8-bit moments": replace(frozen, moments="8bit"),
            "resu, a=0.25, 8-bit moments": replace(frozen, alpha=0.25, moments="8bit"),
            "resu, a=1, packed": replace(frozen, storage="packed"),
            "resu, a=1, packed int8": replace(frozen, storage="packed int8"),
            "resu, a=1, packed int4": replace(frozen, storage="packed int4"),
        }
        if precision == "bf16":  # under autocast θ is in the float32 weight itself
            named |= {f"{name}, θ bf16": replace(named[name], theta="bf16") for name in ("resu, a=1", "resu, a=0.25")}
        for name, layer in named.items():
            yield f"tokens/{precision}/{name}", functools.partial(flushed, layer, args, rates)


def state_cases(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    base = replace(_published_shape(args), frozen_rest=True)
    for name, layer in {
        "dense/eager": replace(base, mode="eager"),
        "dense": base,
        "resu, fp32 moments": replace(base, method="resu"),
        "resu, 8-bit moments": replace(base, method="resu", moments="8bit"),
        "resu, a=0.25, 8-bit moments": replace(base, method="resu", alpha=0.25, moments="8bit"),
    }.items():
        yield f"state/{name}", functools.partial(state, layer, args)


def sweep_cases(args: argparse.Namespace, rates: dict[str, float]) -> Iterator[tuple[str, Case]]:
    """All widths, tokens and precisions at 50 % and α = 1 and .25; all sparsities and α at the middle shape."""
    for width in args.widths:
        for tokens in args.tokens:
            for precision in ("fp32", "bf16"):
                base = Layer("dense", width, width, tokens, precision, input_gradient=True, compiler=args.compiler)
                name = f"sweep/{width}/{tokens}/{precision}"
                yield f"{name}/dense", functools.partial(flushed, base, args, rates)
                middle = width == args.size and tokens in (args.batch, args.many)
                for sparsity in args.sparsities:
                    for alpha in args.alphas:
                        if not middle and (sparsity != args.sparsities[0] or alpha not in args.alphas[:2]):
                            continue
                        layer = replace(base, method="resu", frozen_rest=True, sparsity=sparsity, alpha=alpha)
                        layer = replace(layer, moments="bf16" if precision == "bf16" else "fp32")
                        case = functools.partial(flushed, layer, args, rates)
                        yield f"{name}/resu, s={sparsity:g}, a={alpha:g}", case


def cases(args: argparse.Namespace, rates: dict[str, float]) -> dict[str, Case]:
    """All cases of the chosen groups, by name."""
    made = {
        "published": lambda: published_cases(args),
        "step": lambda: step_cases(args),
        "tokens": lambda: tokens_cases(args, rates),
        "state": lambda: state_cases(args),
        "sweep": lambda: sweep_cases(args, rates),
    }
    return {name: case for group in args.groups for name, case in made[group]()}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS[:4])
    parser.add_argument("--published", type=Path, help="folder of a checkout of huy209vn/RESU")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=32, help="tokens of the published benchmark")
    parser.add_argument("--many", type=int, default=8192, help="tokens of the group of that name")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--copies", type=int, default=COPIES)
    parser.add_argument("--widths", nargs="+", type=int, default=[4096, 11008, 1024])
    parser.add_argument("--tokens", nargs="+", type=int, default=[32, 8192, 512, 2048, 16384])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--alphas", nargs="+", type=float, default=[1.0, 0.25, 0.1])
    parser.add_argument("--rounds", type=int, default=1, help="times that all cases are run, in turns")
    args = options(parser.parse_args(argv))
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1")
    torch.set_float32_matmul_precision("highest")  # no TF32
    rates: dict[str, float] = {}
    if not args.list and {"tokens", "sweep"} & set(args.groups):
        rates = {"copy": copy_rate()} | {name: matmul_rate(dtype) for name, dtype in DTYPES.items()}
    keys = ("groups", "size", "batch", "many", "sparsity", "copies", "rounds")
    run = Run("layer", args, {k: getattr(args, k) for k in keys} | {"rates": rates, "tf32": False})
    run.run(cases(args, rates), rounds=args.rounds)
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
