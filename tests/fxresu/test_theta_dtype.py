"""θ stored in bfloat16: training, resuming, what it takes, and where there is no such θ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxresu_cycles import Net, batch, make, run, until
from torch import nn

import fxresu
from fxresu import ConfigError, CycleConfig, ResuCycle, StreamedAdamW, ThetaOptimizer, stream_blocks
from fxresu.model_state import managed_weights, state_of
from fxresu.theta import rounding_key

SHORT = {"cycles": 2, "train_steps": 2, "stabilize_steps": 1, "resu_steps": 5, "sparsity_start": 0.5,
         "theta_dtype": "bf16"}  # fmt: skip
PACKED = {"storage": "packed"}


def thetas(model: nn.Module) -> list[torch.Tensor]:
    return [m.entry.theta for m in managed_weights(model).values()]


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
@pytest.mark.parametrize("options", [
    {"rule": "adam", "theta_moments": "8bit", "candidates": 0.5}, {"rule": "selective", "granularity": "layer"},
    {"rule": "sgd", "autocast": "bf16", "accumulation": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("values", ["native", "int4"])
def test_whole_runs_on_packed_storage(values: str, options: dict, compile: Any) -> None:
    torch.compiler.reset()
    transform = {**PACKED, "packed_values": values, "compile": compile}
    cycle = make(transform=transform, **SHORT, **options)
    until_resu = 3 * cycle.config.accumulation
    run(cycle, until_resu)
    for managed in managed_weights(cycle.model).values():
        entry = managed.entry
        assert entry.theta.dtype == torch.bfloat16 and entry.anchor is entry.theta
        dense, own = entry.dense(managed.parameter)[~entry.mask() & entry.covered()], entry.theta.detach().flatten()
        assert torch.equal(dense[dense != 0], own[own != 0].to(dense.dtype))
    before = [t.detach().clone() for t in thetas(cycle.model)]
    with cycle._autocast():
        cycle.loss(cycle.model, batch(7)).backward()
    assert all(t.grad.dtype == torch.bfloat16 for t in thetas(cycle.model))
    cycle.theta_optimizer.zero_grad()
    run(cycle, cycle.config.accumulation)
    assert all(not torch.equal(a, b) for a, b in zip(before, thetas(cycle.model)))
    losses = run(cycle, cycle.total_steps * cycle.config.accumulation - until_resu - cycle.config.accumulation)
    assert cycle.finished and all(loss == loss for loss in losses)
    for managed in managed_weights(cycle.model).values():
        assert managed.entry.theta is None and not managed.parameter[~managed.entry.mask()].any()


def test_small_updates_survive_on_average() -> None:
    """A hundredth of the last bit at a time, over many entries; rounding to nearest would leave all where they are."""
    ends = {}
    for dtype in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = fxresu.transform(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 1)), compile=False, **PACKED)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        fxresu.set_phase(model, "resu", optimizer=optimizer, rule="sgd", theta_init="zero", theta_dtype=dtype)
        entry = next(iter(managed_weights(model).values())).entry
        with torch.no_grad():
            entry.theta.fill_(1.0)
        config = CycleConfig(rule="sgd", theta_lr=2.0**-8 / 100, theta_weight_decay=0.0, theta_dtype=dtype)
        step = ThetaOptimizer(model, config)
        for _ in range(30):
            for managed in managed_weights(model).values():
                managed.entry.anchor.grad = torch.ones_like(managed.entry.anchor)
            step.step()
        ends[dtype] = 1 - entry.theta.detach().float()
    assert (torch.tensor(1.0) - 2.0**-8 / 100).bfloat16() == 1
    assert ends["bf16"].mean() == pytest.approx(float(ends["fp32"].mean()), rel=0.03)
    assert (ends["bf16"] == 0).float().mean() > 0.5, "most of them not at all"


@pytest.mark.parametrize("now", [False, True])
def test_resume_is_bit_exact(tmp_path, now: bool) -> None:
    """And the order of updates changes no bit, nor how many weights share a launch."""
    options = {**SHORT, "rule": "adam", "theta_moments": "8bit", "candidates": 0.5}
    through = make(transform=PACKED, **options)
    losses = run(through)
    first = make(transform=PACKED, **options, theta_in_backward=now)
    assert run(first, 5) == losses[:5]
    first.save(tmp_path / "c")
    saved = thetas(first.model)
    other = make(transform=PACKED, **options, theta_in_backward=now)
    other.load(tmp_path / "c")
    assert other.stage == "resu"
    assert all(torch.equal(a, b) and b.dtype == torch.bfloat16 for a, b in zip(saved, thetas(other.model)))
    assert run(other, other.total_steps - 5) == losses[5:]
    for a, b in zip(through.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_seed_phase_and_weight_decide_the_rounding() -> None:
    keys = {rounding_key(name, seed, phase) for name in ("a", "b") for seed in (0, 1) for phase in (0, 1)}
    assert len(keys) == 8 and all(0 <= key < 2**63 for key in keys)
    assert rounding_key("a", 0, 0) == rounding_key("a", 0, 0)
    ends = []
    for seed in (0, 0, 1):
        cycle = make(transform=PACKED, **SHORT, rule="sgd", theta_init="zero", seed=seed)
        until(cycle, "resu")
        run(cycle, 2)
        ends.append(torch.cat([t.detach().flatten() for t in thetas(cycle.model)]))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("storage", ["resident", "packed", "offload"])
def test_bfloat16_weights(storage: str) -> None:
    torch.manual_seed(0)
    model = fxresu.transform(Net().bfloat16(), sparsity=0.5, compile=False, storage=storage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = CycleConfig(**SHORT, rule="adam")
    cycle = ResuCycle(model, optimizer, config, loss=lambda m, b: m(b[0].bfloat16(), b[1]).float())
    until(cycle, "resu")
    assert all(t.dtype == torch.bfloat16 for t in thetas(model))
    for _ in range(3):
        cycle.step(batch(cycle.global_step))
    for managed in managed_weights(model).values():
        entry = managed.entry
        dense = entry.matrix(entry.dense(managed.parameter))
        assert torch.equal(entry.gather_theta(dense, torch.bfloat16), entry.theta.detach())
    run_on = cycle.total_steps - cycle.global_step
    for _ in range(run_on):
        cycle.step(batch(cycle.global_step))
    assert cycle.finished


def test_beside_a_streamed_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxresu.streamed_moments._SMALL", 64)
    ends = []
    for now in (False, True):
        torch.manual_seed(0)
        model = fxresu.transform(Net(), sparsity=0.5, compile=False, **PACKED)
        optimizer = StreamedAdamW(model.parameters(), lr=0.01, chunk=4096)
        stream_blocks(model, list(model.up), compile=False, optimizer=optimizer)
        cycle = ResuCycle(model, optimizer, CycleConfig(**SHORT, rule="adam", theta_in_backward=now))
        ends.append((run(cycle), model.state_dict()))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(v, ends[1][1][k]) for k, v in ends[0][1].items())


def test_what_theta_takes_is_halved_and_predicted() -> None:
    held = {}
    for dtype in ("fp32", "bf16"):
        cycle = make(transform=PACKED, **{**SHORT, "sparsity_end": 0.5, "theta_dtype": dtype})
        until(cycle, "resu")
        held[dtype] = fxresu.memory_bill(cycle.model)["θ"]
        bill = fxresu.predict_memory(
            Net(), batch(0), phases="resu", compile=False, sparsity=0.5, device="cpu", theta_dtype=dtype, **PACKED
        )
        assert bill["resu"].parts["θ"] == held[dtype]
    assert held["fp32"] == 2 * held["bf16"]


@pytest.mark.parametrize("storage", ["resident", "offload"])
def test_theta_in_float32_weights_own_slots_is_refused(storage: str) -> None:
    model = fxresu.transform(Net(), sparsity=0.5, compile=False, storage=storage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    message = f"theta_dtype='bf16' with storage='{storage}': weights in float32, such as 'up.0.weight'"
    with pytest.raises(ConfigError, match=message):
        ResuCycle(model, optimizer, CycleConfig(sparsity_end=0.5, theta_dtype="bf16"))
    with pytest.raises(ConfigError, match=message):
        fxresu.set_phase(model, "resu", optimizer=optimizer, theta_dtype="bf16")
    assert state_of(model).base == "dense", "nothing has changed"
    with pytest.raises(ConfigError, match="theta_dtype='fp16' is unknown; use one of fp32, bf16"):
        fxresu.set_phase(model, "resu", optimizer=optimizer, theta_dtype="fp16")
    with pytest.raises(ConfigError, match=message):
        fxresu.predict_memory(Net(), batch(0), storage=storage, compile=False, theta_dtype="bf16")


def test_a_checkpoint_older_than_the_option_had_its_default() -> None:
    ends = []
    for dtype in ("fp32", "bf16"):
        cycle = make(transform=PACKED, **{**SHORT, "theta_dtype": dtype})
        state = cycle.state_dict()
        del state["meta"]["config"]["theta_dtype"]
        if dtype == "fp32":
            cycle.load_state_dict(state)
            ends.append(run(cycle, 5))
        else:
            with pytest.raises(fxresu.CheckpointError, match="written with theta_dtype='fp32', this run has 'bf16'"):
                cycle.load_state_dict(state)
    assert ends
