"""Moving between phases: what is legal, and what it does to weights, masks, θ and the optimizer's state."""

import gc
import itertools
import math
import weakref

import pytest
import torch
from fxresu_testing import EAGER, Net, check_gradients, flat_positions, in_phase, loss_of
from torch import nn

import fxresu
from fxresu import sparsify
from fxresu.config import CycleConfig
from fxresu.errors import ConfigError, PhaseError
from fxresu.model_state import managed_weights, state_of
from fxresu.passes import DEFAULT_PLANS, Phase, PhasePlan
from fxresu.phases import current_phase, projected_weights, set_phase
from fxresu.theta import step_theta

PHASES = list(Phase)
ADAM = {"rule": "adam", "betas": (0.9, 0.999)}
CONFIG = CycleConfig(rule="adam")
KEEP = {"resu": PhasePlan(Phase.RESU, "resu", activations="needed", optimizer_state="keep")}


def batch(seed: int = 1) -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None, steps: int = 1, after=lambda: None) -> None:
    """Ordinary steps; in RESU θ is stepped as well, by Adam."""
    record = state_of(model)
    for i in range(steps):
        if optimizer is not None:
            optimizer.zero_grad()
        loss_of(model(batch(i))).backward()
        if optimizer is not None:
            optimizer.step()
        if record.state.mode == "resu":
            record.theta_steps += 1
            step_theta(managed_weights(model).values(), CONFIG, 1e-2, record.theta_steps)
        after()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Copies of everything that a transition may touch."""
    record = state_of(model)
    found = {"phase": current_phase(model), "mode": record.state.mode, "base": record.base}
    found |= {k: getattr(record, k) for k in ("nominal_sparsity", "capacity_sparsity", "theta_steps", "rotation")}
    for name, m in managed_weights(model).items():
        found[name] = m.entry.dense(m.parameter).clone()
        for key in (*m.entry.TENSORS, "anchor"):
            value = getattr(m.entry, key)
            found[name, key] = None if value is None else value.detach().clone()
        found[name, "shape"] = m.entry.theta_shape
        if optimizer is not None:
            state = optimizer.state.get(m.parameter, {})
            found[name, "state"] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    return found


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return a == b


# Every move


@pytest.mark.parametrize(("first", "second"), list(itertools.product(PHASES, PHASES)), ids="-".join)
def test_every_move_is_legal_and_leaves_a_model_that_works(first: Phase, second: Phase) -> None:
    model = fxresu.transform(Net(), compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    for phase in (first, second):
        before = {n: m.entry.dense(m.parameter).clone() for n, m in managed_weights(model).items()}
        set_phase(model, phase, optimizer=optimizer, **ADAM)
        assert current_phase(model) == phase
        mode = DEFAULT_PLANS[phase].weights
        if mode == "effective":
            after = {n: m.entry.dense(m.parameter) for n, m in managed_weights(model).items()}
            assert same(before, after), "forward-only phases change nothing"
            assert not model(batch()).requires_grad
        else:
            check_gradients(model, mode, batch())
            model.zero_grad()
            train(model, optimizer)
        assert all(m.parameter.isfinite().all() for m in managed_weights(model).values())


@pytest.mark.parametrize("between", ["predict", "correct"])
@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_resu_goes_on_after_a_forward_only_phase(between: str, storage: str) -> None:
    model = fxresu.transform(Net(), compile=False, storage=storage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    set_phase(model, "resu", optimizer=optimizer, **ADAM)
    train(model, optimizer, 2)
    before = snapshot(model)
    set_phase(model, between, optimizer=optimizer)
    model(batch())
    set_phase(model, "resu", optimizer=optimizer, **ADAM)
    assert same(snapshot(model), before)
    assert state_of(model).theta_steps == 2


@pytest.mark.parametrize("between", ["predict", "correct"])
def test_sparse_goes_on_after_a_forward_only_phase(between: str) -> None:
    model = in_phase(fxresu.transform(Net(), compile=False), "sparse")
    before = snapshot(model)
    set_phase(model, between)
    set_phase(model, "sparse")
    assert same(snapshot(model), before)


def test_dense_after_resu_keeps_the_effective_weight_and_trains_all_of_it() -> None:
    model = in_phase(fxresu.transform(Net(), compile=False), "resu")
    before = {n: m.parameter.detach().clone() for n, m in managed_weights(model).items()}
    set_phase(model, "dense")
    assert same(before, {n: m.parameter.detach() for n, m in managed_weights(model).items()})
    assert all((v != 0).all() for v in before.values()), "θ lives in every pruned slot"
    assert all(m.entry.bits is None and m.entry.anchor is None for m in managed_weights(model).values())


def test_discarding_theta_gives_the_sparse_weights_back() -> None:
    model = in_phase(fxresu.transform(Net(), compile=False, storage="packed"), "sparse")
    before = {n: m.parameter.detach().clone() for n, m in managed_weights(model).items()}
    set_phase(model, "resu", **ADAM)
    train(model, None, 2)
    set_phase(model, "sparse", leave="discard")
    assert same(before, {n: m.parameter.detach() for n, m in managed_weights(model).items()})


def test_sparsity_given_in_the_sparse_phase_prunes_further() -> None:
    model = in_phase(fxresu.transform(Net(), compile=False, sparsity=0.25), "sparse")
    set_phase(model, "sparse", sparsity=0.75)
    assert set(sparsify.actual_sparsity(model).values()) == {0.75}
    set_phase(model, "resu", sparsity=0.875)
    assert set(sparsify.actual_sparsity(model).values()) == {0.875}


# Refusals


@pytest.mark.parametrize("compile", [EAGER, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_no_change_between_forward_and_backward(phase: str, compile: object) -> None:
    model = in_phase(fxresu.transform(Net(), compile=compile), phase)
    loss = loss_of(model(batch()))
    before = snapshot(model)
    for target in PHASES:
        with pytest.raises(PhaseError, match=f"phase='{target}'.*forward of phase {phase} has not run its backward"):
            set_phase(model, target)
    assert same(snapshot(model), before)
    loss.backward()
    set_phase(model, "predict")
    set_phase(model, phase)
    loss = loss_of(model(batch()))
    del loss
    set_phase(model, "dense")


class Several(nn.Module):
    """Results as transformers returns them: a loss that the user may ignore, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x):
        logits = self.net(x)
        return {"loss": logits.square().mean(), "logits": logits, "extra": [logits.sum()]}


