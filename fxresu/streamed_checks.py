"""What `StreamedAdamW` refuses before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxresu.kernels.adamw_rule import SPAN

from .errors import ConfigError
from .streamed_norm import CLIPS
from .streamed_state import FORMS

__all__ = ["SUMS", "check_arguments", "check_group", "check_parameter"]

SUMS = ("device", "host")


def check_arguments(
    moments: str, max_norm: float | None, clip: str, lookahead: int | None, chunk: int, device_bytes: int, sums: str
) -> None:
    """ConfigError for an argument that is out of range."""
    if moments not in FORMS:
        raise ConfigError(f"moments={moments!r}: use one of {', '.join(FORMS)}")
    if clip not in CLIPS:
        raise ConfigError(f"clip={clip!r}: use one of {', '.join(CLIPS)}")
    if sums not in SUMS:
        raise ConfigError(f"sums={sums!r}: use one of {', '.join(SUMS)}")
    if sums == "host" and clip == "exact":
        raise ConfigError("sums='host' with clip='exact', which keeps all gradients on the device; use one of them")
    if max_norm is not None and not max_norm > 0:
        raise ConfigError(f"max_norm={max_norm!r}: use a positive number, or None for no clipping")
    if lookahead is not None and (not isinstance(lookahead, int) or lookahead < 0):
        raise ConfigError(f"lookahead={lookahead!r}: use an integer >= 0, or None for a whole group")
    if not isinstance(chunk, int) or chunk < SPAN or chunk % SPAN:
        raise ConfigError(f"chunk={chunk!r}: use a positive multiple of {SPAN} entries")
    if device_bytes < 0:
        raise ConfigError(f"device_bytes={device_bytes!r}: use a number of bytes >= 0")


def check_group(group: Mapping[str, Any]) -> None:
    """ConfigError for a parameter group's options that are out of range, or not AdamW's."""
    beta1, beta2 = group["betas"]
    wrong = [name for name in ("lr", "eps", "weight_decay") if not float(group[name]) >= 0]
    if wrong:
        raise ConfigError(f"{wrong[0]}={group[wrong[0]]!r}: use a number >= 0")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ConfigError(f"betas={group['betas']!r}: use two numbers in [0, 1)")
    for name in ("amsgrad", "foreach", "fused", "capturable", "differentiable"):
        if group.get(name):
            raise ConfigError(f"{name}={group[name]!r}: StreamedAdamW has one update, its own; leave it out")


def check_parameter(parameter: Tensor, device: torch.device) -> None:
    """ConfigError for a parameter of another dtype, layout or device."""
    shape = tuple(parameter.shape)
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"a parameter of shape {shape} is {parameter.dtype}; use float32 or bfloat16")
    if not parameter.is_contiguous():
        raise ConfigError(f"a parameter of shape {shape} has strides {parameter.stride()}; make it contiguous")
    if parameter.device != device:
        raise ConfigError(f"a parameter of shape {shape} is on {parameter.device}, others on {device}; use one device")
