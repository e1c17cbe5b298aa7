"""Blocks that are updated as a whole: the same numbers as one tensor at a time, with fewer parcels and launches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxresu import StreamedAdamW, stream_blocks, streamed
from fxresu.errors import CheckpointError, ConfigError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Block(nn.Module):
    """Large and small tensors; one that gets no gradient where `skip` is set."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.extra = nn.Parameter(torch.randn(width, width) / width)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(self.norm(x)).relu())
        return x + y if self.skip else x + y + x @ self.extra


def made(device: str = "cpu", width: int = 96) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(4))).to(device)
    return model, [torch.randn(8, width, device=device) for _ in range(5)]


def train(model: nn.Module, optimizer: StreamedAdamW, data: list[Tensor]) -> list[float]:
    losses = []
    for x in data:
        if optimizer.max_norm is not None:  # an estimate knows more of the norm when a whole block has come
            with optimizer.measure():
                model(x).square().mean().backward()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def groups_of(model: nn.Sequential) -> list[list[Tensor]]:
    return [list(block.parameters()) for block in model]


@pytest.fixture(autouse=True)
def small_tensors_travel(monkeypatch) -> None:
    monkeypatch.setattr("fxresu.streamed_moments._SMALL", 200)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moments", ["8bit", "factored", "bf16", "fp32"])
