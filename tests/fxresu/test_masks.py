"""Mask selection: exact counts, ties to the lowest index, groups, blocks, all weights together, little memory."""

import subprocess
import sys
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
from fxresu.masks import (
    active_std,
    amnesty_masks,
    candidate_column_count,
    candidate_columns,
    keep_count,
    kept_total,
    overlap,
    overlap_counts,
    select_mask,
    select_masks,
    select_masks_global,
    theta_init,
)

# Few distinct values make ties; the others are where float comparisons go wrong.
VALUES = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 1e-40, -1e-40, float("inf"), float("-inf"), 3.4e38]
TIED = st.sampled_from(VALUES)
PLAIN = st.floats(width=32, allow_nan=False)
SPARSITY = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]) | st.floats(0.0, 0.999)
CHUNK = st.sampled_from([1, 7, 1 << 17])


def matrices(rows: st.SearchStrategy[int], cols: st.SearchStrategy[int]) -> st.SearchStrategy[Tensor]:
    shape = st.tuples(rows, cols)
    elements = st.sampled_from([TIED, PLAIN])
    return st.tuples(shape, elements).flatmap(
        lambda x: arrays(np.float32, x[0], elements=x[1], fill=st.nothing()).map(lambda a: torch.from_numpy(a.copy()))
    )


MATRIX = matrices(st.integers(1, 6), st.integers(1, 17))


def chunked(elements: int) -> "mock._patch[int]":
    """Makes chunks of this many elements, so that small matrices go through several."""
    return mock.patch.object(topk, "_MIN_CHUNK", elements)


def reference(score: Tensor, k: int, eligible: Tensor | None = None) -> Tensor:
    """The k largest |score| of a flat tensor by a stable sort, the lower index first among equals."""
    values = score.abs().double() if eligible is None else torch.where(eligible, score.abs().double(), -1.0)
    chosen = torch.zeros(score.numel(), dtype=torch.bool)
    chosen[values.sort(descending=True, stable=True).indices[:k]] = True
    return chosen


@given(st.integers(0, 10**11), SPARSITY)
def test_keep_count_rounds_half_up_and_keeps_one(n: int, sparsity: float) -> None:
    kept = keep_count(n, sparsity)
    assert (0 < kept <= n) if n else kept == 0
    assert abs(kept - (1 - sparsity) * n) <= 0.5 + 1e-4 or kept == 1


def test_keep_count_is_exact_for_decimals() -> None:
    assert [keep_count(5, s) for s in (0.9, 0.7, 0.5, 0.3, 0.1)] == [1, 2, 3, 4, 5]  # 0.5, 1.5, 2.5, 3.5, 4.5 half up
    assert keep_count(10, 0.7) == 3
    assert keep_count(3, 1 - 1 / 3) == 1
    for bad in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="sparsity="):
            keep_count(10, bad)


@given(MATRIX, SPARSITY, CHUNK)
def test_row_mask_is_the_top_k_of_every_row(score: Tensor, sparsity: float, chunk: int) -> None:
    with chunked(chunk):
        mask = select_mask(score, sparsity, "row")
    kept = keep_count(score.shape[1], sparsity)
    assert torch.equal(mask, torch.stack([reference(row, kept) for row in score]))


@given(MATRIX, SPARSITY, CHUNK)
def test_layer_mask_is_the_top_k_of_the_matrix(score: Tensor, sparsity: float, chunk: int) -> None:
    with chunked(chunk):
        mask = select_mask(score, sparsity, "layer")
    assert torch.equal(mask, reference(score.flatten(), keep_count(score.numel(), sparsity)).view_as(score))


@given(st.lists(MATRIX, min_size=1, max_size=4), SPARSITY, CHUNK)
def test_global_masks_equal_the_top_k_of_the_concatenation(scores: list[Tensor], sparsity: float, chunk: int) -> None:
    named = {f"w{i}": score for i, score in enumerate(scores)}
    with chunked(chunk):
        masks = select_masks_global(named, sparsity)
    flat = torch.cat([score.flatten() for score in scores])
    expected = reference(flat, keep_count(flat.numel(), sparsity))
    assert list(masks) == list(named)
    assert all(masks[name].shape == named[name].shape for name in named)
    assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), expected)


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    m = draw(st.integers(2, 8))
    n = draw(st.integers(1, m - 1))
    return draw(matrices(st.integers(1, 5), st.integers(1, 4).map(lambda g: g * m))), n, m


def _groups(n: int, m: int) -> str:
    return "2:4-rows" if (n, m) == (2, 4) else f"{n}:{m}"


