"""The order of the data is a function of seed and step."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fxresu import ConfigError, StepSampler


def test_every_epoch_is_a_permutation_and_any_start_continues_it() -> None:
    whole = list(StepSampler(22, 5, seed=3, stop=12))
    assert len(whole) == 12 == len(StepSampler(22, 5, stop=12))
    for epoch in range(3):
        indices = [i for part in whole[4 * epoch : 4 * epoch + 4] for i in part]
        assert len(set(indices)) == 20 and max(indices) < 22
    assert whole[:4] != whole[4:8]
    for start in range(12):
        assert list(StepSampler(22, 5, seed=3, start=start, stop=12)) == whole[start:]
    assert list(StepSampler(22, 5, seed=4, stop=12)) != whole
    orders = {tuple(next(iter(StepSampler(50, 50, seed=s, start=e)))) for s in range(4) for e in range(4)}
    assert len(orders) == 16


def test_in_a_data_loader_with_workers() -> None:
    data = TensorDataset(torch.arange(22))
    before = torch.get_rng_state()
    order = [b[0].tolist() for b in itertools.islice(StepSampler(22, 5).__iter__(), 0)]
    assert order == [] and torch.equal(torch.get_rng_state(), before)
    for workers in (0, 2):
        loader = DataLoader(data, batch_sampler=StepSampler(22, 5, start=3, stop=9), num_workers=workers)
        assert [b[0].tolist() for b in loader] == list(StepSampler(22, 5, start=3, stop=9))


@pytest.mark.parametrize("size, batch, start", [(3, 4, 0), (3, 0, 0), (3, 1, -1)])
def test_wrong_sizes(size: int, batch: int, start: int) -> None:
    with pytest.raises(ConfigError, match="batch_size=|start="):
        StepSampler(size, batch, start=start)


def test_without_an_end() -> None:
    endless = StepSampler(4, 2)
    assert len(list(itertools.islice(endless, 100))) == 100
    with pytest.raises(TypeError):
        len(endless)
