"""Eager linears of few tokens: the phase's gradient without a dense one, for whoever asks for it in whichever way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from fxresu_eager import make, x
from fxresu_testing import Net, check_gradients, gathered, in_phase, loss_of, reference_gradients
from torch import Tensor, nn

import fxresu
from fxresu import few_linear
from fxresu.model_state import managed_weights

phases = pytest.mark.parametrize("phase", ["sparse", "resu"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Small weights on a CPU count as large ones on a GPU; what their linears called."""
    found: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Tensor]:
        function = getattr(few_linear, name)

        def call(*args: object) -> Tensor:
            found[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(few_linear, "SMALLEST", 0)
    monkeypatch.setattr(few_linear, "_on_gpu", lambda x: True)
    for name in ("grad_gather", "grad_masked"):
        monkeypatch.setattr(few_linear, name, counting(name))
    return found


def node_of(y: Tensor) -> str:
    return type(y.grad_fn).__name__


OF_PHASE = {"sparse": "grad_masked", "resu": "grad_gather"}


@phases
def test_gradients_are_the_phases(phase: str, calls: Counter[str]) -> None:
    model = make(phase)
    check_gradients(model, phase, x(), accumulated=2)
    weights = len(managed_weights(model))
    assert calls == {OF_PHASE[phase]: 2 * weights}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@phases
def test_weights_in_low_precision(phase: str, dtype: torch.dtype, calls: Counter[str]) -> None:
    """Gradients come from float32 sums and are rounded once."""
    torch.manual_seed(0)
    layer = fxresu.transform(nn.Sequential(nn.Linear(40, 24, dtype=dtype)), include="0.weight", compile=False)
    in_phase(layer, phase)
    (managed,) = managed_weights(layer).values()
    inputs, dy = torch.randn(7, 40, dtype=dtype), torch.randn(7, 24, dtype=dtype)
    layer(inputs).backward(dy)
    dense = dy.double().t() @ inputs.double()
    if phase == "resu":
        got, wanted = managed.entry.anchor.grad, gathered(managed.entry, dense)
        assert got.dtype == managed.entry.anchor.dtype
    else:
        got, wanted = managed.parameter.grad, dense.where(managed.entry.mask(), 0)
    torch.testing.assert_close(got.double(), wanted, rtol=2**-7, atol=1e-6)
    assert calls == {OF_PHASE[phase]: 1}


@phases
def test_the_weights_own_gradient_is_dense(phase: str, calls: Counter[str]) -> None:
    """`torch.autograd.grad` gives what it gives for any model, and adds to nothing."""
    model = make(phase)
    weight = model.blocks[0].up.weight
    _, expected = reference_gradients(model, x())
    (got,) = torch.autograd.grad(loss_of(model(x())), [weight])
    torch.testing.assert_close(got.double(), expected["blocks.0.up.weight"], rtol=1e-4, atol=1e-4)
    assert weight.grad is None and not calls[OF_PHASE[phase]]
    assert all(m.entry.grad_of_theta() is None for m in managed_weights(model).values())


@phases
def test_a_backward_for_chosen_leaves(phase: str, calls: Counter[str]) -> None:
    """Only what is asked for gets a gradient, the phase's one."""
    model = make(phase)
    chosen = model.blocks[0].up.weight
    _, expected = reference_gradients(model, x())
    loss_of(model(x())).backward(inputs=[chosen])
    entries = {n: m.entry for n, m in managed_weights(model).items()}
    entry, wanted = entries.pop("blocks.0.up.weight"), expected["blocks.0.up.weight"]
    if phase == "resu":
        assert chosen.grad is None
        torch.testing.assert_close(entry.anchor.grad.double(), gathered(entry, wanted), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(chosen.grad.double(), wanted.where(entry.mask(), 0), rtol=1e-4, atol=1e-4)
    others = [p for p in model.parameters() if p is not chosen]
    assert all(t is None for t in (*(p.grad for p in others), *(e.grad_of_theta() for e in entries.values())))


@phases
def test_second_gradients(phase: str, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty on the gradient of the inputs reaches what trains, as without these kernels."""
    found = []
    for smallest in (0, 2**62):
        monkeypatch.setattr(few_linear, "SMALLEST", smallest)
        model, inputs = make(phase), x().requires_grad_()
        assert ("FewLinear" in node_of(model.blocks[0].up(x()))) == (smallest == 0)
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        found.append([inputs.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        found[-1] += [m.entry.anchor.grad for m in managed_weights(model).values() if phase == "resu"]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@phases
def test_a_recorded_backward_gives_the_phases_gradient(phase: str, calls: Counter[str]) -> None:
    model = make(phase)
    _, expected = reference_gradients(model, x())
    loss_of(model(x())).backward(create_graph=True)
    for name, managed in managed_weights(model).items():
        entry = managed.entry
        if phase == "resu":
            assert managed.parameter.grad is None
            got, wanted = entry.anchor.grad, gathered(entry, expected[name])
        else:
            got, wanted = managed.parameter.grad, expected[name].where(entry.mask(), 0)
        torch.testing.assert_close(got.detach().double(), wanted, rtol=1e-4, atol=1e-4)
        managed.parameter.grad = None  # a recorded gradient holds the graph that holds it
        if entry.anchor is not None:
            entry.anchor.grad = None


def looked_at(model: Net) -> None:
    for managed in managed_weights(model).values():
        managed.parameter.register_hook(lambda grad: None)


def watched(model: Net) -> None:
    for managed in managed_weights(model).values():
        managed.parameter.register_post_accumulate_grad_hook(lambda parameter: None)


@pytest.mark.parametrize(
    ("phase", "change", "inputs"),
    [
        ("dense", None, x()),
        ("resu", None, x().repeat(17, 1)),  # 68 tokens
        ("resu", None, x().t().contiguous().t()),
        ("resu", looked_at, x()),
        ("sparse", watched, x()),
    ],
)
def test_left_alone(phase: str, change: Callable[[Net], None] | None, inputs: Tensor, calls: Counter[str]) -> None:
    """Other phases, more tokens, strided inputs, and weights whose gradient others look at."""
    model = make(phase)
    first = model.blocks[0].up
    if change is not None:
        change(model)
    layer = first if change is None else model
    loss_of(layer(inputs)).backward()
    assert not calls


@phases
def test_left_alone_without_gradients_and_under_autocast(phase: str, calls: Counter[str]) -> None:
    model = make(phase)
    with torch.no_grad():
        model(x())
    with torch.autocast("cpu", torch.bfloat16):
        model(x()).float().sum().backward()
    assert not calls


def test_left_alone_for_some_inputs_as_candidates(calls: Counter[str]) -> None:
    model = in_phase(fxresu.transform(Net(128, 128), candidates=0.5, compile=False), "resu")
    loss_of(model(torch.randn(4, 128))).backward()
    assert not calls and all(m.entry.anchor.grad is not None for m in managed_weights(model).values())


def test_small_weights_and_cpus_are_left_alone() -> None:
    """They wait for launches, or have no kernels."""
    assert not few_linear._on_gpu(torch.zeros(1)) and few_linear.SMALLEST > 4096


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@phases
def test_on_a_gpu(phase: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large layer on 33 tokens against float64, without a dense gradient in memory."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(2048, 1024, device="cuda", dtype=dtype))
    fxresu.transform(layer, include="0.weight", compile=False)
    in_phase(layer, phase)
    (managed,) = managed_weights(layer).values()
    inputs = torch.randn(3, 11, 2048, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 11, 1024, device="cuda", dtype=dtype)
    layer(inputs).backward(dy)  # makes the workspaces of products
    layer.zero_grad()
    inputs.grad = None
    y = layer(inputs)
    assert node_of(y) == "_FewLinearBackward"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y.backward(dy)
    if phase == "resu" and dtype == torch.float32:
        assert torch.cuda.max_memory_allocated() - before < managed.parameter.nbytes
    flat, weight = inputs.detach().double().view(33, 2048), managed.entry.dense(managed.parameter).double()
    dense = dy.double().view(33, 1024).t() @ flat
    if phase == "resu":
        assert managed.parameter.grad is None
        got, wanted = managed.entry.anchor.grad, gathered(managed.entry, dense)
    else:
        got, wanted = managed.parameter.grad, dense.where(managed.entry.mask(), 0)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.2}
    torch.testing.assert_close(got.double(), wanted.to(got.device), **tolerance)
    wanted = flat @ weight.t() + layer[0].bias.detach().double()
    torch.testing.assert_close(y.detach().double().view(33, 1024), wanted, **tolerance)
    torch.testing.assert_close(inputs.grad.double().view(33, 2048), dy.double().view(33, 1024) @ weight, **tolerance)
