"""Linears on 2:4 sparse tensor cores, for weights whose zeros follow a 2:4 pattern along rows and columns.

The weight is compressed on every use (in training it changes on every step), for y = x Wᵀ and transposed for
dX = dY W, which is why masks keep two of four in columns too: both at once by a kernel of fxresu's own on devices whose
order of indices it knows (`sparse_order`), else by the library. dW is a dense product, masked like the default's.
Values and indices take 9/16 of the bytes of the weight; the transposed form is what the backward keeps of it.

On CPU the same operations run by definition on a plain layout of the same size: K/2 values a row, then K/16 of their
dtype with two bits of position for each value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _semi_structured as cuda
from ._autocast import as_autocast
from ._check import check_bits, check_matrix
from ._registry import operation
from .bits import unpack_aten
from .choose import Problem, register

DTYPES = (torch.bfloat16, torch.float16)

# --- reference -------------------------------------------------------------------------------------------------------


def compress_reference(weight: Tensor) -> Tensor:
    rows, K = weight.shape
    groups = weight.view(rows, K // 4, 4)
    if bool(((groups != 0).sum(-1) > 2).any()):
        raise ValueError("weight has a group of 4 consecutive inputs with more than 2 nonzero values: not 2:4 sparse")
    index = (groups == 0).int().argsort(dim=-1, stable=True)[..., :2].sort(-1).values
    values = groups.gather(-1, index).view(rows, K // 2)
    pairs = (index[..., 0] | index[..., 1] << 2).view(rows, K // 8, 2)
    meta = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8).view(weight.dtype)
    return torch.cat((values, meta), dim=1)


def decompress_reference(packed: Tensor) -> Tensor:
    rows = packed.shape[0]
    K = packed.shape[1] * 16 // 9
    values = packed[:, : K // 2].view(rows, K // 4, 2)
    meta = packed[:, K // 2 :].contiguous().view(torch.uint8).long()
    pairs = torch.stack((meta & 15, meta >> 4), dim=-1).view(rows, K // 4)
    index = torch.stack((pairs & 3, pairs >> 2), dim=-1)
    return values.new_zeros((rows, K // 4, 4)).scatter_(-1, index, values).view(rows, K)


# --- operations ------------------------------------------------------------------------------------------------------


def _check(weight: Tensor) -> None:
    check_matrix("weight", weight)
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight must be bfloat16 or float16 for 2:4 products, not {weight.dtype}")
    _check_multiples(weight)


def _check_multiples(weight: Tensor) -> None:
    multiple = cuda.MULTIPLE if weight.is_cuda else 16
    if weight.shape[0] % multiple or weight.shape[1] % multiple:
        raise ValueError(f"weight [rows, K] must have multiples of {multiple}, not {tuple(weight.shape)}")


def _compressed(weight: Tensor, rows: int, K: int) -> Tensor:
    return weight.new_empty((rows, K // 16 * 9))


def _compress_fake(weight: Tensor) -> Tensor:
    _check(weight)
    return _compressed(weight, *weight.shape)


@operation("compress_24", fake=_compress_fake)
def _compress_op(weight: Tensor) -> Tensor:
    _check(weight)
    return cuda.compress(weight) if weight.is_cuda else compress_reference(weight)


def _check_both(weight: Tensor, bits: Tensor, dtype: torch.dtype) -> None:
    check_matrix("weight", weight)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be bfloat16 or float16 for 2:4 products, not {dtype}")
    _check_multiples(weight)
    check_bits("bits", bits, weight.shape[0], weight.shape[1], weight)


def _both_fake(weight: Tensor, bits: Tensor, dtype: torch.dtype, back: bool) -> tuple[Tensor, Tensor]:
    _check_both(weight, bits, dtype)
    rows, K = weight.shape
    low = weight.new_empty((), dtype=dtype)
    return _compressed(low, rows, K), _compressed(low, K, rows) if back else low.new_empty(0)


@operation("compress_24_both", fake=_both_fake)
def _both_op(weight: Tensor, bits: Tensor, dtype: torch.dtype, back: bool) -> tuple[Tensor, Tensor]:
    _check_both(weight, bits, dtype)
    if weight.is_cuda:
        ahead, transposed = cuda.compress_both(weight, bits, dtype, back)
    else:
        low = weight.to(dtype)
        ahead, transposed = compress_reference(low), compress_reference(low.t().contiguous()) if back else None
    return ahead, ahead.new_empty(0) if transposed is None else transposed


def _mm_check(packed: Tensor, x: Tensor) -> None:
    check_matrix("packed", packed)
    check_matrix("x", x, strided=True)
    if packed.dtype != x.dtype or packed.shape[1] * 16 != x.shape[1] * 9:
        raise ValueError(
            f"x [tokens, K] must be {packed.dtype} with K = {packed.shape[1] * 16 // 9}, not {x.dtype} {tuple(x.shape)}"
        )


def _mm_fake(packed: Tensor, x: Tensor) -> Tensor:
    _mm_check(packed, x)
    return x.new_empty((x.shape[0], packed.shape[0]))


def _mm_flops(packed: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    """Multiplications and additions that are executed: half of the dense product's."""
    return x[0] * packed[0] * x[1]


