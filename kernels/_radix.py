"""Device functions for exact selection by magnitude: a radix search over the bit patterns of floats.

A key is the bit pattern without its sign, an integer that orders like the magnitude. Eight bits are decided per pass
over the data: a pass counts, among the keys that agree with the digits decided so far, how often each next digit
occurs. Which digit the k-th largest has is computed from those counts on the device by whoever needs it.
"""

import torch

from ._triton import jit, tl

DIGIT_BITS = 8
BINS = 1 << DIGIT_BITS
# Digits that can differ between keys: the low bits of a half-width float in float32 are zero.
DIGITS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 4, torch.float64: 8}


@jit
def magnitude_key(value, DOUBLE: tl.constexpr):
    """int64 key of a float64 value, int32 key of any other."""
    if DOUBLE:
        key = value.to(tl.float64).to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    elif value.dtype == tl.bfloat16:  # its bits are float32's upper half; the interpreter's conversion loses subnormals
        key = (value.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF) << 16
    else:
        key = value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return key


@jit
def digit_counts(digit, keep):
    """int32 [256]: how often each digit (int32 [n], 0 to 255) occurs where `keep`.

    Without `tl.histogram`'s own mask, which counted wrongly in small tiles on an H100 (triton 3.6): what is not kept is
    counted as digit 0 and taken off again.
    """
    found = tl.histogram(tl.where(keep, digit, 0), 256)
    dropped = tl.sum((~keep).to(tl.int32), axis=0)
    return found - tl.where(tl.arange(0, 256) == 0, dropped, 0)


@jit
def decided_digits(counts, k, DIGITS: tl.constexpr):
    """The first DIGITS digits of the k-th largest key, as one int64; negative when fewer than k keys exist.

    counts: int64 [passes, 256]. k must be positive for the result to mean anything.
    """
    bins = tl.arange(0, 256)
    prefix = k * 0
    remaining = k
    for digit in tl.static_range(DIGITS):
        here = tl.load(counts + digit * 256 + bins)
        at_least = tl.sum(here, axis=0) - tl.cumsum(here, axis=0) + here
        chosen = tl.sum((at_least >= remaining).to(tl.int32), axis=0) - 1
        remaining -= tl.sum(tl.where(bins > chosen, here, 0), axis=0)
        prefix = prefix * 256 + chosen
    return prefix


@jit
def threshold_key(counts, k, DIGITS: tl.constexpr, DOUBLE: tl.constexpr):
    """The smallest key (int64) that is taken: 0 when fewer than k keys exist, beyond every key when k is 0."""
    width: tl.constexpr = 64 if DOUBLE else 32
    prefix = decided_digits(counts, k, DIGITS)
    key = tl.where(prefix < 0, 0, prefix) << (width - 8 * DIGITS)
    return tl.where(k <= 0, 0x7FFFFFFFFFFFFFFF, key)
