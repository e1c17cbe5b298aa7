"""The marker of a managed weight, and the linear that reads one.

`fxresu::managed` stands in the captured graph where a module reads its managed weight. Its value is the weight (an
alias: nothing is copied); only its gradient differs from the weight's own:

=========  =====================================  =========================================
mode       gradient of `weight`                   gradient of `anchor` (theta's stand-in)
=========  =====================================  =========================================
"dense"    dW                                     none
"sparse"   M∘dW (zero at pruned coordinates)      none
"resu"     none                                   Φᵀ(dW), shape of the anchor
"frozen"   none                                   none
=========  =====================================  =========================================

`fxresu::linear` is what passes put in place of a linear fed by a marker; `fxresu::linear_columns` is its form for
candidates that are whole inputs (columns of the weight, or its rows where the product is input @ weight), which saves
only those columns of the input. All are CompositeImplicitAutograd, so that
AOTAutograd traces through them: the GEMMs stay `aten.mm` (cuBLAS, FLOP counters, epilogue fusion), the masking stays
plain aten (it fuses into the cast that AMP has anyway), and only Φᵀ is an opaque op. Being OpOverloads they can be
cached, which a Python function as a target cannot.

`tag` and `pattern` are carried for the passes and ignored here. `how` names the candidate of the chooser that a linear
runs (`choose`); "" is the default one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear_few as _linear_few  # noqa: F401  (registers candidates)
from . import semi_structured as _semi_structured  # noqa: F401
from ._autocast import as_autocast
from .bits import unpack_aten, unpack_columns_aten
from .choose import Problem, implementation, register
from .packed import composed, linear_packed_columns
from .phi import gather

MODES = ("dense", "sparse", "resu", "frozen")

_LIB = torch.library.Library("fxresu", "FRAGMENT")
_LIB.define(
    "managed(Tensor(a) weight, Tensor? anchor, Tensor? bits, Tensor? row_start, Tensor? columns, str mode, str tag,"
    " str pattern='') -> Tensor(a)"
)
_LIB.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? anchor, Tensor? bits, Tensor? row_start,"
    " Tensor? columns, str mode, str tag, bool transposed=False, *, str how='') -> Tensor"
)
_LIB.define(
    "linear_columns(Tensor input, Tensor weight, Tensor? bias, Tensor anchor, Tensor bits, Tensor row_start,"
    " Tensor columns, str tag, bool transposed=False) -> Tensor"
)
_LIB.define(
    "managed_packed(Tensor active, Tensor theta, Tensor bits, Tensor active_start, Tensor row_start, int[] size,"
    " ScalarType dtype, str tag, str pattern='', Tensor? scale=None, Tensor? columns=None, Tensor? panel=None,"
    " Tensor? panel_bits=None) -> Tensor"
)
_LIB.define(
    "linear_packed_columns(Tensor input, Tensor active, Tensor theta, Tensor? bias, Tensor bits, Tensor active_start,"
    " Tensor row_start, Tensor columns, Tensor panel, Tensor panel_bits, int out_features, int in_features, str tag,"
    " Tensor? scale=None) -> Tensor"
)
_LIB.define(
    "linear_packed(Tensor input, Tensor active, Tensor theta, Tensor? bias, Tensor bits, Tensor active_start,"
    " Tensor row_start, int out_features, int in_features, str tag, Tensor? scale=None, *, str how='')"
    " -> Tensor"
)


def _flat(weight: Tensor) -> Tensor:
    """A weight of any rank as the matrix [rows, K] that masks and theta index."""
    return weight if weight.dim() == 2 else weight.reshape(-1, weight.shape[-1])


class _Managed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        anchor: Tensor | None,
        bits: Tensor | None,
        row_start: Tensor | None,
        columns: Tensor | None,
        mode: str,
    ) -> Tensor:
        ctx.save_for_backward(*(() if mode in ("dense", "frozen") else (bits, row_start, columns)))
        ctx.mode = mode
        ctx.theta_shape = None if anchor is None else tuple(anchor.shape)
        ctx.theta_dtype = None if anchor is None else anchor.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        none = (None,) * 4
        if ctx.mode == "dense":
            return grad, None, *none
        if ctx.mode == "frozen":
            return None, None, *none
        bits, row_start, columns = ctx.saved_tensors
        matrix = _flat(grad)
        if ctx.mode == "sparse":
            # where, not multiply: an infinite gradient at a pruned coordinate must not become NaN.
            kept = torch.where(unpack_aten(bits, matrix.shape[1]), matrix, 0).view(grad.shape)
            return kept if ctx.needs_input_grad[0] else None, None, *none
        if not ctx.needs_input_grad[1]:
            return None, None, *none
        return None, gather(matrix, bits, row_start, columns, ctx.theta_shape, ctx.theta_dtype), *none


def managed(
    weight: Tensor,
    anchor: Tensor | None,
    bits: Tensor | None,
    row_start: Tensor | None,
    columns: Tensor | None,
    mode: str,
    tag: str = "",
    pattern: str = "",
) -> Tensor:
    """The weight itself, with the gradient that `mode` asks for (see the module's table).

    Args:
        weight: [..., K], any float dtype.
        anchor: theta-like [t_rows, t_cols]; only its shape, dtype and `.grad` matter (it may have zero strides).
        bits: int32 [rows, ceil(K / 32)]; required for "sparse" and "resu".
        row_start: int64 [rows]; required for "resu".
        columns: int32 [n_cols] for the panel layout, None for the compact one.
        mode: one of `MODES`.
        tag: carried in the graph for the passes.
        pattern: "2:4" if the weight is zero wherever such a mask of rows and columns prunes it; carried like `tag`.

    Raises:
        ValueError: unknown mode, or an operand that the mode needs is missing.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; use one of {', '.join(MODES)}")
    if mode in ("sparse", "resu") and bits is None:
        raise ValueError(f"bits=None, but mode={mode!r} needs the mask")
    if mode == "resu" and (anchor is None or row_start is None):
        raise ValueError("mode='resu' needs anchor and row_start")
    return _Managed.apply(weight, anchor, bits, row_start, columns, mode)


class _ColumnLinear(torch.autograd.Function):
    """y = x Wᵀ + b (x W + b if transposed) in RESU with inputs as candidates: only these columns of x live until the
    backward.

    dθ is the panel dYᵀ·X[:, columns] (X[:, columns]ᵀ·dY if transposed), one smaller dense GEMM. x[:, columns] is
    copied: a slice would keep the whole of x alive.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        bits: Tensor,
        row_start: Tensor,
        columns: Tensor,
        transposed: bool,
    ) -> Tensor:
        panel = x.index_select(-1, columns) if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(panel, weight if ctx.needs_input_grad[0] else None, bits, columns)
        ctx.K, ctx.transposed, ctx.theta_dtype = weight.shape[1], transposed, anchor.dtype
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        panel, weight, bits, columns = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        dx = dbias = dtheta = None
        if ctx.needs_input_grad[0]:
            dx = grad @ (weight.t() if ctx.transposed else weight)
        if ctx.needs_input_grad[2]:
            dbias = flat.sum(0)
        if ctx.needs_input_grad[3]:
            inputs = panel.reshape(-1, panel.shape[-1])
            if ctx.transposed:
                dense, active = inputs.t() @ flat, unpack_aten(bits.index_select(0, columns), ctx.K)
            else:
                dense, active = flat.t() @ inputs, unpack_columns_aten(bits, columns)
            dtheta = torch.where(active, 0, dense).to(ctx.theta_dtype)
        return dx, None, dbias, dtheta, None, None, None, None


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    anchor: Tensor | None,
    bits: Tensor | None,
    row_start: Tensor | None,
    columns: Tensor | None,
    mode: str,
    tag: str = "",
    transposed: bool = False,
    *,
    how: str = "",
) -> Tensor:
    """`input @ weight.T + bias` (`input @ weight + bias` if `transposed`) on a managed weight.

    Args:
        input: [..., K] ([..., rows] if transposed). Autocast is honoured as for `F.linear`.
        weight: [rows, K]; the other operands are those of `managed`.
        bias: [rows] ([K] if transposed) or None.

    Returns:
        [..., rows] ([..., K] if transposed).
    """
    run = implementation("linear", how) if how else _linear_mm
    return run(input, weight, bias, anchor, bits, row_start, columns, mode, tag, transposed)


def _linear_mm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    anchor: Tensor | None,
    bits: Tensor | None,
    row_start: Tensor | None,
    columns: Tensor | None,
    mode: str,
    tag: str,
    transposed: bool,
) -> Tensor:
    w = managed(weight, anchor, bits, row_start, columns, mode, tag)
    return F.linear(input, w.t() if transposed else w, bias)


def linear_columns(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    anchor: Tensor,
    bits: Tensor,
    row_start: Tensor,
    columns: Tensor,
    tag: str = "",
    transposed: bool = False,
) -> Tensor:
    """`linear(..., mode="resu")` for inputs as candidates, saving `input[..., columns]` instead of `input`.

    anchor: a panel of columns [rows, n], or, if transposed, of rows [n, K].
    """
    x, w, b = as_autocast(input, weight, bias)
    return _ColumnLinear.apply(x, w, b, anchor, bits, row_start, columns, transposed)


def managed_packed(
    active: Tensor,
    theta: Tensor,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor,
    size: list[int],
    dtype: torch.dtype,
    tag: str = "",
    pattern: str = "",
    scale: Tensor | None = None,
    columns: Tensor | None = None,
    panel: Tensor | None = None,
    panel_bits: Tensor | None = None,
) -> Tensor:
    """The effective weight M∘W + Φ(θ) of packed storage as a dense tensor of shape `size`; differentiable in theta.

    active: of a float dtype, or codes of 8 or 4 bits with their `scale` (`fxresu.kernels.quantized`). columns,
    panel and panel_bits, where θ covers some inputs only: see `compose`.
    """
    covered = columns, panel, panel_bits
    dense = composed(active, scale, theta, bits, active_start, row_start, size[-1], dtype, 0, None, *covered)
    return dense if len(size) == 2 else dense.view(size)


def linear_packed(
    input: Tensor,
    active: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor,
    out_features: int,
    in_features: int,
    tag: str = "",
    scale: Tensor | None = None,
    *,
    how: str = "",
) -> Tensor:
    """`input @ (M∘W + Φ(θ)).T + bias`; no dense weight is saved for the backward (see `packed_linear`)."""
    run = implementation("linear_packed", how or "compose")
    return run(input, active, theta, bits, active_start, row_start, bias, out_features, in_features, scale)


def _always(problem: Problem, device: torch.device) -> None:
    return None


register("linear", "mm", _always, _linear_mm, default=True)

_LIB.impl("managed", managed, "CompositeImplicitAutograd")
_LIB.impl("linear", linear, "CompositeImplicitAutograd")
_LIB.impl("linear_columns", linear_columns, "CompositeImplicitAutograd")
_LIB.impl("managed_packed", managed_packed, "CompositeImplicitAutograd")
_LIB.impl("linear_packed", linear_packed, "CompositeImplicitAutograd")
_LIB.impl("linear_packed_columns", linear_packed_columns, "CompositeImplicitAutograd")
