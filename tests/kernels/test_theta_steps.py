"""Many weights in one update, 8-bit moments, and the low-precision copy of the weight."""

import contextlib
import dataclasses

import pytest
import torch

from fxresu.kernels import Rule, ThetaOperands, theta_step_, theta_steps_
from fxresu.kernels._triton import HAS_TRITON, INTERPRET, jit, launch, tl
from fxresu.kernels.blockwise8 import (
    decode_m,
    decode_reference,
    decode_v,
    encode_m,
    encode_reference,
    encode_v,
    hash_reference,
    scale_shape,
)
from fxresu.kernels.selective_kernels import apply_kernel, moments_kernel
from fxresu.kernels.selective_rows import apply_rows_kernel, moments_rows_kernel
from fxresu.kernels.theta_kernels import simple_kernel
from fxresu.kernels.theta_rows import simple_rows_kernel
from fxresu.kernels.theta_rules import theta_step_reference

RULES = ["selective", "sgd", "momentum", "adam"]


def rule(name: str, **changes) -> Rule:
    return Rule(name, 0.05, 0.9, 0.8, 1e-8, 0.1, 3, 0.5, 0.2, 0.5)._replace(**changes)


def operands(problem, name: str, eight: bool = False, **given) -> ThetaOperands:
    moments = {}
    needed = {"selective": "mv", "adam": "mv", "momentum": "m", "sgd": ""}[name]
    for moment in needed:
        value = problem.theta_like()
        moments[moment] = value.abs() if moment == "v" else value
        if eight:
            shape = scale_shape(problem.shape, *problem.mask.shape)
            moments[f"{moment}_scale"] = torch.rand(shape, device=problem.device) + 0.5
            low, high = (0, 256) if moment == "m" else (1, 256)
            codes = torch.randint(low, high, value.shape, device=problem.device, dtype=torch.uint8)
            moments[moment] = torch.where(problem.theta_like() != 0, codes, 0).to(torch.uint8)
    return ThetaOperands(problem.theta_like(), *problem.layout, problem.mask.shape[1], **moments, **given)


def copy(o: ThetaOperands) -> ThetaOperands:
    fields = {f.name: getattr(o, f.name) for f in dataclasses.fields(o)}
    return ThetaOperands(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in fields.items()})


@pytest.mark.parametrize("name", RULES)
def test_many_weights_are_the_same_as_one_at_a_time(make, name: str) -> None:
    """Weights of two shapes, interleaved: two launches, results in the order given."""
    problems = [
        make(4, 90, 0.4, seed=1),
        make(3, 70, 0.5, "layer", seed=2),
        make(4, 90, 0.4, seed=1),
        make(4, 90, 0.4, "panel", seed=4),
    ]
    together = [operands(p, name, weight=p.dense()) for p in problems]
    single = [copy(o) for o in together]
    stats = theta_steps_(together, rule(name))
    alone = torch.stack([theta_steps_([o], rule(name))[0] for o in single])
    torch.testing.assert_close(stats, alone, rtol=0, atol=0)
    for a, b in zip(together, single):
        for x, y in zip(a.written, b.written):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("layout", ["row+3", "layer+5", "panel", "row panel"])
def test_copy_in_low_precision_follows_the_weight(make, name: str, layout: str, same) -> None:
    problem = make(5, 90, 0.4, layout)
    weight = problem.dense()
    o = operands(problem, name, weight=weight, low=weight.to(torch.bfloat16))
    before = o.low.clone()
    theta_steps_([o], rule(name))
    assert same(o.low, weight.to(torch.bfloat16)) and not torch.equal(o.low, before)


@pytest.mark.parametrize("name", RULES)
def test_copy_and_master_without_the_weight(make, name: str, same) -> None:
    """What is left on the device when the full-precision weight is not: the frozen part of the copy must not move."""
    problem = make(5, 90, 0.4)
    dense = problem.dense()
    o = operands(problem, name, low=dense.to(torch.bfloat16), theta=problem.theta_like())
    reference = operands(problem, name, weight=problem.scattered(dense, o.theta), theta=o.theta.clone())
    for field in ("m", "v", "grad"):
        if getattr(o, field) is not None:
            getattr(reference, field).copy_(getattr(o, field))
    frozen = o.low[problem.mask].clone()
    theta_steps_([o], rule(name))
    theta_steps_([reference], rule(name))
    assert torch.equal(o.low[problem.mask], frozen)
    assert torch.equal(o.theta, reference.theta)
    pruned = [(r, c) for r, c, _ in problem.entries]
    rows, columns = zip(*pruned)
    assert same(o.low[rows, columns], reference.weight[rows, columns].to(torch.bfloat16))


