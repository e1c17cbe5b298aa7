"""AdamW with bfloat16 weights and 8-bit moments against torch's own in float64, and the noise that rounds them."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fxresu.kernels import AdamW, AdamWOperands, adamw_step_, adamw_steps_
from fxresu.kernels._registry import unobserved
from fxresu.kernels._triton import INTERPRET
from fxresu.kernels.adamw_rule import SPAN, load_moment, noise_reference, scale_count
from fxresu.kernels.philox import philox_reference, round_reference

RULE = AdamW(0.01, 0.9, 0.99, 1e-8, 0.1, 3, seed=5)
SIZES = [1, 255, 4096, 9000]


def operands(
    n: int, device: str, weight=torch.float32, moments=torch.float32, grad=None, seed: int = 0
) -> AdamWOperands:
    generator = torch.Generator().manual_seed(seed)
    w, g = (torch.randn(n, generator=generator) for _ in range(2))
    scales = [torch.zeros(scale_count(n), device=device) if moments == torch.uint8 else None for _ in range(2)]
    m, v = (torch.zeros(n, dtype=moments, device=device) for _ in range(2))
    return AdamWOperands(w.to(device, weight), g.to(device, grad or weight), m, v, *scales)


def values(o: AdamWOperands) -> tuple[Tensor, Tensor, Tensor]:
    """(w, m, v) in float64 on the CPU, from whatever they are stored in."""
    wide = torch.float64
    m, v = load_moment(o.m, o.m_scale, "m", wide), load_moment(o.v, o.v_scale, "v", wide)
    return o.weight.double().cpu(), m.double().cpu(), v.double().cpu()


def exact(o: AdamWOperands, rule: AdamW, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """torch's AdamW in float64, from the operands as stored."""
    w, m, v = values(o)
    parameter = torch.nn.Parameter(w)
    parameter.grad = o.grad.double().cpu() * scale
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=rule.lr,
        betas=(rule.beta1, rule.beta2),
        eps=rule.eps,
        weight_decay=rule.weight_decay,
        maximize=rule.maximize,
    )
    optimizer.state[parameter] = {"step": torch.tensor(rule.step - 1.0), "exp_avg": m, "exp_avg_sq": v}
    optimizer.step()
    return parameter.data, m, v


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("change", [{}, {"maximize": True}, {"weight_decay": 0.0}, {"eps": 1e-3}, {"step": 1}])
def test_float32_is_torch_adamw(device: str, n: int, change: dict) -> None:
    o, rule = operands(n, device), RULE._replace(**change)
    for step in range(rule.step, rule.step + 3):
        rule = rule._replace(step=step)
        expected = exact(o, rule)
        adamw_step_(o, rule)
        for got, want in zip(values(o), expected):
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)


@pytest.mark.skipif(INTERPRET, reason="the kernel computes in float32")
def test_float64_reference_is_exact() -> None:
    o = operands(1000, "cpu", torch.float64, torch.float64)
    expected = exact(o, RULE)
    adamw_step_(o, RULE)
    for got, want in zip(values(o), expected):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "weight, moments, bound",
    [
        (torch.bfloat16, torch.float32, 2**-7),
        (torch.bfloat16, torch.bfloat16, 2**-7),
        (torch.float32, torch.uint8, 0.13),
        (torch.bfloat16, torch.uint8, 0.13),
    ],
)
def test_every_form_is_within_its_rounding(device: str, weight, moments, bound: float) -> None:
    """A step of bfloat16 is 2^-7 of the value, of m's code 1/8, of v's 1/16 of the root, 1/8 of v."""
    o = operands(9000, device, weight, moments)
    for step in range(1, 4):
        rule = RULE._replace(step=step)
        expected = exact(o, rule)
        adamw_step_(o, rule)
        for i, (got, want) in enumerate(zip(values(o), expected)):
            wide = bound if i else (2**-7 if weight == torch.bfloat16 else 2e-6)
            top = want.abs().max()
            assert bool(
                ((got - want).abs() <= wide * want.abs() + 3e-5 * top * (moments == torch.uint8) * (i > 0) + 1e-7).all()
            ), (step, i)


def test_quantisation_error(device: str) -> None:
    """Root mean square error of stored moments of a Gaussian gradient, relative to their own: m 4 %, v 4 %; and no
    bias: the mean over entries is right to 0.3 %."""
    o = operands(2**16, device, torch.float32, torch.uint8)
    _, m, v = exact(o, RULE._replace(step=1))
    adamw_step_(o, RULE._replace(step=1))
    _, got_m, got_v = values(o)
    assert float((got_m - m).norm() / m.norm()) < 0.04
    assert float((got_v - v).norm() / v.norm()) < 0.04
    assert float(got_v.mean() / v.mean()) == pytest.approx(1, abs=6e-3)
    assert float((got_m - m).mean().abs()) < 3e-3 * float(m.abs().mean())


