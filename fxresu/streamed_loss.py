"""Cross-entropy of a linear head whose logits are never whole.

Tokens are worked off in tiles, whose logits become the loss' slope, and gradients, at once (after Hsu et al., "Liger
Kernel", arXiv 2410.10989; for a head that gets no gradient, such as a frozen one, in `kernels.head_loss`): as many
products as with whole logits, whose memory is saved, at 8192 tokens and 128256 words 2.1 GB in bfloat16 and as much for
their gradient. The head's gradient is summed up over tiles in its own precision, as over micro-batches.

Of many tokens these tiles would be too many for that. Then, in a graph of `torch.compile`, and where `tile` says how
many words to take, it is the vocabulary that is worked off in tiles: once for the softmax' denominator, and again in
the backward for the gradients, each tile's in one product; the gradient of the hidden states is summed up in float32.
This costs one product more (four instead of three; Wijmans et al., "Cut your losses in large-vocabulary language
models", arXiv 2411.09009).

torch has `torch.nn.functional.linear_cross_entropy` from 2.13 on only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxresu.kernels import head_loss, slope_tile_
from fxresu.kernels._autocast import as_autocast, autocast_off
from fxresu.kernels.head_loss import losses_and_gradients, scale_
from fxresu.kernels.slope_tile import slope_tile_reference

from .errors import ConfigError

__all__ = ["linear_cross_entropy"]

_TILE_BYTES = 2**27  # of a tile's logits in float32
_TOKENS_BYTES = 2**28  # of some tokens' logits in their dtype: the head, and its gradient, are read for every tile
_ROWS = 128  # of a product that a GPU takes at a time
_MOST_TILES = 8  # of tokens whose parts of the head's gradient are summed up


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100, tile: int | None = None
) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T` against `target`, as `torch.nn.functional.cross_entropy` of the logits.

    Under autocast the product is in its dtype, as that of a linear.

    Args:
        hidden: [..., D], any float dtype.
        weight: [V, D] of the head, of the same dtype unless autocast makes it so.
        target: int64 [...], words in [0, V) or `ignore_index`.
        ignore_index: targets that do not count; if none counts the loss is NaN, as torch's is.
        tile: words at a time. A head that gets no gradient takes as many logits at a time, in whole tokens. None: 256
            MB of logits, in whole tokens; where a head that trains would take more than eight tiles of them, words
            whose logits are 128 MB in float32.

    Returns:
        A float32 scalar (float64 of float64).

    Raises:
        ConfigError: shapes or dtypes that do not fit.
    """
    hidden, weight = as_autocast(hidden, weight)
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    if weight.dim() != 2 or weight.shape[1] != flat.shape[1] or weight.dtype != hidden.dtype:
        raise ConfigError(
            f"weight: {weight.dtype} of shape {tuple(weight.shape)} does not fit hidden, {hidden.dtype} of shape"
            f" {tuple(hidden.shape)}; expected [V, {flat.shape[1]}] of the same dtype"
        )
    if labels.dtype != torch.int64 or labels.shape[0] != flat.shape[0]:
        raise ConfigError(
            f"target: {target.dtype} of shape {tuple(target.shape)}; expected int64 of shape {tuple(hidden.shape[:-1])}"
        )
    words = max(_TILE_BYTES // (4 * max(flat.shape[0], 1)) // 128 * 128, 128) if tile is None else tile
    if words < 1:
        raise ConfigError(f"tile={tile!r}: use a positive number of words")
    rows = _TOKENS_BYTES // flat.element_size() if tile is None else words * flat.shape[0]
    tokens = max(rows // max(weight.shape[0], 1), 1)
    if tile is None and tokens > _ROWS:  # products of a few rows more would take as long as of _ROWS more
        tokens = tokens // _ROWS * _ROWS
    differentiated = torch.is_grad_enabled() and flat.requires_grad
    operands = flat.contiguous(), weight, labels.contiguous(), ignore_index
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return head_loss(operands[0], weight.detach(), *operands[2:], tokens, differentiated)[0]
    if tile is None and flat.shape[0] <= _MOST_TILES * tokens and not torch.compiler.is_compiling():
        return _AtOnce.apply(*operands, tokens)
    with autocast_off(flat.device.type):
        return _LinearCrossEntropy.apply(flat, weight, labels, ignore_index, words)


class _AtOnce(torch.autograd.Function):
    """Of a head that trains, some tokens at a time. All that the backward does is to scale."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, ignore: int, tokens: int) -> Tensor:
        operands = hidden, weight, target, ignore, tokens
        # Most often the mean is over all tokens, and the backward has nothing left to multiply by. In float16 a share
        # of 1 / tokens would round to zero what a loss' scale, which comes in the backward, is to save.
        ctx.share = 1.0 if hidden.dtype == torch.float16 else 1 / max(hidden.shape[0], 1)
        losses, of_hidden, ctx.of_weight = losses_and_gradients(*operands, ctx.needs_input_grad[0], True, ctx.share)
        count = (target != ignore).sum()
        ctx.save_for_backward(hidden, weight, target, of_hidden, count)
        ctx.ignore, ctx.tokens = ignore, tokens
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, target, of_hidden, count = ctx.saved_tensors
        # A copy would be as large as the head, so it is given away; another backward through this graph makes it again.
        of_weight, ctx.of_weight = ctx.of_weight, None
        if of_weight is None:
            *_, of_weight = losses_and_gradients(hidden, weight, target, ctx.ignore, ctx.tokens, False, True, ctx.share)
        share = torch.where(count > 0, grad / count, 0)
        scaled = None if of_hidden is None else (of_hidden * share).to(of_hidden.dtype)
        left = torch.where(count > 0, grad / count / ctx.share, 0)
        return scaled, scale_(of_weight, left), None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, ignore: int, tile: int) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        denominator = hidden.new_full((hidden.shape[0],), -torch.inf, dtype=wide)
        own = hidden.new_zeros((hidden.shape[0],), dtype=wide)
        step = _fused(_forward_tile, hidden)
        for start in range(0, weight.shape[0], tile):
            logits = hidden @ weight[start : start + tile].t()
            denominator, own = step(logits, denominator, own, target, _scalar(start, target))
        counts = target != ignore
        total = counts.sum()
        ctx.save_for_backward(hidden, weight, target, denominator, total)
        ctx.ignore, ctx.tile = ignore, tile
        return torch.where(counts, denominator - own, 0).sum() / total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with autocast_off(grad.device.type):
            return *_gradients(ctx, grad), None, None, None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    hidden, weight, target, denominator, total = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    of_hidden = torch.zeros_like(hidden, dtype=denominator.dtype) if need_hidden else None
    of_weight = torch.empty_like(weight) if need_weight else None
    factor = torch.where(target != ctx.ignore, grad / total, 0)
    for start in range(0, weight.shape[0], ctx.tile):
        part = weight[start : start + ctx.tile]
        logits = hidden @ part.t()
        if torch.compiler.is_compiling():  # a graph fuses it
            slope = slope_tile_reference(logits, denominator, factor, target, start)
        else:
            slope = slope_tile_(logits, denominator, factor, target, start)
        if of_weight is not None:
            torch.mm(slope.t(), hidden, out=of_weight[start : start + ctx.tile])
        if of_hidden is not None:
            of_hidden += slope @ part
    return None if of_hidden is None else of_hidden.to(hidden.dtype), of_weight


def _forward_tile(
    logits: Tensor, denominator: Tensor, own: Tensor, target: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """log of the summed exponentials so far, and every target's logit once its tile has come."""
    values = logits.to(denominator.dtype)
    place = target - start
    here = (place >= 0) & (place < values.shape[1])
    found = values.gather(1, place.clamp(0, values.shape[1] - 1)[:, None])[:, 0]
    return torch.logaddexp(denominator, torch.logsumexp(values, 1)), torch.where(here, found, own)


def _scalar(value: int, like: Tensor) -> Tensor:
    """On the device without a wait; a Python number would be compiled in."""
    return torch.full((), value, device=like.device)


def _fused(function: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
    """The function compiled on a GPU, where it would move a tile's logits six times otherwise."""
    return _compiled(function) if like.is_cuda and not torch.compiler.is_compiling() else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=None)
