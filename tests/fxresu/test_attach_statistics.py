"""A loop of one's own, attached to a cycle: its last batches give the statistics that scores need."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fxresu_cycles import Net, batch
from torch import nn

import fxresu
from fxresu.attach import attach
from fxresu.errors import ConfigError
from fxresu.mask_change import total_sparsity

STEPS = {"cycles": 1, "train_steps": 5, "stabilize_steps": 2, "resu_steps": 4, "schedule": "constant",
         "sparsity_end": 0.5, "calibration_batches": 2}  # fmt: skip


class Logits(nn.Module):
    """A model that leaves the loss to its loop."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.relu(self.body(x)))


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_wanda_and_snip_without_calibration_batches(autocast: torch.dtype | None, compile: object) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {**STEPS, "prune_score": "wanda", "stabilizer": "dsnot", "commit_score": "snip"}
    attached = attach(model, optimizer, options, transform={"compile": compile})
    losses, told = [], []
    attached.cycle.on_step(lambda event: told.append(float(event.loss)))
    for i in range(11):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(*batch(i))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert attached.cycle.finished and total_sparsity(model) == 0.5
    assert told == pytest.approx(losses), "batches that were looked at do not count as trained on"
    assert attached.cycle.summaries[-1].resurrected > 0
    attached.detach()
    fxresu.untransform(model)


def test_gradients_need_a_loss_and_inputs_do_not() -> None:
    for score, works in (("wanda", True), ("snip", False)):
        model = Logits()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attached = attach(model, optimizer, {**STEPS, "prune_score": score}, transform={"compile": False})

        def loop(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            for i in range(6):
                x, y = batch(i)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()

        if works:
            loop()
            assert attached.cycle.stage == "stabilize"
        else:
            with pytest.raises(ConfigError, match="need a scalar loss, which the model's output does not hold"):
                loop()
        attached.detach()
