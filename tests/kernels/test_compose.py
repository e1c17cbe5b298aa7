"""Compose and the packed linear: values, gradients, what is saved, and what the compilers see."""

import pytest
import torch
from functorch.compile import aot_function, default_partition, make_boxed_func, min_cut_rematerialization_partition
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fxresu.kernels import (
    compose,
    gather,
    pack,
    pack_active,
    packed_linear,
    row_counts,
    row_starts,
    scatter,
)
from fxresu.kernels._triton import INTERPRET

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COMPACT = ["row", "row+3", "layer", "layer+5"]


@pytest.fixture(params=COMPACT)
def compact(request, size, make):
    return make(*size, layout=request.param)


def _packed(problem, weight: torch.Tensor, dtype: torch.dtype = torch.float32):
    """(active, theta) that hold `weight`, with padding that must not be read."""
    active = problem.gathered(weight, dtype, active=True)
    theta = problem.gathered(weight, dtype)
    for tensor, entries in ((active, problem.active_entries), (theta, problem.entries)):
        padding = torch.ones(tensor.numel(), dtype=torch.bool)
        padding[[slot for _, _, slot in entries]] = False
        tensor.view(-1)[padding.to(tensor.device)] = 7.0
    return active, theta


def _compose(problem, active, theta, dtype=torch.float32, **options):
    return compose(
        active,
        theta,
        problem.bits,
        problem.active_start,
        None if theta is None else problem.row_start,
        problem.mask.shape[1],
        dtype,
        **options,
    )


def test_compose_is_the_weight(compact, poisoned) -> None:
    weight = compact.dense()
    active, theta = _packed(compact, weight)
    assert torch.equal(_compose(compact, active, theta), weight)
    assert torch.equal(_compose(compact, active, None), torch.where(compact.mask, weight, 0))


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_cast(make, same, source: torch.dtype, target: torch.dtype) -> None:
    if INTERPRET and (source, target) == (torch.float64, torch.bfloat16):
        pytest.skip("the interpreter of triton cannot convert float64 to bfloat16")
    problem = make(3, 70, 0.5)
    weight = problem.dense(source)
    assert same(_compose(problem, *_packed(problem, weight, source), target), weight.to(target))


def test_use_and_anchor_change_nothing(make) -> None:
    problem = make(3, 70, 0.5)
    active, theta = _packed(problem, problem.dense())
    reference = _compose(problem, active, theta)
    assert torch.equal(_compose(problem, active, theta, use=1, anchor=torch.ones(3, device=problem.device)), reference)


@pytest.mark.parametrize("layout", ["row+3", "layer+5"])
def test_gradients(make, layout: str) -> None:
    problem = make(2, 9, 0.5, layout)
    active, theta = (t.requires_grad_() for t in _packed(problem, problem.dense(torch.float64), torch.float64))
    assert torch.autograd.gradcheck(lambda a, t: _compose(problem, a, t, torch.float64), (active, theta))
    x = torch.randn((3, 9), dtype=torch.float64, device=problem.device).requires_grad_()
    bias = torch.randn(2, dtype=torch.float64, device=problem.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, t, b: _linear(problem, x, a, t, b), (x, active, theta, bias))


