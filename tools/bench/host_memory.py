"""Peak resident memory of a text trainer, plain PyTorch beside fxresu, and the tokens/s of both.

The trainer: a GPT of 6 layers, width 256, 8 heads, feed-forward 1024, on a BPE vocabulary of 788; a step is 32
sequences of 128 tokens, with AdamW; the text is 24 MB of what is installed here, as memory-mapped tokens of which each
step reads its windows. "plain" is a loop as one writes it in PyTorch: whole batches, `torch.compile(model)` or none.
"fxresu" is `fxresu train` with `--host-budget`, its own loop, log, held-out losses and report included; "resu" is the
same through a whole cycle, and its tokens/s are those of the median step over all stages.

Every case is a process of its own. Cases of one group are alive together and make their steps in turns, so that a
machine that others use slows them alike; their order alternates. Peaks are the operating system's (VmHWM of the
process); those of its children (the C++ compiler, the process that draws the report) are sampled ten times a second.
What compiles has caches of its own: "cold" finds them empty, "warm" finds what "cold" left. Beside wall time the CPU
time of a step is recorded (all threads), which a busy machine changes less.

    python tools/bench/host_memory.py --out tools/bench/results/host_memory.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
FULL = {"layers": 6, "width": 256, "heads": 8, "seq": 128, "batch": 32, "vocabulary": 788, "text_bytes": 24_000_000}
TINY = {"layers": 1, "width": 16, "heads": 2, "seq": 16, "batch": 4, "vocabulary": 300, "text_bytes": 300_000}
LEARNING_RATE = 1e-3
SETTLE = 2  # steps before the timed ones: compilation, first touch
# Name: (which loop, compiled, budget in bytes).
CASES = {
    "plain/eager": ("plain", False, None),
    "fxresu/eager": ("dense", False, 472_000_000),
    "resu/eager": ("resu", False, 472_000_000),
    "plain/compiled": ("plain", True, None),
    "fxresu/compiled": ("dense", True, 650_000_000),
    "resu/compiled": ("resu", True, 650_000_000),
}
GROUPS = {
    "eager": ["plain/eager", "fxresu/eager", "resu/eager"],
    "compiled": ["plain/compiled", "fxresu/compiled", "resu/compiled"],
}


# -------------------------------------------------------------------------------------------------- in the children


class Turns:
    """A child's side of taking turns: waits for a line, makes a step, answers with its times."""

    def __init__(self) -> None:
        self.out, sys.stdout = sys.stdout, sys.stderr  # the parent reads stdout: nothing else may be printed there
        self.began = (0.0, 0.0)
        self.say({"ready": True})
        self.wait()

    def say(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self.out, flush=True)

    def wait(self) -> None:
        sys.stdin.readline()
        self.began = (time.perf_counter(), time.process_time())

    def step(self, loss: float) -> None:
        wall, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        self.say({"wall_s": wall, "cpu_s": cpu, "loss": loss})
        self.wait()


def child(args: argparse.Namespace) -> None:
    """One case: prints a line for every step and one for the end."""
    turns = Turns()
    if args.loop == "plain":
        held_out, extra = _plain(args, turns)
    else:
        held_out, extra = _fxresu(args, turns)
    turns.say({"held_out": held_out, **_memory(), **extra})


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status. Read here: the plain case must not import fxresu's own ledger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _memory() -> dict[str, Any]:
    heavy = ("sympy", "torch._inductor", "triton", "matplotlib")
    return {
        "peak_rss_bytes": _status("VmHWM"),
        "resident_end": {"anonymous": _status("RssAnon"), "file": _status("RssFile")},
        "imported": [name for name in heavy if sys.modules.get(name) is not None],
    }


def _plain(args: argparse.Namespace, turns: Turns) -> tuple[float, dict[str, Any]]:
    import numpy as np
    import torch

    before = _status("VmRSS")
    from fxresu.corpus import load_corpus
    from fxresu.data import batch_at, held_out_batches
    from fxresu.models import GPT, GPTConfig

    corpus, shape = load_corpus(Path(args.corpus)), args.shape
    torch.manual_seed(0)
    config = GPTConfig(corpus.vocab_size, shape["seq"], shape["layers"], shape["heads"], shape["width"])
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * step / args.total)) for step in range(args.total + 1)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine.__getitem__)  # as `fxresu train` has it
    call = torch.compile(model) if args.compile else model
    for step in range(args.total):
        inputs, targets = batch_at(corpus.train, step, shape["batch"], shape["seq"], seed=0)
        loss = call(inputs, targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        turns.step(float(loss.detach()))
    with torch.no_grad():
        checks = held_out_batches(corpus.held_out, 2, shape["batch"], shape["seq"])
        held_out = float(np.mean([float(call(*batch)) for batch in checks]))
    known = {
        "interpreter and torch": before,
        "parameters": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.nbytes for p in model.parameters()),
        "optimizer state": sum(t.nbytes for s in optimizer.state.values() for t in s.values()),
    }
    return held_out, {"components": known}


