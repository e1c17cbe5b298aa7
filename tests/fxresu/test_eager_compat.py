"""Ordinary code on a transformed model, in eager, in every training phase and both storages."""

import copy

import pytest
import torch
from fxresu_eager import everywhere, make, resident, x
from fxresu_testing import EAGER, Net, check_gradients, gathered, in_phase, loss_of, reference_gradients
from torch import nn
from torch.nn.utils import parametrize

import fxresu
from fxresu.model_state import managed_weights


@everywhere
def test_gradients_are_the_phases(phase: str, storage: str) -> None:
    check_gradients(make(phase, storage), phase, x())


@everywhere
def test_two_backwards_accumulate(phase: str, storage: str) -> None:
    check_gradients(make(phase, storage), phase, x(), accumulated=2)


@everywhere
@pytest.mark.parametrize("recompute", ["reentrant", "on"])
def test_checkpoint(phase: str, storage: str, recompute: str) -> None:
    model = make(phase, storage, recompute=recompute)
    # Reentrant checkpointing gives no gradient to a region whose inputs need none.
    inputs = x().requires_grad_()
    plain = copy.deepcopy(model)
    plain.recompute = ""
    _, expected = reference_gradients(plain, x())
    loss_of(model(inputs)).backward()
    for name, managed in managed_weights(model).items():
        entry = managed.entry
        if phase == "resu":
            assert managed.parameter.grad is None
            want = gathered(entry, expected[name])
            torch.testing.assert_close(entry.anchor.grad.double(), want, rtol=1e-4, atol=1e-4)
        else:
            want = expected[name] * entry.mask() if phase == "sparse" else expected[name]
            torch.testing.assert_close(managed.parameter.grad.double(), want, rtol=1e-4, atol=1e-4)


@resident
def test_reads_give_the_parameter_itself(phase: str) -> None:
    model = make(phase)
    weight = model.blocks[0].up.weight
    assert type(weight) is nn.Parameter
    assert model.get_parameter("blocks.0.up.weight") is weight
    assert dict(model.named_parameters())["blocks.0.up.weight"] is weight
    assert weight is managed_weights(model)["blocks.0.up.weight"].parameter
    assert hasattr(model.blocks[0].up, "weight")
    assert not hasattr(model.blocks[0].up, "weigh")
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(flat * 1, model.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), flat)


def test_a_packed_read_is_the_effective_weight_and_the_stand_in_is_nan() -> None:
    resident, packed = make("resu"), make("resu", "packed")
    assert torch.equal(packed.blocks[0].up.weight, resident.blocks[0].up.weight)
    stand_in = dict(packed.named_parameters())["blocks.0.up.weight"]
    assert stand_in.isnan().all()
    assert stand_in.untyped_storage().nbytes() == 4
    assert all(torch.equal(a, b) for a, b in zip(packed.state_dict().values(), resident.state_dict().values()))


@resident
def test_an_optimizer_of_one_weight(phase: str) -> None:
    model = make(phase)
    weight = model.blocks[0].up.weight
    optimizer = torch.optim.SGD([weight], lr=0.1)
    before = weight.detach().clone()
    loss_of(model(x())).backward()
    optimizer.step()
    assert torch.equal(weight, before) == (phase == "resu")


@everywhere
def test_requires_grad_can_be_switched_off_and_on(phase: str, storage: str) -> None:
    model = make(phase, storage)
    model.requires_grad_(False)
    out = model(x())
    assert not out.requires_grad
    model.requires_grad_(True)
    check_gradients(model, phase, x())


@resident
def test_tying_after_the_transform(phase: str) -> None:
    model = make("dense")
    model.blocks[1].up.weight = model.blocks[0].up.weight
    assert model.blocks[1].up.weight is model.blocks[0].up.weight
    assert "blocks.1.up.weight" not in dict(model.named_parameters())
    in_phase(model, phase)
    assert list(managed_weights(model)) == ["blocks.0.up.weight", "blocks.0.down.weight", "blocks.1.down.weight"]
    assert model.blocks[0].up._fxresu["weight"] is model.blocks[1].up._fxresu["weight"]
    check_gradients(model, phase, x())


@resident
def test_untying_after_the_transform(phase: str) -> None:
    model = make("dense")
    model.blocks[1].up.weight = model.blocks[0].up.weight
    in_phase(model, phase)
    model.blocks[1].up.weight = nn.Parameter(model.blocks[0].up.weight.detach().clone())
    assert list(managed_weights(model))[2] == "blocks.1.up.weight"
    first, second = (managed_weights(model)[f"blocks.{i}.up.weight"].entry for i in (0, 1))
    assert first is not second
    check_gradients(model, phase, x())
    if phase == "resu":
        assert torch.equal(first.bits, second.bits) and not torch.equal(first.anchor.grad, second.anchor.grad)


