"""Moving between phases: what is legal, what is refused, and what it does to weights and masks."""

import itertools

import pytest
import torch
from fxresu_phases import ADAM, batch, same, snapshot, train
from fxresu_testing import EAGER, Net, check_gradients, in_phase, loss_of
from torch import nn

import fxresu
from fxresu import resurrection, sparsify
from fxresu.errors import ConfigError, PhaseError
from fxresu.model_state import managed_weights, state_of
from fxresu.passes import DEFAULT_PLANS, Phase
from fxresu.phases import current_phase, set_phase

PHASES = list(Phase)


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


@pytest.mark.parametrize("call", [sparsify.commit, resurrection.discard_theta, resurrection.start_theta])
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
