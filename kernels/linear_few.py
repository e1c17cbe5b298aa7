"""Linears of few tokens: the gradient of the weight is written only where the phase wants it (`grad_weight`), and
"few_tokens" multiplies by kernels that read the weight at the memory's speed (`mm_few`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._autocast import as_autocast
from .choose import Problem, register
from .grad_weight import grad_gather, grad_masked
from .mm_few import MOST_TOKENS as FEWEST
from .mm_few import mm_few

MOST_TOKENS = 512
"""Beyond this a GEMM of the vendor's library wins by far; such problems are not measured."""


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b (x W + b if transposed). `theta` receives dθ if it is given, else `weight` receives M∘dW (dW without
    a mask), all straight in their own dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, theta: Tensor | None,
        bits: Tensor | None, row_start: Tensor | None, transposed: bool, few: bool,
    ) -> Tensor:  # fmt: skip
        low = weight.to(x.dtype)
        trained = ctx.needs_input_grad[1 if theta is None else 3]
        ctx.save_for_backward(x if trained else None, low if ctx.needs_input_grad[0] else None, bits, row_start)
        ctx.transposed, ctx.trained, ctx.dtype, ctx.few = transposed, trained, weight.dtype, few
        ctx.theta = None if theta is None else (tuple(theta.shape), theta.dtype)
        return _product(x, low.t() if transposed else low, bias, few)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low, bits, row_start = ctx.saved_tensors
        dx = dw = dbias = dtheta = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, low if ctx.transposed else low.t(), None, ctx.few)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        if ctx.trained:
            left, right = (x, dy) if ctx.transposed else (dy, x)
            if bits is None:
                dw = (left.t() @ right).to(ctx.dtype)
            elif ctx.theta is None:
                dw = grad_masked(left, right, bits, ctx.dtype)
            else:
                dtheta = grad_gather(left, right, bits, row_start, *ctx.theta)
        return dx, dw, dbias, dtheta, None, None, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, few: bool) -> Tensor:
    """x Wᵀ + b."""
    if not few:
        return torch.nn.functional.linear(x, weight, bias)
    return mm_few(x, weight, bias)


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor | None, bits: Tensor | None,
    row_start: Tensor | None, columns: Tensor | None, mode: str, tag: str, transposed: bool, few: bool = False,
) -> Tensor:  # fmt: skip
    x, bias = as_autocast(input, bias)
    theta = anchor if mode == "resu" else None
    if mode in ("resu", "frozen"):
        weight = weight.detach()
    if mode in ("dense", "frozen"):
        bits = None
    leading = x.shape[:-1]
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, theta, bits, row_start, transposed, few)
    return y.reshape(*leading, y.shape[-1])


def _supports(problem: Problem, device: torch.device, mode: str) -> str | None:
    if problem.mode != mode:
        return f"mode={problem.mode}: it is for {mode}"
    if problem.layout == "columns":
        return "theta is a panel of columns"
    if problem.tokens > MOST_TOKENS:
        return f"tokens={problem.tokens}: it is for at most {MOST_TOKENS}"
    if problem.dtype == "float64" and device.type == "cuda":
        return "dtype=float64: its sums are float32"
    return None


def _supports_few(problem: Problem, device: torch.device) -> str | None:
    if problem.tokens > FEWEST:
        return f"tokens={problem.tokens}: it is for at most {FEWEST}"
    return _supports(problem, device, problem.mode)


register("linear", "few_tokens", _supports_few, functools.partial(_linear, few=True))
register("linear", "grad_gather", lambda problem, device: _supports(problem, device, "resu"), _linear)
register("linear", "grad_masked", lambda problem, device: _supports(problem, device, "sparse"), _linear)
