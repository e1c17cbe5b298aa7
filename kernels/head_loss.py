"""`fxresu::head_loss`: the mean cross-entropy of a linear head that gets no gradient, and its gradient, in one pass.

The logits of some tokens at a time exist, and turn into the loss' slope in place; one more product makes the gradient
of these tokens' hidden states of it. So the forward has done the backward's work: two products, as many as with whole
logits, and neither these nor their gradient are ever whole (at 8192 tokens and 128256 words 2.1 GB in bfloat16).
Because every token sees the whole vocabulary at once, nothing is summed up over tiles. The idea for heads that train
is in Hsu et al., "Liger Kernel", arXiv 2410.10989.
"""

from typing import Any

import torch
from torch import Tensor

from ._autocast import autocast_off
from ._check import check_device, check_float, check_matrix, math_dtype
from ._registry import operation, unobserved, written
from ._triton import INTERPRET, jit, launch, tl, use_triton

_BLOCK = 4096  # words at a time

# --- reference -------------------------------------------------------------------------------------------------------


def _slope_reference(logits: Tensor, target: Tensor, losses: Tensor, ignore: int, with_slope: bool) -> None:
    wide = logits.to(losses.dtype)
    counts = target != ignore
    known = (target >= 0) & (target < logits.shape[1])
    own = wide.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].where(known, torch.nan)
    denominator = wide.logsumexp(1)
    losses.copy_(torch.where(counts, denominator - own, 0))
    if with_slope:
        words = torch.arange(logits.shape[1], device=logits.device)
        slope = (wide - denominator[:, None]).exp() - (words == target[:, None]).to(wide.dtype)
        logits.copy_(torch.where(counts[:, None], slope, 0))


# --- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _slope_kernel(
    logits, target, losses, words, ignore, WIDE: tl.constexpr, WITH_SLOPE: tl.constexpr, BLOCK: tl.constexpr
):
    """One token a program. Every lane keeps its own maximum and sum; lanes meet once."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * words
    label = tl.load(target + row)
    counts = label != ignore
    lane = tl.arange(0, BLOCK)
    # Finite, so that a lane without words has a difference to itself.
    top = tl.full([BLOCK], -3.0e38, WIDE)
    total = tl.zeros([BLOCK], WIDE)
    for first in range(0, words, BLOCK):
        value = tl.load(line + first + lane, mask=first + lane < words, other=float("-inf")).to(WIDE)
        higher = tl.maximum(top, value)
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        top = higher
    highest = tl.max(top, axis=0)
    denominator = highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))
    own = tl.load(line + label, mask=(label >= 0) & (label < words), other=float("nan")).to(WIDE)
    # The slopes take the logits' place, and the target's is written by another warp than the one that stores the loss.
    tl.debug_barrier()
    tl.store(losses + row, tl.where(counts, denominator - own, 0.0))
    if WITH_SLOPE:
        for first in range(0, words, BLOCK):
            inside = first + lane < words
            value = tl.load(line + first + lane, mask=inside, other=0).to(WIDE)
            slope = tl.exp(value - denominator) - tl.where(first + lane == label, 1.0, 0.0)
            tl.store(line + first + lane, tl.where(counts, slope, 0.0).to(logits.dtype.element_ty), mask=inside)


def _slope(logits: Tensor, target: Tensor, losses: Tensor, ignore: int, with_slope: bool) -> None:
    """Write every token's loss, 0 where it does not count, and with `with_slope` softmax - one-hot over the logits."""
    if not use_triton(logits):
        _slope_reference(logits, target, losses, ignore, with_slope)
        return
    wide = tl.float64 if losses.dtype == torch.float64 else tl.float32
    launch(
        _slope_kernel,
        logits.shape[0],
        logits,
        logits,
        target,
        losses,
        logits.shape[1],
        ignore,
        WIDE=wide,
        WITH_SLOPE=with_slope,
        BLOCK=_BLOCK,
        num_warps=8,
    )


