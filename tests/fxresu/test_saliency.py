"""Scores: their formulas, chunk by chunk, and what a callable may be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxresu import saliency, topk
from fxresu.errors import ConfigError
from fxresu.masks import kept_total, select_mask, select_masks
from fxresu.saliency import SCORES, needs_of, score_of
from fxresu.scores import RowScore
from fxresu.weight_statistics import WeightStatistics

ROWS, K = 6, 10


def statistics(side: str = "columns", seed: int = 0) -> WeightStatistics:
    generator = torch.Generator().manual_seed(seed)
    found = WeightStatistics(batches=2)
    n = K if side == "columns" else ROWS
    for _ in range(2):
        found.add_inputs(torch.randn(7, n, generator=generator) + 1, side, 0, n)
        found.add_gradient(torch.randn(ROWS, K, generator=generator), ("gradients", "squares"), None)
    return found


def expected(score: str, weight: Tensor, s: WeightStatistics) -> Tensor:
    """The table of `saliency`, whole matrices in float64."""
    w = weight.double()
    norm = s.input_squares.sqrt()[0]
    norm = norm[None, :] if s.side == "columns" else norm[:, None]
    mean, squares = s.gradient_sums.double() / 2, s.gradient_squares.double() / 2
    return {
        "magnitude": w.abs(),
        "wanda": w.abs() * norm,
        "wanda++": w.abs() * (100 * squares + norm.square() / 2),
        "gradient": mean.abs(),
        "snip": (w * mean).abs(),
    }[score]


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "wanda++", "gradient", "snip"])
def test_formulas(score: str, side: str) -> None:
    weight, s = torch.randn(ROWS, K), statistics(side)
    found = score_of(score, "w", weight, s)
    whole = found[0:ROWS].abs()
    torch.testing.assert_close(whole.double(), expected(score, weight, s), rtol=1e-5, atol=1e-6)
    pieces = torch.cat([found[a : a + 1].abs() for a in range(ROWS)])
    assert torch.equal(pieces, whole)


def test_only_magnitude_is_a_matrix_in_memory() -> None:
    weight = torch.randn(ROWS, K)
    for score in SCORES:
        found = score_of(score, "w", weight, statistics())
        assert isinstance(found, RowScore) == (score != "magnitude")
    assert score_of("magnitude", "w", weight).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("granularity", ["row", "layer", "global", "2:5", "block:2x5"])
@pytest.mark.parametrize("score", SCORES)
def test_masks_from_rows_of_scores_are_those_from_whole_matrices(score: str, granularity: str, monkeypatch) -> None:
    weights = {n: torch.randn(ROWS, K) for n in ("a", "b")}
    lazy = {n: score_of(score, n, w, statistics(seed=len(n)), seed=3) for n, w in weights.items()}
    whole = {n: s[0:ROWS].clone() for n, s in lazy.items()}
    sparsity, shapes = 0.6, {n: (ROWS, K) for n in weights}
    want = select_masks(whole, sparsity, granularity)
    monkeypatch.setattr(topk, "_MIN_CHUNK", 1)  # one row at a time
    monkeypatch.setattr(topk, "_MAX_CHUNK", 1)
    got = select_masks(lazy, sparsity, granularity)
    assert all(torch.equal(got[n], want[n]) for n in weights)
    assert sum(int(m.sum()) for m in got.values()) == kept_total(shapes, sparsity, granularity)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**62), st.integers(0, 39))
def test_random_scores_are_a_function_of_the_coordinate(rows: int, k: int, seed: int, cut: int) -> None:
    score = score_of("random", "layer.weight", torch.zeros(rows, k), seed=seed)
    whole, cut = score[0:rows], min(cut, rows)
    assert torch.equal(torch.cat([score[0:cut], score[cut:rows]]), whole)
    assert ((whole >= 0) & (whole < 1)).all()


def test_random_scores_are_uniform_and_differ_by_weight_and_seed() -> None:
    zeros = torch.zeros(400, 500)
    a, b, c = (score_of("random", n, zeros, seed=s)[0:400] for n, s in (("a", 0), ("b", 0), ("a", 1)))
    counts = torch.histc(a, 20, 0, 1)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    for other in (b, c):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), other.flatten()]))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([a[:, 1:].flatten(), a[:, :-1].flatten()]))[0, 1])) < 0.01


def last_columns(weight: Tensor, statistics: WeightStatistics | None) -> Tensor:
    return torch.arange(weight.shape[1]).float().expand(weight.shape)


def needy(weight: Tensor, statistics: WeightStatistics) -> Tensor:
    return weight * statistics.input_mean()


needy.needs = ("inputs",)  # type: ignore[attr-defined]


def test_callables() -> None:
    weight = torch.randn(ROWS, K)
    mask = select_mask(score_of(last_columns, "w", weight), 0.5, "row")
    assert mask[:, 5:].all() and not mask[:, :5].any()
    assert needs_of(last_columns) == frozenset() and needs_of(needy) == {"inputs"}
    s = statistics()
    torch.testing.assert_close(score_of(needy, "w", weight, s), weight * s.input_mean()[0])


def test_refusals() -> None:
    weight = torch.randn(ROWS, K)
    with pytest.raises(ConfigError, match=r"score='wandda' is unknown \(did you mean 'wanda"):
        score_of("wandda", "w", weight)
    with pytest.raises(ConfigError, match=r"score='wanda' needs statistics of weight 'up.weight' \(inputs\)"):
        score_of("wanda", "up.weight", weight)
    with pytest.raises(ConfigError, match=r"score='snip': no gradient of weight 'w' was seen in 0 calibration"):
        score_of("snip", "w", weight, WeightStatistics())
    with pytest.raises(ConfigError, match=r"returned \[3, 3\] for weight 'w'; must be \[6, 10\]"):
        score_of(lambda w, s: torch.ones(3, 3), "w", weight)
    with pytest.raises(ConfigError, match="returned float for weight 'w'"):
        score_of(lambda w, s: 1.0, "w", weight)

    def odd(w: Tensor, s: object) -> Tensor:
        return w

    odd.needs = "activations"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="needs='activations'; use inputs, gradients, squares"):
        needs_of(odd)
    broken = statistics()
    broken.input_squares[0] = torch.nan
    with pytest.raises(ConfigError, match="score of weight 'w' contains NaN"):
        select_mask(score_of("wanda", "w", weight, broken), 0.5, "row", name="w")
    assert set(saliency.SCORES) == {"magnitude", "random", "wanda", "wanda++", "gradient", "snip"}