def test_to_empty_unties_as_it_does_without_fxresu() -> None:
    with torch.device("meta"):
        model = Net()
        model.blocks[1].up.weight = model.blocks[0].up.weight
        fxresu.transform(model, compile=False)
    assert len(managed_weights(model)) == 3
    model.to_empty(device="cpu").load_state_dict(Net().state_dict())
    assert len(managed_weights(model)) == 4
    check_gradients(in_phase(model, "resu"), "resu", x())


@resident
def test_a_new_parameter_in_place_of_a_managed_one(phase: str) -> None:
    model = make("dense")
    model.blocks[0].up.weight = nn.Parameter(torch.randn(32, 16))
    in_phase(model, phase)
    check_gradients(model, phase, x())


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


@resident
def test_parametrizing_an_unmanaged_module(phase: str) -> None:
    model = make(phase)
    parametrize.register_parametrization(model.head, "weight", Double())
    check_gradients(model, phase, x())
    assert len(managed_weights(model)) == 4


@resident
def test_parametrizing_a_managed_module_and_back(phase: str) -> None:
    model = make(phase)
    up = model.blocks[0].up
    before = up.weight.detach().clone()
    parametrize.register_parametrization(up, "weight", Double())
    assert torch.equal(up.weight, 2 * before)
    assert "blocks.0.up.weight" not in managed_weights(model)
    if phase == "dense":
        check_gradients(model, phase, x())
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x()), model(x()))
    model.load_state_dict(twin.state_dict())
    parametrize.remove_parametrizations(up, "weight", leave_parametrized=False)
    assert torch.equal(up.weight, before)
    assert "blocks.0.up.weight" in managed_weights(model)
    check_gradients(model, phase, x())


@resident
def test_weight_norm_and_spectral_norm(phase: str) -> None:
    model = make(phase)
    want = model(x()).detach()
    nn.utils.parametrizations.weight_norm(model.blocks[0].up)
    torch.testing.assert_close(model(x()).detach(), want)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.blocks[0].down)
    torch.testing.assert_close(model(x()).detach(), want)
    nn.utils.remove_weight_norm(model.blocks[0].down)
    assert type(model.blocks[0].down.weight) is nn.Parameter
    torch.testing.assert_close(model(x()).detach(), want)
    nn.utils.parametrizations.spectral_norm(model.blocks[1].up)
    assert model(x()).isfinite().all()


def test_torchs_own_pruning_on_a_managed_module() -> None:
    import torch.nn.utils.prune as torch_prune

    model = make("dense")
    up = model.blocks[0].up
    torch_prune.l1_unstructured(up, "weight", amount=0.25)
    assert (up.weight == 0).sum() == 128
    loss_of(model(x())).backward()
    assert (up.weight_orig.grad[up.weight == 0] == 0).all()
    torch_prune.remove(up, "weight")
    assert type(up.weight) is nn.Parameter
    assert "blocks.0.up.weight" in managed_weights(model)


def test_deleting_a_parameter_behaves_as_on_any_module() -> None:
    model = make("dense")
    up = model.blocks[0].up
    del up.weight
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'weight'"):
        up.weight  # noqa: B018
    with pytest.raises(AttributeError):
        del up.weight
    up.weight = torch.ones(32, 16)
    assert torch.equal(up.weight, torch.ones(32, 16))
    assert "blocks.0.up.weight" not in model.state_dict()
    del up.weight
    up.register_buffer("weight", torch.zeros(32, 16))
    assert torch.equal(up.weight, torch.zeros(32, 16))


@everywhere
def test_clip_grad_norm(phase: str, storage: str) -> None:
    model = make(phase, storage)
    loss_of(model(x())).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm.isfinite()
    again = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(again, torch.tensor(0.01), rtol=1e-3, atol=1e-5)


@resident
def test_autograd_grad_gives_the_dense_gradient_and_leaves_nothing_behind(phase: str) -> None:
    model = make(phase)
    weight = model.blocks[0].up.weight
    _, expected = reference_gradients(model, x())
    (got,) = torch.autograd.grad(loss_of(model(x())), [weight])
    torch.testing.assert_close(got.double(), expected["blocks.0.up.weight"], rtol=1e-4, atol=1e-4)
    assert weight.grad is None


def test_forward_hooks_run_once_a_call() -> None:
    model = make("sparse", compile=EAGER)
    calls = []
    model.register_forward_hook(lambda module, args, out: calls.append("root"))
    model.blocks[0].register_forward_pre_hook(lambda module, args: calls.append("block"))
    model(x())
    assert sorted(calls) == ["block", "root"]
