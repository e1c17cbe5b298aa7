"""Tensors kept in 8 bits for a while: logarithmic codes relative to the largest magnitude of their block of 256.

Neighbouring levels differ by 2^(1/8), so that a value comes back off by at most 2^(1/16) - 1 = 4.4 % of itself,
however small it is: a denominator such as Adam's v needs that, and a linear code rounds most of it to zero. Unsigned
codes reach 31.75 octaves below the block's largest value (3e-10 of it) and never turn a positive value into zero;
signed ones reach 15.75 octaves (2e-5), and what is smaller than half of that becomes zero. Zero and the block's
largest magnitude are exact. Rounding is to nearest, because a tensor is compressed once and decompressed once;
moments that are updated in 8 bits need stochastic rounding (`blockwise8`). Encoding what was decoded gives the same
codes again.

Blockwise scales: Dettmers et al. 2021, arXiv 2110.02861. Bytes a value with its share of the scale: 1.0156.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["BLOCK", "compressed_bytes", "decode", "encode"]

BLOCK = 256
_OCTAVE = 8  # levels in a factor of two
_CHUNK = 1 << 20  # elements at a time, some 30 MB of temporaries, whatever the tensor's size


def compressed_bytes(numel: int) -> int:
    """Bytes of the codes and scales of so many values."""
    return numel + 4 * -(-numel // BLOCK)


@functools.cache
def _levels(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(values of the codes, where one ends and the next begins) as shares of the scale, ascending from 0, float32."""
    top = 127 if signed else 255
    exponents = (torch.arange(1, top + 1, dtype=torch.float64) - top) / _OCTAVE
    levels = torch.cat([torch.zeros(1, dtype=torch.float64), torch.exp2(exponents)])
    # In the middle of the logarithms: the largest relative error is the same to both sides.
    middles = (levels[1:-1] * levels[2:]).sqrt()
    lowest = levels[1:2] / 2 if signed else torch.zeros(1, dtype=torch.float64)
    return levels.float().to(device), torch.cat([lowest, middles]).float().to(device)


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(uint8 codes [n], float32 scales [ceil(n / 256)]) of a flat floating tensor of n finite values.

    Args:
        signed: False promises that no value is negative, and keeps twice the range.
    """
    codes = torch.empty(values.numel(), dtype=torch.uint8, device=values.device)
    scales = torch.empty(-(-values.numel() // BLOCK), dtype=torch.float32, device=values.device)
    levels = _levels(signed, values.device)[1]
    for start in range(0, values.numel(), _CHUNK):
        part = values[start : start + _CHUNK].float()
        blocks = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1)
        scales[start // BLOCK : start // BLOCK + scale.numel()] = scale
        # float64: a float32 quotient of denormal numbers is not to be trusted.
        share = (blocks.double().abs() / scale.double().clamp_min(1e-300)[:, None]).float()
        # Positive values below every level of an unsigned code are lifted to the smallest one: the share of a value
        # that float32 cannot divide any more is 0, so the value itself decides.
        code = torch.bucketize(share, levels, out_int32=True)
        code = torch.where(blocks.gt(0) & code.eq(0), 1, code) if not signed else code
        code = code + 128 * (blocks.lt(0) & code.gt(0)) if signed else code
        codes[start : start + part.numel()] = code.flatten()[: part.numel()].to(torch.uint8)
    return codes, scales


def decode(codes: Tensor, scales: Tensor, signed: bool, out: Tensor) -> Tensor:
    """Write the values of `encode`'s result into `out`, a flat floating tensor [n]; returns it."""
    levels = _levels(signed, codes.device)[0]
    for start in range(0, codes.numel(), _CHUNK):
        part = codes[start : start + _CHUNK].int()
        scale = scales[start // BLOCK : start // BLOCK + -(-part.numel() // BLOCK)]
        value = levels[part & 127 if signed else part]
        value = torch.nn.functional.pad(value, (0, -value.numel() % BLOCK)).view(-1, BLOCK) * scale[:, None]
        value = value.flatten()[: part.numel()]
        out[start : start + part.numel()] = torch.where(part.gt(127), -value, value) if signed else value
    return out