@given(grouped(), CHUNK)
def test_n_m_keeps_the_top_n_of_every_group(case: tuple[Tensor, int, int], chunk: int) -> None:
    score, n, m = case
    with chunked(chunk):
        mask = select_mask(score, 1 - n / m, _groups(n, m))
    groups = score.reshape(-1, m)
    assert torch.equal(mask.view(-1, m), torch.stack([reference(group, n) for group in groups]))
    assert select_mask(score, 0.0, _groups(n, m)).all()


@given(matrices(st.integers(1, 3).map(lambda x: 2 * x), st.integers(1, 5).map(lambda x: 3 * x)), SPARSITY, CHUNK)
def test_block_mask_is_the_top_k_of_block_sums(score: Tensor, sparsity: float, chunk: int) -> None:
    with chunked(chunk):
        mask = select_mask(score, sparsity, "block:2x3")
    high, wide = score.shape[0] // 2, score.shape[1] // 3
    blocks = mask.view(high, 2, wide, 3)
    assert torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))
    kept = keep_count(high * wide, sparsity)
    assert blocks.all(3).all(1).sum() == kept
    sums = score.abs().view(high, 2, wide, 3).sum((1, 3)).flatten()
    chosen = blocks[:, 0, :, 0].flatten()
    if 0 < kept < chosen.numel():
        assert sums[chosen].min() * (1 + 1e-5) >= sums[~chosen].max()  # sums depend on the order of their terms


@given(MATRIX, SPARSITY, st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_other_dtypes_compare_in_fp32_and_layout_does_not_matter(
    score: Tensor, sparsity: float, dtype: torch.dtype
) -> None:
    cast = score.to(dtype)
    for granularity in ("row", "layer"):
        expected = select_mask(cast.float(), sparsity, granularity)
        assert torch.equal(select_mask(cast, sparsity, granularity), expected)
        assert torch.equal(select_mask(cast.t().contiguous().t(), sparsity, granularity), expected)


@given(st.lists(MATRIX, min_size=1, max_size=3), SPARSITY, st.sampled_from(["row", "layer", "global"]))
def test_kept_total_is_what_select_masks_keeps(scores: list[Tensor], sparsity: float, granularity: str) -> None:
    named = {f"w{i}": score for i, score in enumerate(scores)}
    shapes = {name: (score.shape[0], score.shape[1]) for name, score in named.items()}
    masks = select_masks(named, sparsity, granularity)
    assert sum(int(mask.sum()) for mask in masks.values()) == kept_total(shapes, sparsity, granularity)


def test_kept_total_of_patterns() -> None:
    scores = {"a": torch.randn(4, 8), "b": torch.randn(8, 16)}
    shapes = {"a": (4, 8), "b": (8, 16)}
    for granularity, sparsity in (("2:4", 0.5), ("2:4", 0.0), ("block:2x4", 0.3), ("block:2x4", 0.0)):
        masks = select_masks(scores, sparsity, granularity)
        assert sum(int(mask.sum()) for mask in masks.values()) == kept_total(shapes, sparsity, granularity)


def test_zeros_never_displace_active_weights_at_the_same_sparsity() -> None:
    weight = torch.randn(64, 96)
    for granularity, sparsity in (("row", 0.7), ("layer", 0.7), ("2:4", 0.5)):
        mask = select_mask(weight, sparsity, granularity)
        assert torch.equal(select_mask(weight * mask, sparsity, granularity), mask)


@pytest.mark.parametrize("granularity", ["row", "layer", "2:4", "block:2x2", "global"])
def test_nan_is_refused_with_the_weight_named(granularity: str) -> None:
    bad = torch.randn(4, 8)
    bad[3, 5] = float("nan")
    with pytest.raises(ConfigError, match=r"'bad'.*NaN"):
        select_masks({"good": torch.randn(4, 8), "bad": bad}, 0.5, granularity)


def test_refusals() -> None:
    score = torch.randn(4, 6)
    with pytest.raises(ConfigError, match=r"'w'.*K=6"):
        select_mask(score, 0.5, "2:4", name="w")
    with pytest.raises(ConfigError, match=r"sparsity=0\.25 contradicts granularity='1:2'"):
        select_mask(score, 0.25, "1:2")
    with pytest.raises(ConfigError, match=r"sparsity=1\.0"):
        select_mask(score, 1.0, "row")
    with pytest.raises(ConfigError, match=r"select_masks_global"):
        select_mask(score, 0.5, "global")
    with pytest.raises(ConfigError, match=r"'w' is torch.int64"):
        select_mask(torch.ones(2, 2, dtype=torch.int64), 0.5, name="w")
    with pytest.raises(ConfigError, match=r"\[3\]"):
        select_mask(torch.ones(3), 0.5)
    with pytest.raises(ValueError, match="k=7 exceeds"):
        list(topk.select_flat([topk.Segment(2, 3, lambda a, b: torch.zeros(b - a, 3, dtype=torch.int32))], 7))


MASKS = st.tuples(st.integers(1, 5), st.integers(1, 9)).flatmap(
    lambda shape: st.tuples(*[arrays(np.bool_, shape, fill=st.nothing()).map(lambda a: torch.from_numpy(a.copy()))] * 2)
)


@given(MASKS, CHUNK)
def test_overlap_is_the_jaccard_index(masks: tuple[Tensor, Tensor], chunk: int) -> None:
    a, b = masks
    with chunked(chunk):
        both, either = overlap_counts(a, b)
        index = overlap(a, b)
    assert (both, either) == ((a & b).sum().item(), (a | b).sum().item())
    assert index == (both / either if either else 1.0)


def test_overlap_refuses_other_shapes() -> None:
    with pytest.raises(ConfigError, match="one shape"):
        overlap(torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool))


