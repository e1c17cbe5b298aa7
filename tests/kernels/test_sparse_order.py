"""2:4 weights in the order of the sparse tensor cores: against the definition, and against the library."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxresu.kernels import _choice_cache, _measure, _semi_structured, mm_24, pack, sparse_order, unpack_aten


def _problem(rows: int, K: int, dtype: torch.dtype, device: str, fill: float = 1.0, seed: int = 0):
    """Weight and mask bits; `fill` is the share of the two of four that are kept, and of those that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    mask = _measure.random_mask(rows, K, 0.5, "2:4", generator) & (torch.rand((rows, K), generator=generator) < fill)
    # Exact in every dtype of the forms: the interpreter rounds casts in its own way.
    values = torch.randint(-64, 65, (rows, K), generator=generator).where(mask, 0)
    return values.to(dtype).to(device), pack(mask).to(device)


def _same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return got.dtype == wanted.dtype and torch.equal(got.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (192, 64), (64, 320)])
@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.float64, torch.float16),
])  # fmt: skip
@pytest.mark.parametrize("fill", [0.0, 0.7, 1.0])
def test_both_forms_are_the_definition(device: str, shape, dtypes, fill: float) -> None:
    weight, bits = _problem(*shape, dtypes[0], device, fill)
    ahead, back = sparse_order.compress(weight, bits, dtypes[1], True)
    across = pack(unpack_aten(bits, shape[1]).t().contiguous())
    assert _same(ahead, sparse_order.compress_reference(weight, bits, dtypes[1]))
    assert _same(back, sparse_order.compress_reference(weight.t().contiguous(), across, dtypes[1]))
    alone, none = sparse_order.compress(weight, bits, dtypes[1], False)
    assert none is None and _same(alone, ahead)


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), fill=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_form_holds_every_value_once(rows: int, columns: int, fill: float, seed: int) -> None:
    """Decoded through the place of each group, as the module's formula numbers them one by one."""
    weight, bits = _problem(64 * rows, 64 * columns, torch.bfloat16, "cpu", fill, seed)
    form = sparse_order.compress(weight, bits, torch.bfloat16, False)[0].reshape(-1)
    count = weight.numel() // 2
    values, places = form[:count], form[count:].view(torch.uint8)
    codes = torch.stack((places & 15, places >> 4), -1).view(-1).tolist()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        r, g = (int(torch.randint(size, (), generator=generator)) for size in (weight.shape[0], weight.shape[1] // 4))
        tile = r // 64 * columns + g // 16
        word = r % 8 + 8 * (r // 16 % 4) + 32 * (g // 8 % 2)
        code = codes[tile * 1024 + word * 16 + r // 8 % 2 + 2 * (g // 4 % 2) + 4 * (g % 2) + 8 * (g // 2 % 2)]
        low, high = code & 3, code >> 2
        assert low < high
        decoded = torch.zeros(4, dtype=torch.bfloat16)
        pair = values[(r * weight.shape[1] // 4 + g) * 2 :]
        decoded[low], decoded[high] = pair[0], pair[1]
        assert torch.equal(decoded, weight[r, 4 * g : 4 * g + 4])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 64), (384, 640), (1024, 4096), (4096, 1024)])
def test_the_library_writes_the_same(shape) -> None:
    device = torch.device("cuda")
    if not _semi_structured.own_order(device):
        pytest.skip("another device than this order is known for")
    weight, bits = _problem(*shape, torch.bfloat16, "cuda", seed=3)
    weight = weight + unpack_aten(bits, shape[1]) * 200  # no kept value is zero
    ahead, back = sparse_order.compress(weight, bits, torch.bfloat16, True)
    assert _same(ahead, _semi_structured.compress(weight))
    assert _same(back, _semi_structured.compress(weight.t().contiguous()))


@pytest.mark.gpu
def test_products_of_what_is_kept_but_zero() -> None:
    weight, bits = _problem(256, 512, torch.bfloat16, "cuda", fill=0.6)
    ahead, back = _semi_structured.compress_both(weight, bits, torch.bfloat16, True)
    x = torch.randn(80, 512, device="cuda").bfloat16()
    dy = torch.randn(80, 256, device="cuda").bfloat16()
    for form, dense, wanted in (
        (ahead, x, x.double() @ weight.double().t()),
        (back, dy, dy.double() @ weight.double()),
    ):
        got = mm_24(form, dense).double()
        assert ((got - wanted).norm() / wanted.norm()) < 5e-3


@pytest.mark.gpu
def test_algorithms_are_searched_once_and_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FXRESU_CACHE", str(tmp_path))
    monkeypatch.setattr(_semi_structured, "_fastest", {})
    monkeypatch.setattr(_choice_cache, "_OPEN", {})
    weight, bits = _problem(256, 256, torch.bfloat16, "cuda")
    form, _ = _semi_structured.compress_both(weight, bits, torch.bfloat16, False)
    for few in (100, 1100):  # too few, and no whole tiles: the library's own choice
        mm_24(form, torch.randn(few, 256, device="cuda").bfloat16())
    assert not _semi_structured._fastest
    x = torch.randn(1024, 256, device="cuda").bfloat16()
    wanted = x.double() @ weight.double().t()
    first = mm_24(form, x)
    (name,) = (key for _, key in _semi_structured._fastest)
    assert "tokens=1024" in name
    figures = _choice_cache.of(torch.device("cuda", torch.cuda.current_device())).known(name)
    assert len(figures) > 1 and all(f > 0 for f in figures.values())
    _semi_structured._fastest.clear()
    monkeypatch.setattr(_semi_structured, "_search", None)  # the file knows
    for got in (first, mm_24(form, x)):
        assert ((got.double() - wanted).norm() / wanted.norm()) < 5e-3
