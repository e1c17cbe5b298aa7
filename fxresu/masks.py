"""Masks as pure functions of scores: what is kept when a weight is pruned, and how much two masks agree.

A weight is a matrix [rows, K]; a mask is a bool tensor of that shape on the same device, True = active (kept). The
largest |score| is kept (magnitude pruning with score = W). Counts are exact and ties go to the lowest index, so the
same scores give the same mask on every device. Scores may have any floating-point dtype and are compared in fp32.

The commit of a cycle is in `amnesty`, the choice and initial value of candidates in `candidates`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fxresu.amnesty import amnesty_masks
from fxresu.candidates import active_std, candidate_column_count, candidate_columns, theta_init
from fxresu.errors import ConfigError
from fxresu.granularity import Granularity, parse_granularity
from fxresu.row_choice import NanFlags, best_in_rows, kernels_choose
from fxresu.scores import Score, block_expand, block_sums, check_matrix, check_score, whole
from fxresu.topk import Segment, count_true, keep_count, magnitude_keys, row_chunks, select_flat, select_rows
from fxresu.transposable import select_transposable

__all__ = [
    "active_std",
    "amnesty_masks",
    "candidate_column_count",
    "candidate_columns",
    "keep_count",
    "kept_total",
    "overlap",
    "overlap_counts",
    "select_mask",
    "select_masks",
    "select_masks_global",
    "theta_init",
]


@torch.no_grad()
def select_mask(
    score: Score,
    sparsity: float,
    granularity: str | Granularity = "row",
    *,
    name: str = "weight",
    flags: NanFlags | None = None,
) -> Tensor:
    """Keep the largest |score| of one weight: bool [rows, K].

    score: floating point [rows, K]; sparsity in [0, 1). Kept, exactly: "row" keep_count(K, sparsity) in every row;
    "layer" keep_count(rows * K, sparsity); "n:m" n of every m consecutive columns, where sparsity must be 1 - n/m or 0
    (all kept); "2:4" that and two of every four consecutive rows (`select_transposable`); "block:HxW" keep_count(number
    of blocks, sparsity) whole blocks, ranked by their sum of |score|.
    "global" ranks all weights together: `select_masks_global`.

    flags: takes what a GPU finds of NaN, so that nothing waits for it here; its caller asks it.

    Raises ConfigError, naming `name`: NaN in score, a shape or sparsity that the granularity does not allow.
    """
    grain = parse_granularity(granularity)
    if grain.kind == "global":
        raise ConfigError("granularity='global' ranks all weights together; use select_masks or select_masks_global")
    check_matrix(name, score)
    rows, cols = score.shape
    kept = keep_count(cols, sparsity)  # refuses a sparsity outside [0, 1)
    grain.check(name, rows, cols, sparsity)
    if grain.kind == "row" and kernels_choose(score):
        return best_in_rows(name, score, kept, flags)
    check_score(name, score)
    if sparsity == 0.0 or score.numel() == 0:
        return torch.ones(rows, cols, dtype=torch.bool, device=score.device)
    if grain.transposable:
        return select_transposable(whole(score))
    if grain.kind == "block":
        sums = block_sums(score, grain)
        return block_expand(_select_jointly({name: sums}, keep_count(sums.numel(), sparsity))[name], grain)
    if grain.kind == "layer":
        return _select_jointly({name: score}, keep_count(score.numel(), sparsity))[name]
    group, kept = (grain.m, grain.n) if grain.kind == "n:m" else (cols, kept)
    mask = torch.empty(rows, cols, dtype=torch.bool, device=score.device)
    for first, last in row_chunks(rows, cols):
        keys = magnitude_keys(score[first:last]).reshape(-1, group)
        mask[first:last] = select_rows(keys, kept).view(-1, cols)
    return mask


@torch.no_grad()
def select_masks_global(scores: Mapping[str, Score], sparsity: float) -> dict[str, Tensor]:
    """Keep the keep_count(all weights, sparsity) largest |score| over all weights together, without concatenating them.

    scores: floating point [rows, K] by weight name, on any devices. Returns bool [rows, K] by name, in the same order.
    Ties go to the earlier weight, then to the lower index. A weight may lose all of its coordinates.

    Raises ConfigError: NaN in a score, which it names; a sparsity outside [0, 1).
    """
    for name, score in scores.items():
        check_score(name, score)
    kept = keep_count(sum(score.numel() for score in scores.values()), sparsity)
    return _select_jointly(scores, kept)


def select_masks(
    scores: Mapping[str, Score],
    sparsity: float,
    granularity: str | Granularity = "row",
    flags: NanFlags | None = None,
) -> dict[str, Tensor]:
    """Masks of several weights: `select_masks_global` for "global", otherwise `select_mask` of each one."""
    grain = parse_granularity(granularity)
    if grain.kind == "global":
        return select_masks_global(scores, sparsity)
    return {name: select_mask(score, sparsity, grain, name=name, flags=flags) for name, score in scores.items()}


def kept_total(shapes: Mapping[str, tuple[int, int]], sparsity: float, granularity: str | Granularity = "row") -> int:
    """How many weights all masks of these [rows, K] shapes keep together at `sparsity`; exactly what `select_masks`
    keeps."""
    grain = parse_granularity(granularity)
    for name, (rows, cols) in shapes.items():
        grain.check(name, rows, cols, sparsity)
    if grain.kind == "global" or sparsity == 0.0:
        return keep_count(sum(rows * cols for rows, cols in shapes.values()), sparsity)
    per_weight: dict[str, Callable[[int, int], int]] = {
        "row": lambda rows, cols: rows * keep_count(cols, sparsity),
        "layer": lambda rows, cols: keep_count(rows * cols, sparsity),
        "n:m": lambda rows, cols: rows * cols // grain.m * grain.n,
        "block": lambda rows, cols: keep_count(rows * cols // _block(grain), sparsity) * _block(grain),
    }
    return sum(per_weight[grain.kind](rows, cols) for rows, cols in shapes.values())


@torch.no_grad()
def overlap_counts(a: Tensor, b: Tensor) -> tuple[int, int]:
    """(|a and b|, |a or b|) of two bool masks of one shape; sums over layers give the overlap of a model."""
    if a.shape != b.shape or a.dtype != torch.bool or b.dtype != torch.bool:
        raise ConfigError(
            f"masks must be bool and of one shape; got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
    both = 0
    if a.dim() == 2 and a.numel():
        both = sum(count_true(a[first:last] & b[first:last]) for first, last in row_chunks(*a.shape))
    elif a.numel():
        both = count_true(a & b)
    return both, count_true(a) + count_true(b) - both


def overlap(a: Tensor, b: Tensor) -> float:
    """Jaccard index |a and b| / |a or b| of two bool masks (1.0 if both are empty). Mask churn is 1 - overlap."""
    both, either = overlap_counts(a, b)
    return both / either if either else 1.0


def _select_jointly(scores: Mapping[str, Score], kept: int) -> dict[str, Tensor]:
    matrices = list(scores.values())
    masks = [torch.empty(score.shape, dtype=torch.bool, device=score.device) for score in matrices]
    segments = [Segment(*_shape(score), partial(_keys, score)) for score in matrices]
    for index, first, last, chosen in select_flat(segments, kept):
        masks[index][first:last] = chosen
    return dict(zip(scores, masks))


def _shape(score: Score) -> tuple[int, int]:
    return score.shape[0], score.shape[1]


def _keys(score: Score, first: int, last: int) -> Tensor:
    return magnitude_keys(score[first:last])


def _block(grain: Granularity) -> int:
    return grain.block_rows * grain.block_cols