@given(st.integers(1, 4), st.integers(1, 80), st.floats(0, 1), st.booleans(), st.integers(0, 3), st.integers(0, 2**32))
def test_compose_undoes_packing(rows: int, K: int, density: float, rowwise: bool, slack: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = pack(torch.rand((rows, K), generator=generator) < density)
    weight = torch.randn((rows, K), generator=generator)
    kept, pruned = row_counts(bits, K), row_counts(bits, K, invert=True)
    a_shape = (rows, int(kept.max()) + slack) if rowwise else (1, int(kept.sum()) + slack)
    t_shape = (rows, int(pruned.max()) + slack) if rowwise else (1, int(pruned.sum()) + slack)
    a_start, t_start = row_starts(kept, a_shape), row_starts(pruned, t_shape)
    active = pack_active(weight, bits, a_start, a_shape)
    theta = gather(weight, bits, t_start, None, t_shape)
    whole = compose(active, theta, bits, a_start, t_start, K, torch.float32)
    assert torch.equal(whole, weight)
    part = compose(active, None, bits, a_start, None, K, torch.float32)
    assert torch.equal(part + scatter(theta, bits, t_start, None, K), weight)


def test_opcheck(make) -> None:
    problem = make(3, 40, 0.5, "row+3")
    active, theta = (t.requires_grad_() for t in _packed(problem, problem.dense()))
    arguments = (problem.bits, problem.active_start, problem.row_start, 40, torch.bfloat16, 1, None)
    torch.library.opcheck(torch.ops.fxresu.compose, (active, theta, *arguments))
    torch.library.opcheck(
        torch.ops.fxresu.compose,
        (active, None, problem.bits, problem.active_start, None, 40, torch.float32, 0, active.detach()),
    )


# --- linear ----------------------------------------------------------------------------------------------------------


def _linear(problem, x, active, theta, bias=None):
    rows, K = problem.mask.shape
    return packed_linear(
        x,
        active,
        theta,
        problem.bits,
        problem.active_start,
        None if theta is None else problem.row_start,
        bias,
        rows,
        K,
    )


def _reference(problem, weight, x, bias):
    return torch.nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (0,), (2, 1, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_equals_dense(make, shape: tuple[int, ...], with_bias: bool) -> None:
    problem = make(6, 40, 0.5, "row+3")
    weight = problem.dense().requires_grad_()
    active, theta = (t.requires_grad_() for t in _packed(problem, weight.detach()))
    bias = torch.randn(6, device=problem.device).requires_grad_() if with_bias else None
    x = torch.randn((*shape, 40), device=problem.device).requires_grad_()
    y = _linear(problem, x, active, theta, bias)
    inputs = [x, active, theta] + ([bias] if with_bias else [])
    grads = torch.autograd.grad(y.square().sum(), inputs)
    dense = _reference(problem, weight, x, bias)
    assert y.shape == dense.shape
    torch.testing.assert_close(y, dense)
    expected = torch.autograd.grad(dense.square().sum(), [x, weight] + ([bias] if with_bias else []))
    torch.testing.assert_close(grads[0], expected[0])
    torch.testing.assert_close(grads[1], problem.gathered(expected[1], torch.float32, active=True))
    torch.testing.assert_close(grads[2], problem.gathered(expected[1], torch.float32))
    if with_bias:
        torch.testing.assert_close(grads[3], expected[2])


def test_linear_without_theta_has_zeros(make) -> None:
    problem = make(6, 40, 0.5)
    weight = problem.dense()
    active, _ = _packed(problem, weight)
    x = torch.randn((4, 40), device=problem.device).requires_grad_()
    y = _linear(problem, x, active, None)
    torch.testing.assert_close(y, x @ torch.where(problem.mask, weight, 0).t())
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(problem.mask, weight, 0).sum(0).expand(4, 40))


def test_frozen_operands_get_no_gradient_and_no_work(make) -> None:
    problem = make(6, 40, 0.5)
    active, theta = _packed(problem, problem.dense())
    x = torch.randn((4, 40), device=problem.device)
    with FlopCounterMode(display=False) as flops:
        y = _linear(problem, x, active, theta.requires_grad_())
        y.sum().backward()
    assert theta.grad is not None and active.grad is None
    assert flops.get_total_flops() == 2 * 2 * 4 * 40 * 6  # y and dW, no dX


def test_autocast_and_gradient_dtypes(make) -> None:
    problem = make(6, 40, 0.5)
    weight = problem.dense()
    active, theta = (t.requires_grad_() for t in _packed(problem, weight))
    x = torch.randn((4, 40), device=problem.device).requires_grad_()
    bias = torch.randn(6, device=problem.device).requires_grad_()
    with torch.autocast(problem.device, dtype=torch.bfloat16):
        y = _linear(problem, x, active, theta, bias)
        dense = torch.nn.functional.linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, dense, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert [t.grad.dtype for t in (x, active, theta, bias)] == [torch.float32] * 4
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 40), rtol=3e-2, atol=3e-2)


