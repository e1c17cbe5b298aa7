"""The commit: exact counts, the candidates' quota, clamping, best swaps of n:m groups."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from fxresu import topk
from fxresu.errors import ConfigError
from fxresu.masks import amnesty_masks, keep_count, select_mask, select_masks_global

SPARSITY = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
RATIO = st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])
CHUNK = st.sampled_from([1, 7, 1 << 17])
# Few values, hence ties; as fp32 exact.
SCORES = st.sampled_from([0.0, 0.5, -1.0, 1.0, 2.0, -2.0, 7.0, float("inf")])


@st.composite
def weights(draw: st.DrawFn, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(score, old, candidate): every coordinate is old, candidate or dead at random; sometimes no dead ones."""
    shape = (draw(st.integers(1, 4)), multiple * draw(st.integers(1, 4 if multiple > 1 else 12)))
    score = torch.from_numpy(draw(arrays(np.float32, shape, elements=SCORES, fill=st.nothing())).copy())
    roles = st.integers(0, draw(st.sampled_from([1, 2])))
    role = torch.from_numpy(draw(arrays(np.int8, shape, elements=roles, fill=st.nothing())).copy())
    return score, role == 0, role == 1


def top(score: Tensor, eligible: Tensor, k: int) -> Tensor:
    values = torch.where(eligible, score.abs().double(), -1.0)
    chosen = torch.zeros(score.numel(), dtype=torch.bool)
    chosen[values.sort(descending=True, stable=True).indices[:k]] = True
    assert k <= eligible.sum()
    return chosen


def expected(score: Tensor, old: Tensor, candidate: Tensor, slots: int, ratio: float) -> Tensor:
    """The commit of a flat tensor, slot by slot as the method is described."""
    n_old, n_candidate = int(old.sum()), int(candidate.sum())
    from_candidate = min(topk.share_of(slots, ratio), n_candidate)
    from_old = min(slots - from_candidate, n_old)
    from_candidate = min(slots - from_old, n_candidate)
    dead = slots - from_old - from_candidate
    return top(score, old, from_old) | top(score, candidate, from_candidate) | top(score, ~(old | candidate), dead)


def commit(
    case: tuple[Tensor, Tensor, Tensor], sparsity: float, ratio: float, granularity: str, chunk: int = 1 << 17
) -> Tensor:
    score, old, candidate = case
    with mock.patch.object(topk, "_MIN_CHUNK", chunk):
        return amnesty_masks({"w": score}, {"w": old}, {"w": candidate}, sparsity, ratio, granularity)["w"]


@given(weights(), SPARSITY, RATIO, CHUNK)
def test_row(case: tuple[Tensor, Tensor, Tensor], sparsity: float, ratio: float, chunk: int) -> None:
    slots = keep_count(case[0].shape[1], sparsity)
    want = torch.stack([expected(*row, slots, ratio) for row in zip(*case)])
    new = commit(case, sparsity, ratio, "row", chunk)
    assert (new.sum(1) == slots).all()
    assert torch.equal(new, want)


@given(weights(), SPARSITY, RATIO, CHUNK)
def test_layer(case: tuple[Tensor, Tensor, Tensor], sparsity: float, ratio: float, chunk: int) -> None:
    slots = keep_count(case[0].numel(), sparsity)
    want = expected(*(x.flatten() for x in case), slots, ratio).view_as(case[0])
    new = commit(case, sparsity, ratio, "layer", chunk)
    assert new.sum() == slots
    assert torch.equal(new, want)


@given(st.lists(weights(), min_size=1, max_size=3), SPARSITY, RATIO, CHUNK)
def test_global(cases: list[tuple[Tensor, Tensor, Tensor]], sparsity: float, ratio: float, chunk: int) -> None:
    score, old, candidate = ({f"w{i}": case[j] for i, case in enumerate(cases)} for j in range(3))
    with mock.patch.object(topk, "_MIN_CHUNK", chunk):
        new = amnesty_masks(score, old, candidate, sparsity, ratio, "global")
    flat = [torch.cat([case[j].flatten() for case in cases]) for j in range(3)]
    want = expected(*flat, keep_count(flat[0].numel(), sparsity), ratio)
    assert torch.equal(torch.cat([mask.flatten() for mask in new.values()]), want)


def _groups(n: int, m: int) -> str:
    return "2:4-rows" if (n, m) == (2, 4) else f"{n}:{m}"