def test_small_second_moments_survive_beside_large_ones(device: str) -> None:
    """A code of v itself with a linear step would make the small ones zero, and their updates unbounded."""
    o = operands(256, device, torch.float32, torch.uint8)
    o.grad.copy_(torch.logspace(0, -4, 256))
    adamw_step_(o, RULE._replace(step=1))
    _, _, v = values(o)
    want = (1 - RULE.beta2) * o.grad.double().cpu().square()
    assert bool(((v / want).log2().abs() < 0.2).all())


def test_running_means_do_not_stand_still(device: str) -> None:
    """beta2 = 0.999 moves v by 0.1 % a step, far below half a step of 8 bits or of bfloat16."""
    for moments in (torch.uint8, torch.bfloat16):
        o = operands(2048, device, torch.float32, moments)
        o.grad.fill_(1.0)
        for step in range(1, 41):
            adamw_step_(o, AdamW(0.0, 0.9, 0.999, 1e-8, 0.0, step))
        assert float(values(o)[2].mean()) == pytest.approx(1 - 0.999**40, rel=0.03)


def test_updates_below_the_step_of_bfloat16_add_up(device: str) -> None:
    """lr = 1e-4 moves a weight of 1 by 1/40 of its rounding step; the mean over entries follows all the same."""
    o = operands(2**16, device, torch.bfloat16, torch.float32)
    o.weight.fill_(1.0)
    o.grad.fill_(1.0)
    for step in range(1, 41):
        adamw_step_(o, AdamW(1e-4, 0.9, 0.999, 1e-8, 0.0, step))
    assert float(o.weight.float().mean()) == pytest.approx(1 - 40e-4, abs=1e-4)
    assert o.weight.unique().numel() > 1


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("moments", [torch.uint8, torch.bfloat16, torch.float32])
def test_pruned_coordinates_stay_exactly_zero(device: str, weight, moments) -> None:
    o = operands(9000, device, weight, moments)
    pruned = torch.arange(9000, device=device) % 3 == 0
    for step in range(1, 6):
        o.weight.masked_fill_(pruned, 0)
        o.grad.masked_fill_(pruned, 0)
        adamw_step_(o, RULE._replace(step=step))
        assert not o.weight[pruned].any() and not o.m[pruned].any() and not o.v[pruned].any()
    assert bool(o.weight[~pruned].any())


