"""AdamW updates of many weights in one launch: a block's tensors cost the host as much as one of them does.

The operands are found through a table, a row a weight: addresses and sizes, then the numbers of its rule. Every weight
has programs of its own, and a program looks its weight up by its number.
"""

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._registry import unobserved, written
from ._triton import jit, launch, power_of_two, tl, use_triton
from .adamw_checks import check_update
from .adamw_rule import BLOCK, LANES, SPAN, AdamW, AdamWOperands
from .adamw_step import adamw_step_, numbers_of, program_of, second_of, tuning
from .factored_root import factored_form

# A row: addresses (weight, grad, m, v, m_scale, v_scale, check), entries, offset in programs, key, first program,
# address of mean, columns; from WORDS on float32: `numbers_of`. Of a factored v: `second_of`.
_ROW = struct.Struct("=13q10f")
WORDS = 13
FIELDS = _ROW.size // 8
_TL = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.uint8: "uint8"}

# --- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _adamw_steps_kernel(
    table,
    scale,
    count,
    HAS_SCALE: tl.constexpr,
    HAS_CHECK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    EIGHT: tl.constexpr,
    FACTORED: tl.constexpr,
    COUNT: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    each = tl.arange(0, COUNT)
    firsts = tl.load(table + each * FIELDS + 10, mask=each < count, other=2**40)
    item = tl.sum((firsts <= tl.program_id(0)).to(tl.int32), axis=0) - 1
    row = table + item * FIELDS
    weight = tl.load(row).to(tl.pointer_type(WEIGHT))
    grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
    m = tl.load(row + 2).to(tl.pointer_type(MOMENT))
    v = tl.load(row + 3).to(tl.pointer_type(tl.float32 if FACTORED else MOMENT))
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
        grad = tl.multiple_of(grad, 16)
        m = tl.multiple_of(m, 16)
        v = tl.multiple_of(v, 16)
    m_scale = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    v_scale = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    n = tl.load(row + 7)
    if ALIGNED:
        n = tl.multiple_of(n, 16)  # a mask that is the same for 16 neighbours lets them be loaded together
    numbers = (row + WORDS).to(tl.pointer_type(tl.float32))
    factor = tl.load(numbers + 8)
    if HAS_SCALE:
        factor = factor * tl.load(scale).to(tl.float32)
        n = tl.where(factor == factor, n, 0)
    if HAS_CHECK:
        norm = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float32)))
        n = tl.where(tl.abs(norm) < float("inf"), n, 0)
    program_of(
        weight,
        grad,
        m,
        v,
        m_scale,
        v_scale,
        tl.load(row + 11).to(tl.pointer_type(tl.float32)),
        tl.load(row + 12),
        tl.program_id(0) - tl.load(row + 10),
        n,
        tl.load(row + 8),
        tl.load(row + 9),
        factor,
        tl.load(numbers),
        tl.load(numbers + 1),
        tl.load(numbers + 2),
        tl.load(numbers + 3),
        tl.load(numbers + 4),
        tl.load(numbers + 5),
        tl.load(numbers + 6),
        tl.load(numbers + 7),
        EIGHT,
        FACTORED,
        LANES,
        BLOCK,
    )


Update = tuple[AdamWOperands, AdamW, Tensor | None]


def _kind(update: Update) -> tuple[Any, ...]:
    """What the updates of one launch have in common."""
    o, _, check = update
    return o.weight.dtype, o.grad.dtype, o.m.dtype, o.weight.device, check is None, factored_form(o)


def _launch(updates: Sequence[Update], scale: Tensor | None) -> None:
    rows, programs, bits = [], 0, 0
    last, numbers = tuple[Any, ...](), tuple[float, ...]()
    for o, rule, check in updates:
        if rule[:-1] != last:  # all but the seed, which is most often the same for all
            last, numbers = rule[:-1], numbers_of(rule)
        n = o.weight.numel()
        v, v_scale, mean, columns = second_of(o)
        tensors = o.weight, o.grad, o.m, v, o.m_scale, v_scale, check, mean
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        bits |= addresses[0] | addresses[1] | addresses[2] | addresses[3] | n
        place = n, o.offset // SPAN, rule.key, programs
        rows.append(_ROW.pack(*addresses[:7], *place, addresses[7], columns, *numbers, 0.0))
        programs += (n + SPAN - 1) // SPAN
    first, _, check = updates[0]
    host = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int64)
    # A copy from pageable memory would wait for the device; pinned memory is not used again before it is done.
    table = host.pin_memory().to(first.weight.device, non_blocking=True) if first.weight.is_cuda else host
    launch(
        _adamw_steps_kernel,
        programs,
        first.weight,
        table,
        table if scale is None else scale,
        len(rows),
        HAS_SCALE=scale is not None,
        HAS_CHECK=check is not None,
        ALIGNED=bits % 16 == 0,
        WEIGHT=getattr(tl, _TL[first.weight.dtype]),
        GRAD=getattr(tl, _TL[first.grad.dtype]),
        MOMENT=getattr(tl, _TL[first.m.dtype]),
        EIGHT=first.m_scale is not None,
        FACTORED=factored_form(first),
        COUNT=power_of_two(len(rows)),
        FIELDS=FIELDS,
        WORDS=WORDS,
        LANES=LANES,
        BLOCK=BLOCK,
        num_warps=LANES,
        **tuning(first),
    )


def _in_one_launch(updates: Sequence[Update]) -> bool:
    """Whether there is a kernel for all of them, and nothing that has to see them one by one."""
    tensors = [t for o, _, _ in updates for t in (o.weight, o.grad, o.m)]
    if any(t.dtype not in _TL for t in tensors) or not unobserved(*tensors):
        return False
    return all(use_triton(o.weight) for o, _, _ in updates)  # the others are on its device


def adamw_steps_(updates: Sequence[Update], scale: Tensor | None = None) -> None:
    """`adamw_step_` of many weights on one device; (operands, rule, check) of each, and the scale of all.

    check is a float32 scalar, or None.

    Raises ValueError for arguments that do not fit, before anything is written.
    """
    for o, rule, check in updates:
        check_update(o, rule, scale, check)
        if check is not None and check.dtype != torch.float32:
            raise ValueError(f"check must be float32, not {check.dtype}")
    with torch.no_grad():
        if not _in_one_launch(updates):
            for o, rule, check in updates:
                adamw_step_(o, rule, scale, check)
            return
        kinds: dict[tuple[Any, ...], list[Update]] = {}
        for update in updates:
            if update[0].weight.numel():
                kinds.setdefault(_kind(update), []).append(update)
        for members in kinds.values():
            _launch(members, scale)
            written(*(t for o, _, _ in members for t in (o.weight, o.m, o.v, o.m_scale, o.v_scale)))
