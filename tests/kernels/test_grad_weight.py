"""Gradients of few tokens with a gathering or masking epilogue, against float64."""

import pytest
import torch

from fxresu.kernels import gather, grad_gather, grad_masked
from fxresu.kernels._triton import INTERPRET
from fxresu.kernels.grad_weight import _launch

TOKENS = [1, 5, 32, 70]


def factors(problem, tokens: int, dtype: torch.dtype, transposed: bool = False):
    rows, K = problem.mask.shape
    shape = (lambda n: (n, tokens)) if transposed else (lambda n: (tokens, n))
    dy, x = (torch.randn(shape(n), device=problem.device).to(dtype) for n in (rows, K))
    return (dy.t(), x.t()) if transposed else (dy, x)


def tolerance(dtype: torch.dtype, tokens: int) -> float:
    return (2e-6 if dtype == torch.float32 else 2**-7) * max(tokens, 8) ** 0.5


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathers_the_gradient(problem, tokens: int, dtype: torch.dtype) -> None:
    if problem.columns is not None:
        pytest.skip("the panel layout is a dense GEMM")
    dy, x = factors(problem, tokens, dtype)
    out = grad_gather(dy, x, problem.bits, problem.row_start, problem.shape)
    exact = dy.double().t() @ x.double()
    expected = gather(exact.cpu(), problem.bits.cpu(), problem.row_start.cpu(), None, problem.shape, torch.float64)
    tol = tolerance(dtype, tokens)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tol, atol=tol)
    assert out.dtype == dtype


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_the_gradient(make, size, tokens: int, dtype: torch.dtype) -> None:
    problem = make(*size)
    dy, x = factors(problem, tokens, dtype)
    out = grad_masked(dy, x, problem.bits)
    exact = torch.where(problem.mask, dy.double().t() @ x.double(), 0)
    tol = tolerance(dtype, tokens)
    torch.testing.assert_close(out.double(), exact, rtol=tol, atol=tol)
    assert not out[~problem.mask].any()


def test_strided_operands_and_wider_result(make) -> None:
    problem = make(70, 100, 0.4)
    dy, x = factors(problem, 20, torch.bfloat16, transposed=True)
    out = grad_gather(dy, x, problem.bits, problem.row_start, problem.shape, torch.float32)
    exact = (dy.double().t() @ x.double()).float()
    expected = gather(exact, problem.bits, problem.row_start, None, problem.shape)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_past_the_dispatcher_it_is_the_same(make) -> None:
    """Where no gradients are tracked the operations are called straight."""
    problem = make(70, 100, 0.4)
    dy, x = factors(problem, 20, torch.float32)
    operands = dy, x, problem.bits
    with torch.no_grad():
        gathered, masked = grad_gather(*operands, problem.row_start, problem.shape), grad_masked(*operands)
    ops = torch.ops.fxresu
    assert torch.equal(gathered, ops.grad_gather(*operands, problem.row_start, *problem.shape, torch.float32))
    assert torch.equal(masked, ops.grad_masked(*operands, torch.float32))


def test_infinite_gradients_at_pruned_coordinates_vanish(make) -> None:
    problem = make(8, 64, 0.5)
    dy, x = factors(problem, 4, torch.float32)
    dy[0] = float("inf")
    assert not grad_masked(dy, x, problem.bits)[~problem.mask].any()


def test_bad_arguments_are_named() -> None:
    bits, start = torch.zeros((3, 2), dtype=torch.int32), torch.arange(3) * 40
    with pytest.raises(ValueError, match="tokens"):
        grad_gather(torch.ones(4, 3), torch.ones(5, 40), bits, start, (3, 40))
    with pytest.raises(ValueError, match="bits"):
        grad_masked(torch.ones(4, 3), torch.ones(4, 70), bits)
    with pytest.raises(ValueError, match="shape"):
        grad_gather(torch.ones(4, 3), torch.ones(4, 40), bits, start, (2, 40))


def test_opcheck(make) -> None:
    problem = make(3, 40, 0.5)
    dy, x = factors(problem, 5, torch.float32)
    torch.library.opcheck(
        torch.ops.fxresu.grad_gather, (dy, x, problem.bits, problem.row_start, *problem.shape, torch.float32)
    )
    torch.library.opcheck(torch.ops.fxresu.grad_masked, (dy, x, problem.bits, torch.float32))


BLOCKS = [(33, 128, 0.5), (40, 545, 0.3), (5, 1100, 0.0), (3, 1100, 1.0), (70, 2048, 0.7)]


@pytest.mark.parametrize("tokens", [3, 150] if INTERPRET else [3, 40, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "K", "density"), BLOCKS[1:4] if INTERPRET else BLOCKS)
def test_several_blocks_of_rows_words_and_tokens(
    make, poisoned, rows: int, K: int, density: float, dtype: torch.dtype, tokens: int
) -> None:
    """More than a program has of each: 32 rows, 16 words, 64 tokens; ragged ones; padding is written."""
    for layout in ("row+3", "layer+5"):
        problem = make(rows, K, density, layout)
        dy, x = factors(problem, tokens, dtype)
        exact = dy.double().t() @ x.double()
        tol = tolerance(torch.float32, tokens)
        out = grad_gather(dy, x, problem.bits, problem.row_start, problem.shape, torch.float32)
        expected = gather(exact.cpu(), problem.bits.cpu(), problem.row_start.cpu(), None, problem.shape, torch.float64)
        torch.testing.assert_close(out.cpu().double(), expected, rtol=tol, atol=tol)
    masked = grad_masked(dy, x, problem.bits, torch.float32)
    torch.testing.assert_close(masked.double(), torch.where(problem.mask, exact, 0), rtol=tol, atol=tol)
    assert not masked[~problem.mask].any()


@pytest.mark.parametrize("move", [0, 40, 2000, -1, -(10**12), 10**12, 2**32 - 40])
def test_wrong_masks_and_starts_write_nothing_foreign(make, move: int) -> None:
    problem = make(33, 100, 0.6)
    if problem.device == "cpu" and not INTERPRET:
        pytest.skip("an error there")
    dy, x = factors(problem, 4, torch.float32)
    for bits in (problem.bits, torch.zeros_like(problem.bits), torch.full_like(problem.bits, -1)):
        around = torch.full((3, *problem.shape), 7.0, device=problem.device)
        _launch(around[1], dy, x, bits, problem.row_start + move)
        assert bool((around[::2] == 7).all())
