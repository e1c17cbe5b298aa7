"""`fxresu doctor`: what it finds, each failure that can be planted, and its remedy."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch

from fxresu import cli, doctor


def _found() -> dict[str, doctor.Finding]:
    return {f.name: f for f in doctor.examine(attempt=False)}


def test_a_machine_that_runs_the_tests_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in ("torch", torch.__version__, "C++ compiler", "dense, sparse, resu, predict compile and run"):
        assert text in out
    assert out.rstrip().endswith("Everything that training needs is here.")
    assert "BAD" not in out


def test_json_and_looking_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", "--no-run"]) == 0
    found = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    assert found["torch"]["state"] == "ok" and torch.__version__ in found["torch"]["detail"]
    assert {"python", "C++ compiler", "triton", "cache", "transformers"} <= set(found)
    assert not any(name.startswith("Inductor") for name in found)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if "++" in name else which(name, *a, **k))
    monkeypatch.delenv("CXX", raising=False)
    finding = _found()["C++ compiler"]
    assert finding.state == "bad" and "apt-get install g++" in finding.remedy
    assert cli.main(["doctor", "--no-run"]) == 1
    assert "1 thing that training needs does not work here." in capsys.readouterr().out


def test_a_torch_that_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    finding = _found()["torch"]
    assert finding.state == "bad" and "2.4.1" in finding.detail and ">=2.11" in finding.remedy
    # Nothing is tried on a torch that cannot work.
    assert not any(f.name == "passes" for f in doctor.examine())


@pytest.mark.parametrize("name", ["TORCH_COMPILE_DISABLE", "TRITON_INTERPRET"])
def test_switches_that_are_forgotten(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "0")
    assert name not in _found()
    monkeypatch.setenv(name, "1")
    assert _found()[name].state == "note" and _found()[name].remedy == f"unset {name}"


def test_a_package_that_is_missing_and_one_that_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "torch_tensorrt" else find(n, *a))
    found = _found()
    assert found["torch_tensorrt"].detail == "not installed: TensorRT engines do not run"
    assert "torchvision::nms does not exist" in found["timm"].detail and "torchvision" in found["timm"].remedy


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "below"))
    finding = _found()["cache"]
    assert finding.state == "bad" and "TORCHINDUCTOR_CACHE_DIR" in finding.remedy


def test_what_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str, backend: str) -> str:
        raise RuntimeError("no such instruction\nlong story")

    monkeypatch.setattr(doctor, "_try_training", broken)
    found = {f.name: f for f in doctor.examine()}
    assert found["kernels"].state == "ok"
    assert found["passes"].state == "bad" and found["passes"].detail == "RuntimeError: no such instruction"
