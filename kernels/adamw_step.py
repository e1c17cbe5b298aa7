"""One AdamW update of a flat weight (rule and operands: `adamw_rule`): every byte is read once and written once.

A program takes four tiles of 4 x 256 entries. Its counters give four random words each, one for every tile, so that an
entry costs a quarter of Philox. A block of 256 is what a warp holds with eight entries a lane: its largest magnitude is
found without shared memory.
"""

import torch
from torch import Tensor

from ._check import FLOATS, check_device, check_float
from ._registry import operation, unobserved, written
from ._triton import jit, launch, tl, use_triton
from .adamw_rule import (
    BLOCK,
    LANES,
    SPAN,
    AdamW,
    AdamWOperands,
    adamw_step_reference,
    scale_count,
)
from .blockwise8 import decode_m, decode_v, encode_m, encode_v
from .philox import round_bf16

_MOMENTS = (*FLOATS, torch.uint8)

# --- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _scales_of(magnitude):
    """(scale, its inverse or 0) of every block of a tile [LANES, BLOCK], as columns."""
    scale = tl.max(magnitude, axis=1)
    return scale, tl.where(scale > 0, 1 / scale, 0.0)[:, None]


@jit
def _tile(
    weight,
    grad,
    m,
    v,
    m_scale,
    v_scale,
    word,
    first,
    n,
    factor,
    decay,
    rate,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    root_correction2,
    EIGHT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile: entries first ... first + LANES * BLOCK."""
    lane = tl.arange(0, LANES)
    at = first + lane[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < n
    block = first // BLOCK + lane
    known = block * BLOCK < n
    g = tl.load(grad + at, mask=inside, other=0).to(tl.float32) * factor
    w = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    old_m = tl.load(m + at, mask=inside, other=0)
    old_v = tl.load(v + at, mask=inside, other=0)
    if EIGHT:
        first_moment = decode_m(old_m, tl.load(m_scale + block, mask=known, other=0)[:, None])
        root = decode_v(old_v, tl.load(v_scale + block, mask=known, other=0)[:, None])
        second_moment = root * root
    else:
        first_moment = old_m.to(tl.float32)
        second_moment = old_v.to(tl.float32)
    first_moment = first_moment * beta1 + g * one_minus_beta1
    second_moment = second_moment * beta2 + g * g * one_minus_beta2
    root = tl.sqrt(second_moment)
    w = w * decay - rate * first_moment / (root * root_correction2 + eps)
    noise_v = (word * 0x9E3779B9) >> 13
    if EIGHT:
        m_top, m_inverse = _scales_of(tl.where(inside, tl.abs(first_moment), 0.0))
        v_top, v_inverse = _scales_of(tl.where(inside, root, 0.0))
        tl.store(m + at, encode_m(first_moment, m_inverse, (word >> 16) << 4), mask=inside)
        tl.store(v + at, encode_v(root, v_inverse, noise_v << 13), mask=inside)
        tl.store(m_scale + block, m_top, mask=known)
        tl.store(v_scale + block, v_top, mask=known)
    elif m.dtype.element_ty == tl.bfloat16:
        tl.store(m + at, round_bf16(first_moment, word >> 16), mask=inside)
        tl.store(v + at, round_bf16(second_moment, noise_v), mask=inside)
    else:
        tl.store(m + at, first_moment.to(m.dtype.element_ty), mask=inside)
        tl.store(v + at, second_moment.to(v.dtype.element_ty), mask=inside)
    if weight.dtype.element_ty == tl.bfloat16:
        tl.store(weight + at, round_bf16(w, word), mask=inside)
    else:
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)


@jit
def program_of(
    weight,
    grad,
    m,
    v,
    m_scale,
    v_scale,
    program,
    n,
    start,
    key,
    factor,
    decay,
    rate,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    root_correction2,
    EIGHT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program number `program` of one weight's update."""
    TILE: tl.constexpr = LANES * BLOCK
    inner = tl.arange(0, LANES)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    counter = (start + program) * TILE + inner
    words = tl.randint4x(key, counter)
    for part in tl.static_range(4):
        _tile(
            weight,
            grad,
            m,
            v,
            m_scale,
            v_scale,
            words[part],
            (program.to(tl.int64) * 4 + part) * TILE,
            n,
            factor,
            decay,
            rate,
            beta1,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            eps,
            root_correction2,
            EIGHT,
            LANES,
            BLOCK,
        )


@jit
def _adamw_kernel(
    weight,
    grad,
    m,
    v,
    m_scale,
    v_scale,
    scale,
    check,
    n,
    start,
    key,
    decay,
    rate,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    root_correction2,
    sign,
    HAS_SCALE: tl.constexpr,
    HAS_CHECK: tl.constexpr,
    EIGHT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = sign
    if HAS_SCALE:
        factor = factor * tl.load(scale).to(tl.float32)
        n = tl.where(factor == factor, n, 0)
    if HAS_CHECK:
        n = tl.where(tl.abs(tl.load(check).to(tl.float32)) < float("inf"), n, 0)
    program_of(
        weight,
        grad,
        m,
        v,
        m_scale,
        v_scale,
        tl.program_id(0),
        n,
        start,
        key,
        factor,
        decay,
        rate,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        root_correction2,
        EIGHT,
        LANES,
        BLOCK,
    )


def numbers_of(rule: AdamW) -> tuple[float, ...]:
    """What the kernels compute with, in their order."""
    return (
        1 - rule.lr * rule.weight_decay,
        rule.lr / (1 - rule.beta1**rule.step),
        rule.beta1,
        1 - rule.beta1,
        rule.beta2,
        1 - rule.beta2,
        rule.eps,
        (1 - rule.beta2**rule.step) ** -0.5,
        -1.0 if rule.maximize else 1.0,
    )


def _adamw_triton(o: AdamWOperands, rule: AdamW, scale: Tensor | None, check: Tensor | None) -> None:
    n, eight = o.weight.numel(), o.m_scale is not None
    missing = o.weight  # of an operand that is not read
    launch(
        _adamw_kernel,
        (n + SPAN - 1) // SPAN,
        o.weight,
        o.weight,
        o.grad,
        o.m,
        o.v,
        o.m_scale if eight else missing,
        o.v_scale if eight else missing,
        missing if scale is None else scale,
        missing if check is None else check,
        n,
        o.offset // SPAN,
        rule.key,
        *numbers_of(rule),
        HAS_SCALE=scale is not None,
        HAS_CHECK=check is not None,
        EIGHT=eight,
        LANES=LANES,
        BLOCK=BLOCK,
        num_warps=LANES,
    )


# --- operation -------------------------------------------------------------------------------------------------------


def check_update(o: AdamWOperands, rule: AdamW, scale: Tensor | None, check: Tensor | None) -> None:
    _check_rule(rule)
    if o.offset < 0 or o.offset % SPAN:
        raise ValueError(f"offset must be a multiple of {SPAN}, not {o.offset}")
    weight, kind = o.weight, o.m.dtype
    n, device = weight.numel(), weight.device
    # Every weight of every step comes by: nothing is built here that only a message needs.
    for name, tensor in (("weight", weight), ("grad", o.grad), ("m", o.m), ("v", o.v)):
        if tensor.numel() != n:
            raise ValueError(f"{name} must have the {n} entries of weight, not shape {tuple(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")
        if tensor.device != device:
            check_device(name, tensor, weight)
    check_float("weight.dtype", weight.dtype)
    check_float("grad.dtype", o.grad.dtype)
    if kind != o.v.dtype or kind not in _MOMENTS:
        raise ValueError(f"m and v must be both of one float dtype or both uint8, not {kind} and {o.v.dtype}")
    for name, scales in (("m_scale", o.m_scale), ("v_scale", o.v_scale)):
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


def _adamw_fake(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: Tensor | None,
    check: Tensor | None,
    offset: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool,
    seed: int,
) -> None:
    check_update(
        AdamWOperands(weight, grad, m, v, m_scale, v_scale, offset),
        AdamW(lr, beta1, beta2, eps, weight_decay, step, maximize, seed),
        scale,
        check,
    )


@operation("adamw_step_", ("weight", "m", "v", "m_scale", "v_scale"), fake=_adamw_fake)
def _adamw_op(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: Tensor | None,
    check: Tensor | None,
    offset: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool,
    seed: int,
) -> None:
    o = AdamWOperands(weight, grad, m, v, m_scale, v_scale, offset)
    rule = AdamW(lr, beta1, beta2, eps, weight_decay, step, maximize, seed)
    _run(o, rule, scale, check)


def _run(o: AdamWOperands, rule: AdamW, scale: Tensor | None, check: Tensor | None) -> None:
    check_update(o, rule, scale, check)
    if not use_triton(o.weight):
        adamw_step_reference(o, rule, scale, check)
        return
    if any(t.dtype == torch.float64 for t in (o.weight, o.grad, o.m)):
        raise ValueError("adamw_step_ takes float64 on the CPU only; its GPU kernel computes in float32")
    _adamw_triton(o, rule, scale, check)


def adamw_step_(o: AdamWOperands, rule: AdamW, scale: Tensor | None = None, check: Tensor | None = None) -> None:
    """One AdamW update in place, as the operation `fxresu::adamw_step_`.

    scale: one float on the weight's device that multiplies the gradient (clipping), not waited for; NaN skips the whole
    update. check: one float there, such as the gradient's norm, that skips the update too unless it is finite. A
    gradient that is not finite propagates otherwise. Entries whose weight, gradient and moments are zero stay exactly
    zero in every form of storage.

    Raises ValueError for arguments that do not fit, before anything is written.
    """
    with torch.no_grad():
        if unobserved(o.weight):
            _run(o, rule, scale, check)
            written(o.weight, o.m, o.v, o.m_scale, o.v_scale)
        else:
            operands = (o.weight, o.grad, o.m, o.v, o.m_scale, o.v_scale)
            torch.ops.fxresu.adamw_step_(*operands, scale, check, o.offset, *rule)
