"""Schedules: ends, shapes, the published lists, and refusals that name what is wrong."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxresu.errors import ConfigError
from fxresu.schedules import DENSIFICATION, SCHEDULES, amnesty_ratio, has_work, lr_factor, sparsity_at

SHARE = st.floats(0.0, 0.99)
INTERPOLATED = ("linear", "exponential", "cosine", "cubic")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.0, 0.2, 0.4, 0.6, 0.8]),
        ("exponential", [0.0, 0.35, 0.6, 0.75, 0.8]),
        ("cosine", [0.0, 0.8 * (1 - math.sqrt(0.5)) / 2, 0.4, 0.8 * (1 + math.sqrt(0.5)) / 2, 0.8]),
        ("cubic", [0.0, 0.8 * (1 - 0.75**3), 0.7, 0.8 * (1 - 0.25**3), 0.8]),
        ("densification", [0.7, 0.5, 0.3, 0.1, 0.0]),
    ],
)
def test_values_of_five_cycles(schedule: str, expected: list[float]) -> None:
    assert [sparsity_at(schedule, c, 5, 0.0, 0.8) for c in range(5)] == pytest.approx(expected)


@given(st.sampled_from(INTERPOLATED), st.integers(2, 40), SHARE, SHARE)
def test_goes_from_start_to_end_monotonically(schedule: str, n: int, start: float, end: float) -> None:
    values = [sparsity_at(schedule, c, n, start, end) for c in range(n)]
    assert values[0] == start
    assert values[-1] == end
    steps = [(b - a) * (1 if end >= start else -1) for a, b in zip(values, values[1:])]
    assert min(steps) >= -1e-12


@given(st.sampled_from(INTERPOLATED + ("constant",)), SHARE, SHARE)
def test_one_cycle_is_at_the_end(schedule: str, start: float, end: float) -> None:
    assert sparsity_at(schedule, 0, 1, start, end) == end


def test_densification_stays_at_its_last_step() -> None:
    assert [sparsity_at("densification", c, 8, 0.9, 0.9) for c in range(8)] == [*DENSIFICATION, 0.0, 0.0, 0.0]


def test_callable_and_sequence() -> None:
    assert [sparsity_at(lambda c, n: c / n, c, 4, 0.9, 0.9) for c in range(4)] == [0.0, 0.25, 0.5, 0.75]
    assert sparsity_at([0.1, 0.6], 1, 2, 0.0, 0.0) == 0.6


def test_first_cycle_of_the_default_schedule_has_no_work() -> None:
    assert [has_work(sparsity_at("linear", c, 3, 0.0, 0.7)) for c in range(3)] == [False, True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("liner", 0, 2, 0.0, 0.5), r"schedule='liner'.*did you mean 'linear'"),
        ((3, 0, 2, 0.0, 0.5), r"schedule=3"),
        (("linear", 2, 2, 0.0, 0.5), r"cycle=2.*0\.\.1"),
        (("linear", -1, 2, 0.0, 0.5), r"cycle=-1"),
        (("linear", 0, 0, 0.0, 0.5), r"n_cycles=0"),
        (("linear", 0, 2, 0.0, 1.0), r"end=1\.0"),
        (("linear", 0, 2, -0.1, 0.5), r"start=-0\.1"),
        (("linear", 0, 2, math.nan, 0.5), r"start=nan"),
        ((lambda c, n: 1.5, 0, 2, 0.0, 0.5), r"schedule\(0, 2\)=1\.5"),
        ((lambda c, n: "half", 0, 2, 0.0, 0.5), r"schedule\(0, 2\)='half'"),
        (([0.1, 0.2, 0.3], 0, 2, 0.0, 0.5), r"3 sparsities for 2 cycles"),
    ],
)
def test_refusals(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sparsity_at(*arguments)


def test_every_name_is_accepted() -> None:
    for name in SCHEDULES:
        assert 0.0 <= sparsity_at(name, 1, 3, 0.2, 0.6) < 1.0


def test_amnesty_ratio() -> None:
    assert [amnesty_ratio(c, 5) for c in range(5)] == pytest.approx([0.10, 0.08, 0.06, 0.04, 0.02])
    assert amnesty_ratio(0, 1) == 0.02
    assert amnesty_ratio(1, 3, 0.0, 1.0) == 0.5
    with pytest.raises(ConfigError, match=r"start=1\.2"):
        amnesty_ratio(0, 2, 1.2, 0.0)
    with pytest.raises(ConfigError, match=r"cycle=5"):
        amnesty_ratio(5, 5)


def test_factors_of_thetas_rate() -> None:
    assert [lr_factor("constant", i, 4) for i in range(5)] == [1.0] * 5
    assert [lr_factor("linear", i, 4) for i in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [lr_factor("cosine", i, 4) for i in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    assert lr_factor(lambda step, steps: step / steps, 3, 4) == 0.75
    assert lr_factor("constant", 0, 0) == lr_factor("cosine", 0, 0) == 1.0
    with pytest.raises(ConfigError, match="theta_schedule='step'; use one of constant, linear, cosine"):
        lr_factor("step", 0, 4)
    with pytest.raises(ConfigError, match=r"theta_schedule\(0, 4\)=nan"):
        lr_factor(lambda step, steps: math.nan, 0, 4)


def test_amnesty_shapes_and_callables() -> None:
    for shape in INTERPOLATED:
        values = [amnesty_ratio(c, 6, 0.3, 0.1, shape) for c in range(6)]
        assert values[0] == pytest.approx(0.3) and values[-1] == 0.1 and values == sorted(values, reverse=True)
    assert amnesty_ratio(1, 3, shape=lambda c, n: c / n) == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match="amnesty_schedule='stepped'; use one of constant, linear"):
        amnesty_ratio(0, 3, shape="stepped")
    with pytest.raises(ConfigError, match=r"amnesty_schedule\(0, 3\)=True"):
        amnesty_ratio(0, 3, shape=lambda c, n: True)
