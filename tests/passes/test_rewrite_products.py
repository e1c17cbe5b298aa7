"""Pieces, batches, groups and convolutions of managed weights: rewritten, named, and the same numbers either way."""

import pytest
import torch
import torch.nn.functional as F
from fxresu_testing import EAGER, check_gradients, in_phase
from torch import nn

import fxresu
from fxresu.model_state import managed_weights
from fxresu.runner import runner_of

PHASES = pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
PHASES_AND_COLUMNS = pytest.mark.parametrize(
    ("phase", "candidates"), [("dense", 1.0), ("sparse", 1.0), ("resu", 1.0), ("resu", 0.5)]
)


class Form(nn.Module):
    """One weight, used as `function` says."""

    def __init__(self, function, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


def _rewrites(model: nn.Module) -> list:
    return [w for e in runner_of(model).entries.values() for r in e.graphs for w in r.rewrites]


def _left_over(model: nn.Module) -> int:
    """Markers in the last graph after the passes."""
    record = [r for e in runner_of(model).entries.values() for r in e.graphs][-1]
    return record.passes[-1].after.get("managed", 0) if record.passes else 0


def _qkv(x, w):
    q, k, v = w.chunk(3)
    return F.linear(x, q) * F.linear(x, k) + x @ v.t()


PIECES = {
    "chunk": (_qkv, (18, 16), 3),
    "split by sizes": (lambda x, w: sum(F.linear(x, p).sum(-1, True) for p in w.split([4, 6, 8])), (18, 16), 3),
    "torch.split": (lambda x, w: sum(F.linear(x, p) for p in torch.split(w, 6, dim=0)), (18, 16), 3),
    "slices": (lambda x, w: F.linear(x, w[:6]) * F.linear(x, w[6:12]) * F.linear(x, w[-6:]), (18, 16), 3),
    "narrow": (lambda x, w: F.linear(x, w.narrow(0, 2, 5)), (18, 16), 1),
    "a slice from the left": (lambda x, w: (w[3:9] @ x.mT).mT, (18, 16), 1),
    "a slice of a transpose": (lambda x, w: x @ w[3:9].t(), (18, 16), 1),
    "an expert": (lambda x, w: F.linear(x, w[1]) + F.linear(x, w[-1]), (3, 5, 16), 2),
    "experts by select": (lambda x, w: F.linear(x, w.select(0, 2)), (3, 5, 16), 1),
    "experts by unbind": (lambda x, w: sum(F.linear(x, e) for e in w.unbind(0)), (3, 5, 16), 3),
    "an expert from the right": (lambda x, w: x @ w[1], (3, 16, 5), 1),
}


@PHASES_AND_COLUMNS
@pytest.mark.parametrize("name", PIECES)
def test_pieces(name: str, phase: str, candidates: float) -> None:
    function, shape, count = PIECES[name]
    model = fxresu.transform(Form(function, *shape), include="weight", compile=EAGER, candidates=candidates)
    in_phase(model, phase)
    check_gradients(model, phase, torch.randn(2, 4, 16))
    assert [(r.weight, bool(r.reason)) for r in _rewrites(model)] == [("weight", False)] * count
    assert _left_over(model) == 0


@PHASES
def test_pieces_of_theta_over_all_rows_are_left_to_the_marker(phase: str) -> None:
    model = fxresu.transform(Form(_qkv, 18, 16), include="weight", compile=EAGER, granularity="layer")
    in_phase(model, phase)
    check_gradients(model, phase, torch.randn(2, 4, 16))
    reason = "a piece of a weight whose θ runs over all rows (granularity layer or global)"
    assert {r.reason for r in _rewrites(model)} == {reason if phase == "resu" else ""}


BATCHES = {
    "bmm": (lambda x, w: torch.bmm(x, w.mT), (3, 5, 16), "fxresu.matmul"),
    "bmm, weight as it lies": (lambda x, w: torch.bmm(x, w), (3, 16, 5), "fxresu.matmul"),
    "bmm from the left": (lambda x, w: torch.bmm(w, x.mT).mT, (3, 5, 16), "fxresu.matmul"),
    "bmm from the left, swapped": (lambda x, w: torch.bmm(w.transpose(1, 2), x.mT).mT, (3, 16, 5), "fxresu.matmul"),
    "method": (lambda x, w: x.bmm(w.transpose(-1, -2)), (3, 5, 16), "fxresu.matmul"),
    "matmul": (lambda x, w: x @ w.permute(0, 2, 1), (3, 5, 16), "fxresu.matmul"),
    "matmul of four": (lambda x, w: torch.matmul(torch.stack([x, x * 2]), w), (3, 16, 5), "fxresu.matmul"),
    "baddbmm": (lambda x, w: torch.baddbmm(x[..., :5], x, w), (3, 16, 5), "fxresu.matmul"),
    "chosen by a tensor": (lambda x, w: torch.bmm(x, w[torch.tensor([2, 2, 1])].mT), (3, 5, 16), "fxresu.matmul"),
    "one chosen by a tensor": (lambda x, w: F.linear(x, w[torch.tensor(1)]), (3, 5, 16), "fxresu.matmul"),
    "chosen, from the left": (lambda x, w: (w[torch.tensor([0, 2, 1])] @ x.mT).mT, (3, 5, 16), "fxresu.matmul"),
    "contiguous": (lambda x, w: torch.bmm(x, w.mT.contiguous()), (3, 5, 16), "fxresu.matmul"),
}  # fmt: skip


@PHASES_AND_COLUMNS
@pytest.mark.parametrize("name", BATCHES)
def test_batches(name: str, phase: str, candidates: float) -> None:
    function, shape, after = BATCHES[name]
    model = fxresu.transform(Form(function, *shape), include="weight", compile=EAGER, candidates=candidates)
    in_phase(model, phase)
    check_gradients(model, phase, torch.randn(3, 4, 16))
    assert [(r.weight, r.after, r.reason) for r in _rewrites(model)] == [("weight", after, "")]
    assert _left_over(model) == 0


LEFT_ALONE = {
    "experts in a sum": (lambda x, w: x[..., :5] + w[torch.tensor([0, 2, 1])].sum(), "sum of experts"),
    "baddbmm scaled": (lambda x, w: torch.baddbmm(x[..., :5], x, w.mT, alpha=2), "baddbmm"),
    "einsum": (lambda x, w: torch.einsum("etk,eok->eto", x, w), "einsum"),
}


@PHASES
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_with_a_reason_and_the_same_numbers(name: str, phase: str) -> None:
    function, reason = LEFT_ALONE[name]
    model = fxresu.transform(Form(function, 3, 5, 16), include="weight", compile=EAGER)
    in_phase(model, phase)
    check_gradients(model, phase, torch.randn(3, 4, 16))
    (rewrite,) = _rewrites(model)
    assert reason in rewrite.reason and rewrite.before == rewrite.after


# Rows sorted by expert

OFFSETS = torch.tensor([3, 3, 7], dtype=torch.int32)  # the second expert has no rows, and the last row no expert


def _loop(x, w):
    parts = [x[:3] @ w[0].t(), x[3:7] @ w[2].t(), x[7:] @ w[0].t() * 0]
    return torch.cat(parts)


@PHASES
def test_grouped_products_of_transformers(phase: str) -> None:
    pytest.importorskip("transformers.integrations.moe")
    grouped = torch.ops.transformers.grouped_mm_fallback

    def function(x, w):
        return grouped(x, w.mT, OFFSETS) if x.dtype == torch.float32 else _loop(x, w)  # the reference, in float64

    model = fxresu.transform(Form(function, 3, 5, 16), include="weight", compile=EAGER)
    in_phase(model, phase)
    check_gradients(model, phase, torch.randn(8, 16))
    assert [r.after for r in _rewrites(model)] == ["fxresu.grouped_linear"]


def test_grouped_product_and_its_gradients() -> None:
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    op = torch.ops.fxresu.grouped_product
    torch.library.opcheck(op.default, (x, w, OFFSETS), atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: op(a, b, OFFSETS), (x, w))
    assert not op(x, w, OFFSETS)[7:].any()
    with pytest.raises(ValueError, match="expected a matrix, a tensor of 3 dimensions"):
        op(x, w[0], OFFSETS)


def test_flops_of_grouped_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, w = torch.randn(8, 6, requires_grad=True), torch.randn(3, 6, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.ops.fxresu.grouped_product(x, w, OFFSETS).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 8 * 6 * 4


# Convolutions


class Convolution(nn.Module):
    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.conv = convolution

    def forward(self, x):
        return self.conv(x).flatten(1)


CONVOLUTIONS = {
    "1x1": lambda: nn.Conv2d(6, 8, 1),
    "3x3": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "without bias": lambda: nn.Conv2d(6, 8, 3, bias=False),
    "strided": lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0)),
    "dilated": lambda: nn.Conv2d(6, 8, 3, dilation=2, padding=2),
    "same": lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2),
    "valid": lambda: nn.Conv2d(6, 8, 3, padding="valid"),
    "reflected": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "one dimension": lambda: nn.Conv1d(6, 8, 3, padding=1),
    "three dimensions": lambda: nn.Conv3d(6, 8, 2),
}


