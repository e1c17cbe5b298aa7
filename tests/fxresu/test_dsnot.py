"""DSNoT: counts stay, errors shrink, and the swaps are the published ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxresu.dsnot import refine_mask
from fxresu.errors import ConfigError
from fxresu.granularity import parse_granularity
from fxresu.masks import select_mask
from fxresu.weight_statistics import WeightStatistics


def problem(rows: int, k: int, seed: int, side: str = "columns") -> tuple[Tensor, WeightStatistics]:
    generator = torch.Generator().manual_seed(seed)
    weight, statistics = torch.randn(rows, k, generator=generator), WeightStatistics()
    n = k if side == "columns" else rows
    x = torch.randn(64, n, generator=generator) * torch.rand(n, generator=generator) + torch.randn(
        n, generator=generator
    )
    statistics.add_inputs(x, side, 0, n)
    return weight, statistics


def error(weight: Tensor, mask: Tensor, statistics: WeightStatistics) -> Tensor:
    return ((weight * statistics.input_mean()) * ~mask).sum(1).abs()


@given(
    st.integers(1, 12), st.integers(1, 6), st.integers(0, 10_000), st.sampled_from(["row", "layer", "2:4"]),
    st.integers(1, 60), st.sampled_from([0.0, 0.01, 1.0]), st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_counts_stay_and_errors_never_grow(
    rows: int, groups: int, seed: int, granularity: str, swaps: int, threshold: float, power: float
) -> None:
    weight, statistics = problem(rows, 4 * groups, seed)
    mask = select_mask(weight, 0.5, granularity)
    grain = parse_granularity(granularity)
    new = refine_mask("w", weight, mask, statistics, grain, swaps=swaps, threshold=threshold, power=power)
    assert torch.equal(new.sum(1), mask.sum(1))
    if granularity == "2:4":
        assert new.view(-1, 4).sum(1).eq(2).all()
    before, after = error(weight, mask, statistics), error(weight, new, statistics)
    assert (after <= before + 1e-4).all()
    assert torch.equal(new[before <= threshold], mask[before <= threshold])
    assert ((new != mask).sum(1) <= 2 * swaps).all()


def reference(weight: Tensor, mask: Tensor, s: WeightStatistics, swaps: int, threshold: float, power: float) -> Tensor:
    """One row after the other, in loops."""
    mean, var, norm = s.input_mean()[0], s.input_variance()[0].clamp_min(1e-6) ** power, s.input_norm()[0]
    out = mask.clone()
    for r in range(weight.shape[0]):
        share, moved = weight[r] * mean, set()
        e = float(share[~out[r]].sum())
        for _ in range(swaps):
            sign = 1.0 if e > 0 else -1.0
            grow = [c for c in range(len(share)) if not out[r, c] and c not in moved and sign * share[c] / var[c] > 0]
            drop = [c for c in range(len(share)) if out[r, c] and c not in moved and sign * share[c] < 0]
            if abs(e) <= threshold or not grow or not drop:
                break
            g = max(grow, key=lambda c: float(sign * share[c] / var[c]))
            p = min(drop, key=lambda c: float(weight[r, c].abs() * norm[c]))
            after = e - float(share[g]) + float(share[p])
            if after * sign < 0:
                break
            out[r, g], out[r, p], e = True, False, after
            moved |= {g, p}
    return out


@pytest.mark.parametrize("seed", range(5))
def test_the_swaps_are_those_of_the_definition(seed: int) -> None:
    weight, statistics = problem(20, 24, seed)
    mask = select_mask(weight, 0.6, "row")
    want = reference(weight, mask, statistics, 8, 0.01, 1.0)
    got = refine_mask("w", weight, mask, statistics, parse_granularity("row"), swaps=8, threshold=0.01)
    assert torch.equal(got, want)
    assert not torch.equal(got, mask)


def test_outputs_along_columns() -> None:
    weight, statistics = problem(24, 20, 1, side="rows")
    mask = select_mask(weight, 0.5, "layer")
    new = refine_mask("w", weight, mask, statistics, parse_granularity("layer"))
    assert torch.equal(new.sum(0), mask.sum(0)) and not torch.equal(new, mask)
    with pytest.raises(ConfigError, match="columns of weight 'w', but granularity='row' counts along its rows"):
        refine_mask("w", weight, mask, statistics, parse_granularity("row"))


def test_it_needs_inputs() -> None:
    weight, _ = problem(4, 4, 0)
    with pytest.raises(ConfigError, match="score='dsnot': no input of a matrix product of weight 'w'"):
        refine_mask("w", weight, weight > 0, WeightStatistics(), parse_granularity("row"))
