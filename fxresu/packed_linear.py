"""`nn.Linear` on packed weights in eager code: the dense weight is composed for each product, and not kept for the
backward, which composes it again. Compiled code has `fxresu::linear_packed` for that."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxresu.kernels._autocast import active_dtype, autocast_off
from fxresu.passes._compat import inside_functorch, only_inlined, tracing

from .few_linear import few_linear
from .managed import ManagedWeight

__all__ = ["linear_forward", "packed_linear"]


class _Recomposed(torch.autograd.Function):
    """x Wᵀ + b with W = M∘W + Φ(θ) of a packed record. Where θ covers some inputs, only these of x are kept, and dθ
    comes from one smaller product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, bias: Tensor | None, entry: ManagedWeight) -> Tensor:
        kept = None
        if ctx.needs_input_grad[1]:
            covered = entry.panel is not None and entry.columns is not None
            kept = x.index_select(-1, entry.columns.long()) if covered else x  # type: ignore[union-attr]
        ctx.save_for_backward(kept, theta)
        ctx.entry, ctx.dtype = entry, x.dtype
        return F.linear(x, entry.compose(theta, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, theta = ctx.saved_tensors
        entry: ManagedWeight = ctx.entry
        flat = grad.reshape(-1, grad.shape[-1])
        dx = dtheta = None
        with autocast_off(grad.device.type):
            if ctx.needs_input_grad[0]:
                dx = torch.mm(flat, entry.compose(theta, ctx.dtype)).view(*grad.shape[:-1], entry.k)
            if ctx.needs_input_grad[1]:
                dense = torch.mm(flat.t(), kept.reshape(-1, kept.shape[-1]))
                dtheta = entry.from_panel(dense, theta.dtype)
        return dx, dtheta, flat.sum(0) if ctx.needs_input_grad[2] else None, None


def packed_linear(entry: ManagedWeight, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """`F.linear` on a packed weight under autograd; None where that is not to be had, or nothing would be kept: without
    gradients, in traces and `torch.func`, and where dtypes do not fit (which `F.linear` has a message for)."""
    if tracing() or not torch.is_grad_enabled() or inside_functorch() or torch.jit.is_tracing():
        return None
    if not entry.composes(weight) or x.shape[-1] != entry.k or entry.shape != (entry.rows, entry.k):
        return None
    low = active_dtype(x.device.type)
    if x.dtype != weight.dtype and low is None:
        return None
    x = x if low is None or x.dtype == torch.float64 else x.to(low)
    entry.note_read()
    return _Recomposed.apply(x, entry.operand(weight), bias, entry)


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """`nn.Linear.forward` of a managed class."""
    weight = self._parameters.get("weight")
    if weight is not None:
        entry = self._fxresu["weight"]
        out = (packed_linear if entry.packed else few_linear)(entry, weight, input, self.bias)
        if out is not None:
            return out
    return F.linear(input, self.weight, self.bias)


only_inlined(packed_linear, linear_forward)
