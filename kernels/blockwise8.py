"""Moments in 8 bits: minifloats relative to the largest magnitude of their block, rounded stochastically.

A block is 1024 consecutive slots of a theta-like tensor's line where every row has a line of its own (compact rows and
panels), and the candidates among 1024 columns of a row where all rows share one. A block shares a float32 scale. A code
keeps an exponent and mantissa of x / scale: for m a sign, 4 bits and 3 bits; for v, which has no sign, 4
and 4 bits, of its square root where v is a mean of squares. Both reach from 1 down to about 2e-5 (of v: 3e-10).

Rounding is stochastic, by a hash of position and step, because a running mean with beta = 0.999 changes by less than
half a step of any 8-bit code and would stand still under rounding to nearest (8-bit optimizers: Dettmers et al. 2021,
arXiv 2110.02861; stochastic rounding: Gupta et al. 2015, arXiv 1502.02551). A positive v never becomes 0: it is a
denominator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._tiles import BLOCK_COLUMNS, largest
from ._triton import jit, tl
from .layout import positions

# Right shift of the float32 bits, and what to take off so that the largest code stands for 1.0.
_SHIFT = {"m": 20, "v": 19}
_BASE = {"m": (127 << 3) - 127, "v": (127 << 4) - 255}


def scale_shape(shape: tuple[int, int], rows: int, K: int) -> tuple[int, int]:
    """Shape of the float32 scales of theta-like moments of `shape` for a weight [rows, K]."""
    lines, entries = (rows, K) if shape[0] == 1 < rows else shape
    return lines, (entries + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS


# --- reference -------------------------------------------------------------------------------------------------------


def hash_reference(slot: Tensor, seed: int) -> Tensor:
    """32 mixed bits of every position, as int64 (lowbias32 by C. Wellons)."""
    x = (slot + seed) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def encode_reference(values: Tensor, block: Tensor, blocks: int, noise: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(uint8 codes, float32 scale of every block) of float values, each in the block that `block` (int64) names."""
    scale = torch.zeros(blocks, device=values.device).scatter_reduce_(0, block, values.abs().float(), "amax")
    inverse = torch.where(scale > 0, 1 / scale, 0)
    share = (values.abs().float() * inverse[block]).clamp_(max=1)
    patterns = share.view(torch.int32).long()
    shift = _SHIFT[kind]
    code = ((patterns + (noise & ((1 << shift) - 1))) >> shift) - _BASE[kind]
    if kind == "v":
        return torch.where(values > 0, code.clamp(1, 255), 0).to(torch.uint8), scale
    code = code.clamp(0, 127)
    return (code | torch.where(torch.signbit(values), 128, 0)).to(torch.uint8), scale


def decode_reference(codes: Tensor, scale: Tensor, kind: str) -> Tensor:
    """float32 values of uint8 codes, each with its block's scale."""
    code = codes.long()
    magnitude = code & 127 if kind == "m" else code
    patterns = ((magnitude + _BASE[kind]) << _SHIFT[kind]).int()
    value = torch.where(magnitude > 0, patterns.view(torch.float32) * scale, 0)
    return torch.where(code > 127, -value, value) if kind == "m" else value


def decoded(
    codes: Tensor,
    scale: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    K: int,
    name: str,
    rule: str,
) -> Tensor:
    """A whole theta-like moment ("m" or "v") as float32, padding 0; what "adam" stores as a root is squared again."""
    target, slot = positions(bits, row_start, columns, K, shape=codes.shape)
    if isinstance(slot, slice):
        slot = torch.arange(slot.stop, device=bits.device)
    values = torch.zeros(codes.shape, device=codes.device)
    block = block_of(target, slot, codes.shape, K, columns is not None, scale.shape)
    value = decode_reference(codes.view(-1)[slot], scale.view(-1)[block], name)
    values.view(-1)[slot] = value.square() if name == "v" and rule == "adam" else value
    return values


def block_of(target: Tensor, slot: Tensor, shape: Sequence[int], K: int, panel: bool, scales: Sequence[int]) -> Tensor:
    """The block of every candidate, from its flat position in the matrix and in the theta-like tensor of `shape`."""
    place, length = (slot, shape[1]) if panel or shape[0] == scales[0] else (target, K)
    return torch.div(place, length, rounding_mode="floor") * scales[1] + place % length // BLOCK_COLUMNS


# --- device functions ------------------------------------------------------------------------------------------------


# Constants are taken off and added before and after shifts, where an instruction takes them along.


@jit
def hash_bits(position):
    """`hash_reference` of position + seed: uint32."""
    x = position.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def block_scale(magnitude):
    """(scale, its inverse or 0) of a tile of magnitudes that are zero where nothing is kept."""
    scale = largest(magnitude)
    return scale, tl.where(scale > 0, 1 / scale, 0.0)


@jit
def encode_m(value, inverse, noise):
    # At most 1.0, whose pattern no noise carries over: the largest code needs no clamp.
    share = tl.minimum(tl.abs(value) * inverse, 1.0)
    pattern = share.to(tl.int32, bitcast=True) - (889 << 20) + (noise & 0xFFFFF).to(tl.int32)
    code = tl.maximum(pattern, 0) >> 20
    return (code | ((value.to(tl.int32, bitcast=True) >> 24) & 128)).to(tl.uint8)


@jit
def decode_m(code, scale):
    code = code.to(tl.int32)
    magnitude = code & 127
    pattern = (magnitude * (1 << 20) + (889 << 20)) | ((code << 24) & -2147483648)
    return tl.where(magnitude > 0, pattern.to(tl.float32, bitcast=True) * scale, 0.0)


@jit
def encode_v(value, inverse, noise):
    share = tl.minimum(value * inverse, 1.0)
    pattern = share.to(tl.int32, bitcast=True) - (1777 << 19) + (noise >> 13).to(tl.int32)
    code = tl.maximum(pattern, 1 << 19) >> 19
    return tl.where(value > 0, code, 0).to(tl.uint8)


@jit
def decode_v(code, scale):
    code = code.to(tl.int32)
    value = (code * (1 << 19) + (1777 << 19)).to(tl.float32, bitcast=True) * scale
    return tl.where(code > 0, value, 0.0)