@pytest.mark.parametrize("options", [
    {"chunk": 4096}, {"chunk": 2**20}, {"chunk": 32768, "lookahead": 0}, {"chunk": 32768, "lookahead": 6},
    {"chunk": 2**20, "max_norm": 0.1}, {"chunk": 32768, "device_bytes": 30_000},
])  # fmt: skip
def test_a_block_at_a_time_is_a_tensor_at_a_time(device: str, moments: str, options: dict) -> None:
    model, data = made(device)
    twin = copy.deepcopy(model)
    together, alone = (StreamedAdamW(m.parameters(), lr=0.01, moments=moments, **options) for m in (model, twin))
    together.update_together(groups_of(model))
    losses = train(model, together, data), train(twin, alone, data)
    assert losses[0] == pytest.approx(losses[1], rel=0 if device == "cpu" else 1e-3)
    if device == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    counts = together.statistics()["fetched"], alone.statistics()["fetched"]
    assert counts[0] < counts[1] or options["chunk"] == 4096
    assert together.statistics()["gradient_norm"] == pytest.approx(alone.statistics()["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("chunk", [4096, 8192, 2**20])
def test_the_moments_of_a_whole_block_are_here_when_its_gradients_come(chunk: int) -> None:
    model, data = made()
    optimizer = StreamedAdamW(model.parameters(), chunk=chunk)
    optimizer.update_together(groups_of(model))
    train(model, optimizer, data[:1])
    stream = optimizer._ready_stream()
    parcels = {id(piece.parcel) for p in model[0].parameters() for piece in optimizer.state[p].pieces}
    assert len(stream._slots) == max(len(parcels), 2) + 2
    before = stream.misses
    train(model, optimizer, data[1:3])
    assert stream.misses == before
    with pytest.raises(ConfigError, match="lookahead='all'"):
        StreamedAdamW(model.parameters(), lookahead="all")


def test_one_launch_updates_what_is_on_the_device(monkeypatch) -> None:
    model, data = made()
    optimizer = StreamedAdamW(model.parameters(), device_bytes=10**9)
    optimizer.update_together(groups_of(model))
    calls = []
    true = streamed.adamw_steps_
    monkeypatch.setattr(
        streamed, "adamw_steps_", lambda updates, scale: calls.append(len(updates)) or true(updates, scale)
    )
    train(model, optimizer, data[:2])
    assert calls == [7] * 8


def test_vectors_beside_factored_moments_wait_for_the_last_block(monkeypatch) -> None:
    """They would take a launch of their own in every block."""
    model, data = made()
    model[1].norm.requires_grad_(False)
    optimizer = StreamedAdamW(model.parameters(), moments="factored", chunk=32768)
    optimizer.update_together(groups_of(model))
    together = []
    true = StreamedAdamW._update_many
    monkeypatch.setattr(
        StreamedAdamW, "_update_many", lambda self, some: together.append([p.dim() for p in some]) or true(self, some)
    )
    train(model, optimizer, data[:2])
    assert together == ([[2, 2, 2]] * 4 + [[1] * 14]) * 2
    model(data[2]).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    hook = model[0].norm.weight.register_hook(lambda grad: pytest.fail("stop"))  # the last vector: the others wait
    with pytest.raises(pytest.fail.Exception):
        model(data[3]).square().mean().backward()
    hook.remove()
    with pytest.raises(CheckpointError, match="not complete"):
        optimizer.state_dict()
    optimizer.zero_grad()
    assert not optimizer._waiting and all(p.grad is None for p in model.parameters())
    optimizer.step()
    train(model, optimizer, data[4:])


def test_groups_that_never_complete_are_updated_all_the_same() -> None:
    model, data = made()
    model[1].skip = model[3].skip = True
    model[2].up.weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    together, alone = (StreamedAdamW(m.parameters(), lr=0.01, chunk=32768) for m in (model, twin))
    together.update_together(groups_of(model))
    assert train(model, together, data[:3]) == train(twin, alone, data[:3])
    for block in (model[1], twin[1]):
        block.skip = False
    model[3].requires_grad_(False), twin[3].requires_grad_(False)
    assert train(model, together, data[3:]) == train(twin, alone, data[3:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_accumulation_and_given_up_gradients() -> None:
    model, data = made()
    model[0].skip = True  # its group stays incomplete until the step
    twin = copy.deepcopy(model)
    together, alone = (StreamedAdamW(m.parameters(), lr=0.01, chunk=32768) for m in (model, twin))
    together.update_together(groups_of(model))
    for net, optimizer in ((model, together), (twin, alone)):
        with optimizer.accumulate():
            net(data[0]).square().mean().backward()
        net(data[1]).square().mean().backward()
        optimizer.step()
        net(data[2]).square().mean().backward()
    with pytest.raises(CheckpointError, match="not complete"):
        together.state_dict()
    together.zero_grad()
    assert not together._waiting and all(p.grad is None for p in model.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(list(model[1:].parameters()), list(twin[1:].parameters()), strict=True)
    )


def test_state_goes_from_groups_to_single_tensors_and_back(tmp_path) -> None:
    model, data = made()
    twin = copy.deepcopy(model)
    together, alone = (StreamedAdamW(m.parameters(), lr=0.01, chunk=32768, seed=3) for m in (model, twin))
    together.update_together(groups_of(model))
    train(model, together, data[:2])
    torch.save(together.state_dict(), tmp_path / "state.pt")
    twin.load_state_dict(model.state_dict())
    alone.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert train(model, together, data[2:4]) == train(twin, alone, data[2:4])
    fresh = StreamedAdamW(model.parameters(), lr=0.01, chunk=32768, seed=3)
    fresh.update_together(groups_of(model))
    fresh.load_state_dict(alone.state_dict())
    together.update_together([])
    assert train(model, fresh, data[4:]) == train(twin, alone, data[4:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_groups_that_come_or_go_after_states_or_slots_were_made() -> None:
    """Parcels that were made for other groups fit, and slots that were made without groups get no parcels of them."""
    twin, data = made(width=20)
    alone = StreamedAdamW(twin.parameters(), lr=0.01)
    train(twin, alone, data[:1])
    model = made(width=20)[0]
    model.load_state_dict(twin.state_dict())
    fresh = StreamedAdamW(model.parameters(), lr=0.01)
    fresh.update_together(groups_of(model))
    fresh.load_state_dict(alone.state_dict())  # states in groups, and no slots yet
    fresh.update_together([])
    assert train(model, fresh, data[1:3]) == train(twin, alone, data[1:3])

    late, twin = made(width=20)[0], made(width=20)[0]
    other = StreamedAdamW(twin.parameters(), lr=0.01)
    optimizer = StreamedAdamW(late.parameters(), lr=0.01)
    for net in (late, twin):
        net[:3].requires_grad_(False)
    assert train(late, optimizer, data[:1]) == train(twin, other, data[:1])  # slots for single tensors
    for net in (late, twin):
        net.requires_grad_(True)
    optimizer.update_together(groups_of(late))
    assert train(late, optimizer, data[1:]) == train(twin, other, data[1:])


def test_compiled_blocks_are_groups_and_eager_ones_are_not() -> None:
    for compile, grouped in ((False, False), ({"backend": "aot_eager"}, True)):
        model, data = made()
        optimizer = StreamedAdamW(model.parameters(), lr=0.01)
        blocks = stream_blocks(model, list(model), optimizer=optimizer, compile=compile, weights=3)
        assert bool(optimizer._moments.groups) == grouped
        train(model, optimizer, data[:2])
        blocks.remove()
        assert not optimizer._moments.groups
        train(model, optimizer, data[2:3])
