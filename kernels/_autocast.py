"""Autocast as custom operations have to see it: by asking, since it does not know them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

# Asked once: Dynamo of torch 2.11 does not trace the question.
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "ipu", "maia", torch._C._get_privateuse1_backend_name())
_WITH_AUTOCAST = tuple(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))


def active_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on this kind of device right now; None without autocast, as always on meta."""
    if device_type not in _WITH_AUTOCAST or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_off(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast, on any kind of device."""
    if device_type not in _WITH_AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def as_autocast(input: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """What autocast would do to a linear's operands; a custom op is invisible to it."""
    operands = (input, *others)
    dtype = active_dtype(input.device.type)
    if dtype is None:
        return operands
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in operands)
