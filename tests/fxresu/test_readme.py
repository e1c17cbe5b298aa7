"""What the README shows runs, and the figures it quotes are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("resurrected") == 2 and "managed weights" in printed
    assert (tmp_path / "run" / "checkpoint" / "state.json").exists()


def test_the_commands_exist() -> None:
    from fxresu.cli import main

    assert main(["inspect", "demo", "--expect", "16"]) == 0
    for script in ("tools/demo", "tools/test", ".ci/run"):
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"


def test_the_benchmark_table_is_the_committed_result() -> None:
    cases = json.loads((ROOT / "tools/bench/results/model_124M.json").read_text())["cases"]
    whole = cases["dense/AMP/compiled"]["peak_allocated_bytes"]
    for name, row in cases.items():
        dense = cases[f"dense/{name.split('/')[1]}/compiled"]
        speed = min(dense["median_ms"], dense["graph"]["median_ms"]) / row["median_ms"]
        times = f"{row['median_ms']:.1f} ({row['p10_ms']:.1f} to {row['p90_ms']:.1f})"
        peak = row["peak_allocated_bytes"]
        line = f"| `{name}` | {times} | {speed:.2f}x | {peak / 1e9:.2f} | {peak / whole:.2f}x |"
        assert line in README.splitlines(), line


def test_figures_in_its_sentences_are_the_committed_results() -> None:
    text = " ".join(README.split())

    def cases(name: str) -> dict:
        return json.loads((ROOT / f"tools/bench/results/{name}.json").read_text())["cases"]

    found, sparse = cases("semistructured"), []
    for precision in ("AMP", "bf16"):
        dense, own = (found[f"{name}/{precision}"] for name in ("dense", "sparse, 2:4, cusparselt"))
        best = [min(row["median_ms"], row["graph"]["median_ms"]) for row in (dense, own)]
        sparse.append(f"{best[0] / best[1]:.2f}x")
    assert f"tensor cores: {sparse[0]} of dense under autocast, {sparse[1]} in bfloat16" in text
    for run, precision, variant, between in (
        ("H200", "AMP", "8bit/offload/tiled", "of dense training under autocast with {} of its peak memory"),
        ("H200", "bf16", "8bit/tiled", "with {}, or recomputing"),
        ("lean", "bf16", "8bit/recompute@0.7/tiled", "with {}."),
    ):  # fmt: skip
        large = cases(f"model_1.24B_{run}")
        dense, own = large[f"dense/{precision}/compiled"], large[f"resu/{precision}/compiled/a=0.25/frozen/{variant}"]
        speed = min(dense["median_ms"], dense["graph"]["median_ms"]) / own["median_ms"]
        share = own["peak_allocated_bytes"] / dense["peak_allocated_bytes"]
        assert f"at {speed:.2f}x {between.format(f'{share:.2f}')}" in text, variant
    for name, variant, within in (
        ("memory_6.7B_H200", "9 of 32 away, factored", "{:.1f}"),
        ("memory_1.24B_H200", "9 of 16 saved, factored", "{:.2f}"),
        ("memory_1.24B_busy", "8 of 16 saved, factored", "{:.2f}"),
    ):  # fmt: skip
        dense, own = (cases(name)[case] for case in ("dense/bf16", f"fxresu/streamed, {variant}"))
        assert f"within {within.format(own['peak_device_bytes'] / 1e9)} GB" in text
        assert f"at {dense['median_ms'] / own['median_ms']:.2f}x" in text
        assert f"({dense['peak_device_bytes'] / 1e9:.1f} GB)" in text


def test_the_controls_are_the_committed_result() -> None:
    result = json.loads((ROOT / "tools/bench/results/controls_cpu.json").read_text())
    for runs in result["variants"].values():
        for run in runs:
            end = f"| {run['seed']} |", f"| {run['after_commit']:.3f} | {run['end']:.3f} |"
            assert any(end[0] in line and line.endswith(end[1]) for line in README.splitlines()), end


def test_the_demos_tables_are_the_committed_report() -> None:
    from fxresu.memory_bill import MemoryBill
    from fxresu.report import PhaseRow, phase_table

    report = json.loads((ROOT / "tools/bench/results/demo_cpu.json").read_text())
    assert phase_table([PhaseRow(**row) for row in report["phases"]]) in README
    bill = MemoryBill.from_dict(report["memory"]["bill"])
    _, table, _ = str(bill).split("\n\n")
    assert table in README and bill.basis == "predicted" and "unaccounted, host" in table


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
