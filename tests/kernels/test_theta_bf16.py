"""θ stored in bfloat16: rounded stochastically, by the weight's key, the step and the place."""

import dataclasses

import pytest
import torch

from fxresu.kernels import Rule, ThetaOperands, theta_steps_
from fxresu.kernels.blockwise8 import scale_shape
from fxresu.kernels.philox import philox_reference
from fxresu.kernels.theta_rules import rounded, theta_step_reference

RULES = ["selective", "sgd", "momentum", "adam"]
LAYOUTS = ["row+3", "layer+5", "panel", "row panel"]
KEY = 0x123456789ABCDEF


def rule(name: str, **changes) -> Rule:
    return Rule(name, 0.05, 0.9, 0.8, 1e-8, 0.1, 3, 0.5, 0.2, 0.5)._replace(**changes)


def operands(problem, name: str, eight: bool = False, **given) -> ThetaOperands:
    moments = {}
    for moment in {"selective": "mv", "adam": "mv", "momentum": "m", "sgd": ""}[name]:
        value = problem.theta_like()
        moments[moment] = value.abs() if moment == "v" else value
        if eight:
            moments[moment] = torch.where(value != 0, 77, 0).to(torch.uint8)
            shape = scale_shape(problem.shape, *problem.mask.shape)
            moments[f"{moment}_scale"] = torch.ones(shape, device=problem.device)
    given = {"theta": problem.theta_like(torch.bfloat16), "key": KEY} | given
    grad = problem.theta_like(torch.bfloat16)
    return ThetaOperands(grad, *problem.layout, problem.mask.shape[1], **moments, **given)


def copy(o: ThetaOperands, **changes) -> ThetaOperands:
    fields = {f.name: getattr(o, f.name) for f in dataclasses.fields(o)} | changes
    return ThetaOperands(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in fields.items()})


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Steps of bfloat16 between values of one sign."""
    return (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", ["", "weight", "low"])
def test_the_kernel_is_the_reference(make, name: str, layout: str, stored: str) -> None:
    """A rounding may fall on the other side where the kernel's float32 differs in its last place; no more than that."""
    if stored and name in ("sgd", "momentum"):
        pytest.skip("the other rules' kernels write weights in the same way")
    problem = make(5, 300, 0.4, layout)
    given = {stored: problem.dense(torch.bfloat16)} if stored else {}
    o = operands(problem, name, **given)
    expected = copy(o)
    stats = theta_steps_([o], rule(name))[0]
    wanted = theta_step_reference(expected, rule(name), 1.0)
    away = ulps(o.theta, expected.theta)
    assert away.max() <= 1 and (away > 0).float().mean() < 0.01
    torch.testing.assert_close(stats, wanted, rtol=1e-3, atol=1e-3)
    if stored:
        rows, columns, slots = (list(i) for i in zip(*problem.entries))
        assert torch.equal(getattr(o, stored)[rows, columns], o.theta.flatten()[slots])
        frozen = given[stored].cpu()[problem.mask.cpu()]
        assert torch.equal(getattr(o, stored).cpu()[problem.mask.cpu()], frozen)


@pytest.mark.parametrize("name", ["selective", "momentum", "adam"])
@pytest.mark.parametrize("layout", ["row+3", "layer", "panel"])
def test_beside_moments_in_eight_bits(make, name: str, layout: str) -> None:
    problem = make(3, 1100, 0.5, layout)
    o = operands(problem, name, eight=True)
    expected = copy(o)
    theta_steps_([o], rule(name))
    theta_step_reference(expected, rule(name), 1.0)
    away = ulps(o.theta, expected.theta)
    assert (away > 1).float().mean() < 0.002 and (away > 0).float().mean() < 0.02


