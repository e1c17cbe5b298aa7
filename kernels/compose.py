"""Packed storage: a dense matrix from packed active values and theta on every use, and the linear built on it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._autocast import active_dtype, autocast_off
from ._check import check_bits, check_device, check_float, check_theta
from ._registry import NAMESPACE, operation
from ._tiles import busy_grid
from ._triton import launch, use_triton
from .compose_kernels import compose_rows_kernel, compose_tiles_kernel, group_of, row_form
from .layout import panel_lines, positions
from .phi import scatter_reference

# --- reference -------------------------------------------------------------------------------------------------------


def compose_reference(
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    K: int,
    dtype: torch.dtype,
    columns: Tensor | None = None,
    panel: Tensor | None = None,
    panel_bits: Tensor | None = None,
) -> Tensor:
    out = active.new_zeros((bits.shape[0], K), dtype=dtype)
    target, slot = positions(bits, active_start, None, K, active=True)
    out.view(-1).index_copy_(0, target, active.view(-1)[slot].to(dtype))
    if theta is not None and panel is not None:
        assert columns is not None and panel_bits is not None
        lines, index = panel_lines(panel), columns.long()
        values = scatter_reference(theta, panel_bits, row_start, None, K if lines else index.numel(), dtype, False)
        out.index_add_(0 if lines else 1, index, values)  # one of the two is zero everywhere
    elif theta is not None:
        target, slot = positions(bits, row_start, None, K)
        out.view(-1).index_copy_(0, target, theta.view(-1)[slot].to(dtype))
    return out


# --- launch ----------------------------------------------------------------------------------------------------------


def _compose_triton(
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    K: int,
    dtype: torch.dtype,
    panel: Tensor | None,
) -> Tensor:
    rows, W = bits.shape
    out = active.new_empty((rows, K), dtype=dtype)
    has_theta = theta is not None
    lines = [t for t in (active, theta) if t is not None]
    form = None
    if panel is None and all(t.shape[0] == rows for t in lines):
        form = row_form(W, *(t.shape[1] + group_of(t) - 1 for t in lines))
    if theta is None or row_start is None:
        theta, row_start = active, active_start  # stand-ins that the kernels do not touch
    if form is not None:
        launch(
            compose_rows_kernel,
            rows,
            active,
            active,
            theta,
            out,
            bits,
            K,
            W,
            active.shape[1],
            theta.shape[1],
            active.numel(),
            theta.numel(),
            HAS_THETA=has_theta,
            A_GROUP=group_of(active),
            T_GROUP=group_of(theta),
            **form,
        )
        return out
    grid = busy_grid(rows, K, words_per_warp=16)
    launch(
        compose_tiles_kernel,
        grid.tiles,
        active,
        active,
        theta,
        out,
        bits,
        active_start,
        row_start,
        bits if panel is None else panel,
        K,
        W,
        active.numel(),
        theta.numel(),
        HAS_THETA=has_theta,
        PANEL=panel_kind(panel),
        CHUNKS=grid.chunks,
        BLOCK_W=grid.BLOCK_W,
        num_warps=grid.num_warps,
    )
    return out


# --- operation -------------------------------------------------------------------------------------------------------


def panel_kind(panel: Tensor | None) -> int:
    """What PANEL of a kernel means: 0 no panel, 1 one of columns, 2 one of rows."""
    return 0 if panel is None else 1 + panel_lines(panel)


def check_covered(
    theta: Tensor | None,
    bits: Tensor,
    row_start: Tensor | None,
    K: int,
    like: Tensor,
    columns: Tensor | None,
    panel: Tensor | None,
    panel_bits: Tensor | None,
) -> None:
    """A compact theta over all pruned coordinates, or over those of a panel, whose three tensors come together."""
    rows = bits.shape[0]
    if panel is None:
        if theta is not None:
            check_theta("theta", theta, rows, row_start, None, like)
        return
    if columns is None or panel_bits is None:
        raise ValueError("panel needs columns and panel_bits (see layout.panel_words)")
    shape = (rows, 1) if panel_lines(panel) else (1, bits.shape[1])
    if panel.dtype != torch.int32 or tuple(panel.shape) != shape or not panel.is_contiguous():
        raise ValueError(f"panel must be contiguous int32 of shape {shape}, not {panel.dtype} {tuple(panel.shape)}")
    if columns.dtype != torch.int32 or columns.dim() != 1:
        raise ValueError(f"columns must be an int32 vector, not {columns.dtype} of shape {tuple(columns.shape)}")
    check_device("panel", panel, like)
    check_device("columns", columns, like)
    n = columns.shape[0]
    lines, length = (n, K) if panel_lines(panel) else (rows, n)
    check_bits("panel_bits", panel_bits, lines, length, like)
    if theta is not None:
        check_theta("theta", theta, lines, row_start, None, like)


def theta_gradient(
    grad: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    panel: Tensor | None,
    panel_bits: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """dtheta from the gradient of the whole composed weight."""
    if panel is not None:
        assert columns is not None and panel_bits is not None
        grad, bits = grad.index_select(0 if panel_lines(panel) else 1, columns.long()), panel_bits
    return torch.ops.fxresu.gather(grad, bits, row_start, None, *shape, dtype, False)


def _check(
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    K: int,
    dtype: torch.dtype,
    columns: Tensor | None,
    panel: Tensor | None,
    panel_bits: Tensor | None,
) -> None:
    rows = bits.shape[0]
    check_theta("active", active, rows, active_start, None, active)
    check_bits("bits", bits, rows, K, active)
    check_covered(theta, bits, row_start, K, active, columns, panel, panel_bits)
    check_float("dtype", dtype)


def _compose_fake(
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    K: int,
    dtype: torch.dtype,
    use: int,
    anchor: Tensor | None,
    columns: Tensor | None = None,
    panel: Tensor | None = None,
    panel_bits: Tensor | None = None,
) -> Tensor:
    _check(active, theta, bits, active_start, row_start, K, dtype, columns, panel, panel_bits)
    return active.new_empty((bits.shape[0], K), dtype=dtype)


def _compose_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    active, theta, bits, active_start, row_start = inputs[:5]
    ctx.save_for_backward(bits, active_start, row_start, *inputs[9:])
    ctx.active = (*active.shape, active.dtype)
    ctx.theta = None if theta is None else (tuple(theta.shape), theta.dtype)


def _compose_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bits, active_start, row_start, *covered = ctx.saved_tensors
    active = theta = None
    if ctx.needs_input_grad[0]:
        active = torch.ops.fxresu.gather(grad, bits, active_start, None, *ctx.active, True)
    if ctx.needs_input_grad[1]:
        theta = theta_gradient(grad, bits, row_start, *covered, *ctx.theta)
    return active, theta, *(None,) * 10


@operation("compose", fake=_compose_fake, backward=_compose_backward, setup_context=_compose_setup)
def _compose_op(
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    K: int,
    dtype: torch.dtype,
    use: int,
    anchor: Tensor | None,
    columns: Tensor | None = None,
    panel: Tensor | None = None,
    panel_bits: Tensor | None = None,
) -> Tensor:
    _check(active, theta, bits, active_start, row_start, K, dtype, columns, panel, panel_bits)
    if use_triton(active):
        return _compose_triton(active, theta, bits, active_start, row_start, K, dtype, panel)
    return compose_reference(active, theta, bits, active_start, row_start, K, dtype, columns, panel, panel_bits)


def compose(
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    K: int,
    dtype: torch.dtype,
    use: int = 0,
    anchor: Tensor | None = None,
    columns: Tensor | None = None,
    panel: Tensor | None = None,
    panel_bits: Tensor | None = None,
) -> Tensor:
    """M o W + Phi(theta) as a dense [rows, K] matrix of `dtype`, from compact `active` and `theta`.

    theta None: zeros at the candidates (row_start may then be None too). Every pruned coordinate is a candidate, or
    with `panel` those of the chosen inputs, and the others are zero: `columns`, int32 [n], ascending, names columns
    (rows) of the weight, `panel` is their `layout.panel_words`, `panel_bits` the mask of these columns, int32
    [rows, words(n)] (of these rows: [n, words(K)]), and row_start counts by the lines of panel_bits.

    Differentiable in active and theta. `use` and `anchor` do not change the result. `use` keeps the calls of the
    forward (0) and the backward (1) apart, which common-subexpression elimination would otherwise merge, keeping every
    dense weight alive. `anchor`, a tensor of the backward, makes the call depend on it: a partitioner is otherwise free
    to run the backward's call early and to save its result.
    """
    return torch.ops.fxresu.compose(
        active, theta, bits, active_start, row_start, K, dtype, use, anchor, columns, panel, panel_bits
    )


# --- linear ----------------------------------------------------------------------------------------------------------


class _PackedLinear(torch.autograd.Function):
    """y = x W^T + b that composes W in the forward and again in the backward and saves no dense weight."""

    @staticmethod
    def forward(
        x: Tensor,
        active: Tensor,
        theta: Tensor | None,
        bits: Tensor,
        active_start: Tensor,
        row_start: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        with autocast_off(x.device.type):
            weight = compose(active, theta, bits, active_start, row_start, x.shape[1], x.dtype, use=0)
            return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, active, theta, bits, active_start, row_start = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx = dactive = dtheta = dbias = None
        with autocast_off(x.device.type):
            if need[0]:
                weight = compose(active, theta, bits, active_start, row_start, x.shape[1], x.dtype, use=1, anchor=dy)
                dx = torch.mm(dy, weight)
            if need[1] or need[2]:
                dweight = torch.mm(dy.t(), x)
                if need[1]:
                    dactive = torch.ops.fxresu.gather(
                        dweight, bits, active_start, None, *active.shape, active.dtype, True
                    )
                if need[2]:
                    dtheta = torch.ops.fxresu.gather(dweight, bits, row_start, None, *theta.shape, theta.dtype, False)
            if need[6]:
                dbias = dy.sum(0)
        return dx, dactive, dtheta, None, None, None, dbias


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "packed_linear(Tensor x, Tensor active, Tensor? theta, Tensor bits, Tensor active_start, "
    "Tensor? row_start, Tensor? bias, SymInt out_features, SymInt in_features) -> Tensor"
)


# Composite: autograd and the compilers see compose and aten matrix products, so cuBLAS and FLOP counters do too.
@torch.library.impl(_library, "packed_linear", "CompositeImplicitAutograd")
def _packed_linear_op(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have {in_features} values in its last dimension, not shape {tuple(x.shape)}")
    if bits.shape[0] != out_features:
        raise ValueError(f"bits must have {out_features} rows (out_features), not {bits.shape[0]}")
    kind = x.device.type
    dtype = active_dtype(kind) or x.dtype
    leading = x.shape[:-1]
    x = x.to(dtype).reshape(-1, in_features)
    bias = None if bias is None else bias.to(dtype)
    y = _PackedLinear.apply(x, active, theta, bits, active_start, row_start, bias)
    return y.reshape(*leading, out_features)


@register_flop_formula(torch.ops.fxresu.packed_linear)
def _packed_linear_flops(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    out_features, in_features = args[-2:]
    tokens = 1
    for size in x[:-1]:
        tokens *= size
    return 2 * tokens * out_features * in_features


def packed_linear(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    """y = x W^T + bias with W = compose(active, theta, ...) of [out_features, in_features], composed per use.

    x: [..., in_features] of any leading dimensions; computes in x's dtype, or in the autocast dtype where autocast is
    on. Gradients for x, active, theta and bias come in their own dtypes. Saved for the backward: x, active, theta, bits
    and the starts; no dense weight. In a graph it decomposes into `compose`, `gather` and aten matrix products.
    Transforms of torch.func raise NotImplementedError.
    """
    return torch.ops.fxresu.packed_linear(
        x, active, theta, bits, active_start, row_start, bias, out_features, in_features
    )
