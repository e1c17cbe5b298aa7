"""The scripts in tools/examples run, stop, resume, and end where the undisturbed run ends."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "tools" / "examples"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def run(monkeypatch: pytest.MonkeyPatch, name: str, *options: object) -> list[str]:
    """Lines that the example prints about its stages."""
    monkeypatch.setattr(sys, "argv", [name, "--no-compile", *map(str, options)])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return [line for line in printed.getvalue().splitlines() if line.startswith("cycle")]


def logged_steps(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "log" / "log.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["event"] == "step"]


def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2LMHeadModel

    pytest.importorskip("accelerate")
    whole = run(monkeypatch, "trainer.py", "--out", tmp_path, "--steps", 60)
    stages = [f"cycle {c} {s}" for c in (0, 1) for s in ("train", "stabilize", "resu")]
    assert [line.split(":")[0] for line in whole] == stages
    first = GPT2LMHeadModel.from_pretrained(tmp_path / "final").state_dict()
    shutil.rmtree(tmp_path / "checkpoint-60")
    assert run(monkeypatch, "trainer.py", "--out", tmp_path, "--steps", 60, "--resume") == whole
    second = GPT2LMHeadModel.from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert float((first["transformer.h.0.mlp.c_fc.weight"] == 0).float().mean()) == pytest.approx(0.7, abs=0.02)
    assert logged_steps(tmp_path) == list(range(1, 61)) and (tmp_path / "log" / "report.html").exists()


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    whole = run(monkeypatch, "lightning_fit.py", "--out", tmp_path / "a", "--epochs", 8)
    assert len(run(monkeypatch, "lightning_fit.py", "--out", tmp_path / "b", "--epochs", 8, "--stop-at", 6)) == 3
    assert run(monkeypatch, "lightning_fit.py", "--out", tmp_path / "b", "--epochs", 8, "--resume") == whole
    assert len(whole) == 6 and logged_steps(tmp_path / "b") == list(range(1, 129))


def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    whole = run(monkeypatch, "accelerate_loop.py", "--out", tmp_path / "a", "--steps", 140)
    run(monkeypatch, "accelerate_loop.py", "--out", tmp_path / "b", "--steps", 140, "--stop-at", 110)
    assert run(monkeypatch, "accelerate_loop.py", "--out", tmp_path / "b", "--steps", 140, "--resume") == whole
    assert len(whole) == 6 and logged_steps(tmp_path / "b") == list(range(1, 141))
