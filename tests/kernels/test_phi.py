"""Gather and scatter between dense matrices and theta-like tensors, against loops from the definition."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fxresu.kernels import (
    compose,
    count,
    gather,
    gather_add_,
    pack,
    pack_active,
    row_counts,
    row_starts,
    scatter,
    scatter_,
    unpack,
)
from fxresu.kernels._registry import unobserved
from fxresu.kernels._triton import INTERPRET

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_gather(problem, poisoned) -> None:
    dense = problem.dense()
    assert torch.equal(gather(dense, *problem.layout, problem.shape), problem.gathered(dense, torch.float32))


def test_scatter(problem, poisoned) -> None:
    theta = problem.theta_like(padding=7.0)  # padding must not reach the matrix
    K = problem.mask.shape[1]
    expected = problem.scattered(torch.zeros(problem.mask.shape), theta)
    assert torch.equal(scatter(theta, *problem.layout, K), expected)


def test_scatter_in_place_touches_candidates_only(problem) -> None:
    weight, theta = problem.dense(), problem.theta_like(padding=7.0)
    weight[problem.mask] = float("nan")
    expected = problem.scattered(weight, theta)
    assert scatter_(weight, theta, *problem.layout) is weight
    assert torch.equal(weight.view(torch.int32), expected.view(torch.int32))


def test_gather_add(problem) -> None:
    dense, out = problem.dense(), problem.theta_like()
    expected = out + problem.gathered(dense, torch.float32)
    assert gather_add_(out, dense, *problem.layout) is out
    assert torch.equal(out, expected)


class _Seen(TorchDispatchMode):
    """Names of the operations that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_gathering_without_the_dispatcher_is_the_operation(problem) -> None:
    dense, out = problem.dense(), problem.theta_like()
    again = out.clone()
    with torch.no_grad():
        straight = gather(dense, *problem.layout, problem.shape)
        version = out._version
        gather_add_(out, dense, *problem.layout)
        assert out._version > version
        with _Seen() as seen:
            assert torch.equal(gather(dense, *problem.layout, problem.shape), straight)
            assert torch.equal(gather_add_(again, dense, *problem.layout), out)
    assert seen.names.count("fxresu::gather") == 1 and seen.names.count("fxresu::gather_add_") == 1


def test_functional_transforms_see_the_operation(make) -> None:
    problem = make(3, 40, 0.5, "row+3")
    dense = problem.dense()
    weights = torch.randn(2, device=dense.device)

    def gathered(weight: torch.Tensor) -> torch.Tensor:
        assert not unobserved(dense * weight)  # of a plain tensor's type, without memory of its own
        return gather(dense * weight, *problem.layout, problem.shape)

    with torch.no_grad():
        both = torch.func.vmap(gathered)(weights)
        assert torch.equal(both, torch.stack([gather(dense * w, *problem.layout, problem.shape) for w in weights]))


def test_pack_active(problem, poisoned) -> None:
    dense = problem.dense()
    packed = pack_active(dense, problem.bits, problem.active_start, problem.active_shape)
    assert torch.equal(packed, problem.gathered(dense, torch.float32, active=True))


@pytest.mark.parametrize("layout", ["row+3", "layer+5", "panel"])
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_dtypes(make, same, source: torch.dtype, target: torch.dtype, layout: str) -> None:
    if INTERPRET and (source, target) == (torch.float64, torch.bfloat16):
        pytest.skip("the interpreter of triton cannot convert float64 to bfloat16")
    problem = make(3, 70, 0.5, layout)
    dense = problem.dense(source)
    assert same(gather(dense, *problem.layout, problem.shape, target), problem.gathered(dense, target))
    theta = problem.theta_like(source)
    zeros = torch.zeros((3, 70), dtype=target)
    assert same(scatter(theta, *problem.layout, 70, target), problem.scattered(zeros, theta))
    weight = problem.dense(target)
    expected = problem.scattered(weight, theta)
    assert same(scatter_(weight, theta, *problem.layout), expected)
    out = problem.theta_like(target)
    wide = torch.float64 if torch.float64 in (source, target) else torch.float32
    expected = (out.to(wide) + problem.gathered(dense, source).to(wide)).to(target)
    assert same(gather_add_(out, dense, *problem.layout), expected)


