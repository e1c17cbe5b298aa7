"""The published commit ("amnesty"): a share of the kept slots goes to candidates, the rest to old active weights.

Of n_keep slots, round(ratio * n_keep) go to candidates and the others to old actives, each side by its own top-k of
|score| (by default score = W_eff, the effective weight). Where one side has fewer coordinates than slots the other side
fills them, and where both together are too few, dead coordinates (neither active nor candidate) do, so that the new
mask's count is always exact: n_keep follows the new sparsity, which may differ from the old mask's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fxresu.errors import ConfigError
from fxresu.granularity import Granularity, parse_granularity
from fxresu.row_choice import NanFlags, kernels_choose, shared_in_rows
from fxresu.scores import Score, any_in_block, block_expand, block_sums, check_matrix, check_score, whole
from fxresu.topk import (
    INELIGIBLE,
    Segment,
    count_true,
    keep_count,
    magnitude_keys,
    row_chunks,
    select_flat,
    select_rows,
    share_of,
    signed_keys,
)
from fxresu.transposable import commit_transposable

__all__ = ["amnesty_masks"]

_LARGEST_FINITE = 0x7F7FFFFF  # bits of the largest finite fp32


@dataclass(frozen=True)
class _Weight:
    """One weight's coordinates by role; all tensors [rows, K] on one device. Without `candidate`, all pruned ones
    are."""

    score: Score
    old: Tensor
    candidate: Tensor | None

    def roles(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """(keys of |score|, old active, candidate) of the rows first..last-1."""
        old = self.old[first:last]
        candidate = ~old if self.candidate is None else self.candidate[first:last]
        return magnitude_keys(self.score[first:last]), old, candidate

    def keys(self, role: str, first: int, last: int) -> Tensor:
        """Keys of the rows first..last-1, INELIGIBLE outside of the role."""
        keys, old, candidate = self.roles(first, last)
        return _only(keys, {"old": old, "candidate": candidate, "dead": ~(old | candidate)}[role])


@torch.no_grad()
def amnesty_masks(
    scores: Mapping[str, Score],
    old: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor] | None,
    sparsity: float,
    ratio: float,
    granularity: str | Granularity = "row",
    flags: NanFlags | None = None,
) -> dict[str, Tensor]:
    """Masks after a commit: bool [rows, K] by weight name.

    scores: floating point [rows, K] by name; old: bool, the active coordinates before the commit; candidate: bool,
    disjoint from old (None: every pruned coordinate). sparsity in [0, 1) is the new masks'; ratio in [0, 1] is the
    candidates' share.

    The slots are shared out in every row ("row"), in every weight ("layer", and whole blocks with "block:HxW", where a
    block is old if any of its coordinates is, otherwise a candidate if any is) or over all weights ("global"). "n:m":
    every group keeps exactly n; the quota of each weight, round(ratio * slots), is spent on swaps of a group's next
    best candidate for its weakest active, best gain (difference of the scores) first, as many as exist; sparsity 0
    keeps everything. "2:4": see `commit_transposable`.

    Ties go to the lowest index (of the earlier weight). Only "global" looks at more than one weight at a time, so a
    caller short of memory may pass the others one by one. flags: takes what a GPU finds of NaN, so that nothing waits
    for it here; its caller asks it, and knows that no coordinate is both old and candidate.

    Raises ConfigError, naming the weight: NaN, shapes or dtypes that do not fit, coordinates that are both old and
    candidate, a sparsity that n:m does not allow.
    """
    grain = parse_granularity(granularity)
    if not 0.0 <= ratio <= 1.0:
        raise ConfigError(f"ratio={ratio!r}; the candidates' share of the kept slots must be in [0, 1]")
    keep_count(1, sparsity)  # refuses a sparsity outside [0, 1)
    _check(scores, old, candidate, sparsity, grain)
    weights = {
        name: _Weight(scores[name], old[name], candidate[name] if candidate is not None else None) for name in scores
    }
    if grain.kind == "global":
        return dict(zip(weights, _flat(list(weights.values()), sparsity, ratio)))
    return {name: _commit(name, weight, sparsity, ratio, grain, flags) for name, weight in weights.items()}


def _commit(
    name: str, weight: _Weight, sparsity: float, ratio: float, grain: Granularity, flags: NanFlags | None
) -> Tensor:
    if _by_kernel(weight.score, grain):
        slots = keep_count(weight.score.shape[1], sparsity)
        mask, flag = shared_in_rows(weight.score, slots, share_of(slots, ratio), weight.old, weight.candidate)
        if flags is not None:
            flags.add(name, flag)
        elif bool(flag):
            _check_values(name, weight)
        return mask
    if sparsity == 0.0 or weight.score.numel() == 0:
        return torch.ones_like(weight.old)
    if grain.kind == "row":
        return _rows(weight, sparsity, ratio)
    if grain.transposable:
        quota = share_of(weight.score.numel() // 2, ratio)
        return commit_transposable(whole(weight.score), weight.old, weight.candidate, quota)
    if grain.kind == "n:m":
        return _groups(weight, ratio, grain)
    if grain.kind == "layer":
        return _flat([weight], sparsity, ratio)[0]
    blocks_old = any_in_block(weight.old, grain)
    blocks_new = None
    if weight.candidate is not None:
        blocks_new = any_in_block(weight.candidate, grain).logical_and_(~blocks_old)
    blocks = _Weight(block_sums(weight.score, grain), blocks_old, blocks_new)
    return block_expand(_flat([blocks], sparsity, ratio)[0], grain)


def _by_kernel(score: Score, grain: Granularity) -> bool:
    return grain.kind == "row" and kernels_choose(score)


def _quotas(slots: int, wanted: int, n_old: Tensor, n_candidate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many (old, candidate, dead) coordinates fill `slots`, elementwise: `wanted` candidates if both sides
    suffice."""
    from_candidate = n_candidate.clamp_max(wanted)
    from_old = torch.minimum(slots - from_candidate, n_old)
    from_candidate = torch.minimum(slots - from_old, n_candidate)
    return from_old, from_candidate, slots - from_old - from_candidate


