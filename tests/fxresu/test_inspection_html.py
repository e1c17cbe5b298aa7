"""The inspector's page in a real browser, and what is put into it."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch
from torch import nn

import fxresu
from fxresu.errors import ConfigError
from fxresu.inspection_diff import changes
from fxresu.inspection_html import document, fragment, page_data
from fxresu.models import load_model

HOSTILE = "</script><img src=x onerror=alert(1)>"


class Odd(nn.Module):
    """A rewritten, an unknown and an unread consumer, and a graph break between the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return torch.einsum("bj,kj->bk", x, self.second.weight)


class Long(nn.Module):
    """All operations in one module: a graph without any hierarchy."""

    def __init__(self, operations: int) -> None:
        super().__init__()
        self.operations, self.inner = operations, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        for _ in range(self.operations // 2):
            x = x.sin() + 1
        return x


@pytest.fixture(scope="module")
def demo() -> fxresu.PhaseInspections:
    model, inputs = load_model("demo", seq_len=8)
    return fxresu.inspect_phases(model, inputs, candidates=0.25, values=False, keep_graphs=True)


@pytest.fixture
def opened(demo, tmp_path, open_page):
    path = tmp_path / "demo.html"
    demo.save_html(path)
    return open_page(path).page


def boxes(page, kind: str = "") -> list[str]:
    """Texts of the boxes drawn."""
    return page.locator(f"#canvas .box{kind}").evaluate_all(
        "all => all.map(box => [...box.querySelectorAll('text')].map(t => t.textContent).join('|'))"
    )


def test_page_opens_on_the_resu_phase_and_answers_in_short(opened) -> None:
    assert opened.title() == "GPT: fxresu inspect"
    assert opened.locator("#phases button").count() == 6
    assert opened.locator('#phases [aria-selected="true"]').inner_text().startswith("resu\n16/16 rewritten\nmemory -")
    cards = opened.locator("#answers").inner_text()
    assert "16 of 16" in cards and "linear → fxresu.linear_columns" in cards
    assert "3 large parameters not managed" in cards and "3 × embedding, or tied to one" in cards
    assert re.search(r"activations kept for the backward\s+[\d.]+ .?B\s+[\d.]+ .?B", cards)
    table = opened.locator("#table").inner_text()
    assert "blocks.{0..3}.mlp.up.weight ×4" in table and "1024x256" in table


def test_tree_expands_and_chooses_what_is_drawn(opened) -> None:
    tree = opened.locator("#tree")
    assert tree.locator('[data-fqn="blocks.0"]').get_attribute("aria-selected") == "true"
    assert tree.locator('[data-fqn="blocks.1.mlp"]').count() == 0
    tree.locator('[data-fqn="blocks.1"] .twist').click()
    assert tree.locator('[data-fqn="blocks.1.mlp"]').count() == 1
    tree.locator('[data-fqn="blocks.1.mlp"]').click()
    assert [b.split("|")[0] for b in boxes(opened)] == ["fxresu.linear_columns", "gelu", "fxresu.linear_columns"]
    tree.locator('[data-fqn="blocks.1"] > .twist').click()
    assert tree.locator('[data-fqn="blocks.1.mlp"]').count() == 0


def test_phase_and_pass_switch_the_graph(opened) -> None:
    opened.locator('#tree [data-fqn="blocks.0"]').click()
    assert [b.split("|")[:2] for b in boxes(opened, ".rewritten")] == [
        ["fxresu.linear_columns", f"{name}.weight"] for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    ]
    assert any("not kept" in b for b in boxes(opened))
    passes = opened.locator("#ticks button").all_inner_texts()
    opened.locator("#slider").focus()
    for name in passes[-2:0:-1]:
        opened.keyboard.press("ArrowLeft")
        assert opened.locator("#ticks .on").inner_text() == name
    assert name == "rewrite_linear"
    assert {b.split("|")[0] for b in boxes(opened, ".rewritten.new")} == {"fxresu.linear"}
    assert "− %linear" in opened.locator("#diff").inner_text()
    opened.keyboard.press("ArrowLeft")
    assert not boxes(opened, ".rewritten")
    assert len(boxes(opened, ".reads")) == len(boxes(opened, ".marker")) == 4
    opened.locator('#phases [data-phase="predict"]').click()
    assert opened.locator('#phases [aria-selected="true"]').get_attribute("data-phase") == "predict"
    assert len(boxes(opened, ".cast")) > 8
    opened.locator("#ticks button", has_text="discard_activations").click()
    assert "discard_activations: " in opened.locator("#pass").inner_text()
    opened.locator("#ticks button").last.click()
    assert not any("keeps" in b for b in boxes(opened))
    opened.locator('#phases [data-phase="predict"]').press("ArrowRight")
    assert opened.locator('#phases [aria-selected="true"]').get_attribute("data-phase") == "correct"


def test_a_node_and_a_row_show_their_details(opened) -> None:
    opened.locator("#table tbody tr").nth(2).click()
    details = opened.locator("#details").inner_text()
    assert "blocks.0.mlp.up.weight" in details and "models.py:" in details
    assert "rewrite_linear → fxresu.linear; discard_activations → fxresu.linear_columns" in details
    assert "one candidate" in details and "fxresu.linear_columns, chosen" in details
    assert opened.locator("#canvas .chosen").count() == 1
    opened.locator("#canvas .box", has_text="layer_norm").first.click()
    assert "discarded" in opened.locator("#details").inner_text()


def test_parts_open_in_place(opened) -> None:
    opened.locator('#tree [data-fqn=""]').click()
    opened.evaluate("state.expanded = new Set(); drawGraph()")
    (blocks,) = [b for b in boxes(opened, ".group") if b.startswith("blocks")]
    assert "16 rewritten" in blocks
    opened.locator("#canvas .group", has_text="blocks").click()
    assert [b.split("  ")[0] for b in boxes(opened, ".group") if b.startswith("blocks")] == [
        f"blocks.{i}" for i in range(4)
    ]
    opened.get_by_text("close all parts").click()
    assert len(boxes(opened, ".group")) < 6


def test_what_was_not_rewritten_is_told(tmp_path, open_page) -> None:
    found = fxresu.inspect_phases(Odd(), torch.randn(2, 8), phases=["sparse"], keep_graphs=True)
    found.save_html(tmp_path / "odd.html")
    page = open_page(tmp_path / "odd.html").page
    assert "bad" in page.locator("#answers .big").first.get_attribute("class")
    reasons = page.locator("#reasons").inner_text()
    for said in ("no pass rewrites einsum", "never read in this phase's graph", "graph break ×1", "second.weight"):
        assert said in reasons
    page.locator('#tree [data-fqn=""]').click()
    assert [b.split("|")[0] for b in boxes(page, ".reads")] == ["einsum"]


def test_names_from_the_model_stay_text(tmp_path, open_page) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model.add_module("x" + HOSTILE.replace(".", ""), nn.Linear(8, 8))
    forward = lambda x: model["a"](x)  # noqa: E731
    model.forward = forward
    found = fxresu.inspect_phases(model, torch.randn(2, 8), phases=["dense"], keep_graphs=True)
    found.save_html(tmp_path / "hostile.html")
    page = open_page(tmp_path / "hostile.html").page
    assert HOSTILE in page.locator("#tree").inner_text()
    assert page.locator("img").count() == 0


def test_ten_thousand_nodes_stay_usable(tmp_path, open_page) -> None:
    found = fxresu.inspect_phases(Long(10_000), torch.randn(2, 8), phases=["sparse"], values=False, keep_graphs=True)
    (graph,) = found["sparse"].graphs
    assert len(graph.stages[-1].nodes) > 10_000
    found.save_html(tmp_path / "long.html")
    assert (tmp_path / "long.html").stat().st_size < 10e6
    start = time.perf_counter()
    page = open_page(tmp_path / "long.html").page
    assert "boxes 1 to 200 of 10,001" in page.locator("#path").inner_text().replace("10001", "10,001")
    page.locator("#later").click()
    assert len(boxes(page)) == 200
    page.locator("#slider").focus()
    page.keyboard.press("ArrowLeft")
    # 2 s on an idle core; a page that drew or searched everything on each click would take minutes.
    assert time.perf_counter() - start < 20


def test_nodes_are_stored_once_and_figures_agree_with_the_data(demo) -> None:
    data = page_data(demo)
    assert len({json.dumps(n) for n in data["nodes"]}) == len(data["nodes"])
    for p, found in zip(data["phases"], demo):
        assert (p["phase"], p["rewritten"]) == (found.phase, 16)
        stages = p["graphs"][0]["stages"]
        assert [s[0] for s in stages] == [s.name for s in found.graphs[0].stages]
        for (_, runs), stage in zip(stages, found.graphs[0].stages):
            ids = [i for start, n in zip(runs[::2], runs[1::2]) for i in range(start, start + n)]
            names = [data["texts"][data["nodes"][i][0]] for i in ids]
            assert names == [n.name for n in stage.nodes if n.op != "weight"]


def test_page_and_text_agree_on_what_a_pass_changed(demo, opened) -> None:
    for p, found in enumerate(demo):
        (graph,) = found.graphs
        for s in range(1, len(graph.stages)):
            seen = opened.evaluate(
                f"(state.phase = {p}, state.stage = {s}, phase().graphs.flatMap(changes).map(([c, n]) => c + n.name))"
            )
            want = [c.sign + c.node.name for c in changes(graph.stages[s - 1], graph.stages[s]) if c.sign in "+-"]
            assert sorted(text.replace("−", "-") for text in seen) == sorted(want)


def test_graphs_are_needed() -> None:
    found = fxresu.inspect_phases(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8), phases=["dense"])
    with pytest.raises(ConfigError, match="keep_graphs=True"):
        document(found)


def test_notebooks_get_tables_without_scripts(demo) -> None:
    html = demo["resu"]._repr_html_()
    assert html == fragment((demo["resu"],))
    assert "16 of 16 consumers rewritten" in html and "linear → fxresu.linear_columns" in html
    assert "not managed: embedding, or tied to one" in html
    assert "<script" not in html
    assert demo._repr_html_().count("<table>") == 6
