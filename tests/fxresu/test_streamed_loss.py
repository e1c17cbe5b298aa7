"""Loss and gradients of the tiled head against torch's own, in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxresu import ConfigError, linear_cross_entropy, streamed_loss

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(
    dtype: torch.dtype = torch.float64, device: str = "cpu", tokens: int = 20, words: int = 37
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(2, tokens // 2, 16, device=device).to(dtype).requires_grad_()
    weight = torch.randn(words, 16, device=device).to(dtype).requires_grad_()
    target = torch.randint(words, (2, tokens // 2), device=device)
    target[0, 1] = target[1, 2] = -100
    return hidden, weight, target


def reference(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy((h @ w.t()).flatten(0, -2), target.flatten())
    loss.backward()
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("tile", [None, 1, 8, 37, 100])
def test_loss_and_gradients(tile: int | None) -> None:
    hidden, weight, target = problem()
    loss = linear_cross_entropy(hidden, weight, target, tile=tile)
    (3 * loss).backward()
    want, of_hidden, of_weight = reference(hidden, weight, target)
    torch.testing.assert_close(loss.detach(), want)
    torch.testing.assert_close(hidden.grad, 3 * of_hidden)
    torch.testing.assert_close(weight.grad, 3 * of_weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision(device: str, dtype: torch.dtype, bound: float) -> None:
    hidden, weight, target = problem(dtype, device)
    loss = linear_cross_entropy(hidden, weight, target, tile=8)
    assert loss.dtype == torch.float32
    loss.backward()
    want, of_hidden, of_weight = reference(hidden, weight, target)
    assert abs(float(loss.detach()) / float(want) - 1) < bound
    for got, true in ((hidden.grad, of_hidden), (weight.grad, of_weight)):
        assert got.dtype == dtype and float((got.double() - true).norm() / true.norm()) < bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tiles", [1, 2, 7])
@pytest.mark.parametrize("dtype, bound", [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3),
])  # fmt: skip
def test_tiles_of_tokens(
    tiles: int, dtype: torch.dtype, bound: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, target = problem(dtype, device)
    monkeypatch.setattr(streamed_loss, "_TOKENS_BYTES", -(-20 // tiles) * 37 * dtype.itemsize)
    sizes = list[int]()
    module = importlib.import_module("fxresu.kernels.head_loss")
    rows = module.slope_rows_
    monkeypatch.setattr(module, "slope_rows_", lambda *a: sizes.append(len(a[0])) or rows(*a))
    loss = linear_cross_entropy(hidden, weight, target)
    want, of_hidden, of_weight = reference(hidden, weight, target)
    assert abs(float(loss.detach()) / float(want) - 1) < bound
    for _ in range(2):  # the second backward finds what the first gave away
        (3 * loss).backward(retain_graph=True)
        for got, true in ((hidden.grad, of_hidden), (weight.grad, of_weight)):
            assert got.dtype == dtype and float((got.double() - 3 * true).norm() / (3 * true).norm()) < bound
        kept, hidden.grad, weight.grad = weight.grad, None, None
        kept.zero_()  # its own
    assert len(sizes) == 2 * tiles and sum(sizes) == 2 * 20


def test_too_many_tiles_of_tokens_are_tiles_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's gradient would be rounded at each of them."""
    hidden, weight, target = problem(torch.bfloat16)
    monkeypatch.setattr(streamed_loss, "_TOKENS_BYTES", 2 * 37 * 2)
    monkeypatch.setattr(streamed_loss, "losses_and_gradients", None)
    linear_cross_entropy(hidden, weight, target).backward()
    *_, of_weight = reference(hidden, weight, target)
    assert float((weight.grad.double() - of_weight).norm() / of_weight.norm()) < 2e-2


@pytest.mark.parametrize("tile", [None, 8])
def test_a_head_that_trains_alone_and_second_derivatives(tile: int | None) -> None:
    hidden, weight, target = problem()
    loss = linear_cross_entropy(hidden.detach(), weight, target, tile=tile)
    loss.backward()
    torch.testing.assert_close(weight.grad, reference(hidden, weight, target)[2])
    (once,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, tile=tile), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        once.sum().backward()


