"""Products of few tokens with a large matrix, where the time is that of reading the matrix.

y = x Wᵀ with up to 64 rows of x. A vendor's float32 product of 32 rows with 4096 x 4096 values runs at 0.4 of the
memory's speed (56 µs on an H100). Here a program multiplies a block of W's rows by a share of the inputs on the matrix
units, and the shares are summed in a fixed order: the result is the same in every run.

float32 operands are multiplied as three TF32 products, as in `grad_weight`; under
`torch.set_float32_matmul_precision("high")` as one.
"""

from typing import Any

import torch
from torch import Tensor

from ._check import check_device, check_matrix
from ._registry import operation
from ._triton import INTERPRET, jit, launch, power_of_two, processors, tl, use_triton

MOST_TOKENS = 64
_BLOCK_N = 64
_BLOCK_R = 64
_PROGRAMS = 3  # of a multiprocessor


@jit
def _kernel(
    x,
    w,
    bias,
    out,
    T,
    N,
    R,
    x_token,
    x_input,
    w_row,
    w_input,
    bias_row,
    steps,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Share program_id(1) of the inputs, `steps` blocks, of the rows of block program_id(0). out: [shares, T, N].

    The first share has the bias in it."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * steps * BLOCK_R
    index = first + tl.arange(0, BLOCK_R)
    w_tile = w + row[:, None].to(tl.int64) * w_row + index[None, :].to(tl.int64) * w_input
    x_tile = x + token[None, :].to(tl.int64) * x_token + index[:, None].to(tl.int64) * x_input
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for step in range(steps):
        left = R - step * BLOCK_R  # inputs from this block on
        a = tl.load(w_tile, mask=(row < N)[:, None] & (index < left)[None, :], other=0)
        b = tl.load(x_tile, mask=(token < T)[None, :] & (index < left)[:, None], other=0)
        if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        w_tile += BLOCK_R * w_input
        x_tile += BLOCK_R * x_input
    if BIAS:  # noqa: SIM102 (decided when the kernel is compiled)
        if tl.program_id(1) == 0:
            total += tl.load(bias + row.to(tl.int64) * bias_row, mask=row < N, other=0).to(tl.float32)[:, None]
    place = (tl.program_id(1) * T + token[None, :]).to(tl.int64) * N + row[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < N)[:, None] & (token < T)[None, :])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_matrix("x", x, strided=True)
    check_matrix("weight", weight, strided=True)
    check_device("weight", weight, x)
    if x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"x [tokens, K] and weight [rows, K] must agree in K and dtype, not {tuple(x.shape)} "
            f"{x.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    if bias is not None and (tuple(bias.shape) != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype} of shape {(weight.shape[0],)}, not {bias.dtype} {tuple(bias.shape)}")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = mm_few(dy, weight.t()) if ctx.needs_input_grad[0] else None
    return dx, dy.t() @ x if ctx.needs_input_grad[1] else None, dy.sum(0) if ctx.needs_input_grad[2] else None


@operation("mm_few", fake=_fake, backward=_backward, setup_context=_setup, flops=_flops)
def _op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    (tokens, inputs), rows = x.shape, weight.shape[0]
    if not use_triton(x) or x.dtype == torch.float64 or not tokens <= MOST_TOKENS or 0 in (tokens, inputs, rows):
        return torch.nn.functional.linear(x, weight, bias)
    blocks, steps = -(-rows // _BLOCK_N), -(-inputs // _BLOCK_R)
    shares = min(max(_PROGRAMS * processors(x) // blocks, 1), steps)
    steps = -(-steps // shares)
    shares = -(-inputs // (steps * _BLOCK_R))
    out = x.new_empty((shares, tokens, rows), dtype=torch.float32)
    precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3"
    launch(
        _kernel,
        (blocks, shares),
        x,
        x,
        weight,
        x if bias is None else bias,
        out,
        tokens,
        rows,
        inputs,
        *x.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        steps,
        BLOCK_T=max(power_of_two(tokens), 16),
        BLOCK_N=_BLOCK_N,
        BLOCK_R=_BLOCK_R,
        BIAS=bias is not None,
        PRECISION=precision,
        WIDEN=INTERPRET,
        num_warps=4,
        num_stages=3,
    )
    return (out[0] if shares == 1 else out.sum(0)).to(x.dtype)


def mm_few(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x [tokens, K], weight [rows, K], bias [rows], of one float dtype and any strides; sums are float32.

    On a GPU up to 64 tokens run the kernel; more of them, float64, and a CPU run `torch.mm`. Differentiable. Raises
    ValueError for arguments that do not fit each other.
    """
    return torch.ops.fxresu.mm_few(x, weight, bias)
