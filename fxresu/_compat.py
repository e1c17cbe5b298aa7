"""What the inspector needs of private torch APIs. Checked on torch 2.13.0. Passes have `passes/_compat.py`."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.utils import graph_break_reasons
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@contextmanager
def recorded_breaks() -> Iterator[list[tuple[str, list[traceback.FrameSummary]]]]:
    """Collects (reason, user's stack) of every graph break met inside the context.

    Dynamo's list and not its counters: a branch on a tensor's value is not counted there.
    """
    found: list[tuple[str, list[traceback.FrameSummary]]] = []
    start = len(graph_break_reasons)
    try:
        yield found
    finally:
        found += [(r.reason, list(r.user_stack)) for r in graph_break_reasons[start:] if r.graph_break]


def size_hint(size: int | torch.SymInt) -> int:
    """The example size behind a symbolic one, without a guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def fake_mode() -> FakeTensorMode:
    """A mode whose tensors have a device and a shape and no memory; constants of the model may meet them."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
