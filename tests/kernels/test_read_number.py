"""One number on the host: as `float` gives it, and on a GPU without waiting for copies."""

from __future__ import annotations

import math

import pytest
import torch

from fxresu.kernels import read_number


@pytest.mark.parametrize("dtype", [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool,
])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("value", [0, 1, -3.75, 1e4])
def test_as_float_gives_it(device: str, dtype: torch.dtype, shape: tuple[int, ...], value: float) -> None:
    x = torch.full(shape, abs(value) % 200 if dtype is torch.uint8 else value, device=device).to(dtype)
    assert read_number(x) == float(x) and isinstance(read_number(x), float)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_not_finite(device: str, value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert str(read_number(torch.tensor(value, dtype=dtype, device=device))) == str(value)


def test_any_one_element(device: str) -> None:
    """A view in the middle of something, and a loss that has a graph."""
    x = torch.arange(9.0, device=device, requires_grad=True)
    assert read_number(x[5]) == 5 and read_number(x[3:9:7]) == 3
    assert read_number(x.sum()) == 36 and x.sum().requires_grad


class Sum(torch.Tensor):
    """Knows its number in a way of its own."""

    def detach(self) -> Sum:
        return self

    def __float__(self) -> float:
        return 7.0


def test_tensors_of_other_kinds_are_asked_themselves(device: str) -> None:
    assert read_number(torch.ones((), device=device).as_subclass(Sum)) == 7


@pytest.mark.parametrize("bad", [torch.zeros(2), torch.zeros(0), torch.zeros((), dtype=torch.complex64)])
def test_what_is_no_number(device: str, bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="use a real tensor with one element"):
        read_number(bad.to(device))


@pytest.mark.gpu
def test_copies_under_way_are_not_waited_for() -> None:
    size, side = 2**28, torch.cuda.Stream()
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    number = torch.ones((), device="cuda")
    number += 1  # kernels are loaded, which waits for everything
    assert read_number(number) == 2
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(8):  # 40 ms and more
            host.copy_(source, non_blocking=True)
    left = side.record_event()
    number += 1
    assert read_number(number) == 3 and not left.query()
    torch.cuda.synchronize()
