"""The code as linter and type checker see it."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def test_ruff() -> None:
    pytest.importorskip("ruff")
    _run("ruff", "check", "--no-cache", ".")


def test_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    if not importlib.metadata.version("torch").startswith("2.13."):
        pytest.skip("annotations are checked against the pinned torch")
    _run("mypy", f"--cache-dir={tmp_path}", "fxresu", "passes", "kernels")
