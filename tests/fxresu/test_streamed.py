"""Streamed AdamW on the CPU, whose copies are really put off, against torch's own."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from fxresu_faults import poison
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxresu import ConfigError, PhaseError, StreamedAdamW
from fxresu.errors import CheckpointError
from fxresu.lanes import HostLanes
from fxresu.streamed_moments import StreamedMoments
from fxresu.streamed_state import bytes_per_entry

CHUNK = 4096
SMALL = {"lr": 0.01, "chunk": CHUNK}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _stream_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxresu.streamed_moments._SMALL", 64)


def net(dtype: torch.dtype = torch.float32, layers: int = 4, width: int = 96, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = itertools.chain.from_iterable((nn.Linear(width, width), nn.Tanh()) for _ in range(layers))
    return nn.Sequential(*parts, nn.Linear(width, 3)).to(dtype)


def batches(count: int, model: nn.Module, rows: int = 16) -> list[tuple[Tensor, Tensor]]:
    parameter = next(model.parameters())
    torch.manual_seed(7)
    xs = [torch.randn(rows, parameter.shape[1]) for _ in range(count)]
    return [(x.to(parameter), x[:, :3].sin().to(parameter)) for x in xs]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]).float(), batch[1].float())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list, scheduler=None) -> list[float]:
    losses = []
    for batch in data:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def close(a: nn.Module, b: nn.Module, tolerance: float = 1e-6) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lookahead", [0, 1, 5])
def test_fp32_moments_are_torch_adamw(device: str, lookahead: int) -> None:
    model = net().to(device)
    twin = copy.deepcopy(model)
    groups = [{"params": list(model.parameters())[:3], "weight_decay": 0.3}, {"params": list(model.parameters())[3:]}]
    own = StreamedAdamW(groups, lr=0.01, betas=(0.8, 0.95), moments="fp32", chunk=CHUNK, lookahead=lookahead)
    groups = [{"params": list(twin.parameters())[:3], "weight_decay": 0.3}, {"params": list(twin.parameters())[3:]}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 8) for o in (own, reference)]
    data = batches(8, model)
    assert train(model, own, data, schedules[0]) == pytest.approx(train(twin, reference, data, schedules[1]), rel=1e-5)
    close(model, twin)
    assert own.param_groups[0]["lr"] == reference.param_groups[0]["lr"] == 0
    assert own.statistics()["misses"] == 17  # all parcels of the first step, none later
    assert own.statistics()["stalled"] > 0 or device != "cpu"  # a GPU may have had them in time


def test_maximize() -> None:
    model = net()
    twin = copy.deepcopy(model)
    data = batches(3, model)
    train(model, StreamedAdamW(model.parameters(), moments="fp32", maximize=True, **SMALL), data)
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.01, maximize=True), data)
    close(model, twin)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moments, dtype, tolerance", [
    ("8bit", torch.float32, 0.05), ("bf16", torch.bfloat16, 0.05), ("8bit", torch.bfloat16, 0.05),
    ("factored", torch.bfloat16, 0.1),
])  # fmt: skip
def test_loss_curve_of_low_precision(device: str, moments: str, dtype: torch.dtype, tolerance: float) -> None:
    """Sixty steps, mean loss of the last ten within 5 % (10 %) of AdamW with everything in float32."""
    model, twin = net(dtype, 2, 64).to(device), net(torch.float32, 2, 64).to(device)
    data = batches(60, model, 64)
    losses = train(model, StreamedAdamW(model.parameters(), lr=3e-3, moments=moments, chunk=CHUNK), data)
    wide = [(x.float(), y.float()) for x, y in data]
    wanted = train(twin, torch.optim.AdamW(twin.parameters(), lr=3e-3), wide)
    assert sum(wanted[-10:]) < 0.5 * sum(wanted[:10])
    assert sum(losses[-10:]) == pytest.approx(sum(wanted[-10:]), rel=tolerance)


def test_one_gradient_is_alive_at_a_time() -> None:
    model = net(layers=6)
    optimizer = StreamedAdamW(model.parameters(), **SMALL)
    weights = [p for p in model.parameters() if p.dim() == 2]
    most = []

    def count(_: Tensor) -> None:
        most.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for parameter in model.parameters():
        parameter.register_hook(count)
    train(model, optimizer, batches(2, model))
    assert max(most) <= weights[0].nbytes and all(p.grad is None for p in model.parameters())


def test_device_holds_the_slots_and_no_more() -> None:
    model = net(layers=6, width=128)
    optimizer = StreamedAdamW(model.parameters(), lr=0.01, chunk=CHUNK, lookahead=1)
    train(model, optimizer, batches(2, model))
    stream = optimizer._moments.stream
    assert stream is not None and optimizer.workspace_bytes == stream.device_bytes <= 3 * (2 * CHUNK + 8 * 17 + 1024)
    whole = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    assert whole > 7 * optimizer.workspace_bytes
    assert len(stream._guests) <= 3


def test_moments_that_stay_are_not_streamed() -> None:
    model = net(layers=3)
    twin = copy.deepcopy(model)
    optimizer = StreamedAdamW(model.parameters(), device_bytes=2 * 96 * 96 * 3, **SMALL)
    data = batches(4, model)
    train(model, optimizer, data)
    train(twin, StreamedAdamW(twin.parameters(), **SMALL), data)
    staying = [p for p, s in optimizer.state.items() if not s.pieces and p.dim() == 2 and p.numel() > 999]
    assert 1 <= len(staying) < 4 and same(model, twin)


def test_moments_that_stay_are_spread_over_the_model() -> None:
    """The first one's, and every third of the others': the bus has as much to do in all parts of a backward."""
    weights = [nn.Parameter(torch.empty(300, 300, device="meta")) for _ in range(13)]
    one = weights[0].numel() * bytes_per_entry("8bit")
    moments = StreamedMoments("8bit", None, 2**20, int(5 * one + 1), torch.device("cpu"))
    assert [i for i, w in enumerate(weights) if moments.stays(w, weights)] == [0, 2, 5, 8, 11]
    everything = StreamedMoments("8bit", None, 2**20, int(13 * one + 1), torch.device("cpu"))
    assert all(everything.stays(w, weights) for w in weights)
    little = StreamedMoments("8bit", None, 2**20, int(0.9 * one), torch.device("cpu"))
    assert not any(little.stays(w, weights) for w in weights)


# Order and races


@settings(max_examples=16)
@given(st.integers(0, 4), st.integers(0, 2**16), st.booleans(), st.booleans())
def test_order_of_copies_does_not_matter(lookahead: int, seed: int, jumbled: bool, together: bool) -> None:
    """Copies early or late, parameters in another order every step, one by one or in groups, free slots poisoned: the
    same bits."""
    results = []
    for eager in (None, random.Random(seed)):
        model = net(layers=3)
        optimizer = StreamedAdamW(model.parameters(), lookahead=lookahead, **SMALL)
        optimizer._moments.lanes = HostLanes(lambda eager=eager: 0 if eager is None else eager.randrange(3))
        if together:
            ordered = list(model.parameters())
            optimizer.update_together([ordered[:3], ordered[3:]])
        order = random.Random(1)
        for batch in batches(4, model):
            if jumbled:  # another order than the one that was brought ahead
                with optimizer.accumulate():
                    loss_of(model, batch).backward()
                shuffled = list(model.parameters())
                order.shuffle(shuffled)
                for parameter in shuffled:
                    optimizer._arrived(parameter)
            else:
                loss_of(model, batch).backward()
            optimizer.step()
            if optimizer._moments.stream is not None:
                for slot in optimizer._moments.stream._vacant:
                    poison(optimizer._moments.lanes, slot)
        optimizer.settle()
        moments = [s["exp_avg"] for s in optimizer.state.values()]
        results.append([p.detach().clone() for p in model.parameters()] + moments)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_parameter_without_gradient_is_left_alone() -> None:
    model = net(layers=3)
    optimizer = StreamedAdamW(model.parameters(), **SMALL)
    data = batches(3, model)
    train(model, optimizer, data[:1])
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    train(model, optimizer, data[1:])
    model[0].requires_grad_(True)
    assert torch.equal(before, model[0].weight) and optimizer.state[model[0].weight]["step"] == 1


# Accumulation and clipping


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip, sums, unfinished", [
    ("running", "device", False), ("exact", "device", False), ("running", "host", False), ("running", "host", True),
])  # fmt: skip
def test_accumulation_is_the_mean_also_in_a_short_last_window(
    device: str, clip: str, sums: str, unfinished: bool
) -> None:
    """unfinished: no micro-batch is announced as the last one, so that `step()` has everything to do."""
    model = net().to(device)
    twin = copy.deepcopy(model)
    own = StreamedAdamW(model.parameters(), moments="fp32", clip=clip, max_norm=1e6, sums=sums, **SMALL)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01)
    data = batches(10, model)
    for window in (data[:4], data[4:8], data[8:]):
        for i, batch in enumerate(window):
            if i + 1 < len(window) or unfinished:
                with own.accumulate():
                    (loss_of(model, batch) / len(window)).backward()
                if sums == "host":
                    assert all(p.grad is None for p in model.parameters())
            else:
                (loss_of(model, batch) / len(window)).backward()
            (loss_of(twin, batch) / len(window)).backward()
        for optimizer in (own, reference):
            optimizer.step()
            optimizer.zero_grad()
    close(model, twin)


def test_sums_that_are_given_up_leave_nothing() -> None:
    model = net()
    twin = copy.deepcopy(model)
    own, other = (StreamedAdamW(m.parameters(), sums="host", **SMALL) for m in (model, twin))
    data = batches(3, model)
    with own.accumulate():
        loss_of(model, data[0]).backward()
    with pytest.raises(PhaseError, match="accumulated"), own.measure():
        pass
    own.zero_grad()
    assert train(model, own, data[1:]) == train(twin, other, data[1:]) and same(model, twin)


def clipped(twin: nn.Module, data: list, norms: list[float | None]) -> list[float]:
    """torch's AdamW, each step's gradients scaled as for the norm given; None is their own. Returns the norms."""
    optimizer, found = torch.optim.AdamW(twin.parameters(), lr=0.01), []
    for batch, norm in zip(data, norms, strict=False):
        loss_of(twin, batch).backward()
        own = float(nn.utils.get_total_norm([p.grad for p in twin.parameters()]))
        factor = min(1.0, 0.05 / ((own if norm is None else norm) + 1e-6))
        for parameter in twin.parameters():
            parameter.grad.mul_(factor)
        optimizer.step()
        optimizer.zero_grad()
        found.append(own)
    return found


def test_exact_clipping() -> None:
    model = net()
    twin = copy.deepcopy(model)
    data = batches(5, model)
    optimizer = StreamedAdamW(model.parameters(), moments="fp32", clip="exact", max_norm=0.05, **SMALL)
    train(model, optimizer, data)
    norms = clipped(twin, data, [None] * 5)
    assert min(norms) > 0.05
    close(model, twin, 1e-5)
    assert optimizer.statistics()["gradient_norm"] == pytest.approx(norms[-1], rel=1e-4)


def test_measured_clipping_is_exact_and_keeps_no_gradient() -> None:
    model = net()
    twin = copy.deepcopy(model)
    data = batches(5, model)
    optimizer = StreamedAdamW(model.parameters(), moments="fp32", max_norm=0.05, **SMALL)
    for batch in data:
        with optimizer.measure():
            loss_of(model, batch).backward()
        assert all(p.grad is None for p in model.parameters())
        train(model, optimizer, [batch])
    clipped(twin, data, [None] * 5)
    close(model, twin, 1e-5)


def test_clipping_by_the_norm_as_far_as_it_is_known() -> None:
    """Against torch's AdamW on gradients that are scaled one after another, in the order in which they come."""
    model = net()
    twin = copy.deepcopy(model)
    optimizer = StreamedAdamW(model.parameters(), moments="fp32", max_norm=0.05, **SMALL)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01)
    order: list[Tensor] = []
    for parameter in twin.parameters():
        parameter.register_post_accumulate_grad_hook(order.append)
    before: dict[Tensor, float] = {}
    for number, batch in enumerate(batches(5, model)):
        scaled = [(x * (40.0 if number == 3 else 1.0), y) for x, y in [batch]]
        train(model, optimizer, scaled)
        order.clear()
        loss_of(twin, scaled[0]).backward()
        norms = {p: float(p.grad.norm()) for p in order}
        factors = []
        for count, parameter in enumerate(order, 1):
            known, then = (sum(d[p] ** 2 for p in order[:count]) if d else 0.0 for d in (norms, before))
            missing = sum(before[p] ** 2 for p in order[count:]) if before else 0.0
            norm = (known + (known / then if then else 1.0) * missing) ** 0.5
            factors.append(min(1.0, 0.05 / (norm + 1e-6)))
            parameter.grad.mul_(factors[-1])
        total = sum(n**2 for n in norms.values()) ** 0.5
        assert factors[-1] == pytest.approx(min(1.0, 0.05 / total), rel=1e-3)  # the last one knows all of them
        assert max(factors) < 1.0
        assert optimizer.statistics()["gradient_norm"] == pytest.approx(total, rel=1e-4)
        reference.step()
        reference.zero_grad()
        before = norms
    close(model, twin, 1e-5)


