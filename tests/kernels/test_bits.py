"""Mask bits against loops from the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from fxresu.kernels import count, pack, row_counts, unpack, unpack_aten, words


def test_words() -> None:
    assert [words(K) for K in (0, 1, 31, 32, 33, 64, 65)] == [0, 1, 1, 1, 2, 2, 3]


def test_pack_and_unpack(size, make) -> None:
    problem = make(*size)
    K = size[1]
    assert torch.equal(pack(problem.mask), problem.bits)
    assert torch.equal(unpack(problem.bits, K), problem.mask)
    assert torch.equal(unpack_aten(problem.bits, K), problem.mask)
    assert torch.equal(row_counts(problem.bits, K), problem.mask.sum(1))
    assert torch.equal(row_counts(problem.bits, K, invert=True), (~problem.mask).sum(1))
    assert int(count(problem.bits)) == int(problem.mask.sum())


def test_pack_takes_any_strides(make) -> None:
    problem = make(5, 37, 0.5)
    transposed = problem.mask.t().contiguous().t()
    wide = torch.zeros((5, 74), dtype=torch.bool, device=problem.device)
    wide[:, ::2] = problem.mask
    assert torch.equal(pack(transposed), problem.bits)
    assert torch.equal(pack(wide[:, ::2]), problem.bits)


def test_empty(device) -> None:
    assert pack(torch.zeros((0, 8), dtype=torch.bool, device=device)).shape == (0, 1)
    assert pack(torch.zeros((3, 0), dtype=torch.bool, device=device)).shape == (3, 0)
    assert row_counts(torch.zeros((3, 0), dtype=torch.int32, device=device), 0).tolist() == [0, 0, 0]


@given(st.integers(1, 4), st.integers(1, 100), st.integers(0, 2**32))
def test_round_trip(rows: int, K: int, seed: int) -> None:
    mask = torch.rand((rows, K), generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack(mask)
    assert torch.equal(unpack(bits, K), mask)
    assert torch.equal(pack(unpack(bits, K)), bits)


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: pack(torch.zeros(4, dtype=torch.bool)), "mask"),
        (lambda: pack(torch.zeros(4, 4)), "mask"),
        (lambda: unpack(torch.zeros((2, 3), dtype=torch.int32), 64), "bits"),
        (lambda: unpack(torch.zeros((2, 2), dtype=torch.int64), 64), "bits"),
        (lambda: unpack(torch.zeros((2, 4), dtype=torch.int32)[:, ::2], 64), "bits"),
        (lambda: row_counts(torch.zeros((2, 3), dtype=torch.int32), 64), "bits"),
    ],
)
def test_bad_arguments_are_named(call, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        call()


def test_opcheck(make) -> None:
    problem = make(5, 37, 0.5)
    torch.library.opcheck(torch.ops.fxresu.pack_bits, (problem.mask,))
    torch.library.opcheck(torch.ops.fxresu.unpack_bits, (problem.bits, 37))
    torch.library.opcheck(torch.ops.fxresu.row_popcounts, (problem.bits,))


def test_unpack_aten_fuses(device) -> None:
    """Compiled into its consumer: one kernel, and no buffer other than the result."""
    torch._dynamo.reset()
    bits = pack(torch.rand((64, 100), device=device) < 0.5)
    x = torch.randn((64, 100), device=device)

    def masked(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        return torch.where(unpack_aten(bits, 100), x, 0)

    result, sources = run_and_get_code(torch.compile(masked, fullgraph=True), x, bits)
    assert torch.equal(result, torch.where(unpack(bits, 100), x, 0))
    (source,) = sources
    call = source[source.index("def call(") :]
    assert call.count("empty_strided_") == 1, call