@pytest.mark.parametrize("name", ["selective", "momentum", "adam"])
@pytest.mark.parametrize("layout", ["row+3", "layer", "panel", "row panel"])
def test_eight_bit_moments_against_their_reference(make, name: str, layout: str) -> None:
    """A rounding may fall on the other side where the kernel's float32 differs in its last place; no more than that."""
    problem = make(3, 1500, 0.5, layout)
    o = operands(problem, name, eight=True, weight=problem.dense())
    expected = copy(o)
    theta_steps_([o], rule(name))
    theta_step_reference(expected, rule(name), 1.0)
    for field in ("m", "v"):
        mine, theirs = getattr(o, field), getattr(expected, field)
        if mine is None:
            continue
        torch.testing.assert_close(getattr(o, f"{field}_scale"), getattr(expected, f"{field}_scale"), rtol=1e-5, atol=0)
        assert (mine.int() - theirs.int()).abs().max() <= 1
        assert (mine != theirs).float().mean() < 0.01
    close = torch.isclose(o.weight, expected.weight, rtol=1e-4, atol=1e-5)
    assert close.float().mean() > 0.999


@pytest.mark.parametrize("kind", ["m", "v"])
def test_codes_are_unbiased_and_fine_enough(kind: str) -> None:
    """The mean over many roundings is the value; one rounding is off by less than one part in 8 (m) or 16 (v)."""
    torch.manual_seed(0)
    values = torch.randn(64).abs() * torch.logspace(-3, 0, 64)
    values[-1] = 4.0
    if kind == "m":
        values = values * torch.where(torch.rand(64) < 0.5, -1, 1)
    block = torch.zeros(64, dtype=torch.int64)
    total = torch.zeros(64, dtype=torch.float64)
    for seed in range(2000):
        noise = hash_reference(torch.arange(64), seed * 977)
        codes, scale = encode_reference(values, block, 1, noise if kind == "m" else noise >> 13, kind)
        decoded = decode_reference(codes, scale[block], kind)
        large = values.abs() > 1e-3
        assert ((decoded - values).abs()[large] <= values.abs()[large] / (8 if kind == "m" else 16) + 1e-7).all()
        total += decoded
    torch.testing.assert_close((total / 2000).float(), values, rtol=0.02, atol=1e-4)


def test_extremes_of_codes() -> None:
    values = torch.tensor([0.0, 1e-30, 1.0, 3.0, 1e-12])
    block = torch.zeros(5, dtype=torch.int64)
    codes, scale = encode_reference(values, block, 1, torch.zeros(5, dtype=torch.int64), "v")
    assert codes.tolist()[0] == 0 and codes.tolist()[3] == 255 and codes.tolist()[1] == 1, "a positive v stays positive"
    codes, _ = encode_reference(torch.zeros(3), block[:3], 1, torch.zeros(3, dtype=torch.int64), "m")
    assert not codes.any()


@pytest.mark.skipif(INTERPRET, reason="300 steps in the interpreter")
def test_eight_bit_adam_trains_like_float32(make) -> None:
    """A running mean with beta2 = 0.999 keeps moving in 8 bits: after 300 steps theta is where float32 takes it."""
    problem = make(4, 64, 0.5)
    target = problem.theta_like()
    states = {}
    for eight in (False, True):
        torch.manual_seed(3)
        o = operands(problem, "adam", eight=eight, theta=torch.zeros_like(target))
        for field in ("m", "v"):
            getattr(o, field).zero_()
            if eight:
                getattr(o, f"{field}_scale").zero_()
        for step in range(1, 301):
            o.grad.copy_(o.theta - target + 0.3 * problem.theta_like().sign())
            theta_steps_([o], rule("adam", lr=0.02, beta2=0.999, weight_decay=0.0, step=step))
        states[eight] = float((o.theta - target).norm() / target.norm())
    assert states[False] < 0.25 and states[True] < states[False] + 0.1