@pytest.mark.parametrize("moments", [torch.uint8, torch.bfloat16])
def test_pieces_give_the_bits_of_the_whole(device: str, moments) -> None:
    n = 3 * SPAN + 100
    whole, pieces = (operands(n, device, torch.bfloat16, moments) for _ in range(2))
    adamw_step_(whole, RULE)
    for start in (0, SPAN, 2 * SPAN):
        end = n if start == 2 * SPAN else start + SPAN
        blocks = slice(start // 256, scale_count(end))
        scales = [None if s is None else s[blocks] for s in (pieces.m_scale, pieces.v_scale)]
        piece = AdamWOperands(*(t[start:end] for t in (pieces.weight, pieces.grad, pieces.m, pieces.v)), *scales, start)
        adamw_step_(piece, RULE)
    for name in ("weight", "m", "v", "m_scale", "v_scale"):
        a, b = getattr(whole, name), getattr(pieces, name)
        assert a is None or torch.equal(a, b), name


def test_seed_and_step_decide_the_rounding(device: str) -> None:
    def after(rule: AdamW) -> Tensor:
        o = operands(9000, device, torch.bfloat16, torch.uint8)
        adamw_step_(o, rule._replace(lr=1e-4))
        return o.weight

    assert torch.equal(after(RULE), after(RULE))
    assert not torch.equal(after(RULE), after(RULE._replace(seed=6)))


def test_gradient_scale_and_skip(device: str) -> None:
    o = operands(300, device)
    expected = exact(o, RULE, 0.25)
    adamw_step_(o, RULE, torch.tensor(0.25, device=device))
    torch.testing.assert_close(values(o)[0], expected[0], rtol=2e-6, atol=2e-7)
    before = values(o)
    adamw_step_(o, RULE, torch.tensor(math.nan, device=device))
    assert all(torch.equal(a, b) for a, b in zip(values(o), before))
    for bad in (math.nan, math.inf, -math.inf):
        adamw_step_(o, RULE, torch.tensor(0.25, device=device), torch.tensor(bad, device=device))
        assert all(torch.equal(a, b) for a, b in zip(values(o), before))
    adamw_step_(o, RULE, check=torch.tensor(3e38, device=device))
    assert not torch.equal(values(o)[0], before[0])


def test_every_update_is_a_new_version_and_an_operation_where_somebody_watches(device: str) -> None:
    o = operands(300, device)
    version = o.weight._version
    adamw_step_(o, RULE)
    assert o.weight._version > version and o.m._version > 0
    with FlopCounterMode(display=False):
        assert not unobserved(o.weight)
        adamw_step_(o, RULE)
    assert unobserved(o.weight)
    before = o.weight.clone()
    with FakeTensorMode() as mode:
        adamw_step_(AdamWOperands(*(mode.from_tensor(t) for t in (o.weight, o.grad, o.m, o.v))), RULE)
    assert torch.equal(o.weight, before)


def test_non_finite_gradient_propagates(device: str) -> None:
    o = operands(300, device, torch.bfloat16, torch.float32)
    o.grad[7] = math.inf
    adamw_step_(o, RULE)
    assert not bool(o.weight[7].isfinite()) and bool(o.weight[8:].isfinite().all())


def test_noise_is_uniform_and_differs_between_tiles() -> None:
    noise = noise_reference(4 * SPAN, RULE.key, 0, torch.device("cpu"))
    assert noise.unique().numel() > 4 * SPAN - 5
    for low in (0, 16):
        counts = torch.bincount((noise >> low & 0xFFFF) >> 12, minlength=16).float()
        expected = 4 * SPAN / 16
        assert float((counts - expected).square().sum() / expected) < 40  # chi square, 15 degrees of freedom
    known = philox_reference(0, torch.tensor([0]))  # Random123's known answers: seven rounds, zero counter and key
    assert [int(w) for w in known] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_stochastic_rounding_is_unbiased_and_keeps_what_bfloat16_holds() -> None:
    value = torch.full((2**16,), 1 + 2**-9)
    noise = noise_reference(2**16, RULE.key, 0, torch.device("cpu"))
    assert float(round_reference(value, noise).double().mean()) == pytest.approx(1 + 2**-9, abs=5e-5)
    kept = torch.tensor([0.0, -0.0, 1.5, -2.0, math.inf, -math.inf])
    assert torch.equal(round_reference(kept, noise[:6]).float(), kept)
    assert bool(round_reference(torch.tensor([math.nan]), noise[:1]).isnan())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"m": torch.zeros(3)}, "m must have"),
        ({"v": torch.zeros(8, dtype=torch.bfloat16)}, "m and v"),
        ({"grad": torch.zeros(4, 4).t()[:, :2]}, "grad must be contiguous"),
        ({"m_scale": torch.zeros(1)}, "m_scale belongs"),
        ({"offset": 7}, "offset"),
        ({"weight": torch.zeros(8, dtype=torch.int32)}, "weight.dtype"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(change: dict, message: str) -> None:
    fields = {"weight": torch.ones(8), "grad": torch.ones(8), "m": torch.zeros(8), "v": torch.zeros(8), **change}
    o = AdamWOperands(**fields)
    with pytest.raises(ValueError, match=message):
        adamw_step_(o, RULE)
    assert not o.m.any()
    with pytest.raises(ValueError, match="step"):
        adamw_step_(operands(8, "cpu"), RULE._replace(step=0))


@pytest.mark.parametrize("moments", [torch.uint8, torch.float32])
def test_opcheck(device: str, moments) -> None:
    o = operands(600, device, torch.bfloat16, moments)
    torch.library.opcheck(
        torch.ops.fxresu.adamw_step_, (o.weight, o.grad, o.m, o.v, o.m_scale, o.v_scale, None, None, 0, *RULE)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("moments", [torch.uint8, torch.bfloat16, torch.float32])
def test_gpu_kernel_is_the_reference(weight, moments) -> None:
    """The same noise and formulas: codes and weights differ at most where float32 arithmetic rounds otherwise."""
    host, device = operands(9000, "cpu", weight, moments), operands(9000, "cuda", weight, moments)
    for step in range(1, 4):
        adamw_step_(host, RULE._replace(step=step))
        adamw_step_(device, RULE._replace(step=step))
    for a, b in zip(values(host), values(device)):
        assert float((a - b).norm() / a.norm()) < (2e-2 if moments == torch.uint8 else 1e-3)


# Many weights in one launch: those of one at a time

MANY = [1, 255, 5000, 256, SPAN, 300]


def twins(device: str, weight=torch.bfloat16, moments=torch.uint8, grad=None):
    """Two equal sets of weights of many sizes, each with a rule of its own."""
    made = [[operands(n, device, weight, moments, grad, seed=i) for i, n in enumerate(MANY)] for _ in range(2)]
    rules = [RULE._replace(lr=0.01 * (i + 1), step=3 + i, seed=i, weight_decay=0.1 * (i % 2)) for i in range(len(MANY))]
    return made, rules


@pytest.mark.parametrize("weight, moments, grad", [
    (torch.bfloat16, torch.uint8, None), (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.uint8, None), (torch.bfloat16, torch.bfloat16, None), (torch.float16, torch.float32, None),
])  # fmt: skip
def test_many_are_one_at_a_time(device: str, weight, moments, grad) -> None:
    (together, alone), rules = twins(device, weight, moments, grad)
    scale = torch.tensor(0.5, device=device)
    for _ in range(2):
        adamw_steps_([(o, rule, None) for o, rule in zip(together, rules, strict=True)], scale)
        for o, rule in zip(alone, rules, strict=True):
            adamw_step_(o, rule, scale)
    for a, b in zip(together, alone, strict=True):
        if device == "cpu":
            assert all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))
        else:  # compiled apart: sums may be contracted differently, and a code may round the other way
            for x, y in zip(values(a), values(b), strict=True):
                torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-3)


