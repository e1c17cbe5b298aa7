"""read_number: one number from the device, past copies that are under way.

A GPU copies to the host in the order in which that was asked for, whatever the stream: behind 8 GB that leave on a side
stream, `item()` of a number that has long been computed waits for all of them (155 ms at 55 GB/s on an H200, with a
stream of high priority as well). Stores of a kernel to pinned memory wait for nobody.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._registry import unobserved
from ._triton import jit, launch, tl, use_triton

__all__ = ["read_number"]


@jit
def _read_number_kernel(source, target):
    tl.store(target, tl.load(source).to(tl.float64))


def read_number(x: Tensor) -> float:
    """The value of a tensor with one element, as `float(x)`: waits for the current stream, and for no copy beside it.

    Args:
        x: real, with one element; of any shape, dtype and device.

    Raises:
        ValueError: there is not exactly one element, or it is complex.
    """
    if x.numel() != 1 or x.is_complex():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: use a real tensor with one element")
    x = x.detach()
    # Sums over several devices, and what is traced or counted, have their own way to a number.
    if not unobserved(x) or x.device.type not in ("cuda", "cpu") or not use_triton(x):
        return float(x)
    target = torch.empty((), dtype=torch.float64, pin_memory=x.is_cuda)
    source = x.view(torch.uint8) if x.dtype is torch.bool else x
    launch(_read_number_kernel, 1, source, source, target)
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()
    return float(target)
