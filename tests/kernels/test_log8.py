"""8-bit logarithmic codes: error against float64, what is exact, and codes of decoded values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxresu.kernels import log8

BOUND = 2 ** (1 / 16) - 1 + 1e-5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def back(values: torch.Tensor, signed: bool) -> torch.Tensor:
    return log8.decode(*log8.encode(values, signed), signed, torch.empty_like(values))


@pytest.mark.parametrize("device", DEVICES)
def test_second_moments_of_ten_decades_keep_their_size(device: str) -> None:
    exponents = torch.rand(100_000, dtype=torch.float64) * 9 - 12
    values = (10**exponents).float().to(device)
    got = back(values, signed=False)
    error = (got.double() / values.double() - 1).abs()
    assert error.max() <= BOUND
    assert error.max() > 0.04  # 8 bits are not more than 8 bits
    root = (got.double().sqrt() / values.double().sqrt() - 1).abs()  # what an update divides by
    assert root.max() < 0.022 and root.mean() < 0.012


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_means_against_float64(device: str) -> None:
    values = torch.randn(100_000, device=device)
    got = back(values, signed=True)
    large = values.abs() > 2e-5 * values.abs().max()
    assert ((got.double() / values.double() - 1).abs()[large]).max() <= BOUND
    assert (got.sign() * values.sign()).ge(0).all()
    scale = values.view(-1)[: 390 * 256].view(-1, 256).abs().amax(1).repeat_interleave(256)
    linear = ((values[: scale.numel()] / scale * 127).round() / 127 * scale).double()
    exact = values[: scale.numel()].double()

    def relative(x: torch.Tensor) -> torch.Tensor:
        return ((x - exact) / exact).square().mean().sqrt()

    assert relative(got[: scale.numel()].double()) < relative(linear) / 2


def test_an_update_of_adam_after_a_round_trip() -> None:
    """Gradients of three decades in every block: the update moves by 3 % of itself."""
    g = torch.randn(200, 4096) * 10 ** (-3 * torch.rand(4096))
    m, v = torch.zeros(4096), torch.zeros(4096)
    for row in g:
        m, v = 0.9 * m + 0.1 * row, 0.999 * v + 0.001 * row.square()
    update = m / (v.sqrt() + 1e-8)
    again = back(m, True) / (back(v, False).sqrt() + 1e-8)
    assert ((again - update).norm() / update.norm()) < 0.035


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_largest_and_tiny(signed: bool) -> None:
    values = torch.zeros(600)
    values[3], values[4], values[300] = 7.3, 1e-30, 1e-44
    got = back(values, signed)
    assert got[values == 0].eq(0).all()
    assert got[3] == values[3] and got[300] == values[300]
    assert got[4].eq(0) if signed else got[4] > 0, "a positive denominator stays one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("signed", [True, False])
def test_lengths_and_dtypes(dtype: torch.dtype, signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log8, "_CHUNK", 512)
    for n in (1, 255, 256, 257, 511, 512, 513, 2000):
        values = torch.rand(n).to(dtype)
        codes, scales = log8.encode(values, signed)
        assert codes.numel() + 4 * scales.numel() == log8.compressed_bytes(n)
        got = log8.decode(codes, scales, signed, torch.empty_like(values))
        assert got.dtype == dtype
        assert ((got.double() / values.double() - 1).abs() <= BOUND + torch.finfo(dtype).eps).all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300), st.booleans())
def test_codes_of_decoded_values_are_the_same(values: list[float], signed: bool) -> None:
    tensor = torch.tensor(values) if signed else torch.tensor(values).abs()
    once = back(tensor, signed)
    assert torch.equal(back(once, signed), once)
    if not signed:
        assert torch.equal(tensor > 0, once > 0)
        assert torch.equal(back(back(tensor, True), False), back(tensor, True)), "a sign that vanished changes nothing"
