"""Memory that no tensor explains: what a CUDA context and libraries keep on the device, and what Python, torch and
its compiler keep on the host."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

import torch

from .errors import ConfigError
from .ledger import current_rss
from .memory_bill import WORKSPACE
from .sizes import parse_size

# Seen on an H200 with torch 2.11 and CUDA 13 (no file of results), and other on another card, driver or version;
# `--measure` replaces the first by what the device says, `overhead=` both by the user's own figures. A context takes
# 0.65 GB, 0.72 after a product has loaded the libraries.
CONTEXT = 720_000_000
# Kernels are loaded when they first run, libraries' and Triton's own: 0.72 GB became 0.81 in the compiled phases of
# GPT-2 124M, and up to 0.88 in those of Llama 1.24B with streams.
_LOADED = 90_000_000

# torch's own sizes (aten/src/ATen/cuda/CublasHandlePool.cpp): cuBLAS and cuBLASLt share a workspace for each handle and
# stream, which comes from torch's allocator. The environment may ask for another size.
_LARGE = (9, 10, 12)  # compute capabilities that get 32 MiB
_WORKSPACES = {True: 4096 * 8 << 10, False: (4096 * 2 + 16 * 8) << 10}
_ENVIRONMENT = "CUBLAS_WORKSPACE_CONFIG"

# Resident set after the import of torch 2.13 for CPU with Python 3.11, and what importing Inductor adds to it; measured
# on two Xeon cores. Here the import is looked at where this process is still that small.
FRAMEWORK = 223_000_000
INDUCTOR = 190_000_000
WORKER = 60_000_000  # an estimate: the private pages of a forked worker of a data loader

CONTEXT_NAME, _LOADED_NAME = "CUDA context and libraries", "kernels loaded by steps"


def device_overhead(kind: str, measured: bool = False, given: Mapping[str, int | str] | None = None) -> dict[str, int]:
    """Bytes on the device beside the tensors of training, by name.

    Args:
        kind: "cpu" (nothing) or "cuda".
        measured: look at the device that is there rather than at the constants above. What other processes have there
            counts as the context's then, as it does in what `--measure` measures.
        given: figures that replace these, by name.

    Raises:
        ConfigError: an unknown name in `given`, or one for a CPU.
    """
    found: dict[str, int] = {}
    if kind != "cpu":
        found = {CONTEXT_NAME: CONTEXT, _LOADED_NAME: _LOADED, WORKSPACE: _workspace()}
        if measured and torch.cuda.is_available():
            found |= _looked_at()
    for name, size in (given or {}).items():
        if name not in found:
            known = ", ".join(map(repr, found)) or "nothing"
            raise ConfigError(f"overhead[{name!r}]: {kind} has {known}")
        found[name] = 0 if size in (0, "0") else parse_size(size, f"overhead[{name!r}]")
    return found


def _workspace() -> int:
    """Bytes of one cuBLAS workspace; without a device that of a recent large card."""
    pairs = re.findall(r":(\d+):(\d+)", os.environ.get(_ENVIRONMENT, ""))
    if pairs:
        return sum(int(size) * int(count) << 10 for size, count in pairs)
    return _WORKSPACES[not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] in _LARGE]


def _looked_at() -> dict[str, int]:
    """What the device has in use once there is a context and a product has loaded the libraries, and torch's allocator
    does not hold; and the workspace that the first product of the process takes."""
    operand = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    product = operand @ operand
    torch.cuda.synchronize()
    workspace = torch.cuda.memory_allocated() - before - product.nbytes
    free, total = torch.cuda.mem_get_info()
    found = {CONTEXT_NAME: total - free - torch.cuda.memory_reserved()}
    return found | {WORKSPACE: workspace} if workspace > 0 else found  # 0: there was a product before


def host_overhead(*, compiled: bool, workers: int = 0, dataset: int = 0) -> dict[str, int]:
    """Bytes in host memory in every stage, by name. The framework is measured where this process is young enough to
    tell: before it holds more than the constants say."""
    framework = FRAMEWORK if "torch._inductor" in sys.modules else min(current_rss(), FRAMEWORK)
    found = {"interpreter and framework": framework}
    if compiled:
        found["compiler"] = INDUCTOR
    if workers:
        found["data loader's workers"] = workers * WORKER
    if dataset:
        found["dataset in memory"] = dataset
    return found