@pytest.mark.parametrize("layout", ["row", "layer", "panel"])
def test_dense_of_any_strides(make, layout: str) -> None:
    problem = make(6, 40, 0.5, layout)
    dense = problem.dense()
    expected = problem.gathered(dense, torch.float32)
    wide = torch.zeros((6, 80), device=problem.device)
    wide[:, 1::2] = dense
    for view in (dense.t().contiguous().t(), wide[:, 1::2], torch.cat([dense, dense])[6:]):
        assert torch.equal(gather(view, *problem.layout, problem.shape), expected)
        out = torch.zeros(problem.shape, device=problem.device)
        assert torch.equal(gather_add_(out, view, *problem.layout), expected)
    row = dense[:1].expand(6, 40)
    assert torch.equal(gather(row, *problem.layout, problem.shape), problem.gathered(row, torch.float32))


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("layout", ["row+3", "layer+5"])
def test_dense_with_even_strides(make, layout: str, active: bool) -> None:
    """Neither stride is 1: what lies between the elements must not be read for a neighbour."""
    problem = make(6, 80, 0.5, layout)
    wide = torch.full((12, 80 * 16), float("nan"), device=problem.bits.device)
    apart = wide[::2, ::16]
    apart.copy_(problem.dense())
    one = torch.tensor([1.0, *[float("nan")] * 31], device=problem.bits.device)[:1].expand(6, 80)
    for dense in (apart, one):
        if active:
            got = pack_active(dense, problem.bits, problem.active_start, problem.active_shape)
        else:
            got = gather(dense, *problem.layout, problem.shape)
        assert torch.equal(got, problem.gathered(dense.contiguous(), torch.float32, active=active))


@pytest.mark.parametrize("layout", ["row+3", "layer+5", "panel"])
def test_gradients(make, layout: str) -> None:
    problem = make(2, 9, 0.5, layout)
    dense = problem.dense(torch.float64).requires_grad_()
    theta = problem.theta_like(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: gather(d, *problem.layout, problem.shape), dense)
    assert torch.autograd.gradcheck(
        lambda d: pack_active(d, problem.bits, problem.active_start, problem.active_shape), dense
    )
    assert torch.autograd.gradcheck(lambda t: scatter(t, *problem.layout, 9), theta)
    assert torch.autograd.gradgradcheck(lambda t: scatter(t, *problem.layout, 9).square(), theta)


def test_gradients_come_in_the_dtype_of_the_input(make) -> None:
    problem = make(3, 40, 0.5)
    dense = problem.dense(torch.bfloat16).requires_grad_()
    gather(dense, *problem.layout, problem.shape, torch.float32).sum().backward()
    assert dense.grad.dtype == torch.bfloat16
    assert torch.equal(dense.grad, (~problem.mask).to(torch.bfloat16))


def test_in_place_on_a_parameter(make) -> None:
    problem = make(3, 40, 0.5)
    weight = torch.nn.Parameter(problem.dense())
    version = weight._version
    scatter_(weight, problem.theta_like(), *problem.layout)
    assert weight._version > version and weight.is_leaf and weight.requires_grad


def test_no_rows(device) -> None:
    bits = torch.zeros((0, 1), dtype=torch.int32, device=device)
    start = torch.zeros(0, dtype=torch.int64, device=device)
    assert torch.equal(
        gather(torch.zeros((0, 8), device=device), bits, start, None, (1, 4)), torch.zeros((1, 4), device=device)
    )


