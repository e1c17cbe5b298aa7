"""Transformed models in every phase and storage, for the tests of ordinary code on them."""

from __future__ import annotations

import pytest
import torch
from fxresu_testing import Net, in_phase

import fxresu

RESIDENT = [("dense", "resident"), ("sparse", "resident"), ("resu", "resident")]
ALL = [*RESIDENT, ("resu", "packed")]
everywhere = pytest.mark.parametrize(("phase", "storage"), ALL)
resident = pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])


def make(phase: str, storage: str = "resident", compile: object = False, **kwargs) -> Net:
    torch.manual_seed(0)
    return in_phase(fxresu.transform(Net(**kwargs), storage=storage, compile=compile), phase)


def x() -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
