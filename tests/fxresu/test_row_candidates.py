"""Candidates that are rows: transformers' Conv1D, whose weight is [in, out], against the same model of nn.Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxresu
from fxresu import CycleConfig, ResuCycle
from fxresu.model_state import managed_weights

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


class Block(nn.Module):
    def __init__(self, flipped: bool) -> None:
        super().__init__()
        self.up = Conv1D(192, 160) if flipped else nn.Linear(160, 192)
        self.down = Conv1D(160, 192) if flipped else nn.Linear(192, 160)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.down(torch.tanh(self.up(x))) - y).square().mean()


def pair() -> tuple[Block, Block]:
    torch.manual_seed(0)
    flipped, plain = Block(True), Block(False)
    for mine, theirs in zip(plain.parameters(), flipped.parameters()):
        mine.data = torch.randn_like(mine) / 10
        theirs.data = mine.data.t().contiguous() if mine.dim() == 2 else mine.data.clone()
    return flipped, plain


def cycle_of(model: nn.Module, moments: str, commit: str, compile: bool = False) -> ResuCycle:
    fxresu.transform(model, sparsity=0.5, granularity="layer", candidates=0.4, compile=compile)
    config = CycleConfig(
        cycles=3, train_steps=2, stabilize_steps=1, resu_steps=3, granularity="layer", candidates=0.4, sparsity_end=0.5,
        schedule="constant", rule="adam", theta_init="zero", theta_moments=moments, commit=commit,
    )  # fmt: skip
    return ResuCycle(model, torch.optim.AdamW(model.parameters(), lr=1e-2), config, loss=lambda m, b: m(*b))


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 160, generator=generator), torch.randn(16, 160, generator=generator)


@pytest.mark.parametrize("commit", ["amnesty", "threshold"])
def test_three_cycles_are_those_of_the_transposed_linears(commit: str) -> None:
    """Training, masks, rotation of the candidates and commits do not depend on which way round a weight lies."""
    flipped, plain = pair()
    ours, theirs = cycle_of(flipped, "fp32", commit), cycle_of(plain, "fp32", commit)
    grown = 0
    for step in range(18):
        before = {n: m.entry.mask() for n, m in managed_weights(flipped).items()}
        a, b = ours.step(data(step)), theirs.step(data(step))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        for name, mine in managed_weights(flipped).items():
            twin = managed_weights(plain)[name]
            near = {"rtol": 1e-3, "atol": 1e-5}
            torch.testing.assert_close(mine.parameter.detach(), twin.parameter.detach().t(), **near)
            if mine.entry.bits is not None:
                assert torch.equal(mine.entry.mask(), twin.entry.mask().t())
                grown += 0 if before[name] is None else int((mine.entry.mask() & ~before[name]).sum())
            if mine.entry.columns is not None:
                assert torch.equal(mine.entry.columns, twin.entry.columns)
                assert mine.entry.theta_shape == tuple(reversed(twin.entry.theta_shape))
                torch.testing.assert_close(mine.entry.m, twin.entry.m.t(), **near)
    assert ours.stage == theirs.stage and grown > 0


@pytest.mark.parametrize("moments", ["8bit", "bf16"])
def test_small_moments_and_checkpoints(moments: str, tmp_path) -> None:
    """A copy that goes on from the state in the middle of RESU ends where the original does."""
    flipped, _ = pair()
    cycle = cycle_of(flipped, moments, "amnesty")
    for step in range(5):
        cycle.step(data(step))
    assert cycle.stage == "resu"
    entry = managed_weights(flipped)["up.weight"].entry
    assert entry.m.shape == (64, 192) and int(entry.columns.max()) < 160
    saved, weights = copy.deepcopy(cycle.state_dict()), copy.deepcopy(flipped.state_dict())
    optimizer = copy.deepcopy(cycle.optimizer.state_dict())
    again, _ = pair()
    other = cycle_of(again, moments, "amnesty")
    again.load_state_dict(weights)
    other.optimizer.load_state_dict(optimizer)
    other.load_state_dict(saved)
    for step in range(5, 12):
        assert cycle.step(data(step)) == other.step(data(step))
    for mine, theirs in zip(flipped.parameters(), again.parameters()):
        assert torch.equal(mine, theirs)


def test_inspect_counts_the_panel_alone() -> None:
    """At alpha = 0.4 a linear keeps 64 of 160 inputs, or 128 of 192, whichever way its weight lies;
    its whole input (which belongs to the caller, or to tanh) is not among what it keeps."""
    for model in pair():
        report = fxresu.inspect(model, data(0), candidates=0.4, phase="resu")
        kept = {row.weight: (row.after, row.kept) for row in report.rows}
        assert kept == {
            "up.weight": ("fxresu.linear_columns", 16 * 64 * 4),
            "down.weight": ("fxresu.linear_columns", 16 * 128 * 4),
        }
