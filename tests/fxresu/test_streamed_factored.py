"""`StreamedAdamW(moments="factored")`: by definition, wherever its moments are, and what becomes of its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxresu import StreamedAdamW, streamed_groups
from fxresu.errors import CheckpointError
from fxresu.kernels.adamw_rule import load_moment

OPTIONS = {"lr": 0.01, "betas": (0.8, 0.95), "chunk": 4096}


@pytest.fixture(autouse=True)
def _stream_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxresu.streamed_moments._SMALL", 64)


class Net(nn.Module):
    """A convolution, matrices of several parcels, and vectors that travel as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 32, 5, padding=2)
        self.norm, self.up, self.down = nn.LayerNorm(96), nn.Linear(96, 160), nn.Linear(160, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.view(-1, 3, 32)).reshape(len(x), -1)[:, :96]
        return self.down(torch.tanh(self.up(self.norm(y))))


def made(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Net:
    torch.manual_seed(0)
    return Net().to(device, dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    parameter = next(model.parameters())
    for number in range(first, first + steps):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(32, 96, generator=generator).to(parameter)
        loss = (model(x).float() - x[:, :3].sin().float()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def mean(square: Tensor, dim: int) -> Tensor:
    """Over entries that have a gradient."""
    return square.sum(dim) / (square != 0).sum(dim).clamp(min=1)


def test_a_step_by_definition() -> None:
    """From the second step on m is what its codes say, so that one step at a time is compared."""
    model = made()
    optimizer = StreamedAdamW(model.parameters(), moments="factored", weight_decay=0.1, **OPTIONS)
    rows = {p: torch.zeros(len(p), dtype=torch.float64) for p in model.parameters() if p.dim() > 1}
    columns = {p: torch.zeros(p[0].numel(), dtype=torch.float64) for p in rows}
    whole: dict[nn.Parameter, Tensor] = {}
    for step in range(1, 4):
        before, firsts = {}, {}
        for p in rows:
            state = optimizer.state.get(p)
            before[p] = p.detach().double()
            m = torch.zeros(p.numel()) if state is None else load_moment(state["exp_avg"], state["exp_avg_scale"], "m")
            firsts[p] = m.double().view(p.shape)
        gradients = {}
        for p in rows:
            p.register_hook(lambda g, p=p, found=gradients: found.__setitem__(p, g.double()))
        train(model, optimizer, 1, step)
        optimizer.settle()
        for p, g in gradients.items():
            square = g.view(len(p), -1).square()
            rows[p] = 0.95 * rows[p] + 0.05 * mean(square, 1)
            columns[p] = 0.95 * columns[p] + 0.05 * mean(square, 0)
            whole[p] = 0.95 * whole.get(p, 0.0) + 0.05 * mean(square.view(1, -1), 1)
            v = (rows[p][:, None] * columns[p] / whole[p]).view(p.shape)
            m = 0.8 * firsts[p] + 0.2 * g
            change = 0.01 / (1 - 0.8**step) * m / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
            torch.testing.assert_close(p.detach().double(), before[p] * (1 - 0.001) - change, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq_row"].double(), rows[p], rtol=1e-5, atol=0)
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq_col"].double(), columns[p], rtol=1e-5, atol=0)


def test_forms_of_a_state() -> None:
    model = made()
    optimizer = StreamedAdamW(model.parameters(), moments="factored", **OPTIONS)
    train(model, optimizer, 1)
    factored = {"step", "exp_avg", "exp_avg_scale", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq_mean"}
    assert set(optimizer.state[model.up.weight]) == set(optimizer.state[model.conv.weight]) == factored
    assert optimizer.state[model.conv.weight]["exp_avg_sq_col"].shape == (15,)
    plain = {"step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"}
    assert set(optimizer.state[model.norm.weight]) == plain
    big = optimizer.state[model.up.weight]
    travels = sum(t.nbytes for piece in big.pieces for t in piece.parcel.host)
    assert len(big.pieces) == 4 and travels == 160 * 96 + 4 * 60


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}, {"max_norm": 0.1, "clip": "exact"}, {"maximize": True}])
def test_moments_that_travel_are_those_that_stay(device: str, dtype: torch.dtype, options: dict) -> None:
    nets = [made(dtype, device) for _ in range(3)]
    rooms = (0, 1000, 2**30)
    optimizers = [
        StreamedAdamW(n.parameters(), moments="factored", device_bytes=r, **options, **OPTIONS)
        for n, r in zip(nets, rooms, strict=True)
    ]
    losses = [train(n, o, 6) for n, o in zip(nets, optimizers, strict=True)]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=0 if device == "cpu" else 1e-2)
    assert device != "cpu" or same(nets[0], nets[1]) and same(nets[0], nets[2])
    travelling = [sum(bool(s.pieces) for s in o.state.values()) for o in optimizers]
    assert travelling[0] > travelling[1] > travelling[2] == 0


@pytest.mark.parametrize("chunk", [4096, 2**20])
def test_a_group_of_mixed_forms_is_one_at_a_time(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    true = streamed_groups.factored_moments_
    monkeypatch.setattr(
        streamed_groups, "factored_moments_", lambda updates, *more: calls.append(len(updates)) or true(updates, *more)
    )
    model, twin = made(torch.bfloat16), made(torch.bfloat16)
    together, alone = (StreamedAdamW(m.parameters(), lr=0.01, moments="factored", chunk=chunk) for m in (model, twin))
    together.update_together([list(model.parameters())])
    assert train(model, together, 5) == train(twin, alone, 5) and same(model, twin)
    assert calls == [3] * 5 + [1] * 15  # all matrices of the group at once
    if chunk > 4096:
        parcels = {id(p.parcel) for s in together.state.values() for p in s.pieces}
        assert len(parcels) == 1 and any(len(s.pieces) and not s.factors for s in together.state.values())


def test_state_goes_from_groups_to_single_tensors_and_back(tmp_path) -> None:
    model, twin = made(torch.bfloat16), made(torch.bfloat16)
    together, alone = (
        StreamedAdamW(m.parameters(), moments="factored", seed=3, max_norm=0.1, clip="exact", **OPTIONS)
        for m in (model, twin)
    )
    together.update_together([list(model.parameters())])
    train(model, together, 3)
    torch.save(together.state_dict(), tmp_path / "state.pt")
    twin.load_state_dict(model.state_dict())
    alone.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert train(model, together, 3, 3) == train(twin, alone, 3, 3) and same(model, twin)


def test_training_is_as_with_a_whole_second_moment() -> None:
    ends = []
    for moments in ("8bit", "factored"):
        model = made(torch.bfloat16)
        losses = train(model, StreamedAdamW(model.parameters(), lr=3e-3, moments=moments, chunk=4096), 80)
        ends.append(sum(losses[-10:]) / sum(losses[:3]))
    assert ends[1] < 1.2 * ends[0] < 2


def test_a_gradient_that_is_not_finite_leaves_everything_of_its_weight() -> None:
    model = made()
    optimizer = StreamedAdamW(model.parameters(), moments="factored", **OPTIONS)
    train(model, optimizer, 2)
    optimizer.settle()
    weight = model.up.weight
    before = {k: torch.as_tensor(v).clone() for k, v in optimizer.state[weight].items() if k != "step"}
    kept, other = weight.detach().clone(), model.down.weight.detach().clone()
    handle = weight.register_hook(lambda g: torch.full_like(g, float("inf")))
    train(model, optimizer, 1)
    handle.remove()
    optimizer.settle()
    assert torch.equal(weight, kept) and not torch.equal(model.down.weight, other)
    assert all(torch.equal(optimizer.state[weight][k], v) for k, v in before.items())
    assert int(optimizer.skipped) == 1


def test_the_second_moment_by_coordinate() -> None:
    model = made()
    optimizer = StreamedAdamW(model.parameters(), moments="factored", **OPTIONS)
    train(model, optimizer, 2)
    state = optimizer.state[model.conv.weight]
    row, col, every = (t.clone() for t in state.factors)
    with state.coordinates("exp_avg_sq") as values:
        assert values.shape == model.conv.weight.shape
        torch.testing.assert_close(values.view(32, 15), torch.outer(row, col) / every)
    for before, after in zip((row, col, every), state.factors, strict=True):
        torch.testing.assert_close(after, before)
    with state.coordinates("exp_avg_sq") as values:
        values.zero_()
    assert not any(t.any() for t in state.factors)
    train(model, optimizer, 1)


def test_other_states_are_taken_over_or_refused() -> None:
    model = made()
    optimizer = StreamedAdamW(model.parameters(), moments="factored", **OPTIONS)
    train(model, optimizer, 2)
    weight = model.up.weight
    copied = copy.deepcopy(optimizer.state[weight])
    optimizer.state[weight] = copied
    state = optimizer._state_of(weight)
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(state[k])) for k, v in copied.items())

    v = torch.rand_like(weight)
    optimizer.state[weight] = {"step": torch.tensor(4.0), "exp_avg": v.sqrt(), "exp_avg_sq": v}
    state = optimizer._state_of(weight)
    assert state["step"] == 4
    torch.testing.assert_close(state["exp_avg_sq_row"], v.mean(1))
    torch.testing.assert_close(state["exp_avg_sq_col"], v.mean(0))
    torch.testing.assert_close(state["exp_avg_sq_mean"], v.mean().view(1))

    for moments, other in (("8bit", "factored"), ("factored", "8bit"), ("fp32", "factored")):
        a, b = (StreamedAdamW(made().parameters(), moments=m, **OPTIONS) for m in (moments, other))
        for group, twin in zip(a.param_groups[0]["params"], model.parameters(), strict=True):
            group.grad = torch.ones_like(twin)
        a.step()
        with pytest.raises(CheckpointError, match="moments="):
            b.load_state_dict(a.state_dict())


def test_no_kernel_for_a_model_without_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_groups, "factored_moments_", lambda *_: pytest.fail("nothing to factor"))
    vector = nn.Parameter(torch.randn(5000))
    twin = nn.Parameter(vector.detach().clone())
    for parameter, moments in ((vector, "factored"), (twin, "8bit")):
        optimizer = StreamedAdamW([parameter, nn.Parameter(torch.zeros(0, 4))], moments=moments, **OPTIONS)
        for _ in range(2):
            parameter.square().sum().backward()
            optimizer.step()
    assert torch.equal(vector, twin)
