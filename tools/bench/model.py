"""Full training step of a GPT in every phase, against the plain model compiled with the same precision and optimizer.

Each variant is a fresh model on the same random tokens: warm-up (which compiles), then the median and spread of single
steps by CUDA events, and the peak of the allocator over the timed steps. The losses of all variants are checked to be
finite before anything is timed. Peaks are of training steps; transitions between phases are tested elsewhere.

    python tools/bench/model.py --size 124M --out tools/bench/results/model_124M.json
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fxresu
from fxresu import CycleConfig
from fxresu.activations import saved_bytes
from fxresu.model_state import managed_weights, state_of
from fxresu.models import GPT, GPTConfig

SIZES = {
    "124M": GPTConfig(50304, context=1024, layers=12, heads=12, width=768),
    "350M": GPTConfig(50304, context=1024, layers=24, heads=16, width=1024),
    "tiny": GPTConfig(512, context=64, layers=2, heads=2, width=64),
}


def plain(config: GPTConfig, device: str) -> tuple[torch.nn.Module, Callable[..., torch.Tensor]]:
    """The strongest dense variant: the plain model, compiled whole."""
    torch.manual_seed(0)
    model = GPT(config).to(device)
    return model, torch.compile(model, fullgraph=True)


def managed(config: GPTConfig, device: str, **options: Any) -> torch.nn.Module:
    """A transformed model."""
    torch.manual_seed(0)
    return fxresu.transform(GPT(config).to(device), compile={"fullgraph": True}, **options)


def stepper(
    model: torch.nn.Module,
    call: Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    batch: tuple,
    device: str,
    rule: str = "",
) -> Callable[..., torch.Tensor]:
    """One full step: forward, backward and the update of whatever the phase trains."""
    resu = bool(rule)
    config = CycleConfig(rule=rule or "adam", theta_lr=1e-4)
    weights = list(managed_weights(model).values()) if resu else []

    def step(note: list[int] | None = None) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = call(*batch)
        if note is not None:
            note.append(saved_bytes(loss, [p.data for p in model.parameters()]))
        loss.backward()
        if resu:
            record = state_of(model)
            record.theta_steps += 1
            fxresu.step_theta(weights, config, 1e-4, record.theta_steps)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(step: Callable[[], torch.Tensor], device: str, warmup: int, steps: int) -> dict[str, Any]:
    """Median, spread and peak of single steps."""
    saved: list[int] = []
    losses = [float(step(saved)) for _ in range(warmup)]
    if not all(map(torch.isfinite, map(torch.tensor, losses))):
        raise RuntimeError(f"losses {losses} are not finite: nothing to time")
    cuda = device == "cuda"
    if not cuda:
        return {"losses": losses, "saved_bytes": saved[-1]}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(events, events[1:]))
    return {
        "losses": losses[:2],
        "median_ms": statistics.median(times),
        "p10_ms": times[len(times) // 10],
        "p90_ms": times[-1 - len(times) // 10],
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "saved_bytes": saved[-1],
    }


def variants(config: GPTConfig, device: str, batch: tuple) -> dict[str, Callable[[], Callable[[], torch.Tensor]]]:
    """Makers of a step, by name; made one at a time so that each has the memory to itself."""

    def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

    def dense() -> Callable[[], torch.Tensor]:
        model, call = plain(config, device)
        return stepper(model, call, adamw(model), batch, device)

    def phase(name: str, rule: str = "", **options: Any) -> Callable[[], Callable[[], torch.Tensor]]:
        def make() -> Callable[[], torch.Tensor]:
            model = managed(config, device, **options)
            optimizer = adamw(model)
            fxresu.set_phase(model, name, optimizer=optimizer, rule=rule or "adam")
            if name == "resu":
                trained = {id(m.parameter) for m in managed_weights(model).values()}
                for parameter in model.parameters():
                    parameter.requires_grad_(id(parameter) in trained)
            return stepper(model, model, optimizer, batch, device, rule)

        return make

    return {
        "dense, plain": dense,
        "dense, fxresu": phase("dense"),
        "sparse": phase("sparse"),
        "resu, adam": phase("resu", "adam"),
        "resu, selective": phase("resu", "selective"),
        "resu, adam, candidates 0.25": phase("resu", "adam", candidates=0.25),
        "resu, adam, packed": phase("resu", "adam", storage="packed"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    config = SIZES[args.size]
    torch.manual_seed(1)
    batch = tuple(torch.randint(config.vocab_size, (args.batch, config.context), device=device) for _ in range(2))
    results: dict[str, Any] = {}
    for name, make in variants(config, device, batch).items():
        if args.only and name not in args.only:
            continue
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        step = make()
        results[name] = measure(step, device, args.warmup, args.steps)
        del step
        base = results.get("dense, plain", {})
        row = results[name]
        if "median_ms" in row and "median_ms" in base:
            row["speedup"] = base["median_ms"] / row["median_ms"]
            row["memory"] = row["peak_bytes"] / base["peak_bytes"]
        print(name, {k: v for k, v in row.items() if k != "losses"}, flush=True)
        if args.out:
            _write(args.out, args, config, device, results)
    return 0


def _write(out: Path, args: argparse.Namespace, config: GPTConfig, device: str, results: dict[str, Any]) -> None:
    document = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "size": args.size,
        "batch": args.batch,
        "sequence": config.context,
        "precision": "AMP bf16",
        "optimizer": "AdamW, fused",
        "steps": args.steps,
        "variants": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
