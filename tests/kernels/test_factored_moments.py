"""Second moments as a row and a column against float64, and updates that read them."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fxresu.kernels import AdamW, AdamWOperands, adamw_step_, adamw_steps_, factored_moments_
from fxresu.kernels._registry import unobserved
from fxresu.kernels._triton import INTERPRET
from fxresu.kernels.adamw_rule import SPAN, load_moment, scale_count

RULE = AdamW(0.01, 0.9, 0.99, 1e-8, 0.1, 3, seed=5)
SHAPES = [(1, 5), (7, 300), (300, 7), (64, 1024), (130, 257)]
ALL = [(1, 5), (7, 300), (300, 7), (20, 512), (130, 257)]


def vectors(rows: int, columns: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column means and the mean of something positive."""
    v = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.1
    return v.mean(1).to(device), v.mean(0).to(device), v.mean().view(1).to(device)


def operands(
    shape: tuple[int, int], device: str, weight=torch.bfloat16, moments=torch.uint8, grad=None, seed: int = 0
) -> AdamWOperands:
    generator, n = torch.Generator().manual_seed(seed), shape[0] * shape[1]
    w, g = (torch.randn(n, generator=generator) for _ in range(2))
    m = torch.zeros(n, dtype=moments, device=device)
    scale = torch.zeros(scale_count(n), device=device) if moments == torch.uint8 else None
    own = vectors(*shape, device, seed)
    return AdamWOperands(w.to(device, weight), g.to(device, grad or weight), m, None, scale, None, 0, *own)


def step(o: AdamWOperands, rule: AdamW, scale: Tensor | None = None, check: Tensor | None = None) -> None:
    factored_moments_([(o.grad, o.row, o.col, o.mean, rule.beta2, check)], scale)
    adamw_step_(o, rule, scale, check)


def wide(o: AdamWOperands) -> dict[str, Tensor]:
    """Everything in float64 on the CPU."""
    found = {"weight": o.weight, "m": load_moment(o.m, o.m_scale, "m"), "row": o.row, "col": o.col, "mean": o.mean}
    return {name: value.detach().double().cpu().clone() for name, value in found.items()}


def exact(o: AdamWOperands, rule: AdamW, scale: float = 1.0) -> dict[str, Tensor]:
    """The same after an update by definition."""
    x, (rows, columns) = wide(o), (o.row.numel(), o.col.numel())
    g = o.grad.double().cpu().view(rows, columns) * scale * (-1 if rule.maximize else 1)
    for name, fresh in (("row", g.square().mean(1)), ("col", g.square().mean(0)), ("mean", g.square().mean())):
        x[name] = rule.beta2 * x[name] + (1 - rule.beta2) * fresh
    v = torch.outer(x["row"], x["col"]) / x["mean"]
    x["m"] = rule.beta1 * x["m"] + (1 - rule.beta1) * g.flatten()
    denominator = (v / (1 - rule.beta2**rule.step)).sqrt() + rule.eps
    x["weight"] = x["weight"] * (1 - rule.lr * rule.weight_decay)
    x["weight"] -= rule.lr / (1 - rule.beta1**rule.step) * x["m"] / denominator.flatten()
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight, grad", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("change", [{}, {"maximize": True, "eps": 1e-3, "step": 1}])
def test_updates_by_definition(device: str, shape: tuple[int, int], weight, grad, change: dict) -> None:
    o, rule = operands(shape, device, weight, torch.float32, grad), RULE._replace(**change)
    scale = torch.tensor(0.5, device=device)
    for number in range(rule.step, rule.step + 2):
        rule = rule._replace(step=number)
        expected = exact(o, rule, 0.5)
        step(o, rule, scale)
        for name, got in wide(o).items():
            torch.testing.assert_close(got, expected[name].view(got.shape), rtol=3e-6, atol=2e-7, msg=name)
    v = torch.outer(wide(o)["row"], wide(o)["col"]) / wide(o)["mean"]
    torch.testing.assert_close(v.mean(1), wide(o)["row"], rtol=1e-5, atol=0)  # the mean is that of rows and columns


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ALL)
def test_low_precision_is_within_its_rounding(device: str, shape: tuple[int, int], weight) -> None:
    """A step of bfloat16 is 2^-7 of the value, of m's code 1/8."""
    o = operands(shape, device, weight)
    for number in range(1, 3):
        rule = RULE._replace(step=number)
        expected = exact(o, rule)
        step(o, rule)
        for name, got in wide(o).items():
            share = {"m": 0.13, "weight": 2**-7 if weight == torch.bfloat16 else 3e-6}.get(name, 3e-6)
            want = expected[name].view(got.shape)
            room = share * want.abs() + (3e-5 * want.abs().max() if name == "m" else 0) + 2e-7
            assert bool(((got - want).abs() <= room).all()), name


