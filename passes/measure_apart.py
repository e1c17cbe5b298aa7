"""The chooser's candidates are measured in a process of their own, so that the training process keeps nothing of it.

Measured in place they left 0.1 to 0.5 GB of device memory behind: every stream that a product runs on gets a workspace
of the vendor's library for good (32 MiB on an H100), and compiled candidates stay in the compiler's caches. Here one
child measures all problems of a graph that no file knows yet, and takes everything along when it ends. While it runs it
needs memory beside the model's: its own context, and the operands of one problem at a time.

    python -m fxresu.passes.measure_apart < request.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence

import torch

from fxresu.kernels import _measure
from fxresu.kernels._choice_cache import Figures
from fxresu.kernels.choose import MEASURE, Problem, UnmeasuredError

from ._compat import isolated_inductor

_MARK = "fxresu figures: "
_START_S, _EACH_S = 120, 60
_failure = ""  # why this process measures nothing any more


def measure_apart(wanted: Sequence[tuple[Problem, Sequence[str]]], device: torch.device) -> list[Figures]:
    """Figures of every problem's candidates, by a child process on the same device.

    Raises:
        UnmeasuredError: the child could not be started, failed, or took too long; said once in a warning. The calls
            after that raise the same at once.
    """
    global _failure
    if not _failure:
        try:
            return _ask(wanted, device)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            _failure = f"no process could measure kernels ({type(error).__name__}: {str(error).strip()[:300]})"
            warnings.warn(f"{_failure}; the default ones run", RuntimeWarning, stacklevel=2)
    raise UnmeasuredError(_failure)


def _ask(wanted: Sequence[tuple[Problem, Sequence[str]]], device: torch.device) -> list[Figures]:
    if not sys.executable:
        raise ValueError("there is no Python executable to start")
    request = {
        "device": str(device),
        "precision": torch.get_float32_matmul_precision(),
        "problems": [[dataclasses.asdict(problem), list(names)] for problem, names in wanted],
    }
    environment = {**os.environ, MEASURE: "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-m", "fxresu.passes.measure_apart"], input=json.dumps(request), capture_output=True,
        text=True, env=environment, timeout=_START_S + _EACH_S * len(wanted), check=False,
    )  # fmt: skip
    answers = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not answers:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ValueError(last[0])
    figures = json.loads(answers[-1].removeprefix(_MARK))
    if len(figures) != len(wanted):
        raise ValueError(f"{len(figures)} answers to {len(wanted)} problems")
    return figures


def main() -> int:
    """Answer the request on stdin."""
    request = json.loads(sys.stdin.read())
    torch.set_float32_matmul_precision(request["precision"])
    device = torch.device(request["device"])
    figures = []
    for fields, names in request["problems"]:
        figures.append(_measure.compare(Problem(**fields), device, names, isolated_inductor))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(_MARK + json.dumps(figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