@pytest.mark.parametrize("name", RULES)
def test_scale_on_the_device_multiplies(make, name: str) -> None:
    problem = make(4, 90, 0.4)
    a = operands(problem, name, weight=problem.dense())
    b = copy(a)
    theta_steps_([a], rule(name), grad_scale=0.125)
    theta_steps_([b], rule(name), grad_scale=0.5, scale=torch.tensor([0.25], device=problem.device))
    # Compiled apart: the products are the same, sums of them may be contracted differently.
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-6, atol=1e-7)


def test_views_at_odd_addresses(make) -> None:
    """A weight inside a larger buffer need not be aligned for vector accesses."""
    problem = make(4, 64, 0.5)
    buffer = torch.randn(4 * 64 + 1, device=problem.device)
    weight = buffer[1:].view(4, 64)
    o = operands(problem, "adam", weight=weight)
    expected = copy(o)
    theta_steps_([o], rule("adam"))
    theta_steps_([expected], rule("adam"))
    assert torch.equal(o.weight, expected.weight)


@pytest.mark.parametrize("change, named", [({"m_scale": None}, "m_scale"), ({"v_scale": torch.zeros(2, 2)}, "v_scale")])
def test_scales_that_do_not_fit_are_named(change, named: str) -> None:
    bits, start = torch.zeros((2, 2), dtype=torch.int32), torch.tensor([0, 40])
    zero = torch.zeros((2, 40), dtype=torch.uint8)
    given = {
        "weight": torch.ones(2, 40),
        "m": zero,
        "v": zero,
        "m_scale": torch.zeros(2, 1),
        "v_scale": torch.zeros(2, 1),
    } | change
    with pytest.raises(ValueError, match=named):
        theta_steps_([ThetaOperands(torch.ones(2, 40), bits, start, None, 40, **given)], rule("adam"))


def test_single_operation_takes_all_of_it(make) -> None:
    problem = make(4, 90, 0.4)
    a = operands(problem, "adam", eight=True, weight=problem.dense(), low=problem.dense(torch.bfloat16))
    b = copy(a)
    theta_steps_([a], rule("adam"))
    r = rule("adam")
    theta_step_(
        b.weight,
        None,
        b.m,
        b.v,
        b.grad,
        *problem.layout,
        rule="adam",
        lr=r.lr,
        betas=(r.beta1, r.beta2),
        eps=r.eps,
        weight_decay=r.weight_decay,
        step=r.step,
        low=b.low,
        m_scale=b.m_scale,
        v_scale=b.v_scale,
    )
    for x, y in zip(a.written, b.written):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["selective", "adam"])
@pytest.mark.parametrize("density, eight", [(0.4, False), (0.4, True), (0.02, True)])
def test_rows_of_several_parts_and_blocks(make, name: str, density: float, eight: bool, same) -> None:
    """Rows beyond 4096 columns are written in parts, lines beyond 1024 slots have several 8-bit scales."""
    problem = make(2, 4229, density, "row+3")
    weight = problem.dense()
    o = operands(problem, name, eight=eight, weight=weight, low=weight.to(torch.bfloat16))
    expected = copy(o)
    theta_steps_([o], rule(name))
    theta_step_reference(expected, rule(name), 1.0)
    for field in ("weight", "m", "v", "m_scale", "v_scale"):
        mine, theirs = getattr(o, field), getattr(expected, field)
        if mine is None:
            continue
        if mine.dtype == torch.uint8:
            assert (mine.int() - theirs.int()).abs().max() <= 1 and (mine != theirs).float().mean() < 0.01
        else:
            assert torch.isclose(mine, theirs, rtol=1e-4, atol=1e-5).float().mean() > 0.999
    assert torch.equal(o.weight[problem.mask], expected.weight[problem.mask])
    assert same(o.low, o.weight.to(torch.bfloat16))


@pytest.mark.parametrize("name", RULES)
def test_both_forms_of_the_kernels_agree(make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(4, 200, 0.4, "row+3")
    rows = operands(problem, name, weight=problem.dense(), theta=problem.theta_like())
    tiles = copy(rows)
    a = theta_steps_([rows], rule(name))
    monkeypatch.setattr("fxresu.kernels.theta_launch.FORM", "columns")
    b = theta_steps_([tiles], rule(name))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for x, y in zip(rows.written, tiles.written):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["selective", "momentum", "adam"])
