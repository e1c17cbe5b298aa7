"""State of any optimizer across mask changes: plain, quantised, factored, refused; valid in every phase."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from fxresu_phases import ADAM, batch, train
from fxresu_testing import Net, flat_positions, loss_of
from torch import Tensor, nn
from torch.optim import Optimizer

import fxresu
from fxresu.errors import ConfigError
from fxresu.model_state import managed_weights, state_of
from fxresu.optimizer_state import state_tensors
from fxresu.passes import Phase, PhasePlan
from fxresu.phases import set_phase
from fxresu.state_forms import _dequantise, _quantise, coordinates, editable

KEEP = {"resu": PhasePlan(Phase.RESU, "resu", activations="needed", optimizer_state="keep")}


def _managed(model: nn.Module) -> list[nn.Parameter]:
    return [m.parameter for m in managed_weights(model).values()]


TORCH = {
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters(), lr=0.5),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.01, initial_accumulator_value=0.1),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=0.01),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters(), lr=0.01, t0=0),
    "Muon": lambda m: torch.optim.Muon(_managed(m), lr=0.02),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.01),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.01),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, dampening=0.1),
}


def test_no_optimizer_of_torch_is_forgotten() -> None:
    known = {n for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n, None), type)}
    assert known - set(TORCH) - {"Optimizer"} <= {"LBFGS", "SparseAdam"}


def theta_stays_where_it_is(model: nn.Module, optimizer: Optimizer) -> None:
    for managed in managed_weights(model).values():
        assert managed.parameter[~managed.entry.mask()].eq(0).all()
        for key, _ in state_tensors(optimizer, managed.parameter):
            if key != "step_size":  # Rprop clamps it from below; Adamax adds its epsilon to exp_inf
                with coordinates(optimizer.state[managed.parameter], key) as values:
                    assert values[~managed.entry.mask()].abs().le(2e-8 if key == "exp_inf" else 0).all(), key


@pytest.mark.parametrize("plans", [{}, KEEP], ids=["drop", "keep"])
@pytest.mark.parametrize("name", TORCH)
def test_state_follows_the_masks_and_its_dictionary_is_valid_in_every_phase(name: str, plans: dict) -> None:
    model = fxresu.transform(Net(), compile=False, plans=plans)
    optimizer = TORCH[name](model)
    train(model, optimizer, 3)
    for phase in ("sparse", "resu", "sparse", "resu", "dense"):
        kept = {n: copy.copy(optimizer.state.get(m.parameter, {})) for n, m in managed_weights(model).items()}
        counts = {n: float(s["step"]) for n, s in kept.items() if "step" in s}
        old = {n: m.entry.mask() for n, m in managed_weights(model).items()}
        values = {n: {k: v.clone() for k, v in s.items() if isinstance(v, Tensor)} for n, s in kept.items()}
        set_phase(model, phase, optimizer=optimizer, **ADAM)
        for n, m in managed_weights(model).items():
            state = optimizer.state.get(m.parameter, {})
            if "step" in state and n in counts:
                assert float(state["step"]) == counts[n], "step counts are kept"
            if phase == "sparse":
                survivors = m.entry.mask() if old[n] is None else m.entry.mask() & old[n]
                for key, _ in state_tensors(optimizer, m.parameter):
                    if key in values[n]:
                        assert torch.equal(state[key][survivors], values[n][key][survivors]), key
        if phase == "sparse":
            theta_stays_where_it_is(model, optimizer)
        check_dictionary(model, optimizer, name)
        train(model, optimizer, 2)
        if phase == "sparse":
            theta_stays_where_it_is(model, optimizer)
        check_dictionary(model, optimizer, name)


def check_dictionary(model: nn.Module, optimizer: Optimizer, name: str) -> None:
    """`state_dict()` loads into a fresh optimizer of a copy, which then steps to the same weights."""
    twin = copy.deepcopy(model)
    other = TORCH[name](twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    mine = copy.deepcopy(model)
    same = TORCH[name](mine)
    same.load_state_dict(optimizer.state_dict())
    for m, o in ((twin, other), (mine, same)):
        if state_of(m).state.mode == "resu":
            continue
        loss_of(m(batch(9))).backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), mine.state_dict().values()))


@pytest.mark.parametrize(("name", "key", "expected"), [
    ("Adagrad", "sum", lambda mean, square, t: square * t),
    ("Adamax", "exp_inf", lambda mean, square, t: square.sqrt()),
    ("RMSprop", "square_avg", lambda mean, square, t: square * (1 - 0.99**t)),
    ("RMSprop", "grad_avg", lambda mean, square, t: mean * (1 - 0.99**t)),
    ("RMSprop", "momentum_buffer", lambda mean, square, t: mean * 0),
    ("Adadelta", "square_avg", lambda mean, square, t: square * (1 - 0.9**t)),
    ("Adadelta", "acc_delta", lambda mean, square, t: mean * 0),
    ("Rprop", "step_size", lambda mean, square, t: mean * 0 + 0.01),
])  # fmt: skip
def test_what_resurrected_coordinates_get(name: str, key: str, expected) -> None:
    model = fxresu.transform(Net(), compile=False, plans=KEEP)
    optimizer = TORCH[name](model)
    train(model, optimizer, 3)
    set_phase(model, "resu", optimizer=optimizer, **ADAM)
    train(model, optimizer, 4)
    before = {}
    for n, m in managed_weights(model).items():
        rows, cols, flat = flat_positions(m.entry)
        mean = m.entry.m.flatten()[flat] / (1 - 0.9**4)
        square = m.entry.v.flatten()[flat] / (1 - 0.999**4)
        before[n] = rows, cols, mean, square, float(optimizer.state[m.parameter].get("step", 4))
    set_phase(model, "sparse", optimizer=optimizer, amnesty=0.5, **ADAM)
    seen = 0
    for n, m in managed_weights(model).items():
        rows, cols, mean, square, step = before[n]
        active = m.entry.mask()[rows, cols]
        seen += int(active.sum())
        got = optimizer.state[m.parameter][key][rows, cols][active]
        torch.testing.assert_close(got, expected(mean, square, step)[active], rtol=1e-4, atol=1e-7)
    assert seen > 0


@pytest.mark.parametrize("plans", [{}, KEEP], ids=["drop", "keep"])
def test_candidates_take_thetas_moments_on_the_way_to_dense(plans: dict) -> None:
    model = fxresu.transform(Net(), compile=False, plans=plans)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    set_phase(model, "resu", optimizer=optimizer, **ADAM)
    train(model, optimizer, 4)
    before = {}
    for n, m in managed_weights(model).items():
        rows, cols, flat = flat_positions(m.entry)
        before[n] = rows, cols, m.entry.m.flatten()[flat] / (1 - 0.9**4), m.entry.v.flatten()[flat] / (1 - 0.999**4)
    set_phase(model, "dense", optimizer=optimizer, **ADAM)
    step = 3 if plans else 4  # kept, or as long as θ has trained
    for n, m in managed_weights(model).items():
        rows, cols, mean, square = before[n]
        state = optimizer.state[m.parameter]
        assert float(state["step"]) == step
        torch.testing.assert_close(state["exp_avg"][rows, cols], mean * (1 - 0.9**step), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(state["exp_avg_sq"][rows, cols], square * (1 - 0.999**step), rtol=1e-4, atol=1e-10)
    train(model, optimizer, 1)


class Master(Optimizer):
    """SGD in float32 beside bfloat16 weights."""

    def __init__(self, params, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state.setdefault("master", p.detach().float().clone())
                    state["master"].sub_(p.grad.float(), alpha=group["lr"])
                    p.copy_(state["master"])


def test_a_float32_master_takes_theta_at_a_commit() -> None:
    model = fxresu.transform(Net().bfloat16(), compile=False, plans=KEEP)
    optimizer = Master(model.parameters())

    def steps(n: int) -> None:
        for i in range(n):
            optimizer.zero_grad()
            loss_of(model(batch(i).bfloat16()).float()).backward()
            optimizer.step()

    steps(2)
    set_phase(model, "resu", optimizer=optimizer)
    thetas = {n: (flat_positions(m.entry), m.entry.theta.detach().clone()) for n, m in managed_weights(model).items()}
    set_phase(model, "sparse", optimizer=optimizer, amnesty=0.4)
    for n, m in managed_weights(model).items():
        (rows, cols, flat), theta = thetas[n]
        active = m.entry.mask()[rows, cols]
        master = optimizer.state[m.parameter]["master"]
        assert torch.equal(master[rows, cols][active], theta.flatten()[flat][active])
        assert torch.equal(master.bfloat16(), m.parameter.detach())
    steps(2)
    for m in managed_weights(model).values():
        assert m.parameter[~m.entry.mask()].eq(0).all()


class Odd(Optimizer):
    """Keeps what `make` returns for each parameter."""

    def __init__(self, params, key: str, make) -> None:
        super().__init__(params, {"lr": 0.1})
        self.key, self.make = key, make

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p].setdefault(self.key, self.make(p))


@pytest.mark.parametrize("transition", ["prune", "commit"])
def test_state_that_nobody_can_read_is_refused_by_name_before_anything_changes(transition: str) -> None:
    model = fxresu.transform(Net(), compile=False, plans=KEEP)
    optimizer = Odd(model.parameters(), "codes", lambda p: torch.full_like(p, 7, dtype=torch.uint8))
    if transition == "commit":
        set_phase(model, "resu", optimizer=optimizer)
        for p in _managed(model):
            optimizer.state[p]["codes"] = torch.full_like(p, 7, dtype=torch.uint8)
    else:
        train(model, optimizer, 1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=r"optimizer=Odd: its state 'codes' of weight 'blocks.0.up.weight' is a Tensor"
                                          r" of torch.uint8, which cannot be read by coordinate"):  # fmt: skip
        set_phase(model, "sparse", optimizer=optimizer)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert state_of(model).base == ("resu" if transition == "commit" else "dense")
    assert all(optimizer.state[p]["codes"].eq(7).all() for p in _managed(model))


@pytest.mark.parametrize("key", ["preconditioner", "Gram", "inv_factor"])
def test_state_of_the_weights_shape_that_is_not_by_coordinate_is_left_alone(key: str) -> None:
    model = fxresu.transform(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 5)), compile=False)
    optimizer = Odd(model.parameters(), key, lambda p: torch.ones_like(p))
    loss_of(model(batch())).backward()
    optimizer.step()
    set_phase(model, "sparse", optimizer=optimizer)
    assert optimizer.state[model[0].weight][key].eq(1).all()


def test_optimizers_that_cannot_be_followed_are_refused_by_name() -> None:
    model = fxresu.transform(Net(), compile=False)
    for made, why in (
        (torch.optim.LBFGS(model.parameters()), "keeps one state for all parameters together"),
        (torch.optim.SparseAdam(list(model.parameters())), "takes sparse gradients"),
    ):
        with pytest.raises(ConfigError, match=f"optimizer={type(made).__name__} {why}"):
            fxresu.ResuCycle(model, made)
        with pytest.raises(ConfigError, match=f"optimizer={type(made).__name__} {why}"):
            fxresu.prune(model, made)
    assert state_of(model).base == "dense"


# --- 8-bit state -----------------------------------------------------------------------------------------------------


def qmap(signed: bool) -> Tensor:
    """A code book like bitsandbytes': 256 ascending values with an exact zero."""
    values = [0.0] + [10 ** (-3 + 3 * i / 127) for i in range(128)]
    if signed:
        values = sorted({-v for v in values[1:128]} | set(values))
    else:
        values = sorted({*values, *(10 ** (-3 + 3 * (i + 0.5) / 127) for i in range(127))})
    return torch.tensor(values[:256])


