"""What compiling a phase costs: the first full step of GPT-2 124M in a fresh process, cold and with warm caches.

Every variant has cache folders of its own (Inductor's, Triton's and fxresu's measured choices). Its first process finds
them empty, the second one finds what the first left. Counted: the first step (trace, passes, compilation, kernels, the
step itself) less a later step; not counted: imports, building the model, entering the phase.

    python tools/bench/compile_time.py --out tools/bench/results/compile_time.json
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from benchlib.models import SIZES
from benchlib.results import Run, arguments
from benchlib.steps import ModelStep, Variant
from benchlib.timing import synchronize

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FXRESU_CACHE")
VARIANTS = {
    "dense, plain": Variant("dense"),
    "resu, a=1": Variant("resu"),
    "sparse": Variant("sparse"),
    "resu, a=0.25": Variant("resu", alpha=0.25),
    "dense": Variant("fxdense"),
}


def first_step(name: str, args: Any) -> dict[str, float]:
    """In the child: seconds of the first step, and of a later one."""
    torch.set_float32_matmul_precision("high")
    size = SIZES[args.size]
    step = ModelStep(VARIANTS[name], size, args.batch or size.batch, 0.5, args.compiler)
    seconds = []
    for _ in range(3):
        synchronize()
        began = time.perf_counter()
        step.step()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return {"first_s": seconds[0], "later_s": seconds[-1], "compile_s": seconds[0] - seconds[-1]}


def measure(name: str, args: Any) -> dict[str, Any]:
    """In the parent: a cold and a warm process."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder, name.lower())) for name in CACHES}
        return {kind: _child(name, args, caches) for kind in ("cold", "warm")}


def _child(name: str, args: Any, caches: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, "--size", args.size, "--compiler", args.compiler]
    if args.batch:
        command += ["--batch", str(args.batch)]
    cores = str(max((os.cpu_count() or 1) // args.jobs - 1, 1))  # one traces, the others compile kernels
    environment = os.environ | caches | ({"TORCHINDUCTOR_COMPILE_THREADS": cores} if args.jobs > 1 else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError(f"the process of {name!r} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="variants at a time (5: all), each with its share of cores")
    parser.add_argument("--child", choices=VARIANTS, metavar="VARIANT", help="measure one first step in this process")
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(first_step(args.child, args)))
        return 0
    run = Run("compile_time", args, {"size": args.size, "precision": "AMP", "jobs": args.jobs})
    if not args.list:
        run.look_around()  # before others use the device
    with ThreadPoolExecutor(args.jobs) as pool:
        # Begun together where they share the machine: all of them find the same load.
        begun = {n: pool.submit(measure, n, args) for n in VARIANTS if args.jobs > 1 and not args.list and run.wants(n)}
        run.run({n: begun[n].result if n in begun else functools.partial(measure, n, args) for n in VARIANTS})
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
