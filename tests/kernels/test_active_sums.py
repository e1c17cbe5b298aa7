"""Counts and sums of active values against a loop over rows, and the standard deviation that is made of them."""

import pytest
import torch

from fxresu.candidates import active_spread, active_std, std_of
from fxresu.kernels import active_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 33, 1024, 2500])
def test_sums_of_every_row(device, dtype: torch.dtype, columns: int) -> None:
    weight = torch.randn((3, columns), dtype=torch.float64).add(0.5).to(dtype).to(device)
    mask = (torch.rand((3, columns)) < 0.6).to(device)
    weight[~mask] = float("nan")  # what is not active does not matter
    mean = torch.tensor(0.3, dtype=torch.float64, device=device)
    for about in (None, mean):
        for strided in (weight, weight.t().contiguous().t()):
            counts, sums = active_sums(strided, mask, about)
            for row in range(3):
                values = weight[row][mask[row]].double() - (0.0 if about is None else float(mean))
                expected = values.sum() if about is None else values.square().sum()
                assert counts[row].item() == mask[row].sum().item()
                assert sums[row].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)


def _std(weight: torch.Tensor, mask: torch.Tensor) -> float:
    return std_of(*active_spread(weight, mask).tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_standard_deviation(device, dtype: torch.dtype) -> None:
    weight = torch.randn((40, 70), dtype=torch.float64).mul(0.02).add(0.01).to(dtype).to(device)
    mask = (torch.rand((40, 70)) < 0.5).to(device)
    assert _std(weight, mask) == pytest.approx(active_std(weight.cpu(), mask.cpu()), rel=1e-5)
    one = torch.zeros_like(mask)
    assert _std(weight, one) == 0.0
    one[3, 4] = True
    assert _std(weight, one) == 0.0


@pytest.mark.parametrize(
    "weight, mask, mean, argument",
    [
        (torch.ones(4), torch.ones(4, dtype=torch.bool), None, "weight"),
        (torch.ones(2, 2), torch.ones(2, 2), None, "mask"),
        (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool).t(), None, "mask"),
        (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), torch.ones(1), "mean"),
    ],
)
def test_bad_arguments_are_named(weight, mask, mean, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        active_sums(weight, mask, mean)


def test_opcheck(device) -> None:
    weight = torch.randn((4, 50), device=device)
    mean = torch.zeros((), dtype=torch.float64, device=device)
    torch.library.opcheck(torch.ops.fxresu.active_sums, (weight, weight > 0, None))
    torch.library.opcheck(torch.ops.fxresu.active_sums, (weight, weight > 0, mean))