class Blockwise(Optimizer):
    """Adam whose moments are kept as bitsandbytes keeps them: uint8 codes, blocks of 256, a scale for each."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.01, "betas": (0.9, 0.999)})

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = 0
                for i, signed in ((1, True), (2, False)):
                    state[f"state{i}"], state[f"qmap{i}"] = torch.zeros_like(p, dtype=torch.uint8), qmap(signed)
                    state[f"absmax{i}"] = torch.zeros(math.ceil(p.numel() / 256))
            state["step"] += 1
            with coordinates(state, "state1") as m:
                m.lerp_(p.grad, 0.1)
            with coordinates(state, "state2") as v:
                v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            t = state["step"]
            p.sub_(0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))


def test_blockwise_codes_survive_reading_and_writing() -> None:
    for signed in (True, False):
        book = qmap(signed)
        assert book.numel() == 256 and (book.diff() > 0).all() and (book == 0).any()
        values = torch.randn(7, 100) if signed else torch.rand(7, 100)
        codes, absmax = _quantise(values, book, 256)
        dense = _dequantise(codes, absmax, book, 256)
        scale = absmax.repeat_interleave(256)[:700].view(7, 100)
        assert ((dense - values).abs() <= scale * book.diff().max()).all()
        again, same = _quantise(dense, book, 256)
        assert torch.equal(again, codes) and torch.equal(same, absmax)
    zeros, scales = _quantise(torch.zeros(2, 300), qmap(True), 256)
    assert _dequantise(zeros, scales, qmap(True), 256).eq(0).all()


@pytest.mark.parametrize("plans", [{}, KEEP], ids=["drop", "keep"])
def test_moments_of_bitsandbytes_form_follow_the_masks(plans: dict) -> None:
    model = fxresu.transform(Net(), compile=False, plans=plans)
    optimizer = Blockwise(model.parameters())
    train(model, optimizer, 3)
    for _ in range(2):
        set_phase(model, "sparse", optimizer=optimizer, **ADAM)
        theta_stays_where_it_is(model, optimizer)
        train(model, optimizer, 2)
        theta_stays_where_it_is(model, optimizer)
        set_phase(model, "resu", optimizer=optimizer, **ADAM)
        assert bool(optimizer.state.get(_managed(model)[0])) == bool(plans)
        train(model, optimizer, 2)
    before = {n: m.entry.mask() for n, m in managed_weights(model).items()}
    set_phase(model, "sparse", optimizer=optimizer, amnesty=0.5, **ADAM)
    if plans:
        for n, m in managed_weights(model).items():
            new = m.entry.mask() & ~before[n]
            with coordinates(optimizer.state[m.parameter], "state2") as v:
                assert v[new].gt(0).any() and v[~m.entry.mask()].eq(0).all()


def test_codes_without_their_scales_are_not_editable() -> None:
    state = {"state1": torch.zeros(4, 4, dtype=torch.uint8), "qmap1": qmap(True), "absmax1": torch.zeros(9)}
    assert not editable(state, "state1")
    state["absmax1"] = torch.zeros(1)
    assert editable(state, "state1")
    del state["qmap1"]
    assert not editable(state, "state1")


@pytest.mark.parametrize("plans", [{}, KEEP], ids=["drop", "keep"])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchaos_optimizers(name: str, plans: dict) -> None:
    torchao = pytest.importorskip("torchao.optim")
    model = fxresu.transform(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 5)),
                             compile=False, exclude="3", plans=plans)  # fmt: skip
    optimizer = getattr(torchao, name)(model.parameters(), lr=0.01)

    def steps(n: int) -> None:
        for i in range(n):
            optimizer.zero_grad()
            loss_of(model(torch.randn(8, 64, generator=torch.Generator().manual_seed(i)))).backward()
            if state_of(model).state.mode != "resu":
                with torch.compiler.set_stance("force_eager"):
                    optimizer.step()

    steps(2)
    assert any(type(v).__name__.startswith("OptimState") for v in optimizer.state[model[0].weight].values())
    for _ in range(2):
        set_phase(model, "sparse", optimizer=optimizer)
        state = optimizer.state[model[0].weight]
        with coordinates(state, "exp_avg") as m:
            assert m[~managed_weights(model)["0.weight"].entry.mask()].eq(0).all() and m.ne(0).any()
        steps(2)
        for m in managed_weights(model).values():
            assert m.parameter[~m.entry.mask()].eq(0).all()
        set_phase(model, "resu", optimizer=optimizer)
        steps(1)
        set_phase(model, "sparse", optimizer=optimizer)
        steps(1)
        kind = {type(v).__name__ for v in optimizer.state[model[0].weight].values() if isinstance(v, Tensor)}
        assert any(k.startswith("OptimState") for k in kind), "still in its own form"