def _flat(weights: Sequence[_Weight], sparsity: float, ratio: float) -> list[Tensor]:
    """Slots shared out over all coordinates of all weights together."""
    slots = keep_count(sum(w.score.numel() for w in weights), sparsity)
    n_old = sum(count_true(w.old) for w in weights)
    n_candidate = sum(
        w.old.numel() - count_true(w.old) if w.candidate is None else count_true(w.candidate) for w in weights
    )
    counts = _quotas(slots, share_of(slots, ratio), torch.tensor(n_old), torch.tensor(n_candidate))
    masks = [torch.zeros_like(w.old) for w in weights]
    for role, count in zip(("old", "candidate", "dead"), counts):
        if int(count):
            segments = [Segment(w.score.shape[0], w.score.shape[1], partial(w.keys, role)) for w in weights]
            for index, first, last, chosen in select_flat(segments, int(count)):
                masks[index][first:last] |= chosen
    return masks


def _rows(weight: _Weight, sparsity: float, ratio: float) -> Tensor:
    """The same number of slots in every row."""
    rows, cols = weight.score.shape
    slots = keep_count(cols, sparsity)
    mask = torch.empty_like(weight.old)
    for first, last in row_chunks(rows, cols):
        keys, old, candidate = weight.roles(first, last)
        from_old, from_candidate, from_dead = _quotas(slots, share_of(slots, ratio), old.sum(1), candidate.sum(1))
        chosen = select_rows(_only(keys, old), from_old) | select_rows(_only(keys, candidate), from_candidate)
        if bool(from_dead.any()):
            chosen |= select_rows(_only(keys, ~(old | candidate)), from_dead)
        mask[first:last] = chosen
    return mask


