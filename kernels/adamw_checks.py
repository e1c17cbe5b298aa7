"""What an AdamW update refuses before anything is written."""

import torch
from torch import Tensor

from ._check import FLOATS, check_device, check_float
from .adamw_rule import SPAN, AdamW, AdamWOperands, scale_count

_MOMENTS = (*FLOATS, torch.uint8)


def check_update(o: AdamWOperands, rule: AdamW, scale: Tensor | None, check: Tensor | None) -> None:
    """ValueError for operands or numbers that do not fit."""
    _check_rule(rule)
    if o.offset < 0 or o.offset % SPAN:
        raise ValueError(f"offset must be a multiple of {SPAN}, not {o.offset}")
    weight, kind = o.weight, o.m.dtype
    n, device = weight.numel(), weight.device
    # Every weight of every step comes by: nothing is built here that only a message needs.
    for name, tensor in (("weight", weight), ("grad", o.grad), ("m", o.m), ("v", o.v)):
        if tensor is None:
            continue
        if tensor.numel() != n:
            raise ValueError(f"{name} must have the {n} entries of weight, not shape {tuple(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")
        if tensor.device != device:
            check_device(name, tensor, weight)
    check_float("weight.dtype", weight.dtype)
    check_float("grad.dtype", o.grad.dtype)
    second = _check_second(o)
    if kind != second or kind not in _MOMENTS:
        raise ValueError(f"m and v must be both of one float dtype or both uint8, not {kind} and {second}")
    for name, scales in (("m_scale", o.m_scale), ("v_scale", o.v_scale)):
        if name == "v_scale" and o.v is None:
            continue
        if (kind == torch.uint8) != (scales is not None):
            raise ValueError(
                f"{name} belongs to moments in 8 bits and to no others; m is {kind}, {name} is "
                f"{'None' if scales is None else 'given'}"
            )
        if scales is not None:
            _check_scales(name, scales, weight)
    for name, one in (("scale", scale), ("check", check)):
        if one is not None and (one.numel() != 1 or not one.is_floating_point()):
            raise ValueError(f"{name} must hold one float, not {one.dtype} of shape {tuple(one.shape)}")


def _check_second(o: AdamWOperands) -> torch.dtype:
    """The dtype of v, or of m where v is factored."""
    vectors = (("row", o.row), ("col", o.col), ("mean", o.mean))
    if o.v is not None:
        for name, vector in vectors:
            if vector is not None:
                raise ValueError(f"{name} belongs to a second moment that is factored, without v")
        return o.v.dtype
    if o.v_scale is not None:
        raise ValueError("v_scale belongs to v, which is None")
    for name, vector in vectors:
        if vector is None:
            raise ValueError(f"{name} is missing: give v, or row, col and mean")
        if vector.dtype != torch.float32 or vector.dim() != 1 or not vector.is_contiguous():
            raise ValueError(f"{name} must be a contiguous float32 vector, not {vector.dtype} {tuple(vector.shape)}")
        if vector.device != o.weight.device:
            check_device(name, vector, o.weight)
    assert o.row is not None and o.col is not None and o.mean is not None
    if o.mean.numel() != 1:
        raise ValueError(f"mean must hold one float, not {o.mean.numel()}")
    if o.row.numel() * o.col.numel() < o.offset + o.weight.numel():
        raise ValueError(
            f"row and col must be those of a matrix of at least {o.offset + o.weight.numel()} entries, not of"
            f" {o.row.numel()} and {o.col.numel()}"
        )
    return o.m.dtype


def _check_rule(rule: AdamW) -> None:
    if rule.step < 1:
        raise ValueError(f"step must be at least 1 (it counts updates, this one included), not {rule.step}")
    for name, beta in (("betas[0]", rule.beta1), ("betas[1]", rule.beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be in [0, 1), not {beta}")


def _check_scales(name: str, scales: Tensor, weight: Tensor) -> None:
    want = scale_count(weight.numel())
    if scales.dtype != torch.float32 or scales.shape != (want,) or not scales.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 [{want}], not {scales.dtype} {tuple(scales.shape)}")
    if scales.device != weight.device:
        check_device(name, scales, weight)