def greedy_swaps(score: Tensor, old: Tensor, candidate: Tensor, n: int, m: int, ratio: float) -> Tensor:
    """n:m commit by making the swap of largest gain, the first group among equals, over and over."""
    score = score.abs().clamp_max(torch.finfo(torch.float32).max).reshape(-1, m)
    old, candidate = old.reshape(-1, m), candidate.reshape(-1, m)
    kept = torch.zeros_like(old)
    for g in range(len(score)):
        kept[g] = expected(score[g], old[g], candidate[g], n, 0.0)
    budget = topk.share_of(len(score) * n, ratio) - int((kept & candidate).sum())
    for _ in range(max(budget, 0)):
        best: tuple[float, int, int, int] | None = None
        for g in range(len(score)):
            joins = [j for j in range(m) if candidate[g, j] and not kept[g, j]]
            leaves = [j for j in range(m) if old[g, j] and kept[g, j]]
            if joins and leaves:
                join = max(joins, key=lambda j: (score[g, j].item(), -j))
                leave = min(leaves, key=lambda j: (score[g, j].item(), -j))
                gain = float(score[g, join] - score[g, leave])
                if best is None or gain > best[0]:
                    best = (gain, g, join, leave)
        if best is None:
            break
        kept[best[1], best[2]], kept[best[1], best[3]] = True, False
    return kept


@given(st.sampled_from([(2, 4), (1, 3), (3, 4), (4, 8)]), RATIO, CHUNK, st.data())
def test_n_m_makes_the_best_swaps(pattern: tuple[int, int], ratio: float, chunk: int, data: st.DataObject) -> None:
    n, m = pattern
    case = data.draw(weights(m))
    new = commit(case, 1 - n / m, ratio, _groups(n, m), chunk).view(-1, m)
    assert (new.sum(1) == n).all()
    assert torch.equal(new, greedy_swaps(*case, n, m, ratio))


def test_n_m_spends_the_quota_of_the_weight_on_the_best_groups() -> None:
    torch.manual_seed(3)
    score = torch.rand(16, 32)
    old = select_mask(torch.rand(16, 32), 0.5, "2:4-rows")
    new = amnesty_masks({"w": score}, {"w": old}, None, 0.5, 0.1, "2:4-rows")["w"]
    assert (new & ~old).sum() == topk.share_of(16 * 16, 0.1)
    changed = (new != old).view(-1, 4).any(1)
    groups, active = score.view(-1, 4), old.view(-1, 4)
    gain = torch.where(active, 0.0, groups).amax(1) - torch.where(active, groups, 2.0).amin(1)
    assert gain[changed].min() > gain[~changed].max()


def test_infinite_scores_gain_nothing_over_each_other() -> None:
    inf = float("inf")
    score = torch.tensor([[2.0, 2.0, 1.0, 1.0], [inf, inf, inf, inf]])
    old = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    new = amnesty_masks({"w": score}, {"w": old}, None, 0.5, 0.25, "2:4-rows")["w"]
    assert new.tolist() == [[True, True, False, False], [True, False, True, False]]  # gain 0 is better than -1


@given(weights(), SPARSITY, RATIO)
def test_blocks_are_whole_and_exact(case: tuple[Tensor, Tensor, Tensor], sparsity: float, ratio: float) -> None:
    score, old, candidate = (x.repeat_interleave(2, 0).repeat_interleave(3, 1) for x in case)
    new = commit((score, old, candidate), sparsity, ratio, "block:2x3")
    blocks = new.view(case[0].shape[0], 2, case[0].shape[1], 3)
    assert torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))
    flat = [x.flatten() for x in (case[0] * 6, case[1], case[2])]
    want = expected(*flat, keep_count(case[0].numel(), sparsity), ratio)
    assert torch.equal(blocks[:, 0, :, 0].flatten(), want)


