"""The marker and the managed linears: values, gradients against float64 autograd, registration, FLOPs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxresu.kernels import pack, row_counts, row_starts
from fxresu.kernels.managed import MODES, managed

ROWS, K, TOKENS = 6, 70, 5


class Case:
    """A weight with its mask, anchor and expected gradients."""

    def __init__(self, mode: str, panel: bool = False, dtype: torch.dtype = torch.float64, share: float = 0.5) -> None:
        self.mode = mode
        self.mask = torch.rand(ROWS, K) < share
        self.weight = torch.randn(ROWS, K, dtype=dtype, requires_grad=True)
        self.x = torch.randn(TOKENS, K, dtype=dtype, requires_grad=True)
        self.bias = torch.randn(ROWS, dtype=dtype, requires_grad=True)
        self.bits = pack(self.mask)
        self.columns = torch.tensor([0, 3, 31, 32, 64, 69], dtype=torch.int32) if panel else None
        counts = row_counts(self.bits, K, invert=True)
        self.shape = (ROWS, 6) if panel else (ROWS, int(counts.max()) + 2)
        self.row_start = torch.zeros_like(counts) if panel else row_starts(counts, self.shape)
        self.anchor = torch.zeros(1, dtype=dtype).expand(self.shape).detach().requires_grad_()

    def operands(self) -> tuple:
        if self.mode == "resu":
            return self.anchor, self.bits, self.row_start, self.columns
        return None, self.bits if self.mode == "sparse" else None, None, None

    def expected(self, dense: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(gradient of the weight, gradient of the anchor) for a dense dW."""
        if self.mode == "frozen":
            return None, None
        if self.mode == "dense":
            return dense, None
        if self.mode == "sparse":
            return dense.masked_fill(~self.mask, 0), None
        theta = torch.zeros(self.shape, dtype=dense.dtype)
        for row in range(ROWS):
            if self.columns is not None:
                chosen = self.columns.long()
                theta[row] = dense[row, chosen].masked_fill(self.mask[row, chosen], 0)
            else:
                values = dense[row][~self.mask[row]]
                theta[row, : values.numel()] = values
        return None, theta


def same(actual: torch.Tensor | None, wanted: torch.Tensor | None, **tolerance: float) -> None:
    assert (actual is None) == (wanted is None)
    if wanted is not None:
        torch.testing.assert_close(actual, wanted.to(actual.dtype), **tolerance)


