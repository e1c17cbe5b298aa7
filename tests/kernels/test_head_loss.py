"""Loss and gradient of a frozen head against float64."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxresu.kernels import head_loss, slope_rows_, slope_tile_
from fxresu.kernels.head_loss import scale_
from fxresu.kernels.slope_tile import slope_tile_reference

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def problem(tokens: int, words: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens * 100_003 + words)
    hidden = torch.randn(tokens, 24, generator=generator).to(device, dtype)
    weight = torch.randn(words, 24, generator=generator).to(device, dtype)
    return hidden, weight, torch.randint(words, (tokens,), generator=generator).to(device)


def wanted(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss and the gradient of the sum."""
    h = hidden.double().requires_grad_()
    total = F.cross_entropy(h @ weight.double().t(), target, ignore_index=-7, reduction="sum")
    total.backward()
    return total.detach() / (target != -7).sum(), h.grad


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tile", [1, 3, 100])
@pytest.mark.parametrize("tokens, words", [(1, 1), (7, 33), (5, 4096), (4, 9001)])
def test_values(tokens: int, words: int, tile: int, dtype: torch.dtype, device, poisoned) -> None:
    hidden, weight, target = problem(tokens, words, dtype, device)
    target[tokens // 2 + 1 :: 3] = -7
    loss, gradient, count = head_loss(hidden, weight, target, -7, tile, True)
    want, slope = wanted(hidden, weight, target)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.dtype == dtype
    assert int(count) == int((target != -7).sum())
    assert abs(float(loss) - float(want)) <= BOUNDS[dtype] * (1 + float(want))
    assert float((gradient.double() - slope).abs().max()) <= BOUNDS[dtype] * float(1 + slope.abs().max())
    without, nothing, _ = head_loss(hidden, weight, target, -7, tile, False)
    assert nothing.numel() == 0
    torch.testing.assert_close(without, loss)


def test_extreme_logits(device) -> None:
    """A word that cannot come (-inf), and logits whose exponentials overflow."""
    hidden = torch.tensor([[300.0, 1.0], [-300.0, 1.0]], device=device)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -torch.inf]], device=device)
    target = torch.tensor([0, 0], device=device)
    loss, gradient, _ = head_loss(hidden, weight[:2], target, -7, 2, True)
    assert float(loss) == pytest.approx(300.0) and bool(gradient.isfinite().all())
    loss, *_ = head_loss(hidden, weight, target, -7, 2, False)
    assert float(loss) == pytest.approx(300.0)


@pytest.mark.parametrize("wrong", [-1, 5, 10**12])
def test_a_target_that_is_no_word_gives_nan(wrong: int, device) -> None:
    hidden, weight, target = problem(3, 5, torch.float32, device)
    target[1] = wrong
    assert bool(head_loss(hidden, weight, target, -7, 2, True)[0].isnan())


def test_no_tokens(device) -> None:
    hidden, weight, target = problem(0, 5, torch.float32, device)
    loss, gradient, count = head_loss(hidden, weight, target, -7, 2, True)
    assert bool(loss.isnan()) and gradient.shape == (0, 24) and int(count) == 0


def test_gradients(device) -> None:
    hidden, weight, target = problem(5, 9, torch.float64, device)
    target[2] = -7

    def loss(h: torch.Tensor) -> torch.Tensor:
        return head_loss(h, weight, target, -7, 2, True)[0]

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(),))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck(with_gradient: bool, device) -> None:
    hidden, weight, target = problem(5, 9, torch.float32, device)
    arguments = (hidden.requires_grad_(with_gradient), weight, target, -7, 2, with_gradient)
    torch.library.opcheck(torch.ops.fxresu.head_loss.default, arguments)