def test_norms_of_other_tensors_are_refused() -> None:
    model = net()
    optimizer = StreamedAdamW(model.parameters(), max_norm=0.05, **SMALL)
    train(model, optimizer, batches(2, model))
    state, before = optimizer.state_dict(), [p.detach().clone() for p in model.parameters()]
    for wrong in ({"skipped": 0}, {**state["param_groups"][0]["streamed"], "norms": torch.ones(2)}):
        groups = [{**state["param_groups"][0], "streamed": wrong}]
        with pytest.raises(CheckpointError, match="no norms of gradients|norms of 2 gradients"):
            optimizer.load_state_dict({**state, "param_groups": groups})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_is_not_finite_is_skipped_tensor_by_tensor_or_with_an_exact_norm_whole() -> None:
    for options, moved in (({}, True), ({"max_norm": 1.0, "clip": "exact"}, False)):
        model = net(layers=2)
        optimizer = StreamedAdamW(model.parameters(), **options, **SMALL)
        before = [p.detach().clone() for p in model.parameters()]
        model[0].weight.register_hook(lambda g: torch.full_like(g, float("nan")))
        train(model, optimizer, batches(1, model))
        changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert not changed[0] and all(c == moved for c in changed[1:])
        assert optimizer.statistics()["skipped"] == (1 if moved else 6)
        assert not optimizer.state[model[0].weight]["exp_avg"].any()


