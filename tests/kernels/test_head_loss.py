"""Loss and gradient of a frozen head against float64."""

import pytest
import torch
from torch.nn import functional as F

from fxresu.kernels import head_loss

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