def test_gradcheck() -> None:
    hidden, weight, target = problem(tokens=6, words=7)
    target[0, 0] = -100

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, target, tile=3)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_no_target() -> None:
    hidden, weight, target = problem()
    nothing = torch.full_like(target, -100)
    for head in (weight, weight.detach()):
        loss = linear_cross_entropy(hidden, head, nothing)
        loss.backward()
        assert bool(loss.isnan()) and hidden.grad.eq(0).all()


@pytest.mark.parametrize("tile", [None, 1, 8, 37, 100])
def test_frozen_head(tile: int | None) -> None:
    hidden, weight, target = problem()
    loss = linear_cross_entropy(hidden, weight.detach(), target, tile=tile)
    (3 * loss).backward()
    want, of_hidden, _ = reference(hidden, weight, target)
    torch.testing.assert_close(loss.detach(), want)
    torch.testing.assert_close(hidden.grad, 3 * of_hidden)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, target, tile=tile), want)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), target), hidden, create_graph=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_frozen_head_in_low_precision(device: str, dtype: torch.dtype, bound: float) -> None:
    """More words than a block of the kernel, a scaled loss, and the compiled function."""
    hidden, weight, target = problem(dtype, device, tokens=6, words=4100)
    head = weight.detach()

    def loss(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, t, tile=2000)

    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden.grad = None
        value = function(hidden, head, target)
        (64 * value).backward()
        want, of_hidden, _ = reference(hidden, head, target)
        assert value.dtype == torch.float32 and hidden.grad.dtype == dtype
        assert abs(float(value.detach()) - float(want)) < bound * (1 + float(want))
        assert float((hidden.grad.double() - 64 * of_hidden).norm() / (64 * of_hidden).norm()) < bound


def test_whole_logits_do_not_exist() -> None:
    hidden, weight, target = problem(torch.float32, tokens=64, words=4096)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, target, tile=128).backward()
    assert max(largest) == 4096 * 16  # the head's own gradient; logits would be 64 x 4096


def test_whole_logits_of_a_frozen_head_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = problem(torch.float32, tokens=64, words=4096)
    module, seen = importlib.import_module("fxresu.kernels.head_loss"), []
    slope = module._slope
    monkeypatch.setattr(module, "_slope", lambda logits, *rest: (seen.append(logits.numel()), slope(logits, *rest)))
    linear_cross_entropy(hidden, weight.detach(), target, tile=128).backward()
    assert seen == [2 * 4096] * 32


@pytest.mark.parametrize("change, message", [
    ({"weight": torch.zeros(5, 15, dtype=torch.float64)}, "weight"), ({"weight": torch.zeros(5, 16)}, "weight"),
    ({"target": torch.zeros(3, dtype=torch.int64)}, "target"), ({"target": torch.zeros(2, 10)}, "target"),
    ({"tile": 0}, "tile=0"),
])  # fmt: skip
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    hidden, weight, target = problem()
    with pytest.raises(ConfigError, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "target": target, **change})


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_is_that_of_a_linear(device: str) -> None:
    """Norms leave float32 under autocast on a GPU, and the head is in bfloat16: the product is autocast's, as that of
    F.linear; gradients have their operands' dtypes, also if the backward runs under autocast."""
    hidden, weight, target = problem(torch.float32, device)
    low = weight.detach().bfloat16().requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        loss = linear_cross_entropy(hidden, low, target, tile=8)
        loss.backward()
    want, of_hidden, of_weight = reference(hidden.bfloat16(), low, target)
    assert hidden.grad.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.detach().double(), want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(hidden.grad.double(), of_hidden, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(low.grad.double(), of_weight, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mean_over_all_tokens_leaves_nothing_to_scale(
    dtype: torch.dtype, ignored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But in float16, where it would round to zero what a loss' scale is to save."""
    hidden, weight, target = problem(dtype)
    target.clamp_(min=0).view(-1)[:ignored] = -100
    factors = list[float]()
    scale = streamed_loss.scale_
    monkeypatch.setattr(streamed_loss, "scale_", lambda v, f: factors.append(float(f)) or scale(v, f))
    linear_cross_entropy(hidden, weight, target).backward()
    want = 1 / (20 - ignored) if dtype == torch.float16 else 20 / (20 - ignored)
    assert factors == [pytest.approx(want, rel=1e-6)] and (factors[0] == 1) == (not ignored and dtype != torch.float16)
    *_, of_weight = reference(hidden, weight, target)
    assert float((weight.grad.double() - of_weight).norm() / of_weight.norm()) < 2e-2
