"""The forms of the composition: a program a row, or tiles; lines that start anywhere; masks that are wrong."""

import contextlib

import pytest
import torch
from torch import Tensor

from fxresu.kernels import compose, compose_kernels, compose_quantized, gather, pack, pack_active, row_starts
from fxresu.kernels._triton import INTERPRET, jit, launch, tl
from fxresu.kernels.quantized import dequantize, quantize

SHAPES = [(1, 5), (5, 300)] if INTERPRET else [(1, 5), (5, 300), (3, 4096), (2, 9000)]


@pytest.fixture(params=["rows", "tiles"])
def form(request, monkeypatch) -> str:
    if request.param == "tiles":
        monkeypatch.setattr(compose_kernels, "_MOST", 0)
    return request.param


def _mask(shape: tuple[int, int], density: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(shape[1])) < density


def _room(counts: Tensor, multiple: int) -> tuple[int, int]:
    """A shape with a line for every row, whose length is a multiple of 16, or odd, or even."""
    longest = int(counts.max())
    length = {16: -(-longest // 16) * 16, 1: longest | 1, 2: (longest // 2 * 2 + 2) | 2}[multiple]
    return counts.numel(), length


def _surrounded(values: Tensor) -> Tensor:
    """The same in a part of a larger tensor that is NaN, or the largest code, around it."""
    fill = float("nan") if values.is_floating_point() else torch.iinfo(values.dtype).max
    around = torch.full((values.numel() + 128,), fill, dtype=values.dtype, device=values.device)
    inner = around[64 : 64 + values.numel()].view(values.shape)
    inner.copy_(values)
    return inner


def _packed(mask: Tensor, multiples: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]):
    """(weight, active, theta, bits, starts) with zeros as padding and other memory around both."""
    weight = torch.randn(mask.shape, device=mask.device)
    bits, found = pack(mask), []
    for keep, multiple, dtype in zip((mask, ~mask), multiples, dtypes):
        shape = _room(keep.sum(1), multiple)
        start = row_starts(keep.sum(1), shape)
        pick = pack_active(weight, bits, start, shape) if keep is mask else gather(weight, bits, start, None, shape)
        found.append((_surrounded(pick.to(dtype)), start))
    (active, a_start), (theta, t_start) = found
    return weight, active, theta, bits, a_start, t_start


@pytest.mark.parametrize("multiples", [(16, 16), (1, 1), (16, 2)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_lines_that_start_anywhere(
    device: str, form: str, poisoned, same, shape: tuple[int, int], density: float, multiples: tuple[int, int]
) -> None:
    mask = _mask(shape, density).to(device)
    dtypes = (torch.bfloat16, torch.float32)
    weight, active, theta, bits, a_start, t_start = _packed(mask, multiples, dtypes)
    wanted = torch.where(mask, weight.to(active.dtype).float(), weight)
    K = shape[1]
    assert same(compose(active, theta, bits, a_start, t_start, K, torch.float32), wanted)
    assert same(compose(active, theta, bits, a_start, t_start, K, torch.bfloat16), wanted.bfloat16())
    assert same(compose(active, None, bits, a_start, None, K, torch.float32), torch.where(mask, wanted, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_every_width_of_an_entry(device: str, form: str, dtype: torch.dtype) -> None:
    mask = _mask((4, 200), 0.5).to(device)
    weight, active, theta, bits, a_start, t_start = _packed(mask, (1, 2), (dtype, dtype))
    got = compose(active, theta, bits, a_start, t_start, 200, dtype)
    assert torch.equal(got, weight.to(dtype))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("multiples", [(16, 16), (2, 1), (16, 1)])
@pytest.mark.parametrize("shape", [(1, 5), (5, 300)] if INTERPRET else [(1, 5), (5, 300), (3, 4096), (2, 9000)])
def test_codes_on_lines_that_start_anywhere(
    device: str, form: str, poisoned, shape: tuple[int, int], multiples: tuple[int, int], kind: str
) -> None:
    mask = _mask(shape, 0.4).to(device)
    weight, active, theta, bits, a_start, t_start = _packed(mask, multiples, (torch.float32, torch.float32))
    codes, scale = (_surrounded(t) for t in quantize(active, kind))
    rounded = torch.zeros_like(weight)
    rounded[mask] = torch.cat([line[:n] for line, n in zip(dequantize(codes, scale), mask.sum(1).tolist())])
    got = compose_quantized(codes, scale, theta, bits, a_start, t_start, shape[1], torch.float32)
    assert torch.equal(got, torch.where(mask, rounded, weight))
    got = compose_quantized(codes, scale, None, bits, a_start, None, shape[1], torch.float32)
    assert torch.equal(got, rounded)


@pytest.mark.parametrize("multiples", [(16, 16), (1, 1)])
@pytest.mark.parametrize("wrong", [0.0, 1.0] if INTERPRET else [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["", "int8", "int4"])
def test_wrong_masks_and_starts_show_nothing_foreign(
    device: str, form: str, kind: str, wrong: float, multiples: tuple[int, int]
) -> None:
    """On a CPU they are errors; a GPU must at least not look outside of the tensors."""
    mask = _mask((4, 200), 0.5).to(device)
    _, active, theta, _, a_start, t_start = _packed(
        mask, (2, 1) if kind and multiples[0] == 1 else multiples, (torch.float32, torch.float32)
    )
    bits = pack((torch.rand(4, 200) < wrong).to(device))
    codes, scale = (_surrounded(t) for t in quantize(active, kind)) if kind else (active, active)
    for move in (0, 150, 10**12) if kind else (0, -(10**12), 10**12):
        starts = a_start + move, t_start + move
        with contextlib.suppress(IndexError, RuntimeError):
            for t in (theta, None):
                after = bits, starts[0], starts[1] if t is theta else None, 200, torch.float32
                got = compose_quantized(codes, scale, t, *after) if kind else compose(active, t, *after)
                assert got.isfinite().all()


def test_what_is_too_long_for_one_program_goes_in_tiles(device: str) -> None:
    assert compose_kernels.row_form(128, 2048, 2048) == {"SLOTS": 2048, "BLOCK_W": 128, "num_warps": 16}
    assert compose_kernels.row_form(128, 1229, 2874) == {"SLOTS": 4096, "BLOCK_W": 128, "num_warps": 16}
    assert compose_kernels.row_form(513, 64, 64) is None and compose_kernels.row_form(400, 64, 12800) is None
    K = 16384 + 70
    mask = _mask((2, K), 0.5).to(device)
    weight, active, theta, bits, a_start, t_start = _packed(mask, (1, 1), (torch.float32, torch.float32))
    assert torch.equal(compose(active, theta, bits, a_start, t_start, K, torch.float32), weight)


# --- what a line's run holds -----------------------------------------------------------------------------------------


@jit
def _run_kernel(values, out, shifts, n, capacity, SLOTS: tl.constexpr, GROUP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found, shift = compose_kernels.line_run(values, row, n, capacity, SLOTS, GROUP)
    tl.store(out + row * SLOTS + tl.arange(0, SLOTS), found)
    tl.store(shifts + row, shift)


@pytest.mark.parametrize("n", [0, 1, 3, 8, 29, 57])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_a_run_is_a_line_and_stays_in_its_tensor(device: str, n: int, group: int) -> None:
    if device == "cpu" and not INTERPRET:
        pytest.skip("a kernel")
    values = torch.arange(1, 5 * n + 1, dtype=torch.float32).view(5, n)
    inner = _surrounded(values.to(device))
    out = torch.full((5, 128), -1.0, device=device)
    shifts = torch.full((5,), -1, dtype=torch.int32, device=device)
    launch(_run_kernel, 5, out, inner, out, shifts, n, 5 * n, SLOTS=128, GROUP=group, num_warps=1)
    assert not out.isnan().any(), "nothing around the tensor was read"
    for row in range(5):
        shift = int(shifts[row])
        assert shift == row * n % group
        assert torch.equal(out[row, shift : shift + n].cpu(), values[row])
        assert not out[row, shift + n + group - 1 :].any()
