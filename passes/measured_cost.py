"""What an operation costs on the device, measured: its time as the bytes that the device copies meanwhile.

Only on a GPU and with FXRESU_MEASURE=1; otherwise costs are estimated (`tag_activations`). Measured once for an
operation, its shapes and dtypes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ._compat import real_tensors, size_hint

_COPIED = 1 << 26  # bytes of the copy that times are compared with
_REPEATS = 5


def measured_bytes(node: Node) -> float | None:
    """Bytes that the device reads and writes by copying in the time of the node's operation; None if it cannot run by
    itself."""
    layout: list[Any] = []

    def described(operand: Node) -> Any:
        value = operand.meta.get("val")
        if isinstance(value, Tensor):
            shape, stride = (tuple(map(size_hint, s)) for s in (value.shape, value.stride()))
            layout.append((shape, stride, value.dtype, value.device))
            return _Operand(len(layout) - 1)
        return size_hint(value) if isinstance(value, (int, torch.SymInt)) else value

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), described)
    return _measured(node.target, repr((args, kwargs)), tuple(layout), _Frozen(args, kwargs))


class _Operand(int):
    """Place of a tensor operand."""


class _Frozen:
    """Arguments that are no part of a cache key: their text is."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen)


@functools.lru_cache(maxsize=4096)
def _measured(target: Callable[..., Any], text: str, layout: tuple[Any, ...], given: _Frozen) -> float | None:
    with real_tensors(), torch.no_grad():
        try:
            tensors = [_random(*each) for each in layout]
            fill = torch.utils._pytree.tree_map(lambda a: tensors[a] if isinstance(a, _Operand) else a, given.args)
            named = torch.utils._pytree.tree_map(lambda a: tensors[a] if isinstance(a, _Operand) else a, given.kwargs)
            device = layout[0][3]
            return _seconds(lambda: target(*fill, **named), device) / _seconds_per_byte(device)
        except Exception:  # values that must not be random, or no memory left for trying: the estimate has to do
            return None


def _random(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return tensor.normal_() if dtype.is_floating_point else tensor.zero_()


@functools.cache
def _seconds_per_byte(device: torch.device) -> float:
    source = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), device) / (2 * _COPIED)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The least of some runs, on the device's clock where it has one."""
    run()
    best = float("inf")
    for _ in range(_REPEATS):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            best = min(best, start.elapsed_time(stop) / 1e3)
        else:
            began = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - began)
    return best
