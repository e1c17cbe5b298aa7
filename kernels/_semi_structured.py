"""The private torch API for 2:4 sparse tensor cores (cuSPARSELt), in one place. Checked against torch 2.11 and 2.13.

torch 2.11 builds and destroys cuSPARSELt's descriptors and plan at every product (0.6 ms on the host of an H100): that
pays for large products, or where a CUDA graph replays it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TOKENS = 16  # the dense operand's tokens must be a multiple of 8 for 16-bit types


def unavailable(device: torch.device) -> str | None:
    """Why cuSPARSELt cannot be used on a device, or None."""
    if device.type != "cuda":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the device has no sparse tensor cores"
    cusparselt = getattr(torch.backends, "cusparselt", None)
    if cusparselt is None or not cusparselt.is_available():
        return "this build of torch is without cuSPARSELt"
    return None


def compress(weight: Tensor) -> Tensor:
    """A 2:4 sparse [rows, K] in cuSPARSELt's form, [rows, 9 K / 16]: values, then indices in the library's order."""
    return torch._cslt_compress(weight).view(weight.shape[0], -1)


def multiply(packed: Tensor, x: Tensor) -> Tensor:
    """x @ Wᵀ, [tokens, rows], of a compressed W and x [tokens, K]."""
    tokens = x.shape[0]
    padded = -(-tokens // _TOKENS) * _TOKENS
    dense = (x if padded == tokens else F.pad(x, (0, 0, 0, padded - tokens))).contiguous().t()
    # The library's default algorithm: its search ran into an illegal instruction at one token (H100, torch 2.11), which
    # no process survives.
    return torch._cslt_sparse_mm(packed, dense, transpose_result=True)[:tokens]