def test_position_beyond_the_capacity_writes_nothing_foreign(make) -> None:
    """A wrong row_start is an error on the CPU and must at least not write outside the tensor on a GPU."""
    problem = make(3, 40, 0.5)
    beyond = problem.row_start + problem.shape[0] * problem.shape[1]
    guard = torch.zeros(4 * problem.shape[0] * problem.shape[1], device=problem.device)
    out = guard[: problem.shape[0] * problem.shape[1]].view(problem.shape)
    with contextlib.suppress(IndexError):
        gather_add_(out, torch.ones((3, 40), device=problem.device), problem.bits, beyond, None)
    assert not guard.any()


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """2.3e9 elements: the last rows and the last packed entries are where 32-bit arithmetic would go wrong."""
    rows, K = 70_000, 32_768
    dense = torch.zeros((rows, K), dtype=torch.bfloat16, device="cuda")
    dense[-3:] = torch.randn((3, K), device="cuda").bfloat16()
    last = dense[-3:].clone()
    bits = torch.full((rows, K // 32), -1, dtype=torch.int32, device="cuda")
    bits[-2:] = 0
    start = row_starts(row_counts(bits, K, invert=True), (1, 2 * K))
    theta = gather(dense, bits, start, None, (1, 2 * K))
    assert torch.equal(theta.view(2, K), last[1:])
    scatter_(dense, -theta, bits, start, None)
    assert torch.equal(dense[-2:], -last[1:]) and torch.equal(dense[-3], last[0])
    shape = (1, (rows - 2) * K)
    active_start = row_starts(row_counts(bits, K), shape)
    active = pack_active(dense, bits, active_start, shape)
    assert torch.equal(active[0, -K:], last[0]) and not active[0, :-K].any()
    del dense
    whole = compose(active, theta, bits, active_start, start, K, torch.bfloat16)
    assert torch.equal(whole[-3:], last) and not whole[:-3].any()


@given(st.integers(1, 4), st.integers(1, 80), st.floats(0, 1), st.booleans(), st.integers(0, 3), st.integers(0, 2**32))
def test_gather_undoes_scatter(rows: int, K: int, density: float, rowwise: bool, slack: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((rows, K), generator=generator) < density
    bits = pack(mask)
    counts = row_counts(bits, K, invert=True)
    shape = (rows, int(counts.max()) + slack) if rowwise else (1, int(counts.sum()) + slack)
    start = row_starts(counts, shape)
    weight = torch.randn((rows, K), generator=generator)
    theta = gather(weight, bits, start, None, shape)
    assert torch.equal(gather(scatter(theta, bits, start, None, K), bits, start, None, shape), theta)
    assert torch.equal(scatter(theta, bits, start, None, K), torch.where(mask, 0, weight))
    other = torch.randn((rows, K), generator=generator)
    assert torch.equal(scatter_(other.clone(), theta, bits, start, None), torch.where(unpack(bits, K), other, weight))
    assert int((theta != 0).sum()) == rows * K - int(count(bits))


def _call(**change):
    mask = torch.zeros((2, 40), dtype=torch.bool)
    bits = pack(mask)
    arguments = {
        "dense": torch.zeros(2, 40),
        "bits": bits,
        "row_start": torch.tensor([0, 40]),
        "columns": None,
        "shape": (2, 40),
    } | change
    return gather(**arguments)


@pytest.mark.parametrize(
    "change, argument",
    [
        ({"dense": torch.zeros(2, 40, dtype=torch.int32)}, "dense"),
        ({"dense": torch.zeros(80)}, "dense"),
        ({"bits": torch.zeros((2, 1), dtype=torch.int32)}, "bits"),
        ({"bits": torch.zeros((2, 2), dtype=torch.int64)}, "bits"),
        ({"row_start": None}, "row_start"),
        ({"row_start": torch.tensor([0, 40], dtype=torch.int32)}, "row_start"),
        ({"row_start": torch.tensor([0])}, "row_start"),
        ({"shape": (3, 40)}, "shape"),
        ({"columns": torch.tensor([0, 1, 2], dtype=torch.int32)}, "shape"),
        ({"columns": torch.tensor([0, 1]), "shape": (2, 2)}, "columns"),
        ({"dtype": torch.int32}, "dtype"),
    ],
)
def test_bad_arguments_are_named(change, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        _call(**change)


def test_non_contiguous_weight_is_refused() -> None:
    bits = pack(torch.zeros((2, 40), dtype=torch.bool))
    with pytest.raises(ValueError, match="weight must be contiguous"):
        scatter_(torch.zeros(40, 2).t(), torch.zeros(2, 40), bits, torch.tensor([0, 40]), None)


@pytest.mark.parametrize("layout", ["row+3", "layer+5", "panel"])
def test_opcheck(make, layout: str) -> None:
    problem = make(3, 40, 0.5, layout)
    dense, theta = problem.dense().requires_grad_(), problem.theta_like().requires_grad_()
    torch.library.opcheck(torch.ops.fxresu.gather, (dense, *problem.layout, *problem.shape, torch.bfloat16, False))
    torch.library.opcheck(torch.ops.fxresu.scatter, (theta, *problem.layout, 40, torch.bfloat16, False))
    torch.library.opcheck(torch.ops.fxresu.gather_add_, (problem.theta_like(), problem.dense(), *problem.layout))
    torch.library.opcheck(torch.ops.fxresu.scatter_, (problem.dense(), problem.theta_like(), *problem.layout))
