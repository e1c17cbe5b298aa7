"""Full training step of GPT-2 124M and 350M and of a Llama of 1.24B, in every form, one after another.

Every variant is a fresh model (random weights) on the same random tokens. First its loss and gradients are compared
with float64 (see benchlib/steps.py); then warm-up, single steps by CUDA events, the allocator's peak over them, and the
whole step with its update captured in CUDA graphs, where learning rate and step count stay what they were. "graphs" in
a name is torch.compile's own use of CUDA graphs (reduce-overhead). A variant that fails is recorded with its error.
Peaks are of training steps; transitions are tested elsewhere.

    python tools/bench/model.py --size 124M --out tools/bench/results/gpt2_124M.json
    python tools/bench/model.py --size 1.24B --only 'dense/*/compiled' 'resu/*/compiled/a=0.25/frozen*' --out FILE
"""

from __future__ import annotations

import functools
import math
import sys
import time
from typing import Any

import torch
from benchlib.models import SIZES
from benchlib.results import Run, arguments, one_line
from benchlib.steps import ModelStep, Variant
from benchlib.timing import peaks, time_calls

import fxresu
from fxresu.activations import saved_bytes


def variants() -> dict[Variant, bool]:
    """Everything that can be compared, in order, and whether it is without `--only`: the others compile for long."""
    resu = functools.partial(Variant, "resu")
    chosen = [
        Variant("dense", "AMP"),
        Variant("dense", "bf16"),
        *(resu(p, alpha=a) for p in ("AMP", "bf16") for a in (1.0, 0.25)),
        *(resu("AMP", alpha=a, moments="8bit") for a in (1.0, 0.25)),
        resu("AMP", alpha=0.25, moments="8bit", storage="offload"),
        *(resu("AMP", "graphs", a) for a in (1.0, 0.25)),
        Variant("naive", "AMP"),
        Variant("sparse", "AMP"),
    ]
    others = [
        Variant("dense", "AMP", "graphs"),
        Variant("dense", "bf16", "graphs"),
        Variant("naive", "bf16"),
        Variant("sparse", "bf16"),
        Variant("fxdense", "AMP"),
        *(resu("bf16", "graphs", a) for a in (1.0, 0.25)),
        *(resu(p, alpha=a, rest="trained") for p in ("AMP", "bf16") for a in (1.0, 0.25)),
        *(resu("bf16", alpha=a, moments="8bit") for a in (1.0, 0.25)),
        resu("AMP", moments="8bit", storage="offload"),
        *(Variant("fxdense", "AMP", activations=a) for a in ("recompute", "save@0.5", "offload@0.5")),
        *(resu(p, alpha=a, activations="recompute") for p in ("AMP", "bf16") for a in (1.0, 0.25)),
        *(resu("AMP", alpha=0.25, activations=a) for a in ("recompute@0.6", "offload@0.5")),
        *(Variant("dense", p, loss="tiled") for p in ("AMP", "bf16")),
        *(resu(p, alpha=a, loss="tiled") for p in ("AMP", "bf16") for a in (1.0, 0.25)),
        *(
            resu(p, alpha=0.25, moments="8bit", activations=a, loss="tiled")
            for p in ("AMP", "bf16")
            for a in ("recompute", "recompute@0.8", "recompute@0.7", "recompute@0.6")
        ),
        resu("AMP", alpha=0.25, moments="8bit", activations="recompute"),
        *(
            resu("AMP", alpha=0.25, moments="8bit", storage="offload", activations=a, loss="tiled")
            for a in ("", "recompute@0.8")
        ),
        resu("bf16", alpha=0.25, moments="8bit", loss="tiled"),
        *(resu("bf16", alpha=a, theta="bf16") for a in (1.0, 0.25)),
        *(
            resu("bf16", alpha=0.25, moments="8bit", theta="bf16", activations=a, loss="tiled")
            for a in ("", "recompute@0.8")
        ),
        resu("AMP", rule="selective"),
        resu("AMP", storage="packed"),
        resu("bf16", storage="packed"),
        *(resu(p, moments="8bit", storage="packed int4") for p in ("AMP", "bf16")),
    ]
    return {**dict.fromkeys(chosen, True), **dict.fromkeys(others, False)}


def measure(variant: Variant, args: Any) -> dict[str, Any]:
    """Errors, times, peaks and bytes of one variant."""
    size = SIZES[args.size]
    step = ModelStep(variant, size, args.batch or size.batch, args.sparsity, args.compiler)
    began = time.monotonic()
    row: dict[str, Any] = {"errors": step.check(), "check_s": round(time.monotonic() - began, 2)}
    row["parameters"] = sum(p.numel() for p in step.model.parameters())
    row["saved_bytes"] = _saved(step)
    losses = [float(step.step()) for _ in range(max(args.warmup, 2))]
    if not (all(map(math.isfinite, losses)) and losses[-1] < losses[0]):
        raise AssertionError(f"losses {losses} of {len(losses)} steps on one batch do not fall")
    row["activations"] = [
        {"by_default": a.by_default, "repeated": a.repeated, "save": a.total("save"), "offload": a.total("offload")}
        for a in step.decisions()
    ]
    row["losses"] = [losses[0], losses[-1]]
    row |= time_calls(step.step, 1, args.steps)
    row |= peaks(step.step)
    if step.weights:
        row["bill"] = {k: v for k, v in fxresu.memory_bill(step.model, step.optimizer).items() if v}
    return row | _captured(step, args)


def _captured(step: ModelStep, args: Any) -> dict[str, Any]:
    """Times of the whole step in CUDA graphs, update included; a capture that fails costs only these."""
    if step.variant.mode == "graphs":
        return {}
    try:
        times = time_calls(step.captured(), 1, args.steps)
        loss = float(step.forward_backward())
        return {"graph": times} if math.isfinite(loss) else {"graph_error": f"loss {loss} after the captured steps"}
    except Exception as error:
        return {"graph_error": one_line(error)}


def _saved(step: ModelStep) -> int | None:
    """Bytes kept for the backward beside weights, masks and θ; None where CUDA graphs own them."""
    if step.variant.mode == "graphs":
        return None
    loss = step.loss(step.batch)
    held = [getattr(m.entry, name) for m in step.weights.values() for name in m.entry.TENSORS]
    found = saved_bytes(loss, [*(p.data for p in step.model.parameters()), *(t for t in held if t is not None)])
    loss.backward()
    step.clear()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch", type=int, help="sequences of a step; default is the size's own")
    parser.add_argument("--sparsity", type=float, default=0.5)
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    size = SIZES[args.size]
    batch = args.batch or size.batch
    run = Run(
        f"model {args.size}",
        args,
        {"size": args.size, "config": size.config, "batch": batch, "context": size.context, "sparsity": args.sparsity,
         "optimizer": "AdamW, fused"},
    )  # fmt: skip
    chosen = {v.name: default for v, default in variants().items()}
    run.run({v.name: functools.partial(measure, v, args) for v in variants()}, chosen.__getitem__)
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
