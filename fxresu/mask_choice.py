"""Which coordinates are active after a pruning or a commit: methods over scores and the masks that are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .amnesty import amnesty_masks
from .errors import ConfigError
from .granularity import Granularity
from .masks import select_masks
from .row_choice import NanFlags
from .scores import RowScore, Score, any_in_block, block_expand, check_score
from .topk import count_true, row_chunks

__all__ = ["commit_masks", "masks_from_zeros", "pruning_masks"]

Masks = dict[str, Tensor]


def pruning_masks(
    scores: Mapping[str, Score],
    old: Mapping[str, Tensor] | None,
    sparsity: float,
    grain: Granularity,
    flags: NanFlags | None = None,
) -> Masks:
    """Masks of a pruning: the best of the active coordinates (all of them where `old` is None).

    Coordinates that are pruned already come back only where the active ones are too few for the sparsity: they are
    zero, whatever their score. flags: see `select_mask`.
    """
    if old is None:
        return select_masks(scores, sparsity, grain, flags)
    return amnesty_masks(scores, old, None, sparsity, 0.0, grain, flags)


def commit_masks(
    method: str,
    scores: Mapping[str, Score],
    old: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor] | None,
    sparsity: float,
    grain: Granularity,
    *,
    ratio: float = 0.1,
    threshold: float = 0.25,
    flags: NanFlags | None = None,
) -> Masks:
    """Masks of a commit. scores: [rows, K] by FQN, of the effective weights; old, candidate: bool [rows, K].

    method: "amnesty" (see `amnesty_masks`, with `ratio`); "compare", or "wanda" of Wanda's scores: the best of active
    and candidate coordinates together, without a quota; "threshold": those of both whose score exceeds `threshold`
    times the active coordinates' mean score, over each layer or over all of them ("global"). flags: see `select_mask`.

    Raises:
        ConfigError: an unknown method; "threshold" where the granularity fixes the counts.
    """
    if method == "amnesty":
        return amnesty_masks(scores, old, candidate, sparsity, ratio, grain, flags)
    if method in ("compare", "wanda"):
        eligible = {n: _eligible(scores[n], old[n], _of(candidate, n)) for n in scores}
        return select_masks(eligible, sparsity, grain, flags)
    if method != "threshold":
        raise ConfigError(f"method={method!r} is unknown; use amnesty, compare, wanda or threshold")
    if grain.kind not in ("layer", "global"):
        raise ConfigError(
            f"method='threshold' gives any count, but granularity={str(grain)!r} fixes it; use 'layer' or 'global'"
        )
    return _above_threshold(scores, old, candidate, threshold, grain)


def _of(masks: Mapping[str, Tensor] | None, name: str) -> Tensor | None:
    return None if masks is None else masks[name]


def _eligible(score: Score, old: Tensor, candidate: Tensor | None) -> Score:
    """The score, 0 at coordinates that are neither active nor candidate; without `candidate` all are one of both."""
    if candidate is None:
        return score

    def chunk(first: int, last: int) -> Tensor:
        dead = ~(old[first:last] | candidate[first:last])
        return score[first:last].detach().float().masked_fill(dead, 0.0)

    return RowScore((old.shape[0], old.shape[1]), score.device, chunk)


def _above_threshold(
    scores: Mapping[str, Score],
    old: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor] | None,
    threshold: float,
    grain: Granularity,
) -> Masks:
    masks = {}
    groups = [list(scores)] if grain.kind == "global" else [[name] for name in scores]
    for group in groups:
        for name in group:
            check_score(name, scores[name])
        limit = threshold * _mean_active({n: scores[n] for n in group}, old)
        for name in group:
            score = _eligible(scores[name], old[name], _of(candidate, name))
            mask = torch.empty_like(old[name])
            for first, last in row_chunks(*mask.shape):
                mask[first:last] = score[first:last].detach().float().abs() > limit
            masks[name] = mask
    return masks


def _mean_active(scores: Mapping[str, Score], old: Mapping[str, Tensor]) -> float:
    total, count = 0.0, 0
    for name, score in scores.items():
        mask = old[name]
        count += count_true(mask)
        for first, last in row_chunks(*mask.shape):
            kept = score[first:last].detach().float().abs().masked_fill(~mask[first:last], 0.0)
            total += float(kept.sum(dtype=torch.float64))
    return total / max(count, 1)


@torch.no_grad()
def masks_from_zeros(weights: Iterable[tuple[str, Tensor]], grain: Granularity) -> Masks:
    """Masks of an already pruned model: bool [rows, K] by FQN, active where a weight is not zero.

    weights: (FQN, [rows, K]), each of which is looked at once, before the next is asked for. A block is active if any
    of its weights is. An n:m group may have fewer than n active weights: that pruned weights were zeroed says nothing
    about active ones that happen to be zero; they fill up to n, the lowest index first.

    Raises:
        ConfigError: nothing is zero, or an n:m group has more than n weights that are not.
    """
    masks = {name: weight != 0 for name, weight in weights}
    if all(bool(mask.all()) for mask in masks.values()):
        raise ConfigError(
            f"warm_start: none of the {len(masks)} managed weights has a zero; load the pruned checkpoint before this,"
            " or start without warm_start"
        )
    if grain.kind == "block":
        return {name: block_expand(any_in_block(mask, grain), grain) for name, mask in masks.items()}
    if grain.kind == "n:m":
        return {name: _groups(name, mask, grain) for name, mask in masks.items()}
    return masks


def _groups(name: str, mask: Tensor, grain: Granularity) -> Tensor:
    counts = mask.view(-1, grain.m).sum(1)
    if bool((counts == grain.m).all()):
        return mask  # left dense
    if int(counts.max()) > grain.n:
        raise ConfigError(
            f"warm_start: weight {name!r} has a group of {grain.m} with {int(counts.max())} weights that are not zero,"
            f" more than granularity={str(grain)!r} allows; use the granularity that the checkpoint was pruned with"
        )
    chosen = select_masks({name: mask.float()}, float(grain.pattern_sparsity or 0.0), grain)[name]
    if bool((mask & ~chosen).any()):
        raise ConfigError(
            f"warm_start: the zeros of weight {name!r} are 2:4 along its rows, but not along its columns; use"
            " granularity='2:4-rows'"
        )
    return chosen