@pytest.mark.parametrize("compile", [EAGER, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("used", ["loss", "logits", "extra"])
def test_a_backward_from_any_result_counts(used: str, compile: object) -> None:
    model = fxresu.transform(Several(), compile=compile)
    out = model(batch())
    with pytest.raises(PhaseError):
        set_phase(model, "sparse")
    value = out[used][0] if used == "extra" else out[used]
    value.sum().backward()
    set_phase(model, "sparse")
    assert out["loss"].grad_fn is not None, "the other results are still alive"


def test_a_forward_without_gradients_is_never_pending() -> None:
    model = fxresu.transform(Net(), compile=False)
    with torch.no_grad():
        kept = model(batch())
    set_phase(model, "sparse")
    set_phase(model, "predict")
    kept = kept, model(batch())
    set_phase(model, "dense")


BAD = {
    "phase": ({"phase": "resting"}, "phase='resting'.*warmup"),
    "leave": ({"leave": "keep"}, "leave='keep'.*commit, discard"),
    "sparsity": ({"sparsity": 1.0}, r"sparsity=1.0.*\[0, 1\)"),
    "sparsity nan": ({"sparsity": float("nan")}, "sparsity=nan"),
    "theta_init": ({"theta_init": "ones"}, "theta_init='ones'.*normal"),
    "theta_epsilon": ({"theta_epsilon": -1.0}, "theta_epsilon=-1.0"),
    "rule": ({"rule": "adamw"}, "rule='adamw'.*selective"),
    "amnesty": ({"amnesty": 1.5}, "amnesty=1.5"),
}


@pytest.mark.parametrize("start", ["dense", "sparse", "resu"])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_change_nothing(name: str, start: str) -> None:
    kwargs, message = BAD[name]
    model = in_phase(fxresu.transform(Net(), compile=False), start)
    before = snapshot(model)
    for target in ("sparse", "resu"):
        with pytest.raises(ConfigError, match=message):
            set_phase(model, **{"phase": target, **kwargs})
    assert same(snapshot(model), before)


@pytest.mark.parametrize("start", ["dense", "sparse", "resu"])
@pytest.mark.parametrize("target", ["sparse", "resu"])
def test_an_optimizer_of_other_parameters_is_refused(start: str, target: str) -> None:
    model = in_phase(fxresu.transform(Net(), compile=False), start)
    before = snapshot(model)
    for other in (torch.optim.SGD(Net().parameters(), lr=1), torch.optim.SGD(model.head.parameters(), lr=1)):
        with pytest.raises(ConfigError, match="SGD does not hold 4 managed weights, such as 'blocks.0.up.weight'"):
            set_phase(model, target, optimizer=other)
    assert same(snapshot(model), before)
    frozen = torch.optim.SGD(model.head.parameters(), lr=1)
    model.blocks.requires_grad_(False)
    set_phase(model, target, optimizer=frozen)


@pytest.mark.parametrize("call", [sparsify.commit, sparsify.discard_theta, sparsify.start_theta])
def test_functions_called_in_the_wrong_phase(call) -> None:
    model = fxresu.transform(Net(), compile=False)
    with pytest.raises(PhaseError, match="dense"):
        call(model, None)
    in_phase(model, "resu")
    with pytest.raises(PhaseError, match="commit it first"):
        sparsify.prune(model)


def test_masks_given_by_hand_are_checked() -> None:
    model = fxresu.transform(Net(), compile=False)
    good = {n: torch.rand(m.entry.rows, m.entry.k) > 0.5 for n, m in managed_weights(model).items()}
    before = snapshot(model)
    last = "blocks.1.down.weight"
    wrong = [{last: torch.ones(3, 3, dtype=torch.bool)}, {last: torch.ones(16, 32)}]
    for masks in ({k: v for k, v in good.items() if k != last}, *(good | w for w in wrong)):
        with pytest.raises(ConfigError, match="blocks.1.down.weight.*expected a bool mask of shape"):
            sparsify.prune(model, masks=masks)
    assert same(snapshot(model), before)
    sparsify.prune(model, masks=good)
    for name, m in managed_weights(model).items():
        assert torch.equal(m.entry.mask(), good[name])


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


def test_theta_starts_at_epsilon_sigma() -> None:
    model = in_phase(fxresu.transform(Net(256, 256, blocks=1), compile=False), "sparse")
    weights = managed_weights(model)
    sigma = {n: m.parameter[m.entry.mask()].std().item() for n, m in weights.items()}
    set_phase(model, "resu", theta_epsilon=0.2, seed=3)
    for name, m in weights.items():
        theta = m.parameter[~m.entry.mask()]
        assert math.isclose(theta.std().item(), 0.2 * sigma[name], rel_tol=0.05)
        assert abs(theta.mean().item()) < 0.01 * sigma[name]
    first = {n: m.parameter.detach().clone() for n, m in weights.items()}
    set_phase(model, "sparse", leave="discard")
    state_of(model).rotation = 0
    set_phase(model, "resu", theta_epsilon=0.2, seed=3)
    assert same(first, {n: m.parameter.detach() for n, m in weights.items()}), "a function of seed and cycle"
    assert not torch.equal(*(m.parameter[:, :8] for m in weights.values()))


# Failures


SITES = {
    "prune": ("sparse", ["select_masks", "pack", "row_counts", "row_starts"]),
    "start_theta": ("resu", ["active_std", "theta_init", "scatter_", "drop_state", "_enter_resu"]),
    "commit": ("sparse", ["amnesty_masks", "pack", "row_starts", "transition_counts", "restore_dropped"]),
    "discard": ("sparse", ["restore_dropped"]),
}
CASES = [(k, site) for k, (_, sites) in SITES.items() for site in sites]
CASES += [("start_theta", "ManagedWeight.pack"), ("commit", "ManagedWeight.unpack_into")]
CASES += [("discard", "ManagedWeight.unpack_into"), ("drop_masks", "ManagedWeight.unpack_into")]


class OutOfMemory(RuntimeError):
    pass


@pytest.mark.parametrize("storage", ["resident", "packed"])
@pytest.mark.parametrize(("transition", "site"), CASES, ids=":".join)
def test_a_failure_in_the_middle_changes_nothing(transition: str, site: str, storage: str, monkeypatch) -> None:
    if storage == "resident" and "ManagedWeight" in site:
        pytest.skip("nothing is packed")
    model = fxresu.transform(Net(), compile=False, storage=storage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    if transition != "prune":
        set_phase(model, "sparse", optimizer=optimizer)
        train(model, optimizer, 1)
    if transition in ("commit", "discard", "drop_masks"):
        set_phase(model, "resu", optimizer=optimizer, **ADAM)
        train(model, optimizer, 2)
    before, output = snapshot(model, optimizer), model(batch()).detach()
    target = {"start_theta": "resu", "drop_masks": "dense"}.get(transition, "sparse")
    leave = "discard" if transition == "discard" else "commit"

    owner, name = (sparsify.ManagedWeight, site.partition(".")[2]) if "." in site else (sparsify, site)
    original, calls, limit = getattr(owner, name), [], 1 if site in ("select_masks", "amnesty_masks") else 4

    def failing(*args, **kwargs):
        calls.append(site)
        if len(calls) == limit:
            raise OutOfMemory("injected")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(OutOfMemory):
            set_phase(model, target, optimizer=optimizer, leave=leave, **ADAM)
    assert len(calls) >= limit
    after = snapshot(model, optimizer)
    different = [k for k in before if not same(before[k], after[k])]
    assert not different
    assert torch.equal(model(batch()), output)
    set_phase(model, target, optimizer=optimizer, leave=leave, **ADAM)
    assert current_phase(model) == target
    train(model, optimizer, 1)


def test_a_failure_on_the_way_from_dense_to_resu_leaves_a_sparse_model(monkeypatch) -> None:
    model = fxresu.transform(Net(), compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 1)

    def failing(*args, **kwargs):
        raise OutOfMemory

    with monkeypatch.context() as patch:
        patch.setattr(sparsify, "theta_init", failing)
        with pytest.raises(OutOfMemory):
            set_phase(model, "resu", optimizer=optimizer)
    assert current_phase(model) == "sparse"
    check_gradients(model, "sparse", batch())


def test_a_refused_sparsity_does_not_widen_the_capacity() -> None:
    model = fxresu.transform(Net(), compile=False)
    with pytest.raises(ConfigError):
        sparsify.prune(model, sparsity=1.5)
    assert state_of(model).capacity_sparsity == 0


# Dense gradients


def test_no_dense_gradient_survives_past_its_layer_in_eager_resu() -> None:
    model = in_phase(fxresu.transform(Net(blocks=4), compile=False), "resu")
    weights = managed_weights(model)
    alive: list[int] = []
    grads: list[weakref.ref] = []

    def note(grad: torch.Tensor) -> None:
        grads.append(weakref.ref(grad))

    def look(module: nn.Module, *_: object) -> None:
        alive.append(sum(m.parameter.grad is not None for m in weights.values()))

    for m in weights.values():
        m.parameter.register_hook(note)
    for block in model.blocks:
        block.norm.register_full_backward_hook(look)
    loss_of(model(batch())).backward()
    assert alive == [0] * 4
    gc.collect()
    assert len(grads) == 8
    assert all(r() is None for r in grads), "their memory is free"
    assert all(m.entry.anchor.grad is not None for m in weights.values())


@pytest.mark.parametrize("phase", ["sparse", "resu"])
def test_entering_a_phase_frees_the_gradients_of_the_last(phase: str) -> None:
    model = fxresu.transform(Net(), compile=False)
    loss_of(model(batch())).backward()
    set_phase(model, phase)
    assert all(m.parameter.grad is None for m in managed_weights(model).values())
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("granularity", ["row", "layer", "global", "2:4", "block:4x4"])
@pytest.mark.parametrize("compile", [EAGER, False], ids=["compiled", "eager"])
def test_gradients_under_every_granularity(granularity: str, compile: object) -> None:
    model = fxresu.transform(Net(), granularity=granularity, compile=compile)
    for phase in ("sparse", "resu"):
        in_phase(model, phase)
        check_gradients(model, phase, batch())


@pytest.mark.parametrize("candidates", [0.25, 0.5])
@pytest.mark.parametrize("compile", [EAGER, False], ids=["compiled", "eager"])
def test_column_candidates(candidates: float, compile: object) -> None:
    model = in_phase(fxresu.transform(Net(256, 128, blocks=1), candidates=candidates, compile=compile), "resu")
    x = torch.randn(5, 256)
    check_gradients(model, "resu", x)
    for m in managed_weights(model).values():
        alive = m.entry.mask()
        alive[:, m.entry.columns.long()] = True
        assert (m.parameter[~alive] == 0).all()
    before = {n: m.entry.columns.clone() for n, m in managed_weights(model).items()}
    set_phase(model, "sparse")
    set_phase(model, "resu")
    assert any(not torch.equal(before[n], m.entry.columns) for n, m in managed_weights(model).items()), "they rotate"
    check_gradients(model, "resu", x)
