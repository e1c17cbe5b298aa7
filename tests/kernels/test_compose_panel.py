"""Packed storage whose theta covers some inputs only: values, gradients, what is saved, what is refused."""

import pytest
import torch

from fxresu.kernels import compose, compose_quantized, pack, pack_active, row_starts
from fxresu.kernels import managed as _managed  # noqa: F401  (registers the linear)
from fxresu.kernels.layout import panel_words
from fxresu.kernels.quantized import dequantize, quantize


def _covered(rows: int, K: int, by_rows: bool, device: str, density: float = 0.5, seed: int = 0):
    """(mask, columns, theta's bool [rows, K], keywords of compose, starts, shape) of a panel."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((rows, K), generator=generator) < density
    inputs = rows if by_rows else K
    columns = torch.randperm(inputs, generator=generator)[: max(1, inputs // 3)].sort().values.to(torch.int32)
    part = mask[columns.long()] if by_rows else mask[:, columns.long()]
    inside = torch.zeros(rows, K, dtype=torch.bool)
    inside[columns.long() if by_rows else slice(None), slice(None) if by_rows else columns.long()] = True
    mask, part, columns = mask.to(device), part.contiguous().to(device), columns.to(device)
    panel = panel_words(columns, rows, K, by_rows)
    covered = {"columns": columns, "panel": panel, "panel_bits": pack(part)}
    counts = (~part).sum(1)
    shape = (1, int(counts.sum()) + 3)
    return mask, ~mask & inside.to(device), covered, row_starts(counts, shape), shape


PANELS = [(3, 70, False), (5, 2100, False), (1, 100, False), (7, 70, True), (4, 2100, True)]


@pytest.mark.parametrize("kind", ["", "int8", "int4"])
@pytest.mark.parametrize(("rows", "K", "by_rows"), PANELS)
def test_a_panel_of_theta_is_composed_and_the_rest_is_zero(
    device: str, poisoned, rows: int, K: int, by_rows: bool, kind: str
) -> None:
    mask, inside, covered, start, shape = _covered(rows, K, by_rows, device)
    weight = torch.randn(rows, K, device=device)
    bits, kept = pack(mask), mask.sum(1)
    room = int(kept.max()) + int(kept.max()) % 2
    a_start = row_starts(kept, (rows, room))
    active = pack_active(weight, bits, a_start, (rows, room))
    theta = torch.full(shape, float("nan"), device=device)
    theta.view(-1)[: int(inside.sum())] = weight[inside]
    wanted = torch.where(inside | mask, weight, 0)
    if not kind:
        got = compose(active, theta, bits, a_start, start, K, torch.float32, **covered)
        assert torch.equal(got, wanted)
        low = compose(active, theta, bits, a_start, start, K, torch.float16, **covered)
        assert torch.equal(low, wanted.half())
        return
    codes, scale = quantize(active, kind)
    got = compose_quantized(codes, scale, theta, bits, a_start, start, K, torch.float32, **covered)
    rounded = compose(dequantize(codes, scale), None, bits, a_start, None, K, torch.float32)
    assert torch.equal(got, torch.where(inside, weight, rounded))


@pytest.mark.parametrize("by_rows", [False, True])
def test_gradients_and_opcheck_of_a_panel(device: str, by_rows: bool) -> None:
    rows, K = (6, 9) if by_rows else (3, 9)
    mask, inside, covered, start, shape = _covered(rows, K, by_rows, device)
    bits, kept = pack(mask), mask.sum(1)
    a_shape = (1, int(kept.sum()))
    a_start = row_starts(kept, a_shape)
    active = torch.randn(a_shape, dtype=torch.float64, device=device).requires_grad_()
    theta = torch.randn(shape, dtype=torch.float64, device=device).requires_grad_()
    operands = bits, a_start, start, K, torch.float64, 0, None, *covered.values()
    assert torch.autograd.gradcheck(lambda a, t: torch.ops.fxresu.compose(a, t, *operands), (active, theta))
    single = [t.detach().float().requires_grad_() for t in (active, theta)]
    torch.library.opcheck(torch.ops.fxresu.compose, (*single, *operands[:4], torch.bfloat16, *operands[5:]))
    codes, scale = quantize(torch.randn(1, a_shape[1] + a_shape[1] % 2, device=device), "int4")
    torch.library.opcheck(
        torch.ops.fxresu.compose_quantized, (codes, scale, single[1], *operands[:4], torch.float32, *operands[5:])
    )


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
@pytest.mark.parametrize("kind", ["", "int8"])
def test_the_linear_of_a_panel_saves_its_columns_only(device: str, leading: tuple[int, ...], kind: str) -> None:
    mask, inside, covered, start, shape = _covered(4, 70, False, device)
    bits, kept = pack(mask), mask.sum(1)
    a_start = row_starts(kept, (1, int(kept.sum())))
    active, scale = torch.randn(1, int(kept.sum()), device=device), None
    if kind:
        active, scale = quantize(active, kind)
    theta = torch.randn(shape, device=device).requires_grad_()
    x = torch.randn(*leading, 70, device=device).requires_grad_()
    bias = torch.randn(4, device=device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = torch.ops.fxresu.linear_packed_columns(
            x, active, theta, bias, bits, a_start, start, *covered.values(), 4, 70, "", scale
        )
    assert all(t.shape[-1] != 70 for t in saved if t.is_floating_point()), "neither the input nor a dense weight"
    y.square().sum().backward()
    dense = torch.zeros(4, 70, device=device)
    values = active if scale is None else dequantize(active, scale)
    dense[mask] = values.view(-1)[: int(kept.sum())]
    dense[inside] = theta.detach().view(-1)[: int(inside.sum())]
    dense.requires_grad_()
    x2, b2 = (t.detach().clone().requires_grad_() for t in (x, bias))
    torch.nn.functional.linear(x2, dense, b2).square().sum().backward()
    for got, wanted in ((x.grad, x2.grad), (bias.grad, b2.grad)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    dtheta = theta.grad.view(-1)
    torch.testing.assert_close(dtheta[: int(inside.sum())], dense.grad[inside], rtol=1e-4, atol=1e-4)
    assert not dtheta[int(inside.sum()) :].any()


def test_panels_that_do_not_fit_are_refused(device: str) -> None:
    mask, _, covered, start, shape = _covered(3, 70, False, device)
    bits, kept = pack(mask), mask.sum(1)
    a_start = row_starts(kept, (1, int(kept.sum())))
    active, theta = torch.randn(1, int(kept.sum()), device=device), torch.randn(shape, device=device)

    def composed(**other) -> None:
        compose(active, theta, bits, a_start, start, 70, torch.float32, **(covered | other))

    for other, message in (
        ({"columns": None}, "panel needs columns and panel_bits"),
        ({"panel": covered["panel"].long()}, r"panel must be contiguous int32 of shape \(1, 3\)"),
        ({"panel": covered["panel"].repeat(2, 1)}, r"panel must be contiguous int32 of shape \(3, 1\)"),
        ({"columns": covered["columns"].long()}, "columns must be an int32 vector"),
        ({"panel_bits": bits}, "panel_bits must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            composed(**other)
