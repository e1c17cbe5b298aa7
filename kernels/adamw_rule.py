"""AdamW on a flat weight whose own precision is the master: the rule, its operands, and the reference.

    w <- w (1 - lr * weight_decay);  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

as `torch.optim.AdamW` has it (Loshchilov and Hutter, arXiv 1711.05101); `maximize` turns g around. All arithmetic is in
float32 (float64 if an operand is). What is stored in bfloat16, weight or moment, is rounded stochastically, so that no
copy of the weight in float32 is needed and v does not stand still; moments in 8 bits are the codes of `blockwise8`, a
float32 scale for every BLOCK entries, and of v the root is kept, which halves the range that a code must span.

v may be factored as in Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): of a matrix, a row vector and a column
vector of running means of g^2 and their mean, v_ij = row_i * col_j / mean. `factored_moments` keeps them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._check import math_dtype
from .blockwise8 import decode_reference, encode_reference
from .philox import philox_reference, round_reference

BLOCK = 256  # entries that share a scale
LANES = 4  # blocks side by side in a tile
WORDS = 4  # of one counter: tiles that share it
TILE = BLOCK * LANES
SPAN = TILE * WORDS  # entries of one program
_MIX = 0x9E3779B9  # v's noise, from the same word: an odd factor moves other bits to the top


class AdamW(NamedTuple):
    """The numbers of one update. step counts updates, this one included; seed decides the rounding with it."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    maximize: bool = False
    seed: int = 0

    @property
    def key(self) -> int:
        """Philox' key of this update: 30 bits of the seed above, 31 of the step below. Always 63 bits long and odd, so
        that Triton compiles for it once (it would for 1, for multiples of 16 and for 32 bits separately)."""
        return (1 << 62) | ((self.seed & 0x3FFFFFFF) << 32) | ((2 * self.step + 1) & 0xFFFFFFFF)


@dataclass(frozen=True, slots=True, eq=False)
class AdamWOperands:
    """The tensors of one update, all contiguous and taken as flat.

    weight, grad: of one shape, any float dtypes. m, v: of as many entries and of a float dtype, or uint8 with float32
    scales m_scale and v_scale of ceil(n / 256) entries.
    row, col, mean: instead of v (None, as v_scale): float32 vectors of the whole matrix's rows and columns, and float32
    [1]; they are read only.
    offset: position of entry 0 in the whole weight, where these are a piece of it; a multiple of 4096. An update in
    pieces gives the same bits as one of the whole.
    """

    weight: Tensor
    grad: Tensor
    m: Tensor
    v: Tensor | None
    m_scale: Tensor | None = None
    v_scale: Tensor | None = None
    offset: int = 0
    row: Tensor | None = None
    col: Tensor | None = None
    mean: Tensor | None = None


def scale_count(entries: int) -> int:
    """Scales of a moment in 8 bits."""
    return (entries + BLOCK - 1) // BLOCK


def noise_reference(entries: int, key: int, offset: int, device: torch.device) -> Tensor:
    """A word of noise for every entry, int64 [entries]."""
    position = torch.arange(offset, offset + entries, device=device)
    counter = position // SPAN * TILE + position % TILE
    words = torch.stack(philox_reference(key, counter))
    return words.gather(0, (position // TILE % WORDS)[None])[0]


def noise_of_v(noise: Tensor) -> Tensor:
    """19 bits for v of a word's 32."""
    return ((noise * _MIX) & 0xFFFFFFFF) >> 13


def load_moment(codes: Tensor, scale: Tensor | None, name: str, wide: torch.dtype = torch.float32) -> Tensor:
    """A moment ("m" or "v") in a float dtype, flat, whatever it is stored in; v is the mean square itself."""
    if scale is None:
        return codes.reshape(-1).to(wide, copy=True)
    block = torch.arange(codes.numel(), device=codes.device) // BLOCK
    value = decode_reference(codes.reshape(-1), scale[block], name)
    return (value.square() if name == "v" else value).to(wide)


def store_moment(values: Tensor, codes: Tensor, scale: Tensor | None, name: str, noise: Tensor) -> None:
    """Store a flat moment in its form, rounded by `noise` (int64 words, one an entry)."""
    if codes.dtype == torch.bfloat16:
        word = noise >> 16 if name == "m" else noise_of_v(noise)
        codes.view(-1).copy_(round_reference(values, word))
    elif scale is None:
        codes.view(-1).copy_(values)
    else:
        block = torch.arange(codes.numel(), device=codes.device) // BLOCK
        kept = values.sqrt() if name == "v" else values
        word = (noise >> 16) << 4 if name == "m" else noise_of_v(noise)
        fresh, scales = encode_reference(kept, block, scale.numel(), word, name)
        codes.view(-1).copy_(fresh)
        scale.copy_(scales)


def factored_root(
    row: Tensor, col: Tensor, mean: Tensor, start: int, entries: int, wide: torch.dtype = torch.float32
) -> Tensor:
    """Root of a factored v at entries start ... start + entries of the matrix, flat.

    Row by mean first, and a root of each: row * col leaves the range of float32 where gradients are below 1e-10.
    """
    place = torch.arange(start, start + entries, device=row.device)
    share = torch.where(mean > 0, row.to(wide) / mean.to(wide), 0).sqrt()
    line = torch.div(place, col.numel(), rounding_mode="floor")
    return share[line].mul_(col.to(wide).sqrt()[place - line * col.numel()])


def adamw_step_reference(
    o: AdamWOperands, rule: AdamW, scale: Tensor | None = None, check: Tensor | None = None
) -> None:
    """One update in place; `scale` multiplies the gradient, and NaN in it skips the update, as does a `check` that is
    not finite."""
    if (scale is not None and bool(scale.isnan())) or (check is not None and not bool(check.isfinite())):
        return
    wide = math_dtype(o.weight.dtype, o.grad.dtype, o.m.dtype)
    noise = noise_reference(o.weight.numel(), rule.key, o.offset, o.weight.device)
    g = o.grad.reshape(-1).to(wide) * (-1 if rule.maximize else 1)
    if scale is not None:
        g = g * scale.to(wide)
    m = load_moment(o.m, o.m_scale, "m", wide).mul_(rule.beta1).add_(g, alpha=1 - rule.beta1)
    if o.v is not None:
        v = load_moment(o.v, o.v_scale, "v", wide).mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
        root = v.sqrt()
        store_moment(v, o.v, o.v_scale, "v", noise)
    else:
        assert o.row is not None and o.col is not None and o.mean is not None
        root = factored_root(o.row, o.col, o.mean, o.offset, g.numel(), wide)
    denominator = root.mul_((1 - rule.beta2**rule.step) ** -0.5).add_(rule.eps)
    w = o.weight.reshape(-1).to(wide) * (1 - rule.lr * rule.weight_decay)
    w.addcdiv_(m, denominator, value=-rule.lr / (1 - rule.beta1**rule.step))
    store_moment(m, o.m, o.m_scale, "m", noise)
    o.weight.view(-1).copy_(round_reference(w, noise) if o.weight.dtype == torch.bfloat16 else w)