@operation("mm_24", fake=_mm_fake, flops=_mm_flops)
def _mm_op(packed: Tensor, x: Tensor) -> Tensor:
    _mm_check(packed, x)
    if x.shape[0] == 0:
        return x.new_empty((0, packed.shape[0]))
    if x.is_cuda:
        return cuda.multiply(packed, x)
    return (x.float() @ decompress_reference(packed).float().t()).to(x.dtype)


# --- public ----------------------------------------------------------------------------------------------------------


def compress_24(weight: Tensor) -> Tensor:
    """A 2:4 sparse weight [rows, K] (bfloat16 or float16, multiples of 16, on CUDA of 64) as [rows, 9 K / 16] for
    `mm_24`.

    On CUDA the order of values and indices is cuSPARSELt's own. On CPU a group with more than two nonzero values raises
    ValueError; on CUDA the result is then undefined.
    """
    return torch.ops.fxresu.compress_24(weight)


def compress_24_both(
    weight: Tensor, bits: Tensor, dtype: torch.dtype = torch.bfloat16, back: bool = True
) -> tuple[Tensor, Tensor]:
    """A weight [rows, K] with a 2:4 mask of rows and columns, and its transpose, for `mm_24`.

    weight: any float dtype, contiguous, multiples of 16 (on CUDA of 64), zero wherever `bits` (int32 [rows, K / 32])
    prune it. Returns [rows, 9 K / 16] and [K, 9 rows / 16] in `dtype` (bfloat16 or float16); without `back` the second
    is empty.
    """
    return torch.ops.fxresu.compress_24_both(weight, bits, dtype, back)


def mm_24(packed: Tensor, x: Tensor) -> Tensor:
    """x @ Wᵀ as [tokens, rows] of a compressed W and x [tokens, K] of its dtype; sums are float32."""
    return torch.ops.fxresu.mm_24(packed, x)


class _Linear(torch.autograd.Function):
    """y = x Wᵀ (x W if transposed) with both products of W on sparse tensor cores."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bits: Tensor | None, transposed: bool) -> Tensor:
        backward = ctx.needs_input_grad[0]
        ahead, back = _forms(weight, bits, x.dtype, transposed, backward)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, back, bits)
        ctx.transposed, ctx.dtype = transposed, weight.dtype
        return mm_24(ahead, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, back, bits = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = mm_24(back, dy.contiguous())
        if ctx.needs_input_grad[1]:
            dense = x.t() @ dy if ctx.transposed else dy.t() @ x
            dw = torch.where(unpack_aten(bits, dense.shape[1]), dense, 0).to(ctx.dtype)
        return dx, dw, None, None


def _forms(
    weight: Tensor, bits: Tensor | None, dtype: torch.dtype, transposed: bool, backward: bool
) -> tuple[Tensor, Tensor | None]:
    """What the forward multiplies by, and what the backward will."""
    if bits is not None:
        straight, across = compress_24_both(weight, bits, dtype, backward or transposed)
    else:  # a graph of a phase that does not know the mask
        low = weight.to(dtype)
        straight = compress_24(low) if backward or not transposed else low
        across = compress_24(low.t().contiguous()) if backward or transposed else low
    ahead, back = (across, straight) if transposed else (straight, across)
    return ahead, back if backward else None


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor | None, bits: Tensor | None,
    row_start: Tensor | None, columns: Tensor | None, mode: str, tag: str, transposed: bool,
) -> Tensor:  # fmt: skip
    (x,) = as_autocast(input)
    leading = x.shape[:-1]
    if mode == "frozen":
        weight = weight.detach()
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bits, transposed)
    y = y.reshape(*leading, y.shape[-1])
    return y if bias is None else y + bias.to(y.dtype)


def _supports(problem: Problem, device: torch.device) -> str | None:
    if problem.mode not in ("sparse", "frozen"):
        return f"mode={problem.mode}: the weight is dense"
    if problem.pattern != "2:4":
        return "the weight's zeros do not follow a 2:4 mask of rows and columns"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"dtype={problem.dtype}: 2:4 products are bfloat16 or float16"
    if problem.rows % cuda.MULTIPLE or problem.K % cuda.MULTIPLE:
        return f"weight {problem.rows} x {problem.K}: both must be multiples of {cuda.MULTIPLE}"
    return cuda.unavailable(device)


register("linear", "cusparselt", _supports, _linear)
