"""torch.func, export and the user's own torch.compile on a transformed model."""

import pytest
import torch
from fxresu_eager import everywhere, make, resident, x
from fxresu_testing import EAGER, check_gradients, loss_of, reference_gradients
from torch.func import functional_call, grad, vmap

from fxresu.model_state import managed_weights


@resident
def test_functional_call_and_grad(phase: str) -> None:
    model = make(phase)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    out, expected = reference_gradients(model, x())
    torch.testing.assert_close(functional_call(model, parameters, (x(),)).double(), out, rtol=1e-5, atol=1e-5)
    gradients = grad(lambda p: loss_of(functional_call(model, p, (x(),))))(parameters)
    for name, value in gradients.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-4)


@everywhere
def test_vmap(phase: str, storage: str) -> None:
    model = make(phase, storage)
    batch = torch.randn(3, 4, 16)
    torch.testing.assert_close(vmap(model)(batch), model(batch))


@resident
def test_per_sample_gradients(phase: str) -> None:
    model = make(phase)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    one = grad(lambda p, row: loss_of(functional_call(model, p, (row[None],))))
    gradients = vmap(one, in_dims=(None, 0))(parameters, x())
    _, expected = reference_gradients(model, x())
    for name, value in gradients.items():
        torch.testing.assert_close(value.sum(0).double(), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phase", ["sparse", "resu"])
def test_a_functional_call_between_forward_and_backward_costs_no_hook(phase: str) -> None:
    model = make(phase)
    loss = loss_of(model(x()))
    functional_call(model, {k: v.detach() for k, v in model.named_parameters()}, (x(),))
    loss.backward()
    for managed in managed_weights(model).values():
        if phase == "resu":
            assert managed.parameter.grad is None
            assert managed.entry.anchor.grad.abs().sum() > 0
        else:
            assert (managed.parameter.grad[~managed.entry.mask()] == 0).all()


@everywhere
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("compile", [EAGER, False], ids=["compiled", "eager"])
def test_export_has_no_marker_and_no_theta(phase: str, storage: str, strict: bool, compile: object) -> None:
    model = make(phase, storage, compile)
    want = model(x()).detach()
    program = torch.export.export(model, (x(),), strict=strict)
    torch.testing.assert_close(program.module()(x()).detach(), want)
    names = [str(n.target) for n in program.graph.nodes]
    assert not any("managed" in n or "fxresu.linear" in n for n in names)
    if storage == "resident":
        assert not any("fxresu" in n for n in names)
        assert set(program.state_dict) == set(model.state_dict())


@resident
def test_the_users_own_compile_gives_the_same_gradients(phase: str) -> None:
    model = make(phase)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check_gradients(model, phase, x(), run=compiled)
    assert list(compiled.state_dict()) == ["_orig_mod." + k for k in model.state_dict()]


@resident
def test_the_users_own_compile_of_a_model_that_compiles_itself(phase: str) -> None:
    model = make(phase, compile=EAGER)
    check_gradients(model, phase, x(), run=torch.compile(model, backend="aot_eager", fullgraph=True))
    check_gradients(model, phase, x())


@resident
def test_module_compile_of_a_part(phase: str) -> None:
    model = make(phase)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    check_gradients(model, phase, x())