def test_mixed_dtypes_offsets_and_directions(device: str) -> None:
    kinds = [(torch.bfloat16, torch.uint8), (torch.float32, torch.float32), (torch.bfloat16, torch.uint8)]
    made = [[operands(3 * SPAN, device, w, m, seed=i) for i, (w, m) in enumerate(kinds)] for _ in range(2)]
    rules = [RULE, RULE._replace(maximize=True), RULE._replace(seed=9)]
    pieces = [AdamWOperands(o.weight, o.grad, o.m, o.v, o.m_scale, o.v_scale, 5 * SPAN) for o in made[0]]
    adamw_steps_([(o, r, None) for o, r in zip(pieces, rules, strict=True)])
    for o, r in zip(made[1], rules, strict=True):
        adamw_step_(AdamWOperands(o.weight, o.grad, o.m, o.v, o.m_scale, o.v_scale, 5 * SPAN), r)
    for a, b in zip(*made, strict=True):
        for x, y in zip(values(a), values(b), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-3)


def test_a_gradient_that_is_not_finite_skips_its_own_weight_only(device: str) -> None:
    (some, _), rules = twins(device)
    before = [values(o) for o in some]
    norms = torch.tensor([1.0, math.nan, 2.0, math.inf, 3.0, -math.inf], device=device)
    versions = [o.weight._version for o in some]
    adamw_steps_(list(zip(some, rules, norms.unbind(), strict=True)))
    for o, old, norm in zip(some, before, norms.tolist(), strict=True):
        assert torch.equal(values(o)[0], old[0]) == (not math.isfinite(norm))
    assert all(o.weight._version > v for o, v in zip(some, versions, strict=True))
    before = [values(o) for o in some]
    adamw_steps_([(o, r, None) for o, r in zip(some, rules, strict=True)], torch.tensor(math.nan, device=device))
    assert all(torch.equal(values(o)[0], old[0]) for o, old in zip(some, before, strict=True))


def test_weights_at_odd_addresses(device: str) -> None:
    buffer = torch.randn(1001, device=device)
    a, b = operands(1000, device), operands(1000, device)
    odd = AdamWOperands(buffer[1:].copy_(a.weight), a.grad, a.m, a.v)
    adamw_steps_([(odd, RULE, None), (operands(10, device), RULE, None)])
    adamw_step_(b, RULE)
    torch.testing.assert_close(odd.weight, b.weight)


def test_nothing_and_empty_weights(device: str) -> None:
    adamw_steps_([])
    adamw_steps_([(operands(0, device), RULE, None), (one := operands(5, device), RULE, None)])
    assert one.m.any()


def test_bad_arguments_are_named_before_anything_changes(device: str) -> None:
    good, bad = operands(8, device), operands(8, device)
    with pytest.raises(ValueError, match="step"):
        adamw_steps_([(good, RULE, None), (bad, RULE._replace(step=0), None)])
    with pytest.raises(ValueError, match="check"):
        adamw_steps_([(good, RULE, None), (bad, RULE, torch.ones(2, device=device))])
    with pytest.raises(ValueError, match="check must be float32"):
        adamw_steps_([(good, RULE, torch.ones((), dtype=torch.float64, device=device))])
    assert not good.m.any()


def test_float64_on_a_cpu() -> None:
    if INTERPRET:
        pytest.skip("the interpreter runs the kernels, which are for float32")
    (some, others), rules = twins("cpu", torch.float64, torch.float64)
    adamw_steps_([(o, r, None) for o, r in zip(some, rules, strict=True)])
    for o, r in zip(others, rules, strict=True):
        adamw_step_(o, r)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(some, others, strict=True))
