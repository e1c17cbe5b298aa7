"""Phi and its transpose: between theta-like tensors and the candidate slots of a dense matrix.

`scatter` is Phi (theta to its coordinates, zeros elsewhere), `gather` is Phi^T; each is the other's backward. The same
kernels serve packed storage with `active=True`, where the entries are the active coordinates.
"""

from typing import Any

import torch
from torch import Tensor

from ._check import check_bits, check_float, check_layout, check_matrix, check_theta, math_dtype
from ._registry import operation, unobserved, written
from ._triton import use_triton
from .layout import positions
from .phi_kernels import gather_triton, scatter_triton

# --- reference -------------------------------------------------------------------------------------------------------


def gather_reference(
    dense: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    t_rows: int,
    t_cols: int,
    dtype: torch.dtype,
    active: bool,
) -> Tensor:
    source, slot = positions(bits, row_start, columns, dense.shape[1], active, (t_rows, t_cols))
    out = dense.new_zeros((t_rows, t_cols), dtype=dtype)
    out.view(-1)[slot] = dense.reshape(-1)[source].to(dtype)
    return out


def gather_add_reference(
    out: Tensor, dense: Tensor, bits: Tensor, row_start: Tensor | None, columns: Tensor | None
) -> None:
    source, slot = positions(bits, row_start, columns, dense.shape[1], shape=out.shape)
    wide = math_dtype(out.dtype, dense.dtype)
    flat = out.view(-1)
    flat[slot] = dense.reshape(-1)[source].to(wide).add_(flat[slot]).to(out.dtype)


def scatter_reference(
    theta: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    K: int,
    dtype: torch.dtype,
    active: bool,
) -> Tensor:
    target, slot = positions(bits, row_start, columns, K, active, theta.shape)
    out = theta.new_zeros((bits.shape[0], K), dtype=dtype)
    out.view(-1).index_copy_(0, target, theta.view(-1)[slot].to(dtype))
    return out


def scatter_into_reference(
    weight: Tensor, theta: Tensor, bits: Tensor, row_start: Tensor | None, columns: Tensor | None
) -> None:
    target, slot = positions(bits, row_start, columns, weight.shape[1], shape=theta.shape)
    weight.view(-1).index_copy_(0, target, theta.view(-1)[slot].to(weight.dtype))


# --- operations ------------------------------------------------------------------------------------------------------


def _check_gather(
    dense: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    t_rows: int,
    t_cols: int,
    dtype: torch.dtype,
) -> None:
    check_matrix("dense", dense, strided=True)
    check_bits("bits", bits, dense.shape[0], dense.shape[1], dense)
    check_layout("shape", (t_rows, t_cols), dense.shape[0], row_start, columns, dense, dense.shape[1])
    check_float("dtype", dtype)


def _gather_fake(
    dense: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    t_rows: int,
    t_cols: int,
    dtype: torch.dtype,
    active: bool,
) -> Tensor:
    _check_gather(dense, bits, row_start, columns, t_rows, t_cols, dtype)
    return dense.new_empty((t_rows, t_cols), dtype=dtype)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, bits, row_start, columns, _, _, _, active = inputs
    ctx.save_for_backward(bits, row_start, columns)
    ctx.K, ctx.dtype, ctx.active = dense.shape[1], dense.dtype, active


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bits, row_start, columns = ctx.saved_tensors
    dense = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.fxresu.scatter(grad.contiguous(), bits, row_start, columns, ctx.K, ctx.dtype, ctx.active)
    return dense, None, None, None, None, None, None, None


def _gather(
    dense: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    t_rows: int,
    t_cols: int,
    dtype: torch.dtype,
    active: bool,
) -> Tensor:
    _check_gather(dense, bits, row_start, columns, t_rows, t_cols, dtype)
    if use_triton(dense):
        out = dense.new_empty((t_rows, t_cols), dtype=dtype)
        gather_triton(out, dense, bits, row_start, columns, active, add=False)
        return out
    return gather_reference(dense, bits, row_start, columns, t_rows, t_cols, dtype, active)


operation("gather", fake=_gather_fake, backward=_gather_backward, setup_context=_gather_setup)(_gather)


def _check_scatter(
    theta: Tensor, bits: Tensor, row_start: Tensor | None, columns: Tensor | None, K: int, dtype: torch.dtype
) -> None:
    check_theta("theta", theta, bits.shape[0], row_start, columns, theta, K)
    check_bits("bits", bits, bits.shape[0], K, theta)
    check_float("dtype", dtype)


def _scatter_fake(
    theta: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    K: int,
    dtype: torch.dtype,
    active: bool,
) -> Tensor:
    _check_scatter(theta, bits, row_start, columns, K, dtype)
    return theta.new_empty((bits.shape[0], K), dtype=dtype)


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    theta, bits, row_start, columns, _, _, active = inputs
    ctx.save_for_backward(bits, row_start, columns)
    ctx.shape, ctx.dtype, ctx.active = theta.shape, theta.dtype, active


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bits, row_start, columns = ctx.saved_tensors
    theta = None
    if ctx.needs_input_grad[0]:
        theta = torch.ops.fxresu.gather(grad, bits, row_start, columns, *ctx.shape, ctx.dtype, ctx.active)
    return theta, None, None, None, None, None, None


