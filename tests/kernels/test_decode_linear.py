"""The linear that decodes packed storage in registers, against float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fxresu.kernels import _measure, decode_linear, gather, pack, pack_active, row_counts, row_starts
from fxresu.kernels._triton import INTERPRET
from fxresu.kernels.decode_linear import FORMS

GENERAL = [name for name, form in FORMS.items() if not form.pairs]
PAIRS = [name for name, form in FORMS.items() if form.pairs]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SHAPES = [(1, 1), (5, 37), (70, 131), (33, 1030)]
PAIR_SHAPES = [(4, 4), (8, 36), (68, 132), (36, 1040)]
DENSITIES = [0.0, 0.1, 0.5, 1.0]
if INTERPRET:  # slow: keep the sizes that differ in kind
    SHAPES, PAIR_SHAPES, DENSITIES = [(1, 1), (18, 300)], [(8, 36), (20, 520)], [0.5]


def _mask(rows: int, K: int, density: float) -> torch.Tensor:
    return torch.rand(rows, K) < density


def _packed(mask: torch.Tensor, flat: bool, dtype: torch.dtype, theta_dtype: torch.dtype | None):
    """(dense weight as float64, operands of the op after x)."""
    rows, K = mask.shape
    weight = torch.randn(rows, K, device=mask.device).to(dtype)
    bits = pack(mask)
    kept, pruned = row_counts(bits, K), row_counts(bits, K, invert=True)

    def shape(counts: torch.Tensor) -> tuple[int, int]:
        return (1, max(int(counts.sum()), 1) + 3) if flat else (rows, max(int(counts.max()), 1) + 1)

    a_start = row_starts(kept, shape(kept))
    active = pack_active(weight, bits, a_start, shape(kept))
    if theta_dtype is None:
        return weight.double() * mask, (active, None, bits, a_start, None)
    t_start = row_starts(pruned, shape(pruned))
    theta = gather(weight, bits, t_start, None, shape(pruned), theta_dtype)
    return weight.double(), (active, theta, bits, a_start, t_start)


def _close(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    wanted = x.double() @ weight.t()
    scale = (x.double().abs() @ weight.abs().t()).clamp_min(1e-9)  # rounding of the sums, not of their result
    assert got.dtype == x.dtype and got.shape == wanted.shape
    assert float(((got.double() - wanted).abs() / scale).max()) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("how", GENERAL)
@pytest.mark.parametrize("theta", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(device: str, poisoned, how: str, theta: bool, shape: tuple[int, int]) -> None:
    for index, density in enumerate(DENSITIES):
        mask = _mask(*shape, density).to(device)
        weight, operands = _packed(mask, index % 2 == 0, torch.float32, torch.float32 if theta else None)
        x = torch.randn((2, 1, 16, 17)[index], shape[1], device=device)
        _close(decode_linear(x, *operands, how), x, weight)


@pytest.mark.parametrize("how", GENERAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["same", "float32"])
def test_dtypes(device: str, how: str, dtype: torch.dtype, stored: str) -> None:
    mask = _mask(18, 70, 0.5).to(device)
    weight, operands = _packed(mask, False, dtype if stored == "same" else torch.float32, torch.float32)
    x = torch.randn(1, 70, device=device).to(dtype)
    _close(decode_linear(x, *operands, how), x, weight.to(dtype).double())


@pytest.mark.parametrize("how", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", PAIR_SHAPES, ids=str)
@pytest.mark.parametrize("theta", [False, True])
def test_pairs(device: str, poisoned, how: str, dtype: torch.dtype, shape: tuple[int, int], theta: bool) -> None:
    mask = _measure.random_mask(*shape, 0.5, "2:4", torch.Generator().manual_seed(0)).to(device)
    weight = torch.randn(shape, device=device).to(dtype)
    bits = pack(mask)
    half, room = (shape[0], shape[1] // 2), (shape[0], shape[1] // 2 + 3)
    start = row_starts(row_counts(bits, shape[1]), half)
    active, candidates, t_start = pack_active(weight, bits, start, half), None, None
    if theta:
        t_start = row_starts(row_counts(bits, shape[1], invert=True), room)
        candidates = gather(weight, bits, t_start, None, room, torch.float32)
    for tokens in (2,) if INTERPRET else (1, 4, 19):
        x = torch.randn(tokens, shape[1], device=device).to(dtype)
        got = decode_linear(x, active, candidates, bits, start, t_start, how)
        _close(got, x, weight.double() * (1 if theta else mask))


@pytest.mark.parametrize("how", GENERAL)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_masks(device: str, poisoned, how: str, density: float) -> None:
    weight, operands = _packed(_mask(3, 70, density).to(device), True, torch.float32, torch.float32)
    x = torch.randn(2, 70, device=device)
    _close(decode_linear(x, *operands, how), x, weight)


def test_nothing_in_nothing_out(device: str) -> None:
    weight, operands = _packed(_mask(6, 40, 0.5).to(device), False, torch.float32, torch.float32)
    assert decode_linear(torch.empty(0, 40, device=device), *operands).shape == (0, 6)


@pytest.mark.skipif(INTERPRET, reason="the reference's dtype")
def test_float64_on_the_cpu() -> None:
    weight, operands = _packed(_mask(6, 40, 0.5), False, torch.float64, torch.float64)
    x = torch.randn(3, 40, dtype=torch.float64)
    torch.testing.assert_close(decode_linear(x, *operands), x @ weight.t())


def test_opcheck_and_flops() -> None:
    _, operands = _packed(_mask(6, 40, 0.5), False, torch.float32, torch.float32)
    x = torch.randn(3, 40)
    torch.library.opcheck(torch.ops.fxresu.decode_linear, (x, *operands, "decode_16x4"))
    with FlopCounterMode(display=False) as flops:
        decode_linear(x, *operands)
    assert flops.get_total_flops() == 2 * 3 * 40 * 6


def test_refusals() -> None:
    _, operands = _packed(_mask(6, 40, 0.5), False, torch.float32, torch.float32)
    x = torch.randn(3, 40)
    with pytest.raises(ValueError, match="how='fast' is unknown; use one of decode_16x4"):
        decode_linear(x, *operands, "fast")
    with pytest.raises(ValueError, match="two 16-bit values of every 4 inputs"):
        decode_linear(x, operands[0], None, *operands[2:4], None, "decode_pairs_16")
    with pytest.raises(ValueError, match="x must be contiguous"):
        decode_linear(torch.randn(40, 3).t(), *operands)
