"""Score matrices: their checks, and their sums over blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from fxresu.errors import ConfigError
from fxresu.granularity import Granularity
from fxresu.topk import row_chunks

__all__ = ["any_in_block", "block_expand", "block_sums", "check_score"]


def check_score(name: str, score: Tensor) -> None:
    """Raise ConfigError unless `score` is a floating-point matrix without NaN (infinities rank above everything
    else)."""
    if score.dim() != 2 or not score.is_floating_point():
        raise ConfigError(
            f"score of weight {name!r} is {score.dtype} {list(score.shape)}; must be a floating-point matrix [rows, K]"
        )
    # The maximum propagates NaN and needs no temporary of the score's size.
    if score.numel() and bool(score.detach().amax().isnan()):
        raise ConfigError(
            f"score of weight {name!r} contains NaN, which has no rank; look for a diverged step before pruning"
        )


def block_sums(score: Tensor, grain: Granularity) -> Tensor:
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