@PHASES
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, phase: str) -> None:
    convolution = CONVOLUTIONS[name]()
    model = fxresu.transform(Convolution(convolution), include="conv.weight", compile=EAGER)
    in_phase(model, phase)
    dimensions = convolution.weight.dim() - 2
    check_gradients(model, phase, torch.randn(2, 6, *[7, 6, 3][:dimensions]))
    assert [(r.weight, r.after, r.reason) for r in _rewrites(model)] == [("conv.weight", "fxresu.convolution", "")]
    (managed,) = managed_weights(model).values()
    assert managed.entry.rows == 8 and managed.entry.k == convolution.weight[0].numel()


@PHASES
@pytest.mark.parametrize("compile", [EAGER, False], ids=["compiled", "eager"])
@pytest.mark.parametrize(
    ("make", "storage"),
    [(lambda: nn.ConvTranspose2d(6, 8, 3), "resident"), (lambda: nn.Conv2d(6, 8, 3), "packed")],
    ids=["transposed", "packed"],
)
def test_convolutions_served_by_the_marker(make, storage: str, phase: str, compile: object) -> None:
    model = fxresu.transform(Convolution(make()), include="conv.weight", compile=compile, storage=storage)
    in_phase(model, phase)
    check_gradients(model, phase, torch.randn(2, 6, 5, 4))
    if compile and (storage == "resident" or phase == "resu"):
        assert all(r.reason for r in _rewrites(model)) and _rewrites(model)


@pytest.mark.parametrize("padding", ["same"])
def test_padding_of_another_size_on_each_side_is_left_alone(padding: str) -> None:
    model = fxresu.transform(Convolution(nn.Conv2d(6, 8, 2, padding=padding)), include="conv.weight", compile=EAGER)
    check_gradients(model, "dense", torch.randn(2, 6, 5, 4))
    assert ["conv2d" in r.reason for r in _rewrites(model)] == [True]


def test_convolutions_in_the_precision_of_the_phase() -> None:
    model = fxresu.transform(Convolution(nn.Conv2d(6, 8, 3)), compile=EAGER)
    in_phase(model, "sparse")
    x = torch.randn(2, 6, 5, 4)
    want = model(x).detach()
    in_phase(model, "predict")
    got = model(x)
    assert got.dtype == torch.float32 and not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