# Weights used more than once


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(96, 96)

    def forward(self, x: Tensor, reentrant: bool | None = None) -> Tensor:
        if reentrant is None:
            return self.inner(torch.tanh(self.inner(x)))
        y = checkpoint(self.inner, x, use_reentrant=reentrant)
        return checkpoint(self.inner, torch.tanh(y), use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [None, False])
def test_a_weight_that_is_used_twice_is_updated_once_by_the_sum(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    model = Shared()
    twin = copy.deepcopy(model)
    own = StreamedAdamW(model.parameters(), moments="fp32", **SMALL)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for _ in range(3):
        x = torch.randn(8, 96, requires_grad=True)
        for module, optimizer in ((model, own), (twin, reference)):
            module(x, reentrant).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    close(model, twin)


def test_a_second_gradient_in_a_step_is_refused() -> None:
    torch.manual_seed(0)
    model = Shared()
    optimizer = StreamedAdamW(model.parameters(), **SMALL)
    with pytest.raises(PhaseError, match="second gradient.*use_reentrant=False"):
        model(torch.randn(8, 96, requires_grad=True), True).sum().backward()
    plain = net(layers=1)
    optimizer = StreamedAdamW(plain.parameters(), **SMALL)
    data = batches(2, plain)
    loss_of(plain, data[0]).backward()
    with pytest.raises(PhaseError, match="accumulate"):
        loss_of(plain, data[1]).backward()
    with pytest.raises(CheckpointError, match="step"):
        optimizer.state_dict()


# Checkpoints


@pytest.mark.parametrize("moments", ["8bit", "factored", "bf16", "fp32"])
def test_resume_is_bit_exact(moments: str, tmp_path) -> None:
    def fresh() -> tuple[nn.Module, StreamedAdamW]:
        model = net(torch.bfloat16)
        return model, StreamedAdamW(model.parameters(), moments=moments, max_norm=0.1, seed=3, **SMALL)

    model, optimizer = fresh()
    data = batches(6, model)
    train(model, optimizer, data[:3])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, data[3:])
    other, resumed = fresh()
    saved = torch.load(tmp_path / "state.pt")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, data[3:])
    assert same(model, other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        a, b = optimizer.state_dict()["state"], resumed.state_dict()["state"]
        assert all(torch.equal(torch.as_tensor(a[i][k]), torch.as_tensor(b[i][k])) for i in a for k in a[i])
        assert p.shape == q.shape


def test_state_of_torch_adamw_is_taken_over() -> None:
    model = net()
    twin = copy.deepcopy(model)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01)
    data = batches(6, model)
    train(twin, reference, data[:3])
    model.load_state_dict(twin.state_dict())
    optimizer = StreamedAdamW(model.parameters(), moments="fp32", **SMALL)
    optimizer.load_state_dict(reference.state_dict())
    train(model, optimizer, data[3:])
    train(twin, reference, data[3:])
    close(model, twin)


