"""Memory that no tensor explains: what a CUDA context and libraries keep on the device, and what Python, torch and
its compiler keep on the host."""

from __future__ import annotations

import sys

import torch

from .ledger import current_rss

# On an H100 80GB with torch 2.11 for CUDA 13: what the device reports in use before the first tensor, beyond an idle
# device; 500 MB is what drivers since R535 take for a context of this size, kernels of torch's own libraries included.
CONTEXT = 500_000_000
# cuBLAS and cuBLASLt share one workspace a handle: 32 MiB on Hopper, 8.1 MiB elsewhere.
_WORKSPACE = {9: 32 << 20, 10: 32 << 20}
_WORKSPACE_OTHERS = 8519680
# Code of Triton kernels, loaded as modules: about 20 kB a kernel.
_TRITON = 8_000_000

# Two Xeon cores, Python 3.11, torch 2.13 for CPU: resident set after the import, and what Inductor's adds.
FRAMEWORK = 223_000_000
INDUCTOR = 190_000_000
WORKER = 60_000_000  # a forked process of the data loader: its private pages


def device_overhead(kind: str, measured: bool = False) -> dict[str, int]:
    """Bytes on the device beside tensors, by name.

    Args:
        kind: "cpu" (nothing) or "cuda".
        measured: look at the device that is there rather than at the constants above, where that can be done.
    """
    if kind == "cpu":
        return {}
    found = {"CUDA context and libraries": CONTEXT, "Triton modules": _TRITON, "cuBLAS workspace": _WORKSPACE_OTHERS}
    if torch.cuda.is_available():
        found["cuBLAS workspace"] = _WORKSPACE.get(torch.cuda.get_device_capability()[0], _WORKSPACE_OTHERS)
        if measured:
            found["CUDA context and libraries"] = _context()
    return found


def _context() -> int:
    """What the device has in use that this process's allocator does not hold."""
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


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