def test_a_block_is_old_if_any_of_its_coordinates_is() -> None:
    score = torch.tensor([[0.0, 1.0, 5.0, 5.0, 9.0, 9.0]])
    old = torch.tensor([[0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    candidate = torch.tensor([[1, 0, 0, 1, 0, 0]], dtype=torch.bool)
    keep_old, keep_best = (commit((score, old, candidate), 2 / 3, ratio, "block:1x2") for ratio in (0.0, 1.0))
    assert keep_old.tolist() == [[True, True, False, False, False, False]]
    assert keep_best.tolist() == [[False, False, True, True, False, False]]


@pytest.mark.parametrize(("granularity", "sparsity"), [("row", 0.7), ("layer", 0.7), ("2:4", 0.5), ("global", 0.7)])
def test_no_quota_keeps_the_old_mask_and_a_quota_counts_candidates(granularity: str, sparsity: float) -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 64)
    if granularity == "global":
        old = select_masks_global({"w": weight}, sparsity)["w"]
    else:
        old = select_mask(weight, sparsity, granularity)
    effective = {"w": torch.where(old, weight, 100 * torch.randn(40, 64))}  # candidates far above every active
    frozen = amnesty_masks(effective, {"w": old}, None, sparsity, 0.0, granularity)["w"]
    assert torch.equal(frozen, old)
    new = amnesty_masks(effective, {"w": old}, {"w": ~old}, sparsity, 0.1, granularity)["w"]
    per_row = 40 * topk.share_of(keep_count(64, sparsity), 0.1)
    quota = per_row if granularity == "row" else topk.share_of(int(old.sum()), 0.1)
    assert new.sum() == old.sum()
    assert (new & ~old).sum() == quota
    again = amnesty_masks(effective, {"w": old}, {"w": ~old}, sparsity, 0.1, granularity)["w"]
    assert torch.equal(new, again)


@pytest.mark.parametrize("granularity", ["row", "layer", "global"])
def test_sparsity_may_rise_and_fall(granularity: str) -> None:
    torch.manual_seed(2)
    weight = torch.randn(20, 50)
    old = select_mask(weight, 0.6, "row")
    for sparsity in (0.9, 0.5, 0.3, 0.0):
        new = amnesty_masks({"w": weight}, {"w": old}, None, sparsity, 0.1, granularity)["w"]
        assert new.sum() == round((1 - sparsity) * 1000)
        if sparsity < 0.6:
            assert new[old].all()  # more slots than actives: all of them stay


def test_dead_coordinates_fill_what_actives_and_candidates_cannot() -> None:
    score = torch.tensor([[0.0, 3.0, 0.0, 2.0, 0.0, 0.0]])
    old = torch.tensor([[0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    candidate = torch.tensor([[0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    for granularity in ("row", "layer", "global"):
        new = amnesty_masks({"w": score}, {"w": old}, {"w": candidate}, 0.5, 0.1, granularity)["w"]
        assert new.tolist() == [[True, True, False, True, False, False]]
    new = amnesty_masks({"w": score}, {"w": old}, {"w": candidate}, 1 / 3, 0.0, "2:3")["w"]
    assert new.tolist() == [[True, True, False, True, True, False]]


def test_from_a_dense_old_mask_nothing_is_resurrected() -> None:
    score = torch.randn(8, 8)
    dense = torch.ones(8, 8, dtype=torch.bool)
    for granularity in ("row", "layer", "2:4", "2:4-rows"):
        new = amnesty_masks({"w": score}, {"w": dense}, None, 0.5, 0.5, granularity)["w"]
        assert torch.equal(new, select_mask(score, 0.5, granularity))


def test_refusals() -> None:
    score = torch.randn(2, 8)
    old = select_mask(score, 0.5)
    with pytest.raises(ConfigError, match=r"coordinates of weight 'w' are both"):
        amnesty_masks({"w": score}, {"w": old}, {"w": old}, 0.5, 0.1)
    with pytest.raises(ConfigError, match=r"ratio=1\.5"):
        amnesty_masks({"w": score}, {"w": old}, None, 0.5, 1.5)
    with pytest.raises(ConfigError, match=r"sparsity=1\.0"):
        amnesty_masks({"w": score}, {"w": old}, None, 1.0, 0.1)
    with pytest.raises(ConfigError, match=r"only one of them: \['v'\]"):
        amnesty_masks({"w": score}, {"w": old, "v": old}, None, 0.5, 0.1)
    with pytest.raises(ConfigError, match=r"old mask of weight 'w' is torch.float32"):
        amnesty_masks({"w": score}, {"w": old.float()}, None, 0.5, 0.1)
    with pytest.raises(ConfigError, match=r"candidate mask of weight 'w'.*\[2, 4\]"):
        amnesty_masks({"w": score}, {"w": old}, {"w": old[:, :4]}, 0.5, 0.1)
    with pytest.raises(ConfigError, match=r"'w'.*NaN"):
        amnesty_masks({"w": score.log()}, {"w": old}, None, 0.5, 0.1)
    with pytest.raises(ConfigError, match=r"contradicts granularity='1:4' \(weight 'w'\)"):
        amnesty_masks({"w": score}, {"w": old}, None, 0.6, 0.1, "1:4")
