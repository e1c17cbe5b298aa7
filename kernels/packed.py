"""Linears on packed storage: which product runs, and how the frozen values are kept.

`compose` (every number of tokens) writes the dense weight into scratch; `decode_linear` (few) reads the packed one. The
backward is the same: dX composes the weight once more, dθ is gathered from one layer's dense dW.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._autocast import as_autocast, autocast_off
from .choose import Problem, register
from .compose import compose, packed_linear
from .decode_linear import FORMS, MOST_TOKENS, decode_linear
from .quantized import compose_quantized

MOST_ONE_BY_ONE = 4


def composed(active: Tensor, scale: Tensor | None, theta: Tensor | None, bits: Tensor, active_start: Tensor,
             row_start: Tensor | None, K: int, dtype: torch.dtype, use: int = 0, anchor: Tensor | None = None,
             columns: Tensor | None = None, panel: Tensor | None = None, panel_bits: Tensor | None = None
             ) -> Tensor:  # fmt: skip
    """M∘W + Φ(θ) as [rows, K] of `dtype`, from active values of a float dtype, or from codes with their scales."""
    rest = theta, bits, active_start, row_start, K, dtype, use, anchor, columns, panel, panel_bits
    return compose(active, *rest) if scale is None else compose_quantized(active, scale, *rest)


class _Linear(torch.autograd.Function):
    """y = x W^T + b; no dense weight is saved, and with `how` none is made in the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, active: Tensor, scale: Tensor | None, theta: Tensor | None, bits: Tensor,
                active_start: Tensor, row_start: Tensor | None, how: str) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, active, scale, theta, bits, active_start, row_start)
        if how:
            return decode_linear(x.contiguous(), active, theta, bits, active_start, row_start, how)
        with autocast_off(x.device.type):
            weight = composed(active, scale, theta, bits, active_start, row_start, x.shape[1], x.dtype)
            return torch.mm(x, weight.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, active, scale, theta, bits, active_start, row_start = ctx.saved_tensors
        dx = dtheta = None
        with autocast_off(x.device.type):
            if ctx.needs_input_grad[0]:
                weight = composed(active, scale, theta, bits, active_start, row_start, x.shape[1], x.dtype, 1, dy)
                dx = torch.mm(dy, weight)
            if ctx.needs_input_grad[3]:
                dweight = torch.mm(dy.t(), x)
                dtheta = torch.ops.fxresu.gather(dweight, bits, row_start, None, *theta.shape, theta.dtype, False)
        return dx, None, None, dtheta, None, None, None, None


class _ColumnLinear(torch.autograd.Function):
    """y = x W^T + b with columns as candidates: only these columns of x live until the backward, where dθ comes from
    one smaller dense product. x[:, columns] is copied: a slice would keep the whole of x alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, active: Tensor, scale: Tensor | None, theta: Tensor, bits: Tensor,
                active_start: Tensor, row_start: Tensor, columns: Tensor, panel: Tensor, panel_bits: Tensor
                ) -> Tensor:  # fmt: skip
        inputs = x.index_select(-1, columns.long()) if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(inputs, active, scale, theta, bits, active_start, row_start, columns, panel, panel_bits)
        ctx.K, ctx.dtype = x.shape[-1], x.dtype
        with autocast_off(x.device.type):
            weight = composed(active, scale, theta, bits, active_start, row_start, ctx.K, x.dtype, 0, None, columns,
                              panel, panel_bits)  # fmt: skip
            return torch.mm(x.reshape(-1, ctx.K), weight.t()).view(*x.shape[:-1], bits.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, active, scale, theta, bits, active_start, row_start, columns, panel, panel_bits = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        dx = dtheta = None
        with autocast_off(grad.device.type):
            if ctx.needs_input_grad[0]:
                weight = composed(active, scale, theta, bits, active_start, row_start, ctx.K, ctx.dtype, 1, dy, columns,
                                  panel, panel_bits)  # fmt: skip
                dx = torch.mm(dy, weight).view(*grad.shape[:-1], ctx.K)
            if ctx.needs_input_grad[3]:
                dpanel = torch.mm(dy.t(), inputs.reshape(-1, inputs.shape[-1]))
                dtheta = torch.ops.fxresu.gather(dpanel, panel_bits, row_start, None, *theta.shape, theta.dtype, False)
        return dx, None, None, dtheta, *(None,) * 6


def linear_packed_columns(
    input: Tensor, active: Tensor, theta: Tensor, bias: Tensor | None, bits: Tensor, active_start: Tensor,
    row_start: Tensor, columns: Tensor, panel: Tensor, panel_bits: Tensor, out_features: int, in_features: int,
    tag: str = "", scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`linear_packed` where θ covers the pruned coordinates of some columns, saving `input[..., columns]` and not
    `input`. `columns`, `panel` and `panel_bits` are those of `compose`; row_start counts by the lines of panel_bits."""
    (x,) = as_autocast(input)
    y = _ColumnLinear.apply(x, active.detach(), scale, theta, bits, active_start, row_start, columns, panel, panel_bits)
    return y if bias is None else y + bias.to(y.dtype)


def _linear(
    input: Tensor, active: Tensor, theta: Tensor | None, bits: Tensor, active_start: Tensor, row_start: Tensor | None,
    bias: Tensor | None, out_features: int, in_features: int, scale: Tensor | None, *, how: str = "",
) -> Tensor:  # fmt: skip
    if scale is None and not how:
        return packed_linear(input, active, theta, bits, active_start, row_start, bias, out_features, in_features)
    (x,) = as_autocast(input)
    y = _Linear.apply(x.reshape(-1, in_features), active.detach(), scale, theta, bits, active_start, row_start, how)
    y = y.reshape(*x.shape[:-1], out_features)
    return y if bias is None else y + bias.to(y.dtype)


def _supports(problem: Problem, device: torch.device, how: str) -> str | None:
    form = FORMS[how]
    if problem.tokens > MOST_TOKENS:
        return f"tokens={problem.tokens}: it is for at most {MOST_TOKENS}"
    if not form.dot and problem.tokens > MOST_ONE_BY_ONE:
        return f"tokens={problem.tokens}: it decodes for every token anew, for at most {MOST_ONE_BY_ONE}"
    if problem.values:
        return f"values={problem.values}: it decodes values of a float dtype"
    if problem.dtype == "float64" and device.type == "cuda":
        return "dtype=float64: its sums are float32"
    if form.pairs and problem.pattern != "2:4":
        return "the mask does not keep two of every four inputs"
    if form.pairs and (problem.weight_dtype != problem.dtype or problem.dtype not in ("bfloat16", "float16")):
        return f"values {problem.weight_dtype}, product {problem.dtype}: it needs one 16-bit dtype for both"
    return None


register("linear_packed", "compose", lambda problem, device: None, _linear, default=True)
for _name in FORMS:
    register("linear_packed", _name, functools.partial(_supports, how=_name), functools.partial(_linear, how=_name))
