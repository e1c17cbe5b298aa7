"""The published implementation (huy209vn/RESU), from a checkout of it: its own layer for the loop of its benchmark."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .timing import device_type

MODES = ("dense", "sparse", "resu", "resu selective")


def published_layer(folder: Path, mode: str, size: int, sparsity: float) -> nn.Module:
    """Its `RESULinear`, `size` x `size` in fp32, in one of `MODES`, with the arguments of its own benchmark.

    Raises:
        FileNotFoundError: `folder` does not hold a checkout.
    """
    if not (folder / "resu" / "modules" / "linear.py").is_file():
        raise FileNotFoundError(f"--published={folder}: not a checkout of huy209vn/RESU (no resu/modules/linear.py)")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    linear: Any = importlib.import_module("resu.modules.linear")
    torch.manual_seed(0)
    layer = linear.RESULinear(size, size, device=torch.device(device_type()))
    with contextlib.redirect_stdout(io.StringIO()):
        if mode != "dense":
            layer.prune_by_magnitude(sparsity)
        if mode == "resu":
            layer.enter_resu_mode(epsilon=0.1, use_selective=False, freeze_active=True)
        if mode == "resu selective":
            layer.enter_resu_mode(epsilon=0.1, use_selective=True, selection_ratio=0.2, freeze_active=True)
    return layer
