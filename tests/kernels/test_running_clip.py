"""running_clip against its reference, and what it promises of gradients that change together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxresu.kernels import running_clip
from fxresu.kernels.running_clip import running_clip_reference

COUNTS = [1, 7, 1024, 2500]


def factor(norms: list[float], before: list[float], max_norm: float) -> float:
    return float(running_clip(torch.tensor(norms), torch.tensor(before), max_norm))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("come", [0.0, 0.3, 1.0])
def test_reference(device, count: int, come: float) -> None:
    generator = torch.Generator().manual_seed(count)
    norms, before = (10 ** (8 * torch.rand(count, generator=generator) - 4) for _ in range(2))
    norms[torch.rand(count, generator=generator) >= come] = 0
    for last in (before, torch.zeros_like(before)):
        wanted = running_clip_reference(norms, last, 0.5)
        got = running_clip(norms.to(device), last.to(device), 0.5)
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=0)


def test_all_of_a_step_is_the_global_norm() -> None:
    norms = torch.tensor([3.0, 4.0])
    assert float(running_clip(norms, torch.tensor([9.0, 0.1]), 1.0)) == pytest.approx(1 / 5, rel=1e-5)
    assert factor([3.0, 4.0], [1.0, 1.0], 6.0) == 1.0


def test_nothing_of_it_is_the_last_one() -> None:
    assert factor([0.0, 0.0], [3.0, 4.0], 1.0) == pytest.approx(1 / 5, rel=1e-5)
    assert factor([0.0, 0.0], [0.0, 0.0], 1.0) == 1.0


def test_without_a_last_step_it_is_what_has_come() -> None:
    assert factor([2.0, 0.0], [0.0, 0.0], 1.0) == pytest.approx(1 / 2, rel=1e-5)
    # What trained before is still to come; what has come is new.
    assert factor([3.0, 0.0], [0.0, 4.0], 1.0) == pytest.approx(1 / 5, rel=1e-5)


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8), st.floats(0.01, 100), st.data())
def test_gradients_that_grow_together_are_clipped_as_if_all_were_known(before, grown, data) -> None:
    count = data.draw(st.integers(1, len(before)))
    norms = [grown * b if i < count else 0.0 for i, b in enumerate(before)]
    total = grown * sum(b * b for b in before) ** 0.5
    assert factor(norms, before, 1.0) == pytest.approx(min(1.0, 1 / (total + 1e-6)), rel=1e-4)


def test_what_is_not_finite_does_not_count(device) -> None:
    before = torch.tensor([3.0, 5.0, 4.0], device=device)
    for bad in (float("inf"), float("nan")):
        norms = torch.tensor([6.0, bad, 0.0], device=device)
        assert float(running_clip(norms, before, 1.0)) == pytest.approx(1 / 10, rel=1e-5)


def test_large_norms_do_not_overflow(device) -> None:
    norms = torch.full((3,), 1e30, device=device)
    assert float(running_clip(norms, torch.zeros_like(norms), 1e30)) == pytest.approx(3**-0.5, rel=1e-5)


@pytest.mark.parametrize(
    "norms, before, max_norm, argument",
    [
        (torch.ones(2, 2), torch.ones(2, 2), 1.0, "norms"),
        (torch.ones(2).double(), torch.ones(2), 1.0, "norms"),
        (torch.ones(2), torch.ones(3), 1.0, "before"),
        (torch.ones(4)[::2], torch.ones(2), 1.0, "norms"),
        (torch.ones(2), torch.ones(2), 0.0, "max_norm"),
    ],
)
def test_bad_arguments_are_named(norms, before, max_norm, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        running_clip(norms, before, max_norm)


def test_opcheck(device) -> None:
    norms = torch.tensor([1.0, 0.0, 2.0], device=device)
    torch.library.opcheck(torch.ops.fxresu.running_clip, (norms, norms.flip(0), 0.5))
