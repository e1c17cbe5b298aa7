"""`StepSampler`: the order of the data as a function of (seed, step), which a resumed loop takes up at any step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from .errors import ConfigError

__all__ = ["StepSampler"]


class StepSampler(Sampler[list[int]]):
    """Batches of indices, shuffled anew in each epoch, from any step on: `DataLoader(data, batch_sampler=...)`.

    Each epoch is a permutation that depends on (seed, epoch) alone, cut into batches; a rest that fills no batch is
    left out. Global random states are neither read nor changed.

    Args:
        size: examples in the data set.
        batch_size: indices of a batch.
        seed: of the order.
        start: number of the first batch: the steps made so far, times the micro-batches of a step.
        stop: number of the batch to end before; None never ends.

    Raises:
        ConfigError: sizes below 1, or fewer examples than one batch.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int = 0, start: int = 0, stop: int | None = None) -> None:
        if batch_size < 1 or size < batch_size:
            raise ConfigError(f"batch_size={batch_size}: use a number from 1 to the {size} examples there are")
        if start < 0:
            raise ConfigError(f"start={start}: must be a batch number, 0 or more")
        self.size, self.batch_size, self.seed, self.start, self.stop = size, batch_size, seed, start, stop

    @property
    def batches_per_epoch(self) -> int:
        """Batches that one pass over the data has."""
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        step, epoch, order = self.start, -1, torch.empty(0)
        while self.stop is None or step < self.stop:
            if step // self.batches_per_epoch != epoch:
                epoch = step // self.batches_per_epoch
                key = hashlib.blake2b(f"{self.seed}:{epoch}".encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key) >> 1)
                order = torch.randperm(self.size, generator=generator)
            first = step % self.batches_per_epoch * self.batch_size
            yield order[first : first + self.batch_size].tolist()
            step += 1

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("a StepSampler without stop has no length")
        return max(0, self.stop - self.start)
