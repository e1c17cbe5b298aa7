"""The update of theta against a float64 oracle written from the formulas with plain loops and sorts."""

import math

import pytest
import torch

from fxresu.kernels import theta_step_

RULES = ["selective", "sgd", "momentum", "adam"]
SETTINGS = {"lr": 0.05, "betas": (0.9, 0.8), "eps": 1e-8, "weight_decay": 0.1, "step": 3}


def _share(p: int, fraction: float) -> int:
    return 0 if fraction == 0 else max(1, math.floor(fraction * p + 0.5))


def oracle(
    rule: str,
    values: list[float],
    m: list[float],
    v: list[float],
    raw: list[float],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    consistency: float = 0.5,
    select: float = 0.2,
    top: float = 0.5,
    grad_scale: float = 1.0,
):
    """(theta, m, v, stats) after one update of the candidates, all as Python floats."""
    p, (b1, b2) = len(values), betas
    g = [x * grad_scale for x in raw]
    c = [0.0] * p
    out = [x * (1 - lr * weight_decay) for x in values]
    chosen = set(range(p))
    if rule == "selective":
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g)]
        v = [b2 * a + (1 - b2) * abs(b) for a, b in zip(v, g)]
        c = [abs(a) / (b + eps) for a, b in zip(m, v)]
        assert all(abs(x - consistency) > 1e-5 for x in c), "the draw is ambiguous in float32: take another seed"
        size = [abs(x) for x in raw]
        order = sorted(size, reverse=True)
        k = _share(p, top)
        magnitude = {i for i in range(p) if k and size[i] >= order[k - 1]}
        pool = {i for i in magnitude if c[i] > consistency}
        k = _share(p, select)
        order = sorted((size[i] for i in pool), reverse=True)
        limit = math.inf if k == 0 else order[k - 1] if k <= len(order) else 0.0
        chosen = {i for i in pool if size[i] >= limit}
        out = [x - lr * c[i] * g[i] if i in chosen else x for i, x in enumerate(out)]
    elif rule == "sgd":
        out = [x - lr * b for x, b in zip(out, g)]
    elif rule == "momentum":
        m = [b1 * a + b for a, b in zip(m, g)]
        out = [x - lr * a for x, a in zip(out, m)]
    else:
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g)]
        v = [b2 * a + (1 - b2) * b * b for a, b in zip(v, g)]
        out = [x - lr * (a / (1 - b1**step)) / (math.sqrt(b / (1 - b2**step)) + eps) for x, a, b in zip(out, m, v)]
    stats = [len(chosen), sum(c), p, sum(abs(a - b) for a, b in zip(out, values))]
    return out, m, v, stats


def run(
    problem,
    rule: str,
    *,
    master: str,
    dtype=torch.float32,
    grad_dtype=torch.float32,
    moments=torch.float32,
    tolerance: float = 2e-6,
    **changes,
):
    """One update in every storage, compared with the oracle, element by element and padding included."""
    options = SETTINGS | changes
    weight = problem.dense(dtype) if master != "theta" else None
    theta = problem.theta_like(torch.float32) if master != "weight" else None
    m = problem.theta_like(moments)
    v = problem.theta_like(moments).abs()
    grad = problem.theta_like(grad_dtype, padding=100.0)  # padding of a gradient must not matter
    slots = [slot for _, _, slot in problem.entries]

    def at(tensor):
        return [float(tensor.flatten()[slot]) for slot in slots]

    start = at(theta) if theta is not None else [float(weight[r, c]) for r, c, _ in problem.entries]
    before = None if weight is None else weight.clone()
    expected, em, ev, stats = oracle(rule, start, at(m), at(v), at(grad), **options)
    result = theta_step_(
        weight,
        theta,
        None if rule == "sgd" else m,
        v if rule in ("selective", "adam") else None,
        grad,
        *problem.layout,
        rule=rule,
        K=problem.mask.shape[1],
        **options,
    )

    def close(actual, wanted, tol):
        assert actual == pytest.approx(wanted, rel=tol, abs=tol)

    if theta is not None:
        close(at(theta), expected, tolerance)
        outside = torch.ones(theta.numel(), dtype=torch.bool)
        outside[slots] = False
        assert not theta.flatten().cpu()[outside].any()
    if weight is not None:
        close(
            [float(weight[r, c]) for r, c, _ in problem.entries],
            expected,
            tolerance if dtype == torch.float32 else 2**-6,
        )
        rest = torch.ones(weight.shape, dtype=torch.bool)
        for r, c, _ in problem.entries:
            rest[r, c] = False
        assert torch.equal(weight.cpu()[rest], before.cpu()[rest])
        if theta is not None and dtype == torch.float32:
            assert [float(weight[r, c]) for r, c, _ in problem.entries] == at(theta)
    rough = 2**-6 if moments == torch.bfloat16 else tolerance
    if rule != "sgd":
        close(at(m), em, rough)
    if rule in ("selective", "adam"):
        close(at(v), ev, rough)
    for moment in (m, v):
        outside = torch.ones(moment.numel(), dtype=torch.bool)
        outside[slots] = False
        assert not moment.flatten().cpu()[outside].any()
    assert result.shape == (4,) and result.dtype == torch.float32
    close(result.tolist()[:3], stats[:3], max(rough, 1e-5))
    if dtype == torch.float32 or theta is not None:
        close(result.tolist()[3], stats[3], 1e-4)
    return result


