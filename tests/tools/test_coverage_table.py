"""docs/MODELS.md is what was measured, every architecture of the zoo is in it, and it meets its targets."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
COVERAGE = ROOT / "tools" / "coverage"
MEASURED = json.loads((COVERAGE / "measured.json").read_text())


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"coverage_{name}", COVERAGE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render, records = _module("render"), _module("records")


def _architectures() -> list:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from fxresu_zoo import architectures

    return architectures()


def test_the_document_is_what_was_measured() -> None:
    done = subprocess.run([COVERAGE / "table", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_document_that_is_not_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "MODELS.md"
    out.write_text(render.document(MEASURED) + "and more\n")
    done = subprocess.run([COVERAGE / "table", "--check", "--out", out], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "run tools/coverage/table" in done.stderr
    subprocess.run([COVERAGE / "table", "--out", out], check=True)
    assert out.read_text() == render.document(MEASURED)


def test_targets() -> None:
    rows = MEASURED["rows"]
    assert len([name for name, row in rows.items() if row["group"] in ("transformers", "timm")]) >= 30
    done, managed = render.share_rewritten(rows)
    assert done >= 0.95 * managed > 0
    assert all(map(render.right, rows.values()))
    failed = {(n, u) for n, row in rows.items() for u, result in row["uses"].items() if result.startswith("failed")}
    # A graph break inside a region that is recomputed: torch.compile gives up the whole model, and fxresu says so.
    assert failed == {("Graph breaks", "checkpoint"), ("Graph breaks", "checkpoint, reentrant")}


def test_every_row_of_the_zoo_was_measured() -> None:
    assert list(MEASURED["rows"]) == [a.name for a in _architectures()]


def test_what_is_left_and_what_is_wrong_are_in_the_document() -> None:
    cell = {"managed": 3, "rewritten": 2, "consumers": 2, "graphs": 1, "breaks": 0, "compiles": 1, "error": 1e-7}
    cell["left"] = ["a.weight: no pass rewrites einsum"]
    whole = {"group": "torch", "backend": "aot_eager", "phases": dict.fromkeys(render.PHASES, cell)}
    whole["phases"] = {**whole["phases"], "predict": {**cell, "rewritten": 3, "left": []}}
    wrong = {"group": "torch", "backend": "inductor", "failed": "AssertionError: off", "uses": {"export": "failed: no"}}
    whole["uses"] = {"export": "", "meta": "ValueError: `x`"}
    text = render.document({"versions": {"torch": "2.13.0"}, "rows": {"A": whole, "B": wrong}})
    assert "2 architectures and situations; 11 of 15 managed weights" in text and "1 of 2 right" in text
    assert "| A | 3 | 2 2 2 3 2 | 1 | 0 | 1 | 1e-07 | 1e-07 |" in text
    assert "| A | `a.weight` | no pass rewrites einsum | dense, sparse, resu, correct |" in text
    assert "**wrong**: AssertionError: off" in text
    assert "| A | yes | (1) |" in text and "1. `ValueError: 'x'`" in text and "| B | **no** (2) |  |" in text


def test_rows_are_put_one_by_one(tmp_path: Path) -> None:
    path, versions = tmp_path / "m.json", {"torch": "2.13.0", "timm": "1.0"}
    records.put(path, versions, "B", {"uses": {"export": ""}, "phases": {"dense": {"managed": 1}}}, ["A", "B"])
    records.put(path, {"torch": "2.13.0"}, "A", {"uses": {}}, ["A", "B"])
    records.put(path, versions, "B", {"uses": {"meta": ""}}, ["A", "B"])
    found = records.load(path)
    assert list(found["rows"]) == ["A", "B"] and found["versions"] == versions
    assert found["rows"]["B"] == {"uses": {"export": "", "meta": ""}, "phases": {"dense": {"managed": 1}}}
    records.put(path, {"torch": "2.14.0"}, "A", {"uses": {}}, ["A", "B"])
    assert records.load(path) == {"versions": {"torch": "2.14.0", "timm": "1.0"}, "rows": {"A": {"uses": {}}}}


def test_measuring_a_row(tmp_path: Path) -> None:
    out = tmp_path / "m.json"
    options = ["--only", "Experts by*", "--what", "phases", "export", "--out", out]
    done = subprocess.run([sys.executable, COVERAGE / "measure", *options], capture_output=True, text=True, check=True)
    assert "Experts by bmm and baddbmm: measured" in done.stdout
    (row,) = records.load(out)["rows"].values()
    assert row["uses"] == {"export": ""} and render.right(row)
    assert row["phases"]["resu"]["rewritten"] == row["phases"]["resu"]["managed"] == 3
