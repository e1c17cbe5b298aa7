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
from fxresu.errors import HostMemoryError
from fxresu.state_manager import AWAY, find_manager, manager_of
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
        state = optimizer.state.get(p, {})
        found[name, "rest"] = {k: v.value() if isinstance(v, Slot) else v.clone() for k, v in state.items()}
    return found


PATHS = {
    "sparse": ["sparse"],
    "resu": ["sparse", "resu"],
    "commit": ["sparse", "resu", "sparse"],
    "discard": ["sparse", "resu", "discard"],
    "densify": ["sparse", "resu", "dense"],
    "predict": ["predict"],
    "back to dense": ["predict", "dense"],
    "predict in RESU": ["sparse", "resu", "predict"],
    "back to RESU": ["sparse", "resu", "predict", "resu"],
    "RESU after predict": ["sparse", "predict", "resu"],
}
# What these write of the optimizer's state is made in memory that was set aside, and freed again, just before.
SET_ASIDE = ("commit", "densify")


def arrive(path: list[str], strategy: str, storage: str) -> tuple[nn.Module, Optimizer]:
    """A model at the last phase but one."""
    model, optimizer = make(storage)
    manager_of(optimizer).pinned_required = True
    train(model, optimizer, 2)
    for phase in path[:-1]:
        enter(model, optimizer, phase, strategy)
        if phase != "predict":
            train(model, optimizer, 1)
    return model, optimizer


def go(model: nn.Module, optimizer: Optimizer, phase: str, strategy: str) -> None:
    discard = phase == "discard"
    enter(model, optimizer, "sparse" if discard else phase, strategy, "discard" if discard else "commit")


def fails_whole(model: nn.Module, optimizer: Optimizer, phase: str, strategy: str, number: int, caching: bool) -> bool:
    """Enter a phase with the n-th allocation failing; whether it failed. It must have changed nothing then."""
    before, output = whole(model, optimizer), model(batch()).detach()
    try:
        with FailAt(number, caching) as fault:
            go(model, optimizer, phase, strategy)
    except (torch.OutOfMemoryError, HostMemoryError):
        after = whole(model, optimizer)
        different = [k for k in before if not same(before[k], after[k])]
        assert not different, (phase, strategy, number, different)
        assert torch.equal(model(batch()), output)
        return True
    fallen_back = strategy == "pinned" and not manager_of(optimizer).pinned_required
    assert fault.seen < number or fallen_back
    return False


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("path", PATHS)
def test_every_allocation_fails_once(path: str, strategy: str) -> None:
    """The same model is tried again after every failure, and arrives with the bits of a twin that never failed."""
    phases, caching = PATHS[path], path in SET_ASIDE
    model, optimizer = arrive(phases, strategy, "resident")
    twin, other = arrive(phases, strategy, "resident")
    number = 1
    while fails_whole(model, optimizer, phases[-1], strategy, number, caching):
        number += 1
    assert number > 1 or path not in ("sparse", "resu", "commit", "RESU after predict")
    assert number > 1 or path != "predict" or strategy not in AWAY
    go(twin, other, phases[-1], strategy)
    a, b = whole(model, optimizer), whole(twin, other)
    assert not [k for k in a if not same(a[k], b[k])]


PHASES = {
    "dense": ("sparse", "predict", "correct"),
    "sparse": ("resu", "dense", "predict", "sparse"),
    "resu": ("sparse", "discard", "dense", "predict"),
}


@pytest.mark.filterwarnings("ignore::fxresu.FxresuWarning")
@settings(max_examples=25)
@given(st.data(), st.sampled_from(["resident", "packed"]))
def test_any_sequence_with_failures_ends_as_without(data: st.DataObject, storage: str) -> None:
    """A twin keeps everything where it is (or compresses and drops as the other does) and never fails."""
    (model, optimizer), (twin, other) = make(storage), make(storage)
    train(model, optimizer), train(twin, other)
    base, resumes = "dense", ""
    for _ in range(data.draw(st.integers(1, 6))):
        phase = data.draw(st.sampled_from([*PHASES[base], *([base] if resumes else [])]))
        strategy = data.draw(st.sampled_from(STRATEGIES))
        caching = base == "resu" and phase in ("sparse", "dense")
        number = data.draw(st.integers(1, 40))
        failed = fails_whole(model, optimizer, phase, strategy, number, caching)
        if failed:
            go(model, optimizer, phase, strategy)
        go(twin, other, phase, strategy if strategy in ("drop", "compress") else "keep")
        resumes = phase if phase in ("predict", "correct") else ""
        base = base if resumes else "sparse" if phase == "discard" else phase
        if not resumes:
            train(model, optimizer), train(twin, other)
        a, b = whole(model, optimizer), whole(twin, other)
        assert not [k for k in a if not same(a[k], b[k])], (phase, strategy)


def test_a_failure_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = arrive(["predict", "dense"], "offload", "resident")
    advice = "the state is whole where it was; free memory of the device"
    with pytest.raises(torch.OutOfMemoryError, match=advice), FailAt(1):
        go(model, optimizer, "dense", "offload")
    assert find_manager(optimizer).slots()
    enter(model, optimizer, "dense", "keep")
    with pytest.raises(torch.OutOfMemoryError, match="nothing was moved; compressing holds the codes"), FailAt(3):
        enter(model, optimizer, "predict", "compress")
    assert not find_manager(optimizer).slots()
