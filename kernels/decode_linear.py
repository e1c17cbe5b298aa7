"""y = x Wᵀ of few tokens with W = M∘W + Φ(θ) decoded from packed storage in registers: no dense weight in memory.

With few tokens a product is as fast as its weight can be read. Packed at 50 % sparsity in 16 bits, without theta, that
is 9/16 of the dense bytes (`decode_kernels`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._check import check_bits, check_device, check_matrix, check_theta
from ._registry import operation
from ._triton import INTERPRET, launch, power_of_two, processors, use_triton
from .compose import compose_reference
from .decode_kernels import decode_kernel, pairs_kernel

MOST_TOKENS = 32
_PROGRAMS_PER_PROCESSOR = 16


class Form(NamedTuple):
    """A way to run it: rows and words that a program looks at together, its warps, whether by matrix units, and whether
    in pairs (2:4 only)."""

    rows: int
    words: int
    warps: int
    dot: bool
    pairs: bool = False


FORMS = {
    "decode_16x4": Form(16, 4, 1, True),
    "decode_32x2": Form(32, 2, 1, True),
    "decode_64x4": Form(64, 4, 4, True),
    "decode_vector": Form(16, 2, 1, False),
    "decode_pairs_16": Form(16, 4, 1, True, True),
    "decode_pairs_64": Form(64, 4, 4, True, True),
    "decode_pairs_vector": Form(8, 4, 1, False, True),
}


def _splits(x: Tensor, row_blocks: int, steps: int, form: Form, tokens: int) -> tuple[int, int]:
    """(splits, steps of each): enough programs to fill the device, at least four steps in one where there are."""
    programs = row_blocks * (1 if form.dot else tokens) * form.warps
    wanted = -(-processors(x) * _PROGRAMS_PER_PROCESSOR // max(programs, 1))
    share = max(-(-steps // max(wanted, 1)), min(4, steps), 1)
    return -(-steps // share), share


def _decode_triton(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    form: Form,
) -> Tensor:
    tokens, K = x.shape
    rows, W = bits.shape
    row_blocks = -(-rows // form.rows)
    splits, share = _splits(x, row_blocks, -(-W // form.words), form, tokens)
    out = x.new_empty((splits, tokens, rows), dtype=x.dtype if splits == 1 else torch.float32)
    programs = (row_blocks, splits, 1 if form.dot else tokens)
    block_t = max(power_of_two(tokens), 16)
    common: dict[str, Any] = dict(
        DOT=form.dot,
        WIDEN=INTERPRET,
        BLOCK_R=form.rows,
        WORDS=form.words,
        BLOCK_T=block_t,
        num_warps=form.warps,
        num_stages=2,
    )
    has_theta = theta is not None
    if theta is None or row_start is None:
        theta, row_start = active, active_start  # stand-ins that the kernels do not touch
    if form.pairs:
        launch(
            pairs_kernel,
            programs,
            x,
            x,
            active.view(torch.int32),
            theta,
            bits,
            row_start,
            out,
            tokens,
            rows,
            K,
            W,
            theta.numel(),
            share,
            HAS_THETA=has_theta,
            BFLOAT=active.dtype == torch.bfloat16,
            **common,
        )
    else:
        precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3"
        launch(
            decode_kernel,
            programs,
            x,
            x,
            active,
            theta,
            bits,
            active_start,
            row_start,
            out,
            tokens,
            rows,
            K,
            W,
            active.numel(),
            theta.numel(),
            share,
            HAS_THETA=has_theta,
            PRECISION=precision,
            **common,
        )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


# --- operation -------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    how: str,
) -> Form:
    if how not in FORMS:
        raise ValueError(f"how={how!r} is unknown; use one of {', '.join(FORMS)}")
    form, rows = FORMS[how], bits.shape[0]
    check_matrix("x", x)
    check_device("x", x, active)
    check_theta("active", active, rows, active_start, None, active)
    check_bits("bits", bits, rows, x.shape[1], active)
    if theta is not None:
        check_theta("theta", theta, rows, row_start, None, active)
    if form.pairs:
        if active.element_size() != 2 or active.numel() * 2 != rows * x.shape[1] or x.shape[1] % 4:
            raise ValueError(
                f"active must hold two 16-bit values of every 4 inputs with how={how!r}, not "
                f"{tuple(active.shape)} {active.dtype} for [{rows}, {x.shape[1]}]"
            )
        if x.dtype != active.dtype:
            raise ValueError(f"x must be {active.dtype} like active with how={how!r}, not {x.dtype}")
    return form


def _fake(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    how: str,
) -> Tensor:
    _check(x, active, theta, bits, active_start, row_start, how)
    return x.new_empty((x.shape[0], bits.shape[0]))


def _flops(x: Any, active: Any, theta: Any, bits: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * bits[0]


@operation("decode_linear", fake=_fake, flops=_flops)
def _op(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    how: str,
) -> Tensor:
    form = _check(x, active, theta, bits, active_start, row_start, how)
    if x.shape[0] == 0 or x.shape[1] == 0:
        return x.new_zeros((x.shape[0], bits.shape[0]))
    if use_triton(x):
        if torch.float64 in (x.dtype, active.dtype):
            raise ValueError("decode_linear takes float64 on the CPU only; the kernel sums in float32")
        return _decode_triton(x, active, theta, bits, active_start, row_start, form)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dense = compose_reference(active, theta, bits, active_start, row_start, x.shape[1], x.dtype)
    return (x.to(wide) @ dense.to(wide).t()).to(x.dtype)


def decode_linear(
    x: Tensor,
    active: Tensor,
    theta: Tensor | None,
    bits: Tensor,
    active_start: Tensor,
    row_start: Tensor | None,
    how: str = "decode_16x4",
) -> Tensor:
    """x Wᵀ as [tokens, rows] with W = compose(active, theta, ...) in x's dtype; sums are float32.

    x: [tokens, K], contiguous; meant for at most 32 tokens. how: one of `FORMS`; those in pairs need a mask that keeps
    two of every four inputs and packed 16-bit values of x's dtype. No gradient of its own. Raises ValueError
    for arguments that do not fit each other.
    """
    return torch.ops.fxresu.decode_linear(x, active, theta, bits, active_start, row_start, how)
