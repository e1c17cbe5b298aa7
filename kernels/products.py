"""Products with managed weights other than a linear: from the left, in batches, grouped by expert, and convolutions.

Each is the marker of `fxresu.kernels.managed` followed by the product, CompositeImplicitAutograd like
`fxresu::linear`: AOTAutograd traces through it to aten products, and the gradient of the weight is that of the
marker's mode. Operands up to `tag` are those of `fxresu::linear`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .managed import managed

_LIB = torch.library.Library("fxresu", "FRAGMENT")
_OPERANDS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor? anchor, Tensor? bits, Tensor? row_start, Tensor? columns,"
    " str mode, str tag"
)
_LIB.define(f"matmul({_OPERANDS}, bool swap=False, bool left=False, Tensor? index=None) -> Tensor")
_LIB.define(f"grouped_linear({_OPERANDS}, Tensor offs, bool swap=False, bool native=False) -> Tensor")
_LIB.define(
    f"convolution({_OPERANDS}, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups)"
    " -> Tensor"
)


def matmul(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    anchor: Tensor | None,
    bits: Tensor | None,
    row_start: Tensor | None,
    columns: Tensor | None,
    mode: str,
    tag: str = "",
    swap: bool = False,
    left: bool = False,
    index: Tensor | None = None,
) -> Tensor:
    """`input @ weight + bias`, or `weight @ input + bias` if `left`, with the broadcasting of `torch.matmul`.

    Args:
        input: [..., T, R]. Autocast is honoured as for `torch.matmul`.
        weight: [R, K], or [E, R, K] for a product of batches.
        bias: added to the result, of a shape that broadcasts with it, or None.
        swap: the weight's last two dimensions are swapped before the product.
        index: integers that choose from the weight's first dimension before that, or None for all of it.
    """
    w = managed(weight, anchor, bits, row_start, columns, mode, tag)
    w = w if index is None else w[index]
    w = w.mT if swap else w
    out = torch.matmul(w, input) if left else torch.matmul(input, w)
    return out if bias is None else out + bias


def grouped_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    anchor: Tensor | None,
    bits: Tensor | None,
    row_start: Tensor | None,
    columns: Tensor | None,
    mode: str,
    tag: str,
    offs: Tensor,
    swap: bool = False,
    native: bool = False,
) -> Tensor:
    """Rows of `input`, sorted by expert, times the weight of their expert.

    Args:
        input: [S, R] ([S, K] if `swap`).
        weight: [E, R, K].
        bias: None; the schema is that of a linear.
        offs: int32 or int64 [E], the first row after every expert's. Rows from offs[-1] on give zeros.
        swap: the weight's last two dimensions are swapped before the product.
        native: by `torch.nn.functional.grouped_mm`, which leaves these rows undefined. It takes bfloat16 alone where it
            is compiled; operands that a plan has cast to another type go the other way.

    Returns:
        [S, K] ([S, R] if `swap`).
    """
    w = managed(weight, anchor, bits, row_start, columns, mode, tag)
    w = w.mT if swap else w
    if native and input.dtype == w.dtype == torch.bfloat16:
        return F.grouped_mm(input, w, offs=offs)
    return torch.ops.fxresu.grouped_product(input, w, offs)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    anchor: Tensor | None,
    bits: Tensor | None,
    row_start: Tensor | None,
    columns: Tensor | None,
    mode: str,
    tag: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """A convolution whose kernel is managed as the matrix [out, in / groups * k1 * k2 ...].

    Args:
        input: [N, in, d1, d2, ...], or without N.
        weight: [out, in / groups * k1 * k2 ...].
        kernel: (in / groups, k1, k2, ...).
        stride, padding, dilation: one number a dimension.

    Returns:
        [N, out, ...] as `torch.nn.functional.conv2d`.
    """
    w = managed(weight, anchor, bits, row_start, columns, mode, tag).view(weight.shape[0], *kernel)
    function = {2: F.conv1d, 3: F.conv2d, 4: F.conv3d}[len(kernel)]
    return function(input, w, bias, stride, padding, dilation, groups)


_LIB.impl("matmul", matmul, "CompositeImplicitAutograd")
_LIB.impl("grouped_linear", grouped_linear, "CompositeImplicitAutograd")
_LIB.impl("convolution", convolution, "CompositeImplicitAutograd")


# --- the grouped product where torch has none -------------------------------------------------------------------------

# Groups are as long as the data has it, so the loop over them waits for the device once.
_LIB.define("grouped_product(Tensor input, Tensor weight, Tensor offs) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define("grouped_outer(Tensor input, Tensor grad, Tensor offs) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _check(input: Tensor, other: Tensor, offs: Tensor, dims: int) -> None:
    if input.dim() != 2 or other.dim() != dims or offs.dim() != 1 or offs.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"grouped product of {tuple(input.shape)}, {tuple(other.shape)} and offs {offs.dtype} {tuple(offs.shape)}:"
            f" expected a matrix, a tensor of {dims} dimensions and an integer vector"
        )


def _groups(offs: Tensor) -> list[tuple[int, int, int]]:
    ends = offs.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends)) if a < b]


def grouped_product(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """`input[a:b] @ weight[e]` for the rows of every group: [S, K], [E, K, N] and offs [E] give [S, N]."""
    _check(input, weight, offs, 3)
    out = input.new_zeros((input.shape[0], weight.shape[2]))
    for e, a, b in _groups(offs):
        torch.mm(input[a:b], weight[e], out=out[a:b])
    return out


def grouped_outer(input: Tensor, grad: Tensor, offs: Tensor) -> Tensor:
    """`input[a:b].T @ grad[a:b]` for the rows of every group: [S, K], [S, N] and offs [E] give [E, K, N]."""
    _check(input, grad, offs, 2)
    out = input.new_zeros((offs.shape[0], input.shape[1], grad.shape[1]))
    for e, a, b in _groups(offs):
        torch.mm(input[a:b].t(), grad[a:b], out=out[e])
    return out


def _product_fake(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    _check(input, weight, offs, 3)
    return input.new_empty((input.shape[0], weight.shape[2]))


def _outer_fake(input: Tensor, grad: Tensor, offs: Tensor) -> Tensor:
    _check(input, grad, offs, 2)
    return input.new_empty((offs.shape[0], input.shape[1], grad.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, offs = inputs
    need = ctx.needs_input_grad
    ctx.save_for_backward(input if need[1] else None, weight if need[0] else None, offs)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, offs = ctx.saved_tensors
    need = ctx.needs_input_grad
    dinput = torch.ops.fxresu.grouped_product(grad, weight.mT, offs) if need[0] else None
    dweight = torch.ops.fxresu.grouped_outer(input, grad, offs) if need[1] else None
    return dinput, dweight, None


_LIB.impl("grouped_product", grouped_product, "CompositeExplicitAutograd")
_LIB.impl("grouped_outer", grouped_outer, "CompositeExplicitAutograd")
torch.library.register_fake("fxresu::grouped_product", _product_fake, lib=_LIB)
torch.library.register_fake("fxresu::grouped_outer", _outer_fake, lib=_LIB)
torch.library.register_autograd("fxresu::grouped_product", _product_backward, setup_context=_setup, lib=_LIB)


@register_flop_formula(torch.ops.fxresu.grouped_product)
def _product_flops(input: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * input[0] * input[1] * weight[2]


@register_flop_formula(torch.ops.fxresu.grouped_outer)
def _outer_flops(input: Any, grad: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * input[0] * input[1] * grad[1]
