"""Where the optimizer's state waits in RESU: time of the phase switches, stalls, peaks, for every strategy.

Each case trains a fresh model (random weights) on the same random tokens through two cycles: dense, pruned, RESU,
commit. The second cycle is the one that is reported, when everything is compiled and pinned memory is there; the first
one's switches are in the row too. A switch is timed from the end of the last step before it to the point where the next
step may begin, with the computation drained at both ends. Copies beside the computation may go on into the first steps
behind it, whose times are in the row: what the very first takes longer than the others of its stage counts as the
switch's (`benchlib.figures.switch_steps`), in median dense steps. Stalls are what the computation waited for copies,
over the wall time of the RESU phase and its switches. Names: strategy/lookahead.

    python tools/bench/transfers.py --size 1.24B --out tools/bench/results/transfers_1.24B.json
    python tools/bench/transfers.py --size 124M --only 'pinned/*' keep
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from typing import Any

import torch
from benchlib.figures import switch_steps
from benchlib.layers import compile_arguments
from benchlib.models import SIZES, build, tokens
from benchlib.results import Run, arguments
from benchlib.timing import device_type, synchronize

import fxresu
from fxresu import CycleConfig, ResuCycle
from fxresu.state_manager import find_manager

CASES = {
    "keep": ("keep", 0), "drop": ("drop", 0), "compress": ("compress", 0), "offload/5": ("offload", 5),
    "pinned/5": ("pinned", 5), "pinned/0": ("pinned", 0), "pinned/20": ("pinned", 20),
}  # fmt: skip


class Switches:
    """Wall time of every switch of a cycle, and the allocator's peak around it.

    Attributes:
        ms: by (cycle, stage that it leads to).
        peaks: bytes of the device, by (cycle, stage): in the stage's steps, and with "switch" in front of the stage
            in the switch to it.
    """

    def __init__(self, cycle: ResuCycle) -> None:
        self.ms: dict[tuple[int, str], float] = {}
        self.peaks: dict[tuple[int, str], int] = {}
        self._began = 0.0
        cycle.on_phase(self._on_phase)

    def _on_phase(self, event: fxresu.events.PhaseEvent) -> None:
        _computed()
        if event.when == "end":
            self.note(event.cycle, event.stage)
            self._began = time.perf_counter()
        elif self._began:
            self.ms[event.cycle, event.stage] = (time.perf_counter() - self._began) * 1e3
            self.note(event.cycle, f"switch {event.stage}")

    def note(self, cycle: int, what: str) -> None:
        """Keep the peak since the last note."""
        if torch.cuda.is_available():
            self.peaks[cycle, what] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()


def _computed() -> None:
    """Wait for the computation, and not for copies beside it."""
    if device_type() == "cuda":
        torch.cuda.current_stream().synchronize()
    else:
        synchronize()


def measure(strategy: str, lookahead: int, args: Any) -> dict[str, Any]:
    """One case: times, stalls, bytes and peaks of its second cycle."""
    size = SIZES[args.size]
    model, batch = build(size), tokens(size, args.batch)
    inner = compile_arguments(args.mode, args.compiler)
    fxresu.transform(model, compile=False if inner is None else inner)
    fused = {"fused": True} if device_type() == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **fused)
    config = CycleConfig(
        cycles=3, train_steps=args.steps, stabilize_steps=args.steps, resu_steps=args.resu_steps, rule="adam",
        schedule="constant", sparsity_end=0.5, autocast="bf16", optimizer_state=strategy, restore_lookahead=lookahead,
    )  # fmt: skip
    cycle = ResuCycle(model, optimizer, config, loss=lambda module, data: module(data))
    switches, times = Switches(cycle), dict[tuple[int, str], list[float]]()
    while cycle.global_step < 2 * config.steps_in_cycle + 1:
        place, began = (cycle.cycle, cycle.stage), time.perf_counter()
        cycle.step(batch)
        _computed()
        # The first step may compile, the last one switches.
        times.setdefault(place, []).append((time.perf_counter() - began) * 1e3)
    return _row(cycle, switches, times, strategy)


def _row(cycle: ResuCycle, switches: Switches, times: dict[tuple[int, str], list[float]], strategy: str) -> dict:
    step = {stage: statistics.median(times[1, stage][1:-1]) for stage in ("train", "stabilize", "resu")}
    ways = {"into RESU": (1, "resu"), "out of RESU": (2, "train")}
    summaries = {(s.cycle, s.stage): s for s in cycle.summaries}
    resu, manager = summaries[1, "resu"], find_manager(cycle.optimizer)
    # What the way out waited for is counted behind the phase.
    after = 0.0 if manager is None else manager.read_counts().since(cycle._moved).stall_seconds
    seconds = resu.seconds + switches.ms[2, "train"] / 1e3
    bill = {k: v for k, v in fxresu.memory_bill(cycle.model, cycle.optimizer).items() if v}
    return {
        "strategy": strategy,
        "step_ms": step,
        "first_resu_steps_ms": times[1, "resu"][:5],
        "first_train_steps_ms": times[2, "train"][:5],
        "switch_ms": {name: switches.ms[key] for name, key in ways.items()},
        "switch_steps": {name: switches.ms[key] / step["train"] for name, key in ways.items()},
        "first_switch_ms": {"into RESU": switches.ms[0, "resu"], "out of RESU": switches.ms[1, "train"]},
        "stall_s": resu.state_stall_seconds + after,
        "stall_share": (resu.state_stall_seconds + after) / seconds,
        "out_bytes": resu.state_out,
        "ahead_bytes": resu.state_ahead,
        "pageable_bytes": resu.state_pageable,
        "pinned_bytes": 0 if manager is None else manager.pinned_bytes(),
        "peak_bytes": {f"{stage} {number}": peak for (number, stage), peak in switches.peaks.items()},
        "losses": [resu.loss_first, resu.loss_last],
        "bill_after": bill,
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch", type=int, help="sequences of a step; default is the size's own")
    parser.add_argument("--resu-steps", type=int, default=40)
    parser.add_argument("--mode", choices=("eager", "compiled"), default="compiled")
    args = parser.parse_args(argv)
    if args.steps < 3 or args.resu_steps < 3:
        parser.error("--steps and --resu-steps: at least 3, of which the first and the last are not counted")
    torch.set_float32_matmul_precision("high")
    run = Run(f"transfers {args.size}", args, {"size": args.size, "resu_steps": args.resu_steps, "mode": args.mode})
    run.run({name: functools.partial(measure, *case, args) for name, case in CASES.items()})
    for name, row in run.cases.items():
        if "switch_steps" in row:
            steps = switch_steps(row)
            ways = ", ".join(f"{way} {ms:.1f} ms ({steps[way]:.2f} steps with the first one behind it)"
                             for way, ms in row["switch_ms"].items())  # fmt: skip
            print(f"{name:12} {ways}; stall {row['stall_s'] * 1e3:.1f} ms = {row['stall_share']:.2%} of the phase")
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