@pytest.mark.parametrize("rule", RULES)
def test_every_layout(problem, rule: str) -> None:
    run(problem, rule, master="weight")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", ["row+3", "layer+5", "panel", "row panel"])
@pytest.mark.parametrize("master", ["theta", "both"])
def test_separate_master(make, rule: str, layout: str, master: str) -> None:
    run(make(4, 90, 0.4, layout), rule, master=master)


@pytest.mark.parametrize("rule", RULES)
def test_low_precision_weight_with_master(make, rule: str) -> None:
    run(make(4, 90, 0.4), rule, master="both", dtype=torch.bfloat16)


@pytest.mark.parametrize("rule", RULES)
def test_low_precision_weight_as_master(make, rule: str) -> None:
    run(make(4, 90, 0.4), rule, master="weight", dtype=torch.bfloat16)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_low_precision_gradient(make, rule: str, grad_dtype: torch.dtype) -> None:
    """Half-width gradients have ties at the thresholds."""
    run(make(4, 90, 0.4), rule, master="both", grad_dtype=grad_dtype)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_low_precision_moments(make, rule: str) -> None:
    run(make(4, 90, 0.4), rule, master="both", moments=torch.bfloat16, tolerance=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"select": 0.0},
        {"select": 1.0},
        {"top": 1.0},
        {"top": 0.05},
        {"top": 0.0},
        {"consistency": 0.0},
        {"consistency": 2.0},
        {"select": 0.01, "top": 0.01},
        {"grad_scale": 0.125},
        {"weight_decay": 0.0},
    ],
)
def test_selective_settings(make, change: dict[str, float]) -> None:
    run(make(4, 90, 0.4, "layer+5", seed=3), "selective", master="both", **change)


def test_selection_is_a_share_of_the_candidates(make) -> None:
    """With enough consistent candidates exactly select * p are stepped; padding is not counted."""
    problem = make(6, 100, 0.5, "row+3", seed=1)
    p = len(problem.entries)
    grad = problem.theta_like()
    m, v = torch.zeros(problem.shape, device=problem.device), torch.zeros(problem.shape, device=problem.device)
    weight = problem.dense()
    before = weight.clone()
    stats = theta_step_(
        weight,
        None,
        m,
        v,
        grad,
        *problem.layout,
        rule="selective",
        **(SETTINGS | {"weight_decay": 0.0, "betas": (0.9, 0.9)}),
    )
    assert stats[0] == round(0.2 * p) and stats[2] == p
    assert int((weight != before).sum()) == round(0.2 * p)


def test_tied_gradients_are_all_selected(make) -> None:
    problem = make(3, 40, 0.5)
    grad = torch.where(problem.theta_like() != 0, 1.0, 0.0)
    m, v = grad.clone(), grad.clone()
    stats = theta_step_(problem.dense(), None, m, v, grad, *problem.layout, rule="selective", **SETTINGS)
    assert stats[0] == len(problem.entries)


