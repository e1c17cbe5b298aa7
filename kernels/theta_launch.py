"""Launching the update of theta: which weights share a launch, and which kernels take them.

Where every row has a line of its own, `theta_rows` and `selective_rows` (FORM "rows"); for panels, for rows that share
one line, and for moments other than 8-bit if FORM is "columns", `theta_kernels` and the tiles of `selective_kernels`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._tiles import BLOCK_COLUMNS, panel_kind, theta_grid
from ._triton import launch, power_of_two, processors, tl
from .select import fraction_units
from .selective_kernels import (
    BLOCK,
    DIGIT_BINS,
    SHORT_DIGITS,
    apply_kernel,
    digits_kernel,
    moments_kernel,
    thresholds_kernel,
)
from .selective_rows import apply_rows_kernel, moments_rows_kernel
from .theta_kernels import FIELDS, STATISTICS, TABLE, simple_kernel
from .theta_rows import simple_rows_kernel
from .theta_rules import Rule, ThetaOperands

FORM = "rows"
"""What takes compact rows: "rows", or "columns" for comparison."""
_WORDS_PER_WARP = 8  # of "columns"; Adam on an H100, 4096x4096 at 50 %: 133 µs, with 4 words 142, with 2 166
_ROW_WORDS, _SLOTS_PER_WARP, _COLUMNS_PER_WARP = 128, 256, 512  # of "rows": registers bound how many programs run
_TL = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.uint8: "uint8"}


# --- launch ----------------------------------------------------------------------------------------------------------


def _dtype(tensor: Tensor | None) -> Any:
    return None if tensor is None else getattr(tl, _TL[tensor.dtype])


@functools.lru_cache(maxsize=1024)  # a launch for all weights of a kind, or one for each of them: in the backward
def _table(addresses: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(addresses on the device, and on the host). Cached: a training loop's tensors come back to the same places.

    The host's copy lives as long: where a CUDA graph captured the transfer, its replay reads it again.
    """
    host = torch.tensor(addresses, dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()  # a copy from pageable memory would wait for the device
        return host.to(device, non_blocking=True), host
    return host, host


def forget_addresses() -> None:
    """Free the tables of addresses that steps left on the device: when θ is given up, they name nothing any more."""
    _table.cache_clear()


def _addresses(operands: Sequence[ThetaOperands]) -> list[int]:
    padding = [0] * (FIELDS - len(TABLE) - 1)
    flat: list[int] = []
    for o in operands:
        for name in TABLE:
            tensor = getattr(o, name)
            flat.append(0 if tensor is None else tensor.data_ptr())
        flat += [o.key, *padding]
    return flat


def _kind(o: ThetaOperands) -> tuple[Any, ...]:
    """What weights of one launch have in common."""
    tensors = (o.weight, o.low, o.theta, o.m, o.v, o.grad)
    return (
        o.bits.shape,
        o.K,
        o.grad.shape,
        o.grad.device,
        None if o.columns is None else o.columns.numel(),
        *(None if t is None else t.dtype for t in tensors),
    )


def theta_steps_triton(
    operands: Sequence[ThetaOperands], rule: Rule, grad_scale: float, scale: Tensor | None
) -> Tensor:
    """`theta_step.theta_steps_` of checked operands on a GPU, or in the interpreter."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, o in enumerate(operands):
        groups.setdefault(_kind(o), []).append(i)
    parts, order = [], []
    for members in groups.values():
        parts.append(_group_triton([operands[i] for i in members], rule, grad_scale, scale))
        order += members
    stats = parts[0] if len(parts) == 1 else torch.cat(parts)
    if order == sorted(order):
        return stats
    return stats[_permutation(tuple(order), stats.device)]


@functools.lru_cache(maxsize=64)
def _permutation(order: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each weight went: the inverse of `order`."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return torch.tensor(inverse).to(device)


def _by_rows(o: ThetaOperands) -> bool:
    own = o.columns is None and o.grad.shape[0] == o.bits.shape[0]
    return own and (FORM == "rows" or o.m_scale is not None)


def _aligned(o: ThetaOperands) -> bool:
    """Whether every operand of the kernels by rows starts at a multiple of 16 bytes."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in (o.weight, o.low, o.theta, o.m, o.v, o.grad))


def _tile_shape(o: ThetaOperands) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(programs a weight, options of the kernels that look at moments, those of the kernels that write weights)."""
    if not _by_rows(o):
        grid = theta_grid(o.bits, o.columns, o.K, o.grad.shape, words_per_warp=_WORDS_PER_WARP)
        panel = panel_kind(o.grad.shape, o.columns, o.bits.shape[0])
        shape = {"PANEL": panel, "CHUNKS": grid.chunks, "BLOCK_W": grid.BLOCK_W, "num_warps": grid.num_warps}
        return grid.tiles, shape, shape
    words = power_of_two(o.bits.shape[1])
    block_w = min(words, _ROW_WORDS)
    slots = max(power_of_two(o.grad.shape[1]), 32)
    warps = min(max(slots // _SLOTS_PER_WARP, 32 * block_w // _COLUMNS_PER_WARP, 1), 16)
    moments = {"WORDS": words, "SLOTS": slots, "SHARE": min(slots, BLOCK_COLUMNS), "num_warps": warps}
    writing = {"CHUNKS": -(-o.bits.shape[1] // block_w), "BLOCK_W": block_w, **moments}
    return o.bits.shape[0], moments, writing


def _group_triton(operands: list[ThetaOperands], rule: Rule, grad_scale: float, scale: Tensor | None) -> Tensor:
    """One update of weights of one kind; float32 [weights, 4]."""
    o, n = operands[0], len(operands)
    grad = o.grad
    tiles, shape, writing = _tile_shape(o)
    programs = (tiles, n)
    geometry = (o.K, o.bits.shape[1], grad.shape[1], grad.numel())
    moment = o.m if o.m is not None else grad
    options = {
        "MOMENT": _dtype(moment),
        "GRAD": _dtype(grad),
        "EIGHT": o.m_scale is not None,
        "HAS_SCALE": scale is not None,
    }
    by_rows = _by_rows(o)
    if by_rows:
        options["ALIGNED"] = all(map(_aligned, operands))
    values = {"WEIGHT": _dtype(o.weight), "LOW": _dtype(o.low), "THETA": _dtype(o.theta)}
    table, _ = _table(tuple(_addresses(operands)), grad.device)
    factor = table if scale is None else scale  # not read without HAS_SCALE
    decay = 1 - rule.lr * rule.weight_decay
    betas = (rule.beta1, 1 - rule.beta1, rule.beta2, 1 - rule.beta2)
    stats = grad.new_empty((n, tiles, STATISTICS), dtype=torch.float32)

    if rule.name != "selective":
        adam = rule.name == "adam"
        correction1, correction2 = (1 - rule.beta1**rule.step, 1 - rule.beta2**rule.step) if adam else (1.0, 1.0)
        if rule.name == "momentum":
            betas = (rule.beta1, 1.0, rule.beta2, 1 - rule.beta2)
        launch(
            simple_rows_kernel if by_rows else simple_kernel,
            programs,
            grad,
            table,
            stats,
            factor,
            *geometry,
            rule.step,
            decay,
            rule.lr / correction1,
            *betas,
            rule.eps,
            correction2**-0.5,
            grad_scale,
            RULE=rule.name,
            **values,
            **options,
            **writing,
        )
        return _totals(stats)

    digits = SHORT_DIGITS[2 if grad.dtype == torch.bfloat16 else 4]
    counting = min((grad.numel() + BLOCK - 1) // BLOCK, max(8 * processors(grad) // n, 1))
    flags = (grad.new_empty if by_rows else grad.new_zeros)((n, grad.numel()), dtype=torch.uint8)
    counts = grad.new_zeros((n, 2, 8, DIGIT_BINS), dtype=torch.int64)
    thresholds = grad.new_empty((n,), dtype=torch.int64)
    units = (fraction_units(rule.top), fraction_units(rule.select))
    launch(
        moments_rows_kernel if by_rows else moments_kernel,
        programs,
        grad,
        table,
        flags,
        stats,
        factor,
        *geometry,
        rule.step,
        *betas,
        rule.eps,
        rule.consistency,
        grad_scale,
        **options,
        **shape,
    )
    for digit in range(digits):
        launch(
            digits_kernel,
            (counting, n),
            grad,
            table,
            flags,
            counts,
            grad.numel(),
            *units,
            DIGIT=digit,
            GRAD=options["GRAD"],
            BLOCK=BLOCK,
            num_warps=4,
        )
    launch(thresholds_kernel, n, grad, counts, thresholds, *units, DIGITS=digits, num_warps=1)
    launch(
        apply_rows_kernel if by_rows else apply_kernel,
        programs,
        grad,
        table,
        flags,
        thresholds,
        stats,
        factor,
        *geometry,
        rule.step,
        decay,
        rule.lr,
        rule.eps,
        grad_scale,
        **values,
        **options,
        **writing,
    )
    return _totals(stats)


def _totals(stats: Tensor) -> Tensor:
    """Statistics of the tiles [weights, tiles, STATISTICS], added up for each weight."""
    return stats.sum(1, dtype=torch.float64).to(torch.float32)