def _fxresu(args: argparse.Namespace, turns: Turns) -> tuple[float, dict[str, Any]]:
    """The command line's own path, with a listener that takes turns."""
    shape = args.shape
    split = ["1", "0", "0"] if args.loop == "dense" else ["0.5", "0.1", "0.4"]
    options = {
        "out": args.folder, "data": args.text, "corpus": args.corpus, "vocab": shape["vocabulary"], "device": "cpu",
        "layers": shape["layers"], "width": shape["width"], "heads": shape["heads"], "seq": shape["seq"],
        "batch": shape["batch"], "lr": LEARNING_RATE, "weight-decay": 0.01, "warmup": 0, "seed": 0, "cycles": 1,
        "steps-per-cycle": args.total, "sparsity": 0.0 if args.loop == "dense" else 0.5, "save-every": 0,
        "eval-batches": 2,
    }  # fmt: skip
    argv = ["train", "--quiet", "--compile" if args.compile else "--no-compile", "--split", *split]
    argv += [f"--{name}={value}" for name, value in options.items()]
    if args.budget is not None:
        argv.append(f"--host-budget={args.budget}")
    from fxresu.lean_imports import defer_compiler, hide_triton

    defer_compiler()  # the command does both first; the listener needs the rest before the command imports it
    hide_triton()
    from fxresu import cli, events

    listeners = events.Listeners
    on_step = listeners.on_step

    def with_turns(self: Any, listener: Callable[[Any], None]) -> Any:
        listeners.on_step = on_step
        on_step(self, lambda event: turns.step(float(event.loss)))
        return on_step(self, listener)

    listeners.on_step = with_turns  # the first to listen, before log and scheduler
    if cli.main(argv):
        raise SystemExit("fxresu train failed")
    report = json.loads((Path(args.folder) / "report.json").read_text())
    held_out = [row["held_out_after"] for row in report["phases"] if row["held_out_after"] is not None][-1]
    stage = max(report["memory"]["bill"]["stages"], key=lambda s: s["measured_host"])
    rows = {**stage["parts"], **stage["host"]}
    return held_out, {"components": rows, "bill": report["memory"]["bill"]}


# ---------------------------------------------------------------------------------------------------- in the parent


