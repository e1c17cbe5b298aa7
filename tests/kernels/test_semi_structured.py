"""2:4 products: the compressed form, the operations, and the linear that runs on them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fxresu.kernels import _measure, compress_24, compress_24_both, mm_24, pack
from fxresu.kernels import managed as _linears  # noqa: F401  (registers fxresu::linear and its candidates)
from fxresu.kernels.choose import Problem, choose
from fxresu.kernels.semi_structured import decompress_reference

DTYPES = [torch.bfloat16, torch.float16]


def _weight(rows: int, K: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    mask = _measure.random_mask(rows, K, 0.5, "2:4", torch.Generator().manual_seed(rows + K)).to(device)
    return torch.randn(rows, K, device=device).masked_fill(~mask, 0).to(dtype), mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [0.0, 0.3, 1.0])
def test_the_reference_form_holds_the_weight(dtype: torch.dtype, fill: float) -> None:
    weight, _ = _weight(16, 48, dtype, "cpu")
    weight *= torch.rand(16, 48) < fill  # zeros among the kept too
    packed = compress_24(weight)
    assert packed.shape == (16, 27) and packed.dtype == dtype
    assert torch.equal(decompress_reference(packed), weight)


def test_more_than_two_of_four_are_refused() -> None:
    weight = torch.zeros(16, 16, dtype=torch.bfloat16)
    weight[3, 4:7] = 1
    with pytest.raises(ValueError, match="not 2:4 sparse"):
        compress_24(weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(16, 16), "bfloat16 or float16"),
        (torch.zeros(8, 16, dtype=torch.float16), "multiples of 16"),
        (torch.zeros(16, 32, dtype=torch.float16)[:, ::2], "contiguous"),
    ],
)
def test_bad_weights_are_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_24(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_forms_are_those_of_the_weight_and_its_transpose(device: str, dtype: torch.dtype) -> None:
    weight, mask = _weight(128, 192, dtype, device)
    ahead, back = compress_24_both(weight.float(), pack(mask), dtype)
    alone, empty = compress_24_both(weight, pack(mask), dtype, back=False)
    assert empty.numel() == 0
    # By their products: behind the indices the library leaves what it found.
    for form, dense in ((ahead, weight), (alone, weight), (back, weight.t().contiguous())):
        x = torch.randn(32, dense.shape[1], device=device).to(dtype)
        assert torch.equal(mm_24(form, x), mm_24(compress_24(dense), x))


def test_bad_operands_of_both_forms_are_refused() -> None:
    weight, mask = _weight(32, 64, torch.bfloat16, "cpu")
    bits = pack(mask)
    with pytest.raises(ValueError, match="dtype must be bfloat16 or float16"):
        compress_24_both(weight, bits, torch.float32)
    with pytest.raises(ValueError, match="multiples of 16"):
        compress_24_both(weight[:8], bits[:8])
    with pytest.raises(ValueError, match="bits must have shape"):
        compress_24_both(weight, bits[:16])


def test_bad_inputs_are_refused() -> None:
    packed = compress_24(_weight(16, 32, torch.float16, "cpu")[0])
    with pytest.raises(ValueError, match="K = 32"):
        mm_24(packed, torch.zeros(3, 16, dtype=torch.float16))
    with pytest.raises(ValueError, match="float16"):
        mm_24(packed, torch.zeros(3, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 130])
def test_products(device: str, dtype: torch.dtype, tokens: int) -> None:
    weight, _ = _weight(128, 256, dtype, device)
    x = torch.randn(tokens, 256, device=device).to(dtype)
    wanted = x.double() @ weight.double().t()
    forward = compress_24(weight)
    torch.testing.assert_close(mm_24(forward, x).double(), wanted, rtol=1e-2, atol=0.2)
    transposed = compress_24(weight.t().contiguous())
    back = mm_24(transposed, mm_24(forward, x))
    torch.testing.assert_close(back.double(), mm_24(forward, x).double() @ weight.double(), rtol=1e-2, atol=0.5)


def test_opcheck_and_flops() -> None:
    weight, _ = _weight(128, 128, torch.bfloat16, "cpu")
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.fxresu.compress_24, (weight,))
    bits = pack(weight != 0)
    torch.library.opcheck(torch.ops.fxresu.compress_24_both, (weight, bits, torch.bfloat16, True))
    torch.library.opcheck(torch.ops.fxresu.compress_24_both, (weight.float(), bits, torch.float16, False))
    packed = compress_24(weight)
    torch.library.opcheck(torch.ops.fxresu.mm_24, (packed, x))
    with FlopCounterMode(display=False) as flops:
        mm_24(packed, x)
    assert flops.get_total_flops() == 3 * 128 * 128


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["sparse", "frozen"])
def test_the_linear_is_the_default_one(device: str, transposed: bool, mode: str) -> None:
    weight, mask = _weight(128, 256, torch.bfloat16, device)
    bits = pack(mask)
    inside = 128 if transposed else 256
    results = []
    for name in ("mm", "cusparselt"):
        torch.manual_seed(1)
        w = weight.float().requires_grad_()
        x = torch.randn(2, 5, inside, device=device).requires_grad_()
        bias = torch.randn(384 - inside, device=device).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            y = torch.ops.fxresu.linear(x, w, bias, None, bits, None, None, mode, "", transposed, how=name)
        y.float().square().sum().backward()
        results.append((y, x.grad, bias.grad) + ((w.grad,) if mode == "sparse" else ()))
        assert (w.grad is None) == (mode == "frozen")
        if mode == "sparse":
            assert w.grad.dtype == torch.float32 and not w.grad[~mask].any()
    assert results[0][0].dtype == results[1][0].dtype
    for wanted, got in zip(*results):
        scale = wanted.float().abs().max()
        assert (got.float() - wanted.float()).abs().max() <= 0.02 * scale


def test_conditions() -> None:
    def reasons(**changes) -> dict[str, str]:
        fields = dict(op="linear", mode="sparse", rows=128, K=256, tokens=64, dtype="bfloat16",
                      weight_dtype="float32", pattern="2:4")  # fmt: skip
        return dict(choose(Problem(**(fields | changes)), torch.device("cpu")).reasons)

    assert "cusparselt" not in reasons()
    assert "do not follow a 2:4 mask" in reasons(pattern="")["cusparselt"]
    assert "the weight is dense" in reasons(mode="resu", layout="rows")["cusparselt"]
    assert "dtype=float32" in reasons(dtype="float32")["cusparselt"]
    assert "cusparselt" not in reasons(rows=192)
    assert "multiples of 64" in reasons(rows=96)["cusparselt"]


@pytest.mark.gpu
def test_shapes_whose_indices_the_library_pads_are_refused() -> None:
    weight, mask = _weight(96, 160, torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match="multiples of 64"):
        compress_24(weight)
    with pytest.raises(ValueError, match="multiples of 64"):
        compress_24_both(weight, pack(mask))


@pytest.mark.gpu
def test_products_in_a_cuda_graph() -> None:
    weight, _ = _weight(256, 256, torch.bfloat16, "cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        mm_24(compress_24(weight), x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = mm_24(compress_24(weight), x)
        weight.mul_(2)
        x.normal_()
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(y, x @ weight.t(), rtol=2e-2, atol=0.2)