@given(
    st.integers(1, 40),
    st.sampled_from([0.05, 0.1, 0.25, 0.3, 0.5, 0.99, 1.0]),
    st.integers(1, 9),
    st.integers(0, 20),
    st.booleans(),
)
def test_candidate_columns_are_whole_blocks_of_fixed_number(
    k: int, share: float, block: int, rotation: int, scored: bool
) -> None:
    generator = torch.Generator().manual_seed(k * 100 + rotation)
    mask = torch.rand(3, k, generator=generator) < 0.5
    score = torch.randn(3, k, generator=generator) if scored else None
    columns = candidate_columns(score, mask, share, block, rotation)
    assert columns.dtype == torch.int32
    assert len(columns) == candidate_column_count(k, share, block) >= share * k - 1e-9
    assert (columns.diff() > 0).all()
    assert columns[0] >= 0
    assert columns[-1] < k
    parts = [int((columns // block == b).sum()) for b in range(-(-k // block))]
    short = [i for i, n in enumerate(parts) if 0 < n < block and not (i == len(parts) - 1 and n == k - i * block)]
    assert len(short) <= (1 if k % block else 0)


def test_candidate_columns_follow_the_score_of_pruned_coordinates() -> None:
    score = torch.zeros(2, 12)
    score[0, 4:8] = 1.0
    score[1, 8:12] = 5.0
    mask = torch.zeros(2, 12, dtype=torch.bool)
    assert candidate_columns(score, mask, 0.3, block=4).tolist() == [8, 9, 10, 11]
    mask[1, 8:12] = True  # now that score belongs to active weights
    assert candidate_columns(score, mask, 0.3, block=4).tolist() == [4, 5, 6, 7]
    # The last block is short: it wins and takes what it lacks from the best block that lost.
    score, mask = torch.zeros(1, 10), torch.zeros(1, 10, dtype=torch.bool)
    score[0, 9], score[0, 6] = 9.0, 1.0
    assert candidate_columns(score, mask, 0.3, block=4).tolist() == [4, 5, 8, 9]


@pytest.mark.parametrize("score", [None, torch.zeros(2, 32)])
def test_rotation_sweeps_all_columns(score: Tensor | None) -> None:
    mask = torch.zeros(2, 32, dtype=torch.bool)
    picks = [candidate_columns(score, mask, 0.25, 4, r).tolist() for r in range(4)]
    assert sorted(sum(picks, [])) == list(range(32))
    assert candidate_columns(score, mask, 0.25, 4, 4).tolist() == picks[0]


def test_candidate_column_refusals() -> None:
    mask = torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"candidates=0\.0"):
        candidate_columns(None, mask, 0.0)
    with pytest.raises(ConfigError, match=r"block=0"):
        candidate_columns(None, mask, 0.5, 0)
    with pytest.raises(ConfigError, match=r"\[2, 9\].*\[2, 8\]"):
        candidate_columns(torch.zeros(2, 9), mask, 0.5)
    with pytest.raises(ConfigError, match=r"NaN"):
        candidate_columns(torch.full((2, 8), float("nan")), mask, 0.5)


@given(CHUNK, st.sampled_from([torch.float32, torch.bfloat16]))
def test_active_std(chunk: int, dtype: torch.dtype) -> None:
    weight = (torch.randn(9, 30, generator=torch.Generator().manual_seed(1)) * 0.02 + 3.0).to(dtype)
    mask = select_mask(weight, 0.6, "layer")
    with chunked(chunk):
        assert active_std(weight, mask) == pytest.approx(weight[mask].float().std().item(), rel=1e-3)
    assert active_std(weight, torch.zeros_like(mask)) == 0.0


def test_theta_init() -> None:
    active = torch.randn(5000, dtype=torch.bfloat16) * 0.5
    sigma = active.float().std().item()
    normal = theta_init("normal", (200, 300), active, 0.1, torch.Generator().manual_seed(7))
    uniform = theta_init("uniform", (200, 300), sigma, 0.1, torch.Generator().manual_seed(7))
    for theta in (normal, uniform):
        assert theta.shape == (200, 300) and theta.dtype == torch.float32
        assert theta.std().item() == pytest.approx(0.1 * sigma, rel=0.02)
        assert abs(theta.mean().item()) < 0.01 * sigma
    assert uniform.abs().max().item() <= 0.1 * sigma * 3**0.5
    assert normal.abs().max().item() > 0.1 * sigma * 3
    assert torch.equal(normal, theta_init("normal", normal, active, 0.1, torch.Generator().manual_seed(7)))
    assert theta_init("zero", (3, 4), active).eq(0).all()
    assert theta_init("normal", (3, 4), torch.ones(1)).eq(0).all()
    assert theta_init("normal", (3, 4), 0.5, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_theta_init_refusals() -> None:
    with pytest.raises(ConfigError, match=r"theta_init='gauss'"):
        theta_init("gauss", (2, 2), 1.0)
    with pytest.raises(ConfigError, match=r"theta_epsilon=-1"):
        theta_init("normal", (2, 2), 1.0, -1.0)
    with pytest.raises(ConfigError, match=r"standard deviation is nan"):
        theta_init("normal", (2, 2), torch.tensor([1.0, float("nan")]))


PEAK = """
import resource, torch
from fxresu.masks import *
torch.set_num_threads(1)
def run(weight, sparsity, granularity):
    if granularity == "global":
        return select_masks_global({"a": weight, "b": weight[:64]}, sparsity)["a"]
    old = select_mask(weight, sparsity, granularity)
    new = amnesty_masks({"w": weight}, {"w": old}, None, sparsity, 0.1, granularity)["w"]
    assert overlap(old, new) < 1.0
    return new
CASES = [(0.5, "row"), (0.5, "layer"), (0.5, "2:4"), (0.5, "block:4x16"), (0.5, "global")]
for case in CASES:  # library set-up belongs to no case
    run(torch.randn(64, 64), *case)
weight = torch.empty(4096, 4096).normal_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for case in CASES:
    run(weight, *case)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (weight.numel() * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_peak_memory_beside_the_masks_is_a_small_share_of_the_weight() -> None:
    result = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    # The two bool masks are 0.5 of an fp32 weight; an int64 index of half of the coordinates would add 1.0.
    assert float(result.stdout) < 0.5 + 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["row", "layer", "2:4", "block:2x4", "global"])
def test_cuda_gives_the_masks_of_the_cpu(granularity: str) -> None:
    score = torch.randn(300, 1024).mul(4).round().div(4)  # many ties
    scores = {"a": score, "b": score[:64].bfloat16()}
    on_cuda = {name: value.cuda() for name, value in scores.items()}
    with chunked(1 << 15):
        old, old_cuda = (select_masks(s, 0.5, granularity) for s in (scores, on_cuda))
        new = amnesty_masks({n: s.flip(0) for n, s in scores.items()}, old, None, 0.5, 0.1, granularity)
        flipped = {n: s.flip(0) for n, s in on_cuda.items()}
        new_cuda = amnesty_masks(flipped, old_cuda, None, 0.5, 0.1, granularity)
    for name in scores:
        assert old_cuda[name].is_cuda
        assert new_cuda[name].is_cuda
        assert torch.equal(old_cuda[name].cpu(), old[name])
        assert torch.equal(new_cuda[name].cpu(), new[name])
        assert overlap(old_cuda[name], new_cuda[name]) == overlap(old[name], new[name]) < 1.0
    columns = candidate_columns(on_cuda["a"], old_cuda["a"], 0.25, rotation=1)
    assert columns.is_cuda
    assert torch.equal(columns.cpu(), candidate_columns(score, old["a"], 0.25, rotation=1))
    generator = torch.Generator().manual_seed(1)
    assert theta_init("normal", (3, 4), 1.0, generator=generator, device="cuda").is_cuda
