"""The private torch API for 2:4 sparse tensor cores (cuSPARSELt), in one place. Checked against torch 2.11 and 2.13.

torch 2.11 builds and destroys cuSPARSELt's descriptors and plan at every product (0.6 ms on the host of an H100): that
pays for large products, or where a CUDA graph replays it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ALGORITHMS: dict[tuple[object, ...], int] = {}
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


def compress_both(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` and its transpose compressed in one pass over it; rows and K must be multiples of 128.

    The kernel chooses 4 x 4 patterns greedily by |value|: where a pattern is there already it finds that.
    """
    packed, _, packed_t, _, _ = torch._sparse_semi_structured_tile(weight, "largest_abs_values_greedy", False)
    return packed.view(weight.shape[0], -1), packed_t.view(weight.shape[1], -1)


def multiply(packed: Tensor, x: Tensor) -> Tensor:
    """x @ Wᵀ, [tokens, rows], of a compressed W and x [tokens, K]."""
    tokens = x.shape[0]
    padded = -(-tokens // _TOKENS) * _TOKENS
    dense = (x if padded == tokens else F.pad(x, (0, 0, 0, padded - tokens))).contiguous().t()
    algorithm = _algorithm(packed, dense)
    return torch._cslt_sparse_mm(packed, dense, transpose_result=True, alg_id=algorithm)[:tokens]


def _algorithm(packed: Tensor, dense: Tensor) -> int:
    """cuSPARSELt's fastest algorithm for the shapes, searched at the first call. A call that is being captured cannot
    search and takes the default, but every capture is preceded by a call that is not."""
    key = (packed.shape, dense.shape, packed.dtype, packed.device)
    if key not in _ALGORITHMS:
        if torch.cuda.is_current_stream_capturing():
            return 0
        _ALGORITHMS[key] = torch._cslt_sparse_mm_search(packed, dense, transpose_result=True)
    return _ALGORITHMS[key]
