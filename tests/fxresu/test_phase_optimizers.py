"""Optimizers across phases: what must not move does not, and moments follow the masks."""

import contextlib
import gc
import weakref

import pytest
import torch
from fxresu_phases import ADAM, batch, train
from fxresu_testing import EAGER, Net, flat_positions, loss_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxresu
from fxresu.errors import PhaseError
from fxresu.model_state import managed_weights, state_of
from fxresu.passes import Phase, PhasePlan
from fxresu.phases import _checksum, projected_weights, set_phase

KEEP = {"resu": PhasePlan(Phase.RESU, "resu", activations="needed", optimizer_state="keep")}


# Optimizers: what must not move does not


def _muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([m.parameter for m in managed_weights(model).values()], lr=0.02, weight_decay=0.1)


OPTIMIZERS = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, fused=True),
    "Adam amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True, weight_decay=0.1),
    "Adam amsgrad fused": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True, fused=True),
    "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, nesterov=True),
    "SGD foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, foreach=True),
    "SGD fused": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, fused=True),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01, weight_decay=0.1),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.9, centered=True),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01, weight_decay=0.1),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.01),
    "Muon": _muon,
}


@pytest.mark.parametrize("plans", [{}, KEEP], ids=["drop", "keep"])
@pytest.mark.parametrize("compile", [EAGER, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_stay_zero_in_sparse_and_active_stay_bitwise_in_resu(name: str, compile: object, plans: dict) -> None:
    if compile and plans:
        pytest.skip("the optimizer's state does not reach the graph")
    model = fxresu.transform(Net(), compile=compile, plans=plans)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 2)

    def pruned_are_zero() -> None:
        for m in managed_weights(model).values():
            assert (m.parameter[~m.entry.mask()] == 0).all()

    for _ in range(2):
        set_phase(model, "sparse", optimizer=optimizer, **ADAM)
        before = {n: m.parameter.detach().clone() for n, m in managed_weights(model).items()}
        train(model, optimizer, 3, after=pruned_are_zero)
        assert bool(projected_weights(model)) == (name == "Muon")
        for n, m in managed_weights(model).items():
            assert not torch.equal(before[n], m.parameter), "the active ones train"
        set_phase(model, "resu", optimizer=optimizer, **ADAM)
        active = {n: m.parameter[m.entry.mask()].clone() for n, m in managed_weights(model).items()}
        theta = {n: m.parameter[~m.entry.mask()].clone() for n, m in managed_weights(model).items()}

        def active_are_bitwise_same(active=active) -> None:
            for n, m in managed_weights(model).items():
                assert torch.equal(m.parameter[m.entry.mask()], active[n])
                assert m.parameter.grad is None

        train(model, optimizer, 3, after=active_are_bitwise_same)
        for n, m in managed_weights(model).items():
            assert not torch.equal(m.parameter[~m.entry.mask()], theta[n]), "θ trains"


def test_muon_is_reported_and_projected_also_after_a_warm_up_at_rate_zero(caplog) -> None:
    model = fxresu.transform(Net(), compile=False)
    optimizer = _muon(model)
    set_phase(model, "sparse", optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 2)
    assert projected_weights(model) == []
    optimizer.param_groups[0]["lr"] = 0.02
    with caplog.at_level("WARNING", logger="fxresu"):
        train(model, optimizer, 2)
    assert sorted(projected_weights(model)) == sorted(managed_weights(model))
    assert "Muon moves pruned coordinates of 4 weights" in caplog.text
    for m in managed_weights(model).values():
        assert (m.parameter[~m.entry.mask()] == 0).all()
    set_phase(model, "dense", optimizer=optimizer)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_a_well_behaved_optimizer_is_watched_for_one_step_only() -> None:
    model = fxresu.transform(Net(), compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for phase in ("sparse", "resu"):
        set_phase(model, phase, optimizer=optimizer, **ADAM)
        assert optimizer._optimizer_step_post_hooks
        train(model, optimizer, 1)
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks


class Waits(TorchDispatchMode):
    """Counts when the host waits for a value."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("phase", ["sparse", "resu"])
@pytest.mark.parametrize("moves", ["nothing", "active", "all"])
def test_the_watch_does_not_wait_for_each_weight(phase: str, moves: str) -> None:
    model = fxresu.transform(Net(), compile=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    set_phase(model, phase, optimizer=optimizer, **ADAM)
    watch = state_of(model).watch
    watch._before_step(optimizer, (), {})
    for managed in managed_weights(model).values():
        with torch.no_grad():
            kept = managed.entry.mask() if moves == "active" else torch.full_like(managed.parameter, moves == "all")
            managed.parameter.add_(kept)
    refused = phase == "resu" and moves != "nothing"
    with Waits() as waits, pytest.raises(PhaseError, match="moved 4") if refused else contextlib.nullcontext():
        watch._after_step(optimizer, (), {})
    assert waits.count == 0, waits.count  # lists are read at once
    assert len(projected_weights(model)) == (4 if (phase, moves) == ("sparse", "all") else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(4, 32), (3, 33), (1, 1)])
def test_any_changed_entry_shows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Also one sign of a zero, and where bytes do not come by the eight."""
    model = fxresu.transform(nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)).to(dtype), compile=False)
    (managed,) = managed_weights(model).values()
    managed.parameter.data.zero_()
    before = _checksum(managed)
    for place in range(managed.parameter.numel()):
        managed.parameter.data.view(-1)[place] = -0.0
        assert _checksum(managed) != before
        managed.parameter.data.view(-1)[place] = 0.0
    assert _checksum(managed) == before