def _groups(weight: _Weight, ratio: float, grain: Granularity) -> Tensor:
    """n slots in every group of m; the weight's quota of candidates is spent on the swaps that gain most."""
    rows, cols = weight.score.shape
    forced, possible = 0, 0  # candidates that slots without an old active take anyway; swaps that exist
    for first, last in row_chunks(rows, cols):
        _, n_candidate, n_swaps = _group_counts(weight, first, last, grain)
        forced += int(n_candidate.sum())
        possible += int(n_swaps.sum())
    quota = share_of(rows * cols // grain.m * grain.n, ratio)
    swaps = min(max(quota - forced, 0), possible)
    mask = torch.empty_like(weight.old)
    for first, last, in_group in _best_swaps(weight, swaps, grain):
        keys, old, candidate = (x.reshape(-1, grain.m) for x in weight.roles(first, last))
        n_old, n_candidate, _ = _group_counts(weight, first, last, grain)
        chosen = select_rows(_only(keys, old), n_old - in_group)
        chosen |= select_rows(_only(keys, candidate), n_candidate + in_group)
        n_dead = grain.n - n_old - n_candidate
        if bool(n_dead.any()):
            chosen |= select_rows(_only(keys, ~(old | candidate)), n_dead)
        mask[first:last] = chosen.view(-1, cols)
    return mask


def _group_counts(weight: _Weight, first: int, last: int, grain: Granularity) -> tuple[Tensor, Tensor, Tensor]:
    """Per group of the rows first..last-1: (old actives kept, candidates in slots left free, swaps that exist), before
    swaps."""
    _, old, candidate = (x.reshape(-1, grain.m) for x in weight.roles(first, last))
    available = candidate.sum(1)
    n_old, n_candidate, _ = _quotas(grain.n, 0, old.sum(1), available)
    return n_old, n_candidate, torch.minimum(n_old, available - n_candidate)


def _best_swaps(weight: _Weight, swaps: int, grain: Granularity) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, last row + 1, swaps in each group): the `swaps` swaps of largest gain over the weight."""
    rows, cols = weight.score.shape
    if swaps == 0:
        for first, last in row_chunks(rows, cols):
            yield first, last, torch.zeros((), dtype=torch.int64, device=weight.score.device)
        return
    # A group's gains fall from swap to swap and ties go to the lower index: the selected ones are always its first.
    segment = Segment(rows, cols, lambda first, last: _gain_keys(weight, first, last, grain))
    for _, first, last, chosen in select_flat([segment], swaps):
        yield first, last, chosen.sum(1)


def _gain_keys(weight: _Weight, first: int, last: int, grain: Granularity) -> Tensor:
    """int32 [groups, most swaps in a group]: keys of |next best candidate| - |weakest active| for a group's i-th
    swap."""
    keys, old, candidate = (x.reshape(-1, grain.m) for x in weight.roles(first, last))
    n_old, n_candidate, n_swaps = _group_counts(weight, first, last, grain)
    keys = keys.clamp_max(_LARGEST_FINITE)  # inf - inf has no rank
    best = _only(keys, candidate).sort(dim=1, descending=True).values
    strongest = _only(keys, old).sort(dim=1, descending=True).values
    nth = torch.arange(min(grain.n, grain.m - grain.n), device=keys.device)
    joins = best.gather(1, (n_candidate[:, None] + nth).clamp_max(grain.m - 1))
    leaves = strongest.gather(1, (n_old[:, None] - 1 - nth).clamp_min(0))
    gains = signed_keys(joins.view(torch.float32) - leaves.view(torch.float32))
    return _only(gains, nth < n_swaps[:, None])


def _only(keys: Tensor, eligible: Tensor) -> Tensor:
    return torch.where(eligible, keys, INELIGIBLE)


def _check(
    scores: Mapping[str, Score],
    old: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor] | None,
    sparsity: float,
    grain: Granularity,
) -> None:
    for label, masks in (("old", old), ("candidate", candidate)):
        if masks is not None and set(masks) != set(scores):
            odd = sorted(set(masks) ^ set(scores))
            raise ConfigError(
                f"{label} masks and scores must name the same weights; these are in only one of them: {odd}"
            )
    for name, score in scores.items():
        check_matrix(name, score)
        grain.check(name, score.shape[0], score.shape[1], sparsity)
        present = {"old": old[name]} | ({"candidate": candidate[name]} if candidate is not None else {})
        for label, mask in present.items():
            if mask.dtype != torch.bool or mask.shape != score.shape or mask.device != score.device:
                raise ConfigError(
                    f"{label} mask of weight {name!r} is {mask.dtype} {list(mask.shape)} on {mask.device}; "
                    f"must be bool {list(score.shape)} on {score.device} like its score"
                )
        if not _by_kernel(score, grain):  # it looks at them itself
            _check_values(name, _Weight(score, old[name], None if candidate is None else candidate[name]))


def _check_values(name: str, weight: _Weight) -> None:
    check_score(name, weight.score)
    old, candidate = weight.old, weight.candidate
    if candidate is not None and old.numel():
        both = sum(count_true(old[a:b] & candidate[a:b]) for a, b in row_chunks(*old.shape))
        if both:
            raise ConfigError(f"{both} coordinates of weight {name!r} are both old active and candidate")
