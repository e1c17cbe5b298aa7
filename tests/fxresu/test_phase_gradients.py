"""θ where it starts, and gradients in every phase: right under every granularity, and gone when not needed."""

import gc
import math
import weakref

import pytest
import torch
from fxresu_phases import batch, same
from fxresu_testing import EAGER, Net, check_gradients, in_phase, loss_of
from torch import nn

import fxresu
from fxresu.model_state import managed_weights, state_of
from fxresu.phases import set_phase


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


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "recorded"])
def test_a_sparse_gradient_is_masked_whatever_its_layout(layout: str) -> None:
    model = in_phase(fxresu.transform(Net(40, 40, blocks=1), compile=False), "sparse")
    for m in managed_weights(model).values():
        rows, k = m.entry.rows, m.entry.k
        grad = torch.randn(k, rows).t() if layout == "transposed" else torch.randn(rows, k)
        want = torch.where(m.entry.mask(), grad, 0)
        if layout == "recorded":  # create_graph=True
            grad = grad.requires_grad_() * 1.0
        version = grad._version
        m.parameter.grad = grad
        m.entry.on_gradient(m.parameter)
        assert torch.equal(m.parameter.grad, want) and m.parameter.grad._version > version


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
