"""Packed storage with inputs as candidates, against resident storage, and what it keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from fxresu_testing import EAGER
from torch import Tensor, nn

import fxresu
from fxresu import CycleConfig, ResuCycle
from fxresu.kernels.quantized import quantized_bytes
from fxresu.ledger import memory_bill
from fxresu.model_state import managed_weights, state_of
from fxresu.phases import set_phase
from fxresu.runner import runner_of

ALPHA = 0.4


def net(dtype: torch.dtype = torch.float32, conv1d: bool = False) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear
    if conv1d:
        kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
        linear = lambda k, rows: kind(rows, k)  # noqa: E731
    # A short block of columns, whole blocks, and a weight whose panel is all of it.
    return nn.Sequential(linear(200, 160), nn.ReLU(), linear(160, 60), nn.ReLU(), linear(60, 3)).to(dtype)


def transformed(storage: str, dtype: torch.dtype = torch.float32, conv1d: bool = False, **options) -> nn.Module:
    options = {"compile": False, "candidates": ALPHA} | options
    return fxresu.transform(net(dtype, conv1d), storage=storage, **options)


def cycle_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options) -> ResuCycle:
    record = state_of(model)
    config = CycleConfig(
        cycles=3, train_steps=2, stabilize_steps=1, resu_steps=3, candidates=ALPHA, sparsity_end=0.5,
        schedule="constant", granularity=record.granularity, **options,
    )  # fmt: skip
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    return ResuCycle(model, optimizer, config, loss=lambda m, b: (m(b[0]) - b[1]).float().square().mean())


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 200, generator=generator).to(dtype), torch.randn(16, 3, generator=generator).to(dtype)


def effective(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.entry.dense(m.parameter).clone() for n, m in managed_weights(model).items()}


@pytest.mark.parametrize("rule", ["selective", "adam"])
@pytest.mark.parametrize(("dtype", "conv1d"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_three_cycles_are_those_of_resident_storage(
    rule: str, dtype: torch.dtype, conv1d: bool, granularity: str
) -> None:
    """Masks, θ, its moments and the candidates of every phase, bit for bit."""
    cycles = [
        cycle_of(transformed(s, dtype, conv1d, granularity=granularity), rule=rule) for s in ("resident", "packed")
    ]
    chosen = []
    for step in range(18):
        first, second = (c.step(batch(step, dtype)) for c in cycles)
        assert torch.equal(first, second), step
        weights = [managed_weights(c.model) for c in cycles]
        assert all(torch.equal(a, b) for a, b in zip(*(effective(c.model).values() for c in cycles)))
        for one, other in zip(*(w.values() for w in weights)):
            if one.entry.bits is None:
                continue
            assert torch.equal(one.entry.bits, other.entry.bits)
            if one.entry.anchor is None:
                continue
            assert one.entry.columns is not None and torch.equal(one.entry.covered(), other.entry.covered())
            ones = torch.ones(one.entry.rows, one.entry.k)
            covered = one.entry.gather_theta(ones, torch.float32) > 0  # of the panel
            flat = other.entry.gather_theta(ones, torch.float32) > 0
            for name in ("m", "v"):
                got, wanted = getattr(other.entry, name), getattr(one.entry, name)
                assert torch.equal(got[flat], wanted[covered]), name
        columns = managed_weights(cycles[1].model)["0.weight"].entry.columns
        if columns is not None and (not chosen or not torch.equal(chosen[-1], columns)):
            chosen.append(columns.clone())
    assert len(chosen) > 1, "the candidates rotate"
    optimizers = (c.optimizer.state_dict()["state"] for c in cycles)
    for one, other in zip(*(s.values() for s in optimizers)):
        assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(("values", "close"), [("bf16", 0.01), ("int8", 0.02), ("int4", 0.3)])
def test_rounded_values_stay_near_resident_storage(values: str, close: float) -> None:
    models = [transformed("resident"), transformed("packed", packed_values=values)]
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        set_phase(model, "resu", optimizer=optimizer, seed=3, rule="sgd")
        theta = fxresu.ThetaOptimizer(model, CycleConfig(rule="sgd", theta_lr=0.1))
        for step in range(4):
            x, y = batch(step)
            (model(x) - y).square().mean().backward()
            theta.step()
    for (name, one), other in zip(effective(models[0]).items(), effective(models[1]).values()):
        entry = managed_weights(models[1])[name].entry
        assert torch.equal(managed_weights(models[0])[name].entry.bits, entry.bits)
        dead = ~entry.mask() & ~entry.covered()
        assert not other[dead].any()
        assert (one - other).norm() <= close * one.norm()


@pytest.mark.parametrize("values", ["native", "int8", "int4"])
def test_what_is_kept_is_what_was_computed(values: str) -> None:
    model = transformed("packed", packed_values=values)
    set_phase(model, "resu")
    bill = memory_bill(model)
    taken = theta = masks = 0
    for managed in managed_weights(model).values():
        entry = managed.entry
        mask, covered = entry.mask(), entry.covered()
        pruned = int((~mask & covered).sum())
        assert entry.theta_shape == (1, pruned) and entry.theta.numel() == pruned
        theta += 4 * pruned
        kept = int(mask[0].sum())
        kept += kept % 2 if values == "int4" else 0
        taken += 4 * entry.rows * kept if values == "native" else quantized_bytes(values, (entry.rows, kept))
        whole = entry.columns is None
        n = 0 if whole else entry.columns.numel()
        words = -(-entry.k // 32)
        masks += 4 * entry.rows * words + 3 * 8 * entry.rows
        masks += 0 if whole else 4 * n + 4 * words + 4 * entry.rows * -(-n // 32)
    stand_ins = 4 * len(managed_weights(model))
    assert bill["managed weights"] == taken + stand_ins and bill["θ"] == theta and bill["masks"] == masks


def test_compiled_it_is_one_operation_and_compiles_once_a_phase() -> None:
    model = transformed("packed", compile=EAGER)
    reference = transformed("resident", compile=EAGER)
    cycles = [cycle_of(m) for m in (model, reference)]
    for step in range(18):
        first, second = (c.step(batch(step)) for c in cycles)
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    entries = {tag: e for tag, e in runner_of(model).entries.items() if "resu" in tag}
    assert len(entries) == 1 and all(e.recompiles == 0 for e in runner_of(model).entries.values())
    (entry,) = entries.values()
    after = {r.weight: r.after for g in entry.graphs for r in g.rewrites}
    assert after == {
        "0.weight": "fxresu.linear_packed_columns",
        "2.weight": "fxresu.linear_packed_columns",
        "4.weight": "fxresu.linear_packed",
    }


def test_the_backward_of_a_compiled_step_saves_the_columns() -> None:
    model = transformed("packed", compile=EAGER)
    set_phase(model, "resu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(batch(0)[0]).sum()
    shapes = {tuple(t.shape) for t in saved if t.dtype == torch.float32}
    assert (16, 128) in shapes and (16, 200) not in shapes, "128 of 200 inputs"
    assert not {(160, 200), (60, 160)} & shapes


@pytest.mark.parametrize("values", ["native", "int4"])
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_run_goes_on_from_a_checkpoint(values: str, moments: str, tmp_path) -> None:
    def fresh() -> ResuCycle:
        return cycle_of(transformed("packed", packed_values=values), theta_moments=moments)

    cycle = fresh()
    for step in range(11):  # in the second RESU phase
        cycle.step(batch(step))
    assert cycle.stage == "resu"
    cycle.save(tmp_path / "run")
    other = fresh()
    other.load(tmp_path / "run")
    for step in range(11, 18):
        assert torch.equal(cycle.step(batch(step)), other.step(batch(step)))
    for a, b in zip(cycle.model.parameters(), other.model.parameters()):
        assert torch.equal(a, b)


def test_copies_state_dicts_and_untransform() -> None:
    model = transformed("packed")
    set_phase(model, "resu", seed=1)
    want = effective(model)
    copied = copy.deepcopy(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert all(torch.equal(state[n], w) for n, w in want.items())
    other = transformed("packed")
    set_phase(other, "resu", seed=1)
    other.load_state_dict(state)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(batch(0, torch.bfloat16)[0]).dtype == torch.bfloat16
    for same in (copied, other):
        torch.testing.assert_close(same(batch(0)[0]), model(batch(0)[0]), rtol=0, atol=0)
    fxresu.untransform(copied)
    assert all(torch.equal(copied.get_parameter(n), w) for n, w in want.items())
    assert type(copied[0]) is nn.Linear


def test_discarding_theta_and_coming_again() -> None:
    model = transformed("packed")
    optimizer = torch.optim.AdamW(model.parameters())
    set_phase(model, "sparse", optimizer=optimizer)
    before = {n: m.parameter.detach().clone() for n, m in managed_weights(model).items()}
    seen = []
    for _ in range(3):
        set_phase(model, "resu", optimizer=optimizer)
        seen.append(managed_weights(model)["0.weight"].entry.columns.tolist())
        set_phase(model, "sparse", optimizer=optimizer, leave="discard")
        for name, managed in managed_weights(model).items():
            assert torch.equal(managed.parameter, before[name])
            assert managed.entry.panel is managed.entry.panel_bits is managed.entry.panel_start is None
    assert seen[0] != seen[1]


def test_an_error_on_the_way_leaves_the_sparse_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformed("packed", packed_values="int4")
    optimizer = torch.optim.AdamW(model.parameters())
    set_phase(model, "sparse", optimizer=optimizer)
    before = effective(model)
    monkeypatch.setattr("fxresu.resurrection.allocate_moments", _fails)
    with pytest.raises(torch.OutOfMemoryError):
        set_phase(model, "resu", optimizer=optimizer)
    for name, managed in managed_weights(model).items():
        assert torch.equal(managed.parameter, before[name]) and managed.entry.panel_start is None
    monkeypatch.undo()
    set_phase(model, "resu", optimizer=optimizer)


def _fails(*args: object) -> None:
    raise torch.OutOfMemoryError("no more")


def test_predict_composes_too_and_statistics_see_the_inputs() -> None:
    model = transformed("packed", packed_values="int8", compile=EAGER)
    set_phase(model, "resu")
    x = batch(0)[0]
    want = model(x).detach()
    set_phase(model, "predict")
    torch.testing.assert_close(model(x), want, rtol=0, atol=0.01)  # in bfloat16
    set_phase(model, "resu")
    found = fxresu.calibrate(model, [x], score="wanda", loss=lambda m, b: m(b).sum())
    squares = found.weights["0.weight"].input_squares
    torch.testing.assert_close(squares.float(), x.square().sum(0)[None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("candidates", [ALPHA, 1.0])
@pytest.mark.parametrize("values", ["native", "int4"])
def test_eager_linears_keep_no_dense_weight_for_the_backward(values: str, candidates: float, autocast: bool) -> None:
    """And give what composing the weight for `F.linear` gives, which autograd keeps; of candidates only inputs."""
    model = transformed("packed", candidates=candidates, packed_values=values)
    set_phase(model, "resu", optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    sizes = {m.entry.numel for m in managed_weights(model).values()}
    found = []
    for plain in (False, True):
        kept: list[Tensor] = []

        def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        x = batch(3)[0].requires_grad_()
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            y = x
            for layer in model:
                use = plain and isinstance(layer, nn.Linear)
                y = nn.functional.linear(y, layer.weight, layer.bias) if use else layer(y)
        y.float().square().mean().backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        found[-1] += [m.entry.anchor.grad for m in managed_weights(model).values()]
        assert any(t.numel() in sizes and t.is_floating_point() and t.numel() > 9000 for t in kept) == plain
        if not plain and candidates < 1:
            assert not any(t.shape == (16, 200) for t in kept)
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-6)


def test_second_gradients_of_packed_linears() -> None:
    """A penalty on the gradient of the inputs reaches θ."""
    found = []
    for plain in (False, True):
        model = transformed("packed")
        set_phase(model, "resu", optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        x = batch(3)[0].requires_grad_()
        layer = model[0]
        y = nn.functional.linear(x, layer.weight, layer.bias) if plain else layer(x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([x.grad, next(iter(managed_weights(model).values())).entry.anchor.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
