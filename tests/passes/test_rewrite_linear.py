"""Linears fed by a managed weight: rewritten, left alone with a reason, and the same numbers either way."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from fxresu_testing import EAGER, Net, Recorder, check_gradients, in_phase
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxresu
from fxresu.passes import PipelineRecord
from fxresu.passes.pipeline import op_counts
from fxresu.runner import runner_of


class Form(nn.Module):
    """One weight [12, 16] and a vector, used as `function` says."""

    def __init__(self, function, bias: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 16))
        self.bias = nn.Parameter(torch.randn(bias))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def _records(model: nn.Module) -> list[PipelineRecord]:
    return [r for e in runner_of(model).entries.values() for r in e.graphs]


def _rewrites(model: nn.Module) -> list:
    return [w for r in _records(model) for w in r.rewrites]


REWRITTEN = {
    "F.linear": (lambda x, w, b: F.linear(x, w, b), 16),
    "F.linear without bias": (lambda x, w, b: F.linear(x, w), 16),
    "F.linear by keywords": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), 16),
    "x @ w.t()": (lambda x, w, b: x @ w.t(), 16),
    "x @ w.T": (lambda x, w, b: x @ w.T + b, 16),
    "x @ w.mT": (lambda x, w, b: x @ w.mT, 16),
    "matmul transpose": (lambda x, w, b: torch.matmul(x, w.transpose(0, 1)), 16),
    "matmul transpose -1 -2": (lambda x, w, b: torch.matmul(x, w.transpose(-1, -2)), 16),
    "method matmul": (lambda x, w, b: x.matmul(w.t()), 16),
    "mm": (lambda x, w, b: torch.mm(x.flatten(0, 1), w.t()), 16),
    "method mm": (lambda x, w, b: x.flatten(0, 1).mm(w.t()), 16),
    "torch.t": (lambda x, w, b: torch.mm(x.flatten(0, 1), torch.t(w)), 16),
    "addmm": (lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()), 16),
    "addmm by keywords": (lambda x, w, b: torch.addmm(input=b, mat1=x.flatten(0, 1), mat2=w.t()), 16),
    "addmm transposed": (lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w), 12),
    "matmul transposed": (lambda x, w, b: x @ w, 12),
    "matmul by keywords": (lambda x, w, b: torch.matmul(input=x, other=w), 12),
    "F.linear transposed": (lambda x, w, b: F.linear(x, w.t(), b), 12),
    "left factor": (lambda x, w, b: w @ x.flatten(0, 1).t(), 16),
    "left factor of a batch": (lambda x, w, b: torch.matmul(w, x.mT).mT, 16),
    "left factor transposed": (lambda x, w, b: w.t() @ x.mT, 12),
    "left factor of a vector": (lambda x, w, b: w @ x[0, 0], 16),
    "permuted": (lambda x, w, b: x @ w.permute(1, 0).contiguous(), 16),
    "cast to its own dtype": (lambda x, w, b: F.linear(x, w.to(b.dtype), b), 16),
    "cast like the input": (lambda x, w, b: F.linear(x, w.type_as(x), b), 16),
    "cast to another dtype": (lambda x, w, b: F.linear(x.double(), w.double()).to(x.dtype), 16),
}


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten_with_the_same_numbers(name: str, phase: str) -> None:
    function, width = REWRITTEN[name]
    model = Form(function, 28 - width)
    fxresu.transform(model, include="weight", compile=EAGER)
    in_phase(model, phase)
    check_gradients(model, phase, torch.randn(3, 2, width))
    (rewrite,) = _rewrites(model)
    after = "fxresu.matmul" if name.startswith("left") else "fxresu.linear"
    assert (rewrite.weight, rewrite.after, rewrite.reason) == ("weight", after, "")
    (record,) = _records(model)
    assert record.passes[0].before["managed"] == 1
    assert "managed" not in record.passes[0].after
    assert record.passes[0].after[after] == record.passes[0].matches == 1


LEFT_ALONE = {
    "einsum": (lambda x, w, b: torch.einsum("abk,ok->abo", x, w), 16, "einsum"),
    "sum": (lambda x, w, b: x.sum(-1, keepdim=True) * w.sum(), 16, ".sum"),
    "weight as input": (lambda x, w, b: F.linear(w, x.flatten(0, 1)), 16, "input or bias"),
    "addmm alpha": (lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t(), alpha=2), 16, "alpha or beta"),
    "addmm beta": (lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t(), beta=0.5), 16, "alpha or beta"),
    "addmm matrix bias": (lambda x, w, b: torch.addmm(b.expand(6, -1) * 1, x.flatten(0, 1), w.t()), 16, "not a vector"),
    "elementwise": (lambda x, w, b: (x.flatten(0, 1)[:, None] * w).sum(-1), 16, "mul"),
}


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_with_a_reason_and_the_same_numbers(name: str, phase: str) -> None:
    function, width, reason = LEFT_ALONE[name]
    model = Form(function, 28 - width)
    fxresu.transform(model, include="weight", compile=EAGER)
    in_phase(model, phase)
    check_gradients(model, phase, torch.randn(3, 2, width))
    (rewrite,) = _rewrites(model)
    assert rewrite.weight == "weight"
    assert rewrite.before == rewrite.after
    assert reason in rewrite.reason
    assert _records(model)[0].passes[0].matches == 0


def test_one_weight_with_two_consumers_is_recorded_twice() -> None:
    model = Form(lambda x, w, b: F.linear(x, w) * w.sum(), 12)
    fxresu.transform(model, include="weight", compile=EAGER)
    in_phase(model, "sparse")
    check_gradients(model, "sparse", torch.randn(3, 2, 16))
    assert sorted((r.before, bool(r.reason)) for r in _rewrites(model)) == [(".sum", True), ("linear", False)]


def test_a_weight_times_itself_is_recorded_once() -> None:
    model = Form(lambda x, w, b: x @ torch.mm(w.t(), w) * torch.mm(w, w.t())[0, 0], 12)
    fxresu.transform(model, include="weight", compile=EAGER)
    in_phase(model, "sparse")
    check_gradients(model, "sparse", torch.randn(3, 2, 16))
    assert len([r for r in _rewrites(model) if not r.reason]) == 2


def test_conv1d_of_transformers_is_a_transposed_linear() -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 16)
    model = fxresu.transform(nn.Sequential(conv), compile=EAGER)
    for phase in ("dense", "sparse", "resu"):
        in_phase(model, phase)
        check_gradients(model, phase, torch.randn(2, 3, 16))
    assert {(r.weight, r.before, r.after) for r in _rewrites(model)} == {("0.weight", "addmm", "fxresu.linear")}


# Names


def test_names_in_nested_modules_and_lists() -> None:
    model = fxresu.transform(Net(), compile=EAGER)
    model(torch.randn(2, 16))
    want = [f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down")]
    assert [r.weight for r in _rewrites(model)] == want


def test_linears_in_checkpoint_regions_are_rewritten_counted_and_named() -> None:
    recorder = Recorder()
    model = fxresu.transform(Net(recompute="on"), compile={"backend": recorder})
    for phase in ("dense", "sparse", "resu"):
        in_phase(model, phase)
        check_gradients(model, phase, torch.randn(4, 16))
    for record, module in zip(_records(model), recorder.captured, strict=True):
        assert record.passes[0].matches == 4
        assert [r.weight for r in record.rewrites] == [f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down")]
        assert op_counts(module)["fxresu.linear"] == 4
        assert Counter(n.op for n in module.graph.nodes)["get_attr"] >= 2, "the regions are nested graphs"
        assert "managed" not in op_counts(module)


class Nested(nn.Module):
    """Checkpoint within checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        def region(y):
            return checkpoint(self.inner, self.outer(y).relu(), use_reentrant=False)

        return checkpoint(region, x, use_reentrant=False)


def test_names_in_regions_within_regions() -> None:
    model = fxresu.transform(Nested(), compile=EAGER)
    in_phase(model, "sparse")
    check_gradients(model, "sparse", torch.randn(4, 8))
    assert [r.weight for r in _rewrites(model)] == ["outer.weight", "inner.weight"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8, bias=False)
        self.twin.weight = self.tied.weight

    def forward(self, x):
        return self.twin(self.tied(self.shared(self.shared(x).relu()).relu()).relu())


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_a_module_called_twice_and_tied_weights(phase: str) -> None:
    model = fxresu.transform(Twice(), compile=EAGER)
    in_phase(model, phase)
    check_gradients(model, phase, torch.randn(5, 8))
    assert [r.weight for r in _rewrites(model)] == ["shared.weight"] * 2 + ["tied.weight"] * 2


def test_names_where_only_a_part_is_compiled_by_the_user() -> None:
    from fxresu.passes.backend import user_records

    model = fxresu.transform(Net(), compile=False)
    part = torch.compile(model.blocks[1])
    before = len(user_records)
    part(torch.randn(3, 16))
    (record,) = user_records[before:]
    assert [r.weight.rpartition("up")[1] or r.weight.rpartition("down")[1] for r in record.rewrites] == ["up", "down"]
    assert all(r.after == "fxresu.linear" for r in record.rewrites)