def test_adam_is_torch_adamw(make) -> None:
    problem = make(3, 40, 0.5)
    theta = problem.theta_like()
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for step in range(1, 5):
        grad = problem.theta_like()
        parameter.grad = grad.clone()
        optimizer.step()
        theta_step_(
            None,
            theta,
            m,
            v,
            grad,
            *problem.layout,
            rule="adam",
            lr=0.01,
            betas=(0.9, 0.99),
            eps=1e-6,
            weight_decay=0.1,
            step=step,
            K=40,
        )
    torch.testing.assert_close(theta, parameter.data, rtol=1e-5, atol=1e-6)


def test_moments_of_theta_persist_over_steps(make) -> None:
    """Ten selective steps equal ten steps of the oracle."""
    problem = make(3, 40, 0.5, "layer")
    options = SETTINGS | {"betas": (0.9, 0.9)}
    theta = problem.theta_like()
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    slots = [slot for _, _, slot in problem.entries]
    values, em, ev = theta.flatten()[slots].tolist(), [0.0] * len(slots), [0.0] * len(slots)
    for _ in range(10):
        grad = problem.theta_like()
        theta_step_(None, theta, m, v, grad, *problem.layout, rule="selective", K=40, **options)
        values, em, ev, _ = oracle("selective", values, em, ev, grad.flatten()[slots].tolist(), **options)
    assert theta.flatten()[slots].tolist() == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_non_finite_gradient_propagates(make) -> None:
    problem = make(3, 40, 0.5)
    grad = problem.theta_like()
    grad.view(-1)[problem.entries[0][2]] = float("nan")
    for rule in RULES:
        theta, m, v = problem.theta_like(), torch.zeros_like(grad), torch.zeros_like(grad)
        theta_step_(None, theta, m, v, grad, *problem.layout, rule=rule, K=40, **SETTINGS)
        assert not bool(torch.isfinite(theta if rule == "sgd" else m).all())


def test_in_place_on_a_parameter(make) -> None:
    problem = make(3, 40, 0.5)
    weight = torch.nn.Parameter(problem.dense())
    version = weight._version
    theta_step_(weight, None, None, None, problem.theta_like(), *problem.layout, rule="sgd", **SETTINGS)
    assert weight._version > version and weight.requires_grad and weight.is_leaf


@pytest.mark.parametrize(
    "change, argument",
    [
        ({"rule": "lamb"}, "rule"),
        ({"weight": None}, "K "),
        ({"m": None}, "m is required"),
        ({"v": None}, "v is required"),
        ({"step": 0}, "step"),
        ({"select": 1.5}, "select"),
        ({"top": -0.1}, "top"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"grad": torch.zeros(2, 39)}, "grad"),
        ({"theta": torch.zeros(2, 41)}, "theta"),
        ({"weight": torch.zeros(2, 65)}, "bits"),
        ({"K": 41}, "K must"),
        ({"weight": None, "K": 40}, "all None"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(change, argument: str) -> None:
    weight, m = torch.ones(2, 40), torch.zeros(2, 40)
    bits, start = torch.zeros((2, 2), dtype=torch.int32), torch.tensor([0, 40])
    arguments = {
        "weight": weight,
        "theta": None,
        "m": m,
        "v": torch.zeros(2, 40),
        "grad": torch.ones(2, 40),
        "bits": bits,
        "row_start": start,
        "columns": None,
        "rule": "adam",
        **SETTINGS,
    } | change
    if argument == "grad":
        arguments["grad"] = torch.zeros(3, 40)
    with pytest.raises(ValueError, match=argument):
        theta_step_(**arguments)
    assert bool((weight == 1).all()) and not m.any()


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(make, rule: str) -> None:
    problem = make(3, 40, 0.5)
    scalars = (40, rule, 0.1, 0.9, 0.99, 1e-8, 0.1, 1, 0.5, 0.2, 0.5, 1.0)
    both = (
        problem.dense(),
        problem.dense(torch.bfloat16),
        problem.theta_like(),
        problem.theta_like(),
        problem.theta_like().abs(),
        None,
        None,
        problem.theta_like(),
    )
    torch.library.opcheck(torch.ops.fxresu.theta_step_, (*both, *problem.layout, *scalars))
    if rule == "sgd":
        torch.library.opcheck(
            torch.ops.fxresu.theta_step_, (problem.dense(), *[None] * 6, both[-1], *problem.layout, *scalars)
        )
