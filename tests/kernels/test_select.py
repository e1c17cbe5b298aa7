"""k-th largest magnitude against a sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxresu.kernels import kth_largest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _sorted(values: torch.Tensor, mask: torch.Tensor | None = None) -> list[float]:
    chosen = values if mask is None else values[mask]
    return sorted(chosen.double().abs().flatten().tolist(), reverse=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank(device, dtype: torch.dtype) -> None:
    values = torch.randn((3, 7), dtype=torch.float64).mul(10.0 ** torch.arange(-3, 4)).to(dtype).to(device)
    values[1, 2] = values[0, 0]  # a tie
    values[2, 5] = 0
    ordered = _sorted(values)
    for k in (1, 2, 5, 10, 20, 21):
        result = kth_largest(values, k)
        assert result.shape == () and result.dtype == dtype
        assert float(result) == ordered[k - 1], k


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_values_with_mask(device, dtype: torch.dtype) -> None:
    values = torch.randn(5000, dtype=torch.float64).to(dtype).to(device)
    mask = (torch.rand(5000) < 0.3).to(device)
    ordered = _sorted(values, mask)
    for k in (1, len(ordered) // 2, len(ordered)):
        assert float(kth_largest(values, k, mask)) == ordered[k - 1]


def test_ends(device) -> None:
    values = torch.tensor([1.0, -3.0, 2.0], device=device)
    assert float(kth_largest(values, 0)) == float("inf")
    assert float(kth_largest(values, 4)) == 0
    assert float(kth_largest(values, 2, torch.tensor([True, False, False], device=device))) == 0
    assert float(kth_largest(values[:0], 1)) == 0
    assert float(kth_largest(values.double(), 0)) == float("inf")
    assert float(kth_largest(values.double(), 4)) == 0


def test_k_may_live_on_the_device(device) -> None:
    values = torch.tensor([1.0, -3.0, 2.0], device=device)
    assert float(kth_largest(values, torch.tensor(2, device=device))) == 2


def test_non_finite_values_are_the_largest(device) -> None:
    values = torch.tensor([1.0, float("nan"), -float("inf"), 2.0], device=device)
    assert torch.isnan(kth_largest(values, 1))
    assert float(kth_largest(values, 2)) == float("inf")
    assert float(kth_largest(values, 3)) == 2


def test_any_strides(device) -> None:
    values = torch.randn((6, 8), device=device)
    mask = torch.rand((6, 8), device=device) < 0.5
    view, chosen = values.t()[::2], mask.t()[::2]
    assert float(kth_largest(view, 3, chosen)) == _sorted(view, chosen)[2]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.data())
def test_any_floats(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    tensor = torch.tensor(values)
    assert float(kth_largest(tensor, k)) == _sorted(tensor)[k - 1]


@pytest.mark.parametrize(
    "values, k, mask, argument",
    [
        (torch.arange(3), 1, None, "values"),
        (torch.randn(3), torch.tensor(1.0), None, "k must"),
        (torch.randn(3), torch.tensor([1]), None, "k must"),
        (torch.randn(3), 1, torch.ones(2, dtype=torch.bool), "mask"),
        (torch.randn(3), 1, torch.ones(3), "mask"),
    ],
)
def test_bad_arguments_are_named(values, k, mask, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        kth_largest(values, k, mask)


def test_opcheck(device) -> None:
    values = torch.randn(50, device=device)
    mask = values > 0
    k = torch.tensor(3, device=device)
    torch.library.opcheck(torch.ops.fxresu.kth_largest, (values, k, mask))
    torch.library.opcheck(torch.ops.fxresu.kth_largest, (values.bfloat16(), k, None))
