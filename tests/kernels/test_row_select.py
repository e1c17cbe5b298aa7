"""The largest of every row against the selection by `fxresu.topk`, bit for bit."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from fxresu import row_choice
from fxresu.amnesty import amnesty_masks
from fxresu.errors import ConfigError
from fxresu.kernels import row_select, row_share
from fxresu.kernels.row_select import MAX_COLUMNS, takes_rows
from fxresu.masks import select_mask
from fxresu.topk import INELIGIBLE, magnitude_keys, select_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Few distinct values make ties; the others are where comparisons of floats go wrong.
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1e-40, -6e-8, float("inf"), float("-inf"), 6e4])
FLOATS = TIED | st.floats(width=16, allow_nan=False)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 40))


def matrices(elements: st.SearchStrategy[float] = FLOATS) -> st.SearchStrategy[Tensor]:
    filled = SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=elements, fill=st.nothing()))
    return st.tuples(filled, st.sampled_from(DTYPES), st.sampled_from(["plain", "transposed", "every other"])).map(
        lambda x: laid_out(torch.from_numpy(x[0].copy()).to(x[1]), x[2])
    )


def laid_out(score: Tensor, how: str) -> Tensor:
    """The same values with other strides."""
    if how == "transposed":
        return score.t().contiguous().t()
    if how == "every other":
        return score.repeat_interleave(2, 1)[:, ::2]
    return score


def bools(data: st.DataObject, shape: torch.Size) -> Tensor:
    density, seed = data.draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])), data.draw(st.integers(0, 2**31))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def no_flag(device: str = "cpu") -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=device)


@given(matrices(), st.data())
def test_one_k_for_all_rows(score: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, score.shape[1]))
    flag = no_flag()
    assert row_select(score, k, flag).equal(select_rows(magnitude_keys(score), k))
    assert not flag


@given(matrices(), st.booleans(), st.sampled_from([torch.int32, torch.int64]), st.data())
def test_a_k_for_every_row_among_eligible_ones(
    score: Tensor, complement: bool, dtype: torch.dtype, data: st.DataObject
) -> None:
    eligible = bools(data, score.shape)
    share = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    k = (eligible.sum(1) * share).ceil().to(dtype)
    keys = torch.where(eligible, magnitude_keys(score), INELIGIBLE)
    found = row_select(score, k, no_flag(), ~eligible if complement else eligible, complement)
    assert found.equal(select_rows(keys, k))


def test_fewer_eligible_ones_than_k(device) -> None:
    score = torch.tensor([[0.0, 3.0, 1.0, 2.0]], device=device)
    eligible = torch.tensor([[True, False, True, False]], device=device)
    assert row_select(score, 3, no_flag(device), eligible).equal(eligible)
    assert row_select(score, 3, no_flag(device), eligible, complement=True).equal(~eligible)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 31, 33, 1000, 2048, 5001])
def test_long_rows(device, dtype: torch.dtype, columns: int) -> None:
    score = torch.randn((3, columns), dtype=torch.float64).mul(3).to(dtype).to(device)
    for k in {0, 1, columns // 2, columns}:
        assert row_select(score, k, no_flag(device)).equal(select_rows(magnitude_keys(score), k)), k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-39, 1e-7])
def test_subnormal_numbers_have_ranks(device, dtype: torch.dtype, scale: float) -> None:
    score = torch.randn((2, 300)).mul(scale).to(dtype).to(device)
    old = torch.rand((2, 300), device=device) < 0.4
    keys = magnitude_keys(score)
    assert row_select(score, 140, no_flag(device)).equal(select_rows(keys, 140))
    mask = row_share(score, 140, 30, old, None, no_flag(device))
    mine = select_rows(torch.where(old, keys, INELIGIBLE), (mask & old).sum(1))
    assert (mask & old).equal(mine)


@pytest.mark.parametrize("columns", [14336, MAX_COLUMNS, MAX_COLUMNS + 1])
def test_the_longest_rows(device, columns: int) -> None:
    score = torch.randn((2, columns)).bfloat16().to(device)
    assert takes_rows(score.device, score.dtype, columns) <= (columns <= MAX_COLUMNS)
    old = torch.rand((2, columns), device=device) < 0.4
    slots = columns // 2
    assert row_select(score, slots, no_flag(device)).equal(select_rows(magnitude_keys(score), slots))
    mask = row_share(score, slots, slots // 3, old, None, no_flag(device))
    assert mask.sum(1).tolist() == [slots, slots]


def test_nan_sets_the_flag(device) -> None:
    for dtype in DTYPES:
        score = torch.ones((3, 40), dtype=dtype, device=device)
        old = torch.zeros((3, 40), dtype=torch.bool, device=device)
        score[0, 3] = float("inf")
        flag = no_flag(device)
        row_select(score, 5, flag)
        row_share(score, 5, 2, old, None, flag)
        assert not flag
        score[1, 39] = float("nan")
        row_select(score, 5, flag, old, complement=True)
        assert flag
        flag.zero_()
        row_share(score, 5, 2, old, None, flag)
        assert flag


def test_a_role_of_its_own_for_every_coordinate(device) -> None:
    score, old = torch.ones((2, 8), device=device), torch.zeros((2, 8), dtype=torch.bool, device=device)
    other, flag = old.clone(), no_flag(device)
    old[1, 2] = True
    row_share(score, 4, 1, old, other, flag)
    assert not flag
    other[1, 2] = True
    row_share(score, 4, 1, old, other, flag)
    assert flag


def test_no_rows_and_no_columns(device) -> None:
    for shape in ((0, 5), (3, 0)):
        score = torch.ones(shape, device=device)
        assert row_select(score, 0, no_flag(device)).shape == shape


SPARSITY = st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99]) | st.floats(0.0, 0.999)
WITH_NAN = matrices(st.sampled_from([0.0, 1.0, float("nan")]))


def _result(function, *args):
    """What it returns, or the message of its error."""
    try:
        return function(*args)
    except ConfigError as error:
        return str(error)


def _same(function, *args) -> None:
    """The result by the kernels (or their references) and the one without them."""
    with mock.patch.object(row_choice, "takes_rows", lambda device, dtype, columns: dtype in DTYPES):
        fast = _result(function, *args)
    with mock.patch.object(row_choice, "takes_rows", lambda device, dtype, columns: False):
        slow = _result(function, *args)
    assert type(fast) is type(slow)
    assert fast.equal(slow) if isinstance(slow, Tensor) else fast == slow


@given(matrices() | WITH_NAN, SPARSITY)
def test_pruning_is_what_it_was(score: Tensor, sparsity: float) -> None:
    _same(select_mask, score, sparsity)


@given(
    matrices() | WITH_NAN,
    SPARSITY,
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(["all", "some", "both"]),
    st.data(),
)
def test_commits_are_what_they_were(
    score: Tensor, sparsity: float, ratio: float, kind: str, data: st.DataObject
) -> None:
    old = bools(data, score.shape)
    candidate = None if kind == "all" else bools(data, score.shape)
    if candidate is not None and kind == "some":
        candidate &= ~old

    def commit() -> Tensor:
        return amnesty_masks(
            {"w": score}, {"w": old}, None if candidate is None else {"w": candidate}, sparsity, ratio
        )["w"]

    _same(commit)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [2048, 8192, 14336, MAX_COLUMNS])
def test_nothing_waits_and_nothing_is_left_beside_the_mask(dtype: torch.dtype, columns: int) -> None:
    score = torch.randn((512, columns), device="cuda").to(dtype)
    old = torch.rand((512, columns), device="cuda") < 0.5
    flag, slots = no_flag("cuda"), columns // 2
    for choose in (
        lambda: row_select(score, slots, flag),
        lambda: row_share(score, slots, slots // 10, old, None, flag),
    ):
        expected = choose()  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            mask = choose()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.max_memory_allocated() - before <= mask.numel() + 512
        assert mask.equal(expected)
    assert row_select(score, slots, flag).equal(select_rows(magnitude_keys(score), slots))
    _same(lambda: amnesty_masks({"w": score}, {"w": old}, None, 0.5, 0.1)["w"])
    assert not flag


@pytest.mark.parametrize(
    "change, argument",
    [
        ({"score": torch.ones(2, 4, dtype=torch.float64)}, "score must"),
        ({"score": torch.ones(4)}, "score must"),
        ({"k": torch.ones(2)}, "k must"),
        ({"k": torch.ones(3, dtype=torch.int64)}, "k must"),
        ({"flag": torch.zeros(1)}, "flag must"),
        ({"eligible": torch.ones(2, 4)}, "eligible must"),
        ({"eligible": torch.ones(4, 2, dtype=torch.bool).t()}, "eligible must"),
    ],
)
def test_bad_arguments_are_named(change, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        row_select(**{"score": torch.ones(2, 4), "k": 1, "flag": no_flag()} | change)


def test_slots_that_do_not_fit_are_named() -> None:
    old = torch.ones(2, 4, dtype=torch.bool)
    for slots, wanted in ((5, 0), (2, 3), (2, -1)):
        with pytest.raises(ValueError, match="slots="):
            row_share(torch.ones(2, 4), slots, wanted, old, None, no_flag())


def test_opcheck(device) -> None:
    score = torch.randn((4, 50), device=device)
    old, k = score > 0, torch.tensor([1, 0, 3, 2], device=device)
    torch.library.opcheck(torch.ops.fxresu.row_select, (score, 3, None, None, False, no_flag(device)))
    torch.library.opcheck(torch.ops.fxresu.row_select, (score, 0, k, old, True, no_flag(device)))
    torch.library.opcheck(torch.ops.fxresu.row_share, (score, 9, 3, old, None, no_flag(device)))
