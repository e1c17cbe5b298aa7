"""The inspector's other views: diffs of passes, graphs after a pass, explanations, phases, and what a step saves."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import time
from pathlib import Path

import pytest
import torch
from fxresu_testing import Net
from torch import nn
from torch.fx import Graph, GraphModule

import fxresu
from fxresu.errors import ConfigError
from fxresu.graph_view import Names, NodeView, Stage, Viewer
from fxresu.inspection_diff import after_text, changes, diff_text, hunks
from fxresu.inspection_explain import explain
from fxresu.inspection_text import render, render_phases, size
from fxresu.models import load_model
from fxresu.passes import CONSIDERED, DEFAULT_PASSES, Considered, Pass, PassResult

DOCS = Path(__file__).resolve().parents[2] / "docs"
LLAMA_1B = (
    "hf:llama?hidden_size=2048&intermediate_size=8192&num_hidden_layers=16&num_attention_heads=32"
    "&num_key_value_heads=8&vocab_size=128256"
)


@pytest.fixture(scope="module")
def predict() -> fxresu.Inspection:
    model, inputs = load_model("demo", seq_len=8)
    return fxresu.inspect(model, inputs, phase="predict", values=False, keep_graphs=True)


@pytest.fixture(scope="module")
def columns() -> fxresu.PhaseInspections:
    x = torch.randn(8, 256)
    return fxresu.inspect_phases(Net(256, 512), x, phases=["sparse", "resu", "predict"], candidates=0.25)


# ----------------------------------------------------------------------------------------------------------------- diff


def test_diff_shows_each_pass_with_repeated_blocks_once(predict: fxresu.Inspection) -> None:
    text = diff_text(predict)
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("pass ")] == [
        f"pass {p.name}" for p in predict.passes
    ]
    assert text.count("@ blocks.{0..3}.mlp.up  x4") == 2  # rewritten, and cast
    assert "blocks.3" not in text
    rewriting = diff_text(predict, "rewrite_linear")
    lines = rewriting.split("@ blocks.{0..3}.mlp.up  x4\n")[1].split("\n\n")[0].splitlines()
    assert [line[:2] for line in lines] == ["  ", "- ", "- ", "+ ", "~ "]
    assert "= linear(" in lines[2] and "= fxresu.linear(" in lines[3] and "blocks.0.mlp.up.weight" in lines[3]


def test_diff_without_context_of_one_part(predict: fxresu.Inspection) -> None:
    text = diff_text(predict, "insert_casts", only_changed=True, module="blocks.1.mlp")
    body = text.splitlines()[1:]
    assert {line[:1] for line in body if line} == {"@", "+", "-"}
    assert all(line[2:].startswith("blocks.1.mlp") for line in body if line.startswith("@"))
    assert "aten.to.dtype(blocks.1.mlp.up.weight, bf16) -> bf16[1024, 256]" in text


def test_colours_only_repeat_what_the_signs_say(predict: fxresu.Inspection) -> None:
    plain, coloured = diff_text(predict, "rewrite_linear"), diff_text(predict, "rewrite_linear", colour=True)
    assert "\x1b" not in plain
    for line in coloured.splitlines():
        assert line.startswith("\x1b[31m") == (line.removeprefix("\x1b[31m").startswith("- "))
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain


def test_after_lists_the_graph_and_only_what_is_new(predict: fxresu.Inspection) -> None:
    whole = after_text(predict, "insert_casts", module="blocks.0")
    assert whole.count("+ rewritten") == 4 and "scaled_dot_product_attention" in whole and "keeps" in whole
    new = after_text(predict, "insert_casts", module="blocks.0", only_changed=True)
    assert "aten.to.dtype" in new and "= gelu" not in new and "= gelu" in whole
    captured = after_text(predict, "captured", module="blocks.0.mlp")
    assert "- reads" in captured and "~ marker" in captured and "fxresu.linear" not in captured


def test_views_are_methods_too(predict: fxresu.Inspection, columns: fxresu.PhaseInspections) -> None:
    assert predict.diff("insert_casts", module="blocks.0") == diff_text(predict, "insert_casts", module="blocks.0")
    assert predict.after("captured", module="norm") == after_text(predict, "captured", module="norm")
    assert str(predict.explain("blocks.0.mlp.up")) == str(explain((predict,), "blocks.0.mlp.up"))
    assert columns.explain("blocks.1.up") == explain(columns, "blocks.1.up")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: diff_text(f, "insert_cast"), "did you mean insert_casts"),
        (lambda f: diff_text(f, "captured"), "before all passes"),
        (lambda f: after_text(f, "nothing"), "captured or one of rewrite_linear, insert_casts"),
        (lambda f: diff_text(f, module="block.0"), "module 'block.0'.*did you mean blocks.0"),
        (lambda f: diff_text(dataclasses.replace(f, graphs=()), "insert_casts"), "keep_graphs=True"),
    ],
)
def test_bad_names(predict: fxresu.Inspection, call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(predict)


def stage(*nodes: tuple[str, str, str]) -> Stage:
    return Stage("s", tuple(NodeView(name, op, call=call) for name, op, call in nodes))


def test_changes_tell_gone_come_rewired_and_changed_apart() -> None:
    before = stage(("a", "f", ""), ("b", "g", "%a"), ("c", "h", "%b"), ("d", "k", "%c, 1"), ("e", "m", ""))
    after = stage(("a", "f", ""), ("n", "g2", "%a"), ("c", "h", "%n"), ("d", "k", "%c, 2"))
    found = [(c.sign, c.node.name) for c in changes(before, after)]
    assert found == [(" ", "a"), ("+", "n"), ("-", "b"), ("~", "c"), ("-", "d"), ("+", "d"), ("-", "e")]
    assert changes(before, before) == [type(changes(before, after)[0])(" ", n) for n in before.nodes]
    assert list(hunks(changes(before, before))) == []


def test_a_change_of_every_place_reappears_in_the_stages() -> None:
    """Applying a diff to the stage before gives the stage after, for every pass of a model with everything in it."""
    model, inputs = load_model("demo", seq_len=8)
    for phase in ("resu", "predict"):
        found = fxresu.inspect(model, inputs, phase=phase, values=False, candidates=0.25, keep_graphs=True)
        (graph,) = found.graphs
        for before, after in zip(graph.stages, graph.stages[1:]):
            kept = [c.node for c in changes(before, after) if c.sign != "-"]
            assert kept == list(after.nodes)
            gone = {c.node.name for c in changes(before, after) if c.sign == "-"}
            assert gone >= {n.name for n in before.nodes} - {n.name for n in after.nodes}


# -------------------------------------------------------------------------------------------------------------- explain


def test_explanation_tells_node_passes_casts_bytes_and_candidates(columns: fxresu.PhaseInspections) -> None:
    text = str(explain(columns, "blocks.1.up"))
    assert text.startswith("blocks.1.up.weight  512x256")
    sparse, resu, predict = (part for part in text.split("\n\n")[1:])
    assert sparse.startswith("sparse: linear -> fxresu.linear\n")
    assert "passes    rewrite_linear -> fxresu.linear; discard_activations -> fxresu.linear_columns" in resu
    # plain: 8 x 256 floats; RESU: 64 columns of them, and the index of those columns in int64
    assert "keeps     2.05 kB for the backward; plain, 8.19 kB; 6.14 kB discarded (-75%)" in resu
    assert "casts     input f32 -> bf16; weight f32 -> bf16; bias f32 -> bf16; result bf16 -> f32" in predict
    assert "the phase has no backward" in predict
    assert resu.count("one candidate") == 1 and "chosen" in resu
    assert re.search(r"mm +chosen +- +met\n", sparse) and re.search(r"grad_gather +- +mode=sparse: ", sparse)
    data = json.loads(json.dumps(explain(columns, "blocks.1.up").to_dict()))
    assert data["phases"]["resu"][0]["considered"] == [
        {"name": "fxresu.linear_columns", "reason": "", "microseconds": None, "chosen": True}
    ]


def test_what_is_not_managed_is_explained_too(columns: fxresu.PhaseInspections) -> None:
    assert str(explain(columns, "head")) == "head.weight  5x256\nnot managed: output head"


@pytest.mark.parametrize(
    ("name", "message"),
    [("blocks.1.op.weight", "did you mean blocks.1.up.weight"), ("up", "2 parameters fit: blocks.0.up.weight, ")],
)
def test_unknown_and_ambiguous_weights(columns: fxresu.PhaseInspections, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        explain(columns, name)


def test_candidates_that_a_pass_weighed_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed = (
        Considered("tiled", "", 12.5, True), Considered("gemv", "more than 16 tokens"), Considered("aten", "", 20.0),
    )  # fmt: skip

    def choose(graph, plan) -> PassResult:
        nodes = [n for n in graph.module.graph.nodes if "fxresu.linear" in str(n.target)]
        for node in nodes:
            node.meta[CONSIDERED] = weighed
        return PassResult(len(nodes))

    passes = (*DEFAULT_PASSES, Pass("choose", choose))
    monkeypatch.setattr("fxresu.runner.configured_passes", lambda kernels, graphed: passes)
    found = fxresu.inspect_phases(Net(), torch.randn(2, 16), phases=["resu"])
    assert found["resu"].rows[0].considered == weighed
    text = str(explain(found, "blocks.0.up"))
    table = [line.split() for line in text[text.index("3 candidates") :].splitlines()]
    assert table[2] == ["tiled", "chosen", "12.5", "us", "met"]
    assert table[3] == ["gemv", "-", "more", "than", "16", "tokens"]


# --------------------------------------------------------------------------------------------------------------- phases


def test_phases_have_a_column_each_and_reasons_below() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bj,kj->bk", self.first(x), self.second.weight)

    found = fxresu.inspect_phases(Odd(), torch.randn(2, 8))
    assert [p.phase for p in found] == list(fxresu.Phase)
    text = render_phases(found)
    lines = [line.split() for line in text.splitlines() if line.startswith(("first", "second", "weight "))]
    rows = {line[0]: line for line in lines}
    assert rows["weight"][2:] == [str(p) for p in fxresu.Phase]
    assert rows["first.weight"][2:] == ["linear"] * 4 + ["linear", "in", "bf16"] + ["linear"]
    assert rows["second.weight"][2:] == ["einsum", "(1)"] * 6
    assert "(1) no pass rewrites einsum" in text
    assert str(found) == text


def test_equal_plans_are_captured_once_and_named_each() -> None:
    x = torch.randn(2, 16)
    found = fxresu.inspect_phases(Net(), x, phases=["warmup", "dense"])
    assert found["warmup"].seconds == found["dense"].seconds
    assert [p.phase for p in found] == ["warmup", "dense"]
    with pytest.raises(KeyError, match="these were: warmup, dense"):
        found["resu"]
    with pytest.raises(ConfigError, match="phase='later'"):
        fxresu.inspect_phases(Net(), x, phases=["later"])
    with pytest.raises(ConfigError, match="at least one"):
        fxresu.inspect_phases(Net(), x, phases=[])


def test_only_changed_leaves_out_what_stayed() -> None:
    found = fxresu.inspect(Net(), torch.randn(2, 16), phase="resu")
    whole, changed = render(found), render(found, only_changed=True)
    assert "discard_activations" in whole and "discard_activations" not in changed
    assert "not managed:\n" in whole and "not managed:\n" not in changed
    assert "blocks.{0..1}.up.weight" in changed


# --------------------------------------------------------------------------------------------------------------- memory


def kept_in_eager(call, model: nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes of the storages that autograd saves in one eager forward, without parameters and the inputs."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs)}
    found: dict[int, int] = {}
    alive = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        alive.append(t)
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(inputs[0])
    return sum(found.values())


def activations(found: fxresu.Inspection) -> tuple[int | None, int | None]:
    (row,) = [m for m in found.memory if m.component.startswith("activations")]
    return row.plain, row.phase


@pytest.mark.parametrize("recompute", ["", "non-reentrant"])
@pytest.mark.parametrize(
    ("storage", "autocast"), [("resident", False), ("resident", True), ("packed", False), ("offload", True)]
)
def test_plain_activations_are_what_eager_training_saves(recompute: str, autocast: bool, storage: str) -> None:
    x, model = torch.randn(8, 128), Net(128, 256, recompute=recompute)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = kept_in_eager(model, model, x)
        for phase, values in (("dense", True), ("resu", True), ("resu", False), ("predict", False)):
            found = fxresu.inspect(model, x, phase=phase, storage=storage, values=values)
            plain, now = activations(found)
            assert found.memory_unknown == ""
            assert plain == want
            assert now == 0 if phase == "predict" else now <= want


@pytest.mark.parametrize(
    "spec",
    ["hf:bert?num_hidden_layers=1&hidden_size=32&intermediate_size=64&num_attention_heads=2&vocab_size=50",
     "hf:gpt2?n_layer=1&n_embd=32&n_head=2&vocab_size=50"],
)  # fmt: skip
def test_plain_activations_of_models_with_dropout_and_conv1d(spec: str) -> None:
    model, inputs = load_model(spec, seq_len=8)
    with torch.random.fork_rng():
        want = kept_in_eager(lambda _: inputs.call(model), model, *inputs.kwargs.values())
    assert activations(fxresu.inspect(model, inputs, phase="sparse")) == (want, want)


def test_branches_leave_the_activations_unknown() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.inner(x)
            return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))

    found = fxresu.inspect(Branching(), torch.randn(2, 8))
    assert activations(found) == (None, None)
    assert "the graph has a cond" in found.memory_unknown
    assert found.rewritten == 1


def test_graphs_that_open_a_transform_are_counted() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.func.vmap(lambda row: row.sin() * row)(self.inner(x))

    model, x = Mapped(), torch.randn(4, 8)
    want = kept_in_eager(model, model, x)
    assert want > 0 and activations(fxresu.inspect(model, x, phase="sparse")) == (want, want)


def test_components_add_up_from_shapes(columns: fxresu.PhaseInspections) -> None:
    rows = {m.component: (m.plain, m.phase) for m in columns["resu"].memory}
    weights = 2 * 2 * 256 * 512  # two blocks of two
    theta = 2 * (512 * 64 + 256 * 128)  # a quarter of the columns
    assert rows["managed weights"] == (4 * weights, 4 * weights)
    assert rows["gradients"] == (4 * weights, 4 * theta)
    assert rows["optimizer state"] == (8 * weights, 0)
    assert rows["θ's moments"] == (0, 8 * theta)
    assert rows["masks and their indices"][1] == weights // 8 + 2 * (8 * (512 + 256) + 4 * (64 + 128))
    plain, now = rows["activations kept for the backward"]
    # what only the linears need shrinks to a quarter
    assert plain - now == 2 * 3 * 4 * 8 * (256 + 512) // 4
    assert ("θ's moments", 8 * theta) in [(m.component, m.phase) for m in columns["predict"].memory]


@pytest.mark.parametrize("storage", ["resident", "packed", "offload"])
@pytest.mark.parametrize("phase", ["sparse", "resu", "predict"])
def test_memory_from_shapes_is_memory_from_values(storage: str, phase: str) -> None:
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        real, shapes = (fxresu.inspect(Net(), x, phase=phase, storage=storage, values=v) for v in (True, False))
    assert real.memory == shapes.memory


def test_offloaded_weights_need_autocast_as_in_training() -> None:
    with pytest.raises(ConfigError, match="storage='offload'.*bfloat16 autocast"):
        fxresu.inspect(Net(), torch.randn(2, 16), storage="offload")


def test_unknown_activations_are_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxresu import kept

    def fails(*args: object) -> None:
        raise NotImplementedError("no fake for this")

    monkeypatch.setattr(kept._Run, "run", fails)
    found = fxresu.inspect(Net(), torch.randn(2, 16))
    assert activations(found) == (None, None)
    assert found.rows[0].kept is None
    assert "activations unknown: NotImplementedError: no fake for this" in str(found)
    assert "unknown" in found._repr_html_()


def test_sizes_have_three_digits() -> None:
    texts = {0: "0 B", 999: "999 B", 1000: "1.00 kB", 12_345: "12.3 kB", 999_499: "999 kB", 999_500: "1.00 MB"}
    assert {n: size(n) for n in texts} == texts
    assert (size(123_456_789_012), size(None)) == ("123 GB", "unknown")


# ---------------------------------------------------------------------------------------------------------------- graph


def test_transfers_and_casts_are_marked() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    moved = graph.call_method("to", (x, "meta"))
    cast = graph.call_method("to", (moved, torch.bfloat16))
    graph.output(cast)
    x.meta["example_value"] = torch.empty(2, 3)
    moved.meta["example_value"] = torch.empty(2, 3, device="meta")
    cast.meta["example_value"] = torch.empty(2, 3, device="meta", dtype=torch.bfloat16)
    nodes = Viewer(Names({})).stage(GraphModule(nn.Module(), graph), "captured").nodes
    assert [(n.op, n.mark) for n in nodes] == [("input", ""), (".to", "transfer"), (".to", "cast"), ("output", "")]
    assert str(nodes[2]) == "%to_1 = .to(%to, bf16) -> bf16[2, 3]"


def test_nodes_know_their_module_also_inside_checkpoints_and_after_breaks() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = Net(recompute="non-reentrant"), nn.Linear(5, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x)
            torch._dynamo.graph_break()
            return self.last(x)

    found = fxresu.inspect(Broken(), torch.randn(2, 16), keep_graphs=True)
    assert found.captured == 2
    assert {r.module for r in found.rows} == {f"body.blocks.{i}.{n}" for i in (0, 1) for n in ("up", "down")} | {"last"}
    assert all(r.weight == f"{r.module}.weight" for r in found.rows)
    names = [n.name for g in found.graphs for n in g.stages[-1].nodes]
    known = {n.name for g in found.graphs for n in g.stages[-1].nodes}
    assert len(names) > 10
    assert all(o in known for g in found.graphs for n in g.stages[-1].nodes for o in n.operands)


# -------------------------------------------------------------------------------------------------------- documentation


def test_what_the_documentation_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (DOCS / "INSPECT.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"fxresu": fxresu, "model": Net(), "example_inputs": torch.randn(2, 16)}
    exec(compile(snippet, "INSPECT.md", "exec"), names)
    assert names["every"]["predict"].memory and (tmp_path / "model.html").stat().st_size > 10_000
    for image in re.findall(r"\]\((images/.*?)\)", (DOCS / "INSPECT.md").read_text(encoding="utf-8")):
        assert (DOCS / image).stat().st_size < 100_000


# -------------------------------------------------------------------------------------------------------------- targets


def test_llama_of_a_billion_parameters_in_all_phases_without_its_weights() -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    model, inputs = load_model(LLAMA_1B, device="meta")
    found = fxresu.inspect_phases(model, inputs)
    seconds = time.process_time() - start
    assert sum(p.numel() for p in model.parameters()) > 1e9
    assert [p.rewritten for p in found] == [112] * 6
    assert [len(p.breaks) for p in found] == [0] * 6
    assert activations(found["predict"])[1] == 0
    assert seconds < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # 1 GiB; the weights alone take 6
