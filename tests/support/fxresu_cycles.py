"""A small learnable problem and a cycle over it, for the tests of the cycle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxresu
from fxresu import CycleConfig, ResuCycle

WIDTH, CLASSES = 32, 10
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Net(nn.Module):
    """Residual blocks with a loss in the forward; learnable, unlike random labels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down):
            x = x + down(F.gelu(up(x)))
        return F.cross_entropy(self.head(self.norm(x)), y)


def batch(i: int, size: int = 64, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(size, WIDTH, generator=generator)
    teacher = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(12345))
    return x.to(device), (x.tanh() @ teacher).argmax(1).to(device)


def make(
    device: str = "cpu", lr: float = 3e-3, transform: dict | None = None, optimizer=torch.optim.AdamW, **options
) -> ResuCycle:
    torch.manual_seed(0)
    defaults = {"cycles": 2, "steps_per_cycle": 30, "split": (0.4, 0.2, 0.4), "sparsity_start": 0.5, "amnesty_end": 0.1}
    config = CycleConfig(**(defaults | options))
    model = fxresu.transform(
        Net().to(device),
        sparsity=0.5,
        granularity=config.granularity,
        candidates=config.candidates,
        **{"compile": False, **(transform or {})},
    )
    return ResuCycle(model, optimizer(model.parameters(), lr=lr), config)


def run(cycle: ResuCycle, steps: int | None = None, device: str = "cpu") -> list[float]:
    steps = cycle.total_steps if steps is None else steps
    return [float(cycle.step(batch(cycle.global_step, device=device))) for _ in range(steps)]


def held_out(model: nn.Module, device: str = "cpu") -> float:
    with torch.no_grad():
        return float(torch.stack([model(*batch(10_000 + i, 256, device)) for i in range(4)]).mean())


def until(cycle: ResuCycle, stage: str, number: int = 0) -> None:
    while (cycle.cycle, cycle.stage) != (number, stage):
        cycle.step(batch(cycle.global_step))
