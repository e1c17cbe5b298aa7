"""The one place that imports Triton: it is optional on CPU and required on CUDA.

With `TRITON_INTERPRET=1` in the environment when this module is first imported, CPU tensors run the Triton kernels in
Triton's interpreter, which is how the kernels are tested without a GPU.
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton: Any = None  # type: ignore[no-redef]
    # Kernel signatures are evaluated when a module is imported, so their annotation has to exist.
    tl: Any = SimpleNamespace(constexpr=object)  # type: ignore[no-redef]
    HAS_TRITON = False

if INTERPRET and not HAS_TRITON:
    raise ImportError("TRITON_INTERPRET is set but triton is not importable: install triton or unset the variable")


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where Triton is missing (it can then not be launched)."""
    return triton.jit(function) if HAS_TRITON else function


def jit_for_any(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit` of a kernel that is compiled once for all values of the integer arguments `names`.

    Triton compiles anew for a 1 and for a multiple of 16: of a step's number, in the steps 1, 2 and 16.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=list(names)) if HAS_TRITON else function

    return decorate


def use_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs its Triton kernel (True) or its PyTorch reference (False).

    Raises RuntimeError for a CUDA tensor without Triton, and for devices that have neither.
    """
    if tensor.is_cuda:
        if not HAS_TRITON:
            raise RuntimeError("fxresu kernels on CUDA tensors need triton (pip install triton); none is importable")
        return True
    if tensor.device.type != "cpu":
        raise RuntimeError(f"fxresu kernels run on cuda and cpu, not on {tensor.device}")
    return INTERPRET


def launch(kernel: Any, programs: int | tuple[int, ...], tensor: Tensor, *args: Any, **meta: Any) -> None:
    """Run `kernel` with a grid of up to three dimensions on the device of `tensor`; zero programs launch nothing.

    What a program is for is worked out by dividing by constants only: a division by a runtime value costs it some 25
    instructions.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    if 0 in grid:
        return
    if tensor.is_cuda:
        # Entering a device costs as much as a launch; most processes are on the right one already.
        if tensor.get_device() == torch.cuda.current_device():
            kernel[grid](*args, **meta)
            return
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **meta)
    else:
        for option in ("num_warps", "num_stages", "maxnreg"):  # the interpreter has none of them
            meta.pop(option, None)
        kernel[grid](*args, **meta)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` (at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's device; a small constant for the interpreter."""
    return _processors(tensor.get_device()) if tensor.is_cuda else 2


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
