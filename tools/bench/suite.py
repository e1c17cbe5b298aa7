"""Runs benchmarks side by side, a lane of them on each GPU, into the files that are committed.

Most of a benchmark's time is compilation, which takes one core and no GPU. So the cases of a model compile first, each
in a process of its own and several at a time, into caches that the timed run finds full; what kernels were chosen there
by their times, on a device that others used, is thrown away before it. A job that ends badly or runs out of time leaves
the cases that it has, and the lane goes on. "+" begins the next lane, on the next GPU.

    python tools/bench/suite.py --list
    python tools/bench/suite.py 'model 350M' quality + 'memory 1.24B' 'bill 1.24B' --out OUT --limit 1200

Lanes disturb one another where the host is what a benchmark waits for: `layer loops` wants the machine for itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "FXRESU_CACHE": "fxresu"}


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of one script.

    Attributes:
        script: without its suffix.
        options: of the command.
        cases: names for `--only`; none is the script's own choice.
        compiled_ahead: whether these compile side by side first.
        file: of the results; default is the job's name with underscores.
    """

    script: str
    options: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    compiled_ahead: bool = False
    file: str = ""

    def command(self, *more: str, cases: tuple[str, ...] = ()) -> list[str]:
        """Of the script, with other options behind its own."""
        named = ["--only", *(cases or self.cases)] if cases or self.cases else []
        return [sys.executable, str(HERE / f"{self.script}.py"), *self.options, *more, *named]


def _model(size: str, *cases: str, steps: int = 15) -> Job:
    return Job("model", ("--size", size, "--steps", str(steps)), cases, compiled_ahead=True)


_DENSE = tuple(f"dense/{p}/compiled{loss}" for p in ("AMP", "bf16") for loss in ("", "/tiled"))
_RESU = tuple(f"resu/{p}/compiled/a={a}/frozen" for p in ("AMP", "bf16") for a in ("1", "0.25"))
_LEAN = tuple(
    f"resu/{how}" for how in (
        "AMP/compiled/a=0.25/frozen/8bit/offload/tiled", "AMP/compiled/a=0.25/frozen/8bit/offload/recompute@0.8/tiled",
        "bf16/compiled/a=0.25/frozen/8bit/tiled", "bf16/compiled/a=0.25/frozen/8bit/θ bf16/tiled",
        "bf16/compiled/a=0.25/frozen/8bit/recompute@0.7/tiled",
        "bf16/compiled/a=0.25/frozen/8bit/θ bf16/recompute@0.8/tiled",
    )
)  # fmt: skip
_PEERS = (
    "torchao 8-bit", "torchao offload", "torchao offload, gradients too", "bitsandbytes 8-bit",
    "bitsandbytes 8-bit, paged", "GaLore", "APOLLO", "APOLLO-Mini", "LOMO", "AdaLOMO",
)  # fmt: skip
JOBS: dict[str, Job] = {
    "layer": Job("layer"),
    "layer loops": Job("layer", ("--groups", "published", "step"), ("published/loop/*", "step/loop/*")),
    "layer loops rounds": Job("layer", ("--groups", "published", "step", "--rounds", "7"), ("*/loop/*/eager",)),
    "model 124M": _model("124M", *_DENSE, *_RESU, *_LEAN),
    "model 350M": _model("350M", *_DENSE, *_RESU, *_LEAN),
    "model 1.24B": _model("1.24B", *_DENSE, *_RESU, *_LEAN, steps=12),
    "kernels": Job("kernels"),
    "bus": Job("bus"),
    "few_tokens": Job("few_tokens"),
    "semistructured": Job("semistructured"),
    "compile_time": Job("compile_time", ("--jobs", "5")),
    **{f"bill {size}": Job("bill", cases=(f"{size}/*",)) for size in ("124M", "350M", "1.24B")},
    "memory 1.24B": Job("memory", ("--size", "1.24B", "--steps", "7"), (
        "dense/bf16", "fxresu/streamed, 9 of 16 saved, factored", "fxresu/streamed, 3 of 16 saved, moments here",
        "fxresu/bf16, accumulation of 4", "fxresu/streamed, accumulation of 4", "dense/AMP",
        "fxresu/packed from the host", "fxresu/streamed, 4 of 16 saved",
    ), file="memory_1.24B_saved"),
    "memory 1.24B peers": Job("memory", ("--size", "1.24B", "--steps", "7"), ("dense/bf16", *_PEERS)),
    "memory 6.7B": Job("memory", ("--size", "6.7B", "--steps", "6"), (
        "dense/bf16", "fxresu/streamed, 10 of 32 away", "fxresu/streamed, 9 of 32 away, factored",
        "fxresu/frozen int4 from the host",
    )),
    "transfers 1.24B": Job("transfers", ("--size", "1.24B"), ("keep", "pinned/5", "drop", "compress")),
    "quality": Job("quality", cases=("dense/fp32", "dense/savings", "dense/savings, factored")),
}  # fmt: skip