class Decay(torch.optim.Optimizer):
    """Decays every parameter, gradient or not."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"])


def test_an_optimizer_that_moves_frozen_weights_in_resu_is_refused() -> None:
    model = fxresu.transform(Net(), compile=False)
    optimizer = Decay(model.parameters())
    set_phase(model, "resu", optimizer=optimizer, **ADAM)
    loss_of(model(batch())).backward()
    with pytest.raises(PhaseError, match="Decay moved 4 frozen weights in RESU, such as 'blocks.0.up.weight'"):
        optimizer.step()


# Optimizer state


def test_drop_frees_the_state_of_w_and_only_that() -> None:
    model = fxresu.transform(Net(), compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    set_phase(model, "sparse", optimizer=optimizer)
    train(model, optimizer, 2)
    weights = [m.parameter for m in managed_weights(model).values()]
    tensors = [weakref.ref(t) for w in weights for t in optimizer.state[w].values()]
    assert len(tensors) == 12
    set_phase(model, "resu", optimizer=optimizer, **ADAM)
    gc.collect()
    assert all(r() is None for r in tensors)
    assert all(w not in optimizer.state for w in weights)
    assert model.head.weight in optimizer.state
    train(model, optimizer, 2)
    assert all(w not in optimizer.state for w in weights)


def _expected_moments(model: nn.Module, steps: float, theta_steps: int, betas: tuple[float, float]) -> dict:
    """What resurrected coordinates get: θ's moments debiased, at the bias of the optimizer's own step count."""
    found = {}
    for name, m in managed_weights(model).items():
        entry = m.entry
        rows, cols, flat = flat_positions(entry)
        dense = torch.zeros(2, entry.rows, entry.k, dtype=torch.float64)
        for i, (moment, mine, its) in enumerate(zip((entry.m, entry.v), ADAM["betas"], betas)):
            mean = moment.double().view(-1)[flat] / (1 - mine**theta_steps)
            dense[i, rows, cols] = mean * (1 - its**steps)
        found[name] = dense
    return found


@pytest.mark.parametrize("state", ["drop", "keep"])
@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_moments_across_a_commit(state: str, storage: str) -> None:
    plans = {"resu": PhasePlan(Phase.RESU, "resu", optimizer_state=state)}
    model = fxresu.transform(Net(), compile=False, plans=plans, storage=storage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.95))
    train(model, optimizer, 2)
    set_phase(model, "sparse", optimizer=optimizer)
    train(model, optimizer, 3)
    weights = managed_weights(model)
    before = {n: {k: v.clone() for k, v in optimizer.state[m.parameter].items()} for n, m in weights.items()}
    set_phase(model, "resu", optimizer=optimizer, **ADAM)
    train(model, optimizer, 4)
    old = {n: m.entry.mask().clone() for n, m in weights.items()}
    effective = {n: m.entry.dense(m.parameter).clone() for n, m in weights.items()}
    steps = 5 if state == "keep" else 4
    resurrected = _expected_moments(model, steps, 4, (0.8, 0.95))
    result = set_phase(model, "sparse", optimizer=optimizer, amnesty=0.25, **ADAM)
    assert result.resurrected > 0
    assert result.kept > 0
    assert result.dropped == result.resurrected, "the sparsity has not changed"
    counted = [0, 0, 0]
    for name, m in weights.items():
        new, was = m.entry.mask(), old[name]
        state_of_w = optimizer.state[m.parameter]
        assert float(state_of_w["step"]) == steps
        assert torch.equal(m.parameter, torch.where(new, effective[name], 0.0))
        for i, key in enumerate(("exp_avg", "exp_avg_sq")):
            got = state_of_w[key]
            kept = before[name][key] if state == "keep" else torch.zeros_like(got)
            assert torch.equal(got[new & was], kept[new & was])
            assert (got[~new] == 0).all()
            want = resurrected[name][i][new & ~was]
            torch.testing.assert_close(got[new & ~was].double(), want, rtol=1e-5, atol=1e-12)
            assert (got[new & ~was] != 0).any()
        counted = [c + int(v.sum()) for c, v in zip(counted, (new & was, new & ~was, was & ~new))]
    assert counted == [result.kept, result.resurrected, result.dropped]
    train(model, optimizer, 1)


def test_momentum_of_sgd_across_a_commit() -> None:
    model = fxresu.transform(Net(), compile=False, plans=KEEP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer, 3)
    set_phase(model, "sparse", optimizer=optimizer)
    set_phase(model, "resu", optimizer=optimizer, **ADAM)
    weights = managed_weights(model)
    before = {n: optimizer.state[m.parameter]["momentum_buffer"].clone() for n, m in weights.items()}
    train(model, optimizer, 3)
    old = {n: m.entry.mask().clone() for n, m in weights.items()}
    means = {n: gathered_back(m.entry, m.entry.m.double() / (1 - 0.9**3)) for n, m in weights.items()}
    set_phase(model, "sparse", optimizer=optimizer, amnesty=0.5, **ADAM)
    for name, m in weights.items():
        new, was = m.entry.mask(), old[name]
        buffer = optimizer.state[m.parameter]["momentum_buffer"]
        assert torch.equal(buffer[new & was], before[name][new & was])
        assert (buffer[~new] == 0).all()
        # A sum with decay 0.9 of equal gradients, after as many steps as θ took.
        want = means[name][new & ~was] * (1 - 0.9**3) / (1 - 0.9)
        torch.testing.assert_close(buffer[new & ~was].double(), want, rtol=1e-5, atol=1e-9)


def gathered_back(entry, theta: torch.Tensor) -> torch.Tensor:
    rows, cols, flat = flat_positions(entry)
    dense = torch.zeros(entry.rows, entry.k, dtype=torch.float64)
    dense[rows, cols] = theta.view(-1)[flat]
    return dense


def test_pruning_zeroes_the_moments_at_pruned_coordinates_and_nowhere_else() -> None:
    model = fxresu.transform(Net(), compile=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)
    train(model, optimizer, 2)
    weights = managed_weights(model)
    before = {n: {k: v.clone() for k, v in optimizer.state[m.parameter].items()} for n, m in weights.items()}
    set_phase(model, "sparse", optimizer=optimizer)
    for name, m in weights.items():
        mask = m.entry.mask()
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            value = optimizer.state[m.parameter][key]
            assert (value[~mask] == 0).all()
            assert torch.equal(value[mask], before[name][key][mask])