@pytest.mark.parametrize("layout", ["row", "layer", "panel"])
def test_many_small_updates_move_theta_as_in_float32(make, layout: str) -> None:
    """Each is an eighth of bfloat16's last bit, which rounding to nearest would lose."""
    problem = make(8, 320, 0.5, layout)
    start, change, steps = 1.0, 2.0**-11, 40
    inside = problem.theta_like() != 0
    theta = inside.to(torch.bfloat16) * start
    assert (torch.tensor(start) - change).to(torch.bfloat16) == start
    grad = inside.float()
    for step in range(1, steps + 1):
        o = ThetaOperands(grad, *problem.layout, problem.mask.shape[1], theta=theta, key=KEY)
        theta_steps_([o], rule("sgd", lr=change, weight_decay=0.0, step=step))
    moved = (start - theta.float())[inside]
    # The last bit is 2^-8 below 1: the deviation of one entry is some 40 * p (1 - p) of its square, p = 1/8.
    deviation = 2.0**-8 * (steps * 0.125 * 0.875) ** 0.5
    assert moved.mean().item() == pytest.approx(steps * change, abs=4 * deviation / moved.numel() ** 0.5)
    assert moved.std().item() == pytest.approx(deviation, rel=0.15)
    assert not theta[~inside].any()


@pytest.mark.parametrize("name", RULES)
def test_a_function_of_key_step_and_place(make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits again, however weights share launches; others for another key, and for another step."""
    problems = [make(4, 200, 0.4, seed=s) for s in (1, 1, 1)]
    first = operands(problems[0], name)
    same, other = copy(first), copy(first, key=KEY + 1)
    theta_steps_([first, other], rule(name))
    theta_steps_([same], rule(name))
    assert torch.equal(first.theta, same.theta) and not torch.equal(first.theta, other.theta)
    still = operands(problems[0], name)
    a, b = copy(still), copy(still)
    theta_steps_([a], rule(name, step=4, weight_decay=0.01))
    theta_steps_([b], rule(name, step=5, weight_decay=0.01))
    assert not torch.equal(a.theta, b.theta)
    if first.grad.is_cuda:
        tiles = copy(still)
        monkeypatch.setattr("fxresu.kernels.theta_launch.FORM", "columns")
        theta_steps_([tiles], rule(name, step=4, weight_decay=0.01))
        assert (ulps(a.theta, tiles.theta) > 0).float().mean() < 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_need_not_be_rounded_stays(make, layout: str) -> None:
    problem = make(4, 130, 0.4, layout)
    o = operands(problem, "sgd")
    before = o.theta.clone()
    theta_steps_([o], rule("sgd", lr=0.0))
    assert torch.equal(o.theta, before)


def test_the_noise_is_philox_of_key_and_step() -> None:
    places = torch.tensor([0, 5, 2**31, 2**32 - 1])
    word, *_ = philox_reference(KEY + (7 << 32), places)
    quarter = torch.full((4,), 1.0 + 2.0**-9)  # of the last bit
    assert torch.equal(rounded(quarter, places, KEY, 7) > 1, (word & 0xFFFF) >= 0xC000)


def test_opcheck(make) -> None:
    problem = make(3, 40, 0.5)
    for name in RULES:
        o = operands(problem, name)
        tensors = (None, None, o.theta, o.m, o.v, None, None, o.grad, *problem.layout)
        scalars = (40, name, 0.1, 0.9, 0.99, 1e-8, 0.1, 1, 0.5, 0.2, 0.5, 1.0, KEY)
        torch.library.opcheck(torch.ops.fxresu.theta_step_, (*tensors, *scalars))


@pytest.mark.parametrize("key", [-1, 2**63])
def test_a_key_that_does_not_fit_is_named(make, key: int) -> None:
    o = operands(make(3, 40, 0.5), "sgd")
    before = o.theta.clone()
    with pytest.raises(ValueError, match=f"key must be in .*not {key}"):
        theta_steps_([copy(o, key=key)], rule("sgd"))
    assert torch.equal(o.theta, before)
