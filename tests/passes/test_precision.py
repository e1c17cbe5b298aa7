"""Precision by name: overrides of a plan, fp8 for phases without a backward, and what is counted of both."""

import pytest
import torch
import torch.nn.functional as F
from fxresu_testing import EAGER, Net, Recorder, check_gradients, in_phase, values
from torch import nn

import fxresu
from fxresu.errors import ConfigError
from fxresu.kernels import fp8
from fxresu.model_state import freeze_rest
from fxresu.passes import Phase, PhasePlan
from fxresu.runner import cast_statistics, runner_of


def products(recorder: Recorder) -> dict[str, int]:
    found: dict[str, int] = {}
    for graph in (*recorder.inference, *recorder.forward):
        for node, value in values(graph).items():
            if "mm" in str(node.target):
                name = str(value.dtype).removeprefix("torch.")
                found[name] = found.get(name, 0) + 1
    return found


def graphs(model: nn.Module) -> list:
    return [g for e in runner_of(model).entries.values() for g in e.graphs]


def predict(precision: str = "bf16", **overrides: str) -> dict:
    plan = PhasePlan(
        Phase.PREDICT, "effective", precision, "discard",
        precision_overrides={k.replace("__", "."): v for k, v in overrides.items()},
    )  # fmt: skip
    return {"predict": plan}


# --- overrides -------------------------------------------------------------------------------------------------------


def test_a_head_stays_in_fp32() -> None:
    recorder = Recorder()
    x, model = torch.randn(4, 16), Net()
    want = model(x)
    fxresu.transform(model, compile={"backend": recorder}, precision={"head": "fp32"})
    out = in_phase(model, "predict")(x)
    assert products(recorder) == {"bfloat16": 4, "float32": 1}
    assert graphs(model)[0].products == {"bf16": 4, "fp32": 1}
    torch.testing.assert_close(out, want, rtol=0.05, atol=0.05)
    assert cast_statistics(model)["products"] == {"bf16": 4, "fp32": 1}


def test_casts_are_counted_where_the_rest_is_frozen_too() -> None:
    model = in_phase(fxresu.transform(Net(), compile=EAGER), "resu")
    freeze_rest(model)
    in_phase(model, "predict")(torch.randn(4, 16))
    assert cast_statistics(model)["products"] == {"bf16": 5}


@pytest.mark.parametrize(
    ("precision", "counted"),
    [
        ({"blocks.0": "fp32"}, {"bf16": 3, "fp32": 2}),
        ({"blocks.*.up": "fp32", "blocks.0.*": "fp16"}, {"bf16": 1, "fp16": 1, "fp32": 3}),
        ({"blocks.1.down.weight": "fp32"}, {"bf16": 4, "fp32": 1}),
        ({"*": "fp32"}, {"fp32": 5}),
        ({"head": "inherit"}, {"bf16": 4, "fp32": 1}),
    ],
    ids=str,
)
def test_the_first_pattern_that_names_a_module_around_it_decides(precision: dict, counted: dict) -> None:
    if "blocks.0.*" in precision:
        counted = {"bf16": 2, "fp16": 1, "fp32": 2}
    model = fxresu.transform(Net(), compile=EAGER, precision=precision)
    in_phase(model, "predict")(torch.randn(4, 16))
    assert graphs(model)[0].products == counted


def test_without_overrides_nothing_is_left_out() -> None:
    model = in_phase(fxresu.transform(Net(), compile=EAGER), "predict")
    model(torch.randn(4, 16))
    (record,) = graphs(model)
    casts = next(p for p in record.passes if p.name == "insert_casts")
    assert record.products == {"bf16": 5}
    # Operands of five products (weights, biases, inputs of the first of each block and the head), results of all but
    # those that another product reads at once.
    assert casts.counts["bytes cast"] > 2 * (4 * 16 * 32 + 16 * 5)


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_training_phases_too_and_the_gradients_are_right(phase: str) -> None:
    x = torch.randn(8, 16)
    weights = {"dense": "dense", "sparse": "sparse", "resu": "resu"}[phase]
    plan = PhasePlan(Phase(phase), weights, precision_overrides={"blocks.0.up": "bf16"})
    model = in_phase(fxresu.transform(Net(), compile=EAGER, plans={phase: plan}), phase)
    check_gradients(model, phase, x, tol=2e-2)
    assert graphs(model)[0].products == {"bf16": 1, "fp32": 4}


