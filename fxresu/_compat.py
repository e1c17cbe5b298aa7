"""What the inspector needs of private torch APIs. Checked on torch 2.13.0. Passes have `passes/_compat.py`."""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.utils import counters, graph_break_reasons
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@contextmanager
def recorded_breaks() -> Iterator[list[tuple[str, list[traceback.FrameSummary]]]]:
    """Collects (reason, user's stack) of every graph break met inside the context; the stack is empty if unknown.

    Dynamo keeps two books: a branch on a tensor's value is only in the list, a frame that it gives up on before any
    operation only in the counters.
    """
    found: list[tuple[str, list[traceback.FrameSummary]]] = []
    start, earlier = len(graph_break_reasons), Counter(counters["graph_break"])
    try:
        yield found
    finally:
        found += [(r.reason, list(r.user_stack)) for r in graph_break_reasons[start:] if r.graph_break]
        listed = {reason for reason, _ in found}
        for reason, times in (Counter(counters["graph_break"]) - earlier).items():
            found += [(reason, [])] * times if reason not in listed else []


@contextmanager
def quiet_fakes() -> Iterator[None]:
    """Keeps torch from logging the traceback of an error in a fake computation, which is raised as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def size_hint(size: int | torch.SymInt) -> int:
    """The example size behind a symbolic one, without a guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def fake_mode() -> FakeTensorMode:
    """A mode whose tensors have a device and a shape and no memory; constants of the model may meet them."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
