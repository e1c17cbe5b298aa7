"""Thousands of moves of optimizer state with poisoned buffers and copies in any allowed order: every bit survives."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from fxresu_faults import Hostile, HostileCuda, PoisonedPool
from torch import Tensor
from torch.optim import Optimizer

from fxresu import state_manager
from fxresu.errors import HostMemoryError
from fxresu.kernels import log8
from fxresu.lanes import HostLanes
from fxresu.pinned_pool import PinnedPool
from fxresu.state_manager import StateManager
from fxresu.state_owners import TRANSITIONS, Owner, OwnerError, Slot

SHAPES = [(40, 9), (7,), (3, 5, 2), (300,), (64, 64)]


class Kept(Optimizer):
    """Two running means and odd forms beside them."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {"lr": 1.0})
        with torch.device(parameters[0].device):
            self._fill(parameters)

    def _fill(self, parameters: list[Tensor]) -> None:
        table = torch.linspace(0, 1, 256)  # shared by all, as bitsandbytes does
        for p in parameters:
            wide = torch.randn(2, *p.shape)
            self.state[p] = {
                "step": torch.tensor(3.0), "exp_avg": torch.randn(p.shape).to(torch.bfloat16),
                "exp_avg_sq": torch.rand(p.shape), "rows": torch.rand(max(p.shape[0], 2), 1), "qmap": table,
                "state1": torch.randint(0, 256, p.shape, dtype=torch.uint8), "view": wide[0], "name": "x",
            }  # fmt: skip
            if p.dim() == 3:
                self.state[p]["exp_avg_sq"] = torch.rand(2, 5, 3).permute(2, 1, 0)  # dense, in another order

    def step(self, closure: object = None) -> None:
        """Changes every running mean of a parameter with a gradient."""
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p]["exp_avg"].mul_(-1)
                self.state[p]["exp_avg_sq"].mul_(0.5)


def state(optimizer: Optimizer) -> dict[tuple[int, str], Tensor]:
    found = optimizer.state_dict()["state"]
    return {(i, k): v.cpu().clone() for i, s in found.items() for k, v in s.items() if isinstance(v, Tensor)}


def rounded(want: dict[tuple[int, str], Tensor], indices: list[int]) -> dict[tuple[int, str], Tensor]:
    result = dict(want)
    for (index, key), value in want.items():
        if index in indices and key in ("exp_avg", "exp_avg_sq"):
            out, signed = torch.empty_like(value), bool((value < 0).any())
            ways = value.as_strided((value.numel(),), (1,)), out.as_strided((value.numel(),), (1,))
            log8.decode(*log8.encode(ways[0], signed), signed, ways[1])
            result[index, key] = out
    return result


def hostile(
    monkeypatch: pytest.MonkeyPatch, seed: int, limit: int | None, device: str = "cpu"
) -> tuple[Optimizer, StateManager, Any]:
    monkeypatch.setattr(state_manager, "PinnedPool", PoisonedPool)
    torch.manual_seed(seed)
    optimizer = Kept([torch.nn.Parameter(torch.randn(s, device=device)) for s in SHAPES])
    manager = state_manager.manager_of(optimizer)
    manager.pinned_limit = limit
    place = optimizer.param_groups[0]["params"][0].device
    lanes = Hostile(seed) if device == "cpu" else HostileCuda(place, seed)
    manager._lanes[place] = lanes
    return optimizer, manager, lanes


