"""Linears of few tokens give what the default linear gives."""

import pytest
import torch

import fxresu.kernels.managed  # noqa: F401  (registers the linear)
from fxresu.kernels import mm_few, pack, row_counts, row_starts
from fxresu.kernels.choose import Problem, choose


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("mode", "how"),
    [("resu", "grad_gather"), ("sparse", "grad_masked"), *((m, "few_tokens") for m in ("dense", "sparse", "resu"))],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_linear_is_the_default_one(
    device: str, mode: str, how: str, transposed: bool, flat: bool, autocast: bool
) -> None:
    torch.manual_seed(0)
    rows, K = 24, 40
    mask = torch.rand(rows, K, device=device) < 0.5
    bits, counts = pack(mask), (~mask).sum(1)
    shape = (1, int(counts.sum()) + 3) if flat else (rows, int(counts.max()) + 2)
    starts = row_starts(row_counts(bits, K, invert=True), shape)
    weight = torch.randn(rows, K, device=device) * mask
    results = []
    for name in ("mm", how):
        torch.manual_seed(1)
        w = weight.clone().requires_grad_()
        anchor = torch.zeros(1, device=device).expand(shape).detach().requires_grad_()
        x = torch.randn(2, 3, rows if transposed else K, device=device).requires_grad_()
        bias = torch.randn(K if transposed else rows, device=device).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            y = torch.ops.fxresu.linear(x, w, bias, anchor, bits, starts, None, mode, "", transposed, how=name)
        y.float().square().sum().backward()
        trained, other = (anchor, w) if mode == "resu" else (w, anchor)
        assert other.grad is None
        results.append((y.float(), x.grad, bias.grad, trained.grad))
    for wanted, got in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=2e-2 if autocast else 1e-4, atol=0.3 if autocast else 1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_frozen_weights_get_no_gradient(device: str, transposed: bool) -> None:
    weight = torch.randn(24, 40, device=device, requires_grad=True)
    x = torch.randn(5, 24 if transposed else 40, device=device, requires_grad=True)
    y = torch.ops.fxresu.linear(x, weight, None, None, None, None, None, "frozen", "", transposed, how="few_tokens")
    wanted = x @ (weight if transposed else weight.t())
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx, torch.autograd.grad(wanted, x, torch.ones_like(y))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 33, 65])
@pytest.mark.parametrize("rows, K", [(1, 1), (70, 330)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_against_float64(device: str, tokens: int, rows: int, K: int, dtype: torch.dtype) -> None:
    """The largest error is that of float32 sums, whichever order they take; the weight may lie either way round."""
    torch.manual_seed(tokens)
    x, weight = torch.randn(tokens, K, device=device).to(dtype), torch.randn(rows, K, device=device).to(dtype)
    exact = x.double() @ weight.double().t()
    bound = (2e-6 if dtype == torch.float32 else 2**-7) * K**0.5 * float(exact.abs().max().clamp(min=1))
    for form in (weight, weight.t().contiguous().t()):
        y = mm_few(x, form)
        assert y.dtype == dtype and float((y.double() - exact).abs().max()) <= bound
    for bias in torch.randn(3, rows, device=device).to(dtype), torch.randn(rows, 3, device=device).to(dtype).t():
        wanted = exact + bias[1].double()  # of stride one, and of three
        assert float((mm_few(x, weight, bias[1]).double() - wanted).abs().max()) <= bound


def test_opcheck_mm_few(device: str) -> None:
    x, weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in ((5, 40), (24, 40), (24,)))
    torch.library.opcheck(torch.ops.fxresu.mm_few.default, (x, weight, bias))
    with pytest.raises(ValueError, match="agree in K"):
        mm_few(x, weight.t())
    with pytest.raises(ValueError, match="bias must"):
        mm_few(x, weight, bias[:3])


@pytest.mark.gpu
def test_few_tokens_are_nearly_as_exact_as_the_vendors_float32() -> None:
    """Matrix units cut sums off where float32 units round them; one TF32 product would be off 1000 times more."""
    if torch.get_float32_matmul_precision() != "highest":
        pytest.skip("TF32 is allowed")
    x, weight = torch.randn(32, 4096, device="cuda"), torch.randn(4096, 4096, device="cuda")
    exact = x.double() @ weight.double().t()
    errors = [float((y.double() - exact).abs().max()) for y in (mm_few(x, weight), x @ weight.t())]
    assert errors[0] <= 8 * errors[1]


def test_conditions() -> None:
    def reasons(**changes) -> dict[str, str]:
        fields = dict(op="linear", mode="resu", rows=24, K=40, tokens=8, dtype="float32", weight_dtype="float32",
                      layout="rows")  # fmt: skip
        return dict(choose(Problem(**(fields | changes)), torch.device("cpu")).reasons)

    assert "grad_gather" not in reasons() and "mode=resu" in reasons()["grad_masked"]
    assert "panel" in reasons(layout="columns")["grad_gather"]
    assert "at most 512" in reasons(tokens=513)["grad_gather"]
