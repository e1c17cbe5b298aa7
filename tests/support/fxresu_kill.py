"""Runs that are killed: a process that forks one child a run, so that torch is imported once.

Reads one JSON object a line from stdin and answers with one line: the child's exit status (negative: its signal).
Keys: `folder` (of the checkpoint), `variant` (options of the cycle), `result` (file for the digest at the end),
`kill` (where, see `arm`) or `after` (seconds until the parent kills), `keep_last`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxresu
from fxresu import CycleConfig, ResuCycle, checkpoint_folder, cycle_stages, resurrection, sparsify
from fxresu.state_manager import StateManager
from fxresu.state_owners import Slot

WIDTH = 16


class Net(nn.Module):
    """Dropout in the forward; three weights to manage."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, 32), nn.Linear(32, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.dropout(F.gelu(self.mid(F.gelu(self.up(x)))), 0.1, self.training)
        return F.cross_entropy(self.head(x + self.down(h)), y)


def batch() -> tuple[Tensor, Tensor]:
    """Data in the order that three random generators give: a resume that forgets one of them shows."""
    x = torch.randn(16, WIDTH) * random.uniform(0.5, 2.0) + float(np.random.rand())
    return x, x[:, :4].argmax(1)


def make(variant: dict[str, Any]) -> ResuCycle:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    options = {"cycles": 2, "train_steps": 3, "stabilize_steps": 2, "resu_steps": 3, "sparsity_start": 0.5, **variant}
    storage = options.pop("storage", "resident")
    model = fxresu.transform(Net(), compile=False, storage=storage)
    return ResuCycle(model, torch.optim.AdamW(model.parameters(), lr=1e-2), CycleConfig(**options))


def digest(cycle: ResuCycle) -> str:
    """Of everything that a run leaves: weights, optimizer, masks, position, and the generators."""
    state, optimizer = cycle.state_dict(), cycle.optimizer.state_dict()["state"]
    tensors = {**cycle.model.state_dict(), **state["tensors"]}
    tensors |= {f"{i}.{k}": v for i, s in optimizer.items() for k, v in s.items() if isinstance(v, Tensor)}
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    losses = [(s.loss_first, s.loss_last, s.steps, s.churn) for s in cycle.summaries]
    generators = torch.rand(3).tolist(), random.random(), np.random.rand()
    total.update(repr((losses, generators, cycle.global_step)).encode())
    return total.hexdigest()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, before: bool = True) -> None:
    """Die at the `number`-th call of a function, before or after it."""
    original, calls = getattr(owner, name), [0]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if before and calls[0] == number:
            die()
        result = original(*args, **kwargs)
        if calls[0] == number:
            die()
        return result

    setattr(owner, name, wrapper)


def arm(cycle: ResuCycle, kill: list) -> None:
    """["step", cycle, stage, "forward" | "backward" | "update"], or a place with the number of its call."""
    kind, *rest = kill
    if kind == "step":
        arm_step(cycle, *rest)
    elif kind == "transition":
        owner = {"activate": cycle_stages, "drop_state": resurrection}.get(rest[0], sparsify)
        at_call(owner, rest[0], rest[1], rest[2] == "before")
    elif kind == "move":
        at_call(StateManager if rest[0] == "begin" else Slot, rest[0], rest[1], rest[2] == "before")
    elif kind == "save":
        owner = Path if rest[0] == "rename" else checkpoint_folder
        at_call(owner, rest[0], rest[1], rest[2] == "before")


def arm_step(cycle: ResuCycle, number: int, stage: str, moment: str) -> None:
    def here() -> bool:
        return (cycle.cycle, cycle.stage, cycle.meter.steps) == (number, stage, 1)

    if moment == "forward":
        inner = cycle.loss

        def loss(model: nn.Module, part: Any) -> Tensor:
            value = inner(model, part)
            if here():
                die()
            return value

        cycle.loss = loss
    else:
        original: Callable = cycle._update if moment == "backward" else cycle._count_step

        def method(value: Tensor) -> None:
            if here():
                die()
            original(value)

        setattr(cycle, "_update" if moment == "backward" else "_count_step", method)


def child(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    folder = Path(spec["folder"])
    cycle = make(spec["variant"])
    if checkpoint_folder.newest(folder) is not None:
        cycle.load(folder)
    if spec.get("kill"):
        arm(cycle, spec["kill"])
    while cycle.global_step < cycle.total_steps:
        cycle.step(batch())
        if cycle.global_step % 2 == 0:
            cycle.save(folder, keep_last=spec.get("keep_last", 1))
    Path(spec["result"]).write_text(digest(cycle))


def serve() -> None:
    for line in sys.stdin:
        spec = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                child(spec)
            except BaseException as error:  # told to the parent by the status
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if "after" in spec:
            time.sleep(spec["after"])
            os.kill(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
