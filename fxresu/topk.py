"""Exact top-k selection on tensors, deterministic under ties, in little memory.

Scores become int32 keys whose order is the order of the scores, so that a selection is a threshold on integers: exact
counts and ties (broken by the lowest index) need no float tolerance. Matrices are read in chunks of rows; no index
tensor as large as a matrix ever exists, and several tensors are ranked together without concatenating them (a radix
search counts digits of the keys over all of them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fxresu.errors import ConfigError

__all__ = [
    "INELIGIBLE",
    "Segment",
    "count_true",
    "keep_count",
    "magnitude_keys",
    "row_chunks",
    "select_flat",
    "select_rows",
    "share_of",
    "signed_keys",
]

INELIGIBLE = -(2**31)
"""Key below every score's key: a coordinate that may not be selected."""

_MIN_CHUNK, _MAX_CHUNK = 1 << 17, 1 << 22
_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of the 32-bit key, most significant first


def share_of(n: int, share: float) -> int:
    """round_half_up(share * n), exact for the decimal that `share` prints as (0.1 of 5 is 0.5, hence 1)."""
    return math.floor(Fraction(repr(float(share))) * n + Fraction(1, 2))


def keep_count(n: int, sparsity: float) -> int:
    """How many of `n` weights are kept at `sparsity` in [0, 1): round_half_up((1 - sparsity) * n), at least 1 if n >
    0."""
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"sparsity={sparsity!r}; must be in [0, 1)")
    kept = math.floor((1 - Fraction(repr(float(sparsity)))) * n + Fraction(1, 2))
    return max(kept, min(n, 1))


def count_true(mask: Tensor) -> int:
    """Number of True elements. In pieces: sums of bools first cast the whole mask to int64 (on GPUs `count_nonzero`
    does so too)."""
    if mask.numel() == 0 or mask.dim() == 0:
        return int(torch.count_nonzero(mask))
    chunks = row_chunks(mask.shape[0], mask.numel() // mask.shape[0])
    return int(torch.stack([torch.count_nonzero(mask[first:last]) for first, last in chunks]).sum())


def magnitude_keys(score: Tensor) -> Tensor:
    """int32 keys >= 0 in the order of |score| compared in fp32; same shape as `score`."""
    return score.detach().to(torch.float32).view(torch.int32) & 0x7FFFFFFF


def signed_keys(values: Tensor) -> Tensor:
    """int32 keys in the order of the fp32 `values`, negative ones included; same shape. NaN has no place in the
    order."""
    bits = values.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def row_chunks(rows: int, row_size: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges (first, last + 1) of rows that together cover `rows`, each about 1/64 of the matrix, whole `multiple`s of
    rows."""
    elements = min(max(rows * row_size // 64, _MIN_CHUNK), _MAX_CHUNK)
    step = max(elements // max(row_size, 1) // multiple, 1) * multiple
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def select_rows(keys: Tensor, k: int | Tensor) -> Tensor:
    """bool [r, c]: in every row the `k` largest keys (an int, or an integer tensor [r]), ties to the lowest column.

    `keys` is int32 [r, c]; a row must have at least its `k` keys above INELIGIBLE.
    """
    rows, cols = keys.shape
    if isinstance(k, Tensor):
        low, high = (int(x) for x in torch.aminmax(k)) if rows else (0, 0)
        if low != high:
            ranked = keys.topk(high, dim=1).values
            return _above(keys, ranked.gather(1, (k - 1).clamp_min(0)[:, None].long()), k[:, None])
        k = low
    if k == 0 or rows == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    if k == cols:
        return torch.ones_like(keys, dtype=torch.bool)
    # The k-th largest is the (cols - k + 1)-th smallest: rank from the nearer end.
    if 2 * k <= cols:
        threshold = keys.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    else:
        threshold = keys.topk(cols - k + 1, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    return _above(keys, threshold, k)


def _above(keys: Tensor, threshold: Tensor, k: int | Tensor) -> Tensor:
    """Keys over each row's threshold, and as many that equal it, from the left, as make `k`."""
    chosen = keys > threshold
    tied = keys == threshold
    need = k - chosen.sum(1, keepdim=True)
    return chosen.logical_or_(tied.logical_and_(tied.cumsum(1, dtype=torch.int32) <= need))


@dataclass(frozen=True)
class Segment:
    """One tensor's part in a joint selection: `keys(first, last)` gives int32 keys of the rows first..last-1, any 2-D
    shape."""

    rows: int
    row_size: int
    keys: Callable[[int, int], Tensor]

    def chunks(self) -> Iterator[tuple[int, int]]:
        return row_chunks(self.rows, self.row_size)


def select_flat(segments: Sequence[Segment], k: int) -> Iterator[tuple[int, int, int, Tensor]]:
    """The `k` largest keys over all segments together, ties to the first segment and then to the lowest index in it.

    Yields (segment index, first row, last row + 1, bool chunk in the shape of its keys) for every chunk in order. There
    must be at least `k` keys above INELIGIBLE.
    """
    threshold, above, equal = _kth_largest(segments, k) if k > 0 else (2**31 - 1, 0, 0)
    need = k - above
    all_ties = k > 0 and need == equal  # the usual case: no tie has to be counted
    for index, segment in enumerate(segments):
        for first, last in segment.chunks():
            keys = segment.keys(first, last)
            if all_ties:
                chosen = keys >= threshold
            else:
                chosen = keys > threshold
                if need > 0:
                    tied = keys == threshold
                    chosen |= _first_true(tied, need)
                    need = max(need - count_true(tied), 0)
            yield index, first, last, chosen


def _first_true(flags: Tensor, n: int) -> Tensor:
    flat = flags.flatten()
    return (flat & (flat.cumsum(0, dtype=torch.int32) <= n)).view_as(flags)


def _kth_largest(segments: Sequence[Segment], k: int) -> tuple[int, int, int]:
    """(key of rank k from the top, number of keys above it, number of keys equal to it), by radix search from the top
    digit."""
    prefix, above, count = 0, 0, 0
    for level, (shift, bits) in enumerate(_DIGITS):
        histogram = _digit_histogram(segments, level, prefix, shift, bits)
        for digit in range((1 << bits) - 1, -1, -1):
            count = histogram[digit]
            if above + count >= k:
                break
            above += count
        else:
            raise ValueError(f"k={k} exceeds the {above} keys of the segments")
        prefix = (prefix << bits) | digit if level else digit - 1024  # the top digit is signed
    return prefix, above, count


def _digit_histogram(segments: Sequence[Segment], level: int, prefix: int, shift: int, bits: int) -> list[int]:
    bins = 1 << bits
    total = torch.zeros(bins, dtype=torch.int64)
    for segment in segments:
        partial: Tensor | None = None
        for first, last in segment.chunks():
            keys = segment.keys(first, last).flatten()
            if level == 0:
                digits = (keys >> shift) + 1024
            else:
                # Keys of another prefix go to one bin past the end: no data-dependent shape.
                digits = torch.where(keys >> (shift + bits) == prefix, (keys >> shift) & (bins - 1), bins)
            counts = torch.bincount(digits, minlength=bins + 1)[:bins]
            partial = counts if partial is None else partial + counts
        if partial is not None:
            total += partial.cpu()
    return total.tolist()
