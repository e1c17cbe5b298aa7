"""What RESU is worth on the demo: θ trained, θ frozen, and masked training in place of RESU, at equal steps and seeds.

Each run is the demo's own (`tools/demo_options.py`) in a process of its own.

    python tools/bench/controls.py --out tools/bench/results/controls_cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

DEMO = Path(__file__).resolve().parents[1] / "demo_options.py"
VARIANTS = {
    "θ trained": [],
    "θ frozen": ["--no-train-theta"],
    "masked training": ["--split", "0.5", "0.5", "0", "--amnesty-start", "0", "--amnesty-end", "0"],
}


def run(options: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Held-out losses of one run: around the RESU phase of the first cycle, after its commit, and at the end."""
    out = folder / "run"
    command = [sys.executable, str(DEMO), "--quiet", f"--out={out}", f"--seed={seed}", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((out / "report.json").read_text())["phases"]
    resu = next(r for r in rows if r["phase"] == "resu")
    commit = next(r for r in rows if r["phase"] == "commit")
    return {
        "seed": seed,
        "before_resu": resu["held_out_before"],
        "after_resu": resu["held_out_after"],
        "after_commit": commit["held_out_after"],
        "end": rows[-1]["held_out_after"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for name, options in VARIANTS.items():
                results[name].append(run(options, seed, Path(folder)))
                print(name, results[name][-1], flush=True)
                document = {"machine": platform.machine(), "threads": torch.get_num_threads(),
                            "torch": torch.__version__, "variants": results}  # fmt: skip
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
