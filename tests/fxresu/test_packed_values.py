"""Frozen values of packed storage in bfloat16, 8 and 4 bits: what is rounded, what it takes, and what comes back."""

import copy

import pytest
import torch
from fxresu_testing import EAGER

import fxresu
from fxresu.errors import ConfigError
from fxresu.kernels.quantized import BLOCK, LARGEST, quantized_bytes
from fxresu.model_state import managed_weights
from fxresu.phases import set_phase
from fxresu.runner import runner_of

KINDS = ["bf16", "int8", "int4"]


def _model(values: str, granularity: str = "row", **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(150, 24), torch.nn.ReLU(), torch.nn.Linear(24, 9))
    options = {"compile": EAGER} | options
    return fxresu.transform(model, granularity=granularity, storage="packed", packed_values=values, **options)


def _bound(values: str, weight: torch.Tensor) -> float:
    if values == "bf16":
        return float(weight.abs().max()) * 2**-8
    return float(weight.abs().max()) / (2 * LARGEST[values]) * 1.001


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_resu_computes_with_rounded_values_within_the_bound(values: str, granularity: str) -> None:
    model = _model(values, granularity)
    set_phase(model, "sparse")
    before = {n: m.parameter.detach().clone() for n, m in managed_weights(model).items()}
    set_phase(model, "resu", theta_init="zero")
    for name, managed in managed_weights(model).items():
        entry = managed.entry
        rounded = entry.dense(managed.parameter)
        error = (rounded - before[name]).abs()
        assert 0 < float(error.max()) <= _bound(values, before[name])
        assert not rounded[before[name] == 0].any()
    x = torch.randn(7, 150)
    dense = [m.entry.dense(m.parameter) for m in managed_weights(model).values()]
    wanted = torch.nn.functional.linear(x, dense[0], model[0].bias).relu() @ dense[1].t() + model[2].bias
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert {r.after for e in runner_of(model).entries.values() for g in e.graphs for r in g.rewrites} == {
        "fxresu.linear_packed"
    }


@pytest.mark.parametrize("values", KINDS)
def test_theta_gets_the_gradient_of_the_rounded_weight(values: str) -> None:
    model = _model(values)
    set_phase(model, "resu")
    x = torch.randn(7, 150)
    model(x).square().sum().backward()
    eager = copy.deepcopy(model)
    first = next(iter(managed_weights(model).values())).entry
    dense = [m.entry.dense(m.parameter).requires_grad_() for m in managed_weights(eager).values()]
    hidden = torch.nn.functional.linear(x, dense[0], model[0].bias).relu()
    (hidden @ dense[1].t() + model[2].bias).square().sum().backward()
    from fxresu.kernels import gather

    wanted = gather(dense[0].grad, first.bits, first.row_start, None, first.theta_shape)
    torch.testing.assert_close(first.grad_of_theta(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("values", ["native", *KINDS])
def test_bytes_are_as_computed(values: str) -> None:
    model = _model(values)
    set_phase(model, "resu")
    for managed in managed_weights(model).values():
        entry = managed.entry
        kept = entry.k - int(0.5 * entry.k)
        tensors = [t for t in (entry.active, entry.active_scale) if t is not None]
        taken = sum(t.numel() * t.element_size() for t in tensors)
        if values in LARGEST:
            kept += kept % 2 if values == "int4" else 0
            bits = 8 if values == "int8" else 4
            assert taken == entry.rows * (kept * bits // 8 + 4 * -(-kept // BLOCK))
            assert taken == quantized_bytes(values, (entry.rows, kept))
        else:
            assert taken == entry.rows * kept * (4 if values == "native" else 2)


@pytest.mark.parametrize("values", KINDS)
def test_a_commit_and_a_state_dict_give_the_rounded_values(values: str) -> None:
    model = _model(values, compile=False)
    optimizer = torch.optim.AdamW(model.parameters())
    set_phase(model, "sparse", optimizer=optimizer)
    set_phase(model, "resu", optimizer=optimizer, theta_init="zero")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    set_phase(model, "sparse", optimizer=optimizer, leave="discard")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    plain = torch.nn.Sequential(torch.nn.Linear(150, 24), torch.nn.ReLU(), torch.nn.Linear(24, 9))
    plain.load_state_dict(state)


@pytest.mark.parametrize("values", KINDS)
def test_a_transition_that_fails_leaves_the_exact_values(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(values, compile=False)
    optimizer = torch.optim.AdamW(model.parameters())
    set_phase(model, "sparse", optimizer=optimizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []

    def failing(optimizer, managed):
        calls.append(managed)
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("fxresu.resurrection.drop_state", failing)
    model(torch.randn(3, 150)).sum().backward()
    optimizer.step()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError):
        set_phase(model, "resu", optimizer=optimizer)
    assert calls
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_commit_that_fails_leaves_the_very_codes(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(values, compile=False)
    optimizer = torch.optim.AdamW(model.parameters())
    set_phase(model, "resu", optimizer=optimizer)
    before = [(m.entry.active.clone(), m.entry.active_scale.clone()) for m in managed_weights(model).values()]

    def failing(*args):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("fxresu.theta_layout.restore_dropped", failing)
    with pytest.raises(torch.OutOfMemoryError):
        set_phase(model, "sparse", optimizer=optimizer)
    for managed, (active, scale) in zip(managed_weights(model).values(), before):
        assert torch.equal(managed.entry.active, active) and torch.equal(managed.entry.active_scale, scale)
        assert managed.entry.packed


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_copies_and_dtype_changes_keep_the_codes(values: str) -> None:
    model = _model(values, compile=False)
    set_phase(model, "resu")
    copied = copy.deepcopy(model).to(torch.bfloat16)
    for a, b in zip(managed_weights(model).values(), managed_weights(copied).values()):
        assert torch.equal(a.entry.active, b.entry.active) and torch.equal(a.entry.active_scale, b.entry.active_scale)
    assert copied(torch.randn(2, 150, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("values", ["native", "int8", "int4"])
def test_changed_sparsity_does_not_recompile(values: str) -> None:
    model = _model(values)
    optimizer = torch.optim.AdamW(model.parameters())
    for sparsity in (0.5, 0.4, 0.45):
        set_phase(model, "resu", optimizer=optimizer, sparsity=sparsity)
        model(torch.randn(4, 150)).sum().backward()
        set_phase(model, "dense", optimizer=optimizer)
    entry = next(e for tag, e in runner_of(model).entries.items() if "resu" in tag)
    assert entry.recompiles == 0


def test_inspect_without_values(tmp_path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(150, 24), torch.nn.ReLU(), torch.nn.Linear(24, 9))
    fxresu.transform(model, storage="packed", packed_values="int4")
    found = fxresu.inspect(model, torch.randn(2, 150), phase="resu", values=False)
    assert found.rewritten == 2 and {r.after for r in found.rows} == {"fxresu.linear_packed"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed_values": "int2", "storage": "packed"}, "packed_values='int2': use one of native"),
        ({"packed_values": "int8"}, "needs storage='packed', not 'resident'"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fxresu.transform(torch.nn.Sequential(torch.nn.Linear(8, 8)), **options)
