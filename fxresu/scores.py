"""Score matrices: computed whole or by chunks of rows; their checks, and their sums over blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxresu.errors import ConfigError
from fxresu.granularity import Granularity
from fxresu.topk import row_chunks

__all__ = [
    "RowScore",
    "Score",
    "any_in_block",
    "block_expand",
    "block_sums",
    "check_matrix",
    "check_score",
    "nan_message",
    "whole",
]


class RowScore:
    """A floating-point score matrix [rows, K] that is never in memory as a whole.

    `chunk(first, last)` gives the rows first..last-1. It is called several times for the same rows and must give the
    same values each time.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, chunk: Callable[[int, int], Tensor]) -> None:
        self.shape, self.device, self._chunk = torch.Size(shape), device, chunk
        self.dtype = torch.float32

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(self.shape[0])
        return self._chunk(first, last)

    def dim(self) -> int:
        """2."""
        return len(self.shape)

    def numel(self) -> int:
        """rows * K."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """True."""
        return True


Score = Tensor | RowScore


def whole(score: Score) -> Tensor:
    """The matrix in memory, for a selection that needs all of it."""
    return score if isinstance(score, Tensor) else score[:]


def check_matrix(name: str, score: Score) -> None:
    """Raise ConfigError unless `score` is a floating-point matrix. Its values are not looked at."""
    if score.dim() != 2 or not score.is_floating_point():
        raise ConfigError(
            f"score of weight {name!r} is {score.dtype} {list(score.shape)}; must be a floating-point matrix [rows, K]"
        )


def check_score(name: str, score: Score) -> None:
    """Raise ConfigError unless `score` is a floating-point matrix without NaN (infinities rank above everything
    else)."""
    check_matrix(name, score)
    # The maximum propagates NaN and needs no temporary of the score's size.
    chunks = row_chunks(*score.shape) if score.numel() else ()
    largest = [score[first:last].detach().amax() for first, last in chunks]
    if largest and bool(torch.stack(largest).isnan().any()):
        raise ConfigError(nan_message(name))


def nan_message(name: str) -> str:
    """What is said of a score with a NaN."""
    return f"score of weight {name!r} contains NaN, which has no rank; look for a diverged step before pruning"


def block_sums(score: Score, grain: Granularity) -> Tensor:
    """fp32 [rows / H, K / W]: sum of |score| in every block."""
    height, width = grain.block_rows, grain.block_cols
    rows, cols = score.shape
    sums = torch.empty(rows // height, cols // width, dtype=torch.float32, device=score.device)
    for first, last in row_chunks(rows, cols, multiple=height):
        blocks = score[first:last].detach().float().abs().reshape(-1, height, cols // width, width)
        sums[first // height : last // height] = blocks.sum((1, 3))
    return sums


def any_in_block(mask: Tensor, grain: Granularity) -> Tensor:
    """bool [rows / H, K / W]: whether a block has a True coordinate."""
    rows, cols = mask.shape
    blocks = mask.reshape(rows // grain.block_rows, grain.block_rows, cols // grain.block_cols, grain.block_cols)
    return blocks.any(3).any(1)


def block_expand(blocks: Tensor, grain: Granularity) -> Tensor:
    """The [rows, K] matrix whose blocks have the values of `blocks` [rows / H, K / W]."""
    (high, wide), height, width = blocks.shape, grain.block_rows, grain.block_cols
    return blocks[:, None, :, None].expand(high, height, wide, width).reshape(high * height, wide * width)
