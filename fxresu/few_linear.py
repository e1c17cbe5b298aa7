"""`nn.Linear` of few tokens in eager code, in the sparse phase and in RESU: the weight's gradient is written only where
the phase wants it (`fxresu.kernels.grad_weight`), where autograd's would be dense, then masked or gathered by a hook.

With few tokens the dense gradient is as much memory traffic as the layer has. Compiled code has "few_tokens" among the
candidates of `fxresu::linear` for that, products included; in eager code those wait for the host longer than they save.
Who asks for the weight's own gradient (`torch.autograd.grad`, a backward that is recorded) gets the dense one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxresu.kernels import grad_gather, grad_masked
from fxresu.kernels.mm_few import MOST_TOKENS
from fxresu.passes._compat import inside_functorch, leaf_asked, only_inlined, tracing

from .managed import ManagedWeight

__all__ = ["few_linear"]

SMALLEST = 2**20
"""Entries of a weight below which a step waits for launches whatever they move."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _FewLinear(torch.autograd.Function):
    """x Wᵀ + b, whose backward gives dθ to the anchor of θ, or M∘dW to the weight where there is no θ.

    Which of the two it is comes first among the inputs: autograd's nodes are those of the tensors, in their order.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor | None, weight: Tensor, x: Tensor, bias: Tensor | None, entry: ManagedWeight
    ) -> Tensor:
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[2] else None)
        ctx.entry, ctx.theta = entry, None if anchor is None else (tuple(anchor.shape), anchor.dtype)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dy, inputs = grad.reshape(-1, grad.shape[-1]), x.view(-1, x.shape[-1])
        dx = None
        if ctx.needs_input_grad[2]:
            if torch.is_grad_enabled():  # a gradient of dX reaches the weight as a dense one
                ctx.entry.ensure_hook(weight)
            dx = (dy @ weight).view(x.shape)
        dbias = dy.sum(0) if ctx.needs_input_grad[3] else None
        return *(_of_theta if ctx.theta else _of_weight)(ctx, dy, inputs), dx, dbias, None


def _of_theta(ctx: Any, dy: Tensor, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the anchor and the weight in RESU. A dense one is gathered by the record's hook if it is added."""
    anchor, weight = (node for node, _ in ctx.next_functions[:2])
    if leaf_asked(anchor) and not torch.is_grad_enabled():
        return grad_gather(dy, inputs, ctx.entry.bits, ctx.entry.row_start, *ctx.theta), None
    return None, dy.t() @ inputs if leaf_asked(weight) else None


def _of_weight(ctx: Any, dy: Tensor, inputs: Tensor) -> tuple[None, Tensor | None]:
    """Gradient of the weight in a sparse phase: masked where it is added to the leaf."""
    asked = leaf_asked(ctx.next_functions[0][0])
    if asked == "added" and not torch.is_grad_enabled():
        return None, grad_masked(dy, inputs, ctx.entry.bits)
    if not asked:
        return None, None
    dense = dy.t() @ inputs
    return None, dense.where(ctx.entry.mask(), 0) if asked == "added" else dense


def few_linear(entry: ManagedWeight, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """`F.linear` for up to `MOST_TOKENS` tokens and a large managed weight on a GPU; None where that is not asked for,
    or not to be had: in other phases, without gradients, in traces, under autocast, and where others look at the
    weight's gradient or bring the weight."""
    if tracing() or entry.state.mode not in ("sparse", "resu") or not torch.is_grad_enabled():
        return None
    if inside_functorch() or torch.jit.is_tracing():
        return None
    if not (_fits(entry, weight, x, bias) and _alone(entry, weight)):
        return None
    anchor = None
    if entry.state.mode == "resu":
        anchor = entry.anchor
        if anchor is None or not anchor.requires_grad:
            return None
        entry.ensure_hook(weight)
    entry.note_read()
    return _FewLinear.apply(anchor, weight, x, bias, entry)


def _fits(entry: ManagedWeight, weight: Tensor, x: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels take these operands, and are worth it."""
    # Only plain tensors: subclasses may stand for others. Modes that watch operations change nothing here, since a
    # recomputed forward may run under one and has to save what the first did.
    if type(x) is not Tensor or not _on_gpu(x) or weight.numel() < SMALLEST:
        return False
    if entry.shape[1:] != (entry.k,) or x.shape[-1] != entry.k or not 0 < x.numel() <= MOST_TOKENS * entry.k:
        return False
    if not x.is_contiguous() or torch.is_autocast_enabled(x.device.type):
        return False
    dtype = x.dtype
    return (
        dtype in _DTYPES
        and weight.dtype == dtype
        and (bias is None or bias.dtype == dtype)
        and x.device == weight.device
    )


def _alone(entry: ManagedWeight, weight: Tensor) -> bool:
    """Whether the weight is where it belongs, trains all its candidates, and only the record's own hook sees its
    gradient. (θ that is updated inside the backward hears of a gradient once, from the hook: a weight may have other
    uses than this one.)"""
    if entry.packed or entry.stream is not None or entry.consume is not None or entry.bits is None:
        return False
    if entry.columns is not None or entry.panel_start is not None:
        return False
    if type(weight) is not nn.Parameter or not weight.requires_grad or weight._backward_hooks:
        return False
    return len(weight._post_accumulate_grad_hooks or ()) <= int(entry.hooked(weight))


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


only_inlined(few_linear)
