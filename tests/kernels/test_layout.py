"""Row starts and coordinates of compact tensors."""

import pytest
import torch

from fxresu.kernels import coordinates, row_starts


def test_row_starts_follow_the_shape() -> None:
    counts = torch.tensor([2, 0, 3])
    assert row_starts(counts, (3, 4)).tolist() == [0, 4, 8]
    assert row_starts(counts, (1, 5)).tolist() == [0, 2, 2]
    assert row_starts(counts, (1, 9)).tolist() == [0, 2, 2]
    assert row_starts(counts[:1], (1, 2)).tolist() == [0]
    assert row_starts(counts[:0], (1, 2)).tolist() == []


@pytest.mark.parametrize("counts, shape", [([2, 0, 3], (3, 2)), ([2, 0, 3], (1, 4)), ([3], (1, 2))])
def test_entries_that_do_not_fit_are_refused(counts, shape) -> None:
    with pytest.raises(ValueError, match=r"holds .* have? |holds .* a row has"):
        row_starts(torch.tensor(counts), shape)


@pytest.mark.parametrize(
    "counts, shape",
    [
        (torch.tensor([1, 2]), (3, 4)),
        (torch.tensor([1, 2]), (4,)),
        (torch.tensor([1.0]), (1, 4)),
        (torch.tensor([[1]]), (1, 4)),
    ],
)
def test_bad_arguments_are_refused(counts, shape) -> None:
    with pytest.raises(ValueError, match="counts must|shape must"):
        row_starts(counts, shape)


def test_coordinates_are_the_definition(problem) -> None:
    K = problem.mask.shape[1]
    dense, slot = coordinates(*problem.layout, K, shape=problem.shape)
    assert list(zip(dense.tolist(), slot.tolist())) == [(r * K + c, s) for r, c, s in problem.entries]
    dense, slot = coordinates(problem.bits, problem.active_start, None, K, active=True)
    assert list(zip(dense.tolist(), slot.tolist())) == [(r * K + c, s) for r, c, s in problem.active_entries]
