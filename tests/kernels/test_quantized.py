"""Active values in 8 and 4 bits: the bound on the error, the form, and the composition from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxresu.kernels import compose, compose_quantized, gather, pack, pack_active, quantized, row_counts, row_starts
from fxresu.kernels._triton import INTERPRET
from fxresu.kernels.quantized import BLOCK, LARGEST, dequantize, quantize

KINDS = ["int8", "int4"]


@given(st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 100), st.integers(-30, 30), st.integers(0, 2**32))
def test_the_error_is_at_most_half_a_step(kind: str, lines: int, length: int, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length *= 2
    values = torch.randn(lines, length, generator=generator) * 10.0**exponent
    values[torch.rand(lines, length, generator=generator) < 0.1] = 0.0
    codes, scale = quantize(values, kind)
    back = dequantize(codes, scale)
    for first in range(0, length, BLOCK):
        block, got = (t[:, first : first + BLOCK].double() for t in (values, back))
        largest = block.abs().amax(1, keepdim=True)
        assert ((block - got).abs() <= largest / (2 * LARGEST[kind]) * (1 + 1e-5)).all()
        torch.testing.assert_close(got.abs().amax(1, keepdim=True), largest, rtol=1e-6, atol=0)
    assert (back[values == 0] == 0).all()
    assert codes.numel() * codes.element_size() + 4 * scale.numel() == quantized.quantized_bytes(kind, (lines, length))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_zeros_and_of_the_smallest_numbers(kind: str) -> None:
    values = torch.zeros(2, 130)
    values[1, 70] = 1e-44
    codes, scale = quantize(values, kind)
    assert not dequantize(codes, scale).any()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 1000), (7, 130), (3, 64), (40, 2), (2, 0)])
def test_pieces_give_what_the_whole_gives(kind: str, shape: tuple[int, int], monkeypatch) -> None:
    values = torch.randn(shape, dtype=torch.float64)
    whole = quantized.quantize(values, kind)
    monkeypatch.setattr(quantized, "_PIECE", 128)
    for a, b in zip(quantized.quantize(values, kind), whole, strict=True):
        assert torch.equal(a, b)
    if values.numel():
        for bad in (torch.inf, torch.nan):
            values[-1, -1] = bad
            with pytest.raises(ValueError, match="finite"):
                quantized.quantize(values, kind)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="kind='int2' is unknown; use one of int8, int4"):
        quantize(torch.zeros(1, 4), "int2")
    with pytest.raises(ValueError, match="finite"):
        quantize(torch.tensor([[1.0, float("inf")]]), "int8")
    codes, scale = quantize(torch.randn(2, 10), "int8")
    bits, start = pack(torch.ones(2, 10, dtype=torch.bool)), torch.tensor([0, 10])
    with pytest.raises(ValueError, match="even length"):
        quantize(torch.zeros(2, 5), "int4")
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 1\)"):
        compose_quantized(codes, scale.repeat(1, 2), None, bits, start, None, 10, torch.float32)
    with pytest.raises(ValueError, match="scale must be float32 with 2 lines"):
        compose_quantized(codes, scale.double(), None, bits, start, None, 10, torch.float32)
    with pytest.raises(ValueError, match="codes must be int8"):
        compose_quantized(codes.float(), scale, None, bits, start, None, 10, torch.float32)


def _problem(kind: str, flat: bool, shape: tuple[int, int], density: float, device: str):
    rows, K = shape
    mask = (torch.rand(rows, K) < density).to(device)
    weight = torch.randn(rows, K, device=device)
    bits = pack(mask)
    kept, pruned = row_counts(bits, K), row_counts(bits, K, invert=True)

    def room(counts: torch.Tensor, slack: int) -> tuple[int, int]:
        length = int(counts.sum() if flat else counts.max()) + slack
        return 1 if flat else rows, length + length % 2

    a_shape, t_shape = room(kept, 1), room(pruned, 2)
    a_start, t_start = row_starts(kept, a_shape), row_starts(pruned, t_shape)
    codes, scale = quantize(pack_active(weight, bits, a_start, a_shape), kind)
    values = dequantize(codes, scale)
    theta = gather(weight, bits, t_start, None, t_shape)
    return (codes, scale), values, theta, bits, a_start, t_start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_composition_is_that_of_the_decoded_values(
    device: str, poisoned, same, kind: str, flat: bool, density: float
) -> None:
    for shape in ((5, 37), (2, 300)) if INTERPRET else ((1, 1), (5, 37), (3, 131), (2, 2100)):
        coded, values, theta, bits, a_start, t_start = _problem(kind, flat, shape, density, device)
        for dtype in (torch.float32, torch.bfloat16):
            for t, start in ((theta, t_start), (None, None)):
                got = compose_quantized(*coded, t, bits, a_start, start, shape[1], dtype)
                assert same(got, compose(values, t, bits, a_start, start, shape[1], dtype))


@pytest.mark.skipif(INTERPRET, reason="registration, not kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_gradients(kind: str) -> None:
    coded, values, theta, bits, a_start, t_start = _problem(kind, False, (3, 40), 0.5, "cpu")
    theta.requires_grad_()
    arguments = (*coded, theta, bits, a_start, t_start, 40, torch.float32, 1, None)
    torch.library.opcheck(torch.ops.fxresu.compose_quantized, arguments)
    wide = theta.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t: compose_quantized(*coded, t, bits, a_start, t_start, 40, torch.float64), (wide,)
    )
