"""Ordinary code on a transformed model, in eager, in every training phase and both storages."""

import copy
import io
import pickle

import pytest
import torch
from fxresu_testing import EAGER, Net, check_gradients, gathered, in_phase, loss_of, reference_gradients
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize

import fxresu
from fxresu.errors import PhaseError
from fxresu.model_state import managed_weights, state_of
from fxresu.phases import set_phase

RESIDENT = [("dense", "resident"), ("sparse", "resident"), ("resu", "resident")]
ALL = [*RESIDENT, ("resu", "packed")]
everywhere = pytest.mark.parametrize(("phase", "storage"), ALL)
resident = pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])


def make(phase: str, storage: str = "resident", compile: object = False, **kwargs) -> Net:
    torch.manual_seed(0)
    return in_phase(fxresu.transform(Net(**kwargs), storage=storage, compile=compile), phase)


def x() -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


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


# torch.func


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


# Gradients


@everywhere
def test_clip_grad_norm(phase: str, storage: str) -> None:
    model = make(phase, storage)
    loss_of(model(x())).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm.isfinite()
    again = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(again, torch.tensor(0.01), rtol=1e-3, atol=1e-5)


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


@resident
def test_autograd_grad_gives_the_dense_gradient_and_leaves_nothing_behind(phase: str) -> None:
    model = make(phase)
    weight = model.blocks[0].up.weight
    _, expected = reference_gradients(model, x())
    (got,) = torch.autograd.grad(loss_of(model(x())), [weight])
    torch.testing.assert_close(got.double(), expected["blocks.0.up.weight"], rtol=1e-4, atol=1e-4)
    assert weight.grad is None


def test_load_in_the_sparse_phase_applies_the_mask() -> None:
    model = make("sparse")
    model.load_state_dict(Net().state_dict())
    for m in managed_weights(model).values():
        assert (m.parameter[~m.entry.mask()] == 0).all()
        assert (m.parameter[m.entry.mask()] != 0).all()


def test_forward_hooks_run_once_a_call() -> None:
    model = make("sparse", compile=EAGER)
    calls = []
    model.register_forward_hook(lambda module, args, out: calls.append("root"))
    model.blocks[0].register_forward_pre_hook(lambda module, args: calls.append("block"))
    model(x())
    assert sorted(calls) == ["block", "root"]


def test_a_phase_of_a_copy_does_not_refuse_for_the_originals_backward() -> None:
    model = make("sparse")
    loss = loss_of(model(x()))
    twin = copy.deepcopy(model)
    set_phase(twin, "dense")
    with pytest.raises(PhaseError):
        set_phase(model, "dense")
    loss.backward()