@pytest.mark.parametrize("stored", ["weight", "weight low", "low theta", "weight low theta", "theta"])
@pytest.mark.parametrize("K", [300] if INTERPRET else [300, 5000])
def test_eight_bit_moments_beside_every_storage(make, name: str, stored: str, K: int) -> None:
    problem = make(3, K, 0.45, "row+3")
    dense = problem.dense(torch.bfloat16)
    whole = {"weight": dense.float(), "low": dense, "theta": problem.theta_like()}
    given = {field: whole[field] for field in stored.split()}
    o = operands(problem, name, eight=True, **given)
    expected = copy(o)
    stats = theta_steps_([o], rule(name))[0]
    wanted = theta_step_reference(expected, rule(name), 1.0)
    torch.testing.assert_close(stats[2:], wanted[2:].to(stats.device), rtol=1e-3, atol=1e-3)
    for field in ("m", "v"):
        mine, theirs = getattr(o, field), getattr(expected, field)
        if mine is not None:
            assert (mine.int() - theirs.int()).abs().max() <= 1 and (mine != theirs).float().mean() < 0.01
    for field in given:
        mine, theirs = getattr(o, field).float(), getattr(expected, field).float()
        tolerance = {"rtol": 2**-7, "atol": 1e-4} if field == "low" else {"rtol": 1e-4, "atol": 1e-5}
        assert torch.isclose(mine, theirs, **tolerance).float().mean() > 0.998
        if field != "theta":
            assert torch.equal(mine[problem.mask], theirs[problem.mask])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("eight", [False, True])
def test_more_candidates_than_a_line_holds_write_nothing(make, name: str, eight: bool) -> None:
    """A wrong mask, which is an error on a CPU, must not write foreign memory on a GPU, nor a row's frozen values."""
    if eight and name == "sgd":
        pytest.skip("has no moments")
    problem = make(4, 90, 0.4)
    around = torch.zeros(3, 4, 90, device=problem.device)
    given = operands(problem, name, eight=eight, weight=around[1])
    wrong = dataclasses.replace(given, bits=torch.zeros_like(problem.bits))
    with contextlib.suppress(IndexError, RuntimeError):
        theta_steps_([wrong], rule(name))
        assert not around.any()


@jit
def _codes_kernel(values, noise, m, v, decoded_m, decoded_v, N: tl.constexpr):
    at = tl.arange(0, N)
    value, bits = tl.load(values + at), tl.load(noise + at).to(tl.uint32)
    code_m, code_v = encode_m(value, 1.0, bits), encode_v(tl.abs(value), 1.0, bits)
    tl.store(m + at, code_m)
    tl.store(v + at, code_v)
    tl.store(decoded_m + at, decode_m(code_m, 1.0))
    tl.store(decoded_v + at, decode_v(code_v, 1.0))


def test_codes_of_kernels_are_the_reference_bit_for_bit(device: str) -> None:
    if device == "cpu" and not INTERPRET:
        pytest.skip("a kernel")
    n = 4096
    values = (torch.randn(n) * torch.logspace(-12, 0, n)).clamp(-1, 1)
    values[:5] = torch.tensor([1.0, -1.0, 0.0, -0.0, 2.0**-126])
    values[5:261] = decode_reference(torch.arange(256), torch.ones(1), "m")
    values[261:517] = decode_reference(torch.arange(256), torch.ones(1), "v")
    noise = hash_reference(torch.arange(n), 7)
    noise[1::7], noise[2::7] = 0, 2**32 - 1
    m, v = (torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2))
    decoded = [torch.zeros(n, device=device) for _ in range(2)]
    words = noise.to(torch.int32).to(device)
    launch(_codes_kernel, 1, m, values.to(device), words, m, v, *decoded, N=n, num_warps=4)
    block, one = torch.zeros(n, dtype=torch.int64), torch.ones(1)
    for codes, got, kind in ((m, decoded[0], "m"), (v, decoded[1], "v")):
        of = values if kind == "m" else values.abs()
        wanted, scale = encode_reference(of, block, 1, noise if kind == "m" else noise >> 13, kind)
        assert torch.equal(scale, one) and torch.equal(codes.cpu(), wanted)
        assert torch.equal(got.cpu(), decode_reference(wanted, one, kind))


@pytest.mark.skipif(INTERPRET or not HAS_TRITON, reason="nothing is compiled")
def test_kernels_are_compiled_once_for_all_steps() -> None:
    kernels = (simple_kernel, simple_rows_kernel, moments_kernel, moments_rows_kernel, apply_kernel, apply_rows_kernel)
    for kernel in kernels:
        assert [p.name for p in kernel.params if p.do_not_specialize] == ["seed"]
