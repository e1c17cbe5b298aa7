"""Casts around products: the plan's precision is what is computed in, and nothing outside sees another dtype."""

import operator

import pytest
import torch
import torch.nn.functional as F
from fxresu_testing import EAGER, Attention, Net, Recorder, in_phase, values
from torch import Tensor, nn

import fxresu
from fxresu.passes import DEFAULT_PLANS, Phase, PhasePlan
from fxresu.passes.pipeline import op_counts
from fxresu.runner import runner_of

_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "attention", "aten.convolution")


def _products(graph: torch.fx.GraphModule) -> dict[str, torch.dtype]:
    return {n.name: v.dtype for n, v in values(graph).items() if any(p in str(n.target) for p in _PRODUCTS)}


def _casts(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in graph.graph.nodes if str(n.target) == "aten._to_copy.default"]


def _record(model: nn.Module, phase: str):
    (record,) = runner_of(model).entries[DEFAULT_PLANS[Phase(phase)].tag].graphs
    return {p.name: p for p in record.passes}


def _close_to_bf16(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    assert not torch.equal(got, want)


def test_predict_computes_every_product_in_bf16_and_keeps_the_output_dtype() -> None:
    recorder = Recorder()
    model = Net()
    x = torch.randn(4, 16)
    want = model(x)
    fxresu.transform(model, compile={"backend": recorder})
    in_phase(model, "predict")
    out = model(x)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    _close_to_bf16(out, want.detach())
    (graph,) = recorder.inference
    products = _products(graph)
    assert len(products) == 5, "two blocks of two, and the head that is not managed"
    assert set(products.values()) == {torch.bfloat16}


def test_norms_and_residuals_stay_in_fp32() -> None:
    recorder = Recorder()
    model = in_phase(fxresu.transform(Net(), compile={"backend": recorder}), "predict")
    model(torch.randn(4, 16))
    graph = recorder.inference[0]
    norms = [n for n in graph.graph.nodes if "layer_norm" in str(n.target)]
    assert len(norms) == 2
    assert all(n.args[0].meta["val"].dtype == torch.float32 for n in norms)
    sums = [n for n in graph.graph.nodes if str(n.target) == "aten.add.Tensor"]
    assert all(n.meta["val"].dtype == torch.float32 for n in sums)


def test_no_round_trip_between_linear_split_attention_and_linear() -> None:
    recorder = Recorder()
    model = Attention()
    x = torch.randn(2, 6, 16)
    want = model(x).detach()
    fxresu.transform(model, compile={"backend": recorder})
    in_phase(model, "predict")
    _close_to_bf16(model(x), want)
    casts = _record(model, "predict")["insert_casts"]
    # Down: x, two weights, two biases. Up: the output. Nothing in between.
    assert casts.after["aten.to.dtype"] == casts.matches == 6
    low = {n for n, v in values(recorder.inference[0]).items() if v.dtype == torch.bfloat16}
    ups = [n for n in _casts(recorder.inference[0]) if n.meta["val"].dtype == torch.float32]
    assert len(ups) == 1
    assert next(iter(ups[0].users)).op == "output"
    (attention,) = (n for n in recorder.inference[0].graph.nodes if "attention" in str(n.target))
    assert {a.meta["val"].dtype for a in attention.args[:3]} == {torch.bfloat16}
    assert low.issuperset(a for a in attention.args[:3])


class Chain(nn.Module):
    """A product read by another product and by an elementwise op: the cast back stays for the latter only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) + y.sin()


def test_a_cast_back_with_another_reader_stays() -> None:
    model = in_phase(fxresu.transform(Chain(), compile=EAGER), "predict")
    model(torch.randn(3, 8))
    # x, a, a's result for sin, b, b's result for the sum; b reads a's low result without a cast.
    assert _record(model, "predict")["insert_casts"].matches == 5


def test_fp32_plan_without_anything_to_cast_changes_nothing() -> None:
    model = in_phase(fxresu.transform(Net(), compile=EAGER), "correct")
    model(torch.randn(3, 16))
    record = _record(model, "correct")["insert_casts"]
    assert record.matches == 0
    assert record.before == record.after == {}


@pytest.mark.parametrize("compile", [EAGER, False, True], ids=["aot_eager", "eager", "inductor"])
def test_correct_computes_in_fp32_under_an_ambient_bf16_autocast(compile: object) -> None:
    model, x = Net(), torch.randn(4, 16)
    want = model(x).detach()
    fxresu.transform(model, compile=compile)
    in_phase(model, "correct")
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        assert torch.is_autocast_enabled("cpu"), "the caller's autocast is on again"
        assert (model.head(x)).dtype == torch.bfloat16
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


class OwnAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


@pytest.mark.parametrize("compile", [EAGER, False], ids=["aot_eager", "eager"])
def test_the_models_own_autocast_region_is_its_own_business(compile: object) -> None:
    model, x = OwnAutocast(), torch.randn(4, 16)
    want = model(x).detach()
    fxresu.transform(model, compile=compile)
    in_phase(model, "correct")
    torch.testing.assert_close(model(x), want, rtol=0.05, atol=0.05)


def test_correct_of_a_bf16_model_computes_in_fp32_and_returns_bf16() -> None:
    recorder = Recorder()
    model, x = Net().bfloat16(), torch.randn(4, 16).bfloat16()
    want = model(x).detach()
    fxresu.transform(model, compile={"backend": recorder})
    in_phase(model, "correct")
    out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, want, rtol=0.05, atol=0.05)
    products = _products(recorder.inference[0])
    assert len(products) == 5
    assert set(products.values()) == {torch.float32}


def test_predict_of_a_bf16_model_has_nothing_to_cast() -> None:
    model = in_phase(fxresu.transform(Net().bfloat16(), compile=EAGER), "predict")
    assert model(torch.randn(4, 16).bfloat16()).dtype == torch.bfloat16
    assert _record(model, "predict")["insert_casts"].matches == 0


@pytest.mark.parametrize("compile", [EAGER, False], ids=["aot_eager", "eager"])
def test_the_output_of_predict_has_the_models_dtype(compile: object) -> None:
    model = in_phase(fxresu.transform(Net(), compile=compile), "predict")
    assert model(torch.randn(4, 16)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 16)).dtype == torch.float32


def test_a_float64_model_is_left_alone() -> None:
    model = in_phase(fxresu.transform(Net().double(), compile=EAGER), "predict")
    x = torch.randn(4, 16, dtype=torch.float64)
    assert model(x).dtype == torch.float64
    assert _record(model, "predict")["insert_casts"].matches == 0


class Products(nn.Module):
    """Every kind of product the pass knows, by argument and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        y = torch.bmm(y, y.transpose(1, 2).tanh()) @ y.sin()
        y = self.conv(y.cos())
        z = torch.addmm(self.bias, mat1=y[0].sin(), mat2=y[1, :, :].sin().T @ y[1].cos())
        z = torch.matmul(input=z, other=z.sin().t()) + torch.mm(z.sin(), mat2=z.cos().t())
        w = F.scaled_dot_product_attention(query=y.sin()[None], key=y.cos()[None], value=y[None])
        return z.sum() + w.sin() + operator.matmul(y.sin(), y.cos().mT).sum()


def test_products_by_argument_and_by_keyword() -> None:
    recorder = Recorder()
    model, x = Products(), torch.randn(2, 4, 8)
    want = model(x).detach()
    fxresu.transform(model, compile={"backend": recorder})
    in_phase(model, "predict")
    torch.testing.assert_close(model(x), want, rtol=0.1, atol=1.0)
    products = _products(recorder.inference[0])
    assert len(products) >= 9
    assert set(products.values()) == {torch.bfloat16}


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
@pytest.mark.parametrize("candidates", [1.0, 0.5])
def test_training_under_a_bf16_plan(phase: str, candidates: float) -> None:
    weights = {"dense": "dense", "sparse": "sparse", "resu": "resu"}[phase]
    plans = {phase: PhasePlan(Phase(phase), weights, "bf16", "needed" if phase == "resu" else "save")}
    recorder = Recorder()
    model = Net(128, 192)
    fxresu.transform(model, candidates=candidates, compile={"backend": recorder}, plans=plans)
    in_phase(model, phase)
    out = model(torch.randn(4, 128))
    assert out.dtype == torch.float32
    out.sum().backward()
    for graph in (*recorder.forward, *recorder.backward):
        assert set(_products(graph).values()) == {torch.bfloat16}
    for m in fxresu.model_state.managed_weights(model).values():
        grad = m.entry.anchor.grad if phase == "resu" else m.parameter.grad
        assert grad.dtype == torch.float32
        assert grad.abs().sum() > 0


def test_op_counts_are_those_of_the_graph_that_ran() -> None:
    recorder = Recorder()
    model = in_phase(fxresu.transform(Net(), compile={"backend": recorder}), "predict")
    model(torch.randn(4, 16))
    last = _record(model, "predict")["discard_activations"]
    assert dict(op_counts(recorder.captured[0])) == dict(last.after)


class InPlace(nn.Module):
    """A product's result is written in place, itself or through a view, before the next product reads it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "method":
            y.add_(5)
        elif self.how == "operator":
            y += 5
        elif self.how == "relu":
            F.relu(y, inplace=True)
        elif self.how == "view":
            y.view(-1, 4)[:, 1:].mul_(7)
        elif self.how == "setitem":
            y[:, 2] = 3.0
        elif self.how == "bits":
            y = y.view(torch.int32).view(torch.float32)
        return self.b(y)


@pytest.mark.parametrize("how", ["method", "operator", "relu", "view", "setitem", "bits"])
def test_a_result_that_is_written_in_place_is_not_bypassed(how: str) -> None:
    model, x = InPlace(how), torch.randn(4, 8)
    with torch.no_grad():
        want = model(x)
    fxresu.transform(model, compile=EAGER)
    in_phase(model, "predict")
    torch.testing.assert_close(model(x), want, rtol=0.05, atol=0.1)


def test_the_users_own_compile_under_autocast_computes_products_in_the_plans_precision() -> None:
    model, x = Net(), torch.randn(4, 16)
    want = model(x).detach()
    fxresu.transform(model, compile=False)
    in_phase(model, "correct")
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(model)(x)
    assert out.dtype == torch.bfloat16, "results between products keep the dtypes that were captured"
    torch.testing.assert_close(out.float(), want, rtol=0.02, atol=0.02)
    from fxresu.passes.backend import user_records

    casts = next(p for p in user_records[-1].passes if p.name == "insert_casts")
    assert casts.after["_enter_autocast"] == 5
