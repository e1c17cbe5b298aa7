"""The memory ledger against tensors whose bytes are known, and the summary."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxresu
from fxresu.activations import saved_bytes
from fxresu.ledger import COMPONENTS, current_rss, peak_rss

ROWS, K = 64, 96


def make(storage: str = "resident", **options) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(K, ROWS), nn.ReLU(), nn.LayerNorm(ROWS))
    fxresu.transform(model, compile=False, storage=storage, **options)
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, K)).square().mean().backward()
    optimizer.step()


WEIGHT, REST = ROWS * K * 4, 3 * ROWS * 4
MASK = ROWS * K // 8


def test_bill_of_dense_training() -> None:
    model, optimizer = make()
    train(model, optimizer)
    bill = fxresu.memory_bill(model, optimizer)
    assert tuple(bill) == COMPONENTS
    steps = 4  # one float32 step count a parameter
    assert bill["managed weights"] == WEIGHT and bill["other parameters"] == REST
    assert bill["gradients"] == WEIGHT + REST
    assert bill["optimizer state, managed"] == 2 * WEIGHT + steps
    assert bill["optimizer state, other"] == 2 * REST + 3 * steps
    assert bill["masks"] == bill["θ"] == bill["θ moments"] == bill["θ gradient"] == 0


@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_bill_of_resu(storage: str) -> None:
    """Half the coordinates are candidates; θ has storage of its own only where the weight does not hold it."""
    model, optimizer = make(storage)
    train(model, optimizer)
    fxresu.set_phase(model, "resu", optimizer=optimizer)
    model(torch.randn(4, K)).square().mean().backward()
    bill = fxresu.memory_bill(model, optimizer)
    assert bill["optimizer state, managed"] == 0
    assert bill["θ gradient"] == WEIGHT // 2 and bill["θ moments"] == WEIGHT
    stand_in = 4
    packed = storage == "packed"
    assert bill["θ"] == (WEIGHT // 2 if packed else 0)
    assert bill["managed weights"] == (WEIGHT // 2 + stand_in if packed else WEIGHT)
    assert MASK < bill["masks"] <= MASK + 2 * 8 * ROWS
    assert bill["gradients"] == REST  # none of the weight itself


def test_shared_storage_counts_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    fxresu.transform(model, compile=False)
    assert fxresu.memory_bill(model)["managed weights"] == 8 * 8 * 4


def test_saved_bytes_of_known_graphs() -> None:
    linear = nn.Linear(K, ROWS)
    x = torch.randn(4, K)
    assert saved_bytes(linear(x).sum(), linear.parameters()) == x.nbytes
    x = torch.randn(4, K, requires_grad=True)
    assert saved_bytes(x.exp().sum()) == x.nbytes
    compiled = torch.compile(lambda t: t.exp().exp().sum(), backend="aot_eager")
    assert saved_bytes(compiled(x)) in (x.nbytes, 2 * x.nbytes)


def test_resident_set_is_that_of_a_process_with_torch() -> None:
    assert 50_000_000 < current_rss() <= peak_rss() * 1.05


def test_summary_names_what_is_managed_and_what_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Embedding(10, K), nn.Linear(K, ROWS), nn.Conv1d(K, K, 3, groups=K))
    fxresu.transform(model, sparsity=0.25, compile=False)
    fxresu.set_phase(model, "resu", optimizer=None)
    text = fxresu.summary(model)
    assert capsys.readouterr().out == text + "\n"
    (row,) = [line.split() for line in text.splitlines() if line.startswith("1.weight")]
    assert row[1:5] == [f"{ROWS}x{K}", f"{ROWS * K * 3 // 4:,}", f"{ROWS * K // 4:,}", "25.0%"]
    assert "0.weight: embedding" in text and "2.weight: a grouped convolution" in text


def test_ledger_needs_a_transformed_model() -> None:
    with pytest.raises(TypeError, match="has not been transformed"):
        fxresu.memory_bill(nn.Linear(2, 2))
