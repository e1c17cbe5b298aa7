"""Copies, moves, casts and loads of a transformed model."""

import copy
import io
import pickle

import pytest
import torch
from fxresu_eager import everywhere, make, x
from fxresu_testing import EAGER, Net, check_gradients, gathered, loss_of
from torch import nn

from fxresu.errors import PhaseError
from fxresu.model_state import managed_weights, state_of
from fxresu.phases import set_phase


def copies(model: nn.Module) -> dict[str, nn.Module]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@everywhere
def test_copies_are_transformed_models_of_their_own(phase: str, storage: str) -> None:
    model = make(phase, storage, compile=EAGER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    set_phase(model, phase, optimizer=optimizer)
    loss_of(model(x())).backward()
    for how, twin in copies(model).items():
        assert type(twin) is type(model)
        torch.testing.assert_close(twin(x()), model(x()), msg=how)
        weights, theirs = managed_weights(model), managed_weights(twin)
        assert list(weights) == list(theirs)
        for name in weights:
            mine, other = weights[name], theirs[name]
            assert other.entry is not mine.entry
            assert other.entry.state is state_of(twin).state
            assert other.parameter is not mine.parameter
            assert other.parameter.data_ptr() != mine.parameter.data_ptr()
            if phase == "resu":
                assert other.entry.anchor.is_leaf
                assert other.entry.anchor.shape == mine.entry.anchor.shape
            if mine.entry.theta is not None:
                assert other.entry.theta is other.entry.anchor, "one leaf, as in the original"
        twin.zero_grad()
        check_gradients(twin, phase, x())
        state = {k: v.clone() for k, v in model.state_dict().items()}
        trained = torch.optim.SGD(twin.parameters(), lr=0.5)
        set_phase(twin, "dense")
        loss_of(twin(x())).backward()
        trained.step()
        assert state_of(model).state.plan.phase == phase
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items()), "the original has not moved"
        assert not torch.equal(twin.state_dict()["blocks.0.up.weight"], state["blocks.0.up.weight"])
    check_gradients(model, phase, x())


@everywhere
def test_a_copy_of_an_eager_model_gets_gradient_hooks_of_its_own(phase: str, storage: str) -> None:
    model = make(phase, storage)
    loss_of(model(x())).backward()
    for twin in copies(model).values():
        twin.zero_grad()
        check_gradients(twin, phase, x())


def test_a_phase_of_a_copy_does_not_refuse_for_the_originals_backward() -> None:
    model = make("sparse")
    loss = loss_of(model(x()))
    twin = copy.deepcopy(model)
    set_phase(twin, "dense")
    with pytest.raises(PhaseError):
        set_phase(model, "dense")
    loss.backward()


def test_load_in_the_sparse_phase_applies_the_mask() -> None:
    model = make("sparse")
    model.load_state_dict(Net().state_dict())
    for m in managed_weights(model).values():
        assert (m.parameter[~m.entry.mask()] == 0).all()
        assert (m.parameter[m.entry.mask()] != 0).all()


# Moves and casts


@everywhere
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_change_of_dtype(phase: str, storage: str, dtype: torch.dtype) -> None:
    model = make(phase, storage)
    bits = [m.entry.bits for m in managed_weights(model).values()]
    want = model(x()).detach()
    model.to(dtype)
    out = model(x().to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.detach().float(), want, rtol=0.05, atol=0.05)
    for m, old in zip(managed_weights(model).values(), bits):
        assert m.entry.bits is None if old is None else torch.equal(m.entry.bits, old)
    tol = 1e-6 if dtype == torch.float64 else 0.2 if dtype == torch.bfloat16 else 0.05
    check_gradients(model, phase, x().to(dtype), tol=tol)


@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_theta_keeps_its_precision_when_the_weights_lose_theirs(storage: str) -> None:
    model = make("resu", storage)
    exact = {n: m.entry.dense(m.parameter).clone() for n, m in managed_weights(model).items()}
    loss_of(model(x())).backward()
    gradients = {n: m.entry.anchor.grad.clone() for n, m in managed_weights(model).items()}
    model.bfloat16()
    for name, m in managed_weights(model).items():
        assert m.entry.theta.dtype == torch.float32
        torch.testing.assert_close(m.entry.theta.detach().double(), gathered(m.entry, exact[name]), rtol=0, atol=0)
        assert torch.equal(m.entry.anchor.grad, gradients[name])


@everywhere
def test_to_meta(phase: str, storage: str) -> None:
    model = make(phase, storage)
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())
    for m in managed_weights(model).values():
        for name in m.entry.TENSORS:
            value = getattr(m.entry, name)
            assert value is None or value.is_meta
    if storage == "resident":
        assert model(torch.randn(4, 16, device="meta")).shape == (4, 5)


def test_share_memory_and_train_eval() -> None:
    model = make("sparse").share_memory()
    assert model.eval().training is False
    assert model.blocks[0].up.training is False
    assert model.train().blocks[0].up.training is True
    check_gradients(model, "sparse", x())
