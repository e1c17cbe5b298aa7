"""The demo's GPT through three cycles of changing sparsity, compiled by Inductor: counts of everything."""

from __future__ import annotations

import pytest
import torch

import fxresu
from fxresu import CycleConfig, ResuCycle
from fxresu.models import GPT, GPTConfig
from fxresu.runner import runner_of

SHAPE = GPTConfig(64, context=16, layers=2, heads=2, width=32)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_one_graph_a_phase_and_every_linear_rewritten(storage: str, device: str) -> None:
    model = GPT(SHAPE).to(device)
    fxresu.transform(model, storage=storage, compile={"fullgraph": True})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = CycleConfig(
        cycles=3, train_steps=3, stabilize_steps=2, resu_steps=3, sparsity_start=0.3, sparsity_end=0.7, train_rest=True
    )
    cycle = ResuCycle(model, optimizer, config)
    tokens = torch.arange(17, device=device).remainder(5).expand(4, 17)
    losses = [float(cycle.step((tokens[:, :-1], tokens[:, 1:]))) for _ in range(cycle.total_steps)]
    assert cycle.finished and losses[-1] < losses[0]
    entries = runner_of(model).entries
    assert {tag.split("/")[0] for tag in entries} == {"dense", "sparse", "resu"}
    for tag, entry in entries.items():
        assert (len(entry.graphs), entry.breaks, entry.recompiles) == (1, 0, 0), tag
        (record,) = entry.graphs
        assert len(record.rewrites) == 4 * SHAPE.layers
        assert not [r for r in record.rewrites if r.reason], tag
        packed = storage == "packed" and tag.startswith("resu")
        assert {r.after for r in record.rewrites} == {"fxresu.linear_packed" if packed else "fxresu.linear"}
    assert not runner_of(model).eager_calls
