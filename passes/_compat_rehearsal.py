"""What leans on Inductor's insides to rehearse compiled code without computing. Checked on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch


class _NoKernel:
    """Stands for a kernel that Inductor generated; running it does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None: ...

    def run(self, *args: Any, **kwargs: Any) -> None: ...


class _NoCompile:
    """Stands for Inductor's `AsyncCompile`: generated kernels are neither compiled nor run."""

    def wait(self, *args: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _NoKernel]:
        return lambda *args, **kwargs: _NoKernel()


def _rehearsed_module(graph: Any, code: Any) -> types.SimpleNamespace:
    """The code that Inductor wrote for a graph, with every buffer a tensor of the active fake mode and no kernel.

    Allocations, frees and reuse of buffers are that code's own, which is what the memory of a step consists of.
    """
    from torch._inductor import async_compile

    space: dict[str, Any] = {"__name__": "fxresu_rehearsal", **graph.constants, **graph.torchbind_constants}
    with mock.patch.object(async_compile, "AsyncCompile", _NoCompile):
        exec(compile(code.value, "<fxresu rehearsal>", "exec"), space)

    def allocate(device: str) -> Callable[..., torch.Tensor]:
        return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)

    space |= {
        "empty_strided_cpu": allocate("cpu"),
        "empty_strided_cuda": allocate("cuda"),
        "reinterpret_tensor": lambda t, size, stride, offset=0: torch.as_strided(t, size, stride, offset),
        "assert_size_stride": lambda *args: None,
        "assert_alignment": lambda *args: None,
    }
    return types.SimpleNamespace(call=space["call"], runner=space.get("runner"), __file__="<fxresu rehearsal>")


@contextlib.contextmanager
def rehearsed_compilation() -> Iterator[None]:
    """`torch.compile` inside goes as far as Inductor's wrapper code, which then runs on fakes (see
    `_rehearsed_module`). Nothing is generated for a processor, cached, or computed."""
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.graph import GraphLowering

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(GraphLowering, "_compile_to_module_lines", _rehearsed_module))
        # Asking which vector instructions there are takes a compiler some twenty seconds.
        stack.enter_context(mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", list))
        stack.enter_context(config.patch(force_disable_caches=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield
