"""`inspect`: exact counts on known models, reasons, breaks, and that the user's model stays as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from fxresu_testing import Net
from torch import Tensor, nn

import fxresu
from fxresu import inspect
from fxresu.errors import ConfigError
from fxresu.inspection import NEVER_READ, READ_IN_EAGER, InspectionError
from fxresu.inspection_text import fold, render
from fxresu.model_state import managed_weights, state_of
from fxresu.models import load_model
from fxresu.passes import Phase, PhasePlan
from fxresu.shape_copy import enter_phase, meta_copy

SMALL_LLAMA = "hf:llama?num_hidden_layers=2&hidden_size=64&intermediate_size=96&num_attention_heads=4&vocab_size=50"
SMALL_BERT = "hf:bert?num_hidden_layers=2&hidden_size=32&intermediate_size=64&num_attention_heads=2&vocab_size=50"
SMALL_GPT2 = "hf:gpt2?n_layer=2&n_embd=32&n_head=2&vocab_size=50"


class Odd(nn.Module):
    """One consumer of each kind: rewritten, unknown to the passes, after a break, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused = nn.Linear(4, 4)
        self.embedding = nn.Embedding(5, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.embedding(tokens))
        torch._dynamo.graph_break()
        x = x + torch.einsum("bij,kj->bik", x, self.second.weight)
        if x.sum() > 1e9:
            return x
        return self.third(x)


def counts(found: fxresu.Inspection) -> tuple[int, int, int, int]:
    return found.weights, found.rewritten, found.captured, sum(b.times for b in found.breaks)


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu", "predict", "correct"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_phase_with_and_without_values(phase: str, device: str) -> None:
    model = Net().to(device)
    found = inspect(model, torch.randn(3, 16, device=device), phase=phase)
    assert counts(found) == (4, 4, 1, 0)
    assert found.values is (device == "cpu")
    assert found.recompiles == found.markers_left == 0
    assert [r.weight for r in found.rows] == [f"blocks.{i}.{n}.weight" for i in range(2) for n in ("up", "down")]
    row = found.rows[0]
    assert (row.before, row.after) == ("linear", "fxresu.linear")
    assert (row.active, row.candidates) == {"dense": (512, 0), "sparse": (256, 0)}.get(phase, (256, 256))
    backward = {"dense": ("mm", "mm"), "sparse": ("mm", "mm", "where"), "resu": ("mm", "mm", "fxresu.gather")}
    assert row.executed.forward == ("addmm",)
    assert row.executed.backward == backward.get(phase, ())
    assert [(r.weight, r.reason) for r in found.left_alone] == [("head.weight", "output head")]
    rewriting = found.passes[0]
    assert (rewriting.name, rewriting.matches) == ("rewrite_linear", 4)
    assert rewriting.changed["linear"] == (5, 1) and rewriting.changed["fxresu.linear"] == (0, 4)
    assert all(before != after for p in found.passes for before, after in p.changed.values())
    casts = {p.name: p.matches for p in found.passes}.get("insert_casts", 0)
    assert (casts > 0) == (phase == "predict")


@pytest.mark.parametrize(
    ("spec", "weights", "before"), [(SMALL_LLAMA, 14, "linear"), (SMALL_BERT, 12, "linear"), (SMALL_GPT2, 8, "addmm")]
)
def test_transformers_models(spec: str, weights: int, before: str) -> None:
    model, inputs = load_model(spec, device="meta", seq_len=8)
    found = inspect(model, inputs)
    assert counts(found) == (weights, weights, 1, 0)
    assert {r.before for r in found.rows} == {before}
    assert found.recompiles == 0


def test_demo_gpt() -> None:
    model, inputs = load_model("demo", seq_len=8)
    found = inspect(model, inputs, phase="sparse", sparsity=0.75)
    assert counts(found) == (16, 16, 1, 0)
    assert all(r.active * 4 == r.shape[0] * r.shape[1] for r in found.rows)
    assert {left.weight for left in found.left_alone} >= {"token_embedding.weight", "head.weight"}


@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
def test_checkpointed_regions_are_seen(recompute: str) -> None:
    found = inspect(Net(recompute=recompute), torch.randn(3, 16))
    assert (found.weights, found.rewritten) == (4, 4)
    assert {r.after for r in found.rows} == {"fxresu.linear"}
    assert all("fxresu.gather" in r.executed.backward for r in found.rows)


def test_reasons_and_breaks() -> None:
    found = inspect(Odd(), torch.randint(5, (2, 3)))
    rows = {r.weight.split(".")[0]: r for r in found.rows}
    assert rows["first"].rewritten and rows["third"].rewritten
    assert rows["second"].reason == "no pass rewrites einsum"
    assert (rows["second"].before, rows["second"].after) == ("einsum", "einsum")
    assert "fxresu.gather" in rows["second"].executed.backward
    assert rows["unused"].reason == NEVER_READ
    assert (found.rewritten, found.markers_left) == (2, 1)
    assert found.captured == 3
    assert len(found.breaks) == 2
    user, branch = found.breaks
    assert "graph_break()" in user.reason and "test_inspection.py" in user.where and user.times == 1
    assert branch.reason == "control flow that depends on a tensor's value"
    assert "no pass rewrites einsum" in str(found) and "graph breaks:" in str(found)


def test_reads_outside_captured_graphs_are_told_apart() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = nn.Linear(8, 8), nn.Linear(8, 8)

        @torch._dynamo.disable
        def eagerly(self, x: Tensor) -> Tensor:
            return F.linear(x, self.outside.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.eagerly(self.inside(x))

    found = inspect(Skipping(), torch.randn(2, 8))
    assert {r.weight: r.reason for r in found.rows} == {"inside.weight": "", "outside.weight": READ_IN_EAGER}


def test_a_weight_read_twice_has_two_rows() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

    found = inspect(Twice(), torch.randn(2, 8))
    assert (found.weights, found.rewritten, len(found.rows)) == (1, 2, 2)


@pytest.mark.parametrize(
    ("options", "after", "forward"),
    [
        ({"candidates": 0.5}, "fxresu.linear_columns", ("index_select", "addmm")),
        ({"storage": "packed"}, "fxresu.linear_packed", ("fxresu.compose", "addmm")),
        (
            {"storage": "packed", "candidates": 0.5},
            "fxresu.linear_packed_columns",
            ("index_select", "fxresu.compose", "mm"),
        ),
    ],
)
@pytest.mark.parametrize("values", [True, False])
def test_other_forms_of_a_linear(options: dict, after: str, forward: tuple, values: bool) -> None:
    found = inspect(Net(width=128, hidden=128), torch.randn(2, 128), values=values, **options)
    assert {r.after for r in found.rows} == {after}
    assert {r.executed.forward for r in found.rows} == {forward}
    assert all(r.candidates_exact is (values or "candidates" not in options) for r in found.rows)


@pytest.mark.parametrize("storage", ["resident", "packed", "offload"])
@pytest.mark.parametrize("granularity", ["row", "layer", "2:4", "block:4x4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("candidates", [1.0, 0.5])
def test_shapes_without_values_are_those_with(
    storage: str, granularity: str, dtype: torch.dtype, candidates: float
) -> None:
    options = {"storage": storage, "granularity": granularity, "candidates": candidates}
    wide = {} if candidates == 1 else {"width": 128, "hidden": 128}
    real = fxresu.transform(Net(blocks=1, **wide).to(dtype), **options)
    shapes = meta_copy(real)
    predicted = enter_phase(shapes, state_of(shapes).plans[fxresu.Phase.RESU], 0.5)
    fxresu.set_phase(real, "resu")
    for name, managed in managed_weights(real).items():
        want, got = managed.entry, managed_weights(shapes)[name].entry
        for field in ("bits", "row_start", "columns", "anchor", "theta", "active", "active_start", "low", "host",
                      "panel", "panel_bits", "panel_start"):  # fmt: skip
            tensor, fake = getattr(want, field), getattr(got, field)
            assert (tensor is None) == (fake is None), field
            if tensor is not None and storage == "packed" and candidates < 1 and field in ("anchor", "theta"):
                assert tensor.dtype == fake.dtype and abs(tensor.numel() - fake.numel()) <= 0.2 * tensor.numel()
            elif tensor is not None:
                assert (tensor.shape, tensor.dtype) == (fake.shape, fake.dtype), field
        assert predicted[name].active == int(want.mask().sum())
        if candidates == 1:
            assert predicted[name].candidates == want.numel - predicted[name].active


def test_the_model_stays_as_it_was() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    for values in (True, False):
        inspect(model, torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), values=values)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not hasattr(type(model.blocks[0].up), "fxresu_base") and "_fxresu_model" not in vars(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("values", [True, False])
def test_a_transformed_model_keeps_its_phase_masks_and_compiled_functions(values: bool) -> None:
    model = fxresu.transform(Net(), sparsity=0.75, compile={"backend": "eager"})
    fxresu.set_phase(model, "sparse")
    model(torch.randn(3, 16))
    masks = {n: m.entry.bits.clone() for n, m in managed_weights(model).items()}
    entries = dict(model._compiled_call_impl.entries)
    found = inspect(model, torch.randn(3, 16), phase="resu", values=values)
    assert found.sparsity == 0.75 and found.rewritten == 4
    assert [r.active * 4 for r in found.rows] == [r.shape[0] * r.shape[1] for r in found.rows]
    assert fxresu.current_phase(model) == "sparse"
    assert model._compiled_call_impl.entries == entries
    assert all(torch.equal(masks[n], m.entry.bits) for n, m in managed_weights(model).items())


def test_real_masks_are_counted_where_the_model_has_them() -> None:
    model = fxresu.transform(Net(), granularity="global")
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(100)
    fxresu.set_phase(model, "sparse")
    for values in (True, False):
        found = inspect(model, torch.randn(3, 16), phase="sparse", values=values)
        rows = {r.weight: r for r in found.rows}
        assert rows["blocks.0.up.weight"].active > 500
        assert sum(r.active for r in found.rows) == 1024
        assert all(r.active_exact for r in found.rows)


def test_recompilations_are_counted() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = nn.Linear(8, 8), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x) * (2 if self.calls > 1 else 1)

    found = inspect(Counting(), torch.randn(2, 8))
    assert (found.captured, found.recompiles, len(found.rows)) == (1, 1, 1)


def test_graphs_are_kept_on_request() -> None:
    assert not inspect(Net(blocks=1), torch.randn(2, 16)).graphs
    (graph,) = inspect(Net(blocks=1), torch.randn(2, 16), keep_graphs=True).graphs
    assert [s.name for s in graph.stages] == ["captured", "rewrite_linear", "discard_activations", "choose_kernels"]
    before, after = ([n.op for n in s.nodes] for s in graph.stages[:2])
    assert before.count("managed") == 2 and "fxresu.linear" not in before
    assert after.count("fxresu.linear") == 2 and "managed" not in after


def test_dict_is_json() -> None:
    found = inspect(Net(), {"x": torch.randn(2, 16)}, phase="predict")
    data = json.loads(json.dumps(found.to_dict()))
    assert data["phase"] == data["plan"]["phase"] == "predict"
    assert (data["rewritten"], data["weights"], len(data["rows"])) == (4, 4, 4)
    assert data["engines"]["addmm"] == "CPU BLAS"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phase": "prunning"}, "phase='prunning'"),
        ({"sparsity": 1.5}, "sparsity=1.5"),
        ({"inputs": None}, "inputs=None"),
        ({"granularity": "rows"}, "granularity='rows'"),
        ({"include": "nothing.*"}, "include='nothing.\\*'"),
    ],
)
@pytest.mark.parametrize("values", [True, False])
def test_bad_arguments(arguments: dict, message: str, values: bool) -> None:
    arguments = {"inputs": torch.randn(2, 16), **arguments}
    with pytest.raises(ConfigError, match=message):
        inspect(Net(), arguments.pop("inputs"), values=values, **arguments)


def test_bad_combinations() -> None:
    x = torch.randn(2, 16)
    with pytest.raises(ConfigError, match="transformed already"):
        inspect(fxresu.transform(Net()), x, granularity="layer")
    with pytest.raises(ConfigError, match="meta device"):
        inspect(Net().to("meta"), x, values=True)
    with pytest.raises(InspectionError, match="the forward of Net raised RuntimeError"):
        inspect(Net(), torch.randn(2, 7))


def test_a_model_that_needs_values_says_so() -> None:
    class Valued(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (2 if x.sum().item() > 0 else 1)

    assert inspect(Valued(), torch.randn(2, 8)).rewritten >= 1
    with pytest.raises(InspectionError, match="values=True"):
        inspect(Valued(), torch.randn(2, 8), values=False)


def test_fold_stands_for_exactly_its_names() -> None:
    names = ["h.0.a.w", "h.1.a.w", "h.2.a.w", "h.0.b.w", "x.w", "h.5.b.w"]
    assert fold(names) == [("h.{0..2}.a.w", [0, 1, 2]), ("h.{0,5}.b.w", [3, 5]), ("x.w", [4])]
    assert fold(["l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1"]) == [("l.{0..1}.e.{0..1}", [0, 1, 2, 3])]
    assert fold(["l.0.e.0", "l.0.e.1", "l.1.e.0"]) == [("l.0.e.{0..1}", [0, 1]), ("l.1.e.0", [2])]
    assert fold(["conv1.weight", "conv2.weight"]) == [("conv1.weight", [0]), ("conv2.weight", [1])]


def test_text_folds_blocks_and_fits_the_terminal() -> None:
    found = inspect(Net(), torch.randn(2, 16))
    text, every, narrow = render(found), render(found, every=True), render(found, width=100)
    assert "blocks.{0..1}.up.weight" in text and "x2" in text
    assert "blocks.0.up.weight" in every and "blocks.1.up.weight" in every
    assert "…" not in text
    assert max(len(line) for line in table_of(narrow)) <= 100 < max(len(line) for line in table_of(text))


def table_of(text: str) -> list[str]:
    """Lines of the table of weights."""
    return text.split("\n\n")[1].split("executes:")[0].splitlines()


def test_transfers_are_shown_where_the_plan_calls_state_back() -> None:
    plans = {"resu": PhasePlan(Phase.RESU, "resu", optimizer_state="pinned")}
    found = inspect(Net(blocks=1), torch.randn(2, 16), keep_graphs=True, plans=plans)
    (stage,) = [g.stage("insert_transfers") for g in found.graphs]
    marked = [n for n in stage.nodes if n.mark == "transfer"]
    assert [n.op for n in marked] == ["fxresu.restore_begin", "fxresu.restore_end"]
    assert next(p for p in found.passes if p.name == "insert_transfers").matches == 2
    assert "insert_transfers" in str(found)
    assert next((r.phase for r in found.memory if r.component == "optimizer state"), 0) == 0
    plans = {"resu": PhasePlan(Phase.RESU, "resu", optimizer_state="compress")}
    half = inspect(Net(blocks=1), torch.randn(2, 16), plans=plans)
    row = next(r for r in half.memory if r.component == "optimizer state")
    assert row.plain / 4 < row.phase < row.plain / 3.8
