"""2:4 masks of rows and columns: 4 x 4 blocks that keep two of four in every row and in every column.

Such a mask is 2:4 sparse in the weight and in its transpose, so that forward and backward can both run on sparse tensor
cores (Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable
Masks", arXiv 2102.08124). A block has 90 patterns: the best one is found by trying all, as one matrix product.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["commit_transposable", "follows_pattern", "patterns", "select_transposable"]

_CHUNK = {"cpu": 1 << 12, "cuda": 1 << 18}  # blocks scored at once: 90 doubles each
_STEPS = 64  # of the bisection; what is left of the interval then is below the rounding of a sum
_KEPT = 8  # of a block's 16
_LARGEST = torch.finfo(torch.float32).max  # an infinite score must not meet a zero in a product


@functools.cache
def patterns(device: torch.device) -> Tensor:
    """bool [90, 16]: every 4 x 4 pattern with two in each row and column, row-major, in lexicographic order."""
    lines = [line for line in itertools.product((0, 1), repeat=4) if sum(line) == 2]
    found = [
        [x for line in block for x in line]
        for block in itertools.product(lines, repeat=4)
        if all(sum(line[j] for line in block) == 2 for j in range(4))
    ]
    return torch.tensor(found, dtype=torch.bool, device=device)


def _blocks(matrix: Tensor) -> Tensor:
    """[rows, K] as [blocks, 16], row-major in blocks and inside each."""
    rows, k = matrix.shape
    return matrix.view(rows // 4, 4, k // 4, 4).transpose(1, 2).reshape(-1, 16)


def _matrix(blocks: Tensor, rows: int, k: int) -> Tensor:
    return blocks.view(rows // 4, k // 4, 4, 4).transpose(1, 2).reshape(rows, k)


def _chunks(count: int, device: torch.device) -> Iterator[slice]:
    size = _CHUNK.get(device.type, 1 << 12)
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _magnitudes(blocks: Tensor) -> Tensor:
    """|score| in float64, so that sums of eight are as good as exact."""
    return blocks.double().abs().clamp_max(_LARGEST)


@torch.no_grad()
def select_transposable(score: Tensor) -> Tensor:
    """The best transposable 2:4 mask: bool [rows, K], of every 4 x 4 block the pattern with the largest sum of |score|.

    score: floating point [rows, K], both multiples of 4, without NaN. The first of equal patterns wins.
    """
    table = patterns(score.device)
    weights = table.double().t()
    blocks = _blocks(score.detach())
    chosen = torch.empty(blocks.shape, dtype=torch.bool, device=score.device)
    for part in _chunks(blocks.shape[0], score.device):
        chosen[part] = table[(_magnitudes(blocks[part]) @ weights).argmax(1)]
    return _matrix(chosen, *score.shape)


@torch.no_grad()
def follows_pattern(mask: Tensor) -> bool:
    """Whether a bool mask [rows, K] keeps exactly two of four in every row and column of its 4 x 4 blocks."""
    rows, k = mask.shape
    if rows % 4 or k % 4:
        return False
    blocks = mask.view(rows // 4, 4, k // 4, 4)
    return bool((blocks.sum(1) == 2).all() & (blocks.sum(3) == 2).all())


@torch.no_grad()
def commit_transposable(score: Tensor, old: Tensor, candidate: Tensor | None, quota: int) -> Tensor:
    """The commit's mask: transposable, with `quota` candidates in it if that many can be had, and the largest sum of
    |score| among the masks with as many candidates (to float32's rounding).

    Coordinates of one block displace each other, so the quota is met by a price: every candidate in the mask earns the
    same extra, found by bisection (a Lagrange multiplier). Blocks for which two patterns are worth the same at that
    price change in order while the quota lasts; up to 7 candidates of it can remain unused. Where a mask must have
    more, or cannot hold as many, the nearest is taken. Dead coordinates (neither old nor candidate) enter only where no
    pattern does without.

    Args:
        score: floating point [rows, K], both multiples of 4, without NaN.
        old: bool, active before.
        candidate: bool, disjoint from old; None for all that is not old.
    """
    blocks = _Commit(_blocks(score.detach()), _blocks(old), None if candidate is None else _blocks(candidate))
    taken = _spend(blocks.worth(), quota)
    return _matrix(blocks.best_with(taken), *score.shape)


@dataclasses.dataclass(frozen=True)
class _Commit:
    """The blocks [n, 16] of a commit: scores, and who was active and who is a candidate."""

    score: Tensor
    old: Tensor
    candidate: Tensor | None

    def _parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(blocks, sum of |score| of every pattern, its number of candidates), chunk by chunk."""
        device = self.score.device
        table = patterns(device)
        penalty = 1.0
        if self.candidate is not None and self.score.numel():
            penalty += 2.0 * _KEPT * min(float(torch.linalg.vector_norm(self.score, torch.inf)), _LARGEST)
        for part in _chunks(self.score.shape[0], device):
            value, old = _magnitudes(self.score[part]), self.old[part]
            joins = ~old if self.candidate is None else self.candidate[part]
            if self.candidate is not None:
                value = value.masked_fill_(~(old | joins), -penalty)
            yield part, value @ table.double().t(), (joins.float() @ table.float().t()).round_().long()

    def worth(self) -> Tensor:
        """float32 [n, 9]: the best sum with exactly j candidates in the block; -inf where no pattern has j."""
        worth = torch.full((self.score.shape[0], _KEPT + 1), -torch.inf, device=self.score.device)
        for part, sums, counts in self._parts():
            worth[part] = worth[part].scatter_reduce(1, counts, sums.float(), "amax")
        return worth

    def best_with(self, taken: Tensor) -> Tensor:
        """bool [n, 16]: of every block the best pattern with exactly `taken` candidates."""
        table = patterns(self.score.device)
        chosen = torch.empty_like(self.old)
        for part, sums, counts in self._parts():
            chosen[part] = table[sums.masked_fill_(counts != taken[part, None], -torch.inf).argmax(1)]
        return chosen


def _at(worth: Tensor, price: float) -> Tensor:
    """int8 [n]: candidates of every block when each of them earns `price`."""
    number = torch.arange(_KEPT + 1, device=worth.device)
    chosen = torch.empty(worth.shape[0], dtype=torch.int8, device=worth.device)
    for part in _chunks(worth.shape[0], worth.device):
        chosen[part] = (worth[part].double() + price * number).argmax(1).to(torch.int8)
    return chosen


def _spend(worth: Tensor, quota: int) -> Tensor:
    """int8 [n]: candidates of every block, `quota` together or the nearest below that prices reach."""
    if worth.numel() == 0:
        return worth.new_empty(0, dtype=torch.int8)
    largest = float(worth.max() - worth.masked_fill(worth == -torch.inf, torch.inf).min())
    low, high = -2.0 * largest - 1.0, 2.0 * largest + 1.0
    fewest, most = _at(worth, low), _at(worth, high)
    if int(fewest.sum()) >= quota:
        return fewest
    if int(most.sum()) <= quota:
        return most
    for _ in range(_STEPS):
        middle = (low + high) / 2
        chosen = _at(worth, middle)
        total = int(chosen.sum())
        if total == quota:
            return chosen
        if total < quota:
            low, fewest = middle, chosen
        else:
            high, most = middle, chosen
    more = (most - fewest).clamp_min_(0)
    affordable = more.cumsum(0) <= quota - int(fewest.sum())
    return torch.where(affordable, fewest + more, fewest)
