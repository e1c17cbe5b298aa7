"""The predicted memory bill against measurement: GPT-2 124M and 350M, Llama 1.24B, every phase and transition.

A case predicts from shapes first and then runs every stage on the device (`predict_memory(..., measure=True)`).
Reported for each stage: bytes predicted, the measured peak of the whole device (on a CPU of tensors), and the share of
it that nothing explains; "unaccounted" is the largest share of all stages, either way.

    python tools/bench/bill.py --out tools/bench/results/bill.json
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from benchlib.models import SIZES, build, tokens
from benchlib.results import Run, arguments
from benchlib.timing import device_type

import fxresu


@dataclasses.dataclass(frozen=True)
class Case:
    """What is predicted and measured.

    Attributes:
        size: key of `SIZES`.
        dtype, autocast: of the weights; precision of products, or None.
        batch: sequences of a micro-batch.
        accumulation: micro-batches.
        options: of `predict_memory` and `transform`.
    """

    size: str
    dtype: torch.dtype
    autocast: str | None
    batch: int
    accumulation: int = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


_AMP, _BF16 = (torch.float32, "bf16"), (torch.bfloat16, None)
_COLUMNS = {"candidates": 0.25, "moments": "8bit", "rule": "adam"}
CASES = {
    "124M/AMP": Case("124M", *_AMP, 16),
    "124M/AMP/a=0.25, 8-bit": Case("124M", *_AMP, 16, options=_COLUMNS),
    "124M/AMP/accumulation of 4": Case("124M", *_AMP, 4, 4),
    "350M/AMP": Case("350M", *_AMP, 16),
    "350M/AMP/packed": Case("350M", *_AMP, 16, options={"storage": "packed", "packed_values": "bf16"}),
    "1.24B/AMP": Case("1.24B", *_AMP, 2),
    "1.24B/bf16/a=0.25, 8-bit": Case("1.24B", *_BF16, 2, options=_COLUMNS),
    "tiny": Case("tiny-gpt2", *_AMP, 2),
}


def measure(case: Case, args: Any) -> dict[str, Any]:
    """One bill, as a row."""
    size = SIZES[case.size]
    batch = tokens(size, case.batch)
    model = build(size, case.dtype, device="meta")
    bill = fxresu.predict_memory(
        model, batch, autocast=case.autocast, accumulation=case.accumulation, device=device_type(), measure=True,
        optimizer="adamw?fused=true" if device_type() == "cuda" else "adamw", compile=args.compiler == "inductor",
        **case.options,
    )  # fmt: skip
    stages = {}
    for stage in bill.stages:
        whole = stage.measured_device is not None
        measured = stage.measured_device if whole else stage.measured
        if measured is None:
            raise AssertionError(f"stage {stage.name!r} was not measured")
        predicted = bill.total(stage) if whole else stage.tensors
        stages[stage.name] = {
            "predicted_bytes": predicted, "measured_bytes": measured, "tensors_bytes": stage.measured,
            "share": (measured - predicted) / measured, "parts": dict(stage.parts),
        }  # fmt: skip
    worst = max(stages, key=lambda name: abs(stages[name]["share"]))
    return {
        "unaccounted": abs(stages[worst]["share"]), "worst": worst, "stages": stages, "overhead": dict(bill.overhead),
        "peak_device_bytes": max(s["measured_bytes"] for s in stages.values()), "prediction_s": bill.seconds,
        "tokens": batch.numel() * case.accumulation,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    run = Run("bill", args, {})
    run.run({name: functools.partial(measure, case, args) for name, case in CASES.items()}, lambda n: n != "tiny")
    for name, row in run.cases.items():
        if "stages" in row:
            shares = ", ".join(f"{stage} {found['share']:+.1%}" for stage, found in row["stages"].items())
            print(f"{name}: {shares}")
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
