"""Transposable 2:4 masks: by brute force over all patterns, and the commit's quota against an exact search."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxresu
from fxresu import transposable
from fxresu.amnesty import amnesty_masks
from fxresu.errors import ConfigError
from fxresu.granularity import parse_granularity
from fxresu.masks import select_mask
from fxresu.model_state import managed_weights
from fxresu.transposable import commit_transposable, follows_pattern, patterns, select_transposable

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda n: (4 * n[0], 4 * n[1]))


def _valid() -> list[torch.Tensor]:
    """All 4 x 4 matrices of zeros and ones with two in each row and column, among all 2^16."""
    found = []
    for cells in itertools.product((0, 1), repeat=16):
        if sum(cells) != 8:
            continue
        block = torch.tensor(cells).view(4, 4)
        if (block.sum(0) == 2).all() and (block.sum(1) == 2).all():
            found.append(block.bool())
    return found


def _score(shape: tuple[int, int], seed: int, ties: bool) -> torch.Tensor:
    score = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return score.mul(2).round() if ties else score


def test_there_are_ninety_patterns() -> None:
    ours = {tuple(p.tolist()) for p in patterns(torch.device("cpu"))}
    assert ours == {tuple(b.flatten().tolist()) for b in _valid()}
    assert len(ours) == 90


VALID = _valid()


@given(SHAPES, st.integers(0, 2**32), st.booleans())
def test_every_block_gets_its_best_pattern(shape: tuple[int, int], seed: int, ties: bool) -> None:
    score = _score(shape, seed, ties)
    mask = select_transposable(score)
    assert follows_pattern(mask)
    for i in range(0, shape[0], 4):
        for j in range(0, shape[1], 4):
            block = score[i : i + 4, j : j + 4].double().abs()
            best = max(float(block[v].sum()) for v in VALID)
            assert float(block[mask[i : i + 4, j : j + 4]].sum()) == pytest.approx(best, rel=1e-12)


def test_select_mask_uses_it_and_a_pruned_weight_keeps_its_mask() -> None:
    weight = torch.randn(16, 24)
    mask = select_mask(weight, 0.5, "2:4")
    assert torch.equal(mask, select_transposable(weight)) and follows_pattern(mask)
    assert torch.equal(select_mask(weight * mask, 0.5, "2:4"), mask)
    assert torch.equal(select_mask(weight, 0.0, "2:4"), torch.ones(16, 24, dtype=torch.bool))
    assert not follows_pattern(torch.ones(16, 24, dtype=torch.bool))
    rows = select_mask(weight, 0.5, "2:4-rows")
    assert (rows.view(16, 6, 4).sum(-1) == 2).all() and not follows_pattern(rows)


def test_infinite_scores_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.randn(16, 16)
    score[0, 0] = float("inf")
    mask = select_transposable(score)
    assert mask[0, 0] and follows_pattern(mask)
    monkeypatch.setitem(transposable._CHUNK, "cpu", 3)
    assert torch.equal(select_transposable(score), mask)


# --- commit ----------------------------------------------------------------------------------------------------------


def _frontier(score: torch.Tensor, joins: torch.Tensor) -> dict[int, float]:
    """Best sum of |score| of a transposable mask by its number of candidates, exactly, block after block."""
    best = {0: 0.0}
    for i in range(0, score.shape[0], 4):
        for j in range(0, score.shape[1], 4):
            block, new = score[i : i + 4, j : j + 4].double().abs(), joins[i : i + 4, j : j + 4]
            own: dict[int, float] = {}
            for v in VALID:
                n = int(new[v].sum())
                own[n] = max(own.get(n, -1.0), float(block[v].sum()))
            best = {
                n: max(s + own[n - m] for m, s in best.items() if n - m in own)
                for n in range(max(best) + max(own) + 1)
                if any(n - m in own for m in best)
            }
    return best


@given(SHAPES, st.integers(0, 2**32), st.booleans(), st.floats(0, 1), st.booleans())
def test_the_commit_is_the_best_mask_with_as_many_candidates(
    shape: tuple[int, int], seed: int, ties: bool, ratio: float, from_mask: bool
) -> None:
    score = _score(shape, seed, ties)
    old = select_transposable(_score(shape, seed + 1, False)) if from_mask else _score(shape, seed + 1, False) > 0
    quota = round(ratio * score.numel() / 2)
    new = commit_transposable(score, old, None, quota)
    assert follows_pattern(new)
    frontier = _frontier(score, ~old)
    count = int((new & ~old).sum())
    assert float(score.double().abs()[new].sum()) == pytest.approx(frontier[count], rel=1e-6, abs=1e-6)
    fewest, most = min(frontier), max(frontier)
    assert count <= max(quota, fewest)
    assert count > min(quota, most) - 8


def test_a_quota_of_nothing_keeps_the_mask() -> None:
    old = select_transposable(torch.randn(16, 16))
    assert torch.equal(commit_transposable(torch.randn(16, 16), old, None, 0), old)
    assert int((commit_transposable(torch.randn(16, 16), old, None, 128) & ~old).sum()) == 128


def test_the_published_ratio_is_spent() -> None:
    old = select_transposable(torch.randn(64, 64))
    new = amnesty_masks({"w": torch.rand(64, 64)}, {"w": old}, None, 0.5, 0.1, "2:4")["w"]
    assert follows_pattern(new)
    quota = round(0.1 * 64 * 64 / 2)
    assert quota - 8 < int((new & ~old).sum()) <= quota


def test_dead_coordinates_stay_out_where_a_pattern_can_do_without() -> None:
    torch.manual_seed(0)
    old = select_transposable(torch.randn(16, 16))
    candidate = ~old
    candidate[:, :8] = False
    score = torch.rand(16, 16)
    score[:, :8][~old[:, :8]] = 100.0  # dead, and tempting
    new = commit_transposable(score, old, candidate, 30)
    assert follows_pattern(new)
    assert not (new & ~old & ~candidate).any()
    assert torch.equal(new[:, :8], old[:, :8])
    assert 22 < int((new & candidate).sum()) <= 30


# --- granularity and phases ------------------------------------------------------------------------------------------


def test_granularity_texts() -> None:
    both, rows, other = (parse_granularity(text) for text in ("2:4", "2:4-rows", "1:4"))
    assert both.transposable and not rows.transposable and not other.transposable
    assert [str(g) for g in (both, rows, other)] == ["2:4", "2:4-rows", "1:4"]
    with pytest.raises(ConfigError, match=r"'fc' has 6 rows.*2:4-rows"):
        both.check("fc", 6, 32)
    rows.check("fc", 6, 32)


def test_masks_are_transposable_through_a_cycle_of_phases() -> None:
    torch.manual_seed(0)
    model = fxresu.transform(
        torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)), granularity="2:4",
        compile=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    entries = [m.entry for m in managed_weights(model).values()]
    assert [e.pattern for e in entries] == ["", ""]
    fxresu.set_phase(model, "sparse", optimizer=optimizer)
    assert [e.pattern for e in entries] == ["2:4", "2:4"]
    assert all(follows_pattern(e.mask()) for e in entries)
    fxresu.set_phase(model, "resu", optimizer=optimizer)
    before = [e.mask() for e in entries]
    fxresu.set_phase(model, "sparse", optimizer=optimizer, amnesty=0.5)
    assert all(follows_pattern(e.mask()) for e in entries)
    assert not all(torch.equal(e.mask(), old) for e, old in zip(entries, before))
    fxresu.set_phase(model, "dense", optimizer=optimizer)
    assert [e.pattern for e in entries] == ["", ""]


def test_given_masks_and_a_sparsity_of_nothing_have_no_pattern() -> None:
    model = fxresu.transform(torch.nn.Sequential(torch.nn.Linear(16, 16)), granularity="2:4", compile=False)
    (managed,) = managed_weights(model).values()
    fxresu.prune(model, sparsity=0.0)
    assert managed.entry.pattern == ""
    fxresu.prune(model, masks={"0.weight": torch.rand(16, 16) < 0.5})
    assert managed.entry.pattern == ""
    fxresu.prune(model, masks={"0.weight": select_transposable(torch.randn(16, 16))})
    assert managed.entry.pattern == "2:4"


def _trained(how: str, phase: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
    fxresu.transform(model, granularity="2:4", kernels={"*": how})
    fxresu.set_phase(model, "sparse")
    if phase != "sparse":
        fxresu.set_phase(model, phase)
    x = torch.randn(6, 128).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    if phase == "predict":
        return [y.float()]
    y.float().square().mean().backward()
    weight = model[0].weight
    assert not weight.grad[weight == 0].any()
    return [y.float(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("phase", ["sparse", "predict"])
def test_a_phase_on_sparse_products_gives_what_it_gives_without(phase: str) -> None:
    for wanted, got in zip(_trained("mm", phase), _trained("cusparselt", phase)):
        assert (got - wanted).abs().max() <= 0.03 * wanted.abs().max()


def test_resu_is_refused_because_its_weight_is_dense() -> None:
    model = fxresu.transform(torch.nn.Sequential(torch.nn.Linear(64, 64)), granularity="2:4",
                             kernels={"*": "cusparselt"})  # fmt: skip
    fxresu.set_phase(model, "resu")
    with pytest.raises(Exception, match="mode=resu: the weight is dense"):
        model(torch.randn(2, 64))
