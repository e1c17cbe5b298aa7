"""Masks of prunings, commits and warm starts, as pure functions of scores and masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxresu.errors import ConfigError
from fxresu.granularity import parse_granularity
from fxresu.kernels import count, pack, row_counts, unpack
from fxresu.mask_choice import commit_masks, masks_from_zeros, pruning_masks
from fxresu.masks import kept_total, select_masks

GRAINS = ["row", "layer", "global", "2:4-rows", "block:2x4"]
grains = st.sampled_from(GRAINS)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], str, float, float]:
    """(scores of two weights, granularity, sparsity before, sparsity after)."""
    grain = draw(grains)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    shapes = {n: (2 * draw(st.integers(1, 5)), 4 * draw(st.integers(1, 4))) for n in ("a", "b")}
    # Few distinct values: ties are the rule.
    scores = {n: torch.randint(-4, 5, s, generator=generator).float() for n, s in shapes.items()}
    before, after = (0.5, 0.5) if grain == "2:4-rows" else (draw(st.floats(0, 0.9)), draw(st.floats(0, 0.9)))
    return scores, grain, before, after


@given(cases())
def test_a_pruning_takes_from_the_active_ones(case: tuple) -> None:
    scores, grain, before, after = case
    parsed = parse_granularity(grain)
    first = pruning_masks(scores, None, before, parsed)
    # What is pruned already scores highest: it must stay pruned as long as the active ones suffice.
    favours = {n: torch.where(first[n], s, 100.0) for n, s in scores.items()}
    second = pruning_masks(favours, first, after, parsed)
    shapes = {n: (s.shape[0], s.shape[1]) for n, s in scores.items()}
    total = kept_total(shapes, after, parsed)
    assert sum(int(m.sum()) for m in second.values()) == total
    if after >= before:
        assert not any((second[n] & ~first[n]).any() for n in scores)
        best = select_masks({n: torch.where(first[n], s.abs() + 1, 0.0) for n, s in scores.items()}, after, parsed)
        assert all(torch.equal(best[n], second[n]) for n in scores)
    else:
        assert grain == "row" or not any((first[n] & ~second[n]).any() for n in scores)


@given(cases(), st.floats(0, 1), st.booleans())
def test_compare_is_the_best_of_both_together(case: tuple, share: float, partial: bool) -> None:
    scores, grain, before, after = case
    parsed = parse_granularity(grain)
    old = pruning_masks(scores, None, before, parsed)
    candidate = None
    if partial:
        candidate = {n: ~m & (torch.arange(m.shape[1]) < share * m.shape[1]) for n, m in old.items()}
    new = commit_masks("compare", scores, old, candidate, after, parsed)
    shapes = {n: (s.shape[0], s.shape[1]) for n, s in scores.items()}
    assert sum(int(m.sum()) for m in new.values()) == kept_total(shapes, after, parsed)
    if grain not in ("layer", "global") or after == 0:
        return
    groups = [list(scores)] if grain == "global" else [[n] for n in scores]
    for group in groups:
        alive = {n: old[n] | (~old[n] if candidate is None else candidate[n]) for n in group}
        values = torch.cat([torch.where(alive[n], scores[n].abs(), 0.0).flatten() for n in group])
        kept = torch.cat([new[n].flatten() for n in group])
        if kept.any() and not kept.all():
            assert values[kept].min() >= values[~kept].max()


@given(cases(), st.floats(0, 2), st.booleans())
def test_threshold_is_a_bound_on_the_score(case: tuple, threshold: float, together: bool) -> None:
    scores, _, before, _ = case
    grain = parse_granularity("global" if together else "layer")
    old = select_masks(scores, before, grain)
    new = commit_masks("threshold", scores, old, None, 0.0, grain, threshold=threshold)
    for group in [list(scores)] if together else [[n] for n in scores]:
        active = torch.cat([scores[n][old[n]].abs().double() for n in group])
        limit = threshold * float(active.mean()) if active.numel() else 0.0
        for name in group:
            near = (scores[name].abs().double() - limit).abs() < 1e-6
            assert torch.equal(new[name] | near, (scores[name].abs().double() > limit) | near)


def test_wanda_and_compare_differ_by_their_scores_only() -> None:
    scores = {"a": torch.randn(4, 8)}
    grain = parse_granularity("row")
    old = pruning_masks(scores, None, 0.5, grain)
    arguments = (scores, old, None, 0.5, grain)
    assert torch.equal(commit_masks("wanda", *arguments)["a"], commit_masks("compare", *arguments)["a"])
    with pytest.raises(ConfigError, match="method='amnest' is unknown"):
        commit_masks("amnest", *arguments)
    with pytest.raises(ConfigError, match="method='threshold' gives any count, but granularity='row' fixes it"):
        commit_masks("threshold", *arguments)


@given(cases())
def test_a_warm_start_reads_back_the_mask_that_pruned(case: tuple) -> None:
    scores, grain, _, _ = case
    parsed = parse_granularity(grain)
    weights = {n: s.abs() + 1 for n, s in scores.items()}
    masks = pruning_masks(weights, None, 0.5, parsed)
    if all(bool(m.all()) for m in masks.values()):
        return
    found = masks_from_zeros({n: w * masks[n] for n, w in weights.items()}.items(), parsed)
    assert all(torch.equal(found[n], masks[n]) for n in masks)


def test_warm_start_of_patterns() -> None:
    with pytest.raises(ConfigError, match="none of the 1 managed weights has a zero"):
        masks_from_zeros({"w": torch.ones(2, 4)}.items(), parse_granularity("row"))
    with pytest.raises(ConfigError, match="weight 'w' has a group of 4 with 3 weights that are not zero"):
        masks_from_zeros({"w": torch.tensor([[1.0, 1, 1, 0]])}.items(), parse_granularity("2:4-rows"))
    fewer = masks_from_zeros({"w": torch.tensor([[1.0, 0, 0, 0]])}.items(), parse_granularity("2:4-rows"))["w"]
    assert fewer[0, 0] and int(fewer.sum()) == 2
    weights = {"w": torch.tensor([[1.0, 0, 2, 0]]), "d": torch.ones(2, 4)}
    dense = masks_from_zeros(weights.items(), parse_granularity("2:4-rows"))
    assert dense["d"].all()
    same_columns = torch.tensor([[1.0, 1, 0, 0]]).expand(4, 4).contiguous()
    with pytest.raises(ConfigError, match="the zeros of weight 'w' are 2:4 along its rows, but not along its columns"):
        masks_from_zeros({"w": same_columns}.items(), parse_granularity("2:4"))
    block = masks_from_zeros({"w": torch.tensor([[1.0, 0, 0, 0]])}.items(), parse_granularity("block:1x2"))["w"]
    assert block.tolist() == [[True, True, False, False]]


@given(st.integers(1, 9), st.integers(1, 100), st.integers(0, 10_000), st.floats(0, 1))
def test_packing_is_exact(rows: int, k: int, seed: int, share: float) -> None:
    mask = torch.rand(rows, k, generator=torch.Generator().manual_seed(seed)) < share
    bits = pack(mask)
    assert bits.shape == (rows, -(-k // 32)) and torch.equal(unpack(bits, k), mask)
    assert int(count(bits)) == int(mask.sum())
    assert torch.equal(row_counts(bits, k), mask.sum(1)) and torch.equal(row_counts(bits, k, True), (~mask).sum(1))
