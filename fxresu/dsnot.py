"""DSNoT: refine a fresh mask by swaps within every output, without training (Zhang et al. 2023, arXiv 2310.08915).

Pruning shifts the mean of output r by the error E_r = sum over its pruned weights of W E[x]. One swap grows the pruned
weight that cuts the error most, measured by W E[x] / Var[x]^power, and prunes the active weight of the smallest Wanda
score whose loss cuts it as well. A row stops when its error is within the threshold or a swap would change its sign.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .errors import ConfigError
from .granularity import Granularity
from .topk import row_chunks
from .weight_statistics import WeightStatistics

__all__ = ["refine_mask"]

_FLOOR = 1e-6  # of the variance: a constant input has none


@torch.no_grad()
def refine_mask(
    name: str,
    weight: Tensor,
    mask: Tensor,
    statistics: WeightStatistics,
    granularity: Granularity,
    *,
    swaps: int = 50,
    threshold: float = 0.01,
    power: float = 1.0,
) -> Tensor:
    """The refined mask, bool [rows, K], with as many active weights in every output as `mask` has.

    Args:
        weight: [rows, K] before pruning; mask: bool [rows, K], True = active.
        statistics: with inputs. Where the input features run along rows (Conv1D), an output is a column.
        swaps: most swaps an output; threshold: mean error of an output that is left alone.

    With n:m a swap stays within its group. Raises ConfigError where the swaps of an output would break the counts that
    the granularity keeps: columns of a Conv1D weight under "row" and n:m.
    """
    statistics.check(name, ("inputs",), "dsnot")
    if statistics.side == "rows" and statistics.groups > 1:
        raise ConfigError(
            f"stabilizer='dsnot': weight {name!r} stacks {statistics.groups} matrices of inputs by outputs, whose"
            " outputs are not apart in it; exclude it from the transform, or use no stabilizer"
        )
    if statistics.side == "rows":
        if granularity.kind != "layer" and granularity.kind != "global":
            raise ConfigError(
                f"stabilizer='dsnot' swaps within outputs, which are the columns of weight {name!r}, but"
                f" granularity={str(granularity)!r} counts along its rows; use granularity='layer' or exclude it"
            )
        flipped = dataclasses.replace(statistics, side="columns")
        return _refine_rows(weight.t(), mask.t(), flipped, 0, swaps, threshold, power).t().contiguous()
    group = granularity.m if granularity.kind == "n:m" else 0
    return _refine_rows(weight, mask, statistics, group, swaps, threshold, power)


def _refine_rows(
    weight: Tensor, mask: Tensor, statistics: WeightStatistics, group: int, swaps: int, threshold: float, power: float
) -> Tensor:
    out = torch.empty(mask.shape, dtype=torch.bool, device=weight.device)
    spread = statistics.input_variance().clamp_min(_FLOOR).pow(power)
    for first, last in row_chunks(*weight.shape):
        chunk = weight[first:last].float()
        mean, norm, width = (
            statistics.along(values, weight, first, last)
            for values in (statistics.input_mean(), statistics.input_norm(), spread)
        )
        out[first:last] = _refine(
            chunk * mean, chunk.abs() * norm, width, mask[first:last].clone(), group, swaps, threshold
        )
    return out


def _refine(
    share: Tensor, wanda: Tensor, spread: Tensor, mask: Tensor, group: int, swaps: int, threshold: float
) -> Tensor:
    """share: W E[x], the mean that a coordinate adds to its output. All [rows, K], or rows alike in [1, K]."""
    if not share.shape[1]:
        return mask
    growth = share / spread
    fresh = torch.ones_like(mask)  # a coordinate moves once
    error = share.masked_fill(mask, 0.0).sum(1, keepdim=True)
    live = torch.ones_like(error, dtype=torch.bool)
    for _ in range(swaps):
        sign = error.sign()
        gain = (sign * growth).masked_fill_(mask | ~fresh, -torch.inf)
        best, grown = gain.max(1, keepdim=True)
        cost = wanda.masked_fill(~mask | ~fresh | (sign * share >= 0), torch.inf)
        if group:
            columns = torch.arange(share.shape[1], device=share.device)
            cost.masked_fill_(columns // group != grown // group, torch.inf)
        least, pruned = cost.min(1, keepdim=True)
        after = error - share.gather(1, grown) + share.gather(1, pruned)
        live &= (error.abs() > threshold) & (best > 0) & (least < torch.inf) & (after * sign >= 0)
        if not bool(live.any()):
            break
        for index, active in ((grown, True), (pruned, False)):
            mask.scatter_(1, index, torch.where(live, active, mask.gather(1, index)))
            fresh.scatter_(1, index, fresh.gather(1, index) & ~live)
        error = torch.where(live, after, error)
    return mask