@pytest.mark.skipif(INTERPRET, reason="the kernel computes in float32")
def test_float64_on_a_cpu() -> None:
    o = operands((7, 300), "cpu", torch.float64, torch.float64)
    expected = exact(o, RULE)
    step(o, RULE)
    torch.testing.assert_close(wide(o)["weight"], expected["weight"], rtol=1e-7, atol=1e-9)  # v is in float32


@pytest.mark.parametrize("shape", [(40, 7), (130, 300)])
@pytest.mark.parametrize("pruned", [0.5, 0.9])
def test_entries_without_a_gradient_do_not_count(device: str, shape: tuple[int, int], pruned: float) -> None:
    """Otherwise steps of pruned weights would be 1.4 to 3 times as long."""
    o, rule = operands(shape, device, torch.float32, torch.float32), RULE._replace(beta2=0.0, step=1)
    g = o.grad.view(shape)
    g[torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device) < pruned] = 0
    g[3], g[:, 2] = 0, 0
    factored_moments_([(o.grad, o.row, o.col, o.mean, rule.beta2, None)])
    square = g.double().cpu().square()
    for got, lines in ((o.row, square), (o.col, square.t()), (o.mean, square.view(1, -1))):
        want = [float(line[line != 0].mean()) if bool(line.any()) else 0.0 for line in lines]
        torch.testing.assert_close(got.double().cpu(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=0)
    assert float(o.row[3]) == float(o.col[2]) == 0.0


def test_gradients_whose_squares_are_tiny(device: str) -> None:
    """row * col would be zero in float32, and the step as long as 1 / eps allows."""
    o = operands((4, 512), device, torch.float32, torch.float32)
    for vector in (o.row, o.col, o.mean):
        vector.zero_()
    o.grad.mul_(1e-13)
    rule = RULE._replace(step=1, eps=0.0)
    expected = exact(o, rule)
    step(o, rule)
    torch.testing.assert_close(wide(o)["weight"], expected["weight"], rtol=1e-4, atol=1e-5)


def test_nothing_moves_without_a_gradient(device: str) -> None:
    o = operands((5, 300), device, torch.float32)
    for tensor in (o.row, o.col, o.mean, o.grad):
        tensor.zero_()
    before = wide(o)["weight"]
    step(o, RULE._replace(weight_decay=0.0))
    assert torch.equal(wide(o)["weight"], before)


@pytest.mark.parametrize("shape", [(7, 300), (300, 7), (20, 512)])
def test_pruned_coordinates_stay_exactly_zero(device: str, shape: tuple[int, int]) -> None:
    o = operands(shape, device)
    pruned = torch.arange(o.weight.numel(), device=device) % 3 == 0
    for number in range(1, 4):
        o.weight.masked_fill_(pruned, 0)
        o.grad.masked_fill_(pruned, 0)
        step(o, RULE._replace(step=number))
        assert not o.weight[pruned].any() and not o.m[pruned].any()
    assert bool(o.weight[~pruned].any())


@pytest.mark.parametrize("columns", [100, 300, 512, 9000])
def test_pieces_give_the_bits_of_the_whole(device: str, columns: int) -> None:
    shape = (3 * SPAN // columns + 2, columns)
    whole, other = (operands(shape, device) for _ in range(2))
    step(whole, RULE)
    factored_moments_([(other.grad, other.row, other.col, other.mean, RULE.beta2, None)])
    n = shape[0] * columns
    for start in range(0, n, SPAN):
        end = min(start + SPAN, n)
        own = (t[start:end] for t in (other.weight, other.grad, other.m))
        scale = other.m_scale[start // 256 : scale_count(end)]
        adamw_step_(AdamWOperands(*own, None, scale, None, start, other.row, other.col, other.mean), RULE)
    for name in ("weight", "m", "m_scale", "row", "col", "mean"):
        assert torch.equal(getattr(whole, name), getattr(other, name)), name


def together(some: list[AdamWOperands], rules: list[AdamW], norms=None, scale: Tensor | None = None) -> None:
    norms = norms or [None] * len(some)
    triples = list(zip(some, rules, norms, strict=True))
    factored = [(o.grad, o.row, o.col, o.mean, rule.beta2, norm) for o, rule, norm in triples if o.v is None]
    factored_moments_(factored, scale)
    adamw_steps_(triples, scale)


def rules_of(count: int) -> list[AdamW]:
    return [RULE._replace(lr=0.01 * (i + 1), step=3 + i, seed=i, beta2=0.9 + 0.01 * i) for i in range(count)]


def close(a: AdamWOperands, b: AdamWOperands, device: str) -> None:
    for name, x in wide(a).items():
        if device == "cpu":
            assert torch.equal(x, wide(b)[name]), name
        else:  # compiled apart: sums may be contracted differently, and a code may round the other way
            torch.testing.assert_close(x, wide(b)[name], rtol=0.13, atol=1e-3)


@pytest.mark.parametrize("weight, grad", [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_many_are_one_at_a_time_and_the_same_every_time(device: str, weight, grad) -> None:
    made = [[operands(s, device, weight, grad=grad, seed=i) for i, s in enumerate(ALL)] for _ in range(3)]
    rules, scale = rules_of(len(ALL)), torch.tensor(0.5, device=device)
    for _ in range(2):
        together(made[0], rules, scale=scale)
        together(made[1], rules, scale=scale)
        for o, rule in zip(made[2], rules, strict=True):
            step(o, rule, scale)
    for a, b, c in zip(*made, strict=True):
        assert all(torch.equal(x, wide(b)[name]) for name, x in wide(a).items())
        close(a, c, device)


def test_factored_and_whole_second_moments_side_by_side(device: str) -> None:
    def plain() -> AdamWOperands:
        o = operands((1, 700), device)
        v, scale = torch.zeros_like(o.m), torch.zeros_like(o.m_scale)
        return AdamWOperands(o.weight, o.grad, o.m, v, o.m_scale, scale)

    some, others = ([operands((4, 512), device), plain(), operands((300, 7), device)] for _ in range(2))
    together(some, rules_of(3))
    for o, rule in zip(others, rules_of(3), strict=True):
        step(o, rule) if o.v is None else adamw_step_(o, rule)
    close(some[0], others[0], device)
    close(some[2], others[2], device)
    torch.testing.assert_close(some[1].weight, others[1].weight, rtol=2**-7, atol=1e-3)
    assert some[1].v.any()


def test_what_is_not_finite_skips_all_of_a_matrix_and_no_other(device: str) -> None:
    some, rules = [operands(s, device, seed=i) for i, s in enumerate(ALL)], rules_of(len(ALL))
    norms = torch.tensor([1.0, math.nan, math.inf, 3.0, -math.inf], device=device)
    some[1].grad[3] = math.nan
    before, versions = [wide(o) for o in some], [o.row._version for o in some]
    together(some, rules, list(norms.unbind()))
    for o, old, norm in zip(some, before, norms.tolist(), strict=True):
        assert all(torch.equal(x, old[name]) == (not math.isfinite(norm)) for name, x in wide(o).items())
    assert all(o.row._version > version for o, version in zip(some, versions, strict=True))
    before = [wide(o) for o in some]
    together(some, rules, scale=torch.tensor(math.nan, device=device))
    step(some[0], rules[0], torch.tensor(math.nan, device=device))
    assert all(torch.equal(x, old[name]) for o, old in zip(some, before, strict=True) for name, x in wide(o).items())


def test_memory_that_nobody_has_written_is_not_read(device: str, poisoned: None) -> None:
    o = operands((130, 257), device, torch.float32, torch.float32)
    expected = exact(o, RULE)
    step(o, RULE, check=torch.ones((), device=device))
    torch.testing.assert_close(wide(o)["row"], expected["row"], rtol=3e-6, atol=0)


@pytest.mark.parametrize("change, message", [
    ({"row": None}, "row is missing"), ({"col": torch.zeros(4, dtype=torch.float64)}, "col must be a contiguous"),
    ({"mean": torch.zeros(2)}, "mean must hold one"), ({"row": torch.zeros(1)}, "row and col"),
    ({"v": torch.zeros(8)}, "row belongs"), ({"v_scale": torch.zeros(1)}, "v_scale belongs to v"),
    ({"offset": SPAN}, "at least 4104 entries"), ({"m_scale": torch.zeros(1)}, "m_scale belongs"),
])  # fmt: skip
def test_bad_operands_are_named(change: dict, message: str) -> None:
    o = operands((2, 4), "cpu", torch.float32, torch.float32)
    with pytest.raises(ValueError, match=message):
        adamw_step_(dataclasses.replace(o, **change), RULE)
    assert not o.m.any()


@pytest.mark.parametrize("change, message", [
    ({0: torch.zeros(9)}, "grad's 9 entries"), ({0: torch.zeros(4, 4).t()[:2]}, "grad must be contiguous"),
    ({1: torch.zeros(2, 1)}, "row must be"), ({2: torch.zeros(4, dtype=torch.bfloat16)}, "col must be"),
    ({3: torch.zeros(2)}, "mean must hold"), ({4: 1.0}, "beta2 must"),
    ({5: torch.ones(2)}, "check must"), ({0: torch.zeros(0), 1: torch.zeros(0)}, "at least one"),
])  # fmt: skip
def test_bad_arguments_are_named_before_anything_changes(change: dict, message: str) -> None:
    def update() -> list:
        o = operands((2, 4), "cpu", torch.float32)
        return [o.grad, o.row, o.col, o.mean, RULE.beta2, None]

    good, bad = update(), update()
    for place, value in change.items():
        bad[place] = value
    before = good[1].clone()
    with pytest.raises(ValueError, match=message):
        factored_moments_([tuple(good), tuple(bad)])
    with pytest.raises(ValueError, match="scale must"):
        factored_moments_([tuple(good)], torch.ones(2))
    assert torch.equal(good[1], before)
    factored_moments_([])


def test_an_operation_where_somebody_watches(device: str) -> None:
    o = operands((7, 300), device)
    before = wide(o)
    with FakeTensorMode() as mode:
        assert not unobserved(mode.from_tensor(o.weight))
        fakes = {f.name: getattr(o, f.name) for f in dataclasses.fields(o)}
        fake = AdamWOperands(**{n: mode.from_tensor(t) if isinstance(t, Tensor) else t for n, t in fakes.items()})
        step(fake, RULE)
    assert all(torch.equal(x, before[name]) for name, x in wide(o).items())


def test_opcheck(device: str) -> None:
    o = operands((7, 300), device)
    torch.library.opcheck(torch.ops.fxresu.factored_moments_, (o.grad, o.row, o.col, o.mean, None, None, 0.9))
    vectors_ = (o.row, o.col, o.mean)
    torch.library.opcheck(
        torch.ops.fxresu.adamw_step_,
        (o.weight, o.grad, o.m, None, o.m_scale, None, None, None, 0, *RULE, *vectors_),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
def test_gpu_kernel_is_the_reference(shape: tuple[int, int], weight) -> None:
    host, device = operands(shape, "cpu", weight), operands(shape, "cuda", weight)
    for number in range(1, 4):
        step(host, RULE._replace(step=number))
        step(device, RULE._replace(step=number))
    for name, a in wide(host).items():
        assert float((a - wide(device)[name]).norm() / a.norm()) < (2e-2 if name in ("m", "weight") else 1e-5), name


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
def test_norms_that_are_measured_on_the_way(device: str, grad) -> None:
    """The moments are those of norms that were known; what is not finite is measured, and skipped, as well."""
    shapes = [(130, 300), (7, 5), (1, 1), (300, 7), (513, 1025)]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(s, generator=generator).to(device, grad) for s in shapes]
    grads[1][3, 2], grads[3][0, 0] = torch.inf, torch.nan
    checks = [torch.full((), 7.0, device=device) for _ in shapes]
    known = [torch.linalg.vector_norm(g.double()).float() for g in grads]
    one, other = ([vectors(*s, device, seed=i) for i, s in enumerate(shapes)] for _ in range(2))
    factored_moments_([(g, *v, 0.9, c) for g, v, c in zip(grads, one, checks, strict=True)], measure=True)
    factored_moments_([(g, *v, 0.9, c) for g, v, c in zip(grads, other, known, strict=True)])
    torch.testing.assert_close(torch.stack(checks), torch.stack(known), equal_nan=True, rtol=1e-4, atol=0)
    assert all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    watched = [vectors(*s, device, seed=i) for i, s in enumerate(shapes)]
    again = [torch.full((), 7.0, device=device) for _ in shapes]
    with FlopCounterMode(display=False):
        factored_moments_([(g, *v, 0.9, c) for g, v, c in zip(grads, watched, again, strict=True)], measure=True)
    torch.testing.assert_close(torch.stack(again), torch.stack(known), equal_nan=True, rtol=1e-4, atol=0)
    for x, y in zip(watched, other, strict=True):
        torch.testing.assert_close(x, y)
    for bad in ({"scale": torch.ones((), device=device)}, {}):
        with pytest.raises(ValueError, match="measure=True writes a norm into every check"):
            factored_moments_([(grads[0], *one[0], 0.9, checks[0] if bad else None)], **bad, measure=True)
