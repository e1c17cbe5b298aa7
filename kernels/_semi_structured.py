"""The private torch API for 2:4 sparse tensor cores (cuSPARSELt), in one place. Checked against torch 2.11 and 2.13.

torch 2.11 builds and destroys cuSPARSELt's descriptors and plan at every product (0.6 ms on the host of an H100): that
pays for large products, or where a CUDA graph replays it.
"""

from __future__ import annotations

import statistics
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _choice_cache, sparse_order
from .bits import pack

MULTIPLE = sparse_order.TILE
"""Rows and columns of a weight must be multiples of this: of other shapes the library pads the indices (96 x 160), and
torch takes the number of rows from the form's size."""
_TOKENS = 16  # the dense operand's tokens must be a multiple of 8 for 16-bit types
_SEARCHED = 1024
_ALIGNED = 128
"""Token counts that algorithms are compared for: at least so many, and a multiple of this. An algorithm that does not
suit a small or odd count can end the process with an illegal instruction, which no `try` catches (seen at 16 and at 144
tokens, on an H100 and an H200, torch 2.11); and few tokens gain nothing here."""
_MOST = 64
_REPEATS = 3

_fastest: dict[tuple[int, str], int] = {}
_ordered: dict[int, bool] = {}


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


def compress_both(weight: Tensor, bits: Tensor, dtype: torch.dtype, back: bool) -> tuple[Tensor, Tensor | None]:
    """The forms of a masked weight in `dtype` and, with `back`, of its transpose."""
    if own_order(weight.device):
        return sparse_order.compress(weight, bits, dtype, back)
    low = weight.to(dtype)
    return compress(low), compress(low.t().contiguous()) if back else None


def own_order(device: torch.device) -> bool:
    """Whether `sparse_order` writes what the library does on this device, bit for bit: looked at once a process."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _ordered:
        if torch.cuda.is_current_stream_capturing():
            return False
        _ordered[index] = _same_order(torch.device("cuda", index))
        if not _ordered[index]:
            warnings.warn(
                f"cuSPARSELt orders 2:4 weights in another way on {torch.cuda.get_device_name(index)} than fxresu"
                " knows; the library compresses them itself, which takes longer",
                RuntimeWarning,
                stacklevel=2,
            )
    return _ordered[index]


def _same_order(device: torch.device) -> bool:
    from ._measure import random_mask  # which needs all operations

    generator = torch.Generator().manual_seed(0)
    mask = random_mask(2 * sparse_order.TILE, 3 * sparse_order.TILE, 0.5, "2:4", generator)
    # No kept value is zero: the library may then keep another one of the group.
    weight = (1 + torch.rand(mask.shape, generator=generator)).where(mask, 0).to(device, torch.bfloat16)
    ahead, back = sparse_order.compress(weight, pack(mask).to(device), torch.bfloat16, True)
    assert back is not None
    pairs = ((ahead, compress(weight)), (back, compress(weight.t().contiguous())))
    return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs)


def multiply(packed: Tensor, x: Tensor) -> Tensor:
    """x @ Wᵀ, [tokens, rows], of a compressed W and x [tokens, K]."""
    tokens = x.shape[0]
    padded = -(-tokens // _TOKENS) * _TOKENS
    dense = (x if padded == tokens else F.pad(x, (0, 0, 0, padded - tokens))).contiguous().t()
    return _product(packed, dense, _algorithm(packed, dense))[:tokens]


def _product(packed: Tensor, dense: Tensor, algorithm: int) -> Tensor:
    return torch._cslt_sparse_mm(packed, dense, transpose_result=True, alg_id=algorithm)


def _algorithm(packed: Tensor, dense: Tensor) -> int:
    """The number of the fastest algorithm for a weight's shape and a number of tokens: measured at their first product
    and kept on disk. The default one (0) takes twice the time of the fastest for 8192 tokens on an H100."""
    tokens = dense.shape[1]
    if tokens < _SEARCHED or tokens % _ALIGNED:
        return 0
    name = f"mm_24 rows={packed.shape[0]} K={dense.shape[0]} tokens={tokens} dtype={dense.dtype}"
    key = (dense.get_device(), name)
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return 0
        cache = _choice_cache.of(dense.device)
        figures = cache.known(name)
        if not figures:
            figures = _search(packed, dense)
            cache.put(name, figures)
        times = {n: f for n, f in figures.items() if isinstance(f, float) and n.isdigit()}
        _fastest[key] = int(min(times, key=times.__getitem__, default="0"))
    return _fastest[key]


def _search(packed: Tensor, dense: Tensor) -> _choice_cache.Figures:
    """Microseconds by algorithm, until the library knows no further one."""
    figures: _choice_cache.Figures = {}
    for algorithm in range(_MOST):
        try:
            figures[str(algorithm)] = _time(packed, dense, algorithm)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what it says of a number beyond the last
            break
    return figures


def _time(packed: Tensor, dense: Tensor, algorithm: int) -> float:
    times = []
    for _ in range(1 + _REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _product(packed, dense, algorithm)
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times[1:])