@jit
def _scale_kernel(values, factor, n, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by == 1.0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(values + at, mask=at < n, other=0).to(tl.float32) * by
    tl.store(values + at, scaled.to(values.dtype.element_ty), mask=at < n)


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply values by a scalar tensor in place, rounded once; by 1 it takes no time. torch's `mul_` of bfloat16 by a
    float32 scalar on the device takes one entry at a time, and four times as long."""
    kernel = (values.is_cuda or INTERPRET) and values.is_contiguous() and values.dtype != torch.float64
    if not (kernel and unobserved(values, factor)):
        return values.mul_(factor)
    n = values.numel()
    launch(_scale_kernel, -(-n // _BLOCK), values, values, factor, n, BLOCK=_BLOCK, num_warps=8)
    written(values)
    return values


# --- operations ------------------------------------------------------------------------------------------------------


def _rows_fake(logits: Tensor, target: Tensor, losses: Tensor, ignore_index: int) -> None:
    check_matrix("logits", logits)
    check_float("logits.dtype", logits.dtype)
    if not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous, not of strides {logits.stride()}")
    for name, one, dtype in (("target", target, torch.int64), ("losses", losses, math_dtype(logits.dtype))):
        if one.shape != logits.shape[:1] or one.dtype != dtype or not one.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} [{len(logits)}], not {one.dtype} {tuple(one.shape)}")
        check_device(name, one, logits)


@operation("slope_rows_", ("logits", "losses"), fake=_rows_fake)
def _slope_rows_op(logits: Tensor, target: Tensor, losses: Tensor, ignore_index: int) -> None:
    _rows_fake(logits, target, losses, ignore_index)
    _slope(logits, target, losses, ignore_index, True)


def slope_rows_(logits: Tensor, target: Tensor, losses: Tensor, ignore_index: int) -> Tensor:
    """softmax - one-hot of some tokens over their logits, in place, and every token's loss; as the operation
    `fxresu::slope_rows_`. Not differentiable.

    Args:
        logits: [N, V], any float dtype, contiguous.
        target: int64 [N]; one outside of [0, V) that is not ignore_index makes a loss NaN.
        losses: [N], float32 (float64 of float64): written, 0 where the target is ignore_index, as the slope is.

    Raises ValueError for operands that do not fit, before anything is written.
    """
    with torch.no_grad():
        torch.ops.fxresu.slope_rows_(logits, target, losses, ignore_index)
    return logits


def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore: int,
    tile: int,
    with_hidden: bool,
    with_weight: bool,
    share: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Every token's loss, float32 [N] (float64 of float64), and the gradients of their sum for hidden [N, D] and for
    the head [V, D], this one times `share`, summed up over tiles in its own precision; `tile` tokens at a time."""
    total = hidden.shape[0]
    losses = hidden.new_empty((total,), dtype=math_dtype(hidden.dtype))
    of_hidden = torch.empty_like(hidden) if with_hidden else None
    of_weight = (torch.empty_like if total else torch.zeros_like)(weight) if with_weight else None
    with autocast_off(hidden.device.type):
        for start in range(0, total, tile):
            piece = slice(start, start + tile)
            logits = torch.mm(hidden[piece], weight.t())
            if not (with_hidden or with_weight):
                _slope(logits, target[piece], losses[piece], ignore, False)
                continue
            slope_rows_(logits, target[piece], losses[piece], ignore)
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden[piece])
            if of_weight is not None:  # with beta=0 what is there does not matter
                of_weight.addmm_(logits.t(), hidden[piece], beta=int(start > 0), alpha=share)
            del logits  # before the next tile's
    return losses, of_hidden, of_weight


def _fake(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, tile: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = torch.empty_like(hidden) if with_gradient else hidden.new_empty((0,))
    return hidden.new_empty((), dtype=math_dtype(hidden.dtype)), gradient, target.new_empty(())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, gradient, count = output
    ctx.save_for_backward(gradient, count)
    ctx.mark_non_differentiable(gradient, count)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # the gradient was made in the forward: nothing leads back from it to hidden
        raise RuntimeError("head_loss has no second derivative; use torch.nn.functional.cross_entropy for create_graph")
    gradient, count = ctx.saved_tensors
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 6
    # Here and not in the slopes: in float16 a share of 1 / tokens would round to zero.
    share = torch.where(count > 0, grad / count, 0)
    return (gradient * share).to(gradient.dtype), None, None, None, None, None


def _flops(
    hidden: Any, weight: Any, target: Any, ignore_index: int, tile: int, with_gradient: bool, *args: Any, **kwargs: Any
) -> int:
    return 2 * hidden[0] * weight[0] * weight[1] * (2 if with_gradient else 1)


@operation("head_loss", fake=_fake, backward=_backward, setup_context=_setup, flops=_flops)
def head_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, tile: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss; gradient of the summed loss for hidden, or nothing; number of targets that count).

    Args:
        hidden: [N, D], any float dtype.
        weight: [V, D] of the same dtype; gets no gradient.
        target: int64 [N]; one outside of [0, V) that is not ignore_index makes the loss NaN.
        tile: tokens at a time, positive.
        with_gradient: whether the loss will be differentiated.

    Returns:
        loss: float32 scalar (float64 of float64), NaN if no target counts; differentiable for `hidden`. gradient:
        [N, D] like hidden, or [0]. count: int64 scalar.
    """
    losses, gradient, _ = losses_and_gradients(hidden, weight, target, ignore_index, tile, with_gradient, False)
    count = (target != ignore_index).sum()
    return losses.sum() / count, hidden.new_empty((0,)) if gradient is None else gradient, count