def test_under_autocast_an_override_leaves_it() -> None:
    recorder = Recorder()
    model = fxresu.transform(Net(), compile={"backend": recorder}, precision={"head": "fp32"})
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(4, 16))
    assert out.dtype == torch.bfloat16, "what autocast would give"
    assert products(recorder) == {"bfloat16": 4, "float32": 1}


def test_norms_are_spared_unless_they_are_named() -> None:
    x = torch.randn(4, 16)
    for precision, dtype in ((None, torch.float32), ({"blocks.*.norm": "bf16"}, torch.bfloat16)):
        recorder = Recorder()
        model = fxresu.transform(Net(), compile={"backend": recorder}, precision=precision)
        in_phase(model, "predict")(x)
        found = [n for n in recorder.inference[0].graph.nodes if "layer_norm" in str(n.target)]
        assert {n.args[0].meta["val"].dtype for n in found} == {dtype}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": {"nothing.*": "fp32"}}, r"precision_overrides\['nothing.\*'\] of warmup matches no module"),
        ({"precision": {"head": "fp7"}}, "precision: precision_overrides.*'fp7' in the plan of warmup"),
        ({"precision": "fp32"}, "precision='fp32': use a mapping"),
        ({"precision": {"head": "fp32"}, "compile": False}, r"compile=False, but precision_overrides\['head'\]='fp32'"),
        ({"precision": {"head": "fp8"}}, "precision: precision='fp8' in the plan of warmup: forward-only"),
        ({"plans": predict("fp8"), "compile": False}, "compile=False, but precision='fp8' of predict"),
    ],
    ids=str,
)
def test_bad_overrides_are_refused_by_name(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fxresu.transform(Net(), **options)


# --- fp8 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fp8.ENVIRONMENT, "reference")


def test_a_device_without_fp8_is_refused_with_the_reason() -> None:
    model = fxresu.transform(Net(), compile=EAGER, plans=predict("fp8"))
    if fp8.unsupported(torch.device("cpu")):
        with pytest.raises(ConfigError, match="precision='fp8' in the plan of predict: .* 8.9 or later.*; use 'bf16'"):
            fxresu.phases.set_phase(model, "predict")
    assert fxresu.current_phase(model) is Phase.DENSE


@pytest.mark.usefixtures("reference")
def test_managed_linears_compute_in_fp8() -> None:
    x = torch.randn(8, 16)
    model = Net()
    want = model.double()(x.double()).detach()
    model.float()
    fxresu.transform(model, compile=EAGER, plans=predict("fp8"))
    out = in_phase(model, "predict")(x)
    assert graphs(model)[0].products == {"fp8": 4, "bf16": 1}
    assert out.dtype == torch.float32 and not out.requires_grad
    torch.testing.assert_close(out.double(), want, rtol=0.1, atol=0.1)
    casts = next(p for p in graphs(model)[0].passes if p.name == "insert_casts")
    assert casts.counts["bf16 instead of fp8: no linear on a managed weight"] == 1


@pytest.mark.usefixtures("reference")
def test_what_has_no_fp8_form_runs_in_bf16_and_says_why() -> None:
    model = fxresu.transform(Net(16, 24), compile=EAGER, plans=predict("fp8", head="fp8"))
    in_phase(model, "predict")(torch.randn(8, 16))
    (record,) = graphs(model)
    assert record.products == {"bf16": 5}
    counts = next(p for p in record.passes if p.name == "insert_casts").counts
    assert counts["bf16 instead of fp8: 24 outputs are no multiple of 16"] == 2
    assert counts["bf16 instead of fp8: 24 inputs are no multiple of 16"] == 2
    assert counts["bf16 instead of fp8: 5 outputs are no multiple of 16"] == 1


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("compile", [EAGER, True], ids=["aot_eager", "inductor"])
def test_compiled_fp8_is_the_reference(compile: object) -> None:
    layer, x = nn.Linear(32, 48), torch.randn(3, 5, 32)
    want = fp8.linear_fp8(x, layer.weight, layer.bias, "reference").float()
    model = fxresu.transform(nn.Sequential(layer), compile=compile, plans=predict("fp8"), include="0.weight")
    out = in_phase(model, "predict")(x)
    torch.testing.assert_close(out, want.detach(), rtol=2e-2, atol=2e-2)
    assert graphs(model)[0].products == {"fp8": 1}


def _skip_without_row_scales() -> None:
    ones = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(ones, ones.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("this torch has no row scales on a CPU")


@pytest.mark.parametrize("how", ["row", "tensor"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_scaled_product_against_the_rounded_operands(how: str, transposed: bool) -> None:
    x, w, b = torch.randn(7, 32) * 100, torch.randn(48, 32), torch.randn(48)
    x[3] = 0
    if how == "row":
        _skip_without_row_scales()
    parts = [fp8.rounded(t, how == "row") for t in (x, w)]
    (xq, xs), (wq, ws) = [(q.double(), s.double()) for q, s in parts]
    want = (xq * xs) @ (wq * ws).t() + b.double()
    got = fp8.linear_fp8(x, w.t().contiguous() if transposed else w, b, how, transposed)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=0.5)
    # e4m3 has three bits behind the point: rounding is off by at most 1/16 of the value, or half its smallest step.
    assert ((xq * xs - x.double()).abs() <= x.double().abs() / 16 + xs * 2**-10).all()
    assert (got[3].double() - b.bfloat16().double()).abs().max() == 0


def test_what_is_not_finite_stays_so() -> None:
    x, w = torch.ones(2, 16), torch.ones(16, 16)
    x[1, 3] = float("inf")
    out = fp8.linear_fp8(x, w, None, "reference")
    assert out[0].eq(16).all() and out[1].isnan().all()
    with pytest.raises(ValueError, match="how='other' is unknown"):
        fp8.linear_fp8(x, w, None, "other")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no fp8 products")
def test_fp8_products_on_a_gpu() -> None:
    x = torch.randn(64, 256, device="cuda")
    layer = nn.Linear(256, 512).cuda()
    want = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    for how in ("tensor", "row") if torch.cuda.get_device_capability() >= (9, 0) else ("tensor",):
        got = fp8.linear_fp8(x, layer.weight, layer.bias, how)
        (xq, xs), (wq, ws) = [
            (q.double(), s.double()) for q, s in (fp8.rounded(t, how == "row") for t in (x, layer.weight))
        ]
        reference = (xq * xs) @ (wq * ws).t() + layer.bias.double()  # of the same operands: only its own sums differ
        torch.testing.assert_close(got.double(), reference, rtol=0.02, atol=0.02)
        if how == "row":
            told = fp8.linear_fp8(x, layer.weight, layer.bias, "reference")
            torch.testing.assert_close(got, told, rtol=0.02, atol=0.02)
        assert ((got.double() - want).norm() / want.norm()) < 0.05
    model = fxresu.transform(Net(256, 512).cuda(), plans=predict("fp8"))
    in_phase(model, "predict")(x)
    assert graphs(model)[0].products == {"fp8": 4, "bf16": 1}


# --- in the metrics --------------------------------------------------------------------------------------------------


def test_summaries_say_what_was_computed_in_which_precision() -> None:
    model = fxresu.transform(Net(), compile=EAGER, precision={"blocks.0.*": "bf16"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = fxresu.CycleConfig(
        cycles=1, train_steps=1, stabilize_steps=1, resu_steps=1, sparsity_end=0.5, schedule="constant"
    )
    cycle = fxresu.ResuCycle(model, optimizer, config, loss=lambda m, x: m(x).square().mean())
    for _ in range(3):
        cycle.step(torch.randn(8, 16))
    assert [s.products for s in cycle.summaries] == [{"bf16": 2, "fp32": 3}] * 3
    assert all(s.bytes_cast > 0 for s in cycle.summaries)
    assert cycle.summaries[0].to_dict()["products"] == {"bf16": 2, "fp32": 3}