@pytest.mark.filterwarnings("ignore::fxresu.FxresuWarning")
@pytest.mark.parametrize("limit", [None, 30_000, 2048])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_thousands_of_moves_lose_nothing(
    device: str, seed: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, manager, lanes = hostile(monkeypatch, seed, limit, device)
    parameters, draw = optimizer.param_groups[0]["params"], random.Random(seed)
    want = state(optimizer)
    for turn in range(400):
        some = draw.sample(range(len(parameters)), draw.randint(1, len(parameters)))
        chosen = [parameters[i] for i in some]
        kind = draw.choice(["offload", "pinned", "pinned", "compress", "fetch", "ahead", "finish", "step", "load"])
        if kind in state_manager.AWAY:
            compressed = [i for i in some if any(s.owner is Owner.COMPRESSED for s in manager.slots([parameters[i]]))]
            move = manager.send(chosen, kind)
            if draw.random() < 0.3:
                move.rollback()
                want = rounded(want, [])
            else:
                move.commit()
                fresh = [i for i in some if i not in compressed or kind != "compress"]
                want = rounded(want, fresh) if kind == "compress" else want
        elif kind == "fetch":
            move = manager.fetch(chosen)
            move.rollback() if draw.random() < 0.3 else move.commit()
        elif kind == "ahead":
            manager.arm(draw.randint(1, 4))
            manager.begin()
        elif kind == "finish":
            manager.finish()
        elif kind == "step":
            for i in some:
                parameters[i].grad = torch.ones_like(parameters[i])
                want[i, "exp_avg"], want[i, "exp_avg_sq"] = -want[i, "exp_avg"], want[i, "exp_avg_sq"] * 0.5
            optimizer.step()
            optimizer.zero_grad()
        elif turn > 300:  # torch casts what it loads to the parameter's dtype
            want = {k: v if k[1] == "step" else v.float() for k, v in want.items()}
            manager.stay_away = chosen, draw.choice(["offload", "pinned"])
            optimizer.load_state_dict(optimizer.state_dict())
            manager.stay_away = [], "keep"
        if turn % 5 == 0:
            check(optimizer, want, turn)
    manager.fetch().commit()
    check(optimizer, want, -1)
    assert not manager.slots() and lanes.poisoned > 100
    (pool,) = manager._pools.values()
    pool._reclaim(wait=True)
    assert pool.used == 0 and (limit is None or pool.nbytes <= limit)
    assert (manager.counts.pageable > 0) == (limit == 2048) or limit == 30_000


def check(optimizer: Optimizer, want: dict[tuple[int, str], Tensor], turn: int) -> None:
    got = state(optimizer)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), (turn, key)


def test_what_cannot_leave_is_named_and_tables_are_not_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, manager, _ = hostile(monkeypatch, 0, None)
    with pytest.warns(state_manager.TransferWarning, match="'view' stays .* part of a larger tensor"):
        manager.send(optimizer.param_groups[0]["params"], "pinned").commit()
    assert set(manager.stays) == {"view"}
    first, second, *_ = optimizer.state.values()
    assert first["qmap"] is second["qmap"] and isinstance(first["rows"], Slot) and isinstance(first["state1"], Slot)
    manager.fetch().commit()
    with pytest.warns(state_manager.TransferWarning, match="'rows' stays .* not known to be a running mean"):
        manager.send(optimizer.param_groups[0]["params"], "compress").commit()
    assert isinstance(first["exp_avg"], Slot) and isinstance(first["state1"], Tensor)


def test_without_pinned_memory_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, manager, lanes = hostile(monkeypatch, 0, None)
    want, parameters = state(optimizer), optimizer.param_groups[0]["params"]

    def none(size: int, pooled: bool = False) -> Tensor:
        raise HostMemoryError("CUDA error: out of memory")

    monkeypatch.setattr(lanes, "host", none)
    manager.pinned_required = True
    with pytest.raises(HostMemoryError, match=r"(?s)the host gives no .* pinned_required False"):
        manager.send(parameters, "pinned")
    check(optimizer, want, 0)
    assert not manager.slots()
    manager.pinned_required = False
    with pytest.warns(state_manager.TransferWarning, match="goes to pageable memory"):
        manager.send(parameters, "pinned").commit()
    assert {s.owner for s in manager.slots()} == {Owner.HOST}
    assert manager.counts.pageable == manager.counts.out > 0
    check(optimizer, want, 1)


def test_the_table_is_the_only_way() -> None:
    lanes = HostLanes()
    slot = Slot(torch.zeros(4), lanes)
    for owner in Owner:
        if owner not in TRANSITIONS[Owner.DEVICE]:
            with pytest.raises(OwnerError, match=f"device cannot become {owner}"):
                slot.go(owner)
    assert slot.owner is Owner.DEVICE
    reached = {Owner.DEVICE}
    while more := {o for r in reached for o in TRANSITIONS[r]} - reached:
        reached |= more
    assert reached == set(Owner) and not TRANSITIONS[Owner.DROPPED]
    with pytest.raises(OwnerError, match="device cannot come back"):
        slot.come_back()
    slot.leave(PinnedPool(lanes))
    with pytest.raises(OwnerError, match="leaving has not been called back"):
        slot.arrive()


def test_code_that_forgets_to_wait_is_seen() -> None:
    """The copies of a CPU are late for real: without the waits the values would be wrong."""
    lanes = Hostile(0)
    lanes._some = lambda: None
    value = torch.arange(5.0)
    slot = Slot(value, lanes)
    slot.leave(PinnedPool(lanes))
    assert lanes.pending["out"] == 1
    slot.depart()
    assert not value.isnan().any(), "held until the copy is done"
    slot.come_back()
    assert slot._value.isnan().all() and lanes.pending["in"] == 1
    assert torch.equal(slot.arrive(), torch.arange(5.0))
    assert lanes.pending["out"] == 1, "the poison behind the copy"
