"""Runs the tests of this folder once more with the Triton kernels in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fxresu.kernels._triton import HAS_TRITON, triton

FILES = [
    "test_bits.py", "test_phi.py", "test_compose.py", "test_compose_panel.py", "test_compose_rows.py",
    "test_theta_step.py", "test_theta_steps.py", "test_theta_bf16.py",
    "test_grad_weight.py", "test_linear_few.py", "test_decode_linear.py", "test_quantized.py", "test_select.py",
    "test_row_select.py", "test_active_sums.py", "test_sparse_order.py",
    "test_commit.py", "test_adamw_step.py", "test_factored_moments.py", "test_head_loss.py",
]  # fmt: skip


def _broken_pair() -> bool:
    """Interpreters of older Triton convert one-element arrays to int, which newer NumPy refuses."""
    try:
        int(np.ones(1))
    except TypeError:
        return HAS_TRITON and tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
    return False


@pytest.mark.skipif(_broken_pair(), reason="this triton's interpreter does not run on this numpy")
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="already in the interpreter")
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name: str) -> None:
    here = Path(__file__).parent
    # Compilers and numerical derivatives look at the registration, not at the kernels, and are tested without this.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not gpu",
        "-k",
        "not torch_compile and not compiled_graphs and not test_gradients and not opcheck",
        str(here / name),
    ]
    result = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "failed" not in result.stdout