def dense_gradients(case: Case, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """What plain autograd gives for the same product in float64."""
    x, w, b = (t.detach().double().requires_grad_() for t in (case.x, case.weight, case.bias))
    F.linear(x, w, b).backward(grad.double())
    return {"x": x.grad, "weight": w.grad, "bias": b.grad}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("panel", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_marker_is_the_weight_with_another_gradient(mode: str, panel: bool, share: float) -> None:
    case = Case(mode, panel, share=share)
    out = torch.ops.fxresu.managed(case.weight, *case.operands(), mode, "tag")
    assert out.data_ptr() == case.weight.data_ptr()
    grad = torch.randn(ROWS, K, dtype=torch.float64)
    out.backward(grad)
    weight, anchor = case.expected(grad)
    same(case.weight.grad, weight)
    same(case.anchor.grad, anchor)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("panel", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_linear(mode: str, panel: bool, dtype: torch.dtype, tolerance: float) -> None:
    case = Case(mode, panel, dtype)
    out = torch.ops.fxresu.linear(case.x, case.weight, case.bias, *case.operands(), mode, "tag")
    grad = torch.randn_like(out)
    out.backward(grad)
    reference = dense_gradients(case, grad)
    weight, anchor = case.expected(reference["weight"])
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out, F.linear(case.x, case.weight, case.bias), **near)
    same(case.x.grad, reference["x"], **near)
    same(case.bias.grad, reference["bias"], **near)
    same(case.weight.grad, weight, **near)
    same(case.anchor.grad, anchor, **near)


def test_linear_columns_equals_linear_and_saves_only_the_panel() -> None:
    case = Case("resu", panel=True)
    grad = torch.randn(TOKENS, ROWS, dtype=torch.float64)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = torch.ops.fxresu.linear_columns(case.x, case.weight, case.bias, *case.operands(), "tag")
    out.backward(grad)
    reference = dense_gradients(case, grad)
    same(case.anchor.grad, case.expected(reference["weight"])[1])
    same(case.x.grad, reference["x"])
    same(case.bias.grad, reference["bias"])
    assert case.weight.grad is None
    assert (TOKENS, 6) in {tuple(t.shape) for t in saved}
    assert (TOKENS, K) not in {tuple(t.shape) for t in saved}


def test_transposed_linear_columns_covers_rows() -> None:
    """input @ weight, whose inputs are the weight's rows: theta is a panel of rows."""
    case = Case("resu")
    rows = torch.tensor([0, 2, 3], dtype=torch.int32)
    anchor = torch.zeros(3, K, dtype=torch.float64, requires_grad=True)
    x = torch.randn(TOKENS, ROWS, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(K, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(ROWS, dtype=torch.int64)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = torch.ops.fxresu.linear_columns(x, case.weight, bias, anchor, case.operands()[1], start, rows, "", True)
    torch.testing.assert_close(out, x @ case.weight + bias)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(anchor.grad, torch.where(case.mask, 0, x.detach().t() @ grad)[rows.long()])
    torch.testing.assert_close(x.grad, grad @ case.weight.detach().t())
    torch.testing.assert_close(bias.grad, grad.sum(0))
    assert case.weight.grad is None
    assert (TOKENS, 3) in {tuple(t.shape) for t in saved} and (TOKENS, ROWS) not in {tuple(t.shape) for t in saved}
    plain = torch.ops.fxresu.linear(x, case.weight, bias, anchor, case.operands()[1], start, rows, "resu", "", True)
    (same_theta,) = torch.autograd.grad(plain, anchor, grad)
    torch.testing.assert_close(same_theta, anchor.grad)
    torch.library.opcheck(
        torch.ops.fxresu.linear_columns.default,
        (x, case.weight, bias, anchor, case.operands()[1], start, rows, "", True),
        test_utils=("test_schema", "test_autograd_registration", "test_aot_dispatch_static"),
    )


@pytest.mark.parametrize("mode", MODES)
def test_transposed(mode: str) -> None:
    """Conv1D's layout: x @ W for W [in, out]."""
    case = Case(mode)
    x = torch.randn(TOKENS, ROWS, dtype=torch.float64)
    out = torch.ops.fxresu.linear(x, case.weight, None, *case.operands(), mode, "tag", True)
    torch.testing.assert_close(out, x @ case.weight)
    grad = torch.randn_like(out)
    if mode != "frozen":
        out.backward(grad)
    weight, anchor = case.expected(x.t() @ grad)
    same(case.weight.grad, weight)
    same(case.anchor.grad, anchor)


def test_infinite_gradient_at_a_pruned_coordinate_stays_out() -> None:
    case = Case("sparse")
    grad = torch.where(case.mask, 1.0, torch.inf).double()
    torch.ops.fxresu.managed(case.weight, *case.operands(), "sparse", "").backward(grad)
    torch.testing.assert_close(case.weight.grad, case.mask.double())


@pytest.mark.parametrize("mode", ["dense", "resu"])
def test_autocast(mode: str) -> None:
    case = Case(mode, panel=mode == "resu", dtype=torch.float32)
    op = torch.ops.fxresu.linear_columns if mode == "resu" else torch.ops.fxresu.linear
    extra = ("tag",) if mode == "resu" else (mode, "tag")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = op(case.x, case.weight, case.bias, *case.operands(), *extra)
        plain = F.linear(case.x, case.weight, case.bias)
    assert out.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(out, plain)
    out.float().sum().backward()
    holder = case.anchor if mode == "resu" else case.weight
    assert holder.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["managed", "linear", "linear_columns"])
@pytest.mark.parametrize("mode", ["dense", "sparse", "resu"])
def test_opcheck(name: str, mode: str) -> None:
    if name == "linear_columns" and mode != "resu":
        pytest.skip("only RESU has column candidates")
    case = Case(mode, panel=name == "linear_columns", dtype=torch.float32)
    tail = ("tag",) if name == "linear_columns" else (mode, "tag")
    head = (case.weight,) if name == "managed" else (case.x, case.weight, case.bias)
    # Composite operators trace through; what there is to check is that they do, with and without symbolic shapes.
    torch.library.opcheck(
        getattr(torch.ops.fxresu, name).default,
        (*head, *case.operands(), *tail),
        test_utils=("test_schema", "test_autograd_registration", "test_aot_dispatch_static"),
    )


@pytest.mark.parametrize("mode", ["dense", "sparse", "resu"])
def test_flops_are_those_of_the_products(mode: str) -> None:
    case = Case(mode)
    with FlopCounterMode(display=False) as counter:
        torch.ops.fxresu.linear(case.x, case.weight, case.bias, *case.operands(), mode, "tag").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * TOKENS * K * ROWS
    panel = Case("resu", panel=True)
    with FlopCounterMode(display=False) as counter:
        torch.ops.fxresu.linear_columns(panel.x, panel.weight, panel.bias, *panel.operands(), "tag").sum().backward()
    assert counter.get_total_flops() == 2 * TOKENS * ROWS * (2 * K + 6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, None, None, None, "spars"), "mode='spars' is unknown; use one of dense"),
        ((None, None, None, None, "sparse"), "bits=None, but mode='sparse' needs the mask"),
        ((None, pack(torch.ones(ROWS, K, dtype=torch.bool)), None, None, "resu"), "needs anchor and row_start"),
    ],
)
def test_operands_that_a_mode_lacks(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        managed(torch.randn(ROWS, K), *arguments)
