"""Change of mask against plain indexing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fxresu.kernels import (
    apply_mask_,
    commit_,
    gather,
    pack,
    row_counts,
    row_starts,
    scatter_,
    transition_counts,
)


def _other(problem) -> torch.Tensor:
    return (torch.rand(problem.mask.shape, generator=torch.Generator().manual_seed(9)) < 0.6).to(problem.device)


def test_commit_without_candidates(problem) -> None:
    new, tensor = _other(problem), problem.dense()
    expected = torch.where(new, tensor, 0)
    assert commit_(tensor, problem.bits, pack(new)) is tensor
    assert torch.equal(tensor, expected)


def test_commit_with_candidates(problem) -> None:
    new, tensor = _other(problem), problem.dense()
    theta = problem.theta_like(padding=7.0)
    # A pruned coordinate outside a panel has no candidate and keeps its value when it becomes active.
    expected = torch.where(new, problem.scattered(tensor, theta), 0)
    assert torch.equal(commit_(tensor, problem.bits, pack(new), problem.row_start, problem.columns, theta), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_mask_clears_what_is_not_finite(make, dtype: torch.dtype) -> None:
    problem = make(5, 70, 0.5)
    tensor = problem.dense(dtype)
    expected = torch.where(problem.mask, tensor, 0)
    tensor[~problem.mask] = float("inf")
    watched, version = tensor.clone(), tensor._version
    assert apply_mask_(tensor, problem.bits) is tensor and tensor._version > version
    with FlopCounterMode(display=False):
        apply_mask_(watched, problem.bits)
    assert torch.equal(tensor, expected) and torch.equal(watched, expected)


def test_transition_counts(problem) -> None:
    old, new = problem.mask, _other(problem)
    expected = [int(m.sum()) for m in (old & new, new & ~old, old & ~new, old | new)]
    counts = transition_counts(problem.bits, pack(new))
    assert counts.dtype == torch.int64 and counts.tolist() == expected


@given(st.integers(1, 4), st.integers(1, 70), st.booleans(), st.integers(0, 2**32))
def test_commit_conserves(rows: int, K: int, rowwise: bool, seed: int) -> None:
    """Committing the gathered candidates of a dense matrix is masking that matrix, whatever the masks."""
    generator = torch.Generator().manual_seed(seed)
    old, new = (torch.rand((2, rows, K), generator=generator) < 0.5).unbind()
    old_bits, new_bits = pack(old), pack(new)
    counts = row_counts(old_bits, K, invert=True)
    shape = (rows, int(counts.max())) if rowwise else (1, int(counts.sum()))
    start = row_starts(counts, shape)
    effective = torch.randn((rows, K), generator=generator)
    theta = gather(effective, old_bits, start, None, shape)
    stored = apply_mask_(effective.clone(), old_bits)
    committed = commit_(stored, old_bits, new_bits, start, None, theta)
    assert torch.equal(committed, torch.where(new, effective, 0))
    resident = scatter_(apply_mask_(effective.clone(), old_bits), theta, old_bits, start, None)
    assert torch.equal(commit_(resident, old_bits, new_bits), committed)


def test_bad_arguments_are_named() -> None:
    bits = pack(torch.zeros((2, 40), dtype=torch.bool))
    short = pack(torch.zeros((2, 30), dtype=torch.bool))
    weight = torch.ones((2, 40))
    with pytest.raises(ValueError, match="new_bits"):
        commit_(weight, bits, short)
    with pytest.raises(ValueError, match="old_bits"):
        commit_(weight, short, bits)
    with pytest.raises(ValueError, match="row_start"):
        commit_(weight, bits, bits, candidates=torch.zeros(2, 40))
    with pytest.raises(ValueError, match="tensor must be contiguous"):
        apply_mask_(torch.ones(40, 2).t(), bits)
    with pytest.raises(ValueError, match="new_bits"):
        transition_counts(bits, short)
    assert bool((weight == 1).all())


def test_opcheck(make) -> None:
    problem = make(3, 40, 0.5)
    new = pack(_other(problem))
    torch.library.opcheck(
        torch.ops.fxresu.commit_, (problem.dense(), problem.bits, new, problem.row_start, None, problem.theta_like())
    )
    torch.library.opcheck(torch.ops.fxresu.commit_, (problem.dense(), problem.bits, new, None, None, None))
    torch.library.opcheck(torch.ops.fxresu.apply_mask_, (problem.dense(), problem.bits))
    torch.library.opcheck(torch.ops.fxresu.transition_counts, (problem.bits, new))
