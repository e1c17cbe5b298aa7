"""The calls that tools/sanitize.py puts under compute-sanitizer run, and it says what it lacks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fxresu.kernels import theta_launch

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "sanitize.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitize_script", SCRIPT)
    module = sys.modules["sanitize_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GROUPS = ["bits", "phi", "packed", "theta", "columns", "wide", "masks", "products", "decode", "order", "adamw", "heads"]


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_runs(script: ModuleType, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theta_launch, "FORM", theta_launch.FORM)
    assert script.main(["--run", group]) == 0 and list(script.GROUPS) == GROUPS


def test_a_wrong_result_is_an_error(script: ModuleType) -> None:
    import torch

    with pytest.raises(AssertionError):
        script.same(lambda device, once=[0.0, 1.0]: [torch.tensor(once.pop())])


def test_without_a_gpu_or_the_sanitizer_it_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for device, wanted in (("cpu", "no CUDA device"), ("cuda", "not on PATH")):
        monkeypatch.setattr(script, "DEVICE", device)
        monkeypatch.setattr(script.shutil, "which", lambda name: None)
        with pytest.raises(SystemExit):
            script.main(["--groups", "bits"])
        assert wanted in capsys.readouterr().err


def test_a_run_that_finds_something_is_told(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    fake = tmp_path / "compute-sanitizer"
    fake.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 3 errors'\nexit 99\n")
    fake.chmod(0o755)
    monkeypatch.setattr(script, "DEVICE", "cuda")
    assert script.main(["--groups", "bits", "--tools", "memcheck", "--sanitizer", str(fake)]) == 1
    out = capsys.readouterr().out
    assert "3 errors" in out and "0 of 1 runs are clean" in out