@operation("scatter", fake=_scatter_fake, backward=_scatter_backward, setup_context=_scatter_setup)
def _scatter_op(
    theta: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    K: int,
    dtype: torch.dtype,
    active: bool,
) -> Tensor:
    _check_scatter(theta, bits, row_start, columns, K, dtype)
    if use_triton(theta):
        if columns is None:
            out = theta.new_empty((bits.shape[0], K), dtype=dtype)
        else:
            out = theta.new_zeros((bits.shape[0], K), dtype=dtype)
        scatter_triton(out, theta, bits, row_start, columns, active, fill=columns is None)
        return out
    return scatter_reference(theta, bits, row_start, columns, K, dtype, active)


def _check_gather_add(
    out: Tensor, dense: Tensor, bits: Tensor, row_start: Tensor | None, columns: Tensor | None
) -> None:
    check_matrix("dense", dense, strided=True)
    check_bits("bits", bits, dense.shape[0], dense.shape[1], dense)
    check_theta("out", out, dense.shape[0], row_start, columns, dense, dense.shape[1])


def _gather_add(out: Tensor, dense: Tensor, bits: Tensor, row_start: Tensor | None, columns: Tensor | None) -> None:
    _check_gather_add(out, dense, bits, row_start, columns)
    if use_triton(dense):
        gather_triton(out, dense, bits, row_start, columns, active=False, add=True)
    else:
        gather_add_reference(out, dense, bits, row_start, columns)


operation("gather_add_", ("out",), fake=_check_gather_add)(_gather_add)


def _check_scatter_into(
    weight: Tensor, theta: Tensor, bits: Tensor, row_start: Tensor | None, columns: Tensor | None
) -> None:
    check_matrix("weight", weight)
    check_bits("bits", bits, weight.shape[0], weight.shape[1], weight)
    check_theta("theta", theta, weight.shape[0], row_start, columns, weight, weight.shape[1])


@operation("scatter_", ("weight",), fake=_check_scatter_into)
def _scatter_into_op(
    weight: Tensor, theta: Tensor, bits: Tensor, row_start: Tensor | None, columns: Tensor | None
) -> None:
    _check_scatter_into(weight, theta, bits, row_start, columns)
    if use_triton(weight):
        scatter_triton(weight, theta, bits, row_start, columns, active=False, fill=False)
    else:
        scatter_into_reference(weight, theta, bits, row_start, columns)


# --- public ----------------------------------------------------------------------------------------------------------


def gather(
    dense: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Phi^T: the candidates of `dense` [rows, K] (any strides) as a theta-like tensor of `shape`, padding 0.

    bits: int32 [rows, words(K)]. row_start: int64 [rows], or None with `columns` (int32, a panel of columns or rows,
    see `layout`). dtype: of the result, default that of `dense`. Differentiable in `dense` (backward: `scatter`).
    Raises ValueError for arguments that do not fit each other.
    """
    operands = (dense, bits, row_start, columns, shape[0], shape[1], dtype or dense.dtype, False)
    # Eager backward passes gather once for every weight, and the host is what they wait for.
    if not torch.is_grad_enabled() and unobserved(dense):
        return _gather(*operands)
    return torch.ops.fxresu.gather(*operands)


def pack_active(
    weight: Tensor, bits: Tensor, active_start: Tensor, shape: tuple[int, int], dtype: torch.dtype | None = None
) -> Tensor:
    """The active coordinates of `weight` [rows, K] in the compact layout of `shape`, padding 0; differentiable."""
    return torch.ops.fxresu.gather(weight, bits, active_start, None, shape[0], shape[1], dtype or weight.dtype, True)


def gather_add_(out: Tensor, dense: Tensor, bits: Tensor, row_start: Tensor | None, columns: Tensor | None) -> Tensor:
    """out += Phi^T(dense) in place, added in float32 and stored in out's dtype; padding is not touched. Returns out."""
    with torch.no_grad():
        if unobserved(out) and unobserved(dense):
            _gather_add(out, dense, bits, row_start, columns)
            written(out)
        else:
            torch.ops.fxresu.gather_add_(out, dense, bits, row_start, columns)
    return out


def scatter(
    theta: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    K: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Phi: a dense [rows, K] matrix that holds `theta` at its candidates and zero elsewhere.

    dtype: of the result, default that of `theta`. Differentiable in `theta` (backward: `gather`).
    """
    return torch.ops.fxresu.scatter(theta, bits, row_start, columns, K, dtype or theta.dtype, False)


def scatter_(weight: Tensor, theta: Tensor, bits: Tensor, row_start: Tensor | None, columns: Tensor | None) -> Tensor:
    """Write `theta` into its candidate slots of `weight` [rows, K] in place; every other slot keeps its bits."""
    with torch.no_grad():
        torch.ops.fxresu.scatter_(weight, theta, bits, row_start, columns)
    return weight