class Lane:
    """Jobs on one GPU, in their order.

    Args:
        gpu: its number.
        args: of the command line, with `until`, the end by `time.monotonic`, and `running`, the lanes' processes.
    """

    def __init__(self, gpu: int, args: argparse.Namespace) -> None:
        self.gpu, self.args = gpu, args
        self.environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1"}

    def run(self, names: list[str]) -> list[str]:
        """Run the jobs; names of those that did not end well."""
        return [name for name in names if not self._job(name)]

    def _job(self, name: str) -> bool:
        job = JOBS[name]
        if job.compiled_ahead:
            self._compile(name, job)
        file = self.args.out / f"{job.file or name.replace(' ', '_')}.json"
        return self._process(name, job.command("--out", str(file)), self.environment)

    def _compile(self, name: str, job: Job) -> None:
        """Fill the caches, several cases at a time; one that fails here fails, or compiles, again where it is timed."""
        environment = self.environment | {"TORCHINDUCTOR_COMPILE_THREADS": "3"}
        with ThreadPoolExecutor(self.args.at_once) as pool:
            for case in job.cases:
                few = job.command("--steps", "2", "--warmup", "2", cases=(case,))
                pool.submit(self._process, f"{name}, compile {case}", few, environment)
        for choice in Path(self.environment["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
            choice.unlink(missing_ok=True)

    def _process(self, name: str, command: list[str], environment: dict[str, str]) -> bool:
        left, began = self.args.until - time.monotonic(), time.monotonic()
        log = self.args.logs / f"{''.join(c if c.isalnum() else '_' for c in name)}.log"
        said = "no time left"
        if left > 0:
            with log.open("w") as out:
                process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
                self.args.running.add(process)
                try:
                    status = process.wait(left)
                    said = "done" if status == 0 else f"ended with status {status}"
                except subprocess.TimeoutExpired:
                    _end(process)
                    said = "ran out of time"
                self.args.running.discard(process)
        print(f"GPU {self.gpu}: {name}: {said} after {time.monotonic() - began:.0f} s", flush=True)
        return said == "done"


def _end(process: subprocess.Popen[bytes]) -> None:
    """With what it has started, which holds the GPU too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="names; + begins the next lane")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--logs", type=Path, help="folder of what the jobs print; default is a temporary one")
    parser.add_argument("--limit", type=float, default=7200, metavar="SECONDS", help="for everything")
    parser.add_argument("--at-once", type=int, default=4, help="cases of a job that compile side by side")
    parser.add_argument("--list", action="store_true", help="print the names of all jobs and exit")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(JOBS))
        return 0
    lanes = [list(group) for plus, group in itertools.groupby(args.jobs, lambda j: j == "+") if not plus]
    if unknown := [name for name in itertools.chain(*lanes) if name not in JOBS]:
        parser.error(f"JOB {unknown[0]!r}: use {', '.join(JOBS)}")
    args.until, args.running = time.monotonic() + args.limit, set()
    with tempfile.TemporaryDirectory() as folder:
        args.logs = args.logs or Path(folder)
        args.logs.mkdir(parents=True, exist_ok=True)
        for variable, name in CACHES.items():
            os.environ.setdefault(variable, str(Path(folder, name)))
        with ThreadPoolExecutor(max(len(lanes), 1)) as pool:
            begun = [pool.submit(Lane(gpu, args).run, names) for gpu, names in enumerate(lanes)]
            try:
                failed = list(itertools.chain(*(lane.result() for lane in begun)))
            except BaseException:  # interrupted: nothing of it goes on alone
                args.until = 0.0
                for process in list(args.running):
                    _end(process)
                raise
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