def test_products_are_counted(device) -> None:
    hidden, weight, target = problem(5, 9, torch.float32, device)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        head_loss(hidden, weight, target, -7, 2, True)
    assert counter.get_total_flops() == 2 * 2 * 5 * 9 * 24


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tokens, words", [(1, 1), (7, 33), (4, 9001)])
def test_slopes_of_tokens(tokens: int, words: int, dtype: torch.dtype, device) -> None:
    hidden, weight, target = problem(tokens, words, dtype, device)
    target[tokens // 2 + 1 :: 3] = -7
    logits = (hidden @ weight.t()).requires_grad_()
    losses = torch.full((tokens,), torch.nan, device=device, dtype=torch.promote_types(dtype, torch.float32))
    exact = logits.detach().double().requires_grad_()
    want = F.cross_entropy(exact, target, ignore_index=-7, reduction="none")
    want.sum().backward()
    got = slope_rows_(logits.detach(), target, losses, -7)
    assert float((losses.double() - want).abs().max()) <= BOUNDS[dtype] * float(1 + want.abs().max())
    assert float((got.double() - exact.grad).abs().max()) <= BOUNDS[dtype]


def test_slopes_of_tokens_opcheck_and_bad_operands(device) -> None:
    logits, target = torch.randn(5, 9, device=device), torch.randint(9, (5,), device=device)
    losses = torch.zeros(5, device=device)
    torch.library.opcheck(torch.ops.fxresu.slope_rows_.default, (logits, target, losses, -7))
    for wrong, message in (
        ((logits.t(), target, losses), "logits must be contiguous"), ((logits, target[:3], losses), "target must be"),
        ((logits, target, losses.double()), "losses must be"), ((logits.int(), target, losses), "logits.dtype"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            slope_rows_(*wrong, -7)


# The slope over a tile of the vocabulary


def tile_of(tokens: int, words: int, dtype: torch.dtype, device) -> tuple[torch.Tensor, ...]:
    """Logits of words 50 ... 50 + words - 1 of a larger vocabulary, with the whole one's denominator."""
    generator = torch.Generator().manual_seed(tokens * 100_003 + words)
    logits = torch.randn(tokens, words, generator=generator).mul_(3).to(device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.rand(tokens, generator=generator).to(device, wide)
    factor[::3] = 0
    target = torch.randint(40, 60 + words, (tokens,), generator=generator).to(device)
    denominator = logits.to(wide).logsumexp(1) if words else torch.zeros(tokens, dtype=wide, device=device)
    return logits, denominator + 0.5, factor, target


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tokens, words", [(1, 1), (7, 33), (5, 4096), (3, 2049), (0, 8), (4, 0)])
def test_slope_of_a_tile(tokens: int, words: int, dtype: torch.dtype, device) -> None:
    logits, denominator, factor, target = tile_of(tokens, words, dtype, device)
    want = slope_tile_reference(logits.double(), denominator.double(), factor.double(), target, 50)
    got = slope_tile_(logits, denominator, factor, target, 50)
    assert got is logits and got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


def test_targets_elsewhere_are_in_no_tile(device) -> None:
    logits, denominator, factor, _ = tile_of(3, 20, torch.float32, device)
    away = torch.tensor([0, 70, 2**40], device=device)
    share = (logits - denominator[:, None]).exp() * factor[:, None]
    torch.testing.assert_close(slope_tile_(logits, denominator, factor, away, 50), share)


def test_slope_opcheck_and_refusals(device) -> None:
    operands = tile_of(5, 9, torch.float32, device)
    torch.library.opcheck(torch.ops.fxresu.slope_tile_.default, (*operands, 50))
    logits, denominator, factor, target = operands
    before = logits.clone()
    with pytest.raises(ValueError, match="logits must be contiguous"):
        slope_tile_(logits.t(), denominator, factor, target, 0)
    with pytest.raises(ValueError, match="denominator"):
        slope_tile_(logits, denominator.double(), factor, target, 0)
    with pytest.raises(ValueError, match="target"):
        slope_tile_(logits, denominator, factor, target[1:], 0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 4096), (3, 4099)])
def test_scale_in_place(shape: tuple[int, int], dtype: torch.dtype, device) -> None:
    """Rounded once, counted by autograd, and the same where somebody watches."""
    generator = torch.Generator().manual_seed(shape[1])
    values = torch.randn(shape, generator=generator).to(device, dtype)
    factor = torch.tensor(1 / 3, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    want, version = (values.double() * factor.double()).to(dtype), values._version
    with FlopCounterMode(display=False):
        watched = scale_(values.clone(), factor)
    assert torch.equal(scale_(values.clone(), torch.ones_like(factor)), values)
    assert scale_(values, factor) is values and values._version > version
    torch.testing.assert_close(values, want, rtol=2 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(watched, want, rtol=2 * torch.finfo(dtype).eps, atol=0)
