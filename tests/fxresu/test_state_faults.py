"""Memory that runs out at every allocation of a transition, under every strategy: all or nothing, bit by bit."""

from __future__ import annotations

import pytest
import torch
from fxresu_faults import FailAt
from fxresu_phases import ADAM, batch, same, snapshot, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

import fxresu
from fxresu.state_manager import find_manager
from fxresu.state_owners import Slot

STRATEGIES = ["keep", "drop", "offload", "pinned", "compress"]


class Net(nn.Module):
    """Two weights to manage, and a rest."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 24), nn.Linear(24, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(x))))


def make(storage: str = "resident") -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = fxresu.transform(Net(), compile=False, storage=storage)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def enter(model: nn.Module, optimizer: Optimizer, phase: str, strategy: str, leave: str = "commit") -> None:
    state = {} if phase in ("dense", "sparse") else {"optimizer_state": strategy}
    fxresu.set_phase(model, phase, optimizer=optimizer, leave=leave, **state, **ADAM)


def whole(model: nn.Module, optimizer: Optimizer) -> dict:
    """All that a phase is, with the values of what is away."""
    found = snapshot(model, optimizer)
    for key, value in found.items():
        if isinstance(key, tuple) and key[1] == "state":
            found[key] = {k: v.value().clone() if isinstance(v, Slot) else v for k, v in value.items()}
    for name, p in model.named_parameters():
        found[name, "rest"] = {k: v.value() if isinstance(v, Slot) else v.clone() for k, v in optimizer.state[p].items()} if p in optimizer.state else None
    return found


def fails_whole(model: nn.Module, optimizer: Optimizer, phase: str, strategy: str, number: int, leave: str) -> bool:
    """Enter a phase with the n-th allocation failing; whether it failed. It must have changed nothing then."""
    before, output = whole(model, optimizer), model(batch()).detach()
    try:
        with FailAt(number) as fault:
            enter(model, optimizer, phase, strategy, leave)
    except torch.OutOfMemoryError:
        after = whole(model, optimizer)
        different = [k for k in before if not same(before[k], after[k])]
        assert not different, (phase, strategy, number, different)
        assert torch.equal(model(batch()), output)
        return True
    assert fault.seen < number
    return False
