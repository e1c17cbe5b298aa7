"""Lower bounds of a layer's step from its bytes and FLOPs: what "% of the limit" is measured against.

A step is a sequence of kernels; the limit is the sum over them of max(bytes / copy rate, FLOPs / GEMM rate), both rates
measured in the same run (a device copy with its read and write counted; the vendor's GEMM in the operands' dtype).

With n rows, k columns, T tokens, e bytes an operand, w bytes a master weight, p = s·α·n·k candidates, b = n·k/8 bytes
of mask, o bytes an optimizer moment, h bytes an entry of θ where it is apart, and t(s, w) the share of 32-byte sectors
that hold at least one candidate:

=========  ==========================================================  =============
kernel     bytes                                                       FLOPs
=========  ==========================================================  =============
cast       (w + e)·n·k, dense under autocast only
forward    e·(T·k + n·k + T·n)                                         2·T·n·k
dX         e·(T·k + n·k + T·n), where the input needs a gradient       2·T·n·k
dW         e·(T·k + T·n) + w·n·k, dense and sparse                     2·T·n·k
dθ         e·(α·T·k + T·n) + e·p + b, RESU                             2·T·n·α·k
AdamW      7·w·n·k (read W, dW, m, v; write W, m, v)
θ step     e·p + 4·o·p + b + 2·w·t·α·n·k where W is θ's master;
           else e·p + 4·o·p + b + 2·h·p + e·t·α·n·k; with a compute
           copy beside a master, e·t·α·n·k more
=========  ==========================================================  =============

t(s, w) = 1 - (1 - s)^(32/w): a random mask leaves almost no sector of fp32 weights without a candidate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

SECTOR = 32
Kernel = tuple[str, float, float]  # (name, bytes, FLOPs)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One linear layer in one precision.

    Attributes:
        rows, columns, tokens: n, k, T.
        operand, master: bytes of a GEMM operand and of the weight that the optimizer steps.
        input_gradient: whether dX is computed.
    """

    rows: int
    columns: int
    tokens: int
    operand: int
    master: int
    input_gradient: bool

    @property
    def numel(self) -> int:
        """Coordinates of the weight."""
        return self.rows * self.columns


def touched(share: float, itemsize: int) -> float:
    """Share of 32-byte sectors with at least one of the coordinates of which `share` are chosen at random."""
    return 1 - (1 - share) ** (SECTOR / itemsize)


def forward_kernels(shape: Shape) -> list[Kernel]:
    """Forward, and dX if the input needs one."""
    moved = shape.operand * (shape.tokens * (shape.rows + shape.columns) + shape.numel)
    flops = 2.0 * shape.tokens * shape.numel
    kernels: list[Kernel] = [("forward", moved, flops)]
    return [*kernels, ("dX", moved, flops)] if shape.input_gradient else kernels


def dense_kernels(shape: Shape, update: bool) -> list[Kernel]:
    """A dense step; also the sparse one, whose mask is one bit a coordinate on top and left out here."""
    kernels = forward_kernels(shape)
    if shape.master != shape.operand:
        kernels.insert(0, ("cast", (shape.master + shape.operand) * shape.numel, 0.0))
    moved = shape.operand * shape.tokens * (shape.rows + shape.columns) + shape.master * shape.numel
    kernels.append(("dW", moved, 2.0 * shape.tokens * shape.numel))
    if update:
        kernels.append(("AdamW", 7.0 * shape.master * shape.numel, 0.0))
    return kernels


def resu_kernels(
    shape: Shape, update: bool, sparsity: float, alpha: float, moment: float = 4.0, theta: int = 4
) -> list[Kernel]:
    """A RESU step; `moment`, `theta`: bytes of one entry of one of θ's two moments, and of θ where it is apart."""
    candidates = sparsity * alpha * shape.numel
    mask = shape.numel / 8
    moved = shape.operand * shape.tokens * (alpha * shape.columns + shape.rows) + mask
    moved += shape.operand * candidates
    kernels = [*forward_kernels(shape), ("dθ", moved, 2.0 * shape.tokens * alpha * shape.numel)]
    if update:
        kernels.append(("θ step", theta_step_bytes(shape, sparsity, alpha, moment, theta), 0.0))
    return kernels


def theta_step_bytes(shape: Shape, sparsity: float, alpha: float, moment: float = 4.0, theta: int = 4) -> float:
    """Bytes of one Adam update of θ (see the module)."""
    candidates = sparsity * alpha * shape.numel
    moved = shape.operand * candidates + 4 * moment * candidates + shape.numel / 8
    slots = alpha * shape.numel
    if shape.master == 4:
        moved += 2 * shape.master * touched(sparsity, shape.master) * slots
    else:
        moved += 2 * theta * candidates + shape.operand * touched(sparsity, shape.operand) * slots
    if shape.master != shape.operand:
        moved += shape.operand * touched(sparsity, shape.operand) * slots
    return moved


def limit_ms(kernels: Iterable[Kernel], copy_bytes_per_s: float, flops_per_s: float) -> float:
    """The least time that the kernels can take one after another."""
    return 1e3 * sum(max(moved / copy_bytes_per_s, flops / flops_per_s) for _, moved, flops in kernels)
