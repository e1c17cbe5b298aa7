"""The forms in which optimizers keep a value for every coordinate: plain, torchao's quantised tensors, bitsandbytes'
blockwise bytes. Each can be read and written as an ordinary tensor.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .streamed_state import MOMENTS, StreamedState

__all__ = ["by_coordinate", "coordinates", "describe", "editable", "plain", "shaped"]

# Names of state that has nothing to do with single coordinates, even where its shape happens to be the weight's.
_NOT_BY_COORDINATE = re.compile(r"precond|gram|kron|inv_|projector|ortho|rotation", re.IGNORECASE)
_BLOCKS = (256, 2048, 4096, 64, 128, 512, 1024)  # sizes that bitsandbytes has used, its present one first


def by_coordinate(key: str, value: Any, parameter: Tensor) -> bool:
    """Whether a state holds a value for every coordinate of the parameter, by its shape and name."""
    return isinstance(value, Tensor) and shaped(key, value.shape, parameter)


def shaped(key: str, shape: torch.Size, parameter: Tensor) -> bool:
    """Whether a state of this name and shape has a value for every coordinate of the parameter."""
    return shape == parameter.shape and parameter.dim() > 0 and not _NOT_BY_COORDINATE.search(key)


def plain(value: Tensor) -> bool:
    """Whether it is an ordinary floating-point tensor."""
    return type(value) in (Tensor, nn.Parameter) and value.is_floating_point()


def editable(state: Mapping[str, Any], key: str) -> bool:
    """Whether `coordinates` can read and write `state[key]`."""
    value = state[key]
    if isinstance(state, StreamedState):
        return key in MOMENTS
    return plain(value) or _quantised_tensor(value) or _block_size(state, key) is not None


def describe(value: Tensor) -> str:
    """Type and dtype, for messages."""
    return f"a {type(value).__name__} of {value.dtype}"


def _quantised_tensor(value: Tensor) -> bool:
    """torchao's 8-bit, 4-bit and FP8 states: subclasses that dequantize, and quantize what is copied into them."""
    return type(value) is not Tensor and type(value).__module__.startswith("torchao.")


def _block_size(state: Mapping[str, Any], key: str) -> int | None:
    """Elements that share a scale in bitsandbytes' state1 and state2; None if it is not that form."""
    value, number = state[key], key.removeprefix("state")
    absmax, qmap = state.get(f"absmax{number}"), state.get(f"qmap{number}")
    if key not in ("state1", "state2") or value.dtype != torch.uint8:
        return None
    if not isinstance(absmax, Tensor) or not isinstance(qmap, Tensor) or qmap.numel() != 256:
        return None
    return next((size for size in _BLOCKS if math.ceil(value.numel() / size) == absmax.numel()), None)


@contextlib.contextmanager
def coordinates(state: Mapping[str, Any], key: str) -> Iterator[Tensor]:
    """`state[key]` as a contiguous tensor of the parameter's shape; what is written into it is kept."""
    if isinstance(state, StreamedState):
        with state.coordinates(key) as values:
            yield values
        return
    value = state[key]
    if plain(value) and value.is_contiguous():
        yield value
        return
    block = None if plain(value) or _quantised_tensor(value) else _block_size(state, key)
    if block is not None:
        number = key[-1]
        dense = _dequantise(value, state[f"absmax{number}"], state[f"qmap{number}"], block)
        yield dense
        codes, absmax = _quantise(dense, state[f"qmap{number}"], block)
        value.copy_(codes)
        state[f"absmax{number}"].copy_(absmax)
        return
    copy = value.contiguous() if plain(value) else value.dequantize().contiguous()
    copy = copy.clone() if copy.data_ptr() == value.data_ptr() else copy
    yield copy
    value.copy_(copy)


def _dequantise(codes: Tensor, absmax: Tensor, qmap: Tensor, block: int) -> Tensor:
    """float32 of the codes' shape: qmap[code] * absmax of its block."""
    values = qmap.float()[codes.flatten().long()]
    scales = absmax.float().repeat_interleave(block)[: values.numel()]
    return (values * scales).view(codes.shape)


def _quantise(values: Tensor, qmap: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(nearest codes, uint8 of the values' shape; largest |value| of every block, float32). qmap ascends."""
    flat = values.flatten()
    padded = nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = padded.abs().amax(1)
    scaled = padded / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    middles = (qmap[1:].float() + qmap[:-1].float()) / 2
    codes = torch.bucketize(scaled.flatten()[: flat.numel()], middles)
    return codes.to(torch.uint8).view(values.shape), absmax