def test_eager_saves_no_dense_weight(make) -> None:
    problem = make(48, 64, 0.5)
    active, theta = (t.requires_grad_() for t in _packed(problem, problem.dense()))
    x = torch.randn((4, 64), device=problem.device).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _linear(problem, x, active, theta)
    assert saved and all(t.shape != (48, 64) for t in saved)
    assert {t.data_ptr() for t in saved if t.is_floating_point()} == {t.data_ptr() for t in (x, active, theta)}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])
def test_compiled_graphs_compose_twice_and_save_no_dense_weight(make, partition, autocast: bool) -> None:
    problem = make(48, 64, 0.5, "layer")
    active, theta = _packed(problem, problem.dense())
    x = torch.randn((2, 4, 64), device=problem.device).requires_grad_()
    graphs: dict[str, torch.fx.GraphModule] = {}

    def keep(name: str):
        def compiler(graph, _inputs):
            graphs[name] = graph
            return make_boxed_func(graph.forward)

        return compiler

    def function(x, active, theta, bits, active_start, row_start):
        with torch.autocast(problem.device, dtype=torch.bfloat16, enabled=autocast):
            return packed_linear(x, active, theta, bits, active_start, row_start, None, 48, 64).float().sin()

    compiled = aot_function(function, keep("forward"), keep("backward"), partition_fn=partition)
    operands = (problem.bits, problem.active_start, problem.row_start)
    theta.requires_grad_()
    y = compiled(x, active, theta, *operands)
    y.sum().backward()
    dx, dtheta = x.grad.clone(), theta.grad.clone()
    x.grad = theta.grad = None
    eager = function(x, active, theta, *operands)
    eager.sum().backward()
    torch.testing.assert_close(y, eager)
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dtheta, theta.grad)

    for graph in graphs.values():
        targets = [str(node.target) for node in graph.graph.nodes]
        assert targets.count("fxresu.compose.default") == 1
        assert any(target.startswith("aten.mm") for target in targets)
    (outputs,) = [node for node in graphs["forward"].graph.nodes if node.op == "output"]
    assert all(tuple(node.meta["val"].shape) != (48, 64) for node in outputs.args[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(make, backend: str) -> None:
    torch._dynamo.reset()
    problem = make(6, 40, 0.5, "row+3")
    active, theta = (t.requires_grad_() for t in _packed(problem, problem.dense()))
    x = torch.randn((3, 40), device=problem.device).requires_grad_()
    bias = torch.randn(6, device=problem.device).requires_grad_()

    def function(x, active, theta, bias):
        return _linear(problem, x, active, theta, bias).relu()

    y = torch.compile(function, backend=backend, fullgraph=True)(x, active, theta, bias)
    grads = torch.autograd.grad(y.square().sum(), [x, active, theta, bias])
    eager = function(x, active, theta, bias)
    torch.testing.assert_close(y, eager)
    for ours, theirs in zip(grads, torch.autograd.grad(eager.square().sum(), [x, active, theta, bias])):
        torch.testing.assert_close(ours, theirs)


def test_functional_transforms_are_refused(make) -> None:
    """A documented limit that has to stay an error: it must never become a wrong gradient."""
    problem = make(6, 40, 0.5)
    active, theta = _packed(problem, problem.dense())
    x = torch.randn((3, 40), device=problem.device)
    with pytest.raises(NotImplementedError):
        torch.func.grad(lambda t: _linear(problem, x, active, t).square().sum())(theta)


def test_bad_arguments_are_named(make) -> None:
    problem = make(6, 40, 0.5)
    active, theta = _packed(problem, problem.dense())
    with pytest.raises(ValueError, match="x must have 40"):
        _linear(problem, torch.randn((3, 39), device=problem.device), active, theta)
    with pytest.raises(ValueError, match="bits must have 7 rows"):
        packed_linear(
            torch.randn((3, 40), device=problem.device),
            active,
            theta,
            problem.bits,
            problem.active_start,
            problem.row_start,
            None,
            7,
            40,
        )
    with pytest.raises(ValueError, match="row_start"):
        compose(active, theta, problem.bits, problem.active_start, None, 40, torch.float32)
    with pytest.raises(ValueError, match="active"):
        compose(active.int(), theta, problem.bits, problem.active_start, problem.row_start, 40, torch.float32)