def test_a_state_of_another_form_is_refused_and_changes_nothing() -> None:
    model = net()
    a = StreamedAdamW(model.parameters(), moments="fp32", **SMALL)
    train(model, a, batches(1, model))
    b = StreamedAdamW(net().parameters(), **SMALL)
    with pytest.raises(CheckpointError, match="moments="):
        b.load_state_dict(a.state_dict())
    with pytest.raises(CheckpointError, match="groups differ"):
        StreamedAdamW([nn.Parameter(torch.zeros(2))], **SMALL).load_state_dict(a.state_dict())
    assert not any(s["step"] for s in b.state.values())


# Refusals


@pytest.mark.parametrize("options, message", [
    ({"moments": "4bit"}, "moments="), ({"clip": "next"}, "clip="), ({"max_norm": 0.0}, "max_norm="),
    ({"sums": "disk"}, "sums="), ({"sums": "host", "clip": "exact"}, "sums='host'"), ({"lookahead": -1}, "lookahead="),
    ({"chunk": 1000}, "chunk="), ({"device_bytes": -1}, "device_bytes="),
    ({"lr": -1.0}, "lr="), ({"betas": (0.9, 1.0)}, "betas="),
])  # fmt: skip
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StreamedAdamW(net().parameters(), **options)


def test_bad_parameters_and_groups_are_named() -> None:
    with pytest.raises(ConfigError, match="float16"):
        StreamedAdamW(net(torch.float16).parameters())
    with pytest.raises(ConfigError, match="strides"):
        StreamedAdamW([nn.Parameter(torch.zeros(4, 3).t())])
    with pytest.raises(ConfigError, match="amsgrad"):
        StreamedAdamW([{"params": net().parameters(), "amsgrad": True}])
    optimizer = StreamedAdamW(net().parameters())
    with pytest.raises(ConfigError, match="one device"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4, device="meta"))]})
    assert len(optimizer.param_groups) == 1
    embedding = nn.Embedding(8, 16, sparse=True)
    optimizer = StreamedAdamW(embedding.parameters())
    with pytest.raises(ConfigError, match="sparse"):
        embedding(torch.tensor([1])).sum().backward()


def test_a_group_that_is_added_later_trains() -> None:
    model = net(layers=2)
    optimizer = StreamedAdamW(model[:4].parameters(), **SMALL)
    optimizer.add_param_group({"params": model[4].parameters(), "lr": 0.1})
    before = model[4].weight.clone()
    train(model, optimizer, batches(2, model))
    assert not torch.equal(before, model[4].weight) and optimizer.state[model[4].weight]["step"] == 2
