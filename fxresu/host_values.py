"""Small results of many tensors, read on the host together: it waits for a device once and not once a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["on_host"]


def on_host(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """`tolist()` of tensors of one shape and dtype, in the same order; they may be on several devices."""
    by_device: dict[torch.device, list[str]] = {}
    for name, value in values.items():
        by_device.setdefault(value.device, []).append(name)
    found: dict[str, Any] = {}
    for names in by_device.values():
        found |= zip(names, torch.stack([values[name] for name in names]).tolist())
    return {name: found[name] for name in values}
