"""Linears of few tokens give what the default linear gives."""

import pytest
import torch

from fxresu.kernels import pack, row_counts, row_starts
from fxresu.kernels.choose import Problem, choose


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("mode", "how"), [("resu", "grad_gather"), ("sparse", "grad_masked")])
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


def test_conditions() -> None:
    def reasons(**changes) -> dict[str, str]:
        fields = dict(op="linear", mode="resu", rows=24, K=40, tokens=8, dtype="float32", weight_dtype="float32",
                      layout="rows")  # fmt: skip
        return dict(choose(Problem(**(fields | changes)), torch.device("cpu")).reasons)

    assert "grad_gather" not in reasons() and "mode=resu" in reasons()["grad_masked"]
    assert "panel" in reasons(layout="columns")["grad_gather"]
    assert "at most 512" in reasons(tokens=513)["grad_gather"]
