"""One AdamW update of a flat weight (rule and operands: `adamw_rule`): every byte is read once and written once.

A program takes four tiles of 4 x 256 entries. Its counters give four random words each, one for every tile, so that an
entry costs a quarter of Philox. A block of 256 is what a warp holds with eight entries a lane: its largest magnitude is
found without shared memory.
"""

import torch
from torch import Tensor

from ._registry import operation, unobserved, written
from ._triton import jit, launch, tl, use_triton
from .adamw_checks import check_update
from .adamw_rule import BLOCK, LANES, SPAN, AdamW, AdamWOperands, adamw_step_reference
from .blockwise8 import decode_m, decode_v, encode_m, encode_v
from .factored_root import factored_form, root_of_tile
from .philox import random_words, round_bf16

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
    average,
    place,
    columns,
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
    FACTORED: tl.constexpr,
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
    if FACTORED == 0:
        old_v = tl.load(v + at, mask=inside, other=0)
    if EIGHT:
        first_moment = decode_m(old_m, tl.load(m_scale + block, mask=known, other=0)[:, None])
        if FACTORED == 0:
            root = decode_v(old_v, tl.load(v_scale + block, mask=known, other=0)[:, None])
            second_moment = root * root
    else:
        first_moment = old_m.to(tl.float32)
        if FACTORED == 0:
            second_moment = old_v.to(tl.float32)
    first_moment = first_moment * beta1 + g * one_minus_beta1
    if FACTORED:
        left = tl.minimum(n - first, LANES * BLOCK).to(tl.int32)
        root = root_of_tile(v, v_scale, average, place, columns, left, inside, FACTORED, LANES, BLOCK)
    else:
        second_moment = second_moment * beta2 + g * g * one_minus_beta2
        root = tl.sqrt(second_moment)
    if weight.dtype.element_ty == tl.bfloat16:
        # An inverse root, squared, is one instruction and two products where a division is nine, and exact to 2^-21.
        inverse = tl.rsqrt(root * root_correction2 + eps)
        w = w * decay - rate * first_moment * inverse * inverse
    else:
        w = w * decay - rate * first_moment / (root * root_correction2 + eps)
    noise_v = (word * 0x9E3779B9) >> 13
    if EIGHT:
        m_top, m_inverse = _scales_of(tl.where(inside, tl.abs(first_moment), 0.0))
        if FACTORED == 0:
            v_top, v_inverse = _scales_of(tl.where(inside, root, 0.0))
        tl.store(m + at, encode_m(first_moment, m_inverse, (word >> 16) << 4), mask=inside)
        if FACTORED == 0:
            tl.store(v + at, encode_v(root, v_inverse, noise_v << 13), mask=inside)
            tl.store(v_scale + block, v_top, mask=known)
        tl.store(m_scale + block, m_top, mask=known)
    elif m.dtype.element_ty == tl.bfloat16:
        tl.store(m + at, round_bf16(first_moment, word >> 16), mask=inside)
        if FACTORED == 0:
            tl.store(v + at, round_bf16(second_moment, noise_v), mask=inside)
    else:
        tl.store(m + at, first_moment.to(m.dtype.element_ty), mask=inside)
        if FACTORED == 0:
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
    mean,
    columns,
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
    FACTORED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program number `program` of one weight's update. FACTORED (`factored_form`): v is the column vector of a matrix
    with so many columns, v_scale the row vector."""
    TILE: tl.constexpr = LANES * BLOCK
    average = 0.0
    place = 0
    if FACTORED:
        # The line once in 64 bits; from its beginning on everything fits into 32.
        position = (start + program).to(tl.int64) * (4 * TILE)
        line = position // columns
        place = (position - line * columns).to(tl.int32)
        columns = tl.cast(columns, tl.int32)
        v_scale += line
        average = tl.load(mean)
    inner = tl.arange(0, LANES)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    counter = (start + program) * TILE + inner
    words = random_words(key, counter)
    for part in tl.static_range(4):
        _tile(
            weight,
            grad,
            m,
            v,
            m_scale,
            v_scale,
            average,
            place + part * TILE,
            columns,
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
            FACTORED,
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
    mean,
    scale,
    check,
    columns,
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
    FACTORED: tl.constexpr,
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
        mean,
        columns,
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
        FACTORED,
        LANES,
        BLOCK,
    )


def second_of(o: AdamWOperands) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """What the kernels take for the second moment: (v, v_scale, mean, columns), or (col, row, mean, columns)."""
    if o.col is None:
        return o.v, o.v_scale, None, 0
    return o.col, o.row, o.mean, o.col.numel()


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


def tuning(o: AdamWOperands) -> dict[str, int]:
    """Options of a launch. More registers than this leave room for too few programs: 2 to 9 % of the time."""
    return {} if o.m_scale is None else {"maxnreg": 96}


def _adamw_triton(o: AdamWOperands, rule: AdamW, scale: Tensor | None, check: Tensor | None) -> None:
    n = o.weight.numel()
    missing = o.weight  # of an operand that is not read
    v, v_scale, mean, columns = second_of(o)
    launch(
        _adamw_kernel,
        (n + SPAN - 1) // SPAN,
        o.weight,
        o.weight,
        o.grad,
        o.m,
        *(missing if t is None else t for t in (v, o.m_scale, v_scale, mean, scale, check)),
        columns,
        n,
        o.offset // SPAN,
        rule.key,
        *numbers_of(rule),
        HAS_SCALE=scale is not None,
        HAS_CHECK=check is not None,
        EIGHT=o.m_scale is not None,
        FACTORED=factored_form(o),
        LANES=LANES,
        BLOCK=BLOCK,
        num_warps=LANES,
        **tuning(o),
    )


# --- operation -------------------------------------------------------------------------------------------------------


def _adamw_fake(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor | None,
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
    row: Tensor | None = None,
    col: Tensor | None = None,
    mean: Tensor | None = None,
) -> None:
    check_update(
        AdamWOperands(weight, grad, m, v, m_scale, v_scale, offset, row, col, mean),
        AdamW(lr, beta1, beta2, eps, weight_decay, step, maximize, seed),
        scale,
        check,
    )


@operation("adamw_step_", ("weight", "m", "v", "m_scale", "v_scale"), fake=_adamw_fake)
def _adamw_op(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor | None,
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
    row: Tensor | None = None,
    col: Tensor | None = None,
    mean: Tensor | None = None,
) -> None:
    o = AdamWOperands(weight, grad, m, v, m_scale, v_scale, offset, row, col, mean)
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
            torch.ops.fxresu.adamw_step_(*operands, scale, check, o.offset, *rule, o.row, o.col, o.mean)