class Watch:
    """Samples the resident sets of a process's descendants until it ends.

    Attributes:
        child: largest single one, bytes.
        together: largest sum with the process itself; pages that they share count in each.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.child, self.together = pid, 0, 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while (own := _resident(self.pid)) is not None:
            others = [size for pid in _descendants(self.pid) if (size := _resident(pid)) is not None]
            self.child = max([self.child, *others])
            self.together = max(self.together, own + sum(others))
            time.sleep(0.1)


def _resident(pid: int) -> int | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return os.sysconf("SC_PAGE_SIZE") * pages if pages else None


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it, or one of its threads, has just ended
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in path.read_text().split()]
    return found + [deeper for child in found for deeper in _descendants(child)]


class Child:
    """A case's process and what it says."""

    def __init__(self, name: str, total: int, args: argparse.Namespace, places: dict[str, Path], caches: Path) -> None:
        loop, compiled, budget = CASES[name]
        self.name, self.steps, self.end = name, list[dict[str, float]](), dict[str, Any]()
        command = [sys.executable, __file__, "--child", "--loop", loop, "--total", str(total)]
        command += ["--folder", str(places["folder"] / name.replace("/", "-").replace(" ", "")), "--size", args.size]
        command += ["--text", str(places["text"]), "--corpus", str(places["corpus"])]
        command += ["--compile"] if compiled else []
        command += ["--budget", str(budget if args.size == "full" else 2 * budget)] if budget else []
        threads = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | threads
        env |= {"TORCHINDUCTOR_CACHE_DIR": str(caches / name.replace("/", "-"))}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.watch = Watch(self.process.pid)
        self.expect("ready")

    def expect(self, key: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()} before its turn was over")
        said = json.loads(line)
        if key not in said:
            raise RuntimeError(f"{self.name} said {said} instead of {key!r}")
        return said

    def turn(self) -> None:
        """Let it make one step."""
        self.go()
        self.steps.append(self.expect("wall_s"))

    def go(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    def finish(self) -> None:
        """Let it evaluate and end."""
        self.go()
        self.end = self.expect("held_out")
        self.process.wait()

    def row(self, tokens: int) -> dict[str, Any]:
        """Its figures; tokens/s of the median step after the first ones."""
        timed = self.steps[SETTLE:] or self.steps
        wall, cpu = ([step[kind] for step in timed] for kind in ("wall_s", "cpu_s"))
        known = self.end.pop("components")
        peak = self.end["peak_rss_bytes"]
        components = {**known, "unaccounted": peak - sum(known.values())}
        return {
            "tokens_per_s": tokens / statistics.median(wall),
            "tokens_per_cpu_s": tokens / statistics.median(cpu),
            "median_ms": 1e3 * statistics.median(wall),
            "first_step_s": self.steps[0]["wall_s"],
            "loss": [self.steps[0]["loss"], self.steps[-1]["loss"]],
            **self.end,
            "children_peak_rss_bytes": self.watch.child,
            "together_peak_rss_bytes": self.watch.together,
            "components": components,
        }


def group(names: Sequence[str], args: argparse.Namespace, places: dict[str, Path], caches: Path) -> dict[str, Any]:
    """Rows of cases that take turns, with the ratios of their steps to the plain case's, pair by pair."""
    total = SETTLE + args.steps
    children = [Child(name, total, args, places, caches) for name in names]
    try:
        for step in range(total):
            for one in children if step % 2 else reversed(children):
                one.turn()
        for one in children:
            one.finish()
    finally:
        for one in children:
            if one.process.poll() is None:
                one.process.kill()
    tokens = args.shape["batch"] * args.shape["seq"]
    rows = {one.name: one.row(tokens) for one in children}
    plain = next((one for one in children if one.name.startswith("plain")), None)
    for one in children if plain else ():
        for kind, name in (("wall_s", "speed"), ("cpu_s", "cpu_speed")):
            pairs = zip(plain.steps[SETTLE:], one.steps[SETTLE:])
            rows[one.name][name] = statistics.median(p[kind] / o[kind] for p, o in pairs)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups to run")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a case")
    parser.add_argument("--threads", type=int, help="threads of every case (default: PyTorch's)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: to try the script out")
    parser.add_argument("--work", type=Path, help="folder for text and corpus, to use them again")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    for name in ("loop", "total", "folder", "text", "corpus", "budget"):
        parser.add_argument(f"--{name}", type=int if name in ("total", "budget") else str, help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.shape = FULL if args.size == "full" else TINY
    if args.child:
        child(args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return _run(args, Path(folder))


def _run(args: argparse.Namespace, folder: Path) -> int:
    from benchlib.results import environment, one_line
    from benchlib.text import text_corpus

    import fxresu

    work = args.work or folder
    corpus = text_corpus(work, args.shape["text_bytes"], args.shape["vocabulary"], args.shape["seq"] + 1)
    places = {"folder": folder, "text": work / f"text-{args.shape['text_bytes']}.txt",
              "corpus": corpus.train.path.parent}  # fmt: skip
    settings = {**args.shape, "steps": args.steps, "threads": args.threads, "optimizer": "AdamW",
                "text_sha256": corpus.meta["splits"]["train"]["sha256"][:16], "fxresu": fxresu.__version__}  # fmt: skip
    document: dict[str, Any] = {"benchmark": "host_memory", "environment": environment(), "settings": settings}
    document["settings"]["compiler"] = "inductor"
    document["cases"] = {}
    for name in args.only:
        for state in ("cold", "warm") if name == "compiled" else ("",):
            run = functools.partial(group, GROUPS[name], args, places, folder / "caches")
            try:
                rows = run()
            except RuntimeError as error:
                rows = dict.fromkeys(GROUPS[name], {"error": one_line(error)})
            document["cases"] |= {f"{case}/{state}".rstrip("/"): row for case, row in rows.items()}
            for case, row in rows.items():
                print(case, state, json.dumps(row), flush=True)
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any("error" in row for row in document["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
