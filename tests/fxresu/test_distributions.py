"""Layer distributions: totals, shapes, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxresu
from fxresu import CycleConfig
from fxresu.distributions import layer_sparsities
from fxresu.errors import ConfigError

SHAPES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8)


@given(SHAPES, st.floats(0.0, 0.99))
def test_erk_keeps_the_total_and_orders_densities_by_shape(sizes: list[tuple[int, int]], sparsity: float) -> None:
    shapes = {str(i): s for i, s in enumerate(sizes)}
    found = layer_sparsities(shapes, sparsity, "erk")
    total = sum(r * k for r, k in sizes)
    assert sum(found[n] * r * k for n, (r, k) in shapes.items()) == pytest.approx(sparsity * total, abs=1e-6 * total)
    assert all(0.0 <= s < 1.0 for s in found.values())
    raw = {n: (r + k) / (r * k) for n, (r, k) in shapes.items()}
    sparse = [n for n in shapes if found[n] > 1e-9]
    for a, b in zip(sparse, sparse[1:]):
        assert (1 - found[a]) * raw[b] == pytest.approx((1 - found[b]) * raw[a], rel=1e-6)
    for dense in set(shapes) - set(sparse):
        assert all(raw[dense] >= raw[n] * (1 - 1e-9) for n in sparse)


def test_erk_of_two_layers_by_hand() -> None:
    # Densities in proportion to (8 + 8) / 64 = 1/4 and (8 + 56) / 448 = 1/7, and 64 d1 + 448 d2 = (1 - s) * 512.
    shapes = {"a": (8, 8), "b": (8, 56)}
    assert layer_sparsities(shapes, 0.5, "erk") == pytest.approx({"a": 1 - 3.2 / 4, "b": 1 - 3.2 / 7})
    # At s = 0.25 the first would have a density of 4.8 / 4: it is dense, and the second has the other 384 - 64.
    assert layer_sparsities(shapes, 0.25, "erk") == pytest.approx({"a": 0.0, "b": 1 - 320 / 448})


def by_name(shapes: dict[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
    return {name: 0.25 if name.endswith("up.weight") else sparsity for name in shapes}


@pytest.mark.parametrize("granularity", ["row", "layer", "block:2x2"])
def test_masks_follow_the_distribution_through_a_commit(granularity: str) -> None:
    from fxresu_cycles import make, run

    for distribution in ("erk", by_name):
        cycle = make(granularity=granularity, distribution=distribution, sparsity_start=0.6, sparsity_end=0.6, cycles=2)
        run(cycle)
        shapes = {n: (m.entry.rows, m.entry.k) for n, m in fxresu.model_state.managed_weights(cycle.model).items()}
        want = layer_sparsities(shapes, 0.6, distribution)
        got = cycle.summaries[-1].layer_sparsity
        assert got == pytest.approx(want, abs=0.02)
        for managed in fxresu.model_state.managed_weights(cycle.model).values():
            assert managed.parameter[~managed.entry.mask()].eq(0).all()


def test_a_dense_layer_among_sparse_ones_goes_through_resu() -> None:
    from fxresu_cycles import make, run

    def first_dense(shapes: dict, sparsity: float) -> dict[str, float]:
        return {n: 0.0 if n == "up.0.weight" else sparsity for n in shapes}

    for options in ({}, {"rule": "adam", "granularity": "layer"}, {"candidates": 0.5}):
        cycle = make(distribution=first_dense, cycles=1, schedule="constant", sparsity_end=0.5, **options)
        run(cycle)
        assert cycle.summaries[-1].layer_sparsity["up.0.weight"] == 0.0
        assert cycle.summaries[-1].theta_updates == 12


def test_refusals() -> None:
    shapes = {"a": (4, 4)}
    with pytest.raises(ConfigError, match="distribution='erdos'; use one of uniform, erk"):
        layer_sparsities(shapes, 0.5, "erdos")
    with pytest.raises(ConfigError, match="returned float; it must return a mapping"):
        layer_sparsities(shapes, 0.5, lambda s, x: 0.5)
    with pytest.raises(ConfigError, match="returned None for 'a'"):
        layer_sparsities(shapes, 0.5, lambda s, x: {})
    with pytest.raises(ConfigError, match=r"returned 1\.5 for 'a'"):
        layer_sparsities(shapes, 0.5, lambda s, x: {"a": 1.5})
    with pytest.raises(ConfigError, match="granularity='2:4' fixes every layer's sparsity"):
        CycleConfig(granularity="2:4", schedule="constant", sparsity_end=0.5, distribution="erk")
    model = fxresu.transform(torch.nn.Sequential(torch.nn.Linear(8, 8)), granularity="global", compile=False)
    with pytest.raises(ConfigError, match="distribution='erk': granularity='global' leaves no sparsity"):
        fxresu.prune(model, distribution="erk")
