"""Counter-based random bits, Philox 4x32 with seven rounds, and stochastic rounding to bfloat16 with them.

Random bits are a function of (seed, counter) alone: no generator's state has to be kept, and a resumed run draws the
same bits (J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One counter gives four words,
which is why kernels let four neighbouring tiles share it. Seven rounds are the fewest that pass all statistical tests
there; ten, the usual number, are their authors' margin, and cost an update of weights 4 % of its time.

Stochastic rounding adds uniform bits below the last one kept and truncates, so that the expectation is the value itself
(Gupta et al. 2015, arXiv 1502.02551): an update far below half a step of bfloat16 is not lost but seldom.
"""

import torch
from torch import Tensor

from ._triton import jit, tl

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7


def philox_reference(seed: int, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words (int64 in [0, 2^32), of the counter's shape) of every int64 counter, as `random_words` draws them.

    seed: 64 bits, the key; the counter's low 32 bits are the first word of Philox' counter, the rest is zero.
    """
    c0, c1, c2, c3 = counter & _MASK, torch.zeros_like(counter), torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        low = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits, wrapped: the high half is right all the same
        high = (low[0] >> 32) & _MASK, (low[1] >> 32) & _MASK
        c0, c1, c2, c3 = high[1] ^ c1 ^ k0, low[1] & _MASK, high[0] ^ c3 ^ k1, low[0] & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def round_reference(values: Tensor, noise: Tensor) -> Tensor:
    """float32 values as bfloat16, rounded up in magnitude where 16 bits of `noise` (int64) say so. Zero and what is not
    finite stay what they are."""
    patterns = values.float().view(torch.int32)
    rounded = ((patterns.long() + (noise & 0xFFFF)) & 0xFFFF0000).int().view(torch.float32)
    return torch.where(values.isfinite(), rounded, values.float()).to(torch.bfloat16)


@jit
def round_bf16(value, noise):
    """`round_reference` of float32 values with uint32 noise."""
    pattern = value.to(tl.int32, bitcast=True)
    bumped = ((pattern + (noise & 0xFFFF).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
    finite = (pattern & 0x7F800000) != 0x7F800000
    return tl.where(finite, bumped, value).to(tl.bfloat16)


@jit
def random_words(key, counter):
    """`philox_reference` of an integer key and counters: four uint32 words of each."""
    return tl.randint4x(key, counter, n_rounds=7)
