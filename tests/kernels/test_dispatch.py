"""Choice of backend, absence of Triton, and the fingerprint of the sources."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxresu.kernels
from fxresu.kernels import _triton, kernel_salt

# Runs with triton blocked, as on a machine that lacks it.
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from fxresu.kernels import _triton, pack, unpack, gather
assert not _triton.HAS_TRITON
mask = torch.rand(3, 40) < 0.5
assert torch.equal(unpack(pack(mask), 40), mask)
class OnCuda:
    is_cuda = True
try:
    _triton.use_triton(OnCuda())
except RuntimeError as error:
    assert "triton" in str(error)
else:
    raise SystemExit("a CUDA tensor without triton must raise")
"""


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


def test_everything_works_on_cpu_without_triton() -> None:
    result = _python(WITHOUT_TRITON)
    assert result.returncode == 0, result.stderr


def test_interpreter_without_triton_is_an_error() -> None:
    result = _python("import sys; sys.modules['triton'] = None; import fxresu.kernels", TRITON_INTERPRET="1")
    assert result.returncode != 0 and "TRITON_INTERPRET is set but triton is not importable" in result.stderr


def test_other_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="not on meta"):
        _triton.use_triton(torch.empty(1, device="meta"))


def test_salt_covers_every_file(tmp_path, monkeypatch) -> None:
    salt = kernel_salt()
    assert len(salt) == 64 and salt == kernel_salt()
    source = Path(fxresu.kernels.__file__).parent
    for path in source.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    module = sys.modules["fxresu.kernels._salt"]
    monkeypatch.setattr(module, "__file__", str(tmp_path / "_salt.py"))
    assert kernel_salt.__wrapped__() == salt
    (tmp_path / "phi.py").write_text((tmp_path / "phi.py").read_text() + "\n# changed\n")
    assert kernel_salt.__wrapped__() != salt


def test_public_names_are_exported() -> None:
    for name in fxresu.kernels.__all__:
        assert callable(getattr(fxresu.kernels, name)), name
