"""Bills of the memory ladder as a picture: what the device held at the peak of every phase and transition.

A bar has the components that are counted between steps, the rest of what PyTorch's allocator gave out at the peak
(activations, gradients, temporaries), what it held beside that, and what is outside of it; together that is the
measured peak of the whole device. A phase that comes more than once is drawn where its peak is highest.

    python tools/bench/bills.py docs/images/memory-ladder.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxresu.memory_bill import CACHE, MemoryBill, StageBill
from fxresu.memory_plot import draw_bills

RESULTS = Path(__file__).parent / "results"
ORDER = ("dense", "> sparse", "sparse", "> resu", "resu", "> predict", "predict", "> dense")
# File, variant, what it is, the budget of its target in bytes.
DRAWN = (
    (
        "memory_1.24B_H200.json", "fxresu/streamed, 9 of 16 saved, factored",
        "Llama 1.24B, 4 x 1024 tokens a step", 7.0e9,
    ),
    ("memory_6.7B_H200.json", "fxresu/streamed, 9 of 32 away, factored", "Llama 6.7B, 8192 tokens a step", 14.5e9),
)  # fmt: skip
REST, OUTSIDE = "activations, gradients, temporaries", "context and libraries"


def bill_of(case: Mapping[str, Any], name: str, budget: float) -> MemoryBill:
    """The bill of a row of the ladder.

    Raises:
        ValueError: the row has no stretches of a GPU.
    """
    highest: dict[str, Mapping[str, Any]] = {}
    for stretch in case.get("stretches", ()):
        if stretch["stretch"] in ORDER and "peak_reserved_bytes" in stretch:
            known = highest.get(stretch["stretch"])
            if known is None or stretch["peak_device_bytes"] > known["peak_device_bytes"]:
                highest[stretch["stretch"]] = stretch
    if not highest:
        raise ValueError(f"{name}: the row holds no peaks of a GPU")
    stages = tuple(_stage(highest[stage]) for stage in ORDER if stage in highest)
    return MemoryBill(name, "cuda", {}, stages, {}, {}, budget=int(budget), basis="counted")


def _stage(stretch: Mapping[str, Any]) -> StageBill:
    allocated, reserved = stretch["peak_allocated_bytes"], stretch["peak_reserved_bytes"]
    parts = dict(stretch.get("bill", {}))
    counted = sum(parts.values())
    if counted > allocated:  # freed or moved since: nothing is drawn that was not there at the peak
        parts = {n: size * allocated // counted for n, size in parts.items()}
    parts[REST] = allocated - sum(parts.values())
    parts[CACHE] = reserved - allocated
    parts[OUTSIDE] = stretch["peak_device_bytes"] - reserved
    name = stretch["stretch"]
    return StageBill(name.replace("> ", "to "), name.startswith(">"), parts, measured=stretch["peak_device_bytes"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="picture; the suffix says in what format")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    bills, titles = [], []
    for file, variant, name, budget in DRAWN:
        path = args.results / file
        cases = json.loads(path.read_text())["cases"] if path.exists() else {}
        if variant not in cases:
            print(f"{file}: no row {variant!r}", file=sys.stderr)
            continue
        bills.append(bill_of(cases[variant], name, budget))
        dense = cases.get("dense/bf16", {}).get("peak_device_bytes")
        titles.append(name + (f"; dense AdamW in bfloat16, uncapped: {dense / 1e9:.1f} GB" if dense else ""))
    if not bills:
        return 1
    draw_bills(args.out, bills, titles)
    return 0


if __name__ == "__main__":
    sys.exit(main())
