"""One run of a script: its environment, its settings, and a row for every case, in one JSON file.

A case that fails is recorded with its error, and the others go on. A file is one run, and figures are only ever
compared within one run.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from .timing import bus_rates, copy_rate, device_type

Case = Callable[[], dict[str, Any]]


def environment() -> dict[str, Any]:
    """Device, versions, the bytes/s of a device copy, and those of copies to and from pinned host memory."""
    cuda = torch.cuda.is_available()
    versions = {name: _version(name) for name in ("triton", "transformers")}
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version for name, version in versions.items() if version},
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "copy_bytes_per_s": copy_rate(),
        **({"bus_bytes_per_s": bus_rates()} if cuda else {}),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="cases to run (fnmatch patterns)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="timed repetitions")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after this many seconds")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile (aot_eager: unoptimized)")
    parser.add_argument("--list", action="store_true", help="print the names of all cases and exit")
    return parser


class Run:
    """Collects the rows of one run and writes them after every case.

    Attributes:
        cases: rows by name.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
        self.benchmark = benchmark
        self.args = args
        self.settings = {"warmup": args.warmup, "steps": args.steps, "compiler": args.compiler, **settings}
        self.cases: dict[str, dict[str, Any]] = {}
        self._began = time.monotonic()
        self._environment: dict[str, Any] | None = None

    def wants(self, name: str, default: bool = True) -> bool:
        """Whether `--only` names the case; without `--only`, whether it is among the default ones."""
        if not self.args.only:
            return default
        return any(fnmatchcase(name, pattern) for pattern in self.args.only)

    def look_around(self) -> None:
        """Note the environment, once; `run` does it where nobody has."""
        if self._environment is None:
            self._environment = environment()

    def run(
        self, cases: Mapping[str, Case], default: Callable[[str], bool] = lambda name: True, rounds: int = 1
    ) -> None:
        """Run the wanted cases in their order or that of `--only`, each alone on the device; with `--list` only print
        their names.

        With several rounds all cases take turns, so that what changes on the host meets all of them; a case's row is
        that of its middle round, with the medians of all in "rounds_ms".
        """
        wanted = [name for name in cases if self.wants(name, default(name))]
        # What is named first runs first: a run that a time limit ends has it.
        patterns = self.args.only or []
        wanted.sort(key=lambda name: next((i for i, p in enumerate(patterns) if fnmatchcase(name, p)), 0))
        if self.args.list:
            for name in cases:
                print(name if name in wanted else f"{name}  (only if named)")
            return
        self.look_around()
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
        for name in wanted * rounds:
            spent = time.monotonic() - self._began
            if self.args.budget is not None and spent > self.args.budget:
                if not rows[name]:
                    self.cases[name] = {"skipped": f"the budget of {self.args.budget:g} s was spent"}
                continue
            rows[name].append(self._one(cases[name]))
            rows[name][-1]["wall_s"] = round(time.monotonic() - self._began - spent, 2)
            self.cases[name] = rows[name][0] if rounds == 1 else middle(rows[name])
            print(name, json.dumps(rows[name][-1]), flush=True)
            self.write()

    def _one(self, case: Case) -> dict[str, Any]:
        fresh()
        try:
            row = case()
        except Exception as error:
            traceback.print_exc()
            row = {"error": one_line(error)}
        fresh()
        return row

    def failed(self) -> list[str]:
        """Names of the cases that ended in an error."""
        return [name for name, row in self.cases.items() if "error" in row]

    def write(self) -> None:
        """Write the file, if one was asked for."""
        if self.args.out is None:
            return
        document = {
            "benchmark": self.benchmark,
            "environment": self._environment,
            "settings": self.settings,
            "cases": self.cases,
        }
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        self.args.out.write_text(json.dumps(document, indent=1) + "\n")


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the middle median (the upper one of two), with all medians; one with an error, if there is any."""
    wrong = next((row for row in rows if "error" in row), None)
    if wrong is not None:
        return wrong
    ordered = sorted(rows, key=lambda row: row["median_ms"])
    return ordered[len(rows) // 2] | {"rounds_ms": [row["median_ms"] for row in rows]}


def one_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}"[:200]


def fresh() -> None:
    """Forget compiled code and free what the last case left, so that every case has the device to itself."""
    torch._dynamo.reset()
    if device_type() == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        # cuBLAS keeps a workspace for every stream and thread that it was called on, 34 MB each on an H100.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
