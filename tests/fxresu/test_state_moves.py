"""Optimizer state that leaves and comes back, seen through `set_phase`: values against a twin that never moved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fxresu_phases import ADAM, batch, train
from fxresu_testing import Net, loss_of
from torch import Tensor, nn
from torch.optim import Optimizer

import fxresu
from fxresu.kernels import log8
from fxresu.model_state import managed_weights
from fxresu.phase_state import restore_ahead
from fxresu.phases import set_phase
from fxresu.state_manager import find_manager, manager_of
from fxresu.state_owners import Owner, Slot

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
AWAY = ["offload", "pinned", "compress"]
OWNERS = {"offload": {"host"}, "pinned": {"leaving", "pinned"}, "compress": {"compressed"}}


def make(device: str = "cpu", optimizer=torch.optim.AdamW, **options) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = fxresu.transform(Net().to(device), compile=False, **options)
    return model, optimizer(model.parameters(), lr=0.01)


def step(model: nn.Module, optimizer: Optimizer, seed: int = 0) -> None:
    loss_of(model(batch(seed).to(next(model.parameters()).device))).backward()
    optimizer.step()
    optimizer.zero_grad()


def values(optimizer: Optimizer) -> dict[tuple[int, str], Tensor]:
    """All state tensors, from the dictionary that anybody would save."""
    state = optimizer.state_dict()["state"]
    return {(i, k): v.cpu() for i, s in state.items() for k, v in s.items() if isinstance(v, Tensor)}


def same(a: Optimizer, b: Optimizer) -> bool:
    x, y = values(a), values(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def through_codes(optimizer: Optimizer) -> dict[tuple[int, str], Tensor]:
    """What compressing makes of the state."""
    found = values(optimizer)
    for (index, key), value in found.items():
        if value.dim():
            parts = log8.encode(value.flatten(), signed=bool((value < 0).any()))
            out = torch.empty_like(value.flatten())
            found[index, key] = log8.decode(*parts, bool((value < 0).any()), out).view_as(value)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", AWAY)
@pytest.mark.parametrize("phase", ["predict", "correct"])
def test_forward_only_phases_send_everything_away(phase: str, strategy: str, device: str) -> None:
    model, optimizer = make(device)
    twin, other = make(device)
    for m, o in ((model, optimizer), (twin, other)):
        step(m, o), step(m, o, 1)
    want = through_codes(other) if strategy == "compress" else values(other)
    set_phase(model, phase, optimizer=optimizer, optimizer_state=strategy)
    manager = find_manager(optimizer)
    owners = {s.owner for s in manager.slots()}
    assert {str(o) for o in owners} <= OWNERS[strategy]
    large = [k for k, v in want.items() if v.numel() > 1]
    assert len(manager.slots()) == len(large)
    got = values(optimizer)
    assert all(torch.equal(got[k], v) for k, v in want.items())
    bill = fxresu.memory_bill(model, optimizer)
    plain = fxresu.memory_bill(twin, other)
    for name in ("optimizer state, managed", "optimizer state, other"):
        if device == "cuda" or strategy == "compress":
            assert bill[name] < 0.35 * plain[name], name
    set_phase(model, "dense", optimizer=optimizer)
    assert not manager.slots()
    assert all(torch.equal(values(optimizer)[k], v) for k, v in want.items())
    if strategy != "compress":
        step(model, optimizer, 2), step(twin, other, 2)
        assert same(optimizer, other)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    counts = manager.read_counts()
    assert counts.out == counts.back > 0 and counts.late == counts.pageable == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", AWAY)
def test_resu_sends_the_managed_weights_state(strategy: str, device: str) -> None:
    model, optimizer = make(device)
    twin, other = make(device)
    for m, o, s in ((model, optimizer, strategy), (twin, other, "keep")):
        step(m, o)
        set_phase(m, "sparse", optimizer=o)
        step(m, o, 1)
        set_phase(m, "resu", optimizer=o, optimizer_state=s, **ADAM)
    managed = {id(m.parameter) for m in managed_weights(model).values()}
    for parameter, state in optimizer.state.items():
        assert isinstance(state["exp_avg"], Slot) == (id(parameter) in managed)
    if device == "cpu":
        train(model, optimizer, 2), train(twin, other, 2)
    for m, o in ((model, optimizer), (twin, other)):
        set_phase(m, "sparse", optimizer=o, **ADAM)
        step(m, o, 3)
    if strategy != "compress":
        assert same(optimizer, other)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize("strategy", AWAY)
def test_dictionaries_copies_and_loading_while_it_is_away(strategy: str) -> None:
    model, optimizer = make()
    step(model, optimizer)
    before = through_codes(optimizer) if strategy == "compress" else values(optimizer)
    set_phase(model, "predict", optimizer=optimizer, optimizer_state=strategy)
    owners = [s.owner for s in find_manager(optimizer).slots()]
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        tensors = [v for s in other.state.values() for v in s.values()]
        assert all(isinstance(v, Tensor) for v in tensors)
        assert all(torch.equal(values(other)[k], v) for k, v in before.items())
    saved = optimizer.state_dict()
    saved["state"] = {i: {k: v * 2 for k, v in s.items()} for i, s in saved["state"].items()}
    optimizer.load_state_dict(saved)
    manager = find_manager(optimizer)
    assert len(manager.slots()) == len(owners) and {str(s.owner) for s in manager.slots()} <= OWNERS[strategy]
    set_phase(model, "dense", optimizer=optimizer)
    assert all(torch.equal(values(optimizer)[k], 2 * v) for k, v in before.items())


def test_a_step_that_comes_upon_state_that_is_away() -> None:
    model, optimizer = make()
    twin, other = make()
    step(model, optimizer), step(twin, other)
    set_phase(model, "predict", optimizer=optimizer, optimizer_state="pinned")
    for p, q in zip(model.parameters(), twin.parameters()):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    with pytest.warns(fxresu.FxresuWarning, match=r"AdamW.step\(\) changes parameters whose state"):
        optimizer.step()
    other.step()
    assert same(optimizer, other)
    assert find_manager(optimizer).counts.late > 0


def test_calling_back_in_inference_mode_gives_tensors_that_train() -> None:
    model, optimizer = make()
    twin, other = make()
    step(model, optimizer), step(twin, other)
    set_phase(model, "predict", optimizer=optimizer, optimizer_state="pinned")
    restore_ahead(model, 1)
    with torch.inference_mode():
        model(batch())
    assert find_manager(optimizer).counts.ahead == find_manager(optimizer).counts.out > 0
    set_phase(model, "dense", optimizer=optimizer)
    step(model, optimizer, 1), step(twin, other, 1)
    assert same(optimizer, other)


def test_drop_before_and_after_a_forward_only_phase() -> None:
    model, optimizer = make()
    step(model, optimizer)
    set_phase(model, "predict", optimizer=optimizer, optimizer_state="offload")
    set_phase(model, "correct", optimizer=optimizer, optimizer_state="drop")
    assert not any(optimizer.state.get(p) for p in model.parameters())
    set_phase(model, "dense", optimizer=optimizer)
    step(model, optimizer)
    assert all(float(s["step"]) == 1 for s in optimizer.state.values())


def test_a_strategy_for_a_phase_that_trains_is_refused() -> None:
    model, optimizer = make()
    with pytest.raises(fxresu.ConfigError, match="optimizer_state='offload' in the plan of dense"):
        set_phase(model, "dense", optimizer=optimizer, optimizer_state="offload")
    with pytest.raises(fxresu.ConfigError, match="optimizer_state='disk': use one of keep, drop, offload"):
        set_phase(model, "predict", optimizer=optimizer, optimizer_state="disk")


def test_another_strategy_for_what_is_away_already() -> None:
    model, optimizer = make()
    step(model, optimizer)
    want = values(optimizer)
    for phase, strategy in (("predict", "pinned"), ("correct", "offload"), ("predict", "keep"), ("correct", "pinned")):
        set_phase(model, phase, optimizer=optimizer, optimizer_state=strategy)
        assert find_manager(optimizer).slots() and all(torch.equal(values(optimizer)[k], v) for k, v in want.items())
    set_phase(model, "predict", optimizer=optimizer, optimizer_state="compress")
    assert {s.owner for s in manager_of(optimizer).slots()} == {Owner.COMPRESSED}
    set_phase(model, "correct", optimizer=optimizer, optimizer_state="offload")
    assert {s.owner for s in manager_of(optimizer).slots()} == {Owner.HOST}


FORMS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.9, centered=True),
    "torchao 8-bit": lambda m: pytest.importorskip("torchao.optim").AdamW8bit(m.parameters(), lr=0.01, block_size=64),
    "bf16": lambda m: torch.optim.AdamW(m.to(torch.bfloat16).parameters(), lr=0.01),
}


@pytest.mark.parametrize("strategy", ["offload", "pinned"])
@pytest.mark.parametrize("name", FORMS)
def test_state_of_any_form_comes_back_as_it_was(name: str, strategy: str) -> None:
    pairs = []
    for _ in range(2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        optimizer = FORMS[name](fxresu.transform(net, compile=False))
        pairs.append((net, optimizer))
    for where in ("predict", "correct", "dense"):
        for index, (net, optimizer) in enumerate(pairs):
            if where != "correct":
                x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).to(net[0].weight.dtype)
                set_phase(net, "dense", optimizer=optimizer)
                net(x).square().mean().backward()
                with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
                    optimizer.step()
                optimizer.zero_grad()
            if index == 0 and where != "dense":
                set_phase(net, where, optimizer=optimizer, optimizer_state=strategy)
                assert len(find_manager(optimizer).slots()) >= 4
    (a, first), (b, second) = pairs
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    for p, q in zip(a.parameters(), b.parameters()):
        for key, value in first.state[p].items():
            other = second.state[q][key]
            if isinstance(value, Tensor) and type(value) is not Tensor:
                value, other = value.dequantize(), other.dequantize()
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other
