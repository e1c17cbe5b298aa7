"""`fxresu::linear_fp8`: a linear whose operands are rounded to float8 (e4m3), for phases without a backward.

Both operands are scaled so that their largest magnitude becomes 448, e4m3's largest: "row" has one scale for each token
and each output (compute capability 9.0 and later), "tensor" one for each operand (8.9). "reference" rounds by rows and
multiplies the rounded values in float32. Composed of aten operations, so that compilers fuse the rounding; the product
is `aten._scaled_mm`. Nothing overflows: scales follow the values of every call. What is not finite gives NaN.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import autocast_off

LARGEST = 448.0  # of float8_e4m3fn
HOW = ("row", "tensor", "reference")
ENVIRONMENT = "FXRESU_FP8"
"""Environment variable; "reference" lets devices without such products compute their result, for tests."""
_ALIGNED = 16

_LIB = torch.library.Library("fxresu", "FRAGMENT")
_LIB.define("linear_fp8(Tensor input, Tensor weight, Tensor? bias, str how, bool transposed=False) -> Tensor")


def unsupported(device: torch.device) -> str:
    """Why products in float8 cannot run on a device; "" if they can."""
    if os.environ.get(ENVIRONMENT) == "reference":
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"fp8 products need an NVIDIA GPU of compute capability 8.9 or later, and this is {device.type!r}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"fp8 products need compute capability 8.9 or later, and this GPU has {major}.{minor}"
    return ""


def how_on(device: torch.device) -> str:
    """The form that a device runs."""
    if os.environ.get(ENVIRONMENT) == "reference":
        return "reference"
    return "row" if torch.cuda.get_device_capability(device) >= (9, 0) else "tensor"


def misfit(rows: int, K: int) -> str:
    """Why a weight [rows, K] has no product in float8; "" if it has one."""
    for n, what in ((rows, "outputs"), (K, "inputs")):
        if n % _ALIGNED:
            return f"{n} {what} are no multiple of {_ALIGNED}"
    return ""


def rounded(x: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """(x / scale in float8_e4m3fn, scale in float32) of a matrix; scale is [rows, 1], or [] for one scale."""
    size = x.abs().amax(-1, keepdim=True) if by_row else x.abs().amax()
    scale = (size.float() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def linear_fp8(input: Tensor, weight: Tensor, bias: Tensor | None, how: str, transposed: bool = False) -> Tensor:
    """`input @ weight.T + bias` (`input @ weight` if `transposed`) with both operands in e4m3.

    Args:
        input: [..., K], any float dtype.
        weight: [rows, K]; rows and K multiples of 16. [K, rows] if transposed.
        how: one of `HOW`.

    Returns:
        [..., rows] in bfloat16.

    Raises:
        ValueError: unknown `how`.
    """
    if how not in HOW:
        raise ValueError(f"how={how!r} is unknown; use one of {', '.join(HOW)}")
    matrix = weight.t() if transposed else weight
    x, x_scale = rounded(input.reshape(-1, input.shape[-1]), how != "tensor")
    w, w_scale = rounded(matrix, how != "tensor")
    if how == "reference":
        with autocast_off(input.device.type):
            out = F.linear(x.float() * x_scale, w.float() * w_scale).to(torch.bfloat16)
    else:
        right = w.contiguous().t()
        scales = {"scale_a": x_scale, "scale_b": w_scale.t() if how == "row" else w_scale}
        out = torch._scaled_mm(x.contiguous(), right, **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    out = out.view(*input.shape[:-1], matrix.shape[0])
    return out if bias is None else out + bias.to(torch.bfloat16)


_LIB.impl("linear_fp8", linear_fp8, "CompositeImplicitAutograd")
