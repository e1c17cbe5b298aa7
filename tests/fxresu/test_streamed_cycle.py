"""Streamed AdamW under `ResuCycle`: the phases, masks, accumulation and checkpoints of a transformed model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxresu
from fxresu import ConfigError, CycleConfig, ResuCycle, StreamedAdamW
from fxresu.model_state import managed_weights
from fxresu.optimizer_state import state_tensors
from fxresu.state_forms import coordinates

CONFIG = {"cycles": 2, "train_steps": 3, "stabilize_steps": 3, "resu_steps": 3, "sparsity_end": 0.5,
          "schedule": "constant"}  # fmt: skip


@pytest.fixture(autouse=True)
def _stream_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxresu.streamed_moments._SMALL", 64)


class Net(nn.Module):
    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.head(torch.tanh(self.b(torch.tanh(self.a(x))))).float(), y.float())


def made(dtype: torch.dtype = torch.float32, compile: object = False) -> Net:
    torch.manual_seed(0)
    return fxresu.transform(Net().to(dtype), sparsity=0.5, exclude=["head"], compile=compile)


def data(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(7)
    xs = [torch.randn(8, 96) for _ in range(count)]
    return [(x.to(dtype), x[:, :3].sin().to(dtype)) for x in xs]


def streamed(model: nn.Module, **options) -> StreamedAdamW:
    return StreamedAdamW(model.parameters(), lr=0.01, chunk=4096, **options)


def check_pruned_are_zero(model: nn.Module, optimizer: StreamedAdamW) -> None:
    for managed in managed_weights(model).values():
        pruned = ~managed.entry.mask().view(managed.entry.shape)
        assert not managed.parameter[pruned].any()
        for key, _ in state_tensors(optimizer, managed.parameter):
            with coordinates(optimizer.state[managed.parameter], key) as values:
                assert not values[pruned].any(), key


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
@pytest.mark.parametrize("moments, dtype", [
    ("8bit", torch.bfloat16), ("factored", torch.bfloat16), ("fp32", torch.float32),
])  # fmt: skip
def test_a_whole_run(moments: str, dtype: torch.dtype, compile: object) -> None:
    """Every phase: pruned coordinates stay zero, frozen ones do not move, moments follow the masks."""
    model = made(dtype, compile)
    optimizer = streamed(model, moments=moments)
    cycle = ResuCycle(model, optimizer, CycleConfig(**CONFIG))
    losses, frozen = [], {}
    for batch in data(24, dtype):
        if cycle.phase == "resu" and not frozen:
            frozen = {n: m.parameter.detach().clone() for n, m in managed_weights(model).items()}
        losses.append(float(cycle.step(batch)))
        assert not any(p.grad is not None for p in model.parameters())
        if cycle.phase == "sparse":
            frozen = {}
            check_pruned_are_zero(model, optimizer)
        for name, before in frozen.items():
            managed = managed_weights(model)[name]
            mask = managed.entry.mask().view(managed.entry.shape)
            assert torch.equal(managed.parameter[mask], before[mask])
    assert cycle.finished and losses[-1] < losses[0]
    assert all(s["step"] >= 12 for s in optimizer.state.values())
    assert optimizer.statistics()["misses"] < optimizer.statistics()["fetched"] / 2


def test_float32_moments_follow_torch_adamw_through_the_phases() -> None:
    """With the moments kept over RESU, as streamed ones are, both runs are the same."""
    results = []
    for make in (streamed, lambda m, **_: torch.optim.AdamW(m.parameters(), lr=0.01)):
        model = made()
        optimizer = make(model, moments="fp32")
        cycle = ResuCycle(model, optimizer, CycleConfig(**CONFIG, optimizer_state="keep"))
        losses = [float(cycle.step(batch)) for batch in data(18)]
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_accumulation_of_the_cycle() -> None:
    results = []
    for make in (streamed, lambda m, **_: torch.optim.AdamW(m.parameters(), lr=0.01)):
        model = made()
        cycle = ResuCycle(model, make(model, moments="fp32"), CycleConfig(**CONFIG, accumulation=4))
        for batch in data(16):
            cycle.step(batch)
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop, moments", [(2, "8bit"), (5, "8bit"), (8, "8bit"), (11, "8bit"), (8, "factored")])
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path, stop: int, moments: str) -> None:
    def fresh() -> ResuCycle:
        model = made(torch.bfloat16)
        return ResuCycle(model, streamed(model, max_norm=0.5, moments=moments), CycleConfig(**CONFIG))

    batches = data(18, torch.bfloat16)
    cycle = fresh()
    for batch in batches[:stop]:
        cycle.step(batch)
    cycle.save(tmp_path / "run")
    for batch in batches[stop:]:
        cycle.step(batch)
    other = fresh()
    other.load(tmp_path / "run")
    for batch in batches[stop:]:
        other.step(batch)
    for a, b in zip(cycle.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = (c.optimizer.state_dict()["state"] for c in (cycle, other))
    for a, b in ((ours[i], theirs[i]) for i in ours):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("now", [False, True])
def test_the_rest_trains_on_in_resu(now: bool) -> None:
    """Its gradients are used in the backward; the step is ended all the same, with θ's in either order."""
    ends = []
    for make in (streamed, lambda m, **_: torch.optim.AdamW(m.parameters(), lr=0.01)):
        model = made()
        config = CycleConfig(**CONFIG, optimizer_state="keep", train_rest=True, theta_in_backward=now)
        cycle = ResuCycle(model, make(model, moments="fp32"), config)
        before = None
        for batch in data(18):
            if cycle.stage == "resu" and before is None:
                before = model.head.weight.detach().clone()
            cycle.step(batch)
        assert cycle.finished and not torch.equal(before, model.head.weight)
        ends.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_attach_drives_it_too() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = streamed(model)
    attached = fxresu.attach(model, optimizer, CycleConfig(**CONFIG), transform={"exclude": ["head"], "compile": False})
    for batch in data(20):
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert attached.cycle.finished
    check_pruned_are_zero(model, optimizer)


def test_what_needs_all_gradients_is_refused() -> None:
    model = made()
    with pytest.raises(ConfigError, match="max_norm"):
        ResuCycle(model, streamed(model), CycleConfig(**CONFIG, grad_clip=1.0))
    with pytest.raises(ConfigError, match="bfloat16"):
        ResuCycle(model, streamed(model), CycleConfig(**CONFIG, autocast="fp16", train_rest=True))


def test_a_copied_state_is_taken_over() -> None:
    model = made()
    optimizer = streamed(model)
    for batch in data(3):
        model(*batch).backward()
        optimizer.step()
    managed = next(iter(managed_weights(model).values()))
    before = copy.deepcopy(optimizer.state[managed.parameter])
    assert type(before) is dict
    optimizer.state[managed.parameter] = before
    state = optimizer._state_of(managed.parameter)
    assert state["step"] == 3 and torch.equal(state["exp_avg"], before["exp_avg"])
