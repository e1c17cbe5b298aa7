"""The cycle with optimizer state that leaves in RESU and comes back beside its last steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fxresu_cycles import DEVICES, make, run, until

import fxresu
from fxresu import RunLog
from fxresu.state_manager import find_manager, manager_of

BASE = {"cycles": 2, "train_steps": 3, "stabilize_steps": 2, "resu_steps": 6, "rule": "adam"}


def finished(device: str = "cpu", **options) -> tuple[fxresu.ResuCycle, list[float]]:
    cycle = make(device=device, **{**BASE, **options})
    return cycle, run(cycle, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", ["offload", "pinned"])
@pytest.mark.parametrize("rest", [False, True])
def test_a_run_with_state_away_has_the_bits_of_one_without(strategy: str, rest: bool, device: str) -> None:
    kept, losses = finished(device, optimizer_state="keep", train_rest=rest, accumulation=2, grad_clip=0.5)
    away, others = finished(
        device, optimizer_state=strategy, train_rest=rest, accumulation=2, grad_clip=0.5, restore_lookahead=3
    )
    assert losses == others
    for a, b in zip(kept.model.state_dict().values(), away.model.state_dict().values()):
        assert torch.equal(a, b)
    a, b = (c.optimizer.state_dict()["state"] for c in (kept, away))
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    resu = [s for s in away.summaries if s.stage == "resu"]
    managed = 2 * 4 * 4 * 32 * 64
    assert all(s.state_out >= managed and s.state_back == s.state_ahead == s.state_out for s in resu)
    assert all(s.state_late == s.state_pageable == s.state_postponed == 0 for s in away.summaries)
    assert (resu[0].state_out > managed) == (not rest), "the frozen rest's state goes too"


def test_a_schedule_of_learning_rates_goes_on() -> None:
    ends = []
    for strategy in ("keep", "pinned"):
        cycle = make(**{**BASE, "optimizer_state": strategy})
        scheduler = torch.optim.lr_scheduler.OneCycleLR(cycle.optimizer, 0.01, cycle.total_steps * 2)
        for _ in range(cycle.total_steps):
            run(cycle, 1)
            scheduler.step()
        ends.append(cycle.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(e.values() for e in ends)))


def test_without_lookahead_it_comes_at_the_end() -> None:
    cycle, _ = finished(optimizer_state="pinned", restore_lookahead=0)
    resu, train = (next(s for s in cycle.summaries if (s.cycle, s.stage) == w) for w in ((0, "resu"), (1, "train")))
    assert resu.state_back == resu.state_ahead == 0 < resu.state_out == train.state_back


def test_a_device_without_memory_to_begin_early(monkeypatch: pytest.MonkeyPatch) -> None:
    cycle = make(**{**BASE, "optimizer_state": "pinned", "cycles": 1})
    until(cycle, "resu")
    lanes = find_manager(cycle.optimizer)._lanes[torch.device("cpu")]
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "empty", lambda *form: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
        with pytest.warns(fxresu.FxresuWarning, match="no memory to call optimizer state back ahead"):
            run(cycle, 5)
    run(cycle, 1)
    summary = cycle.summaries[-1]
    assert cycle.finished and summary.state_postponed == 4 and summary.state_ahead == summary.state_out
    assert not find_manager(cycle.optimizer).slots()


def test_too_little_pinned_memory_is_counted_or_refused() -> None:
    with pytest.warns(fxresu.FxresuWarning, match="pinned_limit=1e-05 GB: .* goes to pageable memory"):
        cycle, losses = finished(optimizer_state="pinned", pinned_limit=1e-5)
    assert all(s.state_pageable > 0 for s in cycle.summaries if s.stage == "resu")
    assert losses == finished(optimizer_state="keep")[1]
    cycle = make(**{**BASE, "optimizer_state": "pinned", "pinned_limit": 1e-5, "pinned_required": True})
    with pytest.raises(fxresu.FxresuError, match=r"(?s)pinned_limit=1e-05 GB.* raise pinned_limit"):
        run(cycle)
    assert (cycle.stage, str(cycle.phase)) == ("stabilize", "sparse")
    assert all(p.requires_grad for p in cycle.model.parameters())


def test_the_log_says_what_is_where(tmp_path: Path) -> None:
    cycle = make(**{**BASE, "optimizer_state": "pinned", "restore_lookahead": 0, "cycles": 1})
    log = RunLog(tmp_path, sinks=())
    log.follow(cycle)
    run(cycle)
    log.finish()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (resu,) = [line for line in lines if line["event"] == "phase" and line["stage"] == "resu"]
    where = resu["memory"]["optimizer_state"]
    assert where["pinned"] + where.get("leaving", 0) == resu["summary"]["state_out"] > 0
    assert resu["memory"]["pinned"] >= where["pinned"]
    assert resu["summary"]["state_stall_seconds"] >= 0


@pytest.mark.parametrize("strategy", ["offload", "pinned", "compress"])
def test_a_checkpoint_taken_while_state_is_away(strategy: str, tmp_path: Path) -> None:
    options = {**BASE, "optimizer_state": strategy, "restore_lookahead": 3}
    one, other = make(**options), make(**options)
    until(one, "resu")
    run(one, 4)  # some of it is on its way back
    one.save(tmp_path / "c")
    other.load(tmp_path / "c")
    manager = find_manager(other.optimizer)
    assert manager.slots()
    if strategy == "pinned":
        assert {str(s.owner) for s in manager.slots()} <= {"pinned"}
    assert run(one, 10) == run(other, 10)
    a, b = (c.optimizer.state_dict()["state"] for c in (one, other))
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["offload", "pinned", "compress"])
def test_the_device_is_spared_the_state(strategy: str) -> None:
    """A weight of 67 MB: RESU peaks lower by what left, and neither switch goes above keeping everything."""
    peaks = {}
    for name in ("keep", strategy):
        torch.manual_seed(0)
        model = fxresu.transform(torch.nn.Linear(4096, 4096, bias=False, device="cuda"), compile=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        model(torch.randn(4, 4096, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        fxresu.set_phase(model, "sparse", optimizer=optimizer)
        found = []
        for phase in ("resu", "sparse"):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            away = {"optimizer_state": name} if phase == "resu" else {}
            fxresu.set_phase(model, phase, optimizer=optimizer, **away)
            torch.cuda.synchronize()
            found.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
            model(torch.randn(4, 4096, device="cuda")).square().mean().backward()
            found.append(torch.cuda.max_memory_allocated())
            optimizer.zero_grad()
        peaks[name] = found
    state = 2 * 4096 * 4096 * 4
    saved = peaks["keep"][1] - peaks[strategy][1]
    assert saved > (0.7 if strategy == "compress" else 0.99) * state
    # Codes stand beside what they encode, and a chunk's temporaries, whatever the tensor's size, beside both.
    slack = 0.26 * state + 32e6 if strategy == "compress" else 0.02 * state
    assert peaks[strategy][0] <= peaks["keep"][0] + slack and peaks[strategy][2] <= peaks["keep"][2] + slack


@pytest.mark.gpu
def test_a_stall_is_measured_and_overlap_avoids_it() -> None:
    stalls = {}
    for ahead in (False, True):
        parameter = torch.nn.Parameter(torch.zeros(64 << 20, device="cuda"))
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        parameter.grad = None
        manager = manager_of(optimizer)
        for _turn in range(2):  # the first one allocates pinned memory
            manager.send([parameter], "pinned").commit()
            torch.cuda.synchronize()
            before = manager.read_counts().stall_seconds
            if ahead:
                manager.arm(1)
                assert manager.begin() == 2 * parameter.numel() * 4
                square = torch.randn(8192, 8192, device="cuda")
                for _ in range(40):
                    square @ square
                torch.cuda.synchronize()
                manager.finish()
            manager.fetch().commit()
            torch.cuda.synchronize()
            stalls[ahead] = manager.read_counts().stall_seconds - before
    assert stalls[False] > 0.005, "512 MB at 55 GB/s take 9 ms"
    assert stalls[True] < 0.1 * stalls[False]
